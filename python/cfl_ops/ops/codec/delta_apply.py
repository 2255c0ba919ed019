"""delta_apply: deltas and their bases checked, decoded and written.

All that can be wrong is found before anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.arguments import extent, shares_memory, shares_within
from cfl_ops.errors import CorruptDataError, WrongBaseError
from cfl_ops.ops.codec import codes
from cfl_ops.ops.codec.bits import as_uint8, copyable, flat_bits, write_bits
from cfl_ops.ops.codec.blob import decompress
from cfl_ops.ops.codec.changes import (
    DELTA_COPY,
    DELTA_PATCH,
    DELTA_PLACES,
    DELTA_POSITIONS,
    DELTA_SHIFT,
    DELTA_SORT,
    DELTA_WRITE,
    FINGERPRINT,
    units_of,
)
from cfl_ops.ops.codec.delta_format import (
    CHANGED,
    DENSE,
    JOINED,
    LEFT,
    REPLACED,
    SAME,
    XOR,
    Delta,
    contradiction,
    parse_delta,
    unpack_symbols,
)
from cfl_ops.ops.codec.fingerprint import byte_sum, fingerprint_of, finish
from cfl_ops.ops.codec.huffman import check_payload, check_shape, corrupt
from cfl_ops.ops.codec.layout import DTYPES
from cfl_ops.ops.codec.reference.header import from_bytes


def check_tensor(op: str, name: str, value: Any) -> None:
    checks.tensor(op, name, value, 0)
    if value.dtype not in DTYPES:
        raise TypeError(
            f"cfl_ops.{op}: {name} must have a dtype that the format knows, but got {value.dtype}"
        )
    check_shape(op, name, value, codes.MAX_SYMBOLS)


def place_of(value: Tensor) -> Any:
    """Equal for tensors that are one in memory, as long as they live; None where nothing can be said."""
    if extent(value) is None:
        return None
    return (
        value.data_ptr(),
        value.dtype,
        value.shape,
        value.stride(),
        value.device,
        value.is_conj(),
        value.is_neg(),
    )


class Pair(NamedTuple):
    """A tensor and its delta."""

    key: Any
    name: str
    """In messages, of the tensor."""
    old: Tensor | None
    delta: Delta


def check_mappings(op: str, old: Mapping[Any, Any], delta: Mapping[Any, Any]) -> list[Pair]:
    """Each delta with its tensor, if there is to be one; raises for names that do not go together."""
    old = dict(old.items())  # read once, should it make its tensors then
    for key, value in old.items():
        check_tensor(op, f"old[{key!r}]", value)
    pairs = []
    for key, value in delta.items():
        check_payload(op, f"delta[{key!r}]", value)
        base = old.get(key)
        try:
            parsed = parse_delta(op, value if base is None else value.to(base.device))
        except CorruptDataError as error:
            raise CorruptDataError(f"{error} (in delta[{key!r}])") from None
        pairs.append(Pair(key, f"old[{key!r}]", base, parsed))
    known = {pair.key for pair in pairs}
    for key in old:
        if key not in known:
            raise WrongBaseError(f"cfl_ops.{op}: old must not have {key!r}, which the delta does not know")
    for pair in pairs:
        if pair.delta.kind == JOINED and pair.old is not None:
            raise _wrong(pairs, f"cfl_ops.{op}: old must not have {pair.key!r} yet, which the delta adds")
        if pair.delta.kind != JOINED and pair.old is None:
            raise _wrong(
                pairs,
                f"cfl_ops.{op}: old must have {pair.key!r}, which the delta was made from, but got no such name",
            )
    return pairs


def _wrong(pairs: list[Pair], message: str) -> WrongBaseError:
    """The error, which says so where every delta's result is there already."""
    already = all(map(_is_result, pairs))
    error = WrongBaseError(message + "; it already is the result" * already)
    error.already_applied = already
    return error


