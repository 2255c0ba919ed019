"""A payload in plain torch: the readable form of docs/format.md, for any device.

All chunks of a group are worked on at once: what a node of the code tree holds is one tensor, with the
chunks after one another, so the Python loop runs over nodes and not over symbols.
"""

from __future__ import annotations

import ctypes
import struct
import zlib
from itertools import accumulate

import torch
from torch import Tensor

from cfl_ops.ops.codec.codes import BAD_CHUNK, OUT_OF_RANGE, Corrupt
from cfl_ops.ops.codec.reference.header import as_bytes, from_bytes, head_bytes, parse, symbol_dtype
from cfl_ops.ops.codec.reference.huffman_code import Tree, build_tree, code_lengths, pack_lengths

_GROUP = 1 << 19  # symbols worked on at a time
_COUNTED = 1 << 24


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
        places = _Places(min(n, _GROUP), device)
        for begin in range(0, n, _GROUP):
            ranks = rank.index_select(0, symbols[begin : begin + _GROUP].to(torch.int32))
            chunks += _encode_chunks(tree, ranks, chunk, places)
    data = [as_bytes(part) for part in chunks]
    entries = b"".join(struct.pack("<II", len(part), zlib.crc32(part)) for part in data)
    table = pack_lengths(lengths)
    head = head_bytes(symbols.element_size(), chunk_log2, n, shape, len(lengths), table, entries)
    return from_bytes(bytes(reserve) + head + b"".join(data), device)


