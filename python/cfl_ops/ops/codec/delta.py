"""delta: what changed from one tensor, or state dict, to the next, as bytes; and the next one from them, bit for bit.

docs/format.md ("Delta") describes the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple, TypeVar, overload

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.arguments import extent, shares_memory, shares_within
from cfl_ops.errors import CorruptDataError, WrongBaseError
from cfl_ops.ops.codec import codes
from cfl_ops.ops.codec.blob import decompress, store_lossless
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
from cfl_ops.ops.codec.delta_encode import encode_pair
from cfl_ops.ops.codec.delta_format import (
    CHANGED,
    DENSE,
    JOINED,
    KINDS,
    LEFT,
    REPLACED,
    SAME,
    SMALL,
    XOR,
    Delta,
    Description,
    contradiction,
    describe,
    pack_delta,
    parse_delta,
    unpack_symbols,
)
from cfl_ops.ops.codec.fingerprint import as_uint8, byte_sum, copyable, fingerprint_of, finish, flat_bits
from cfl_ops.ops.codec.huffman import check_payload, check_shape, corrupt
from cfl_ops.ops.codec.layout import DTYPES
from cfl_ops.ops.codec.reference.header import from_bytes

__all__ = ["apply_delta", "apply_delta_", "compress_delta", "describe_delta"]

Key = TypeVar("Key")
Dict = TypeVar("Dict", bound=MutableMapping[Any, Tensor])


@overload
def compress_delta(new: Tensor, old: Tensor, *, effort: str = ...) -> Tensor: ...
@overload
def compress_delta(
    new: Mapping[Key, Tensor], old: Mapping[Key, Tensor], *, effort: str = ...
) -> dict[Key, Tensor]: ...
def compress_delta(new: Any, old: Any, *, effort: str = "fast") -> Any:
    """What changed from ``old`` to ``new``, in few bytes, and without losing a bit.

    Where few elements changed (the bf16 weights after a step of training, say) their positions and values are
    coded; where many did, the values of all; where that would not pay, the new tensor as ``compress(new,
    lossless=True)`` has it. NaN and -0 are bits as all others. A delta knows its base, and is refused by any other.

    Args:
        new: a tensor of any dtype that :func:`compress_state_dict` takes and of any strides, or a mapping of names
            to such (a state dict).
        old: what the reader has: a tensor on the device of ``new``, or a mapping. A tensor of another shape or
            dtype is replaced as a whole; names may come and go.
        effort: ``"small"`` takes the exponent of the old element into account: fewer bytes, more time.

    Returns:
        A 1-d uint8 tensor on the device of ``new``, for :func:`apply_delta`; of mappings a dict of them, with a name
        for each tensor of ``new``, in its order, and then for each that is gone. It can be saved as any other.

    Raises:
        TypeError, ValueError: bad arguments.

    Synchronises a GPU. Not under ``fullgraph=True`` nor ``torch.export``: the bytes are written on the host.

    Example:
        >>> import torch, cfl_ops
        >>> old = torch.randn(1000, 100).bfloat16()
        >>> new = old.clone()
        >>> new[::100] *= 2
        >>> delta = cfl_ops.compress_delta(new, old)
        >>> len(delta) < 2000, torch.equal(cfl_ops.apply_delta(old, delta), new)
        (True, True)
    """
    op = "compress_delta"
    checks.choice(op, "effort", effort, ("fast", "small"))
    small = effort == "small"
    if isinstance(new, Mapping) and isinstance(old, Mapping):
        return _compress_mapping(op, new, old, small)
    _refuse_mapping(op, "new", new, "old", old)
    _check_tensor(op, "new", new)
    _check_tensor(op, "old", old)
    return _compress_pair(op, "new", new, "old", old, small)


@overload
def apply_delta(old: Tensor, delta: Tensor) -> Tensor: ...
@overload
def apply_delta(old: Mapping[Key, Tensor], delta: Mapping[Key, Tensor]) -> dict[Key, Tensor]: ...
def apply_delta(old: Any, delta: Any) -> Any:
    """The tensor, or state dict, that :func:`compress_delta` was given as new; ``old`` is left as it is.

    Args:
        old: what the delta was made from, bit for bit (of any strides).
        delta: what :func:`compress_delta` returned, on any device.

    Returns:
        A new tensor on the device of ``old``; of mappings a dict in the order that the new one had.

    Raises:
        WrongBaseError: ``old`` is not what the delta was made from.
        CorruptDataError: a byte of the delta is wrong, missing or too many.
        TypeError, ValueError: bad arguments.

    Synchronises a GPU. Not under ``fullgraph=True`` nor ``torch.export``: the bytes are read on the host.

    Example:
        >>> import torch, cfl_ops
        >>> old, new = {"w": torch.zeros(3)}, {"w": torch.ones(3), "v": torch.ones(1)}
        >>> delta = cfl_ops.compress_delta(new, old)
        >>> cfl_ops.apply_delta(old, delta)
        {'w': tensor([1., 1., 1.]), 'v': tensor([1.])}
        >>> cfl_ops.apply_delta(new, delta)
        Traceback (most recent call last):
        ...
        cfl_ops.errors.WrongBaseError: cfl_ops.apply_delta: old must not have 'v' yet, which the delta adds; it already is the result
    """  # noqa: E501
    op = "apply_delta"
    if isinstance(old, Mapping) and isinstance(delta, Mapping):
        pairs = _check_mappings(op, old, delta)
        totals = [_check_base(op, pair) for pair in pairs]
        device = _common_device(old)
        return {
            pair.key: _result(op, pair, total, device)
            for pair, total in zip(pairs, totals, strict=True)
            if pair.delta.kind != LEFT
        }
    pair = _check_pair(op, old, delta)
    return _result(op, pair, _check_base(op, pair), None)


@overload
def apply_delta_(old: Tensor, delta: Tensor) -> Tensor: ...
@overload
def apply_delta_(old: Dict, delta: Mapping[Any, Tensor]) -> Dict: ...
def apply_delta_(old: Any, delta: Any) -> Any:
    """As :func:`apply_delta`, in place: the tensors themselves are changed. All is checked before anything is.

    Args:
        old: a tensor; or a dict, of which tensors are changed in place (those of another shape or dtype, and those
            that joined, are put in, and those that left are taken out). Tensors that share all their memory (tied
            ones) are changed once. Of what is changed in several tensors as much is held in memory as is changed.
        delta: what :func:`compress_delta` returned, on any device.

    Returns:
        ``old``.

    Raises:
        WrongBaseError: ``old`` is not what the delta was made from. Nothing is changed then, in no tensor, nor after
            the other errors.
        CorruptDataError: a byte of the delta is wrong, missing or too many.
        TypeError, ValueError: bad arguments; or the delta changes the shape of a tensor that is no item of a dict.
        RuntimeError: a tensor to be changed requires grad (see ``torch.no_grad``), or shares memory with another or
            between its own elements.

    Synchronises a GPU. Not under ``fullgraph=True`` nor ``torch.export``: the bytes are read on the host.

    Example:
        >>> import torch, cfl_ops
        >>> worker = torch.nn.Linear(4, 2).state_dict()
        >>> trained = {name: value + 1 for name, value in worker.items()}
        >>> delta = cfl_ops.compress_delta(trained, worker)
        >>> worker is cfl_ops.apply_delta_(worker, delta), torch.equal(worker["bias"], trained["bias"])
        (True, True)
    """
    op = "apply_delta_"
    if isinstance(old, MutableMapping) and isinstance(delta, Mapping):
        pairs = _check_mappings(op, old, delta)
        _write_all(op, old, pairs)
        return old
    pair = _check_pair(op, old, delta)
    if not _in_place(pair.delta) and pair.delta.kind != SAME:
        raise ValueError(
            f"cfl_ops.{op}: delta must not change the shape or dtype of a tensor in place, but it makes {old.dtype} of "
            f"shape {tuple(old.shape)} {pair.delta.dtype} of shape {pair.delta.shape}: use apply_delta"
        )
    _check_writable(op, [pair])
    total = _check_base(op, pair)
    if pair.delta.kind != SAME:
        _plan(op, pair, total)()
    return old


def describe_delta(delta: Tensor) -> Description:
    """What the header of a delta says; nothing behind it is read."""
    check_payload("describe_delta", "delta", delta)
    return describe("describe_delta", delta)


# --- arguments


def _check_tensor(op: str, name: str, value: Any) -> None:
    checks.tensor(op, name, value, 0)
    if value.dtype not in DTYPES:
        raise TypeError(
            f"cfl_ops.{op}: {name} must have a dtype that the format knows, but got {value.dtype}"
        )
    check_shape(op, name, value, codes.MAX_SYMBOLS)


def _refuse_mapping(op: str, name: str, value: Any, other_name: str, other: Any) -> None:
    """Raise where one argument is a mapping and the other is not."""
    if isinstance(value, Mapping) or isinstance(other, Mapping):
        raise TypeError(
            f"cfl_ops.{op}: {name} and {other_name} must both be tensors or both be mappings, but got "
            f"{type(value).__name__} and {type(other).__name__}"
        )


class _Pair(NamedTuple):
    """A tensor and its delta."""

    key: Any
    name: str
    """In messages, of the tensor."""
    old: Tensor | None
    delta: Delta


def _check_pair(op: str, old: Any, delta: Any) -> _Pair:
    _refuse_mapping(op, "old", old, "delta", delta)
    _check_tensor(op, "old", old)
    check_payload(op, "delta", delta)
    parsed = parse_delta(op, delta.to(old.device))
    if parsed.kind in (JOINED, LEFT):
        raise ValueError(
            f"cfl_ops.{op}: delta must be of one tensor, but it is that of a tensor that "
            f"{KINDS[parsed.kind]}: apply it to a dict"
        )
    return _Pair(None, "old", old, parsed)


def _check_mappings(op: str, old: Mapping[Any, Any], delta: Mapping[Any, Any]) -> list[_Pair]:
    """Each delta with its tensor, if there is to be one; raises for names that do not go together."""
    for key, value in old.items():
        _check_tensor(op, f"old[{key!r}]", value)
    pairs = []
    for key, value in delta.items():
        check_payload(op, f"delta[{key!r}]", value)
        base = old.get(key)
        try:
            parsed = parse_delta(op, value if base is None else value.to(base.device))
        except CorruptDataError as error:
            raise CorruptDataError(f"{error} (in delta[{key!r}])") from None
        pairs.append(_Pair(key, f"old[{key!r}]", base, parsed))
    for pair in pairs:
        if pair.delta.kind == JOINED and pair.old is not None:
            there = _is_result(pair.old, pair.delta)
            raise WrongBaseError(
                f"cfl_ops.{op}: old must not have {pair.key!r} yet, which the delta adds"
                + (_ALREADY if there else "")
            )
        if pair.delta.kind != JOINED and pair.old is None:
            raise WrongBaseError(
                f"cfl_ops.{op}: old must have {pair.key!r}, which the delta was made from, but got "
                f"{len(old)} other names" + (_ALREADY if pair.delta.kind == LEFT else "")
            )
    for key in old:
        if key not in delta:
            raise WrongBaseError(f"cfl_ops.{op}: old must not have {key!r}, which the delta does not know")
    return pairs


_ALREADY = "; it already is the result"


def _is_result(old: Tensor, delta: Delta) -> bool:
    shape, dtype = tuple(old.shape), old.dtype
    return delta.shape == shape and delta.dtype == dtype and fingerprint_of(old) == delta.result


def _check_base(op: str, pair: _Pair) -> int:
    """Raise unless the tensor is what the delta was made from; the sum of its fingerprint."""
    old, delta = pair.old, pair.delta
    if old is None:
        return 0
    if old.dtype != delta.base_dtype or tuple(old.shape) != delta.base_shape:
        raise WrongBaseError(
            f"cfl_ops.{op}: {pair.name} must be what the delta was made from, {delta.base_dtype} of shape "
            f"{delta.base_shape}, but got {old.dtype} of shape {tuple(old.shape)}"
            + (_ALREADY if _is_result(old, delta) else "")
        )
    total = byte_sum(old)
    mark = finish(total, old.numel() * old.element_size(), old.dtype)
    if mark != delta.base:
        raise WrongBaseError(
            f"cfl_ops.{op}: {pair.name} must be what the delta was made from, with the fingerprint {delta.base:016x}, "
            f"but got {mark:016x}" + (_ALREADY if mark == delta.result and _in_place(delta) else "")
        )
    return total


def _in_place(delta: Delta) -> bool:
    """Whether the delta changes elements, and nothing else."""
    if delta.kind == REPLACED:
        return delta.dtype == delta.base_dtype and delta.shape == delta.base_shape
    return delta.kind in (CHANGED, DENSE)


def _common_device(tensors: Mapping[Any, Tensor]) -> torch.device | None:
    """Where what joins goes: to the others, if they are on one device."""
    devices = {value.device for value in tensors.values()}
    return devices.pop() if len(devices) == 1 else None


# --- compressing


def _compress_pair(op: str, name: str, new: Tensor, old_name: str, old: Tensor, small: bool) -> Tensor:
    checks.same_device(op, name, new, **{old_name: old})
    if new.shape == old.shape and new.dtype == old.dtype:
        return encode_pair(op, new, old, small)
    fields = (old.dtype, tuple(old.shape), fingerprint_of(old))
    return _whole(op, name, REPLACED, new, fields, small)


def _whole(
    op: str,
    name: str,
    kind: int,
    new: Tensor,
    base: tuple[torch.dtype, tuple[int, ...], int],
    small: bool,
) -> Tensor:
    """A delta that holds the new tensor."""
    result, units = fingerprint_of(new), new.numel() * (2 if new.dtype.is_complex else 1)
    mine = (SMALL if small else 0, new.dtype, tuple(new.shape), *base, result, units, 0)
    return pack_delta(Delta(kind, *mine, None, [], store_lossless(op, name, new), 0), new.device)


def _compress_mapping(
    op: str, new: Mapping[Any, Any], old: Mapping[Any, Any], small: bool
) -> dict[Any, Tensor]:
    for name, tensors in (("new", new), ("old", old)):
        for key, value in tensors.items():
            _check_tensor(op, f"{name}[{key!r}]", value)
    out: dict[Any, Tensor] = {}
    done: dict[Any, Tensor] = {}  # of tied tensors one delta is made
    for key, value in new.items():
        name, base = f"new[{key!r}]", old.get(key)
        if base is None:
            none = (value.dtype, tuple(value.shape), 0)
            out[key] = _whole(op, name, JOINED, value, none, small)
            continue
        where = _place(value), _place(base)
        if where not in done:
            done[where] = _compress_pair(op, name, value, f"old[{key!r}]", base, small)
        out[key] = done[where]
    for key, value in old.items():
        if key not in new:
            shape = tuple(value.shape)
            fields = (value.dtype, shape, value.dtype, shape, fingerprint_of(value), 0)
            gone = Delta(LEFT, SMALL if small else 0, *fields, 0, 0, None, [], None, 0)
            out[key] = pack_delta(gone, value.device)
    return out


def _place(value: Tensor) -> Any:
    """Equal for tensors that are one in memory."""
    if value.numel() == 0 or extent(value) is None:
        return id(value)
    return (
        value.data_ptr(),
        value.dtype,
        value.shape,
        value.stride(),
        value.device,
        value.is_conj(),
        value.is_neg(),
    )


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


def _named(op: str, pair: _Pair, function: Callable[[], Any]) -> Any:
    """Its result; of an error the message says which tensor's it is."""
    try:
        return function()
    except CorruptDataError as error:
        where = "" if pair.key is None else f" (in delta[{pair.key!r}])"
        raise CorruptDataError(f"{error}{where}") from None


