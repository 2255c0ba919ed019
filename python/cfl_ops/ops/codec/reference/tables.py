"""Which chunks of a plane of bytes are coded, and with which code tables: integers only, the same everywhere."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from cfl_ops.ops.codec.layout import CHUNK, MAX_TABLES
from cfl_ops.ops.codec.reference.huffman_code import code_lengths, pack_lengths

EVERY, RUN = 512, 64
"""Of each chunk the first RUN symbols of each EVERY are looked at; of a tensor of one chunk, all."""
_GLANCE = 4
"""Of a whole chunk one run in so many is looked at first, in planes after the first one."""
_GLANCE_LIMIT, _LOOK_LIMIT = 136, 140
BANDS = 64
_NO_CODE = 40
"""Bits that a symbol without a code counts for."""
_SLIGHT = 11
"""Less than 2^-11 bits a symbol are no reason for another table: as much is noise of the look."""
_PAYLOAD = 64
"""Bytes of a payload beside its code table and chunks, with those in the head of the blob."""


def nearly_uniform(counts: Tensor, limit: int) -> Tensor:
    """Where Rényi's entropy, at most Shannon's, without the bias of a sample, is so close to 8 bits that coding wins
    nothing: 128 is a uniform distribution, and 140 has 7.87 bits.
    """
    seen, squares = counts.sum(1), (counts * counts).sum(1)
    return (seen == 0) | (256 * 128 * (squares - seen) < limit * seen * seen)


def look_counts(plane: Tensor, first: bool) -> Tensor:
    """How often each symbol is met where each chunk is looked at: (chunks, 256), int64, on the CPU.

    None are met where a glance shows that a chunk of a plane, but the first, is to be stored.
    """
    counts = _counts(plane, EVERY)
    whole = plane.numel() // CHUNK
    if not first and len(counts) > 1 and whole:
        glance = _counts(plane[: whole * CHUNK], _GLANCE * EVERY, several=True)
        counts[:whole][nearly_uniform(glance, _GLANCE_LIMIT)] = 0
    return counts


def _counts(plane: Tensor, every: int, several: bool = False) -> Tensor:
    """Of RUN symbols of each ``every``; of a plane of one chunk all, unless it is one of ``several``."""
    n = plane.numel()
    chunks = -(-n // CHUNK)
    runs = n // every * every
    several = several or chunks > 1
    looked = plane.view(1, n)
    if several:
        looked = plane[:runs].view(-1, every)[:, :RUN]
    chunk = torch.arange(len(looked), device=plane.device) // (CHUNK // every)
    index = [(looked.to(torch.int64) + 256 * chunk[:, None]).flatten()]
    if several:
        index.append(plane[runs:][:RUN].to(torch.int64) + 256 * (chunks - 1))
    return torch.bincount(torch.cat(index), minlength=256 * chunks).view(chunks, 256).cpu()


class _Band:
    """Chunks that share a code table."""

    def __init__(self, chunks: list[int], counts: list[int], symbols: int) -> None:
        self.chunks, self.counts, self.symbols = chunks, counts, symbols
        self.lengths = code_lengths(counts)
        bits = 0
        self.alone = sum(map(bool, counts)) == 1  # one symbol, which takes no bits
        if not self.alone:
            bits = sum(count * length for count, length in zip(counts, self.lengths, strict=True))
        last = 256
        while self.lengths[last - 1] == 0:
            last -= 1
        self.cost = bits * symbols // sum(counts) + 8 * (_PAYLOAD + len(pack_lengths(self.lengths[:last])))

    def joined(self, other: _Band) -> _Band:
        counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        return _Band(self.chunks + other.chunks, counts, self.symbols + other.symbols)

    def pays(self) -> bool:
        """Whether it takes at least 1/64 less than the bytes themselves, with 8 bytes a chunk."""
        coded = self.cost // 8 + 8 * len(self.chunks)
        return coded + self.symbols // 64 <= self.symbols


def choose(counts: Tensor, n: int) -> list[list[int]]:
    """The chunks of each code table of a plane of n symbols, rising; those of none are stored."""
    candidates = (~nearly_uniform(counts, _LOOK_LIMIT)).nonzero().flatten()
    if candidates.numel() == 0:
        return []
    chunks = len(counts)

    def band(chosen: Tensor) -> _Band:
        members = chosen.tolist()
        missing = chunks * CHUNK - n if chunks - 1 in members else 0
        return _Band(members, counts[chosen].sum(0).tolist(), len(members) * CHUNK - missing)

    mean = (counts * torch.arange(256)).sum(1) * 65536 // counts.sum(1).clamp(min=1)
    order = candidates[mean[candidates].sort(stable=True)[1]]
    parts = min(len(order), BANDS)
    cuts = [len(order) * b // parts for b in range(parts + 1)]
    bands = [band(order[a:b]) for a, b in itertools.pairwise(cuts)]
    _merge(bands)
    if len(bands) > 1:  # each chunk to the table that codes it in the fewest bits, the first of equal ones
        lengths = torch.tensor([band.lengths for band in bands])
        coded = lengths > 0
        lengths[torch.tensor([band.alone for band in bands])] = 0
        lengths[~coded] = _NO_CODE
        best = ((counts[candidates] @ lengths.T) * len(bands) + torch.arange(len(bands))).argmin(1)
        found = [candidates[best == number] for number in range(len(bands))]
        bands = [band(chosen) for chosen in found if chosen.numel()]
    return [sorted(band.chunks) for band in bands if band.pays()]


def _merge(bands: list[_Band]) -> None:
    """Join neighbours, those first that lose least by it, while a table costs more than it saves."""
    joined = [a.joined(b) for a, b in itertools.pairwise(bands)]
    while joined:
        gains = [
            a.cost + b.cost - both.cost
            for (a, b), both in zip(itertools.pairwise(bands), joined, strict=True)
        ]
        best = max(range(len(gains)), key=gains.__getitem__)  # the first of equal ones
        if gains[best] + (joined[best].symbols >> _SLIGHT) < 0 and len(bands) <= MAX_TABLES:
            break
        bands[best : best + 2] = [joined.pop(best)]
        if best > 0:
            joined[best - 1] = bands[best - 1].joined(bands[best])
        if best < len(joined):
            joined[best] = bands[best].joined(bands[best + 1])