def _is_result(pair: Pair) -> bool:
    old, delta = pair.old, pair.delta
    if old is None or delta.kind == LEFT:
        return old is None and delta.kind == LEFT
    shape, dtype = tuple(old.shape), old.dtype
    return delta.shape == shape and delta.dtype == dtype and fingerprint_of(old) == delta.result


def check_base(op: str, pair: Pair, pairs: list[Pair]) -> int:
    """Raise unless the tensor is what the delta was made from; the sum of its fingerprint."""
    old, delta = pair.old, pair.delta
    if old is None:
        return 0
    if old.dtype != delta.base_dtype or tuple(old.shape) != delta.base_shape:
        raise _wrong(
            pairs,
            f"cfl_ops.{op}: {pair.name} must be what the delta was made from, {delta.base_dtype} of shape "
            f"{delta.base_shape}, but got {old.dtype} of shape {tuple(old.shape)}",
        )
    total = byte_sum(old)
    mark = finish(total, old.numel() * old.element_size(), old.dtype)
    if mark != delta.base:
        raise _wrong(
            pairs,
            f"cfl_ops.{op}: {pair.name} must be what the delta was made from, with the fingerprint {delta.base:016x}, "
            f"but got {mark:016x}",
        )
    return total


def in_place(delta: Delta) -> bool:
    """Whether the delta changes elements, and nothing else."""
    if delta.kind == REPLACED:
        return delta.dtype == delta.base_dtype and delta.shape == delta.base_shape
    return delta.kind in (CHANGED, DENSE)


def common_device(pairs: list[Pair]) -> torch.device | None:
    """Where what joins goes: to the others, if they are on one device."""
    devices = {pair.old.device for pair in pairs if pair.old is not None}
    return devices.pop() if len(devices) == 1 else None


# --- applying


def _changes(op: str, delta: Delta, units: Tensor, total: int) -> tuple[Tensor | None, Tensor]:
    """Positions and new values (or None and all of them), which lead to the delta's result."""
    positions, values = _decode(op, delta, units)
    if delta.dtype == torch.bool and bool((values > 1).any()):
        raise corrupt(op, "the delta has values that are neither true nor false")
    if positions is None:
        after = int(FINGERPRINT(as_uint8(values)))
    else:
        after = total + int(DELTA_SHIFT(units, positions, values))
    if finish(after, units.numel() * units.element_size(), delta.dtype) != delta.result:
        raise corrupt(op, "the delta does not lead to the result that it was made for")
    return positions, values


def _decode(op: str, delta: Delta, units: Tensor) -> tuple[Tensor | None, Tensor]:
    how, n = (bool(delta.flags & XOR), delta.shift), units.numel()
    if delta.kind == DENSE:
        if delta.classes is None:
            symbols = unpack_symbols(op, delta.parts[0].values, n)
            return None, _good(op, *DELTA_PATCH(units, None, symbols, delta.parts[0].values.raw, *how))
        by_class = from_bytes(delta.classes, units.device)
        before, found = DELTA_SORT(units, by_class, units, False)
        sizes = found.tolist()[: len(delta.parts)]
        if sum(sizes) != n:
            raise contradiction(op)
        new = [
            _good(
                op,
                *DELTA_PATCH(some, None, unpack_symbols(op, part.values, len(some)), part.values.raw, *how),
            )
            for some, part in zip(before.split(sizes), delta.parts, strict=True)
        ]
        return None, DELTA_SORT(units, by_class, torch.cat(new), True)[0]
    ranks, numbers = [], []
    for part in delta.parts:
        assert part.gaps is not None
        if part.changes > n:
            raise contradiction(op)
        symbols = unpack_symbols(op, part.gaps, part.changes)
        ranks.append(_good(op, *DELTA_POSITIONS(symbols, part.gaps.raw, n)))
        numbers.append((unpack_symbols(op, part.values, part.changes), part.values.raw))
    if delta.classes is None:
        positions = ranks[0]
        return positions, _good(op, *DELTA_PATCH(units, positions, *numbers[0], *how))
    classes = from_bytes(delta.classes, units.device)
    counts = [part.changes for part in delta.parts]
    places, order, info = DELTA_PLACES(units, classes, torch.cat(ranks), counts)
    _good(op, places, info)
    patched = [
        _good(op, *DELTA_PATCH(units, where, *coded, *how))
        for where, coded in zip(places.split(counts), numbers, strict=True)
    ]
    return places[order], torch.cat(patched)[order]