def _result(op: str, pair: _Pair, total: int, device: torch.device | None) -> Tensor:
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


def _plan(op: str, pair: _Pair, total: int) -> Callable[[], object]:
    """Decodes and checks what the delta changes; what comes back writes it."""
    old, delta = pair.old, pair.delta
    assert old is not None
    target = copyable(old.detach())
    if delta.blob is not None:
        blob: Tensor = _named(op, pair, lambda: _unpack_blob(op, delta))
        return lambda: target.copy_(copyable(blob))
    flat = flat_bits(old)
    units = units_of(flat)
    positions, values = _named(op, pair, lambda: _changes(op, delta, units, total))

    def write() -> None:
        if positions is None:
            target.copy_(values.view(target.dtype).view(delta.shape))
            return
        DELTA_WRITE(units, positions, values)
        if flat.data_ptr() != old.data_ptr():  # it was a copy in one piece
            target.copy_(flat.view(delta.shape))

    return write


def _check_writable(op: str, pairs: list[_Pair]) -> list[_Pair]:
    """Raise where a tensor cannot be changed in place; those to change, each of tied ones once."""
    by_place: dict[Any, _Pair] = {}
    for pair in pairs:
        if pair.old is None:
            continue
        first = by_place.setdefault(_place(pair.old), pair)
        if first is not pair and _after(first.delta) != _after(pair.delta):
            raise RuntimeError(
                f"cfl_ops.{op}: {first.name} and {pair.name} must be changed alike, as they share their memory, but "
                "the delta makes them different: use apply_delta"
            )
    pairs = list(by_place.values())
    for pair in pairs:
        if not _in_place(pair.delta):
            continue
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
    _refuse_overlaps(op, pairs)
    return [pair for pair in pairs if _in_place(pair.delta)]


