"""bits: the elements of any tensor as they lie in memory, whatever its dtype, strides and marks; and back."""

from __future__ import annotations

import torch
from torch import Tensor

from cfl_ops.ops.codec.layout import NOT_COPIED

INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dense(w: Tensor) -> Tensor:
    """In one dimension with a stride of 1, which a single element need not have to count as contiguous."""
    flat = w.reshape(-1)
    return flat if flat.stride(0) == 1 else flat.clone(memory_format=torch.contiguous_format)


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


def refuse_odd_bools(op: str, name: str, w: Tensor) -> None:
    """Raise for a bool whose byte is neither 0 nor 1: no reader takes it."""
    if w.dtype == torch.bool and w.numel() and int(as_uint8(flat_bits(w)).max()) > 1:
        raise ValueError(f"cfl_ops.{op}: {name} must have the byte 0 or 1 in each bool, but got another")
