"""Sample inputs and oracles, in plain integers, of the ops that deltas are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from cfl_ops.ops.codec.changes import (
    DELTA_COPY,
    DELTA_GAPS,
    DELTA_PATCH,
    DELTA_PLACES,
    DELTA_POSITIONS,
    DELTA_RANKS,
    DELTA_SCAN,
    DELTA_SHIFT,
    DELTA_SORT,
    DELTA_VALUES,
    DELTA_WRITE,
    FINGERPRINT,
)
from torch import Tensor

from tests.contract import Case, OpSpec

ONCE = (torch.float32,)
NO_VMAP = frozenset({"no vmap"})
KEY = 0x9E3779B97F4A7C15
INTS = (torch.uint8, torch.int16, torch.int32, torch.int64)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _bytes(n: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (n,), generator=_generator(seed), dtype=torch.uint8)


def _units(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return _bytes(n * dtype.itemsize, seed).view(dtype)


def _stepped(old: Tensor, every: int) -> Tensor:
    """Some go up by 1, fewer down, and one becomes something else."""
    new = old.clone()
    new[::every] += 1
    new[1 :: 3 * every] -= 2
    new[-1:] = 77
    return new


def _unsigned(units: Tensor) -> list[int]:
    width = 8 * units.element_size()
    return [value % 2**width for value in units.tolist()]


def _signed(value: int, bits: int = 64) -> int:
    value %= 2**bits
    return value - 2**bits if value >= 2 ** (bits - 1) else value


def _sum(data: bytes) -> int:
    total = 0
    for i in range(0, len(data), 8):
        t = (int.from_bytes(data[i : i + 8], "little") + (i // 8 + 1) * KEY) % 2**64
        product = t % 2**32 * (t >> 32)
        b = t ^ (product % 2**32 << 32 | product >> 32)
        total += b + b % 2**32 * (b >> 32)
    return total


def _data(units: Tensor) -> bytes:
    return bytes(units.contiguous().view(torch.uint8).tolist())


def _scalar(value: int) -> Tensor:
    return torch.tensor(_signed(value))


def _split(numbers: Sequence[int], kept: int) -> tuple[Tensor, Tensor]:
    symbols, raw = [], b""
    for begin in range(0, len(numbers), 1 << 15):
        bits, fill = 0, 0
        for z in numbers[begin : begin + (1 << 15)]:
            rest = max(z.bit_length() - 1 - kept, 0)
            symbols.append((rest << kept) + (z >> rest))
            bits |= (z & (1 << rest) - 1) << fill
            fill += rest
        raw += bits.to_bytes((fill + 7) // 8, "little")
    return torch.tensor(symbols, dtype=torch.uint8), torch.frombuffer(
        bytearray(raw), dtype=torch.uint8
    ) if raw else torch.empty(0, dtype=torch.uint8)


def _differences(new: Tensor, old: Tensor, use_xor: bool, shift: int) -> list[int]:
    width = 8 * new.element_size()
    found = []
    for a, b in zip(_unsigned(new), _unsigned(old), strict=True):
        if use_xor:
            found.append((a ^ b) >> shift)
        else:
            step = _signed(a - b, width) >> shift
            found.append(2 * step if step >= 0 else -2 * step - 1)
    return found


def _scan_case(n: int, dtype: torch.dtype, every: int, most: int):
    def make(_: torch.dtype):
        old = _units(n, dtype)
        return [_stepped(old, every), old, most]

    return make


def _scan_oracle(new: Tensor, old: Tensor, most: int):
    a, b = _unsigned(new), _unsigned(old)
    places = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    bits = 0
    for x, y in zip(a, b, strict=True):
        bits |= x ^ y
    facts = torch.tensor([len(places), _signed(_sum(_data(new))), _signed(_sum(_data(old))), _signed(bits)])
    positions = torch.tensor(places if len(places) <= most else [], dtype=torch.int64)
    return positions, new[positions], old[positions], facts


def _exact(outputs: int):
    return lambda *args: (0,) * outputs


def _positions(n: int, seed: int = 3) -> Tensor:
    """Rising, mostly near each other."""
    gaps = (torch.rand(n, generator=_generator(seed), dtype=torch.float64) ** 9 * 5000).to(torch.int64)
    return (gaps + 1).cumsum(0) - 1


def _gaps(positions: Tensor) -> list[int]:
    before, found = -1, []
    for at in positions.tolist():
        found.append(at - before - 1)
        before = at
    return found


def _gaps_back(n: int, limit: int, cut: int = 0):
    def make(_: torch.dtype):
        symbols, raw = _split(_gaps(_positions(n)), 3)
        return [symbols, raw[: raw.numel() - cut], limit]

    return make


def _positions_oracle(symbols: Tensor, raw: Tensor, limit: int):
    want = _positions(symbols.numel())
    whole = raw.numel() == _split(_gaps(want), 3)[1].numel()
    if not whole or (want.numel() and int(want[-1]) >= limit):
        return torch.zeros_like(want), torch.tensor(1)
    return want, torch.tensor(0)


def _pair(n: int, dtype: torch.dtype, shift: int = 0) -> tuple[Tensor, Tensor]:
    old = _units(n, dtype)
    new = _stepped(old, 2)
    return (new, old) if shift == 0 else (old ^ (new ^ old) << shift, old)


def _values_case(n: int, dtype: torch.dtype, use_xor: bool, shift: int = 0):
    return lambda _: [*_pair(n, dtype, shift), use_xor, shift]


def _values_oracle(new: Tensor, old: Tensor, use_xor: bool, shift: int):
    return _split(_differences(new, old, use_xor, shift), 2)


def _patch_case(n: int, dtype: torch.dtype, use_xor: bool, shift: int = 0, every: int = 0):
    def make(_: torch.dtype):
        new, old = _pair(n, dtype, shift)
        positions = torch.arange(0, n, every) if every else None
        here = slice(None) if positions is None else positions
        numbers = _split(_differences(new[here], old[here], use_xor, shift), 2)
        return [old, positions, *numbers, use_xor, shift]

    return make


def _patch_oracle(old: Tensor, positions: Tensor | None, symbols: Tensor, raw: Tensor, xor: bool, shift: int):
    new, _ = _pair(old.numel(), old.dtype, shift)
    return new if positions is None else new[positions], torch.tensor(0)


def _put(old: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    new = old.tolist()
    for at, value in zip(positions.tolist(), values.tolist(), strict=True):
        new[at] = value
    return torch.tensor(new, dtype=old.dtype)


def _put_case(n: int, dtype: torch.dtype, every: int):
    def make(_: torch.dtype):
        positions = torch.arange(1, max(n, 1), every)
        return [_units(n, dtype), positions, _units(positions.numel(), dtype, 5)]

    return make


def _shift_oracle(old: Tensor, positions: Tensor, values: Tensor):
    return (_scalar(_sum(_data(_put(old, positions, values))) - _sum(_data(old))),)


def _contexts(units: Tensor) -> list[int]:
    width = 8 * units.element_size()
    if width == 64:
        return [((value >> 52) - 831) % 256 for value in _unsigned(units)]
    return [((value << 1 | value >> (width - 1)) >> (width - 8)) % 256 for value in _unsigned(units)]


def _classes(top: int) -> Tensor:
    """``top`` classes, and none for one in eight contexts."""
    return torch.tensor([255 if v % 8 == 7 else v * v % top for v in range(256)], dtype=torch.uint8)


def _with_class(old: Tensor, classes: Tensor, every: int) -> Tensor:
    found = [i for i, v in enumerate(_contexts(old)) if int(classes[v]) < 255]
    return torch.tensor(found[::every], dtype=torch.int64)


def _ranks_case(n: int, dtype: torch.dtype, top: int, every: int):
    def make(_: torch.dtype):
        old, classes = _units(n, dtype), _classes(top)
        return [old, classes, _with_class(old, classes, every)]

    return make


def _ranks_oracle(old: Tensor, classes: Tensor, positions: Tensor):
    of = [int(classes[v]) for v in _contexts(old)]
    ranks, order, counts, wanted = [], [], [], positions.tolist()
    for c in range(16):
        members = [i for i, mine in enumerate(of) if mine == c]
        rank = {at: r for r, at in enumerate(members)}
        here = [i for i, at in enumerate(wanted) if of[at] == c]
        ranks += [rank[wanted[i]] for i in here]
        order += here
        counts.append(len(here))
    return tuple(torch.tensor(values, dtype=torch.int64) for values in (ranks, order, counts))


def _places_case(n: int, dtype: torch.dtype, top: int, every: int, beyond: bool = False):
    def make(_: torch.dtype):
        old, classes = _units(n, dtype), _classes(top)
        ranks, _, counts = _ranks_oracle(old, classes, _with_class(old, classes, every))
        if beyond:
            ranks[-1] = n
        return [old, classes, ranks, counts.tolist()[:top]]

    return make


def _places_oracle(old: Tensor, classes: Tensor, ranks: Tensor, counts: list[int]):
    of = [int(classes[v]) for v in _contexts(old)]
    places, begin = [], 0
    for c, count in enumerate(counts):
        members = [i for i, mine in enumerate(of) if mine == c]
        wanted = ranks[begin : begin + count].tolist()
        if wanted and wanted[-1] >= len(members):
            return torch.zeros_like(ranks), torch.zeros_like(ranks), torch.tensor(1)
        places += [members[rank] for rank in wanted]
        begin += count
    found = torch.tensor(places, dtype=torch.int64)
    return found, found.argsort(), torch.tensor(0)


def _sort_case(n: int, dtype: torch.dtype, top: int, back: bool):
    return lambda _: [_units(n, dtype), _classes(top), _units(n, dtype, 4), back]


def _sort_oracle(old: Tensor, classes: Tensor, values: Tensor, back: bool):
    of = [min(int(classes[v]), 16) for v in _contexts(old)]
    order = sorted(range(len(of)), key=of.__getitem__)
    counts = torch.tensor([of.count(c) for c in range(16)])
    out = values.tolist()
    for place, i in enumerate(order):
        if back:
            out[i] = int(values[place])
        else:
            out[place] = int(values[i])
    return torch.tensor(out, dtype=values.dtype), counts


def _many(make, *rows) -> list[Case]:
    return [
        Case(" ".join(str(value).removeprefix("torch.") for value in row), make(*row), ONCE) for row in rows
    ]


SPECS = [
    OpSpec(
        FINGERPRINT,
        [Case(f"{n} bytes", lambda _, n=n: [_bytes(n)], ONCE) for n in (0, 1, 8, 100, 1021)],
        lambda data: (_scalar(_sum(_data(data))),),
        _exact(1),
        tags=NO_VMAP,
    ),
    OpSpec(
        DELTA_SHIFT,
        _many(_put_case, *((101, dtype, 3) for dtype in INTS), (5, torch.int16, 1), (0, torch.int32, 1)),
        _shift_oracle,
        _exact(1),
        tags=NO_VMAP,
    ),
    OpSpec(
        DELTA_COPY,
        [Case(f"{n} bytes", lambda _, n=n: [_bytes(n)], ONCE) for n in (0, 77)],
        lambda data: (data,),
        _exact(1),
        tags=NO_VMAP,
    ),
    OpSpec(
        DELTA_SCAN,
        _many(
            _scan_case,
            *((1000, dtype, 9, 1000) for dtype in INTS),
            (300, torch.int16, 1, 300),
            (300, torch.int16, 2, 10),
            (0, torch.int32, 1, 5),
            (1, torch.uint8, 1, 1),
        ),
        _scan_oracle,
        _exact(4),
        tags=NO_VMAP,
    ),
    OpSpec(
        DELTA_WRITE,
        _many(_put_case, *((101, dtype, 3) for dtype in INTS), (5, torch.int16, 9)),
        lambda data, positions, values: (_put(data, positions, values),),
        _exact(1),
        mutates=(0,),
        tags=NO_VMAP,
    ),
    OpSpec(
        DELTA_GAPS,
        [Case(f"{n} gaps", lambda _, n=n: [_positions(n)], ONCE) for n in (0, 1, 700)]
        + [Case("large gaps", lambda _: [torch.tensor([2**34 - 1, 2**34, 2**35])], ONCE)],
        lambda positions: _split(_gaps(positions), 3),
        _exact(2),
        tags=NO_VMAP,
    ),
    OpSpec(
        DELTA_POSITIONS,
        _many(_gaps_back, (700, 10**6), (700, 5), (700, 10**6, 1), (0, 0), (1, 10**6)),
        _positions_oracle,
        _exact(2),
        tags=NO_VMAP,
    ),
    OpSpec(
        DELTA_VALUES,
        _many(
            _values_case,
            *((203, dtype, use_xor) for dtype in INTS for use_xor in (False, True)),
            (50, torch.int32, False, 7),
            (50, torch.int64, True, 5),
            (0, torch.int16, False),
        ),
        _values_oracle,
        _exact(2),
        tags=NO_VMAP,
    ),
    OpSpec(
        DELTA_PATCH,
        _many(
            _patch_case,
            *(
                (203, dtype, use_xor, 0, every)
                for dtype in INTS
                for use_xor, every in ((False, 0), (True, 4))
            ),
            (50, torch.int16, False, 3, 5),
            (50, torch.int64, True, 5, 0),
            (0, torch.int16, False, 0, 0),
        ),
        _patch_oracle,
        _exact(2),
        tags=NO_VMAP,
    ),
    OpSpec(
        DELTA_RANKS,
        _many(
            _ranks_case,
            *((333, dtype, 5, 4) for dtype in INTS),
            (64, torch.int16, 16, 1),
            (0, torch.uint8, 2, 1),
        ),
        _ranks_oracle,
        _exact(3),
        tags=NO_VMAP,
    ),
    OpSpec(
        DELTA_SORT,
        _many(
            _sort_case,
            *((203, dtype, 5, back) for dtype in INTS for back in (False, True)),
            (0, torch.int16, 2, True),
        ),
        _sort_oracle,
        _exact(2),
        tags=NO_VMAP,
    ),
    OpSpec(
        DELTA_PLACES,
        _many(
            _places_case,
            *((333, dtype, 5, 4) for dtype in INTS),
            (64, torch.int16, 16, 1),
            (333, torch.int16, 3, 2, True),
            (0, torch.uint8, 2, 1),
        ),
        _places_oracle,
        _exact(3),
        tags=NO_VMAP,
    ),
]
