"""The arguments of the codec's longer ops, as their schemas have them, and the checks that several ops make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.arguments import within
from cfl_ops.ops.codec import codes


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


def check_encoded(op: str, numel: int, shape: Sequence[int], chunk_log2: int, reserve: int) -> None:
    """Raise for what is wrong with the arguments of an op that encodes so many symbols."""
    within(op, "the number of symbols", numel, 0, codes.MAX_SYMBOLS)
    within(op, "chunk_log2", chunk_log2, codes.MIN_CHUNK_LOG2, codes.MAX_CHUNK_LOG2)
    within(op, "reserve", reserve, 0, codes.MAX_RESERVE + 32 * numel)
    within(op, "the dimensions of shape", len(shape), 0, codes.MAX_DIMS)
    if any(isinstance(extent, torch.SymInt) for extent in (numel, *shape)):
        return
    if min(shape, default=0) < 0 or math.prod(shape) != numel:
        raise ValueError(f"cfl_ops.{op}: shape must hold {numel} elements, but got {tuple(shape)}")


def check_data(op: str, name: str, value: Any) -> None:
    """Raise unless ``value`` is a tensor whose bytes can be looked at."""
    checks.tensor(op, name, value, 0)
    if torch.compiler.is_compiling():
        return
    if value.is_meta:
        raise ValueError(f"cfl_ops.{op}: {name} must have data, but it is on the device meta")
    real = value.dtype.is_floating_point or value.dtype.is_complex
    if real and torch._C._functorch.is_gradtrackingtensor(value):
        raise RuntimeError(
            f"cfl_ops.{op}: {name} is differentiated by torch.func, but no gradient passes its bytes: call this "
            "outside of the transform"
        )


def check_bytes(op: str, name: str, value: Tensor) -> None:
    """Raise unless ``value`` is bytes in one dimension."""
    if value.dtype != torch.uint8 or value.ndim != 1:
        raise ValueError(
            f"cfl_ops.{op}: {name} must be a 1-d uint8 tensor, but got {value.dtype} of shape {tuple(value.shape)}"
        )


def check_contiguous(op: str, name: str, value: Tensor) -> None:
    """Raise unless the elements of ``value`` lie one after the other."""
    if not value.is_contiguous():
        raise ValueError(f"cfl_ops.{op}: {name} must be contiguous, but got strides {value.stride()}")
