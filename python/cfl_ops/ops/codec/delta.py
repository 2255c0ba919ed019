"""delta: what changed from one tensor, or state dict, to the next, as bytes; and the next one from them, bit for bit.

docs/format.md ("Delta") describes the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops.ops.codec.bits import refuse_odd_bools, resolved
from cfl_ops.ops.codec.blob import store_lossless
from cfl_ops.ops.codec.delta_apply import (
    Pair,
    check_base,
    check_mappings,
    check_tensor,
    check_writable,
    common_device,
    in_place,
    place_of,
    plan_of,
    result_of,
    write_all,
)
from cfl_ops.ops.codec.delta_encode import encode_pair
from cfl_ops.ops.codec.delta_format import (
    JOINED,
    KINDS,
    LEFT,
    REPLACED,
    SAME,
    SMALL,
    Delta,
    Description,
    describe,
    pack_delta,
    parse_delta,
)
from cfl_ops.ops.codec.fingerprint import fingerprint_of
from cfl_ops.ops.codec.huffman import check_payload

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
        TypeError, ValueError: bad arguments; or a bool of ``new`` holds a byte that is neither 0 nor 1.

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
    check_tensor(op, "new", new)
    check_tensor(op, "old", old)
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
        pairs = check_mappings(op, old, delta)
        totals = [check_base(op, pair, pairs) for pair in pairs]
        device = common_device(pairs)
        return {
            pair.key: result_of(op, pair, total, device)
            for pair, total in zip(pairs, totals, strict=True)
            if pair.delta.kind != LEFT
        }
    pair = _check_pair(op, old, delta)
    return result_of(op, pair, check_base(op, pair, [pair]), None)


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
        pairs = check_mappings(op, old, delta)
        write_all(op, old, pairs)
        return old
    if isinstance(old, Mapping) and isinstance(delta, Mapping):
        raise TypeError(
            f"cfl_ops.{op}: old must be a mapping that can be changed, as a dict is, but got {type(old).__name__}: "
            "use apply_delta"
        )
    pair = _check_pair(op, old, delta)
    if not in_place(pair.delta) and pair.delta.kind != SAME:
        raise ValueError(
            f"cfl_ops.{op}: delta must not change the shape or dtype of a tensor in place, but it makes {old.dtype} of "
            f"shape {tuple(old.shape)} {pair.delta.dtype} of shape {pair.delta.shape}: use apply_delta"
        )
    check_writable(op, [pair])
    total = check_base(op, pair, [pair])
    if pair.delta.kind != SAME:
        plan_of(op, pair, total)()
    return old


def describe_delta(delta: Tensor) -> Description:
    """What the header of a delta says; nothing behind it is read."""
    check_payload("describe_delta", "delta", delta)
    return describe("describe_delta", delta)


# --- arguments


def _refuse_mapping(op: str, name: str, value: Any, other_name: str, other: Any) -> None:
    """Raise where one argument is a mapping and the other is not."""
    if isinstance(value, Mapping) or isinstance(other, Mapping):
        raise TypeError(
            f"cfl_ops.{op}: {name} and {other_name} must both be tensors or both be mappings, but got "
            f"{type(value).__name__} and {type(other).__name__}"
        )


def _check_pair(op: str, old: Any, delta: Any) -> Pair:
    _refuse_mapping(op, "old", old, "delta", delta)
    check_tensor(op, "old", old)
    check_payload(op, "delta", delta)
    parsed = parse_delta(op, delta.to(old.device))
    if parsed.kind in (JOINED, LEFT):
        raise ValueError(
            f"cfl_ops.{op}: delta must be of one tensor, but it is that of a tensor that "
            f"{KINDS[parsed.kind]}: apply it to a dict"
        )
    return Pair(None, "old", old, parsed)


# --- compressing


def _compress_pair(op: str, name: str, new: Tensor, old_name: str, old: Tensor, small: bool) -> Tensor:
    checks.same_device(op, name, new, **{old_name: old})
    new, old = _right(op, name, new), resolved(old)
    if new.shape == old.shape and new.dtype == old.dtype:
        return encode_pair(op, new, old, small)
    return _whole(op, name, REPLACED, new, (old.dtype, tuple(old.shape), fingerprint_of(old)), small)


def _right(op: str, name: str, new: Tensor) -> Tensor:
    """The tensor, without conjugation or negation that is still to be done; raises for bools that no reader takes."""
    new = resolved(new)
    refuse_odd_bools(op, name, new)
    return new


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
    # A mapping may make its tensors when they are read: each is read once, and lives until the end, as those of which
    # one is freed and the next made could lie at one address.
    new, old = dict(new.items()), dict(old.items())
    for name, tensors in (("new", new), ("old", old)):
        for key, value in tensors.items():
            check_tensor(op, f"{name}[{key!r}]", value)
    out: dict[Any, Tensor] = {}
    done: dict[Any, Tensor] = {}  # of tied tensors one delta is made
    for key, value in new.items():
        name, base = f"new[{key!r}]", old.get(key)
        if base is None:
            none = (value.dtype, tuple(value.shape), 0)
            out[key] = _whole(op, name, JOINED, _right(op, name, value), none, small)
            continue
        where = place_of(value), place_of(base)
        if where in done:
            out[key] = done[where]
            continue
        out[key] = _compress_pair(op, name, value, f"old[{key!r}]", base, small)
        if None not in where:
            done[where] = out[key]
    for key, value in old.items():
        if key not in new:
            shape = tuple(value.shape)
            fields = (value.dtype, shape, value.dtype, shape, fingerprint_of(value), 0)
            gone = Delta(LEFT, SMALL if small else 0, *fields, 0, 0, None, [], None, 0)
            out[key] = pack_delta(gone, value.device)
    return out