def decode(payload: Tensor, start: int, count: int) -> Tensor:
    """Symbols ``start`` to ``start + count`` of a payload; raises Corrupt."""
    header = parse(payload)
    dtype = symbol_dtype(8 * header.symbol_bytes)
    if start < 0 or count < 0 or start + count > header.numel:
        raise Corrupt(OUT_OF_RANGE)
    if count == 0:
        return torch.empty(0, dtype=dtype, device=payload.device)
    tree = build_tree(header.lengths)
    chunk = 1 << header.chunk_log2
    first, last = start >> header.chunk_log2, (start + count - 1) >> header.chunk_log2
    per_group = max(1, _GROUP // chunk)
    offset = header.data + sum(header.sizes[:first])
    symbols = min(header.numel, (last + 1) * chunk) - first * chunk
    out = torch.empty(
        symbols, dtype=torch.uint8 if max(tree.symbols) < 256 else torch.int32, device=payload.device
    )
    places = _Places(min(symbols, per_group * chunk), payload.device)
    for begin in range(first, last + 1, per_group):
        numbers = range(begin, min(begin + per_group, last + 1))
        sizes = [header.sizes[c] for c in numbers]
        data = payload[offset : offset + sum(sizes)]
        offset += sum(sizes)
        _check_chunks(data, sizes, [header.checksums[c] for c in numbers], begin)
        counts = [min(chunk, header.numel - c * chunk) for c in numbers]
        part = out[(begin - first) * chunk :][: sum(counts)]
        _decode_chunks(tree, data, sizes, counts, begin, part, places)
    skip = start - first * chunk
    return out[skip : skip + count].to(dtype)


def sample_counts(symbols: Tensor) -> list[int]:
    """The counts the code is built from: of all symbols, or of evenly spread blocks of 4,096.

    A code made for n samples of A symbols loses about A / (2 n ln 2) bits a symbol; 1,024 A samples keep
    that below 0.001. In a sample every symbol counts, so that it gets a code; where that costs much, all
    symbols are counted.
    """
    n = symbols.numel()
    if n == 0:
        return []
    alphabet = 256 if symbols.dtype == torch.uint8 else int(symbols.to(torch.int32).max()) + 1
    stride = max(1, n // (1024 * alphabet))
    sample = symbols
    if stride > 1:
        sample = torch.cat([symbols[i : i + 4096] for i in range(0, n, 4096 * stride)])
    counts: list[int] = torch.bincount(sample.to(torch.int32), minlength=alphabet).tolist()
    if stride > 1 and few_met(counts):
        counts, stride = all_counts(symbols, alphabet).tolist(), 1
    if stride > 1:
        counts = [count * stride if count else 1 for count in counts]
    while counts and counts[-1] == 0:
        counts.pop()
    return counts


_SLIGHT = 64


def few_met(counts: list[int]) -> bool:
    """Whether a code for what a sample has not met costs much: it lengthens the rarest symbol by a bit."""
    met = [count for count in counts if count]
    return len(met) < len(counts) and _SLIGHT * min(met) >= sum(met)


def all_counts(symbols: Tensor, alphabet: int) -> Tensor:
    """How often each symbol is met, without as many integers as there are symbols at once."""
    counts = torch.zeros(alphabet, dtype=torch.int64, device=symbols.device)
    for part in symbols.split(_COUNTED):
        counts += torch.bincount(part.to(torch.int32), minlength=alphabet)
    return counts


def _encode_chunks(tree: Tree, ranks: Tensor, chunk: int, places: _Places) -> list[Tensor]:
    """The bytes of each chunk."""
    n, device = ranks.numel(), ranks.device
    counts = [min(chunk, n - begin) for begin in range(0, n, chunk)]
    segments: list[list[Tensor]] = [[] for _ in counts]

    def emit(bits: Tensor, sizes: list[int]) -> None:
        for parts, part in zip(segments, bits.split(sizes), strict=True):
            parts.append(part)

    def walk(index: int, ranks: Tensor, counts: list[int]) -> None:
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
                emit(bits.flatten(), [count * node.bits for count in counts])
            return
        is_right = ranks >= node.first
        emit(is_right.to(torch.uint8), counts)
        one = is_right.to(torch.int32)
        running = one.cumsum(0, dtype=torch.int32)
        n_right = _ones(counts, running)
        zeros = ranks.numel() - sum(n_right)
        place = places(one, running, zeros)
        parted = torch.empty_like(ranks).scatter_(0, place.to(torch.int64), ranks)
        walk(index + 1, parted[:zeros], [a - b for a, b in zip(counts, n_right, strict=True)])
        walk(node.right, parted[zeros:], n_right)

    walk(0, ranks, counts)
    empty = torch.empty(0, dtype=torch.uint8, device=device)
    out = []
    for parts in segments:
        bits = torch.cat(parts) if parts else empty
        out.append(_to_bytes(torch.nn.functional.pad(bits, (0, -bits.numel() % 8))))
    return out


def _check_chunks(data: Tensor, sizes: list[int], checksums: list[int], number: int) -> None:
    raw, at = memoryview(as_bytes(data)), 0
    for size, checksum in zip(sizes, checksums, strict=True):
        if zlib.crc32(raw[at : at + size]) != checksum:
            raise Corrupt(BAD_CHUNK + number)
        at, number = at + size, number + 1


def _decode_chunks(
    tree: Tree, data: Tensor, sizes: list[int], counts: list[int], number: int, out: Tensor, places: _Places
) -> None:
    """Write the symbols of consecutive chunks, of which ``number`` is the first one's number."""
    device = data.device
    symbols = torch.tensor(tree.symbols, dtype=out.dtype, device=device)
    # Slices of memory are taken by the thousand, at a tenth of the cost of slices of tensors.
    unpacked = _to_bits(data).cpu()
    bits = memoryview((ctypes.c_uint8 * unpacked.numel()).from_address(unpacked.data_ptr()))
    ends = [8 * end for end in accumulate(sizes)]
    position = [0, *ends[:-1]]

    def take(need: list[int]) -> Tensor:
        """The next bits of each chunk."""
        pieces = []
        for c, count in enumerate(need):
            if count:
                start = position[c]
                position[c] = stop = start + count
                if stop > ends[c]:
                    raise Corrupt(BAD_CHUNK + number + c)
                pieces.append(bits[start:stop])
        return torch.frombuffer(bytearray().join(pieces), dtype=torch.uint8).to(device)

    def walk(index: int, counts: list[int], out: Tensor) -> None:
        node, n = tree.nodes[index], out.numel()
        if n == 0:
            return
        if node.right == 0:
            here = symbols[node.first : node.first + (1 << node.bits)]
            if node.bits == 0:
                out.copy_(here.expand(n))
                return
            columns = take([count * node.bits for count in counts]).view(n, node.bits)
            value = columns[:, 0].to(torch.uint8 if node.bits <= 8 else torch.int32, copy=True)
            for j in range(1, node.bits):
                value.add_(columns[:, j], alpha=1 << j)
            torch.index_select(here, 0, value.to(torch.int32), out=out)
            return
        is_right = take(counts).to(torch.int32)
        running = is_right.cumsum(0, dtype=torch.int32)
        n_right = _ones(counts, running)
        zeros = n - sum(n_right)
        lists = torch.empty_like(out)  # the left one, the right one
        walk(index + 1, [a - b for a, b in zip(counts, n_right, strict=True)], lists[:zeros])
        walk(node.right, n_right, lists[zeros:])
        torch.index_select(lists, 0, places(is_right, running, zeros), out=out)

    walk(0, counts, out)
    for c, (stop, end) in enumerate(zip(position, ends, strict=True)):
        if not end - 8 < stop <= end:
            raise Corrupt(BAD_CHUNK + number + c)


class _Places:
    """Where the elements of a list go when it is parted: (the left list, the right list)."""

    def __init__(self, most: int, device: torch.device) -> None:
        self.most = most
        self.rising = torch.arange(most, dtype=torch.int32, device=device)
        self.falling = torch.arange(most - 1, -most - 1, -1, dtype=torch.int32, device=device)
        self.place, self.shift = torch.empty_like(self.rising), torch.empty_like(self.rising)

    def __call__(self, is_right: Tensor, running: Tensor, zeros: int) -> Tensor:
        """For each element its index, from 0 or 1 in int32 and the running count; valid until the next call."""
        # torch.where(is_right, zeros - 1 + running, i - running), but several times faster: what
        # must be added to i - running on the right is zeros - 1 - i + 2 running.
        n = is_right.numel()
        place = torch.sub(self.rising[:n], running, out=self.place[:n])
        shift = self.falling[self.most - zeros : self.most - zeros + n]
        return place.addcmul_(torch.add(shift, running, alpha=2, out=self.shift[:n]), is_right)


def _to_bits(data: Tensor) -> Tensor:
    """For each byte its bits, low one first, as 8 bytes of 0 or 1."""
    every = torch.arange(256, device=data.device)[:, None] >> torch.arange(8, device=data.device) & 1
    rows = every.to(torch.uint8).view(torch.int64).view(256)  # 8 bytes at once
    return rows.index_select(0, data.to(torch.int32)).view(torch.uint8)


def _to_bytes(bits: Tensor) -> Tensor:
    columns = bits.view(-1, 8)
    out = columns[:, 0].clone()
    for j in range(1, 8):
        out |= columns[:, j] << j
    return out


def _ones(counts: list[int], running: Tensor) -> list[int]:
    """How many ones each chunk has, from the running count of them over all chunks."""
    # Lists: for the few chunks of a group they cost less than small tensors.
    ends = list(accumulate(counts))
    at_end = running[torch.tensor([max(end - 1, 0) for end in ends], device=running.device)].tolist()
    at_end = [ones if end else 0 for ones, end in zip(at_end, ends, strict=True)]
    return [after - before for after, before in zip(at_end, [0, *at_end[:-1]], strict=True)]
