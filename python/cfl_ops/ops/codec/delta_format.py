"""delta_format: the bytes of a delta, put together and taken apart. docs/format.md ("Delta") describes them."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cfl_ops.errors import CorruptDataError
from cfl_ops.ops.codec import codes
from cfl_ops.ops.codec.codes import Corrupt
from cfl_ops.ops.codec.huffman import CHUNK_LOG2, HUFFMAN_DECODE, HUFFMAN_ENCODE, corrupt, read_header
from cfl_ops.ops.codec.layout import DTYPES, pack_shape, unpack_shape
from cfl_ops.ops.codec.reference.changes import MAX_CLASSES
from cfl_ops.ops.codec.reference.header import as_bytes, from_bytes, memory_of

MAGIC, VERSION = b"CFLD", 1
_HEAD = struct.Struct("<4s4BQQQQII")  # then a checksum: 52 bytes
HEAD_BYTES = _HEAD.size + 4
SAME, CHANGED, DENSE, JOINED, REPLACED, LEFT = range(6)
KINDS = ("same", "changed", "dense", "joined", "replaced", "left")
XOR, SMALL, CLASSES = 1, 2, 4
"""Flags: what values are; effort="small"; whether there are classes of the old exponent."""
_FLAGS = {CHANGED: XOR | SMALL | CLASSES, DENSE: XOR | SMALL | CLASSES}
"""Of each kind which it may have; the others SMALL alone."""
NO_CLASS = 255
STORED, CODED, REPEATED = range(3)
"""How symbols are kept: as they are, as a payload, or as the one that all of them are."""


class Numbers(NamedTuple):
    """Coded numbers: their symbols, and the bits that those leave out."""

    symbols: Tensor
    """uint8, or their payload, or the first of them."""
    coding: int
    raw: Tensor

    @property
    def nbytes(self) -> int:
        return int(self.symbols.numel() + self.raw.numel())


class ClassPart(NamedTuple):
    """What changes among the elements of a class, or among all of them."""

    changes: int
    """How many; 0 in a dense delta, where all are listed."""
    gaps: Numbers | None
    values: Numbers


class Delta(NamedTuple):
    """A delta, in parts: what the header says, and views of the bytes behind it."""

    kind: int
    flags: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    base_dtype: torch.dtype
    base_shape: tuple[int, ...]
    base: int
    """The fingerprint of the old tensor; 0 where there was none."""
    result: int
    changed: int
    shift: int
    """So many low bits are the same in all elements, and left out of values."""
    classes: bytes | None
    """Of each context its class."""
    parts: list[ClassPart]
    blob: Tensor | None
    """The whole new tensor, of kinds that hold it."""
    nbytes: int

    @property
    def effort(self) -> str:
        return "small" if self.flags & SMALL else "fast"


class Description(NamedTuple):
    """What the header of a delta says."""

    kind: str
    """``same``, ``changed``, ``dense`` (the values of all elements), ``joined`` (a tensor that was not there),
    ``replaced`` (whole: of another shape or dtype, or too different) or ``left`` (gone)."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    changed: int
    """How many numbers changed (a complex element has two); of a tensor that came, left or was replaced: all."""
    effort: str
    nbytes: int
    """Of the delta."""
    raw_nbytes: int
    """Of the tensor."""
    base_dtype: torch.dtype
    base_shape: tuple[int, ...]
    base: int
    """The fingerprint of the old tensor, 0 if there was none."""
    result: int
    """The fingerprint of the new tensor, 0 if there is none."""


def pack_numbers(symbols: Tensor, raw: Tensor) -> Numbers:
    """Symbols are coded where that makes them fewer."""
    n = symbols.numel()
    if n > 1 and bool((symbols[:4096] == symbols[0]).all()) and bool((symbols == symbols[0]).all()):
        return Numbers(symbols[:1], REPEATED, raw)
    if n > 64:  # what the header of a payload takes
        payload: Tensor = HUFFMAN_ENCODE(symbols, [n], CHUNK_LOG2, 0)
        if payload.numel() < n:
            return Numbers(payload, CODED, raw)
    return Numbers(symbols, STORED, raw)


def unpack_symbols(op: str, numbers: Numbers, count: int) -> Tensor:
    """The symbols, of which there must be so many; raises CorruptDataError."""
    if numbers.coding == REPEATED:
        return numbers.symbols.expand(count).contiguous()
    if numbers.coding == STORED:
        if numbers.symbols.numel() != count:
            raise contradiction(op)
        return numbers.symbols
    header = read_header(op, numbers.symbols)
    if header.numel != count or header.symbol_bytes != 1:
        raise contradiction(op)
    out = torch.empty(count, dtype=torch.uint8, device=numbers.symbols.device)
    info = int(HUFFMAN_DECODE(header.payload, out, 0))
    if info:
        words = (
            f"a damaged chunk {info - codes.BAD_CHUNK}" if info >= codes.BAD_CHUNK else "a damaged payload"
        )
        raise corrupt(op, f"the delta has {words}")
    return out


