"""The codec's payload in plain torch: the readable form of docs/format.md, for any device.

All chunks of a group are worked on at once: what a node of the code tree holds is one tensor, with the
chunks after one another, so the Python loop runs over nodes and not over symbols.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import zlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAGIC, VERSION, PIVOT_LAYOUT = b"CFLH", 1, 1
HEADER_BYTES = 40
MAX_LENGTH, MAX_SYMBOLS, MAX_DIMS = 60, 2**40, 64
MIN_CHUNK_LOG2, MAX_CHUNK_LOG2 = 10, 20

# What is wrong with a payload; the numbers are those of csrc/cpu/codec_payload.h.
GOOD, TOO_SHORT, BAD_MAGIC, BAD_VERSION, BAD_HEADER, BAD_LENGTH = range(6)
BAD_HEADER_CHECKSUM, BAD_CODE_TABLE, BAD_CHUNK_SIZES, OUT_OF_RANGE = range(6, 10)
BAD_CHUNK = 1000

WORDS = {
    TOO_SHORT: "is too short to hold a header",
    BAD_MAGIC: "does not start with the codec's mark",
    BAD_VERSION: "was written in a version or layout that this reader does not know",
    BAD_HEADER: "has a header that contradicts itself",
    BAD_LENGTH: "has another length than its header says (truncated or extended)",
    BAD_HEADER_CHECKSUM: "has a damaged header (checksum)",
    BAD_CODE_TABLE: "has a code table that is not a complete prefix code",
    BAD_CHUNK_SIZES: "has chunk sizes that do not add up to its length",
}


class Corrupt(Exception):
    """Carries one of the codes above to the op's info."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def as_bytes(data: Tensor) -> bytes:
    """The bytes of a uint8 tensor."""
    data = data.detach().cpu().contiguous()
    return ctypes.string_at(data.data_ptr(), data.numel()) if data.numel() else b""


def from_bytes(data: bytes, device: torch.device | None = None) -> Tensor:
    """A fresh uint8 tensor of these bytes."""
    out = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return out if device is None else out.to(device)


# --- the code -----------------------------------------------------------------------------------------------


def code_lengths(counts: list[int]) -> list[int]:
    """Huffman code lengths for these counts; 0 for a count of 0.

    Two queues: the leaves by (count, symbol), and the joined nodes, which come out in order by themselves;
    on ties a leaf goes first. So every implementation finds the same lengths.
    """
    order = sorted((count, symbol) for symbol, count in enumerate(counts) if count)
    n = len(order)
    lengths = [0] * len(counts)
    if n == 1:
        lengths[order[0][1]] = 1
    if n < 2:
        return lengths
    weight = [count for count, _ in order] + [0] * (n - 1)
    parent = [0] * (2 * n - 1)
    leaf, joined = 0, n
    for node in range(n, 2 * n - 1):
        for _ in range(2):
            if leaf < n and (joined >= node or weight[leaf] <= weight[joined]):
                child, leaf = leaf, leaf + 1
            else:
                child, joined = joined, joined + 1
            weight[node] += weight[child]
            parent[child] = node
    depth = [0] * (2 * n - 1)
    for node in range(2 * n - 3, -1, -1):
        depth[node] = depth[parent[node]] + 1
    for i, (_, symbol) in enumerate(order):
        lengths[symbol] = depth[i]
    return lengths


def pack_lengths(lengths: list[int]) -> bytes:
    """The code table: nibbles, the low one of a byte first."""
    nibbles: list[int] = []
    previous, i = 8, 0
    while i < len(lengths):
        run = 0
        while i + run < len(lengths) and lengths[i + run] == previous and run < 258:
            run += 1
        if run >= 3:
            nibbles += [14, (run - 3) & 15, (run - 3) >> 4]
            i += run
            continue
        length, change = lengths[i], lengths[i] - previous
        nibbles += [change + 6] if -6 <= change <= 6 else [13, length & 15, length >> 4]
        previous, i = length, i + 1
    if len(nibbles) % 2:
        nibbles.append(0)
    return bytes(low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True))


