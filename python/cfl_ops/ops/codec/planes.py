"""A lossless blob in plain torch, for any device: floats cut into planes of bytes, coded or stored, and back.

The coding itself is left to the ops of huffman.py, so that on a GPU its kernels serve. docs/format.md has the bytes.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from cfl_ops.ops.codec import codes, layout
from cfl_ops.ops.codec.codes import Corrupt
from cfl_ops.ops.codec.huffman import HUFFMAN_DECODE, HUFFMAN_ENCODE
from cfl_ops.ops.codec.layout import BLOB, BLOB_BYTES, CHUNK, CHUNK_LOG2, Lanes, Lossless
from cfl_ops.ops.codec.reference import header
from cfl_ops.ops.codec.reference.header import as_bytes, from_bytes, memory_of, prefix
from cfl_ops.ops.codec.reference.tables import choose, look_counts

_BIAS = 2048 - 1023 + 192
"""Added to the exponent of float64 modulo 2,048: those of 2^-192 to 2^63 are then 0 to 255."""


def split(data: Tensor, cut: Lanes) -> list[Tensor]:
    """The planes of bytes of lanes, that of the high bytes first."""
    high = list(data.view(-1, cut.width).flip(1).unbind(1))
    if not cut.rotated:
        return [plane.contiguous() for plane in high]
    turned = [one << 1 | after >> 7 for one, after in zip(high, [*high[1:], high[0]], strict=True)]
    if cut.rebiased:
        exponent = (high[0].to(torch.int16) & 127) << 4 | high[1].to(torch.int16) >> 4
        exponent = (exponent + _BIAS) & 2047
        turned[0] = (exponent & 255).to(torch.uint8)
        turned[1] = ((exponent >> 8) << 5).to(torch.uint8) | turned[1] & 31
    return turned


def join(planes: Sequence[Tensor], cut: Lanes) -> Tensor:
    """The bytes of lanes from their planes."""
    high = list(planes)
    if cut.rotated:
        high = [
            one >> 1 | before << 7 for one, before in zip(planes, [planes[-1], *planes[:-1]], strict=True)
        ]
    if cut.rebiased:
        exponent = planes[0].to(torch.int16) | (planes[1].to(torch.int16) >> 5) << 8
        exponent = (exponent - _BIAS) & 2047
        high[0] = planes[-1] << 7 | (exponent >> 4).to(torch.uint8)
        high[1] = ((exponent & 15) << 4).to(torch.uint8) | (planes[1] & 31) >> 1
    return torch.stack(high[::-1], 1).flatten()


def pieces(plane: Tensor, chunks: Sequence[int]) -> Tensor:
    """Some chunks of a plane, one after the other."""
    last = plane.numel() // CHUNK  # the number of a shorter one at the end
    if list(chunks) == list(range(-(-plane.numel() // CHUNK))):
        return plane
    whole = torch.tensor([c for c in chunks if c < last], device=plane.device, dtype=torch.int64)
    part = plane[: last * CHUNK].view(-1, CHUNK)[whole].flatten()
    return torch.cat([part, plane[last * CHUNK :]]) if len(whole) < len(chunks) else part


def encode(data: Tensor, code: int, shape: Sequence[int]) -> Tensor:
    """The blob of these bytes of a tensor, or no bytes at all where the tensor's own are fewer."""
    cut = layout.lanes(code)
    n = data.numel() // cut.width
    nothing = data.new_empty(0)
    if n == 0 or n > codes.MAX_SYMBOLS:
        return nothing
    planes = split(data, cut)
    chunks = -(-n // CHUNK)
    table = bytearray(layout.pack_shape(shape))
    payloads: list[Tensor] = []
    maps = []
    for plane in planes:
        tables = choose(look_counts(plane, plane is planes[0]), n)
        chosen = bytearray(chunks)
        for number, members in enumerate(tables, 1):
            for c in members:
                chosen[c] = number
            symbols = pieces(plane, members)
            payloads.append(HUFFMAN_ENCODE(symbols, [symbols.numel()], CHUNK_LOG2, 0))
        maps.append(chosen)
        table += bytes([len(tables)]) + (chosen if tables else b"")
    if not payloads:
        return nothing
    table += struct.pack(f"<{len(payloads)}Q", *(payload.numel() for payload in payloads))
    sizes = [chosen_sizes(maps, c, n) for c in range(chunks)]
    stored = [
        plane[c * CHUNK : (c + 1) * CHUNK]
        for c in range(chunks)
        for plane, chosen in zip(planes, maps, strict=True)
        if chosen[c] == 0
    ]
    kept = torch.cat(stored) if stored else nothing
    table += struct.pack(f"<{chunks}I", *checksums(kept, sizes))
    total = BLOB_BYTES + len(table) + kept.numel() + sum(payload.numel() for payload in payloads)
    if total >= raw_bytes(data.numel(), shape):
        return nothing
    head = BLOB.pack(
        *(layout.MAGIC, 3, layout.LOSSLESS, code, CHUNK_LOG2, total),
        *(n // cut.per, len(table), 0, 0.0, len(shape)),
    )
    head += struct.pack("<I", zlib.crc32(table, zlib.crc32(head)))
    return torch.cat([from_bytes(head + bytes(table), data.device), kept, *payloads])


def raw_bytes(data: int, shape: Sequence[int]) -> int:
    """Bytes of a blob that stores so many bytes of a tensor as they are."""
    few = len(shape) <= layout.MOST_RAW_DIMS
    return BLOB_BYTES + data + (8 * len(shape) if few else len(layout.pack_shape(shape)))


def parse(blob: Tensor) -> Lossless:
    """The head of a lossless blob, checked; raises Corrupt."""
    size = blob.numel()
    try:
        return layout.parse_lossless(as_bytes(blob[: prefix(size)]), size)
    except Corrupt as error:
        if error.code >= 0:
            raise
        return layout.parse_lossless(as_bytes(blob[: -error.code]), size)


def decode(blob: Tensor, parsed: Lossless, start: int, count: int) -> Tensor:
    """The bytes of elements ``start`` to ``start + count``; raises Corrupt."""
    cut = layout.lanes(parsed.code)
    if start < 0 or count < 0 or start + count > parsed.numel:
        raise Corrupt(codes.OUT_OF_RANGE)
    if count == 0:
        return blob.new_empty(0)
    n, first, last = parsed.lanes, start * cut.per // CHUNK, ((start + count) * cut.per - 1) // CHUNK
    symbols = min(n, (last + 1) * CHUNK) - first * CHUNK
    planes = [torch.empty(symbols, dtype=torch.uint8, device=blob.device) for _ in range(cut.width)]
    worst = _take_stored(blob, parsed, first, last, planes)
    at = parsed.head + parsed.stored
    for plane, chosen, sizes in zip(planes, parsed.maps, parsed.sizes, strict=True):
        for number, size in enumerate(sizes, 1):
            payload, at = blob[at : at + size], at + size
            code = _take_coded(payload, chosen, number, n, first, last, plane)
            if code and (code < codes.BAD_CHUNK or not worst or code < worst):
                worst = code
            if 0 < worst < codes.BAD_CHUNK:
                raise Corrupt(worst)
    if worst:
        raise Corrupt(worst)
    lead = start * cut.per - first * CHUNK
    return join([plane[lead : lead + count * cut.per] for plane in planes], cut)


def _take_stored(blob: Tensor, parsed: Lossless, first: int, last: int, planes: list[Tensor]) -> int:
    """Copy the stored pieces of some chunks to their planes; returns 0, or the code of the first damaged chunk."""
    n = parsed.lanes
    sizes = [chosen_sizes(parsed.maps, c, n) for c in range(last + 1)]
    at = parsed.head + sum(map(sum, sizes[:first]))
    data = blob[at : at + sum(map(sum, sizes[first:]))]
    for c, found in enumerate(checksums(data, sizes[first:]), first):
        if found != parsed.checksums[c]:
            return codes.BAD_CHUNK + c
    parts = iter(data.split([size for row in sizes[first:] for size in row]))
    for c in range(first, last + 1):
        for plane, chosen in zip(planes, parsed.maps, strict=True):
            if chosen[c] == 0:
                piece = next(parts)
                plane[(c - first) * CHUNK :][: len(piece)] = piece
    return 0


def chosen_sizes(maps: Sequence[bytes | bytearray], c: int, n: int) -> list[int]:
    """The sizes of the stored pieces of a chunk of planes of n bytes."""
    return [min(CHUNK, n - c * CHUNK)] * sum(chosen[c] == 0 for chosen in maps)


def _take_coded(
    payload: Tensor, chosen: bytes, number: int, n: int, first: int, last: int, plane: Tensor
) -> int:
    """Decode the chunks of one table among some chunks to their plane; returns a code of what is wrong, or 0."""
    members = [c for c, table in enumerate(chosen) if table == number]
    before = sum(c < first for c in members)
    wanted = [c for c in members if first <= c <= last]
    total = len(members) * CHUNK - (members[-1] == len(chosen) - 1) * (len(chosen) * CHUNK - n)
    count = min(total, (before + len(wanted)) * CHUNK) - before * CHUNK if wanted else 0
    symbols = torch.empty(count, dtype=torch.uint8, device=payload.device)
    try:
        found = header.parse(payload)
    except Corrupt as error:
        return error.code
    if (found.symbol_bytes, found.chunk_log2, found.numel) != (1, CHUNK_LOG2, total):
        return codes.BAD_HEADER
    if not wanted:
        return 0
    code = int(HUFFMAN_DECODE(payload, symbols, before * CHUNK))
    if code >= codes.BAD_CHUNK:
        return codes.BAD_CHUNK + members[code - codes.BAD_CHUNK]
    for i, c in enumerate(wanted):
        part = symbols[i * CHUNK : (i + 1) * CHUNK]
        plane[(c - first) * CHUNK :][: part.numel()] = part
    return code


def checksums(data: Tensor, sizes: Sequence[Sequence[int]]) -> list[int]:
    """The CRC-32 of the pieces of each chunk, which lie one after the other."""
    whole = 0  # chunks of whole pieces
    out: list[int] = []
    if data.device.type != "cpu":
        whole = sum(all(size == CHUNK for size in row) for row in sizes)
        out = folded(data, [len(row) for row in sizes[:whole]])
    raw, at = memory_of(data), CHUNK * sum(map(len, sizes[:whole]))
    for row in sizes[whole:]:
        out.append(zlib.crc32(raw[at : at + sum(row)]))
        at += sum(row)
    return out


def folded(data: Tensor, counts: Sequence[int]) -> list[int]:
    """The same in torch ops, where each chunk has so many pieces of 2^15 bytes.

    The register after two strings is that after the first, moved by the zeros that the second would be, exclusive or
    that after the second: so neighbours are joined until one register of each piece is left, and then the pieces.
    """
    tables = [table.to(data.device) for table in _crc_tables()]
    words = data[: CHUNK * sum(counts)].view(-1, CHUNK)
    registers = torch.zeros(len(words), CHUNK // 4, dtype=torch.int32, device=data.device)
    for j in range(4):
        registers ^= tables[0][3 - j][words[:, j::4].to(torch.int64)]

    def moved(left: Tensor, table: Tensor) -> Tensor:
        out = torch.zeros_like(left)
        for j in range(4):
            out ^= table[j][(left >> 8 * j & 255).to(torch.int64)]
        return out

    for table in tables[1:-1]:
        registers = moved(registers[:, ::2], table) ^ registers[:, 1::2]
    ends = torch.tensor(counts, dtype=torch.int64, device=data.device).cumsum(0)
    total = torch.zeros(len(counts), dtype=torch.int32, device=data.device)
    count = ends.diff(prepend=ends.new_zeros(1))
    for j in range(max(counts, default=0)):
        here = (count > j).nonzero().flatten()
        total[here] = moved(total[here], tables[-1]) ^ registers[(ends - count)[here] + j, 0]
    # What the ones come to that a checksum begins and ends with.
    ones = [zlib.crc32(bytes(CHUNK * size)) for size in range(max(counts, default=0) + 1)]
    return [(value & 0xFFFFFFFF) ^ ones[size] for value, size in zip(total.tolist(), counts, strict=True)]


@functools.cache
def _crc_tables() -> list[Tensor]:
    """For 4 bytes their registers; then for 4, 8, ... 2^15 zeros what each byte of a register becomes. int32."""
    one = [0] * 256
    for i in range(256):
        value = i
        for _ in range(8):
            value = value >> 1 ^ 0xEDB88320 if value & 1 else value >> 1
        one[i] = value

    def moved(value: int, zeros: int) -> int:
        for _ in range(zeros):
            value = value >> 8 ^ one[value & 255]
        return value

    rows = [[moved(value, zeros) for value in one] for zeros in range(4)]
    tables = [torch.tensor(rows, dtype=torch.int64)]
    # By 4 zeros: byte j of a register.
    shift = torch.tensor([[moved(i << 8 * j, 4) for i in range(256)] for j in range(4)], dtype=torch.int64)
    for _ in range(CHUNK_LOG2 - 1):
        tables.append(shift)
        twice = torch.zeros_like(shift)
        for j in range(4):
            twice ^= shift[j][shift >> 8 * j & 255]
        shift = twice
    return [torch.where(table >= 2**31, table - 2**32, table).to(torch.int32) for table in tables]
