"""A head from the moments of its batch: what accumulates over batches, and is summed over processes."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops.ops.gram.gram import gram
from cfl_ops.ops.gram.moments import GramMoments
from cfl_ops.ops.solve.ridge_solve import ridge_solve

from .head import Batch

__all__ = [
    "Penalties",
    "batch_moments",
    "mean_square",
    "moments_bytes",
    "moments_loss",
    "pack",
    "solve_moments",
    "unpack",
]


class Penalties(NamedTuple):
    """What a head pays, per ``reduction``."""

    lam: float | Tensor
    """Proximal."""
    ridge: float | Tensor
    lam_diag: Tensor | None
    """``(D,)``, added to lam."""
    reduction: str
    fit_bias: str


FAR = 1e10


def batch_moments(batch: Batch, outputs: int, bias: bool) -> GramMoments:
    """The moments of a batch, in float64; the bias is a last feature that is 1."""
    return gram(
        batch.features,
        batch.target,
        bias_column=bias,
        sample_weight=batch.sample_weight,
        num_classes=outputs if batch.classes else None,
        acc_dtype=torch.float64,
    )


def solve_moments(
    moments: GramMoments, weight: Tensor, bias: Tensor | None, penalties: Penalties
) -> tuple[Tensor, Tensor | None]:
    r"""The proximal step (docs/formulas.md, 1.2) of a head whose batch is known by its moments.

    With mu and t the proximal and the total penalty in sum convention and the anchor ``Wa = mu / t W``:
    ``(G + t I) (W_new - Wa)^T = C - G Wa^T``. A free bias centres the moments first.

    Returns:
        Weight and bias, in float64.

    """
    cross = moments.cross
    assert cross is not None
    lam, ridge, lam_diag, reduction, fit_bias = penalties
    width, device = weight.shape[-1], weight.device
    total = moments.count
    old = weight.double()
    if float(total) == 0:  # no data is no step
        return old, None if bias is None else bias.double()
    if bias is not None:
        _warn_of_means(moments, width)
    scale = total if reduction == "mean" else torch.ones_like(total)
    mu = scale * torch.as_tensor(lam, dtype=torch.float64, device=device)
    t = mu + scale * torch.as_tensor(ridge, dtype=torch.float64, device=device)
    diagonal = None if lam_diag is None else scale * lam_diag.double()
    free = bias is not None and fit_bias == "free"
    order = width + int(bias is not None and not free)
    if bias is not None and not free:
        old = torch.cat([old, bias.double().unsqueeze(-1)], -1)
        diagonal = None if diagonal is None else torch.cat([diagonal, diagonal.new_zeros(1)])
    pull, pay = mu.expand(order), t.expand(order)
    if diagonal is not None:
        pull, pay = pull + diagonal, pay + diagonal
    anchor = old * torch.where(pay > 0, pull / torch.where(pay > 0, pay, 1.0), 1.0)
    system, right = moments.gram[:order, :order], cross[:order]
    if free:
        sums = moments.gram[width, :width].unsqueeze(-1)
        system, right = system - sums @ sums.mT / total, right - sums @ cross[width:] / total
    change = ridge_solve(system, right - system @ anchor.mT, t, lam_diag=diagonal)
    new = anchor + change.mT
    if free:
        assert moments.target_sum is not None
        new_bias = (moments.target_sum - new @ moments.gram[width, :width]) / total
        new = torch.cat([new, new_bias.unsqueeze(-1)], -1)
    return (new, None) if bias is None else (new[:, :width], new[:, width])


def _warn_of_means(moments: GramMoments, width: int) -> None:
    """A mean that is m times the deviation costs the squares of the deviations the digits of m^2."""
    square = moments.gram.diagonal()[:width] * moments.count
    mean = moments.gram[width, :width].square()
    if bool((mean > FAR * (square - mean).clamp(min=0)).logical_and(mean < (1 - 1e-14) * square).any()):
        warnings.warn(
            "cfl_ops.learn.ClosedFormLinear: features with a mean of more than 1e5 times their deviation lose digits "
            "in the moments that accumulated batches, or those of several processes, are kept in: centre them",
            stacklevel=6,
        )


def moments_loss(moments: GramMoments, weight: Tensor, bias: Tensor | None, reduction: str) -> Tensor:
    """The squared loss of a head on the batch of these moments, in float64; 0 without data."""
    assert moments.cross is not None
    assert moments.target_sq is not None
    head = weight.double()
    if bias is not None:
        head = torch.cat([head, bias.double().unsqueeze(-1)], -1)
    fitted = (head.mT * moments.cross).sum()
    total = moments.target_sq.sum() - 2 * fitted + ((head @ moments.gram) * head).sum()
    scale = moments.count if reduction == "mean" else torch.ones_like(moments.count)
    return torch.where(moments.count > 0, total.clamp(min=0) / scale, 0.0)


def mean_square(moments: GramMoments, width: int) -> Tensor:
    """trace(Phi^T Phi) / (B D) of the features; NaN without data."""
    return moments.gram.diagonal()[:width].sum() / (moments.count * width)


def rows_count(batch: Batch | None) -> Any:
    """How many rows: the sum of their weights, as in moments."""
    assert batch is not None
    return (
        batch.features.shape[0]
        if batch.sample_weight is None
        else batch.sample_weight.sum(dtype=torch.float64)
    )


def rows_mean_square(batch: Batch | None) -> Tensor:
    """trace(Phi^T Phi) / (B D) of the rows, weighted as they are; NaN without rows."""
    assert batch is not None
    squares = batch.features.double().square().mean(-1)
    if batch.sample_weight is None:
        square = squares.mean()
    else:
        weight = batch.sample_weight.double()
        square = (squares * weight).sum() / weight.sum()
    return square


def as_unit(square: Tensor) -> Tensor:
    """A mean square as the unit of penalties; 1 for features that are all zero, and for what will raise."""
    return torch.where((square > 0) & square.isfinite(), square, 1.0)


def moments_bytes(order: int, outputs: int) -> int:
    """Bytes of packed moments: a triangle, the cross moments, two sums by target and the count, in float64."""
    return 8 * (order * (order + 1) // 2 + (order + 2) * outputs + 1)


def pack(moments: GramMoments) -> Tensor:
    """Moments as one vector, the Gram matrix by its lower triangle."""
    order = moments.gram.shape[-1]
    rows, columns = torch.tril_indices(order, order, device=moments.gram.device)
    parts = [moments.gram[rows, columns], moments.cross, moments.target_sum, moments.target_sq, moments.count]
    return torch.cat([part.reshape(-1) for part in parts if part is not None])


def unpack(vector: Tensor, order: int, outputs: int) -> GramMoments:
    """What :func:`pack` packed."""
    triangle, cross, target_sum, target_sq, count = vector.split(
        [order * (order + 1) // 2, order * outputs, outputs, outputs, 1]
    )
    rows, columns = torch.tril_indices(order, order, device=vector.device)
    gram = vector.new_zeros(order, order)
    gram[rows, columns] = triangle
    gram[columns, rows] = triangle
    return GramMoments(gram, cross.reshape(order, outputs), target_sum, target_sq, count.reshape(()))