def contradiction(op: str) -> CorruptDataError:
    return corrupt(op, "the delta contradicts itself")


def pack_delta(delta: Delta, device: torch.device) -> Tensor:
    """Its bytes (``nbytes`` is found here)."""
    table = _pack_extents(delta.shape)
    if delta.kind == REPLACED:
        table += bytes([DTYPES.index(delta.base_dtype)]) + _pack_extents(delta.base_shape)
    if delta.kind in (CHANGED, DENSE):
        table += bytes([delta.shift])
    if delta.classes is not None:
        table += bytes([len(delta.parts)]) + _pack_runs(delta.classes)
    stored: list[Tensor] = []
    coded: list[Tensor] = []
    for part in delta.parts:
        if part.gaps is not None:
            table += pack_shape([part.changes])
        for numbers in (part.gaps, part.values):
            if numbers is not None:
                table += pack_shape([4 * numbers.symbols.numel() + numbers.coding, numbers.raw.numel()])
                (coded if numbers.coding == CODED else stored).append(numbers.symbols)
                stored.append(numbers.raw)
    if delta.blob is not None:
        coded.append(delta.blob)
    body = torch.cat(stored) if stored else torch.empty(0, dtype=torch.uint8, device=device)
    total = HEAD_BYTES + len(table) + body.numel() + sum(part.numel() for part in coded)
    head = _HEAD.pack(
        *(MAGIC, VERSION, delta.kind, DTYPES.index(delta.dtype), delta.flags, total, delta.base),
        *(delta.result, delta.changed, len(table), zlib.crc32(memory_of(body))),
    )
    head += struct.pack("<I", zlib.crc32(table, zlib.crc32(head)))
    return torch.cat([from_bytes(head + table, device), body, *coded])


def _pack_extents(shape: Sequence[int]) -> bytes:
    return bytes([len(shape)]) + pack_shape(shape)


def _pack_runs(classes: bytes) -> bytes:
    """The class of each of 256 contexts, as (class, length - 1) of runs."""
    out, at = bytearray(), 0
    while at < 256:
        end = at
        while end < 256 and classes[end] == classes[at]:
            end += 1
        out += bytes([classes[at], end - at - 1])
        at = end
    return bytes(out)


class _Reader:
    """Reads a table; raises Corrupt where it ends too early."""

    def __init__(self, table: bytes) -> None:
        self.table, self.at = table, 0

    def byte(self) -> int:
        if self.at >= len(self.table):
            raise Corrupt(codes.BAD_HEADER)
        self.at += 1
        return self.table[self.at - 1]

    def extents(self, ndim: int) -> tuple[int, ...]:
        if ndim > codes.MAX_DIMS:
            raise Corrupt(codes.BAD_HEADER)
        shape, size = unpack_shape(self.table[self.at :], ndim)
        self.at += size
        return shape

    def number(self) -> int:
        return self.extents(1)[0]

    def dtype(self) -> torch.dtype:
        code = self.byte()
        if code >= len(DTYPES):
            raise Corrupt(codes.BAD_HEADER)
        found: torch.dtype = DTYPES[code]
        return found

    def runs(self) -> bytes:
        out = b""
        while len(out) < 256:
            which, more = self.byte(), self.byte()
            out += bytes([which]) * (more + 1)
        if len(out) > 256:
            raise Corrupt(codes.BAD_HEADER)
        return out


def parse_delta(op: str, delta: Tensor) -> Delta:
    """Check the header and what stands behind it uncoded, and take the delta apart; raises CorruptDataError."""
    parsed, stored = _parse(op, delta)
    begin, end, expected = stored
    if zlib.crc32(memory_of(delta[begin:end])) != expected:
        raise corrupt(op, "the data of the delta are damaged (checksum)")
    return parsed


def is_delta(blob: Tensor) -> bool:
    """Whether bytes are those of a delta, by their mark."""
    return as_bytes(blob[:4]) == MAGIC


def is_whole_delta(value: Tensor) -> bool:
    """Whether a tensor is the bytes of a delta, by its header."""
    if value.dtype != torch.uint8 or value.ndim != 1 or not is_delta(value):
        return False
    try:
        _parse("save_file", value)
    except CorruptDataError:
        return False
    return True


