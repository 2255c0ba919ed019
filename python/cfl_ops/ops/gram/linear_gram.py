"""linear_gram: the moments of a layer's activations, which are never stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from cfl_ops._core import checks
from cfl_ops._core.arguments import same_dtype, trailing
from cfl_ops._core.batching import expand_batch
from cfl_ops._core.op import Derivative, define_op, gradients
from cfl_ops.ops.gram.gram import (
    GRAM_,
    GramArguments,
    as_moments,
    check_rows,
    gram_arguments,
    gram_fallback,
    gram_results,
    in_place,
    refuse_bad_rows,
    row_dims,
    row_shapes,
)
from cfl_ops.ops.gram.moments import GramMoments

__all__ = ["linear_gram"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda h: h,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "celu": F.celu,
}
BLOCK_BYTES = 8 << 20  # of features alive at a time: past the caches of a core nothing is gained
BLOCK_BYTES_CUDA = 32 << 20  # they fit the L2 cache, and keep a card busy for longer than their launches take


def linear_gram(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str = "relu",
    y: Tensor | None = None,
    *,
    bias_column: bool = False,
    sample_weight: Tensor | None = None,
    num_classes: int | None = None,
    acc_dtype: torch.dtype | None = None,
) -> GramMoments:
    r"""The moments of ``act(x W^T + b)`` without ever storing these features.

    A block of rows at a time goes through the layer and into the sums, so the memory beside the result does
    not depend on the number of rows (about 16 MB).

    Args:
        x: ``(..., B, C)`` inputs of the layer.
        weight: ``(..., D, C)``, in the dtype of ``x``.
        bias: ``(..., D)`` or None.
        activation: ``"relu"``, ``"gelu"`` (with erf), ``"gelu_tanh"``, ``"silu"``, ``"tanh"``, ``"celu"`` or
            ``"identity"``.
        y: targets, as in :func:`cfl_ops.gram`.
        bias_column: append a feature that is 1.
        sample_weight: ``(..., B)`` weights of the rows.
        num_classes: K for class indices.
        acc_dtype: as in :func:`cfl_ops.gram`.

    Returns:
        :class:`GramMoments` of the features ``(..., B, D)``.

    Raises:
        What :func:`cfl_ops.gram` raises, and ``ValueError`` for an unknown activation.

    Differentiable (twice), in x, weight, bias, y and sample_weight. Costs ``2 B C D + B D (D + 1)`` FLOPs.

    Example:
        >>> import torch, cfl_ops
        >>> x, weight = torch.ones(3, 2), torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
        >>> cfl_ops.linear_gram(x, weight, activation="relu").gram
        tensor([[12.,  0.],
                [ 0.,  0.]])

    """
    a = _arguments(x, weight, bias, activation, y, bias_column, sample_weight, num_classes, acc_dtype)
    out = LINEAR_GRAM(*a)
    rows = _of_features(a, a.x)  # errors name the layer's inputs: the features are not stored
    refuse_bad_rows(out[5], out[:5], rows, out[2])
    return as_moments(out, y)


class LinearGramArguments(NamedTuple):
    """The arguments of the op ``linear_gram``."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    y: Tensor | None
    sample_weight: Tensor | None
    activation: str
    bias_column: bool
    num_classes: int
    acc_dtype: torch.dtype


def _shapes(a: GramArguments | LinearGramArguments) -> dict[str, str]:
    return _CLASSES if a.num_classes else _DENSE


_LAYER = {"x": "B C", "weight": "D C", "bias": "D"}
_LAYER_DIMS = trailing(_LAYER)
_DENSE, _CLASSES = row_shapes(0) | _LAYER, row_shapes(1) | _LAYER


def _check(a: LinearGramArguments) -> None:
    checks.one_of("linear_gram", "activation", a.activation, ACTIVATIONS)
    for name, value in (("weight", a.weight), ("bias", a.bias)):
        same_dtype("linear_gram", name, value, "x", a.x.dtype)
    check_rows(_of_features(a, a.x), "linear_gram")


def _arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    y: Tensor | None,
    bias_column: bool,
    sample_weight: Tensor | None,
    num_classes: int | None,
    acc_dtype: torch.dtype | None,
) -> LinearGramArguments:
    """Check the layer, and the rest as :func:`cfl_ops.gram` does."""
    op = "linear_gram"
    checks.choice(op, "activation", activation, tuple(ACTIVATIONS))
    checks.floating(op, "x", x, 2)
    checks.floating(op, "weight", weight, 2)
    checks.size(op, "weight", weight, -1, x.shape[-1], "the width of x")
    if bias is not None:
        checks.floating(op, "bias", bias, 1)
        checks.size(op, "bias", bias, -1, weight.shape[-2], "the rows of weight")
    for name, value in (("weight", weight), ("bias", bias)):
        same_dtype(op, name, value, "x", x.dtype)
    checks.same_device(op, "x", x, weight=weight, bias=bias)
    rows = gram_arguments(op, x, y, bias_column, sample_weight, num_classes, acc_dtype)
    if rows.x.dtype != x.dtype:  # promoted together with y
        weight, bias = weight.to(rows.x.dtype), None if bias is None else bias.to(rows.x.dtype)
    checks.broadcastable(op, x=rows.x.shape[:-2], weight=weight.shape[:-2])
    dims = row_dims(rows.num_classes) | _LAYER_DIMS
    tensors = expand_batch(
        (rows.x, weight, bias, rows.y, rows.sample_weight),
        [dims[field] for field in LinearGramArguments._fields[:5]],
    )
    options = (activation, rows.bias_column, rows.num_classes, rows.acc_dtype)
    return LinearGramArguments._make((*tensors, *options))


