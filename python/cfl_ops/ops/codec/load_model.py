"""load_model: a checkpoint straight into a model's parameters and buffers."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from cfl_ops._core import checks
from cfl_ops.ops.codec.files import open_weights
from cfl_ops.ops.codec.weights import Weights

__all__ = ["load_model"]


def load_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    strict: bool = True,
    device: torch.device | str | None = None,
) -> tuple[list[str], list[str]]:
    """Read a checkpoint into a model, tensor by tensor: no second copy of the weights is ever in memory.

    Names and shapes are compared first, and nothing is changed if they do not fit. Weights of another dtype are
    converted. Tied weights are read once; a name that the file lacks is not missed where its tensor is tied to one that
    the file has. A module with a way of its own to load (hooks, ``_load_from_state_dict``) is loaded by
    ``load_state_dict``, before all others.

    Args:
        model: any module. Parameters and buffers on the meta device are replaced by real ones.
        path: as :func:`load_file`: a ``.cflz`` or ``.safetensors`` file, an index of shards, or their folder.
        strict: raise for names that the model or the file lacks.
        device: where parameters that were on the meta device come; a CPU if it is None. Others stay where they are.

    Returns:
        the names that the file lacks, and those that the model lacks.

    Raises:
        ValueError: names or shapes that do not fit; the message lists them.
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
    strict = checks.flag("load_model", "strict", strict)
    place = torch.device("cpu" if device is None else device)
    with open_weights(path) as weights, torch.no_grad():
        plan = _plan(model, weights, strict)
        for prefix in plan.own:
            _load_own(model, weights, prefix, plan, strict)
        made: dict[int, Tensor] = {}
        order = {name: i for i, name in enumerate(weights.names)}
        steps = {
            (weights.stored_name(name), _memory(target)): target for name, target in plan.targets.items()
        }
        sources = sorted(steps, key=lambda step: order[step[0]])
        for i, step in enumerate(sources):
            if i + 1 < len(sources):
                weights._soon(sources[i + 1][0])
            _read(weights, step[0], steps[step], made, place)
            weights._done(step[0])
        _assign(model, made)
    return plan.missing, plan.unexpected


class _Plan(NamedTuple):
    """What goes where."""

    targets: dict[str, Tensor]
    own: list[str]
    """The modules that load in a way of their own, outermost."""
    missing: list[str]
    unexpected: list[str]


def _plan(model: nn.Module, weights: Weights, strict: bool) -> _Plan:
    """Compares names and shapes, and raises before anything is changed."""
    own: list[str] = []
    for name, module in model.named_modules():
        if _own_way(module) and not _within(name, own):
            own.append(name)
    places = {name: value for name, value in _places(model).items() if not _within(name, own)}
    there = [name for name in weights.names if not _within(name, own)]
    targets = {name: places[name] for name in there if name in places}
    unexpected = [name for name in there if name not in places]
    filled = {_memory(value) for value in targets.values()}
    missing = [n for n, value in places.items() if n not in targets and _memory(value) not in filled]
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
    return _Plan(targets, own, missing, unexpected)


def _within(name: str, modules: list[str]) -> bool:
    return any(not module or name == module or name.startswith(module + ".") for module in modules)


def _load_own(model: nn.Module, weights: Weights, prefix: str, plan: _Plan, strict: bool) -> None:
    at = f"{prefix}." if prefix else ""
    state = {name[len(at) :]: weights.tensor(name) for name in weights.names if name.startswith(at)}
    try:
        keys = model.get_submodule(prefix).load_state_dict(state, strict)
    except RuntimeError as error:
        raise ValueError(f"cfl_ops.load_model: model's {prefix or 'own module'} refuses: {error}") from None
    plan.missing.extend(at + name for name in keys.missing_keys)
    plan.unexpected.extend(at + name for name in keys.unexpected_keys)


def _own_way(module: nn.Module) -> bool:
    """Whether it loads in a way of its own (that of norms is for checkpoints of old versions of torch)."""
    function = type(module)._load_from_state_dict
    plain = function in (nn.Module._load_from_state_dict, _NormBase._load_from_state_dict)
    extra = type(module).set_extra_state is not nn.Module.set_extra_state
    return not plain or extra or bool(module._load_state_dict_pre_hooks)


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


def _memory(value: Tensor) -> tuple[object, ...]:
    """What tied tensors have in common."""
    if value.is_meta or not value.numel():
        return (id(value),)
    return value.device, value.data_ptr(), value.shape, value.stride(), value.dtype


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
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is not None and id(value) in made:
                    store[name] = made[id(value)]  # type: ignore[assignment]
