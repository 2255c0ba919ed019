"""changes: the ops that deltas are made of, on elements as integers ("units": uint8, int16, int32, int64).

docs/format.md ("Delta") describes the bytes; reference/changes.py is the fallback of them all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cfl_ops._core.arguments import within
from cfl_ops._core.op import define_op
from cfl_ops.ops.codec import codes
from cfl_ops.ops.codec.arguments import check_bytes, check_contiguous
from cfl_ops.ops.codec.bits import INTS
from cfl_ops.ops.codec.huffman import DATA_DEPENDENT, NO_VMAP
from cfl_ops.ops.codec.reference import changes as reference

"""What the units of so many bytes are seen as."""
MOST_APART = 2**34
"""Two changes, so that a gap has a symbol."""


def units_of(w: Tensor) -> Tensor:
    """The elements of a 1-d contiguous tensor as integers; of complex ones real and imaginary parts."""
    width = w.element_size() // (2 if w.dtype.is_complex else 1)
    return w.view(INTS[width])


def _check_line(op: str, name: str, value: Tensor) -> None:
    if value.ndim != 1:
        raise ValueError(f"cfl_ops.{op}: {name} must be 1-d, but got shape {tuple(value.shape)}")


def _check_pair(op: str, name: str, value: Tensor, of: str, other: Tensor) -> None:
    """As many elements of the same dtype."""
    _check_line(op, name, value)
    _check_line(op, of, other)
    if value.dtype != other.dtype:
        raise TypeError(f"cfl_ops.{op}: {name} must be {other.dtype} as {of} is, but got {value.dtype}")
    _check_numel(op, name, value, of, other)


def _check_numel(op: str, name: str, value: Tensor, of: str, other: Tensor) -> None:
    if not _symbolic(value, other) and value.numel() != other.numel():
        raise ValueError(
            f"cfl_ops.{op}: {name} must have {other.numel()} elements as {of} has, but got {value.numel()}"
        )


def _symbolic(*values: Tensor) -> bool:
    return any(isinstance(value.numel(), torch.SymInt) for value in values)


def _check_positions(op: str, positions: Tensor, n: int) -> None:
    """Rising and below n; asked by the fallbacks, for a fake has no data."""
    good = positions.numel() == 0 or bool((positions[1:] > positions[:-1]).all())
    if not good or (positions.numel() and not (int(positions[0]) >= 0 and int(positions[-1]) < n)):
        raise ValueError(f"cfl_ops.{op}: positions must rise and be within the {n} elements")


def _dynamic(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=dtype)


def _info(like: Tensor) -> Tensor:
    return like.new_empty((), dtype=torch.int64)


def _answer(found: Tensor | None, otherwise: Tensor) -> tuple[Tensor, Tensor]:
    """The result with an info of 0, or zeros with 1."""
    if found is None:
        return torch.zeros_like(otherwise), codes.info(1, otherwise.device)
    return found, codes.info(codes.GOOD, otherwise.device)


# --- fingerprint

FINGERPRINT = define_op(
    "fingerprint(Tensor data) -> Tensor",
    python=reference.fingerprint,
    fake=_info,
    shapes={"data": "uint8 ..."},
    check=lambda data: check_bytes("fingerprint", "data", data),
    no_vmap="a fingerprint is of one tensor: call it for each",
)


def _shift_python(old: Tensor, positions: Tensor, values: Tensor) -> Tensor:
    _check_positions("delta_shift", positions, old.numel())
    return reference.shift(old, positions, values)


def _check_values_at(op: str, of: str, data: Tensor, positions: Tensor, values: Tensor) -> None:
    _check_line(op, of, data)
    _check_line(op, "positions", positions)
    _check_line(op, "values", values)
    if values.dtype != data.dtype:
        raise TypeError(f"cfl_ops.{op}: values must be {data.dtype} as {of} is, but got {values.dtype}")
    _check_numel(op, "values", values, "positions", positions)


DELTA_SHIFT = define_op(
    "delta_shift(Tensor old, Tensor positions, Tensor values) -> Tensor",
    python=_shift_python,
    fake=lambda old, positions, values: _info(old),
    shapes={"old": "units ...", "positions": "int64 ...", "values": "units ..."},
    check=lambda *args: _check_values_at("delta_shift", "old", *args),
    no_vmap=NO_VMAP,
)
"""By how much the sum of the fingerprint changes where values are put at positions."""

DELTA_COPY = define_op(
    "delta_copy(Tensor data) -> Tensor",
    python=lambda data: data.clone(memory_format=torch.contiguous_format),
    fake=lambda data: data.new_empty(data.shape),
    shapes={"data": "uint8 ..."},
    check=lambda data: check_bytes("delta_copy", "data", data),
    no_vmap=NO_VMAP,
)
"""A copy, which on CPUs is in huge pages where it is large."""

# --- where two tensors differ


def _scan_fake(new: Tensor, old: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions = _dynamic(new, torch.int64)
    shape = positions.shape
    return positions, new.new_empty(shape), new.new_empty(shape), new.new_empty(4, dtype=torch.int64)


def _check_scan(new: Tensor, old: Tensor, most: int) -> None:
    _check_pair("delta_scan", "old", old, "new", new)
    within("delta_scan", "most", most, 0)


DELTA_SCAN = define_op(
    "delta_scan(Tensor new, Tensor old, SymInt most) -> (Tensor, Tensor, Tensor, Tensor)",
    python=reference.scan,
    fake=_scan_fake,
    shapes={"new": "units ...", "old": "units ..."},
    check=_check_scan,
    no_vmap=NO_VMAP,
    tags=DATA_DEPENDENT,
)
"""Positions, new and old values of the changes (none where they are more than ``most``); (count, sum of the
fingerprint of new, of old, the bits that differ anywhere)."""


def _write_python(data: Tensor, positions: Tensor, values: Tensor) -> None:
    _check_positions("delta_write_", positions, data.numel())
    data[positions] = values


def _check_write(data: Tensor, positions: Tensor, values: Tensor) -> None:
    check_contiguous("delta_write_", "data", data)
    _check_values_at("delta_write_", "data", data, positions, values)


DELTA_WRITE = define_op(
    "delta_write_(Tensor(a!) data, Tensor positions, Tensor values) -> ()",
    python=_write_python,
    fake=lambda data, positions, values: None,
    shapes={"data": "units ...", "positions": "int64 ...", "values": "units ..."},
    check=_check_write,
    no_vmap=NO_VMAP,
)

# --- numbers to symbols and raw bits


def _split_fake(like: Tensor) -> tuple[Tensor, Tensor]:
    return like.new_empty(like.shape, dtype=torch.uint8), _dynamic(like, torch.uint8)


def _gaps_python(positions: Tensor) -> tuple[Tensor, Tensor]:
    _check_positions("delta_gaps", positions, 2**63 - 1)
    gaps = reference.gaps(positions)
    if positions.numel() and int(gaps.max()) >= MOST_APART:
        raise ValueError(
            f"cfl_ops.delta_gaps: positions must be less than 2^34 apart, but two are {int(gaps.max())}"
        )
    return reference.split(gaps, reference.GAP_BITS)


DELTA_GAPS = define_op(
    "delta_gaps(Tensor positions) -> (Tensor, Tensor)",
    python=_gaps_python,
    fake=_split_fake,
    shapes={"positions": "int64 ..."},
    check=lambda positions: _check_line("delta_gaps", "positions", positions),
    no_vmap=NO_VMAP,
    tags=DATA_DEPENDENT,
)


def _values_python(new: Tensor, old: Tensor, use_xor: bool, shift: int) -> tuple[Tensor, Tensor]:
    return reference.split(reference.difference(new, old, use_xor, shift), reference.VALUE_BITS)


def _check_values(new: Tensor, old: Tensor, use_xor: bool, shift: int) -> None:
    _check_pair("delta_values", "old", old, "new", new)
    within("delta_values", "shift", shift, 0, 8 * new.element_size() - 1)


DELTA_VALUES = define_op(
    "delta_values(Tensor new, Tensor old, bool use_xor, int shift) -> (Tensor, Tensor)",
    python=_values_python,
    fake=lambda new, old, use_xor, shift: _split_fake(new),
    shapes={"new": "units ...", "old": "units ..."},
    check=_check_values,
    no_vmap=NO_VMAP,
    tags=DATA_DEPENDENT,
)

# --- and back


def _check_numbers(op: str, symbols: Tensor, raw: Tensor) -> None:
    check_bytes(op, "symbols", symbols)
    check_bytes(op, "raw", raw)


def _check_delta_positions(symbols: Tensor, raw: Tensor, limit: int) -> None:
    _check_numbers("delta_positions", symbols, raw)
    within("delta_positions", "limit", limit, 0)


DELTA_POSITIONS = define_op(
    "delta_positions(Tensor symbols, Tensor raw, SymInt limit) -> (Tensor, Tensor)",
    python=lambda symbols, raw, limit: _answer(
        reference.positions_of(symbols, raw, limit), symbols.to(torch.int64)
    ),
    fake=lambda symbols, raw, limit: (symbols.new_empty(symbols.shape, dtype=torch.int64), _info(symbols)),
    shapes={"symbols": "uint8 ...", "raw": "uint8 ..."},
    check=_check_delta_positions,
    no_vmap=NO_VMAP,
)
"""The positions, and an info that is not 0 where the bytes contradict themselves or the limit."""


def _patch_python(
    old: Tensor, positions: Tensor | None, symbols: Tensor, raw: Tensor, use_xor: bool, shift: int
) -> tuple[Tensor, Tensor]:
    before = old
    if positions is not None:
        _check_positions("delta_patch", positions, old.numel())
        before = old[positions]
    z = reference.join(symbols, raw, reference.VALUE_BITS)
    return _answer(None if z is None else reference.patch(before, z, use_xor, shift), before)


def _check_patch(
    old: Tensor, positions: Tensor | None, symbols: Tensor, raw: Tensor, use_xor: bool, shift: int
) -> None:
    op = "delta_patch"
    _check_line(op, "old", old)
    _check_numbers(op, symbols, raw)
    within(op, "shift", shift, 0, 8 * old.element_size() - 1)
    if positions is None:
        _check_numel(op, "symbols", symbols, "old", old)
    else:
        _check_line(op, "positions", positions)
        _check_numel(op, "symbols", symbols, "positions", positions)


DELTA_PATCH = define_op(
    "delta_patch(Tensor old, Tensor? positions, Tensor symbols, Tensor raw, bool use_xor,"
    " int shift) -> (Tensor, Tensor)",
    python=_patch_python,
    fake=lambda old, positions, symbols, raw, use_xor, shift: (old.new_empty(symbols.shape), _info(old)),
    shapes={"old": "units ...", "positions": "int64 ...", "symbols": "uint8 ...", "raw": "uint8 ..."},
    check=_check_patch,
    no_vmap=NO_VMAP,
)
"""The new values, of all elements or of those at (rising) positions, and an info as above."""

# --- classes of the old exponent


def _check_classes(op: str, old: Tensor, classes: Tensor) -> None:
    _check_line(op, "old", old)
    check_bytes(op, "classes", classes)
    within(op, "the number of classes", classes.numel(), 256, 256)


def _ranks_python(old: Tensor, classes: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _check_positions("delta_ranks", positions, old.numel())
    return reference.class_ranks(old, classes, positions)


def _check_ranks(old: Tensor, classes: Tensor, positions: Tensor) -> None:
    _check_classes("delta_ranks", old, classes)
    _check_line("delta_ranks", "positions", positions)


DELTA_RANKS = define_op(
    "delta_ranks(Tensor old, Tensor classes, Tensor positions) -> (Tensor, Tensor, Tensor)",
    python=_ranks_python,
    fake=lambda old, classes, positions: (
        torch.empty_like(positions),
        torch.empty_like(positions),
        positions.new_empty(reference.MAX_CLASSES),
    ),
    shapes={"old": "units ...", "classes": "uint8 ...", "positions": "int64 ..."},
    check=_check_ranks,
    no_vmap=NO_VMAP,
)
"""The rank of each position within its class (that of the context of the old element), sorted by class; which
position each is of; how many each class has."""


def _places_python(
    old: Tensor, classes: Tensor, ranks: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    begin = 0
    for count in counts:
        mine = ranks[begin : begin + count]
        if count and not (int(mine[0]) >= 0 and bool((mine[1:] > mine[:-1]).all())):
            raise ValueError("cfl_ops.delta_places: ranks must rise within each class")
        begin += count
    found = reference.class_places(old, classes, counts, ranks)
    places, info = _answer(found, ranks)
    order = torch.zeros_like(ranks) if found is None else places.argsort()
    return places, order, info


def _check_places(old: Tensor, classes: Tensor, ranks: Tensor, counts: list[int]) -> None:
    op = "delta_places"
    _check_classes(op, old, classes)
    _check_line(op, "ranks", ranks)
    within(op, "the number of counts", len(counts), 0, reference.MAX_CLASSES)
    if _symbolic(ranks):
        return
    if min(counts, default=0) < 0 or sum(counts) != ranks.numel():
        raise ValueError(
            f"cfl_ops.{op}: counts must add up to the {ranks.numel()} ranks, but got {sum(counts)}"
        )


DELTA_PLACES = define_op(
    "delta_places(Tensor old, Tensor classes, Tensor ranks, int[] counts) -> (Tensor, Tensor, Tensor)",
    python=_places_python,
    fake=lambda old, classes, ranks, counts: (torch.empty_like(ranks), torch.empty_like(ranks), _info(old)),
    shapes={"old": "units ...", "classes": "uint8 ...", "ranks": "int64 ..."},
    check=_check_places,
    no_vmap=NO_VMAP,
)
"""And back: the positions sorted by class, what sorts them, and an info as above."""


def _check_sort(old: Tensor, classes: Tensor, values: Tensor, back: bool) -> None:
    _check_classes("delta_sort", old, classes)
    _check_pair("delta_sort", "values", values, "old", old)


DELTA_SORT = define_op(
    "delta_sort(Tensor old, Tensor classes, Tensor values, bool back) -> (Tensor, Tensor)",
    python=reference.sort_by_class,
    fake=lambda old, classes, values, back: (
        values.new_empty(values.shape),
        values.new_empty(reference.MAX_CLASSES, dtype=torch.int64),
    ),
    shapes={"old": "units ...", "classes": "uint8 ...", "values": "units ..."},
    check=_check_sort,
    no_vmap=NO_VMAP,
)
"""Values sorted by the class of the old element beside them (those of none last), or back; how many of each class."""
