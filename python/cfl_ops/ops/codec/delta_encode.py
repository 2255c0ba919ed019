"""delta_encode: which of a delta's kinds says the least bytes, and how elements are put into classes.

All is decided by integers, so that every device and backend writes the same bytes.
"""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from cfl_ops.ops.codec import host as _host  # noqa: F401  (defines host_code)
from cfl_ops.ops.codec.bits import flat_bits
from cfl_ops.ops.codec.blob import store_lossless
from cfl_ops.ops.codec.changes import (
    DELTA_GAPS,
    DELTA_RANKS,
    DELTA_SCAN,
    DELTA_SORT,
    DELTA_VALUES,
    MOST_APART,
    units_of,
)
from cfl_ops.ops.codec.delta_format import (
    CHANGED,
    CLASSES,
    DENSE,
    NO_CLASS,
    REPLACED,
    SAME,
    SMALL,
    XOR,
    ClassPart,
    Delta,
    Numbers,
    pack_delta,
    pack_numbers,
)
from cfl_ops.ops.codec.fingerprint import finish
from cfl_ops.ops.codec.layout import DTYPES, Lanes, lanes
from cfl_ops.ops.codec.planes import split as planes_of
from cfl_ops.ops.codec.reference.changes import MAX_CLASSES, contexts
from cfl_ops.ops.codec.reference.header import from_bytes
from cfl_ops.ops.codec.sample import sampled

_LOOK = 1 << 12
"""Values that XOR and difference are compared on; and elements that tell how well a tensor can be compressed."""
_SAMPLE = 1 << 17
"""Elements whose contexts are counted."""
_CLASS_BITS = 1400 << 16
"""What another class costs: two payloads' headers and code tables. In 2^-16 bits, as all costs of classes."""


