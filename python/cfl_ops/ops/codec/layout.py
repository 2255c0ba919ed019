"""The fixed bytes of a blob, its dtypes, and how an element of each falls into planes of bytes (docs/format.md)."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from cfl_ops.ops.codec import codes
from cfl_ops.ops.codec.codes import Corrupt

MAGIC = b"CFLC"
BLOB = struct.Struct("<4s4BQQQQdI")  # then a checksum: 56 bytes
BLOB_BYTES = BLOB.size + 4
RAW, QUANTIZED, PALETTE, LOSSLESS = 0, 1, 2, 3
KINDS = {1: (RAW, QUANTIZED), 2: (QUANTIZED, PALETTE), 3: (RAW, LOSSLESS)}
"""What each version has; a writer uses the lowest that says what it has to, so that old readers read on."""
ZERO_BINS = 1
"""Version 2, quantised: the bin that 0 falls into reads as 0."""
DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex32),
    *(torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
    *(getattr(torch, f"{kind}{bits}") for kind in ("int", "uint") for bits in range(1, 8)),
    *(torch.bits8, torch.bits16, torch.bits1x8, torch.bits2x4, torch.bits4x2),
)
NOT_COPIED = DTYPES[21:]
"""Of one or two bytes, and torch neither copies them nor makes them contiguous: they are looked at as integers."""
MOST_RAW_DIMS = 13
"""So many dimensions fit into 8 bytes each within the 160 bytes that a blob may add; more are numbers of few bytes."""
CHUNK_LOG2 = 15
CHUNK = 1 << CHUNK_LOG2
"""Lanes of a chunk of a lossless blob, the unit of its checksums, its code tables and of random access."""
MAX_TABLES = 16
"""Code tables of a plane."""
_PAYLOAD = 48
"""Of a payload, the bytes of its header and its shape; and it has 8 for each chunk."""


class Lanes(NamedTuple):
    """How an element is cut: ``per`` lanes of ``width`` bytes, and what is done to a lane's bits before."""

    per: int
    width: int
    rotated: bool
    """A float: rotated left by one bit, so that its exponent fills bytes and its sign is the lowest bit."""

    @property
    def rebiased(self) -> bool:
        """float64: its exponent of 11 bits is moved, so that the low 8 hold those of usual weights."""
        return self.rotated and self.width == 8


def lanes(code: int) -> Lanes:
    """Of the dtype with this number."""
    dtype = DTYPES[code]
    per = 2 if dtype.is_complex else 1
    return Lanes(per, dtype.itemsize // per, dtype.is_floating_point or dtype.is_complex)


def pack_shape(shape: Sequence[int]) -> bytes:
    """The extents in groups of 7 bits, the low one first, with the top bit where another follows."""
    out = bytearray()
    for extent in shape:
        value = int(extent)
        while value >= 128:
            out.append(value & 127 | 128)
            value >>= 7
        out.append(value)
    return bytes(out)


def unpack_shape(raw: bytes | memoryview[int], ndim: int) -> tuple[tuple[int, ...], int]:
    """The extents, and how many bytes they take; raises Corrupt for what pack_shape does not write."""
    shape, at = [], 0
    for _ in range(ndim):
        value = shift = 0
        while True:
            if at >= len(raw) or shift > 56:
                raise Corrupt(codes.BAD_HEADER)
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        if byte == 0 and shift > 7:
            raise Corrupt(codes.BAD_HEADER)
        shape.append(value)
    if not codes.shape_fits(shape):
        raise Corrupt(codes.BAD_HEADER)
    return tuple(shape), at


class Lossless(NamedTuple):
    """The checked head of a lossless blob."""

    code: int
    """Of the dtype."""
    shape: tuple[int, ...]
    numel: int
    maps: list[bytes]
    """Of each plane, for each chunk: 0 where it is stored, else the number of its code table."""
    sizes: list[list[int]]
    """Bytes of the payload of each table of each plane."""
    checksums: list[int]
    """Of the stored pieces of each chunk, which lie one after the other."""
    head: int
    """Bytes before the first stored piece."""
    stored: int
    """Bytes of all stored pieces."""

    @property
    def lanes(self) -> int:
        """How many lanes each plane has."""
        return self.numel * lanes(self.code).per


def parse_lossless(raw: bytes | memoryview[int], size: int) -> Lossless:
    """Read and check it from the first bytes of a blob of ``size``; Corrupt(-n): its head has n bytes."""
    if size < BLOB_BYTES:
        raise Corrupt(codes.TOO_SHORT)
    if len(raw) < BLOB_BYTES:
        raise Corrupt(-BLOB_BYTES)
    magic, version, kind, code, log2, total, numel, table, *_, ndim = BLOB.unpack_from(raw)
    (checksum,) = struct.unpack_from("<I", raw, BLOB.size)
    if magic != MAGIC:
        raise Corrupt(codes.BAD_MAGIC)
    if version != 3 or kind != LOSSLESS or code >= len(DTYPES) or log2 != CHUNK_LOG2:
        raise Corrupt(codes.BAD_VERSION)
    if total != size:
        raise Corrupt(codes.BAD_LENGTH)
    head = BLOB_BYTES + table
    if head > size:
        raise Corrupt(codes.BAD_HEADER)
    if head > len(raw):
        raise Corrupt(-head)
    rest = raw[BLOB_BYTES:head]
    if zlib.crc32(rest, zlib.crc32(raw[: BLOB.size])) != checksum:
        raise Corrupt(codes.BAD_HEADER_CHECKSUM)
    if ndim > codes.MAX_DIMS or any(raw[32:48]):
        raise Corrupt(codes.BAD_HEADER)
    shape, at = unpack_shape(rest, ndim)
    cut = lanes(code)
    n = numel * cut.per
    if math.prod(shape) != numel or not 0 < n <= codes.MAX_SYMBOLS:
        raise Corrupt(codes.BAD_HEADER)
    chunks = -(-n // CHUNK)
    maps, tables = [], []
    for _ in range(cut.width):
        if at >= len(rest) or rest[at] > MAX_TABLES:
            raise Corrupt(codes.BAD_HEADER)
        count, at = rest[at], at + 1
        if count == 0:
            chosen = bytes(chunks) if n <= size else b""
        else:
            chosen, at = bytes(rest[at : at + chunks]), at + chunks
        if len(chosen) != chunks or set(chosen) - {0} != set(range(1, count + 1)):
            raise Corrupt(codes.BAD_HEADER)
        maps.append(chosen)
        tables.append(count)
    if at + 8 * sum(tables) > len(rest):
        raise Corrupt(codes.BAD_HEADER)
    sizes = []
    for count, chosen in zip(tables, maps, strict=True):
        sizes.append(list(struct.unpack_from(f"<{count}Q", rest, at)))
        at += 8 * count
        for number, found in enumerate(sizes[-1], 1):
            if found < _PAYLOAD + 8 * chosen.count(number):
                raise Corrupt(codes.BAD_HEADER)
    pieces = sum(chosen.count(0) for chosen in maps)
    short = sum(chosen[-1] == 0 for chosen in maps)
    stored = pieces * CHUNK - short * (chunks * CHUNK - n)
    if len(rest) != at + 4 * chunks or head + stored + sum(map(sum, sizes)) != size:
        raise Corrupt(codes.BAD_HEADER)
    checksums = list(struct.unpack_from(f"<{chunks}I", rest, at))
    return Lossless(code, shape, numel, maps, sizes, checksums, head, stored)