def unpack_lengths(table: bytes, alphabet: int) -> list[int]:
    """The code lengths of ``alphabet`` symbols."""
    nibbles = [nibble for byte in table for nibble in (byte & 15, byte >> 4)]
    lengths: list[int] = []
    previous, at = 8, 0
    while len(lengths) < alphabet:
        if at >= len(nibbles):
            raise Corrupt(BAD_CODE_TABLE)
        op, run = nibbles[at], 1
        at += 1
        if op <= 12:
            previous += op - 6
        else:
            if op == 15 or at + 2 > len(nibbles):
                raise Corrupt(BAD_CODE_TABLE)
            value = nibbles[at] | nibbles[at + 1] << 4
            at += 2
            previous, run = (value, 1) if op == 13 else (previous, value + 3)
        if not 0 <= previous <= MAX_LENGTH or run > alphabet - len(lengths):
            raise Corrupt(BAD_CODE_TABLE)
        lengths += [previous] * run
    if (at + 1) // 2 != len(table) or any(nibbles[at:]):
        raise Corrupt(BAD_CODE_TABLE)
    return lengths


@dataclass
class Node:
    """An inner node (``right`` > 0; its left child follows it) or a leaf of 2^bits symbols."""

    right: int = 0
    first: int = 0
    bits: int = 0


@dataclass
class Tree:
    """The code tree in pre-order, and the symbols in the order of its leaves."""

    nodes: list[Node] = field(default_factory=list)
    symbols: list[int] = field(default_factory=list)


def build_tree(lengths: list[int]) -> Tree:
    """The tree of a complete set of code lengths (not to be changed: one payload's header asks for it twice)."""
    return _build_tree(bytes(lengths))


@functools.lru_cache(maxsize=16)
def _build_tree(lengths: bytes) -> Tree:
    """Build it.

    The symbols of each length are cut, in order, into runs of powers of two from the largest down. A run of
    2^k symbols of length l is a leaf at depth l - k. Leaves take their places from left to right by depth.
    """
    of: dict[int, list[int]] = {}
    for symbol, length in enumerate(lengths):
        if length:
            of.setdefault(length, []).append(symbol)
    total = sum(map(len, of.values()))
    if total == 0 or (total == 1 and list(of) != [1]):
        raise Corrupt(BAD_CODE_TABLE)
    if total == 1:
        return Tree([Node()], of[1])
    if sum(len(symbols) << (MAX_LENGTH - length) for length, symbols in of.items()) != 1 << MAX_LENGTH:
        raise Corrupt(BAD_CODE_TABLE)
    leaves = [leaf for length in sorted(of) for leaf in _runs(length, of[length])]
    return _grow(sorted(leaves, key=lambda leaf: leaf[0]))


def _runs(length: int, symbols: list[int]) -> list[tuple[int, int, list[int]]]:
    runs, start = [], 0
    for bits in range(16, -1, -1):
        if len(symbols) >> bits & 1:
            runs.append((length - bits, bits, symbols[start : start + (1 << bits)]))
            start += 1 << bits
    return runs


def _grow(leaves: list[tuple[int, int, list[int]]]) -> Tree:
    tree, waiting = Tree(), iter(leaves)
    depth_next, bits, symbols = next(waiting)

    def grow(depth: int) -> None:
        nonlocal depth_next, bits, symbols
        node = Node()
        tree.nodes.append(node)
        node.first = len(tree.symbols)
        if depth_next == depth:
            node.bits = bits
            tree.symbols += symbols
            depth_next, bits, symbols = next(waiting, (MAX_LENGTH + 1, 0, []))
            return
        grow(depth + 1)
        node.right, node.first = len(tree.nodes), len(tree.symbols)
        grow(depth + 1)

    grow(0)
    return tree