def encode_pair(op: str, new: Tensor, old: Tensor, small: bool) -> Tensor:
    """The delta of two tensors of one shape and dtype."""
    flat = flat_bits(new)
    before = flat_bits(old)
    effort = SMALL if small else 0
    nbytes = flat.numel() * flat.element_size()
    if flat.numel() == 0:
        mark = finish(0, 0, new.dtype)
        return pack_delta(_delta(SAME, effort, new, mark, mark, 0), new.device)
    now, then = units_of(flat), units_of(before)
    n = now.numel()
    positions, new_values, old_values, facts = DELTA_SCAN(now, then, n // 2)
    changed, *sums, bits = facts.tolist()
    result, base = (finish(total, nbytes, new.dtype) for total in sums)
    if changed == 0:
        return pack_delta(_delta(SAME, effort, new, base, result, 0), new.device)
    shift = (bits & -bits).bit_length() - 1  # the lowest of the bits that change somewhere
    found: list[tuple[int, int, bytes | None, list[ClassPart]]] = []
    if changed <= n // 2 and not _far_apart(positions, n):
        use_xor, values = _coded_values(new_values, old_values, shift)
        parts = [ClassPart(changed, pack_numbers(*DELTA_GAPS(positions)), values)]
        flags = effort | (XOR if use_xor else 0)
        found.append((CHANGED, flags, None, parts))
        classes = _choose_classes(then, old_values) if small and n <= MOST_APART else None
        if classes is not None:
            by_class = _changed_by_class(then, classes, positions, new_values, old_values, (use_xor, shift))
            found.append((CHANGED, flags | CLASSES, classes, by_class))
    if changed > n // 8:
        found += _dense(now, then, effort, shift)
    kind, flags, marks, parts = min(found, key=lambda one: _size(one[3]) + (300 if one[2] else 0))
    body = _size(parts)
    if _may_be_smaller_whole(now, lanes(DTYPES.index(new.dtype)), body):
        blob = store_lossless(op, "new", new)
        if blob.numel() < body:
            whole = _delta(REPLACED, effort, new, base, result, n)
            return pack_delta(whole._replace(blob=blob), new.device)
    delta = _delta(kind, flags, new, base, result, changed)
    return pack_delta(delta._replace(shift=shift, classes=marks, parts=parts), new.device)


def _delta(kind: int, flags: int, new: Tensor, base: int, result: int, changed: int) -> Delta:
    shape = tuple(new.shape)
    return Delta(kind, flags, new.dtype, shape, new.dtype, shape, base, result, changed, 0, None, [], None, 0)


def _size(parts: list[ClassPart]) -> int:
    return sum(part.values.nbytes + (part.gaps.nbytes if part.gaps else 0) for part in parts)


def _far_apart(positions: Tensor, n: int) -> bool:
    """Whether there is a gap that no symbol stands for."""
    if n <= MOST_APART:
        return False
    return int(positions[0]) >= MOST_APART or bool((positions.diff() > MOST_APART).any())


def _cost(numbers: tuple[Tensor, Tensor]) -> int:
    """Bits of symbols, their code table and what is beside them."""
    symbols, raw = numbers
    counts = torch.bincount(symbols.to(torch.int32), minlength=1).to("cpu", torch.int64)
    _, table, facts = torch.ops.cfl_ops.host_code(counts, 1)
    return int(facts[4]) + 8 * int(table.numel() + raw.numel())


def _coded_values(new: Tensor, old: Tensor, shift: int) -> tuple[bool, Numbers]:
    """Values as XOR or as difference, whichever takes less for a sample."""
    every = max(1, new.numel() // _LOOK)
    some = (sampled(new, every), sampled(old, every)) if every > 1 else (new, old)
    by_xor, by_step = (DELTA_VALUES(*some, use_xor, shift) for use_xor in (True, False))
    use_xor = _cost(by_xor) < _cost(by_step)
    if every > 1:
        return use_xor, pack_numbers(*DELTA_VALUES(new, old, use_xor, shift))
    return use_xor, pack_numbers(*(by_xor if use_xor else by_step))


def _may_be_smaller_whole(now: Tensor, cut: Lanes, body: int) -> bool:
    """Whether the tensor alone, compressed, could be smaller than the changes.

    A chunk with two different symbols takes a bit an element; one of equal elements takes next to nothing. How many
    of those there are is told by 4,096 elements and their neighbours. Then as many tell about how many bits the bytes
    take; different tables for different parts may save some of them.
    """
    n = now.numel()
    every = -(-n // _LOOK)
    left, right = now[:-1:every], now[1::every]
    unequal = max(1, int((left != right).sum()))
    if 8 * body * max(1, left.numel()) < n * unequal:
        return False
    if n <= _LOOK:
        return True
    some = sampled(now, n // _LOOK)
    bits = sum(_cost((plane, plane[:0])) for plane in planes_of(some.view(torch.uint8), cut))
    return bool(12 * body * some.numel() * left.numel() >= bits * n * unequal)


# --- all values


def _dense(
    now: Tensor, then: Tensor, effort: int, shift: int
) -> list[tuple[int, int, bytes | None, list[ClassPart]]]:
    use_xor, values = _coded_values(now, then, shift)
    flags = effort | (XOR if use_xor else 0)
    found: list[tuple[int, int, bytes | None, list[ClassPart]]] = [
        (DENSE, flags, None, [ClassPart(0, None, values)])
    ]
    classes = _dense_classes(then) if effort else None
    if classes is not None:
        by_class = from_bytes(classes, then.device)
        new, counts = DELTA_SORT(then, by_class, now, False)
        old, _ = DELTA_SORT(then, by_class, then, False)
        sizes = counts.tolist()[: max(classes) + 1]
        pairs = zip(new.split(sizes), old.split(sizes), strict=True)
        split = [pack_numbers(*DELTA_VALUES(*pair, use_xor, shift)) for pair in pairs]
        parts = [ClassPart(0, None, values) for values in split]
        found.append((DENSE, flags | CLASSES, classes, parts))
    return found


def _dense_classes(then: Tensor) -> bytes | None:
    """The most frequent contexts have classes of their own, between them the others join the one below."""
    counts = _count_contexts(then)
    common = sorted(sorted(range(256), key=lambda v: (-counts[v], v))[:MAX_CLASSES])
    common = [v for v in common if counts[v] * 64 > sum(counts) // 16]
    if len(common) < 2:
        return None
    out, which = bytearray(256), 0
    for v in range(256):
        if which + 1 < len(common) and v >= common[which + 1]:
            which += 1
        out[v] = which
    return bytes(out)


# --- classes of the old exponent


class _Group(NamedTuple):
    """Contexts of about one rate of change."""

    contexts: tuple[int, ...]
    elements: int
    changed: int

    def join(self, other: _Group) -> _Group:
        return _Group(
            self.contexts + other.contexts, self.elements + other.elements, self.changed + other.changed
        )


def _count_contexts(units: Tensor) -> list[int]:
    """How many elements have each context, from a sample of long tensors."""
    n, block = units.numel(), 512
    if n >= 2 * _SAMPLE:
        every = n // _SAMPLE * block
        units = units[: n // every * every].view(-1, every)[:, :block].reshape(-1)
    counts: list[int] = torch.bincount(contexts(units), minlength=256).tolist()
    return [count * n // units.numel() for count in counts]


def _choose_classes(then: Tensor, old_values: Tensor) -> bytes | None:
    """The class of each context, or None where one is enough.

    Contexts that change about as often are put together, neighbours first, as long as that saves bytes.
    """
    changed: list[int] = torch.bincount(contexts(old_values), minlength=256).tolist()
    if sum(changed) < 512:
        return None
    elements = [max(*pair) for pair in zip(_count_contexts(then), changed, strict=True)]
    groups = [_Group((v,), elements[v], changed[v]) for v in range(256) if changed[v]]
    groups.sort(key=lambda g: (g.changed * 2**64 // g.elements, g.contexts))
    losses = [_loss(*pair) for pair in itertools.pairwise(groups)]
    while losses:
        least = min(losses)
        if least > _CLASS_BITS and len(groups) <= MAX_CLASSES:
            break
        i = losses.index(least)
        groups[i : i + 2] = [groups[i].join(groups[i + 1])]
        around = groups[max(i - 1, 0) : i + 2]
        losses[max(i - 1, 0) : i + 2] = [_loss(*pair) for pair in itertools.pairwise(around)]
    idle = sum(elements[v] for v in range(256) if not changed[v])
    if len(groups) == 1 and idle < sum(elements) // 8:
        return None
    out = bytearray([NO_CLASS]) * 256
    for c, group in enumerate(groups):
        for v in group.contexts:
            out[v] = c
    return bytes(out)


def _loss(a: _Group, b: _Group) -> int:
    """Bits that two groups take more in one."""
    return _cost_of(*a.join(b)[1:]) - _cost_of(*a[1:]) - _cost_of(*b[1:])


@functools.lru_cache(maxsize=1 << 12)
def _cost_of(n: int, c: int) -> int:
    """The entropy of which c of n elements change, in 2^-16 bits."""
    return n * _log2(n) - c * _log2(c) - (n - c) * _log2(n - c)


def _log2(x: int) -> int:
    """The binary logarithm in 2^-16, of integers alone: no machine rounds it otherwise. Of 1,025 places it is known."""
    if x < 2:
        return 0
    whole = x.bit_length() - 1
    y = x << 32 >> whole  # in [2^32, 2^33)
    table, place, rest = _logarithms(), (y >> 22) - 1024, y & (1 << 22) - 1
    return (whole << 16) + table[place] + ((table[place + 1] - table[place]) * rest >> 22)


@functools.cache
def _logarithms() -> tuple[int, ...]:
    """Of 1 + i / 1024, in 2^-16, digit by digit: a square has twice the logarithm."""
    found = []
    for i in range(1024):
        y, out = (1024 + i) << 54, 0
        for _ in range(16):
            y = y * y >> 64
            out = out << 1 | y >> 65
            y >>= y >> 65
        found.append(out)
    return (*found, 1 << 16)


def _changed_by_class(
    then: Tensor, classes: bytes, positions: Tensor, new: Tensor, old: Tensor, how: tuple[bool, int]
) -> list[ClassPart]:
    ranks, order, counts = DELTA_RANKS(then, from_bytes(classes, then.device), positions)
    new, old = new[order], old[order]
    parts, begin = [], 0
    for count in counts.tolist()[: max(set(classes) - {NO_CLASS}) + 1]:
        here = slice(begin, begin + count)
        gaps: Numbers = pack_numbers(*DELTA_GAPS(ranks[here]))
        values = pack_numbers(*DELTA_VALUES(new[here], old[here], *how))
        parts.append(ClassPart(count, gaps, values))
        begin += count
    return parts