def _good(op: str, result: Tensor, info: Tensor) -> Tensor:
    if int(info):
        raise contradiction(op)
    return result


def _unpack_blob(op: str, delta: Delta) -> Tensor:
    """The tensor that a delta holds as a whole."""
    assert delta.blob is not None
    try:
        out = decompress(delta.blob)
    except CorruptDataError as error:
        raise corrupt(op, str(error).removeprefix("cfl_ops.decompress: ")) from None
    if tuple(out.shape) != delta.shape or out.dtype != delta.dtype or fingerprint_of(out) != delta.result:
        raise contradiction(op)
    return out


def _named(op: str, pair: Pair, function: Callable[[], Any]) -> Any:
    """Its result; of an error the message says which tensor's it is."""
    try:
        return function()
    except CorruptDataError as error:
        where = "" if pair.key is None else f" (in delta[{pair.key!r}])"
        raise CorruptDataError(f"{error}{where}") from None


def result_of(op: str, pair: Pair, total: int, device: torch.device | None) -> Tensor:
    """A new tensor; the base was checked, and gave ``total``."""
    old, delta = pair.old, pair.delta
    if delta.blob is not None:
        out: Tensor = _named(op, pair, lambda: _unpack_blob(op, delta))
        return out if old is not None or device is None else out.to(device)
    assert old is not None
    flat = flat_bits(old)
    if flat.data_ptr() == old.data_ptr():
        flat = DELTA_COPY(as_uint8(flat)).view(flat.dtype)
    if delta.kind != SAME:
        units = units_of(flat)
        positions, values = _named(op, pair, lambda: _changes(op, delta, units, total))
        if positions is None:
            flat = values
        else:
            DELTA_WRITE(units, positions, values)
    return flat.view(delta.dtype).view(delta.shape)


def plan_of(op: str, pair: Pair, total: int) -> Callable[[], object]:
    """Decodes and checks what the delta changes; what comes back writes it."""
    old, delta = _old_of(pair), pair.delta
    target = old.detach()
    if delta.blob is not None:
        blob: Tensor = _named(op, pair, lambda: _unpack_blob(op, delta))
        return lambda: write_bits(target, copyable(blob))
    flat = flat_bits(old)
    units = units_of(flat)
    positions, values = _named(op, pair, lambda: _changes(op, delta, units, total))

    def write() -> None:
        if positions is None:
            write_bits(target, values)
            return
        DELTA_WRITE(units, positions, values)
        if flat.data_ptr() != old.data_ptr():  # it was a copy in one piece
            write_bits(target, flat)

    return write


def _old_of(pair: Pair) -> Tensor:
    assert pair.old is not None
    return pair.old


def check_writable(op: str, pairs: list[Pair]) -> list[Pair]:
    """Raise where a tensor cannot be changed in place; those to change, each of tied ones once."""
    tied: dict[Any, list[Pair]] = {}
    for pair in pairs:
        if pair.old is not None:
            tied.setdefault(place_of(pair.old) or id(pair.old), []).append(pair)
    firsts = []
    for group in tied.values():
        written = next((pair for pair in group if in_place(pair.delta)), None)
        for pair in group if written else ():
            assert written is not None
            if pair.delta.kind == LEFT or pair.delta.result != written.delta.result:
                first, second = sorted((written, pair), key=group.index)
                raise RuntimeError(
                    f"cfl_ops.{op}: {first.name} and {second.name} must be changed alike, as they share their memory, "
                    "but the delta makes them different: use apply_delta"
                )
        firsts.append(written or group[0])
    written_pairs = [pair for pair in firsts if in_place(pair.delta)]
    for pair in written_pairs:
        assert pair.old is not None
        if pair.old.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"cfl_ops.{op}: {pair.name} requires grad, but an update in place takes no part in autograd: use "
                "apply_delta, detach(), or torch.no_grad()"
            )
        if not pair.old.is_contiguous() and shares_within(pair.old):
            raise RuntimeError(
                f"cfl_ops.{op}: {pair.name} must not share memory between its elements to be updated in place, but "
                f"got shape {tuple(pair.old.shape)} with strides {pair.old.stride()}"
            )
    if written_pairs:
        _refuse_overlaps(op, firsts)
    return written_pairs


