"""lossless: a tensor's bytes as planes, of which those that pay are Huffman-coded. docs/format.md has the bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cfl_ops._core.arguments import within
from cfl_ops._core.failures import error_message
from cfl_ops._core.op import define_op
from cfl_ops.errors import CorruptDataError
from cfl_ops.ops.codec import codes, layout, planes
from cfl_ops.ops.codec.arguments import check_bytes, check_contiguous
from cfl_ops.ops.codec.codes import Corrupt
from cfl_ops.ops.codec.huffman import DATA_DEPENDENT, NO_VMAP, corrupt


def _encode_python(data: Tensor, dtype: int, shape: Sequence[int]) -> Tensor:
    return planes.encode(data, dtype, shape)


def _encode_fake(data: Tensor, dtype: int, shape: Sequence[int]) -> Tensor:
    return data.new_empty(torch.library.get_ctx().new_dynamic_size(min=0))


def _check_encode(data: Tensor, dtype: int, shape: Sequence[int]) -> None:
    op = "lossless_encode"
    check_bytes(op, "data", data)
    within(op, "dtype", dtype, 0, len(layout.DTYPES) - 1)
    within(op, "the dimensions of shape", len(shape), 0, codes.MAX_DIMS)
    size = layout.DTYPES[dtype].itemsize
    if any(isinstance(extent, torch.SymInt) for extent in (data.numel(), *shape)):
        return
    if min(shape, default=0) < 0 or not codes.shape_fits(shape) or math.prod(shape) * size != data.numel():
        raise ValueError(
            f"cfl_ops.{op}: shape must hold {data.numel()} bytes in elements of {size}, but got {tuple(shape)}"
        )


def _decode_python(blob: Tensor, out: Tensor, start: int) -> Tensor:
    try:
        parsed = planes.parse(blob)
        size = layout.DTYPES[parsed.code].itemsize
        if out.numel() % size:
            raise Corrupt(codes.OUT_OF_RANGE)
        found = planes.decode(blob, parsed, start, out.numel() // size)
    except Corrupt as error:
        return codes.info(error.code, blob.device)
    out.copy_(found)
    return codes.info(codes.GOOD, blob.device)


def _check_decode(blob: Tensor, out: Tensor, start: int) -> None:
    check_bytes("lossless_decode_", "blob", blob)
    check_bytes("lossless_decode_", "out", out)
    check_contiguous("lossless_decode_", "out", out)


LOSSLESS_ENCODE = define_op(
    "lossless_encode(Tensor data, int dtype, SymInt[] shape) -> Tensor",
    python=_encode_python,
    fake=_encode_fake,
    shapes={"data": "uint8 ..."},
    check=_check_encode,
    no_vmap=NO_VMAP,
    tags=DATA_DEPENDENT,
)
"""The blob of the bytes of a tensor of that dtype (its number in layout.DTYPES); empty where raw ones are no more."""

LOSSLESS_DECODE = define_op(
    "lossless_decode_(Tensor blob, Tensor(a!) out, SymInt start) -> Tensor info",
    python=_decode_python,
    fake=lambda blob, out, start: blob.new_empty((), dtype=torch.int64),
    shapes={"blob": "uint8 ...", "out": "uint8 ..."},
    check=_check_decode,
    no_vmap=NO_VMAP,
    tags=(torch.Tag.cudagraph_unsafe,),
)
"""The bytes of the elements from ``start`` on, as many as ``out`` holds."""


@error_message("lossless_decode_")
def _explain(info: Tensor, context: Sequence[Tensor]) -> CorruptDataError:
    code = int(info)
    if code >= codes.BAD_CHUNK:
        return corrupt("decompress", f"chunk {code - codes.BAD_CHUNK} of the blob is damaged")
    if code == codes.OUT_OF_RANGE:
        return corrupt("decompress", "the blob does not hold the elements that out asks for")
    return corrupt("decompress", f"the blob {codes.WORDS[code]}")