def _of_features(a: LinearGramArguments, features: Tensor) -> GramArguments:
    """The arguments of ``gram`` for the layer's activations."""
    return GramArguments(features, a.y, a.sample_weight, a.bias_column, a.num_classes, a.acc_dtype)


def _activated(a: LinearGramArguments) -> GramArguments:
    h = a.x @ a.weight.mT
    return _of_features(a, ACTIVATIONS[a.activation](h if a.bias is None else h + a.bias.unsqueeze(-2)))


def _row_blocks(a: LinearGramArguments) -> list[LinearGramArguments]:
    """The arguments for a block of rows at a time, whose features fill no more than BLOCK_BYTES."""
    x, rows = a.x, a.x.shape[-2]
    held = BLOCK_BYTES_CUDA if x.is_cuda else BLOCK_BYTES
    width = max(a.weight.shape[-2:])
    step = max(64, held // max(1, width * max(1, x.shape[:-2].numel()) * x.element_size()))
    blocks = [slice(begin, min(begin + step, rows)) for begin in range(0, rows, step)]

    def rows_of(value: Tensor | None, block: slice, after: int) -> Any:
        return None if value is None else value[(..., block) + (slice(None),) * after]

    after = {name: dims - 1 for name, dims in row_dims(a.num_classes).items()}
    return [
        a._replace(**{name: rows_of(getattr(a, name), block, n) for name, n in after.items()})
        for block in blocks
    ]


def _fallback(a: LinearGramArguments) -> tuple[Tensor, ...]:
    """A block of rows at a time: features, activation, and their moments added in place."""
    *moments, info = _results(a, a.x.new_zeros)
    for block in _row_blocks(a):
        new = GRAM_.overload(*in_place(moments, _activated(block), 1.0))
        info = torch.where(info == 0, new, info)
    return (*moments, info)


def _results(a: LinearGramArguments, make: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    no_rows = a.x.new_empty((*a.x.shape[:-2], 0, a.weight.shape[-2]))
    return gram_results(_of_features(a, no_rows), make)


def _setup_context(ctx: Any, a: LinearGramArguments, output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*a[:5])
    ctx.options = a[5:]


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """The features of a block are computed again, and differentiated through its moments."""
    a = LinearGramArguments(*ctx.saved_tensors, *ctx.options)
    wanted = [field for field, needed in zip(a._fields, ctx.needs_input_grad, strict=True) if needed]
    of_rows = row_dims(a.num_classes)
    by_rows: dict[str, list[Tensor]] = {field: [] for field in wanted if field in of_rows}
    found: dict[str, Tensor] = {}
    for block in _row_blocks(a) or [a]:

        def moments(*varied: Tensor, block: LinearGramArguments = block) -> tuple[Tensor, ...]:
            given = block._replace(**dict(zip(wanted, varied, strict=True)))  # type: ignore[arg-type]
            return gram_fallback(_activated(given))[:5]

        primals, pullback = torch.func.vjp(moments, *(getattr(block, field) for field in wanted))  # type: ignore[misc]
        cotangents = tuple(
            torch.zeros_like(primal) if grad is None else grad
            for primal, grad in zip(primals, grads[:5], strict=True)
        )
        for field, grad in zip(wanted, pullback(cotangents), strict=True):
            if field in by_rows:
                by_rows[field].append(grad)
            else:
                found[field] = grad + found[field] if field in found else grad
    for field, blocks in by_rows.items():
        found[field] = torch.cat(blocks, dim=-of_rows[field])
    return gradients(LinearGramArguments, **found)


LINEAR_GRAM = define_op(
    "linear_gram(Tensor x, Tensor weight, Tensor? bias, Tensor? y, Tensor? sample_weight, str activation, "
    "bool bias_column, int num_classes, ScalarType acc_dtype) -> "
    "(Tensor gram, Tensor cross, Tensor target_sum, Tensor target_sq, Tensor count, Tensor info)",
    arguments=LinearGramArguments,
    python=_fallback,
    fake=lambda a: _results(a, a.x.new_empty),
    shapes=_shapes,
    check=_check,
    derivative=Derivative(_setup_context, _backward),
    composite=True,
)
