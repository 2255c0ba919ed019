"""fingerprint: 64 bits of a tensor's dtype and bytes, the same on every device; a delta knows its base by them.

Words are multiplied with keys of their places and summed up, so that the sum can be taken in any order, and that of a
result follows from that of its base and the changes. It guards against accidents, not against forgers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfl_ops.ops.codec.bits import as_uint8, flat_bits
from cfl_ops.ops.codec.changes import FINGERPRINT
from cfl_ops.ops.codec.layout import DTYPES

_MASK = 2**64 - 1


def byte_sum(w: Tensor) -> int:
    """What the fingerprint of a tensor is made from."""
    return int(FINGERPRINT(as_uint8(flat_bits(w))))


def finish(total: int, nbytes: int, dtype: torch.dtype) -> int:
    """The fingerprint, from the sum over the words."""
    x = (total + nbytes * 0xD6E8FEB86659FD93 + (DTYPES.index(dtype) + 1) * 0xA0761D6478BD642F) & _MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def fingerprint_of(w: Tensor) -> int:
    """64 bits that differ for tensors of other bytes or another dtype; synchronises a GPU."""
    return finish(byte_sum(w), w.numel() * w.element_size(), w.dtype)
