"""Two tensors piece by piece: whether their bits are the same, and by how much they differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cfl_ops.ops.codec.bits import as_uint8, flat_bits

__all__ = ["Difference", "difference", "same_bits"]

PIECE = 1 << 20
_CACHED = 1 << 16
Read = Callable[[int, int], Tensor]
"""Elements from one place to another of a flattened tensor."""


class Difference(NamedTuple):
    """Of what came back and what it was."""

    largest: float
    rms: float
    rms_over_std: float


def same_bits(mine: Read, other: Read, numel: int) -> bool:
    """Whether two tensors of one dtype and shape are equal bit for bit."""
    for start in range(0, numel, PIECE):
        stop = min(start + PIECE, numel)
        if not torch.equal(_bits(mine(start, stop)), _bits(other(start, stop))):
            return False
    return True


def difference(mine: Read, other: Read, numel: int) -> Difference:
    """Errors in float64. Where both have the same bits there is none; where one alone is finite it is infinite."""
    largest = squares = total = total_squares = 0.0
    finite = 0
    for start in range(0, numel, PIECE):
        stop = min(start + PIECE, numel)
        a, b = mine(start, stop).reshape(-1), other(start, stop).reshape(-1)
        for part, given in zip(a.split(_CACHED), b.split(_CACHED), strict=True):
            errors, values = _errors(part, given)
            low, high = errors.aminmax()
            largest = max(largest, -float(low), float(high))
            squares += float(torch.dot(errors, errors))
            total += float(values.sum())
            total_squares += float(torch.dot(values, values))
            finite += len(values)
    rms = math.sqrt(squares / numel) if numel else 0.0
    mean = total / max(1, finite)
    deviation = math.sqrt(max(0.0, total_squares / max(1, finite) - mean * mean))
    return Difference(largest, rms, rms / deviation if deviation else (0.0 if rms == 0 else math.inf))


def _errors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of each element the error, and the values of b that are finite; in float64, complex ones as two numbers."""
    if b.is_complex():
        a, b = torch.view_as_real(a).reshape(-1), torch.view_as_real(b).reshape(-1)
    values = b.to(torch.float64)
    errors = a.to(torch.float64).sub_(values)
    if math.isfinite(float(errors.sum())):
        return errors, values
    same = (_bits(a).view(len(a), -1) == _bits(b).view(len(b), -1)).all(1)
    return errors.masked_fill_(same, 0).nan_to_num_(math.inf, math.inf, -math.inf), values[values.isfinite()]


def _bits(tensor: Tensor) -> Tensor:
    return as_uint8(flat_bits(tensor))
