"""What deltas are made of, in plain torch: numbers in buckets, fingerprints, contexts, ranks within classes.

docs/format.md ("Delta") describes the bytes. Units are elements as integers: uint8, int16, int32 or int64. All
arithmetic is of int64, which wraps around on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 15
"""Numbers whose raw bits begin at a byte."""
GAP_BITS, VALUE_BITS = 3, 2
"""Bits of a number, below its highest, that are in its symbol."""
MAX_CLASSES = 16
KEY = 0x9E3779B97F4A7C15 - 2**64
_LOW = 2**32 - 1
_PIECE = 1 << 22


def terms(words: Tensor, index: Tensor) -> Tensor:
    """What each word adds to the fingerprint's sum."""
    first = words + (index + 1) * KEY
    product = _halves_product(first)
    second = first ^ (product << 32 | product >> 32 & _LOW)
    return second + _halves_product(second)


def _halves_product(words: Tensor) -> Tensor:
    return (words & _LOW) * (words >> 32 & _LOW)


def to_words(data: Tensor) -> Tensor:
    """Bytes as int64, filled up with zeros."""
    if data.numel() % 8 or data.storage_offset() % 8 or data.stride(0) != 1:
        padded = torch.zeros(-(-data.numel() // 8) * 8, dtype=torch.uint8, device=data.device)
        padded[: data.numel()] = data
        data = padded
    return data.view(torch.int64)


def _bytes(units: Tensor) -> Tensor:
    """Those of a 1-d tensor, which may have a stride that no elements show."""
    return (units.contiguous() if units.numel() else units.new_empty(0)).view(torch.uint8)


def fingerprint(data: Tensor) -> Tensor:
    """The sum over bytes."""
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for begin in range(0, data.numel(), 8 * _PIECE):
        words = to_words(data[begin : begin + 8 * _PIECE])
        index = torch.arange(begin // 8, begin // 8 + words.numel(), device=data.device)
        total += terms(words, index).sum()
    return total


def shift(old: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    """By how much the sum changes where values are put at positions."""
    if positions.numel() == 0:
        return torch.zeros((), dtype=torch.int64, device=old.device)
    size = old.element_size()
    words = to_words(_bytes(old))
    index, which = torch.unique_consecutive(positions * size // 8, return_inverse=True)
    now, before = _unsigned(values), _unsigned(old[positions])
    then = words[index]
    after = then.index_add(0, which, (now - before) << 8 * (positions * size % 8))
    return (terms(after, index) - terms(then, index)).sum()


def _unsigned(units: Tensor) -> Tensor:
    """As int64, the upper bits 0."""
    size = units.element_size()
    wide = units.to(torch.int64)
    return wide if size == 8 else wide & (1 << 8 * size) - 1


def scan(new: Tensor, old: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where they differ and what is there, unless that is at more than ``most`` places; how many, the sums, and the
    bits that differ anywhere.
    """
    positions = (new != old).nonzero().flatten()
    count = torch.full((), positions.numel(), dtype=torch.int64, device=new.device)
    if positions.numel() > most:
        positions = positions[:0]
    sums = [fingerprint(_bytes(value)) for value in (new, old)]
    return (
        positions,
        new[positions],
        old[positions],
        torch.stack([count, *sums, _any_bits(_unsigned(new ^ old))]),
    )


def _any_bits(x: Tensor) -> Tensor:
    """The bits that any of the numbers has."""
    while x.numel() > 1:
        half = x.numel() // 2
        x = torch.cat([x[:half] | x[half : 2 * half], x[2 * half :]])
    return x[0] if x.numel() else x.new_zeros(())


def _length(z: Tensor) -> Tensor:
    """The bits of a number from 1 to 2^64 - 1 (as int64): floats hold the halves exactly."""
    high, low = z >> 32 & _LOW, z & _LOW
    return torch.where(
        high > 0, 32 + torch.frexp(high.double()).exponent, torch.frexp(low.double()).exponent
    ).to(torch.int64)


def _offsets(bits: Tensor) -> tuple[Tensor, int]:
    """Where the raw bits of each number begin, and their bytes."""
    if bits.numel() == 0:
        return bits, 0
    ends = bits.cumsum(0)
    before = ends - bits
    first = before[::BLOCK]
    sizes = (torch.cat([first[1:], ends[-1:]]) - first + 7) // 8
    starts = 8 * (sizes.cumsum(0) - sizes) - first
    places = before + starts.repeat_interleave(BLOCK)[: bits.numel()]
    return places, int(sizes.sum())


def split(z: Tensor, mantissa: int) -> tuple[Tensor, Tensor]:
    """Numbers (below 2^64, as int64) as symbols and raw bits."""
    bits = _length(z | 1 << mantissa) - 1 - mantissa
    symbols = (bits << mantissa) + (z >> bits & (2 << mantissa) - 1)
    places, size = _offsets(bits)
    rest = z & (torch.ones_like(z) << bits) - 1
    words = torch.zeros(size // 8 + 2, dtype=torch.int64, device=z.device)
    offset = places & 63
    words.index_add_(0, places >> 6, rest << offset)
    over = torch.where(offset > 0, rest >> (64 - offset).clamp(max=63), 0)
    words.index_add_(0, (places >> 6) + 1, over)
    return symbols.to(torch.uint8), words.view(torch.uint8)[:size].clone()


def join(symbols: Tensor, raw: Tensor, mantissa: int) -> Tensor | None:
    """The numbers; None where the bytes contradict themselves."""
    symbol = symbols.to(torch.int64)
    if symbol.numel() == 0:
        return None if raw.numel() else symbol
    if int(symbol.max()) > ((63 - mantissa) << mantissa) + (2 << mantissa) - 1:
        return None
    bits = ((symbol >> mantissa) - 1).clamp(min=0)
    places, size = _offsets(bits)
    if size != raw.numel():
        return None
    words = to_words(torch.cat([raw, raw.new_zeros(16)]))
    offset = places & 63
    low = words[places >> 6]
    shifted = low >> offset & (torch.ones_like(low) << (64 - offset).clamp(max=63)) - 1
    low = torch.where(offset > 0, shifted, low)
    high = torch.where(offset > 0, words[(places >> 6) + 1] << (64 - offset).clamp(max=63), 0)
    ends = torch.cat([(places + bits)[BLOCK - 1 :: BLOCK], (places + bits)[-1:]])
    inside = ends[ends % 8 > 0]  # of a byte
    if bool((raw[inside // 8].to(torch.int64) >> inside % 8).any()):
        return None
    rest = (low | high) & (torch.ones_like(low) << bits) - 1
    return (symbol - (bits << mantissa)) << bits | rest


def gaps(positions: Tensor) -> Tensor:
    """How many stay as they are before each position, since the one before."""
    return torch.diff(positions, prepend=positions.new_full((1,), -1)) - 1


def positions_of(symbols: Tensor, raw: Tensor, limit: int) -> Tensor | None:
    """The positions of coded gaps, all below ``limit``."""
    found = join(symbols, raw, GAP_BITS)
    if found is None or found.numel() == 0:
        return found
    # Gaps are below 2^34: of so many at a time the sums fit.
    if float((found + 1).double().sum()) > 2.0**62:
        return None
    found = (found + 1).cumsum(0) - 1
    return None if int(found[-1]) >= limit else found


def difference(new: Tensor, old: Tensor, use_xor: bool, shift: int) -> Tensor:
    """From old to new: the XOR, or the distance around the circle with its sign in the lowest bit.

    In both, the lowest ``shift`` bits, which are 0, are left out.
    """
    width = 8 * new.element_size()
    if use_xor:
        bits = _unsigned(new ^ old)
        return bits if shift == 0 else bits >> shift & (1 << 64 - shift) - 1
    step = new.to(torch.int64) - old.to(torch.int64)
    if width < 64:
        half = 1 << (width - 1)
        step = ((step + half) & (1 << width) - 1) - half
    step >>= shift
    return step << 1 ^ step >> 63


def patch(before: Tensor, z: Tensor, use_xor: bool, shift: int) -> Tensor | None:
    """And back; None where a number does not fit."""
    width = 8 * before.element_size()
    if width < 64 and bool((z >> width != 0).any()):
        return None
    old = before.to(torch.int64)
    step = z if use_xor else (z >> 1 & 2**63 - 1) ^ -(z & 1)
    step = step << shift
    return (old ^ step if use_xor else old + step).to(before.dtype)


def contexts(units: Tensor) -> Tensor:
    """Of each unit a byte, as int64: of a float its exponent and, of few, what follows."""
    x = units.to(torch.int64)
    size = units.element_size()
    if size == 1:
        return (x << 1 | x >> 7) & 255
    if size < 8:
        return x >> (7 if size == 2 else 23) & 255
    return (x >> 52) - 831 & 255


def class_ranks(old: Tensor, classes: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ranks within classes, sorted by class; which position each is of; how many of each class."""
    of = classes[contexts(old)]
    mine = of[positions]
    order = mine.to(torch.int64).argsort(stable=True)
    counts = torch.bincount(mine.to(torch.int64), minlength=MAX_CLASSES)
    if counts.numel() > MAX_CLASSES:
        raise ValueError("cfl_ops.delta_ranks: classes must be from 0 to 15 for every element that changes")
    ranks = torch.empty_like(positions)
    for c in counts.nonzero().flatten().tolist():
        here = mine == c
        ranks[here] = (of == c).cumsum(0)[positions[here]] - 1
    return ranks[order], order, counts


def sort_by_class(old: Tensor, classes: Tensor, values: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    """Values sorted by the class of the old element beside them, or (back) from there to their places."""
    of = classes[contexts(old)].clamp(max=MAX_CLASSES).to(torch.int64)
    order = of.argsort(stable=True)
    counts = torch.bincount(of, minlength=MAX_CLASSES + 1)[:MAX_CLASSES]
    if not back:
        return values[order], counts
    out = torch.empty_like(values)
    out[order] = values
    return out, counts


def class_places(old: Tensor, classes: Tensor, counts: list[int], ranks: Tensor) -> Tensor | None:
    """The positions, sorted by class; None where a class has fewer units."""
    of = classes[contexts(old)]
    places, begin = [ranks[:0]], 0
    for c, count in enumerate(counts):
        if count:
            members = (of == c).nonzero().flatten()
            mine = ranks[begin : begin + count]
            if int(mine[-1]) >= members.numel():
                return None
            places.append(members[mine])
        begin += count
    return torch.cat(places)
