"""load_model: a checkpoint straight into a model's parameters and buffers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from cfl_ops._core import checks
from cfl_ops.ops.codec.files import open_weights
from cfl_ops.ops.codec.tied import memory
from cfl_ops.ops.codec.weights import Weights, place_of

__all__ = ["load_model"]


def load_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    strict: bool = True,
    device: torch.device | str | None = None,
) -> tuple[list[str], list[str]]:
    """Read a checkpoint into a model, tensor by tensor: no second copy of the weights is in memory.

    Names and shapes are compared first, and nothing is changed if they do not fit. Weights of another dtype are
    converted. Tied weights are read once; a name that the file lacks is not missed where its tensor is tied to one that
    the file has.

    A module with a way of its own to load (hooks before or after, ``_load_from_state_dict``, extra state; of the model
    itself also ``load_state_dict``) is loaded by ``load_state_dict``, before all others: what it is given and what it
    had are in memory meanwhile. If it refuses, all parameters and buffers are put back as they were.

    Args:
        model: any module. Parameters and buffers on the meta device are replaced by real ones.
        path: as :func:`load_file`: a ``.cflz`` or ``.safetensors`` file, an index of shards, or their folder.
        strict: raise for names that the model or the file lacks.
        device: where parameters that were on the meta device come; a CPU if it is None. Others stay where they are.

    Returns:
        the names that the file lacks, and those that the model lacks.

    Raises:
        TypeError: ``model`` is no module, or bad arguments.
        ValueError: names or shapes that do not fit, which the message lists; a parameter or buffer that cannot be
            written to; a module that loads in its own way refuses.
        CorruptDataError: as :func:`load_file`. What was read before it stays in the model.

    Not under ``fullgraph=True`` nor ``torch.export``: it reads a file.

    Example:
        >>> import os, tempfile, torch, cfl_ops
        >>> model, other = torch.nn.Linear(30, 20), torch.nn.Linear(30, 20)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.cflz")
        ...     size = cfl_ops.save_file(model.state_dict(), path)
        ...     cfl_ops.load_model(other, path)
        ([], [])
        >>> torch.equal(model.bias, other.bias)
        True

    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"cfl_ops.load_model: model must be a module, but got {type(model).__name__}")
    strict, place = checks.flag("load_model", "strict", strict), place_of("load_model", device)
    with open_weights(path, "load_model") as weights, torch.no_grad():
        plan = _plan(model, weights, strict)
        if plan.own:
            _load_own_ways(model, weights, plan, place, strict)
        places = _places(model)  # modules that load in their own way may have put others there
        made: dict[int, Tensor] = {}
        order = {name: i for i, name in enumerate(weights.names)}
        steps = {(weights.stored_name(name), memory(places[name])): places[name] for name in plan.targets}
        sources = sorted(steps, key=lambda step: order[step[0]])
        for i, step in enumerate(sources):
            if i + 1 < len(sources):
                weights.soon(sources[i + 1][0])
            _read(weights, step[0], steps[step], made, place)
            weights.done(step[0])
        _assign(model, made)
    return plan.missing, plan.unexpected


class _Plan(NamedTuple):
    """What goes where."""

    targets: list[str]
    own: list[str]
    """The modules that load in a way of their own, outermost."""
    tied_to_own: list[str]
    """What the file lacks but a tensor of these modules is tied to."""
    missing: list[str]
    unexpected: list[str]


