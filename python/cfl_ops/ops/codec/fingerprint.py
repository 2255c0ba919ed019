"""fingerprint: 64 bits of a tensor's dtype and bytes, the same on every device; a delta knows its base by them.

Words are multiplied with keys of their places and summed up, so that the sum can be taken in any order, and that of a
result follows from that of its base and the changes. It guards against accidents, not against forgers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfl_ops.ops.codec.changes import FINGERPRINT, INTS
from cfl_ops.ops.codec.layout import DTYPES, NOT_COPIED
from cfl_ops.ops.codec.plan import dense

_MASK = 2**64 - 1


def copyable(w: Tensor) -> Tensor:
    """The tensor, or a view of its integers where its dtype is one that torch does not copy, or not bit for bit."""
    if w.dtype in NOT_COPIED or w.dtype == torch.bool:
        return w.view(torch.uint8 if w.itemsize == 1 else torch.int16)
    return w


def resolved(w: Tensor) -> Tensor:
    """The tensor, or a copy in which conjugation and negation are done: of bits, as floats may lose NaN payloads."""
    if not (w.is_conj() or w.is_neg()):
        return w
    bits = _unmarked_bits(w.detach()).clone(memory_format=torch.contiguous_format)
    return _change_signs(bits, w).view(w.dtype).view(w.shape)


def write_bits(target: Tensor, values: Tensor) -> None:
    """Put values, of any shape, in the order of its elements into a tensor, whichever marks it has."""
    if not (target.is_conj() or target.is_neg()):
        target = copyable(target)
        target.copy_(values.view(target.dtype).view(target.shape))
        return
    bits = _unmarked_bits(target)
    bits.copy_(_change_signs(values.view(bits.dtype).view(bits.shape).clone(), target))


def _unmarked_bits(w: Tensor) -> Tensor:
    """The memory of a tensor with marks as integers; of a complex one with real and imaginary parts at the end."""
    if w.is_conj():
        w = w.conj()
    if w.is_neg():
        w = torch._neg_view(w)
    if w.dtype.is_complex:
        w = torch.view_as_real(w)
    return w.view(INTS[w.element_size()])


def _change_signs(bits: Tensor, like: Tensor) -> Tensor:
    """In place, the signs of integers that stand for the elements of a tensor, as its marks say."""
    sign = torch.iinfo(bits.dtype).min
    if not like.dtype.is_complex:
        return bits.bitwise_xor_(sign) if like.is_neg() else bits
    if like.is_neg():
        bits[..., 0].bitwise_xor_(sign)
    if like.is_neg() != like.is_conj():
        bits[..., 1].bitwise_xor_(sign)
    return bits


def flat_bits(w: Tensor) -> Tensor:
    """The elements of a tensor (or their integers) in one dimension, one after the other; a view where they lie so."""
    w = copyable(resolved(w.detach()))
    return w.reshape(-1) if w.numel() == 0 else dense(w)


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
