"""blob_reader: the header of a blob, checked, before anything is allocated for what it promises."""

from __future__ import annotations

import math
import struct
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from cfl_ops.errors import CorruptDataError
from cfl_ops.ops.codec import codes, cuda
from cfl_ops.ops.codec.codes import Corrupt
from cfl_ops.ops.codec.huffman import check_payload, corrupt, read_header
from cfl_ops.ops.codec.layout import (
    BLOB,
    BLOB_BYTES,
    CHUNK,
    DTYPES,
    KINDS,
    LOSSLESS,
    MAGIC,
    PALETTE,
    RAW,
    ZERO_BINS,
    Lossless,
    lanes,
    parse_lossless,
    unpack_shape,
)
from cfl_ops.ops.codec.plan import zero_bin
from cfl_ops.ops.codec.reference.header import as_bytes, from_bytes, memory_of, prefix

_MOST = 8
"""So many bytes come from each byte of a code of several symbols, at most."""


class Blob(NamedTuple):
    """A checked blob: what decompress needs to know before it allocates anything."""

    shape: tuple[int, ...]
    numel: int
    dtype: torch.dtype
    data: Tensor
    raw: bool
    bits: int = 0
    group_size: int = 1
    minimum: Tensor | None = None
    maximum: Tensor | None = None
    where: Tensor | None = None
    exceptions: Tensor | None = None
    zero_bins: Tensor | None = None
    """The weight of each group that stands for 0, in a blob where 0 is exact."""
    palette: Tensor | None = None
    lossless: bool = False


def contradiction(op: str) -> CorruptDataError:
    return corrupt(op, "the blob has a header that contradicts itself")