_FEW = 32
"""Tensors that are compared two by two."""


class _Span(NamedTuple):
    """A tensor that has memory, and where that begins and ends."""

    begin: int
    end: int
    pair: Pair
    old: Tensor
    written: bool


def _refuse_overlaps(op: str, pairs: list[Pair]) -> None:
    """Raise where tensors, of which one is changed, share a part of their memory."""
    spans = [
        _Span(*span, pair, pair.old, in_place(pair.delta))
        for pair in pairs
        if pair.old is not None and (span := extent(pair.old))
    ]
    spans.sort(key=lambda one: (str(one.old.device), one.begin, one.end))
    heap: list[_Span] = []  # of which each begins within what is before it
    end = 0
    for one in spans:
        if heap and (one.begin >= end or one.old.device != heap[0].old.device):
            _refuse_within(op, heap)
            heap, end = [], 0
        heap.append(one)
        end = max(end, one.end)
    _refuse_within(op, heap)


def _refuse_within(op: str, heap: list[_Span]) -> None:
    if len(heap) > _FEW and _are_apart(heap):
        return
    for i, one in enumerate(heap):
        for other in heap[:i]:
            if other.end <= one.begin or not (one.written or other.written):
                continue
            if shares_memory(one.old, other.old):
                raise RuntimeError(
                    f"cfl_ops.{op}: {one.pair.name} must not share memory with {other.pair.name} to be updated in "
                    "place: use apply_delta"
                )


def _are_apart(heap: list[_Span]) -> bool:
    """Whether no element of a tensor that is changed is one of another; False where that was not found out.

    Many views of one matrix, say: a byte for each element between the first and the last of them is marked.
    """
    begin, size = heap[0].begin, heap[0].old.element_size()
    for one in heap:
        if one.old.element_size() != size or (one.begin - begin) % size or shares_within(one.old):
            return False
    marks = torch.zeros((max(one.end for one in heap) - begin) // size, dtype=torch.uint8)
    for one in heap:
        mine = marks.as_strided(one.old.shape, one.old.stride(), (one.begin - begin) // size)
        if int(mine.max()) > (0 if one.written else 1):
            return False
        mine.fill_(2 if one.written else 1)
    return True


def write_all(op: str, old: MutableMapping[Any, Tensor], pairs: list[Pair]) -> None:
    """Change a dict: first all bases are checked, then all deltas decoded, and nothing can fail after that."""
    written = check_writable(op, pairs)
    for pair in written:
        if place_of(old[pair.key]) != place_of(_old_of(pair)):
            raise RuntimeError(
                f"cfl_ops.{op}: old must give one tensor each time that {pair.key!r} is read, to be updated in place, "
                "but it makes another: use apply_delta"
            )
    totals = {pair.key: check_base(op, pair, pairs) for pair in pairs}
    device = common_device(pairs)
    fresh = {
        pair.key: result_of(op, pair, totals[pair.key], device)
        for pair in pairs
        if pair.delta.blob is not None and not in_place(pair.delta)
    }
    plans = [plan_of(op, pair, totals[pair.key]) for pair in written]
    for plan in plans:
        plan()
    for pair in pairs:
        if pair.delta.kind == LEFT:
            del old[pair.key]
    old.update(fresh)