def _after(delta: Delta) -> tuple[bool, int]:
    """What of a tensor's memory is to be: as it is, where a dict only takes the tensor out."""
    return delta.kind in (LEFT, REPLACED) and not _in_place(delta), delta.result


def _refuse_overlaps(op: str, pairs: list[_Pair]) -> None:
    """Raise where tensors, of which one is changed, share a part of their memory."""
    spans = [(span, pair) for pair in pairs if pair.old is not None and (span := extent(pair.old))]
    spans.sort(key=lambda one: one[0])
    open_spans: list[tuple[tuple[int, int], _Pair]] = []
    for span, pair in spans:
        open_spans = [one for one in open_spans if one[0][1] > span[0]]
        for _, other in open_spans:
            if not (_in_place(pair.delta) or _in_place(other.delta)):
                continue
            assert pair.old is not None
            assert other.old is not None
            if pair.old.device == other.old.device and shares_memory(pair.old, other.old):
                raise RuntimeError(
                    f"cfl_ops.{op}: {pair.name} must not share memory with {other.name} to be updated in place: use "
                    "apply_delta"
                )
        open_spans.append((span, pair))


def _write_all(op: str, old: MutableMapping[Any, Tensor], pairs: list[_Pair]) -> None:
    """Change a dict: first all bases are checked, then all deltas decoded, and nothing can fail after that."""
    written = _check_writable(op, pairs)
    totals = {pair.key: _check_base(op, pair) for pair in pairs}
    device = _common_device(old)
    fresh = {
        pair.key: _result(op, pair, totals[pair.key], device)
        for pair in pairs
        if pair.delta.blob is not None and not _in_place(pair.delta)
    }
    plans = [_plan(op, pair, totals[pair.key]) for pair in written]
    for plan in plans:
        plan()
    for pair in pairs:
        if pair.delta.kind == LEFT:
            del old[pair.key]
    old.update(fresh)
