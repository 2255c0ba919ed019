"""The arguments of the codec's longer ops, as their schemas have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


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
