"""Which chunks of a plane of bytes are coded, and with which code tables: integers only, the same everywhere."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from cfl_ops.ops.codec.layout import CHUNK, MAX_TABLES
from cfl_ops.ops.codec.reference.huffman_code import code_lengths, pack_lengths

LOOK = 4096
"""Symbols at the start of each chunk that are looked at; of a tensor of one chunk, all."""
BANDS = 64
_PAYLOAD = 64
"""Bytes of a payload beside its code table and chunks, with those in the head of the blob."""


def look_counts(plane: Tensor) -> Tensor:
    """How often each symbol is met where each chunk is looked at: (chunks, 256), int64, on the CPU."""
    n = plane.numel()
    chunks = -(-n // CHUNK)
    look = n if chunks == 1 else LOOK
    full = plane[: (n // CHUNK) * CHUNK].view(-1, CHUNK)[:, :look] if chunks > 1 else plane[:0].view(0, look)
    parts = [full.to(torch.int64) + 256 * torch.arange(len(full), device=plane.device)[:, None]]
    if len(full) < chunks:
        parts.append(plane[len(full) * CHUNK :][:look].to(torch.int64) + 256 * len(full))
    index = torch.cat([part.flatten() for part in parts])
    return torch.bincount(index, minlength=256 * chunks).view(chunks, 256).cpu()


class _Band:
    """Chunks that share a code table."""

    def __init__(self, chunks: list[int], counts: list[int], symbols: int) -> None:
        self.chunks, self.counts, self.symbols = chunks, counts, symbols
        while counts and counts[-1] == 0:
            counts.pop()
        lengths = code_lengths(counts)
        bits = 0
        if sum(map(bool, counts)) > 1:
            bits = sum(count * length for count, length in zip(counts, lengths, strict=True))
        self.cost = bits * symbols // sum(counts) + 8 * (_PAYLOAD + len(pack_lengths(lengths)))

    def joined(self, other: _Band) -> _Band:
        counts = [0] * max(len(self.counts), len(other.counts))
        for band in (self, other):
            for symbol, count in enumerate(band.counts):
                counts[symbol] += count
        return _Band(self.chunks + other.chunks, counts, self.symbols + other.symbols)

    def pays(self) -> bool:
        """Whether it takes at least 1/64 less than the bytes themselves, with 8 bytes a chunk instead of 4."""
        coded = self.cost // 8 + 4 * len(self.chunks)
        return coded + self.symbols // 64 <= self.symbols


def choose(counts: Tensor, n: int) -> list[list[int]]:
    """The chunks of each code table of a plane of n symbols, rising; those of none are stored."""
    seen = counts.sum(1)
    squares = (counts * counts).sum(1)
    # Rényi's entropy, which is at most Shannon's, without the bias of a sample: above 7.87 bits nothing is to be won.
    candidates = (256 * 128 * (squares - seen) >= 140 * seen * seen).nonzero().flatten()
    if candidates.numel() == 0:
        return []
    mean = (counts * torch.arange(256)).sum(1) * 65536 // seen
    order = candidates[mean[candidates].sort(stable=True)[1]]
    k, last = len(order), len(counts) - 1
    count = min(k, BANDS)
    bands = []
    for b in range(count):
        chosen = order[k * b // count : k * (b + 1) // count]
        chunks = chosen.tolist()
        symbols = len(chunks) * CHUNK - (last + 1) * CHUNK + n if last in chunks else len(chunks) * CHUNK
        bands.append(_Band(chunks, counts[chosen].sum(0).tolist(), symbols))
    joined = [a.joined(b) for a, b in itertools.pairwise(bands)]
    while joined:
        gains = [
            a.cost + b.cost - both.cost
            for (a, b), both in zip(itertools.pairwise(bands), joined, strict=True)
        ]
        best = max(range(len(gains)), key=gains.__getitem__)  # the first of equal ones
        if gains[best] < 0 and len(bands) <= MAX_TABLES:
            break
        bands[best : best + 2] = [joined.pop(best)]
        if best > 0:
            joined[best - 1] = bands[best - 1].joined(bands[best])
        if best < len(joined):
            joined[best] = bands[best].joined(bands[best + 1])
    return [sorted(band.chunks) for band in bands if band.pays()]
