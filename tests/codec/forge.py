"""Forged headers: a field of a payload, a blob or a file set to what no writer writes, and the checksums repaired.

Run as a module this is the test's other process (tests/codec/test_forged.py): a reader that aborts, or that
allocates what a header promises, takes only this one along.
"""

from __future__ import annotations

import itertools
import math
import random
import resource
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cfl_ops
import torch
from cfl_ops import CorruptDataError
from cfl_ops.ops.codec.reference.header import as_bytes, from_bytes

EXTREMES = (
    *(0, 1, 2, 3, 7, 8, 9, 16, 17, 63, 64, 65, 71, 255, 256, 257, 65_535, 65_536, 2**20, 2**31 - 1, 2**31),
    *(2**32 - 1, 2**32, 2**40, 2**40 + 1, 2**60, 2**61, 2**62, 2**63 - 1, 2**63, 2**63 + 1, 2**64 - 8, 2**64 - 1),
)
MEMORY = 2 << 30
"""Bytes that the reader may take beyond those that it has when it begins."""

Field = tuple[str, int, str]
PAYLOAD: tuple[Field, ...] = (
    *(("version", 4, "B"), ("layout", 5, "B"), ("symbol bytes", 6, "B"), ("chunk log2", 7, "B")),
    *(("symbols", 8, "Q"), ("total", 16, "Q"), ("alphabet", 24, "I"), ("dims", 28, "I"), ("table", 32, "I")),
)
BLOB: tuple[Field, ...] = (
    *(("version", 4, "B"), ("kind", 5, "B"), ("dtype", 6, "B"), ("bits", 7, "B"), ("total", 8, "Q")),
    *(("group", 16, "Q"), ("groups", 24, "Q"), ("exceptions", 32, "Q"), ("entropy", 40, "Q")),
)
FILE: tuple[Field, ...] = (
    *(("version", 4, "I"), ("total", 8, "Q"), ("entries", 16, "I"), ("index", 20, "I")),
    *(("size", 28, "Q"), ("name", 36, "I")),
)
ITEMSIZE = (2, 2, 4, 8, 1, 1, 1, 2, 4, 8, 2, 4, 8, 8, 16, 1, 1, 4)


def repair_payload(data: bytearray) -> None:
    """The header's checksum, over the bytes that the (forged) header says it has, as far as they are there."""
    (numel,), (dims, table) = struct.unpack_from("<Q", data, 8), struct.unpack_from("<II", data, 28)
    head = min(len(data), 40 + 8 * dims + table + 8 * -(-numel >> data[7]))
    struct.pack_into("<I", data, 36, zlib.crc32(data[40:head], zlib.crc32(data[:36])))


def repair_blob(data: bytearray) -> None:
    """As above; and of a raw blob the checksum of its data."""
    kind, dtype = data[5], data[6]
    group, groups, exceptions = struct.unpack_from("<QQQ", data, 16)
    element = ITEMSIZE[dtype % len(ITEMSIZE)]
    head = 56 + (8 * group if kind == 0 else 2 * groups * element + exceptions * (8 + element))
    head = min(len(data), head)
    if kind == 0:
        struct.pack_into("<I", data, 48, zlib.crc32(data[head:]))
    struct.pack_into("<I", data, 52, zlib.crc32(data[56:head], zlib.crc32(data[:52])))


def repair_file(data: bytearray) -> None:
    """As above; the blobs have checksums of their own."""
    (index,) = struct.unpack_from("<I", data, 20)
    struct.pack_into("<I", data, 24, zlib.crc32(data[28 : 28 + index], zlib.crc32(data[:24])))


def forged(
    data: bytes, fields: tuple[Field, ...], repair: Callable[[bytearray], None], pairs: int
) -> Iterator[tuple[str, bytes]]:
    """Each field at each extreme; and ``pairs`` times two of them at once."""
    single = [(field, value) for field in fields for value in EXTREMES]
    generator = random.Random(0)
    double = [tuple(generator.sample(single, 2)) for _ in range(pairs)]
    for changes in itertools.chain(((change,) for change in single), double):
        out = bytearray(data)
        for (_, at, kind), value in changes:
            if at + struct.calcsize(kind) <= len(out):
                struct.pack_into("<" + kind, out, at, value % 256 ** struct.calcsize(kind))
        repair(out)
        yield ", ".join(f"{name} = {value}" for (name, _, _), value in changes), bytes(out)


def payload(shape: tuple[int, ...], symbols: int = 0) -> bytes:
    """A payload of no symbols, or of ones, with any shape that its header can be given."""
    rest = struct.pack(f"<{len(shape)}Q", *shape)
    chunks = -(-symbols >> 20)
    table = b"\x6d\x08" if symbols else b""  # lengths 0, 1: 13 0 0 to set 0; then 6 + 1
    table = bytes([13, 0 | 7 << 4]) if symbols else b""
    rest += table + struct.pack("<II", 0, 0) * chunks
    head = struct.pack("<4s4BQQIII", b"CFLH", 1, 1, 1, 20, symbols, 40 + len(rest), 2 if symbols else 0, len(shape), len(table))
    return head + struct.pack("<I", zlib.crc32(rest, zlib.crc32(head))) + rest


def quantised(inner: bytes, group: int, groups: int, dtype: int = 2, bits: int = 4, exceptions: tuple[int, ...] = ()) -> bytes:
    """A blob around a payload."""
    element = "eefd"[dtype]
    table = struct.pack(f"<{len(exceptions)}q", *exceptions)
    table += struct.pack(f"<{2 * groups + len(exceptions)}{element}", *[0.0] * groups, *[1.0] * groups, *[math.nan] * len(exceptions))
    total = 56 + len(table) + len(inner)
    head = struct.pack("<4s4BQQQQdI", b"CFLC", 1, 1, dtype, bits, total, group, groups, len(exceptions), math.nan, 0)
    return head + struct.pack("<I", zlib.crc32(table, zlib.crc32(head))) + table + inner


def raw(shape: tuple[int, ...], data: bytes, dtype: int) -> bytes:
    """A blob that keeps its bytes."""
    table = struct.pack(f"<{len(shape)}Q", *shape)
    total = 56 + len(table) + len(data)
    head = struct.pack("<4s4BQQQQdI", b"CFLC", 1, 0, dtype, 0, total, len(shape), len(data), 0, 0.0, zlib.crc32(data))
    return head + struct.pack("<I", zlib.crc32(table, zlib.crc32(head))) + table + data


HUGE = ((0, 2**62, 2**62), (2**62, 2**62, 0), (2**40, 2**40, 0, 2**40), (0, 2**63), (2**64 - 1, 0), (0,) * 65, (1,) * 71)
WRAPS = ((2**32, 2**32), (2**63, 2), (2**64 - 1, 2**64 - 1), (2**33, 2**33, 2**33))
"""Shapes whose product is 0 or 1 in 64 bits, or that the readers' limit of dimensions refuses."""