def sample_counts(symbols: Tensor) -> list[int]:
    """The counts the code is built from: of all symbols, or of evenly spread blocks of 4,096.

    A code made for n samples of A symbols loses about A / (2 n ln 2) bits a symbol; 1,024 A samples keep
    that below 0.001. In a sample every symbol counts, so that it gets a code.
    """
    n = symbols.numel()
    if n == 0:
        return []
    alphabet = 256 if symbols.dtype == torch.uint8 else int(symbols.to(torch.int32).max()) + 1
    stride = max(1, n // (1024 * alphabet))
    if stride > 1:
        symbols = torch.cat([symbols[i : i + 4096] for i in range(0, n, 4096 * stride)])
    counts: list[int] = torch.bincount(symbols.to(torch.int32), minlength=alphabet).tolist()
    if stride > 1:
        counts = [count * stride if count else 1 for count in counts]
    while counts and counts[-1] == 0:
        counts.pop()
    return counts


# --- the header ---------------------------------------------------------------------------------------------


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


_PREFIX = 1 << 16
"""Bytes fetched at once (one wait for a GPU) in the hope that they hold the whole header."""


def parse(payload: Tensor) -> Header:
    """Read and check the header of a payload; raises Corrupt."""
    size = payload.numel()
    if size < HEADER_BYTES:
        raise Corrupt(TOO_SHORT)
    raw = as_bytes(payload[:_PREFIX])
    fixed = raw[:HEADER_BYTES]
    magic, version, layout, symbol_bytes, chunk_log2 = struct.unpack_from("<4s4B", fixed)
    numel, total, alphabet, ndim, table_bytes, checksum = struct.unpack_from("<QQIIII", fixed, 8)
    if magic != MAGIC:
        raise Corrupt(BAD_MAGIC)
    if version != VERSION or layout != PIVOT_LAYOUT:
        raise Corrupt(BAD_VERSION)
    if total != size:
        raise Corrupt(BAD_LENGTH)
    if (
        symbol_bytes not in (1, 2)
        or not MIN_CHUNK_LOG2 <= chunk_log2 <= MAX_CHUNK_LOG2
        or numel > MAX_SYMBOLS
        or ndim > MAX_DIMS
        or alphabet > 256**symbol_bytes
        or (numel == 0) != (alphabet == 0)
    ):
        raise Corrupt(BAD_HEADER)
    chunks = (numel + (1 << chunk_log2) - 1) >> chunk_log2
    head = HEADER_BYTES + 8 * ndim + table_bytes + 8 * chunks
    if head > size:
        raise Corrupt(BAD_HEADER)
    rest = (raw if head <= len(raw) else as_bytes(payload[:head]))[HEADER_BYTES:head]
    if zlib.crc32(rest, zlib.crc32(fixed[: HEADER_BYTES - 4])) != checksum:
        raise Corrupt(BAD_HEADER_CHECKSUM)
    shape = struct.unpack_from(f"<{ndim}Q", rest)
    product = 1
    for extent in shape:
        product *= extent
    if max(shape, default=0) >= 2**63 or product != numel:
        raise Corrupt(BAD_HEADER)
    entries = struct.unpack_from(f"<{2 * chunks}I", rest, 8 * ndim + table_bytes)
    if sum(entries[::2]) != size - head:
        raise Corrupt(BAD_CHUNK_SIZES)
    lengths = unpack_lengths(rest[8 * ndim : 8 * ndim + table_bytes], alphabet)
    if numel:
        build_tree(lengths)
    return Header(
        symbol_bytes, chunk_log2, numel, shape, list(entries[::2]), list(entries[1::2]), head, lengths
    )


# --- bits ---------------------------------------------------------------------------------------------------


def _bit_table(device: torch.device) -> Tensor:
    """For each byte its bits, low one first, as 8 bytes of 0 or 1."""
    return ((torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1).to(torch.uint8)


def _to_bits(data: Tensor) -> Tensor:
    return _bit_table(data.device).index_select(0, data.to(torch.int32)).flatten()


def _to_bytes(bits: Tensor) -> Tensor:
    columns = bits.view(-1, 8)
    out = columns[:, 0].clone()
    for j in range(1, 8):
        out |= columns[:, j] << j
    return out


def _ends(counts: Tensor, running: Tensor) -> Tensor:
    """How many ones each chunk has, from the running count of them over all chunks."""
    ends = counts.cumsum(0)
    at_end = running[(ends - 1).clamp(min=0).to(running.device)].cpu()
    return torch.where(ends > 0, at_end, 0).diff(prepend=torch.zeros(1, dtype=torch.int32))


# --- encoding -----------------------------------------------------------------------------------------------

_GROUP = 1 << 20  # symbols worked on at a time


def encode(symbols: Tensor, shape: tuple[int, ...], chunk_log2: int, reserve: int) -> Tensor:
    """The payload of these symbols, behind ``reserve`` bytes of zero."""
    symbols = symbols.flatten()
    n, device = symbols.numel(), symbols.device
    counts = sample_counts(symbols)
    lengths = code_lengths(counts)
    chunk = 1 << chunk_log2
    chunks: list[Tensor] = []
    if n:
        tree = build_tree(lengths)
        rank = torch.zeros(1 << 16, dtype=torch.int32, device=device)
        rank[torch.tensor(tree.symbols, device=device)] = torch.arange(
            len(tree.symbols), dtype=torch.int32, device=device
        )
        for begin in range(0, n, _GROUP):
            ranks = rank.index_select(0, symbols[begin : begin + _GROUP].to(torch.int32))
            chunks += _encode_chunks(tree, ranks, chunk)
    data = [as_bytes(part) for part in chunks]
    entries = b"".join(struct.pack("<II", len(part), zlib.crc32(part)) for part in data)
    head = head_bytes(symbols.element_size(), chunk_log2, n, shape, lengths, entries)
    return from_bytes(bytes(reserve) + head + b"".join(data), device)


def head_bytes(
    symbol_bytes: int, chunk_log2: int, n: int, shape: tuple[int, ...], lengths: list[int], entries: bytes
) -> bytes:
    """All that comes before the chunks; ``entries`` is the chunk table."""
    table = pack_lengths(lengths)
    rest = struct.pack(f"<{len(shape)}Q", *shape) + table + entries
    data = sum(struct.unpack(f"<{len(entries) // 4}I", entries)[::2])
    head = struct.pack(
        "<4s4BQQIII",
        *(MAGIC, VERSION, PIVOT_LAYOUT, symbol_bytes, chunk_log2),
        *(n, HEADER_BYTES + len(rest) + data, len(lengths), len(shape), len(table)),
    )
    return head + struct.pack("<I", zlib.crc32(rest, zlib.crc32(head))) + rest


def _encode_chunks(tree: Tree, ranks: Tensor, chunk: int) -> list[Tensor]:
    """The bytes of each chunk."""
    n, device = ranks.numel(), ranks.device
    counts = torch.full(((n + chunk - 1) // chunk,), chunk)
    counts[-1] -= counts.sum() - n
    segments: list[list[Tensor]] = [[] for _ in range(len(counts))]

    def emit(bits: Tensor, sizes: Tensor) -> None:
        for parts, part in zip(segments, bits.split(sizes.tolist()), strict=True):
            parts.append(part)

    def walk(index: int, ranks: Tensor, counts: Tensor) -> None:
        node = tree.nodes[index]
        if ranks.numel() == 0:
            return
        if node.right == 0:
            if node.bits:
                value = ranks - node.first
                value = value.to(torch.uint8) if node.bits <= 8 else value
                bits = torch.empty(ranks.numel(), node.bits, dtype=torch.uint8, device=device)
                for j in range(node.bits):
                    bits[:, j] = value >> j & 1
                emit(bits.flatten(), counts * node.bits)
            return
        is_right = ranks >= node.first
        emit(is_right.to(torch.uint8), counts)
        running = is_right.cumsum(0, dtype=torch.int32)
        n_right = _ends(counts, running)
        zeros = ranks.numel() - int(n_right.sum())
        # Each rank's place in the list (left part, right part).
        place = _places(is_right, running, zeros)
        parted = torch.empty_like(ranks).scatter_(0, place.to(torch.int64), ranks)
        walk(index + 1, parted[:zeros], counts - n_right)
        walk(node.right, parted[zeros:], n_right)

    walk(0, ranks, counts)
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    out = []
    for parts in segments:
        bits = torch.cat(parts) if parts else empty
        out.append(_to_bytes(torch.nn.functional.pad(bits, (0, -bits.numel() % 8))))
    return out


def _places(is_right: Tensor, running: Tensor, zeros: int) -> Tensor:
    """For each element its index in (the left list, the right list), one after the other."""
    # torch.where(is_right, running + zeros - 1, index - running), an order of magnitude faster
    index = torch.arange(is_right.numel(), dtype=torch.int32, device=is_right.device)
    shift = running.add(running).sub_(index).add_(zeros - 1).mul_(is_right.to(torch.int32))
    return index.sub_(running).add_(shift)


# --- decoding -----------------------------------------------------------------------------------------------


def decode(payload: Tensor, start: int, count: int) -> Tensor:
    """Symbols ``start`` to ``start + count`` of a payload; raises Corrupt."""
    header = parse(payload)
    dtype = torch.uint8 if header.symbol_bytes == 1 else torch.uint16
    if start < 0 or count < 0 or start + count > header.numel:
        raise Corrupt(OUT_OF_RANGE)
    if count == 0:
        return torch.empty(0, dtype=dtype, device=payload.device)
    tree = build_tree(header.lengths)
    chunk = 1 << header.chunk_log2
    first, last = start >> header.chunk_log2, (start + count - 1) >> header.chunk_log2
    per_group = max(1, _GROUP // chunk)
    offset = header.data + sum(header.sizes[:first])
    parts = []
    for begin in range(first, last + 1, per_group):
        numbers = range(begin, min(begin + per_group, last + 1))
        sizes = [header.sizes[c] for c in numbers]
        data = payload[offset : offset + sum(sizes)]
        offset += sum(sizes)
        _check_chunks(data, sizes, [header.checksums[c] for c in numbers], begin)
        counts = [min(chunk, header.numel - c * chunk) for c in numbers]
        parts.append(_decode_chunks(tree, data, sizes, counts, begin))
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    skip = start - first * chunk
    return out[skip : skip + count].to(dtype)


def _check_chunks(data: Tensor, sizes: list[int], checksums: list[int], number: int) -> None:
    raw, at = memoryview(as_bytes(data)), 0
    for size, checksum in zip(sizes, checksums, strict=True):
        if zlib.crc32(raw[at : at + size]) != checksum:
            raise Corrupt(BAD_CHUNK + number)
        at, number = at + size, number + 1


def _decode_chunks(tree: Tree, data: Tensor, sizes: list[int], counts: list[int], number: int) -> Tensor:
    """The symbols of consecutive chunks, of which ``number`` is the first one's number."""
    device = data.device
    narrow = max(tree.symbols) < 256
    symbols = torch.tensor(tree.symbols, dtype=torch.uint8 if narrow else torch.int32, device=device)
    bits = _to_bits(data)
    ends = torch.tensor(sizes).cumsum(0) * 8
    position = ends - torch.tensor(sizes) * 8

    def take(need: Tensor) -> Tensor:
        """The next bits of each chunk."""
        nonlocal position
        start, position = position, position + need
        if bool((position > ends).any()):
            raise Corrupt(BAD_CHUNK + number + int((position > ends).nonzero()[0]))
        pieces = [bits[a:b] for a, b in zip(start.tolist(), position.tolist(), strict=True) if b > a]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def walk(index: int, counts: Tensor) -> Tensor:
        node, n = tree.nodes[index], int(counts.sum())
        if n == 0:
            return symbols[:0]
        if node.right == 0:
            here = symbols[node.first : node.first + (1 << node.bits)]
            if node.bits == 0:
                return here.expand(n)
            columns = take(counts * node.bits).view(n, node.bits)
            value = columns[:, 0].to(torch.uint8 if node.bits <= 8 else torch.int32)
            for j in range(1, node.bits):
                value |= columns[:, j].to(value.dtype) << j
            return here.index_select(0, value.to(torch.int32))
        is_right = take(counts).view(torch.bool)
        running = is_right.cumsum(0, dtype=torch.int32)
        n_right = _ends(counts, running)
        left, right = walk(index + 1, counts - n_right), walk(node.right, n_right)
        return torch.cat([left, right]).index_select(0, _places(is_right, running, left.numel()))

    out = walk(0, torch.tensor(counts))
    if bool(((position + 7) // 8 * 8 != ends).any()):
        raise Corrupt(BAD_CHUNK + number + int(((position + 7) // 8 * 8 != ends).nonzero()[0]))
    return out