def _plan(model: nn.Module, weights: Weights, strict: bool) -> _Plan:
    """Compares names and shapes, and raises before anything is changed."""
    own: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if _own_way(module, module is model) and not _within(name, own):
            own.append(name)
    everywhere = _places(model)
    places = {name: value for name, value in everywhere.items() if not _within(name, own)}
    there = [name for name in weights.names if not _within(name, own)]
    targets = {name: places[name] for name in there if name in places}
    unexpected = [name for name in there if name not in places]
    filled = {memory(value) for value in targets.values()}
    lacking = {n: memory(v) for n, v in places.items() if n not in targets and memory(v) not in filled}
    in_own = {memory(value) for name, value in everywhere.items() if name not in places}
    missing = [name for name, where in lacking.items() if where not in in_own]
    shapes = {name: (tuple(value.shape), weights.header(name)[1]) for name, value in targets.items()}
    wrong = [f"{n!r} of {is_} (the file: {has})" for n, (is_, has) in shapes.items() if is_ != has]
    told = [
        f"{what} {', '.join(items[:8])}" + (f" and {len(items) - 8} more" if len(items) > 8 else "")
        for what, items, counts in (
            ("other shapes:", wrong, True),
            ("names that the file lacks:", [*map(repr, missing)], strict),
            ("names that the model lacks:", [*map(repr, unexpected)], strict),
        )
        if items and counts
    ]
    if told:
        raise ValueError(
            f"cfl_ops.load_model: model must have the tensors of {weights.path}, but got {'; '.join(told)}"
        )
    for name, value in targets.items():
        if (why := _not_writable(value)) is not None:
            raise ValueError(
                f"cfl_ops.load_model: model must have tensors that can be written to, but {name!r} {why}"
            )
    return _Plan([*targets], own, [n for n in lacking if n not in missing], missing, unexpected)


def _within(name: str, modules: list[str]) -> bool:
    return any(not module or name == module or name.startswith(module + ".") for module in modules)


def _overlaps(value: Tensor) -> bool:
    return torch._debug_has_internal_overlap(value) == 1


def _not_writable(value: Tensor) -> str | None:
    if value.is_meta:
        return None  # it is replaced
    if _overlaps(value):
        return "has elements that share memory (expanded)"
    if value.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in inference mode"
    return None


def _load_own_ways(
    model: nn.Module, weights: Weights, plan: _Plan, place: torch.device, strict: bool
) -> None:
    """The modules that load in a way of their own; if one raises, all are as they were."""
    before = _places(model)
    tied = {memory(before[name]): name for name in weights.names if name in before}
    # A name that the file lacks is given to them where the file has it under another.
    also = {n: tied[memory(v)] for n, v in before.items() if n not in weights and memory(v) in tied}
    with _restoring(model, plan.own):
        made = _materialise(model, plan.own, place)
        missing: list[str] = []
        for prefix in plan.own:
            missing += _load_own(model, weights, prefix, also, plan, strict)
        places = _places(model)
        unread = {id(places[name]) for name in missing if name in places}
        _assign(model, {id(new): old for old, new in made.values() if id(new) in unread})
        for name, value in places.items():
            if value.is_meta and name not in missing and _within(name, plan.own):
                raise ValueError(
                    f"cfl_ops.load_model: model's {name!r} stays on the meta device, for its module loads in a way of "
                    "its own: load it into a model with memory (to_empty)"
                )
    filled = {memory(v) for n, v in places.items() if _within(n, plan.own) and n not in missing}
    plan.missing.extend(name for name in plan.tied_to_own if memory(places[name]) not in filled)
    plan.missing.extend(missing)


def _load_own(
    model: nn.Module, weights: Weights, prefix: str, also: dict[str, str], plan: _Plan, strict: bool
) -> list[str]:
    """Returns the names that the file lacks."""
    state = {name: weights.tensor(name) for name in weights.names if _within(name, [prefix])}
    state |= {name: weights.tensor(of) for name, of in also.items() if _within(name, [prefix])}
    # Hooks get the names that they have in the model, as torch gives them.
    outer = module = model.get_submodule(prefix)
    for part in reversed(prefix.split(".") if prefix else []):
        inner, outer = outer, nn.Module()
        outer._modules[part] = inner
    try:
        keys = outer.load_state_dict(state, strict)
    except RuntimeError as error:
        why = str(error).replace("state_dict for Module:", f"state_dict for {type(module).__name__}:")
        raise ValueError(f"cfl_ops.load_model: model's {prefix or 'own module'} refuses: {why}") from None
    if keys is None:  # of a load_state_dict of its own
        return []
    plan.unexpected.extend(keys.unexpected_keys)
    return list(keys.missing_keys)


