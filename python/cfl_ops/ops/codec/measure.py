"""measure: the errors of a blob and the spread of weights, with the same result on every device.

Within rows of 2^16 the values are scaled by powers of two to integers below 2^18, so that float64 adds their squares
without rounding, in whatever order; the rows' sums are added by ``math.fsum``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from cfl_ops.ops.codec.blob import decompress
from cfl_ops.ops.codec.plan import dense
from cfl_ops.ops.codec.sample import sample_index

_ROW = 1 << 16
_PIECE = 1 << 20
"""Weights that are decoded at once: whole chunks of the payload, and rows."""
_GRAIN = 17


class Errors(NamedTuple):
    """How far the finite weights of a tensor come back from what they were; never too small."""

    rms: float
    """Too large by at most 2^-17 of the largest error of a row."""
    largest: float


class _Squares:
    """A sum of squares: integers, each with its power of two."""

    def __init__(self, magnitude: bool) -> None:
        self.magnitude = magnitude
        """Whether to round away from 0, so that the sum is not too small; else to the nearest."""
        self.terms: list[tuple[float, int]] = []
        self.sums: list[tuple[float, int]] = []
        """Of the values themselves, where they are not magnitudes."""
        self.largest = 0.0
        self.ignored = 0
        """Values where what was given is not finite."""

    def add(self, x: Tensor, given: Tensor) -> None:
        """Of float64 ``(rows, n)``, which is overwritten; what is not finite in ``given`` does not count."""
        top = self._top(x)
        if not all(map(math.isfinite, top)):
            bad = ~given.isfinite()
            self.ignored += int(bad.sum())
            x.masked_fill_(bad, 0)
            top = self._top(x)
        self.largest = max(self.largest, *top)
        if self.largest == math.inf:
            return
        shifts = [min(1023, _GRAIN - math.frexp(value)[1]) if value else 0 for value in top]
        if len(shifts) == 1:
            x.mul_(math.ldexp(1.0, shifts[0]))
        else:
            scale = torch.tensor([math.ldexp(1.0, shift) for shift in shifts], dtype=torch.float64)
            x.mul_(scale.to(x.device).unsqueeze(-1))
        if self.magnitude:
            x.abs_().ceil_()
        else:
            self.sums += zip(x.round_().sum(-1).tolist(), shifts, strict=True)
        squares = torch.linalg.vecdot(x, x).tolist() if len(x) > 1 else [float(torch.dot(x[0], x[0]))]
        self.terms += zip(squares, shifts, strict=True)

    @staticmethod
    def _top(x: Tensor) -> list[float]:
        low, high = x.aminmax(dim=-1)
        found: list[float] = torch.maximum(-low, high).tolist()
        return found

    def mean(self, n: int) -> tuple[float, int]:
        """The mean square of n values, and the exponent of the power of four that it is to be multiplied by."""
        terms = [(square, shift) for square, shift in self.terms if square]
        if not terms:
            return 0.0, 0
        least = min(shift for _, shift in terms)
        total = math.fsum(math.ldexp(square, 2 * (least - shift)) for square, shift in terms)
        return total / (n - self.ignored), -least


def _rows(n: int, on_cpu: bool) -> Iterator[tuple[int, int, int]]:
    """The first of some weights, how many rows they are, and how long; all of n weights in turn."""
    most = 1 if on_cpu else 256  # a row stays in the cache
    at = 0
    while at < n:
        rows = min(most, max(1, (n - at) // _ROW))
        width = min(_ROW, n - at)
        yield at, rows, width
        at += rows * width


def errors_of(w: Tensor, blob: Tensor) -> Errors:
    """Of what the blob gives back, decoded piece by piece."""
    flat, n = dense(w.detach()), w.numel()
    squares = _Squares(True)
    on_cpu = w.device.type == "cpu"
    piece = max(1, min(n, _PIECE) if on_cpu else n)
    out = torch.empty(piece, dtype=w.dtype, device=w.device)
    work = torch.empty(min(_ROW, n), dtype=torch.float64)
    for first in range(0, n, piece):
        given = flat[first : first + piece]
        back = decompress(blob, out[: len(given)], start=first, stop=first + len(given))
        for at, rows, width in _rows(len(given), on_cpu):
            here = slice(at, at + rows * width)
            x = work[:width].copy_(back[here]) if on_cpu else back[here].to(torch.float64, copy=True)
            x.sub_(given[here])
            squares.add(x.view(rows, width), given[here].view(rows, width))
            if squares.largest == math.inf:
                return Errors(math.inf, math.inf)
    mean, exponent = squares.mean(n)
    return Errors(math.ldexp(math.sqrt(mean), exponent), squares.largest)


def deviation_of(w: Tensor) -> float:
    """The standard deviation of the finite weights (over their number): 2^-11 of it too small, and never too large."""
    flat, n = dense(w.detach()), w.numel()
    some = flat[sample_index(n, max(1, n // 1024), flat.device)].to("cpu", torch.float64)
    some = some[some.isfinite()]
    centre = math.fsum((some / max(1, len(some))).tolist())
    squares = _Squares(False)
    for at, rows, width in _rows(n, w.device.type == "cpu"):
        given = flat[at : at + rows * width].view(rows, width)
        squares.add(given.to(torch.float64, copy=True).sub_(centre), given)
    if squares.largest == math.inf:
        return math.inf
    mean, exponent = squares.mean(n)
    off = math.fsum(math.ldexp(total, -shift - exponent) for total, shift in squares.sums)
    variance = mean - (off / max(1, n - squares.ignored)) ** 2
    return math.ldexp(math.sqrt(max(0.0, variance)), exponent) * (1 - 2.0**-11)


def rms_of(x: Tensor) -> float:
    """The root mean square of some numbers; NaN where one of them is not finite."""
    flat, squares = dense(x.detach()), _Squares(False)
    for at, rows, width in _rows(x.numel(), x.device.type == "cpu"):
        values = flat[at : at + rows * width].view(rows, width)
        squares.add(values.to(torch.float64, copy=True), values)
    if squares.ignored:
        return math.nan
    mean, exponent = squares.mean(x.numel())
    return math.ldexp(math.sqrt(mean), exponent)
