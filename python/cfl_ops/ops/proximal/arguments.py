"""The arguments of the proximal step: one named tuple, and the checks of all public forms that build it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.arguments import trailing
from cfl_ops._core.batching import expand_batch
from cfl_ops.ops.proximal.codes import AUTO, BIAS_FITS, MEAN, METHODS, PENALIZED, REDUCTIONS


class ProximalArguments(NamedTuple):
    """The arguments of both ops, in the order of their schemas."""

    features: Tensor
    target: Tensor
    weight: Tensor
    bias: Tensor | None
    lam: Tensor
    ridge: Tensor | None
    lam_diag: Tensor | None
    sample_weight: Tensor | None
    reduction: int
    """Of codes.py, as the next two."""
    fit_bias: int
    method: int


OPTIONS = 3
"""The last fields, which are no tensors."""


_SHAPES = {"features": "B D", "target": "B K", "weight": "K D", "bias": "K", "lam": "", "ridge": "", "lam_diag": "D",
           "sample_weight": "B"}  # fmt: skip
_CLASS_SHAPES = _SHAPES | {"target": "int64 B"}
_DIMS, _CLASS_DIMS = trailing(_SHAPES), trailing(_CLASS_SHAPES)


def shapes(arguments: ProximalArguments) -> dict[str, str]:
    """What each tensor of the ops must be."""
    return _SHAPES if arguments.target.is_floating_point() else _CLASS_SHAPES


def check_options(op: str, arguments: ProximalArguments) -> None:
    """Raise for an option that is none."""
    checks.one_of(op, "reduction", arguments.reduction, REDUCTIONS.values())
    checks.one_of(op, "fit_bias", arguments.fit_bias, BIAS_FITS.values())
    checks.one_of(op, "method", arguments.method, METHODS.values())


def check_arguments(
    op: str,
    features: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lam: float | Tensor,
    ridge: float | Tensor,
    lam_diag: Tensor | None,
    reduction: str,
    sample_weight: Tensor | None,
    fit_bias: str,
    method: str,
    *,
    in_place: bool = False,
) -> ProximalArguments:
    """Check the arguments of a public function, and bring them to the form the ops take."""
    options = (MEAN, PENALIZED, AUTO)
    if reduction != "mean" or fit_bias != "penalized" or method != "auto":  # all but the defaults
        checks.choice(op, "reduction", reduction, tuple(REDUCTIONS))
        checks.choice(op, "fit_bias", fit_bias, tuple(BIAS_FITS))
        checks.choice(op, "method", method, tuple(METHODS))
        options = (REDUCTIONS[reduction], BIAS_FITS[fit_bias], METHODS[method])
    plain = lam_diag is None and sample_weight is None and _plain(features, target, weight, bias)
    if not plain:
        _check_tensors(op, features, target, weight, bias, lam_diag, sample_weight)
    lam = checks.coefficient(op, "lam", lam, features.device)
    beta = (
        None
        if type(ridge) is float and ridge == 0
        else checks.coefficient(op, "ridge", ridge, features.device)
    )
    arguments = ProximalArguments._make(
        (features, target, weight, bias, lam, beta, lam_diag, sample_weight, *options)
    )
    if plain and lam.ndim == 0 and (beta is None or beta.ndim == 0):
        return arguments
    return _expand(op, arguments, in_place)


def _plain(features: Any, target: Any, weight: Any, bias: Any) -> bool:
    """Whether these are all that _check_tensors asks for, and have no batch dimensions.

    That is most calls; asked in few questions, for a small step takes no longer than all the others.
    """
    if not (isinstance(features, Tensor) and isinstance(target, Tensor) and isinstance(weight, Tensor)):
        return False
    size, head = features.shape, weight.shape
    if len(size) != 2 or len(head) != 2:
        return False
    (rows, width), (targets, weight_width) = size, head
    dtype, floats, on_cpu = target.dtype, checks.FLOATS, features.is_cpu
    if bias is not None and not (
        isinstance(bias, Tensor)
        and bias.shape == (targets,)
        and bias.dtype in floats
        and bias.layout is torch.strided
        and ((on_cpu and bias.is_cpu) or bias.device == features.device)
    ):
        return False
    return (
        weight_width == width
        and target.shape == ((rows,) if dtype is torch.int64 else (rows, targets))
        and (dtype is torch.int64 or dtype in floats)
        and features.dtype in floats
        and weight.dtype in floats
        and features.layout is target.layout is weight.layout is torch.strided
        and (
            (on_cpu and target.is_cpu and weight.is_cpu) or features.device == target.device == weight.device
        )
    )


def _check_tensors(
    op: str,
    features: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lam_diag: Tensor | None,
    sample_weight: Tensor | None,
) -> None:
    """Raise for what is wrong with the tensors, batch dimensions aside."""
    checks.floating(op, "features", features, 2)
    checks.floating(op, "weight", weight, 2)
    rows, width = features.shape[-2:]
    targets = weight.shape[-2]
    checks.size(op, "weight", weight, -1, width, "the width of features")
    checks.tensor(op, "target", target, 1)
    if target.dtype == torch.int64:
        checks.size(op, "target", target, -1, rows, "the rows of features")
    elif target.dtype not in checks.FLOATS:
        raise TypeError(
            f"cfl_ops.{op}: target must be floating point, or int64 class indices, but got {target.dtype}"
        )
    else:
        checks.floating(op, "target", target, 2)
        checks.size(op, "target", target, -2, rows, "the rows of features")
        checks.size(op, "target", target, -1, targets, "the rows of weight")
    if bias is not None:
        checks.floating(op, "bias", bias, 1)
        checks.size(op, "bias", bias, -1, targets, "the rows of weight")
    if lam_diag is not None:
        checks.floating(op, "lam_diag", lam_diag, 1)
        checks.size(op, "lam_diag", lam_diag, -1, width, "the width of features")
    if sample_weight is not None:
        checks.sample_weight(op, sample_weight, rows, "the rows of features")
    checks.same_device(op, "features", features, target=target, weight=weight, bias=bias, lam_diag=lam_diag,
                       sample_weight=sample_weight)  # fmt: skip


def _expand(op: str, arguments: ProximalArguments, in_place: bool) -> ProximalArguments:
    """All arguments with the common batch shape, which those that are written to must have already."""
    dims = _DIMS if arguments.target.is_floating_point() else _CLASS_DIMS
    batches = {
        name: value.shape[: value.ndim - dims[name]]
        for name, value in zip(arguments._fields, arguments, strict=True)
        if isinstance(value, Tensor)
    }
    batch = checks.broadcastable(op, **batches)
    for name in ("weight", "bias"):
        if in_place and name in batches and batches[name] != batch:
            raise ValueError(
                f"cfl_ops.{op}: {name} must have the batch shape {tuple(batch)} to be updated in place, "
                f"but got shape {tuple(getattr(arguments, name).shape)}"
            )
    core = [dims.get(name) for name in arguments._fields]
    return ProximalArguments(*expand_batch(arguments, core, batch))