def parse_blob(op: str, blob: Tensor, look: bool = True) -> Blob:
    """Read and check the header; and the data of a raw blob, with ``look``."""
    size = blob.numel()
    if size < BLOB_BYTES:
        raise corrupt(op, "the blob is too short to hold a header")
    near = blob  # what can be read without synchronising: of a blob on a GPU, its first bytes
    if cuda.synchronises(blob):
        near = cuda.to_host(blob[: prefix(size)])
    fixed = as_bytes(near[:BLOB_BYTES])
    magic, version, kind, code, bits, total, group_size, groups, exceptions, _, last = BLOB.unpack_from(fixed)
    (checksum,) = struct.unpack_from("<I", fixed, BLOB.size)
    if magic != MAGIC:
        raise corrupt(op, "the blob does not start with the codec's mark")
    if kind not in KINDS.get(version, ()) or code >= len(DTYPES):
        raise corrupt(op, "the blob was written in a version that this reader does not know")
    if kind == LOSSLESS:
        return _lossless(op, blob, near)
    if total != size:
        raise corrupt(op, "the blob has another length than its header says (truncated or extended)")
    dtype = DTYPES[code]
    element = dtype.itemsize
    if kind == RAW:
        ndim, table_bytes = group_size, 8 * group_size if version == 1 else exceptions
    elif kind == PALETTE:
        table_bytes = group_size * element
    else:
        table_bytes = 2 * groups * element + exceptions * (8 + element)
    head = BLOB_BYTES + table_bytes
    if head > size or (kind == RAW and head + groups != size):
        raise contradiction(op)
    table = as_bytes((near if head <= near.numel() else blob)[BLOB_BYTES:head])
    if zlib.crc32(table, zlib.crc32(fixed[: BLOB.size])) != checksum:
        raise corrupt(op, "the blob has a damaged header (checksum)")
    data = blob[head:]
    if kind == RAW:
        shape = _raw_shape(op, table, ndim, version)
        if not codes.shape_fits(shape) or math.prod(shape) * element != groups:
            raise contradiction(op)
        if look and zlib.crc32(memory_of(data)) != last:
            raise corrupt(op, "the data of the blob are damaged (checksum)")
        if look and dtype == torch.bool and bool((data > 1).any()):
            raise corrupt(op, "the data of the blob are neither true nor false")
        return Blob(shape, math.prod(shape), dtype, data, True)

    header = read_header(op, data, None if near is blob or head >= near.numel() else near[head:])
    if kind == PALETTE:
        if (
            code > 3
            or header.symbol_bytes != 1
            or not 1 <= group_size <= 256
            or any((groups, exceptions, bits, last))
        ):
            raise contradiction(op)
        palette = from_bytes(table, blob.device).view(dtype)
        return Blob(header.shape, header.numel, dtype, header.payload, False, palette=palette)
    if not 1 <= bits <= 16 or code > 3 or header.symbol_bytes != (1 if bits <= 8 else 2):
        raise contradiction(op)
    if last != (ZERO_BINS if version == 2 else 0):
        raise contradiction(op)
    if not 1 <= group_size < 2**63 or -(-header.numel // group_size) != groups:
        raise contradiction(op)
    at = 8 * exceptions
    ranges = from_bytes(table[at : at + 2 * groups * element]).view(dtype)
    minimum, maximum = ranges[:groups], ranges[groups:]
    if groups == 1:  # the common case, without the overhead of small tensors
        low, high = ranges.tolist()
        good = math.isfinite(low) and math.isfinite(high) and low <= high
    else:
        good = bool((minimum.isfinite() & maximum.isfinite() & (minimum <= maximum)).all())
    index = values = None
    if exceptions:
        index = from_bytes(table[:at]).view(torch.int64)
        values = from_bytes(table[at + 2 * groups * element :]).view(dtype)
        rising = bool((index[1:] > index[:-1]).all())
        if not rising or int(index[0]) < 0 or int(index[-1]) >= header.numel:
            raise contradiction(op)
    if not good:
        raise corrupt(op, "the blob has a range that is not finite or not ordered")
    centre = zero_bin(minimum, maximum, bits) if last else None
    if cuda.synchronises(blob):
        minimum = cuda.to_device(minimum, blob.device)
        maximum = cuda.to_device(maximum, blob.device)
        if index is not None and values is not None:
            index, values = index.to(blob.device), values.to(blob.device)
        centre = None if centre is None else centre.to(blob.device)
    return Blob(
        header.shape,
        header.numel,
        dtype,
        header.payload,
        False,
        bits,
        group_size,
        minimum,
        maximum,
        index,
        values,
        centre,
    )


def _raw_shape(op: str, table: bytes, ndim: int, version: int) -> tuple[int, ...]:
    if version == 1:
        return struct.unpack(f"<{ndim}Q", table)
    try:
        shape, end = unpack_shape(table, ndim) if ndim <= codes.MAX_DIMS else ((), -1)
    except Corrupt:
        raise contradiction(op) from None
    if end != len(table):
        raise contradiction(op)
    return shape


def _lossless(op: str, blob: Tensor, near: Tensor) -> Blob:
    head = lossless_head(op, blob, near)
    if head.lanes * lanes(head.code).width > _MOST * blob.numel():
        # A code of one symbol takes no bits: do not allocate what a damaged header may ask for.
        at = head.head + head.stored
        for chosen, sizes in zip(head.maps, head.sizes, strict=True):
            for number, size in enumerate(sizes, 1):
                missing = len(chosen) * CHUNK - head.lanes if chosen[-1] == number else 0
                held = chosen.count(number) * CHUNK - missing
                found = read_header(op, blob[at : at + size])
                if (found.symbol_bytes, found.numel) != (1, held):
                    raise contradiction(op)
                at += size
    return Blob(head.shape, head.numel, DTYPES[head.code], blob, False, lossless=True)


def lossless_head(op: str, blob: Tensor, near: Tensor) -> Lossless:
    """Of a lossless blob, of which ``near`` are first bytes on the host; raises CorruptDataError."""
    size = blob.numel()
    try:
        first = memory_of(near[: prefix(size)])
        try:
            return parse_lossless(first, size)
        except Corrupt as error:
            if error.code >= 0:
                raise
            return parse_lossless(as_bytes(blob[: -error.code]), size)
    except Corrupt as error:
        raise corrupt(op, f"the blob {codes.WORDS[error.code]}") from None


class Description(NamedTuple):
    """What the header of a blob says."""

    kind: str
    """``"raw"``, ``"quantised"``, ``"palette"`` or ``"lossless"``."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    numel: int
    nbytes: int
    """Of the blob."""
    bits: int | None
    """Of a symbol before coding, where the weights are quantised."""
    group_size: int | None
    """How many weights share a range, where they are quantised."""
    exceptions: int
    """Weights that are kept exactly beside the quantised ones."""


def describe(blob: Tensor, op: str = "describe") -> Description:
    """What a blob holds, from its header alone (of a raw blob the data are not looked at); raises CorruptDataError."""
    check_payload(op, "blob", blob)
    parsed = parse_blob(op, blob, look=False)
    kind = "quantised"
    if parsed.lossless:
        kind = "lossless"
    elif parsed.raw:
        kind = "raw"
    elif parsed.palette is not None:
        kind = "palette"
    quantised = kind == "quantised"
    return Description(
        kind,
        parsed.dtype,
        parsed.shape,
        parsed.numel,
        blob.numel(),
        parsed.bits if quantised else None,
        parsed.group_size if quantised else None,
        0 if parsed.exceptions is None else parsed.exceptions.numel(),
    )
