"""The bytes before the chunks of a payload: written, read and checked."""

from __future__ import annotations

import ctypes
import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from cfl_ops.ops.codec import codes
from cfl_ops.ops.codec.codes import Corrupt
from cfl_ops.ops.codec.reference.huffman_code import build_tree, unpack_lengths

MAGIC, VERSION, PIVOT_LAYOUT = b"CFLH", 1, 1
HEADER_BYTES = 40


def as_bytes(data: Tensor) -> bytes:
    """The bytes of a uint8 tensor."""
    data = data.detach().cpu().contiguous()
    return ctypes.string_at(data.data_ptr(), data.numel()) if data.numel() else b""


def memory_of(data: Tensor) -> memoryview[int]:
    """The bytes of a uint8 tensor, copied only where it is not contiguous or not on the CPU."""
    data = data.detach().cpu().contiguous()
    if data.numel() == 0:
        return memoryview(b"")
    array = (ctypes.c_uint8 * data.numel()).from_address(data.data_ptr())
    array.owner = data  # type: ignore[attr-defined]  # which lives as long as a view of it
    return memoryview(array).cast("B")


def from_bytes(data: bytes, device: torch.device | None = None) -> Tensor:
    """A fresh uint8 tensor of these bytes."""
    out = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return out if device is None else out.to(device)


def symbol_dtype(bits: int) -> torch.dtype:
    """Of symbols of that many bits."""
    return torch.uint8 if bits <= 8 else torch.uint16


@dataclass
class Header:
    """What the header of a payload says, all of it checked."""

    symbol_bytes: int
    chunk_log2: int
    numel: int
    shape: tuple[int, ...]
    sizes: list[int]
    checksums: list[int]
    data: int
    lengths: list[int]


def prefix(size: int) -> int:
    """Bytes to fetch at once (to synchronise only once) in the hope that they hold the whole header.

    A table of 65,536 code lengths takes less than 49 KB; 8 bytes for each chunk are 1 / 2,048 of the payload
    where chunks have at least 16 KB, as those of 2^15 symbols of 4 bits have.
    """
    return min(size, (1 << 16) + size // 2048)


def parse(payload: Tensor) -> Header:
    """Read and check the header of a payload; raises Corrupt."""
    size = payload.numel()
    try:
        return parse_bytes(as_bytes(payload[: prefix(size)]), size)
    except Corrupt as error:
        if error.code >= 0:
            raise
        return parse_bytes(as_bytes(payload[: -error.code]), size)


def parse_bytes(raw: bytes, size: int) -> Header:
    """As parse, from the first bytes of a payload of ``size``; Corrupt(-n): its header has n bytes."""
    if size < HEADER_BYTES:
        raise Corrupt(codes.TOO_SHORT)
    if len(raw) < HEADER_BYTES:
        raise Corrupt(-HEADER_BYTES)
    fixed = raw[:HEADER_BYTES]
    magic, version, layout, symbol_bytes, chunk_log2 = struct.unpack_from("<4s4B", fixed)
    numel, total, alphabet, ndim, table_bytes, checksum = struct.unpack_from("<QQIIII", fixed, 8)
    if magic != MAGIC:
        raise Corrupt(codes.BAD_MAGIC)
    if version != VERSION or layout != PIVOT_LAYOUT:
        raise Corrupt(codes.BAD_VERSION)
    if total != size:
        raise Corrupt(codes.BAD_LENGTH)
    if (
        symbol_bytes not in (1, 2)
        or not codes.MIN_CHUNK_LOG2 <= chunk_log2 <= codes.MAX_CHUNK_LOG2
        or numel > codes.MAX_SYMBOLS
        or ndim > codes.MAX_DIMS
        or alphabet > 256**symbol_bytes
        or (numel == 0) != (alphabet == 0)
    ):
        raise Corrupt(codes.BAD_HEADER)
    chunks = (numel + (1 << chunk_log2) - 1) >> chunk_log2
    head = HEADER_BYTES + 8 * ndim + table_bytes + 8 * chunks
    if head > size:
        raise Corrupt(codes.BAD_HEADER)
    if head > len(raw):
        raise Corrupt(-head)
    rest = raw[HEADER_BYTES:head]
    if zlib.crc32(rest, zlib.crc32(fixed[: HEADER_BYTES - 4])) != checksum:
        raise Corrupt(codes.BAD_HEADER_CHECKSUM)
    shape = struct.unpack_from(f"<{ndim}Q", rest)
    product = 1
    for extent in shape:
        product *= extent
    if max(shape, default=0) >= 2**63 or product != numel:
        raise Corrupt(codes.BAD_HEADER)
    entries = struct.unpack_from(f"<{2 * chunks}I", rest, 8 * ndim + table_bytes)
    if sum(entries[::2]) != size - head:
        raise Corrupt(codes.BAD_CHUNK_SIZES)
    lengths = unpack_lengths(rest[8 * ndim : 8 * ndim + table_bytes], alphabet)
    if numel:
        build_tree(lengths)
    return Header(
        symbol_bytes, chunk_log2, numel, shape, list(entries[::2]), list(entries[1::2]), head, lengths
    )


def head_bytes(
    symbol_bytes: int,
    chunk_log2: int,
    n: int,
    shape: tuple[int, ...],
    alphabet: int,
    table: bytes,
    entries: bytes,
) -> bytes:
    """All that comes before the chunks: ``table`` is the code table, ``entries`` the chunk table."""
    rest = struct.pack(f"<{len(shape)}Q", *shape) + table + entries
    data = sum(struct.unpack(f"<{len(entries) // 4}I", entries)[::2])
    head = struct.pack(
        "<4s4BQQIII",
        *(MAGIC, VERSION, PIVOT_LAYOUT, symbol_bytes, chunk_log2),
        *(n, HEADER_BYTES + len(rest) + data, alphabet, len(shape), len(table)),
    )
    return head + struct.pack("<I", zlib.crc32(rest, zlib.crc32(head))) + rest