@contextlib.contextmanager
def _restoring(model: nn.Module, own: list[str]) -> Iterator[None]:
    """If the block raises, parameters and buffers are those that they were, with the values that they had."""
    stores = [(store, dict(store)) for module in model.modules() for store in _stores(module)]
    values: dict[int, tuple[Tensor, type, Tensor, Tensor | None]] = {}
    for value in _tensors(model, own):
        if id(value) not in values:
            kept = None if is_lazy(value) or value.is_meta or _overlaps(value) else value.detach().clone()
            values[id(value)] = value, type(value), value.data, kept
    try:
        yield
    except BaseException:
        for store, before in stores:
            store.clear()
            store.update(before)
        for value, kind, data, kept in values.values():
            value.data = data
            if type(value) is not kind:
                value.__class__ = kind
            if kept is not None:
                data.copy_(kept)
        raise


def _materialise(model: nn.Module, own: list[str], place: torch.device) -> dict[int, tuple[Tensor, Tensor]]:
    """Give the tensors of these modules memory where they have none; returns, by id, the old ones and the new."""
    made: dict[int, tuple[Tensor, Tensor]] = {}
    new: Tensor
    for value in _tensors(model, own):
        if not value.is_meta or id(value) in made:
            continue
        if is_lazy(value):
            new = type(value)(requires_grad=value.requires_grad, device=place, dtype=value.dtype)  # type: ignore[call-arg]
        else:
            new = torch.empty_like(value, device=place, requires_grad=False)
            new.untyped_storage().fill_(0)  # type: ignore[attr-defined]
            if isinstance(value, nn.Parameter):
                new = nn.Parameter(new, value.requires_grad)
        made[id(value)] = value, new
    _assign(model, {key: new for key, (_, new) in made.items()})
    return made


def _tensors(model: nn.Module, own: list[str]) -> Iterator[Tensor]:
    """Parameters and persistent buffers of these modules, those without shape among them."""
    return (value for name, value in _places(model).items() if _within(name, own))


def _stores(module: nn.Module) -> tuple[dict[str, Tensor | None], ...]:
    return module._parameters, module._buffers  # type: ignore[return-value]


def _own_way(module: nn.Module, outermost: bool) -> bool:
    """Whether it loads in a way of its own (that of norms is for checkpoints of old versions of torch).

    As in torch, only the outermost module's ``load_state_dict`` is called.
    """
    kind, own = type(module), vars(module)
    plain = kind._load_from_state_dict in (nn.Module._load_from_state_dict, _NormBase._load_from_state_dict)
    public = kind.load_state_dict is not nn.Module.load_state_dict or "load_state_dict" in own
    return (
        not plain
        or "_load_from_state_dict" in own
        or kind.set_extra_state is not nn.Module.set_extra_state
        or bool(module._load_state_dict_pre_hooks)
        or bool(module._load_state_dict_post_hooks)
        or (outermost and public)
    )


def _places(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by every name that they have."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        at = f"{prefix}." if prefix else ""
        for name, value in module._parameters.items():
            if value is not None:
                found[at + name] = value
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[at + name] = buffer
    return found


def _read(weights: Weights, name: str, target: Tensor, made: dict[int, Tensor], place: torch.device) -> None:
    dtype, _ = weights.header(name)
    if target.is_meta:
        read = weights.tensor(name).to(place, target.dtype)
        made[id(target)] = (
            nn.Parameter(read, target.requires_grad) if isinstance(target, nn.Parameter) else read
        )
    elif dtype == target.dtype and target.is_contiguous():
        weights.tensor(name, out=target)
    else:
        target.copy_(weights.tensor(name))


def _assign(model: nn.Module, made: dict[int, Tensor]) -> None:
    """Put real tensors into the place of those without data."""
    if not made:
        return
    for module in model.modules():
        for store in _stores(module):
            for name, value in store.items():
                if value is not None and id(value) in made:
                    store[name] = made[id(value)]