def describe(op: str, delta: Tensor) -> Description:
    """What the header says, whose checksum is checked, and nothing behind it."""
    parsed, _ = _parse(op, delta)
    return Description(
        *(KINDS[parsed.kind], parsed.dtype, parsed.shape, parsed.changed, parsed.effort, parsed.nbytes),
        math.prod(parsed.shape) * parsed.dtype.itemsize,
        *(parsed.base_dtype, parsed.base_shape, parsed.base, parsed.result),
    )


def _parse(op: str, delta: Tensor) -> tuple[Delta, tuple[int, int, int]]:
    size = delta.numel()
    if size < HEAD_BYTES:
        raise corrupt(op, "the delta is too short to hold a header")
    near = as_bytes(delta[:4096])
    magic, version, kind, code, flags, total, base, result, changed, table_bytes, data_crc = (
        _HEAD.unpack_from(near)
    )
    (head_crc,) = struct.unpack_from("<I", near, _HEAD.size)
    if magic != MAGIC:
        raise corrupt(op, "the delta does not start with its mark")
    if version != VERSION or kind >= len(KINDS):
        raise corrupt(op, "the delta was written in a version that this reader does not know")
    if total != size:
        raise corrupt(op, "the delta has another length than its header says (truncated or extended)")
    head = HEAD_BYTES + table_bytes
    if head > size or code >= len(DTYPES) or flags & ~_FLAGS.get(kind, SMALL):
        raise contradiction(op)
    table = (near if head <= len(near) else as_bytes(delta[:head]))[HEAD_BYTES:head]
    if zlib.crc32(table, zlib.crc32(near[: _HEAD.size])) != head_crc:
        raise corrupt(op, "the delta has a damaged header (checksum)")
    dtype = DTYPES[code]
    try:
        reader = _Reader(table)
        shape = reader.extents(reader.byte())
        base_dtype, base_shape = dtype, shape
        if kind == REPLACED:
            base_dtype, base_shape = reader.dtype(), reader.extents(reader.byte())
        units = math.prod(shape) * (2 if dtype.is_complex else 1)
        classes, sizes, count, shift = None, [], 1, 0
        if kind in (CHANGED, DENSE):
            shift = reader.byte()
            if shift >= 8 * dtype.itemsize // (2 if dtype.is_complex else 1):
                raise Corrupt(codes.BAD_HEADER)
            if flags & CLASSES:
                count, classes = reader.byte(), reader.runs()
                if not 1 <= count <= MAX_CLASSES or set(classes) - {NO_CLASS} != set(range(count)):
                    raise Corrupt(codes.BAD_HEADER)
            for _ in range(count):
                of = [reader.number()] if kind == CHANGED else [0]
                sizes.append(of + [reader.number() for _ in range(4 if kind == CHANGED else 2)])
        if reader.at != len(table):
            raise Corrupt(codes.BAD_HEADER)
    except Corrupt:
        raise contradiction(op) from None
    if kind == CHANGED and sum(of[0] for of in sizes) != changed:
        raise contradiction(op)
    if changed > units or (kind == SAME) != (changed == 0 and kind <= DENSE):
        raise contradiction(op)
    if (kind == JOINED and base) or (kind == LEFT and result) or (kind == SAME and base != result):
        raise contradiction(op)
    symbols = [n for of in sizes for n in of[1::2]]
    if any(n & 3 > REPEATED or (n & 3 == REPEATED and n >> 2 != 1) for n in symbols):
        raise contradiction(op)
    coded = sum(n >> 2 for n in symbols if n & 3 == CODED)
    stored = sum(n >> 2 for n in symbols) - coded + sum(n for of in sizes for n in of[2::2])
    whole = kind in (JOINED, REPLACED)
    if head + stored + coded > size or (not whole and head + stored + coded != size):
        raise contradiction(op)
    at = [head, head + stored]

    def take(n: int, where: int) -> Tensor:
        at[where] += n
        return delta[at[where] - n : at[where]]

    parts = []
    for count, *pairs in sizes:
        numbers = []
        for size_and_coding, raw in zip(pairs[::2], pairs[1::2], strict=True):
            coding = size_and_coding & 3
            found = take(size_and_coding >> 2, int(coding == CODED))
            numbers.append(Numbers(found, coding, take(raw, 0)))
        parts.append(ClassPart(count, numbers[0] if len(numbers) > 1 else None, numbers[-1]))
    parsed = Delta(
        *(kind, flags, dtype, shape, base_dtype, base_shape, base, result, changed, shift),
        *(classes, parts, delta[head:] if whole else None, size),
    )
    return parsed, (head, head + stored, data_crc)
