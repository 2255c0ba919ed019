"""The arguments of the codec: checks of its numbers, and the tuples of its longer ops, as their schemas have them."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


def _plain(value: Any) -> Any:
    """The number in a 0-d tensor or array; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def integer(op: str, name: str, value: Any, low: int | None = None, high: int = 2**63 - 1) -> int:
    """``value`` as an int, from ``low`` to ``high`` where given; numpy's integers and 0-d tensors are integers too."""
    number = value if type(value) is int else _plain(value)
    whole = isinstance(number, numbers.Integral) and not isinstance(number, bool)
    if not whole or not (low is None or low <= number <= high):
        limits = "" if low is None else f" from {low} to {high if high < 2**63 - 1 else '2^63 - 1'}"
        raise ValueError(f"cfl_ops.{op}: {name} must be an integer{limits}, but got {value!r}")
    return int(number)


def real(op: str, name: str, value: Any) -> float:
    """``value`` as a finite float; numpy's numbers and 0-d tensors are numbers too."""
    number = value if type(value) is float else _plain(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise TypeError(f"cfl_ops.{op}: {name} must be a number, but got {type(value).__name__}")
    if not math.isfinite(number):
        raise ValueError(f"cfl_ops.{op}: {name} must be finite, but got {number}")
    return float(number)


class QuantizeEncodeArguments(NamedTuple):
    """The arguments of the op behind :func:`compress`."""

    w: Tensor
    minimum: Tensor
    maximum: Tensor
    bits: int
    shape: Sequence[int]
    chunk_log2: int
    reserve: int
    """Bytes of zero before the payload, for the header of a blob."""


class DecompressArguments(NamedTuple):
    """The arguments of the op behind :func:`decompress`."""

    payload: Tensor
    minimum: Tensor
    maximum: Tensor
    bits: int
    group_size: int
    out: Tensor
    start: int

    def in_range(self) -> bool:
        """Whether there is a range for every weight that is asked for."""
        count = self.out.numel()
        last = (self.start + count - 1) // self.group_size if count else -1
        return self.start >= 0 and last < self.minimum.numel()
