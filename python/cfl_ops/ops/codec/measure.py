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

from cfl_ops.ops.codec.bits import dense
from cfl_ops.ops.codec.blob import decompress
from cfl_ops.ops.codec.sample import sample_index

_ROW = 1 << 16
_PIECE = 1 << 20
"""Weights that are decoded at once: whole chunks of the payload, and rows."""
_GRAIN = 17
_DENORMAL = 2.0**-1000


def _powers(shifts: list[int], most: int) -> list[list[float]]:
    """Factors of 2^shift; two of each where the dtype has no such power of two, for values that are tiny."""
    first = [min(most, shift) for shift in shifts]
    rest = [shift - one for shift, one in zip(shifts, first, strict=True)]
    return [
        [math.ldexp(1.0, shift) for shift in part] for part in (first, rest) if part is first or any(part)
    ]


class Errors(NamedTuple):
    """How far the finite weights of a tensor come back from what they were; never too small."""

    rms: float
    """Too large by at most 2^-16 of the largest."""
    largest: float


class _Squares:
    """A sum of squares: integers, each with its power of two."""

    def __init__(self, signed: bool = False) -> None:
        self.signed = signed
        """Whether the plain sums are wanted too."""
        self.terms: list[tuple[float, int]] = []
        self.sums: list[tuple[float, int]] = []
        self.largest = 0.0
        self.ignored = 0
        """Values where what was given is not finite."""

    def add(self, x: Tensor, given: Tensor, squares: bool = True) -> None:
        """Of ``(rows, n)``, which is overwritten; what is not finite in ``given`` does not count."""
        top = self._top(x)
        if not all(map(math.isfinite, top)):
            bad = ~given.isfinite()
            self.ignored += int(bad.sum())
            x.masked_fill_(bad, 0)
            top = self._top(x)
        self.largest = max(self.largest, *top)
        if self.largest == math.inf or not squares:
            return
        shifts = [_GRAIN - math.frexp(value)[1] if value else 0 for value in top]
        for part in _powers(shifts, 1023 if x.dtype == torch.float64 else 126):
            if len(part) == 1:
                x.mul_(part[0])
            else:
                x.mul_(torch.tensor(part, dtype=x.dtype).to(x.device).unsqueeze(-1))
        wide = x.round_().to(torch.float64)
        if self.signed:
            self.sums += zip(wide.sum(-1).tolist(), shifts, strict=True)
        found = (
            torch.linalg.vecdot(wide, wide).tolist() if len(x) > 1 else [float(torch.dot(wide[0], wide[0]))]
        )
        self.terms += zip(found, shifts, strict=True)

    @staticmethod
    def _top(x: Tensor) -> list[float]:
        if len(x) == 1:
            low, high = x.view(-1).aminmax()
            return [max(-float(low), float(high)) if float(low) == float(low) else math.nan]
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

    def rms(self, n: int) -> float:
        """The root mean square of n values, which may be 2^-18 of the largest off."""
        mean, exponent = self.mean(n)
        return math.ldexp(math.sqrt(mean), exponent)


def _rows(n: int, on_cpu: bool) -> Iterator[tuple[int, int, int]]:
    """The first of some weights, how many rows they are, and how long; all of n weights in turn."""
    most = 1 if on_cpu else 256  # a row stays in the cache
    at = 0
    while at < n:
        rows = min(most, max(1, (n - at) // _ROW))
        width = min(_ROW, n - at)
        yield at, rows, width
        at += rows * width


def _work(dtype: torch.dtype) -> torch.dtype:
    """The dtype of differences."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def errors_of(w: Tensor, blob: Tensor, squares: bool = True) -> Errors:
    """Of what the blob gives back, decoded piece by piece; without ``squares`` the rms is 0."""
    flat, n = dense(w.detach()), w.numel()
    found = _Squares()
    on_cpu = w.device.type == "cpu"
    piece = max(1, min(n, _PIECE) if on_cpu else n)
    out = torch.empty(piece, dtype=w.dtype, device=w.device)
    work = torch.empty(2, _ROW if on_cpu else n, dtype=_work(w.dtype), device=w.device)
    for first in range(0, n, piece):
        given = flat[first : first + piece]
        back = decompress(blob, out[: len(given)], start=first, stop=first + len(given))
        for at, rows, width in _rows(len(given), on_cpu):
            here = slice(at, at + rows * width)
            x = work[0, : rows * width]
            if w.dtype == x.dtype:
                torch.sub(back[here], given[here], out=x)
            else:
                x.copy_(back[here]).sub_(work[1, : rows * width].copy_(given[here]))
            found.add(x.view(rows, width), given[here].view(rows, width), squares)
            if found.largest == math.inf:
                return Errors(math.inf, math.inf)
    # A difference is rounded, by 2^-24 of it at most; its square in the sum, by half a grain.
    largest = found.largest * (1 + 2.0**-22)
    rms = found.rms(n) * (1 + 2.0**-22) + largest * 2.0**-17 if found.largest else 0.0
    rms = math.nextafter(rms, math.inf) if rms < _DENORMAL else rms  # of few bits
    return Errors(min(rms, largest) if squares else 0.0, largest)


def deviation_of(w: Tensor) -> float:
    """The standard deviation of the finite weights (over their number): 2^-11 of it too small, and never too large."""
    flat, n = dense(w.detach()), w.numel()
    some = flat[sample_index(n, max(1, n // 1024), flat.device)].to("cpu", torch.float64)
    some = some[some.isfinite()]
    centre = math.fsum((some / max(1, len(some))).tolist())
    found = _Squares(signed=True)
    for at, rows, width in _rows(n, w.device.type == "cpu"):
        given = flat[at : at + rows * width].view(rows, width)
        found.add(given.to(_work(w.dtype), copy=True).sub_(centre), given)
    if found.largest == math.inf:
        return math.inf
    mean, exponent = found.mean(n)
    off = math.fsum(math.ldexp(total, -shift - exponent) for total, shift in found.sums)
    variance = mean - (off / max(1, n - found.ignored)) ** 2
    return math.ldexp(math.sqrt(max(0.0, variance)), exponent) * (1 - 2.0**-11)


def rms_of(x: Tensor) -> float:
    """The root mean square of some numbers; NaN where one of them is not finite."""
    flat, found = dense(x.detach()), _Squares()
    for at, rows, width in _rows(x.numel(), x.device.type == "cpu"):
        values = flat[at : at + rows * width].view(rows, width)
        found.add(values.to(_work(x.dtype), copy=True), values)
    return math.nan if found.ignored else found.rms(x.numel())
