"""fingerprint: 64 bits of a tensor's dtype and bytes, the same on every device; a delta knows its base by them.

Words are multiplied with keys of their places and summed up, so that the sum can be taken in any order, and that of a
result follows from that of its base and the changes. It guards against accidents, not against forgers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfl_ops.ops.codec.changes import FINGERPRINT
from cfl_ops.ops.codec.layout import DTYPES, NOT_COPIED
from cfl_ops.ops.codec.plan import dense

_MASK = 2**64 - 1


def copyable(w: Tensor) -> Tensor:
    """The tensor, or a view of its integers where its dtype is one that torch does not copy."""
    return w.view(torch.uint8 if w.itemsize == 1 else torch.int16) if w.dtype in NOT_COPIED else w


def flat_bits(w: Tensor) -> Tensor:
    """The elements of a tensor (or their integers) in one dimension, one after the other; a view where they lie so."""
    w = copyable(w.detach())
    return w.reshape(-1) if w.numel() == 0 else dense(w.resolve_conj().resolve_neg())


def as_uint8(flat: Tensor) -> Tensor:
    """The bytes of what flat_bits returns."""
    if flat.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device=flat.device)
    return flat.view(torch.uint8)


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
