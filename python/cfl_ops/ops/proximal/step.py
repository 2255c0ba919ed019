"""proximal: the closed-form proximal step of a linear head, through the smaller side of the problem."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import define_op
from cfl_ops._core.results import result_type
from cfl_ops._gpu.launch import triton
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.gram.gram import plain_gram
from cfl_ops.ops.proximal.arguments import ProximalArguments, check_arguments, check_options, shapes
from cfl_ops.ops.proximal.codes import (
    BAD_FEATURES,
    BAD_PENALTY,
    BAD_SAMPLE_WEIGHT,
    BAD_WEIGHT,
    FREE,
    MEAN,
)
from cfl_ops.ops.proximal.derivative import derivative_of
from cfl_ops.ops.proximal.system import data_info, or_inaccurate
from cfl_ops.ops.solve.system import cholesky_solve, factor_system, on_device

__all__ = ["ProximalStep", "proximal_step", "proximal_step_", "proximal_step_ex", "proximal_step_ex_"]


@result_type("proximal")
class ProximalStep(NamedTuple):
    """The head after a closed-form step, and what the backbone needs from it."""

    weight: Tensor
    """``(..., K, D)``: the new weight."""
    bias: Tensor | None
    """``(..., K)``: the new bias, or None where there is none."""
    loss: Tensor
    """``(...)``: the squared loss of the batch at the new head, without the penalties."""
    grad_features: Tensor
    """``(..., B, D)``: the gradient of that loss with respect to the features, the head held fixed."""


def proximal_step(
    features: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lam: float | Tensor,
    ridge: float | Tensor = 0.0,
    lam_diag: Tensor | None = None,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    fit_bias: str = "penalized",
    method: str = "auto",
) -> ProximalStep:
    r"""One closed-form step of a linear head: the minimiser of the batch's loss near the old weight.

    .. math::
        W_{new} = \arg\min_W \tfrac{1}{\sum s} \sum_n s_n \|y_n - W \phi_n - b\|^2
                  + \lambda \|W - W_t\|^2 + \beta \|W\|^2

    (Closed-Form Last Layer Optimization, Eq. 13-15; ``ridge`` is Eq. 1-2.) The system has the size of the
    smaller of B and D; where that is B, the residual is a multiple of its solution, so there is no second
    forward through the head.

    Args:
        features: ``(..., B, D)``, floating point.
        target: ``(..., B, K)`` floating point, or class indices ``(..., B)`` int64 in ``[0, K)``, which stand
            for one-hot rows (never formed).
        weight: the old weight ``(..., K, D)``.
        bias: the old bias ``(..., K)``, or None.
        lam: the proximal coefficient, >= 0: a number, or a tensor of no or of all batch dimensions.
            ``1 / (2 lam)`` plays the part of a learning rate; any value is stable.
        ridge: the ridge coefficient beta, >= 0, likewise.
        lam_diag: ``(..., D)`` added to ``lam`` feature by feature (not for the bias). With it the sum of the
            penalties must be positive for every feature.
        reduction: ``"mean"`` as above; ``"sum"`` leaves the division by the sum of s out, here and in loss and
            gradient, so that the same ``lam`` weighs less against more rows.
        sample_weight: ``(..., B)`` weights s >= 0 of the rows, 1 by default.
        fit_bias: ``"penalized"`` treats the bias as the weight of a feature that is 1 (the paper's choice);
            ``"free"`` fits it without a penalty, by centring.
        method: ``"cholesky"`` factors the system; ``"cg"`` runs conjugate gradients on all K right sides from
            the old head, to a true residual of 1e-6 (float64: 1e-12) of the right side's, and falls back on
            the factorisation where they do not converge (in the native CPU kernel; others always factor);
            ``"auto"`` tries them where a quarter of the factorisation's work buys at least 24 iterations,
            see :func:`cfl_ops.config.plan_proximal`.

    Returns:
        :class:`ProximalStep` ``(weight, bias, loss, grad_features)``: the last two are the squared loss at the
        new head and its gradient with respect to the features with the head held fixed, which by the
        envelope theorem is the gradient of the whole objective. Pass it on as
        ``features.backward(grad_features)``. An empty batch (B = 0, or all weights 0) leaves the head as it
        is, with loss 0.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or penalties do not fit; NaN or Inf (naming the row).
        IndexError: a class index is out of range.
        torch.linalg.LinAlgError: the system is singular, or too nearly so for what follows.

    Loss and gradient are those of the new head as it is stored, to 5 % or 1e-9 of the targets' mean square, and the
    loss is at most twice that of the exact head rounded to the same dtype, plus 1e-3 of the targets' mean square.
    float32 and half precision are computed with in float32 where a bound on its rounding allows it, which features
    with a large mean and small penalties do not; else in float64, at two to six times the cost (docs/formulas.md, 1.7).
    A head in half precision on features with a large mean has a large loss, whatever it was computed in: centre the
    features, or keep the head in float32.
    Costs ``2 (3 B D K + B^2 D / 2) + B^3 / 3`` FLOPs for B < D, else
    ``2 (2 B D K + B D^2 / 2) + D^3 / 3``. Differentiable (twice) in all its tensors.

    Example:
        >>> import torch, cfl_ops
        >>> features, weight = torch.eye(2), torch.zeros(1, 2)
        >>> step = cfl_ops.proximal_step(features, torch.tensor([[1.0], [2.0]]), weight, lam=0.5)
        >>> step.weight
        tensor([[0.5000, 1.0000]])
        >>> step.loss
        tensor(0.6250)

    """
    return step_or_raise(check_arguments(
        "proximal_step", features, target, weight, bias, lam, ridge, lam_diag, reduction, sample_weight,
        fit_bias, method,
    ))  # fmt: skip


def proximal_step_ex(
    features: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lam: float | Tensor,
    ridge: float | Tensor = 0.0,
    lam_diag: Tensor | None = None,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    fit_bias: str = "penalized",
    method: str = "auto",
) -> tuple[ProximalStep, Tensor]:
    """As :func:`proximal_step`, but never raises for what the data holds and never synchronises a GPU.

    Returns:
        The step and ``info (...)`` int32. 0: success. k > 0: the leading minor of order k of the system is
        not positive definite. Negative: NaN or Inf in the features (-1); NaN or Inf in, or a class index out
        of range of, the target (-2); NaN or Inf in weight or bias (-3); a bad penalty (-4) or sample weight
        (-5). Where info is not 0, weight and bias are the old ones, the loss is NaN and the gradient zero.

    Example:
        >>> import torch, cfl_ops
        >>> features = torch.ones(2, 3)  # two equal rows and no penalty
        >>> step, info = cfl_ops.proximal_step_ex(features, torch.ones(2, 1), torch.zeros(1, 3), lam=0.0)
        >>> int(info), step.weight
        (2, tensor([[0., 0., 0.]]))

    """
    return _step(check_arguments(
        "proximal_step_ex", features, target, weight, bias, lam, ridge, lam_diag, reduction, sample_weight,
        fit_bias, method,
    ))  # fmt: skip


def proximal_step_(
    features: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lam: float | Tensor,
    ridge: float | Tensor = 0.0,
    lam_diag: Tensor | None = None,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    fit_bias: str = "penalized",
    method: str = "auto",
) -> tuple[Tensor, Tensor]:
    """As :func:`proximal_step`, with ``weight`` and ``bias`` updated in place.

    Returns:
        ``(loss, grad_features)``. When it raises, weight and bias are unchanged, all of a batch. Takes no part
        in autograd: features may require grad and get none (``grad_features`` is theirs); what else does needs
        ``torch.no_grad()`` around the call, as an ``nn.Parameter`` head, and ``features.backward(grad_features)``
        after it.

    Example:
        >>> import torch, cfl_ops
        >>> weight = torch.zeros(1, 2)
        >>> loss, grad = cfl_ops.proximal_step_(torch.eye(2), torch.ones(2, 1), weight, lam=0.5)
        >>> weight
        tensor([[0.5000, 0.5000]])

    """
    arguments = check_arguments(
        "proximal_step_", features, target, weight, bias, lam, ridge, lam_diag, reduction, sample_weight,
        fit_bias, method, in_place=True,
    )  # fmt: skip
    if weight.ndim > 2:
        return _all_or_none_(arguments)
    loss, grad_features, info = PROXIMAL_STEP_(*arguments)
    results = [loss, grad_features, weight, *([] if bias is None else [bias])]
    raise_if_failed(info, results, arguments)
    return loss, grad_features


def _all_or_none_(arguments: ProximalArguments) -> tuple[Tensor, Tensor]:
    """The step in place on a batch of heads, of which none is changed where one fails."""
    if not torch.compiler.is_compiling():
        PROXIMAL_STEP_.check(arguments)
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        weight, bias, loss, grad_features, info = PROXIMAL_STEP(*arguments)
        raise_if_failed(info, [weight, bias], arguments)
        arguments.weight.copy_(weight)
        if arguments.bias is not None:
            arguments.bias.copy_(bias)
    return loss, grad_features


def proximal_step_ex_(
    features: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    lam: float | Tensor,
    ridge: float | Tensor = 0.0,
    lam_diag: Tensor | None = None,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    fit_bias: str = "penalized",
    method: str = "auto",
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """As :func:`proximal_step_`, but returns ``((loss, grad_features), info)`` instead of raising.

    Where info is not 0 (see :func:`proximal_step_ex`) weight and bias are unchanged.

    Example:
        >>> import torch, cfl_ops
        >>> weight = torch.zeros(1, 2)
        >>> (loss, grad), info = cfl_ops.proximal_step_ex_(torch.eye(2), torch.ones(2, 1), weight, lam=0.5)
        >>> int(info)
        0

    """
    loss, grad_features, info = PROXIMAL_STEP_(*check_arguments(
        "proximal_step_ex_", features, target, weight, bias, lam, ridge, lam_diag, reduction, sample_weight,
        fit_bias, method, in_place=True,
    ))  # fmt: skip
    return (loss, grad_features), info


def _step(arguments: ProximalArguments) -> tuple[ProximalStep, Tensor]:
    weight, bias, loss, grad_features, info = PROXIMAL_STEP(*arguments)
    return ProximalStep(weight, None if arguments.bias is None else bias, loss, grad_features), info


def step_or_raise(arguments: ProximalArguments) -> ProximalStep:
    """The step, or an exception for what the data holds."""
    step, info = _step(arguments)
    results = [value for value in step if value is not None]
    raise_if_failed(info, results, arguments)
    return step


def raise_if_failed(info: Tensor, results: Sequence[Tensor], arguments: ProximalArguments) -> None:
    """Raise for what info says; the arguments are for the message."""
    features, target, weight, bias = arguments[:4]
    head = (weight,) if bias is None else (weight, bias)
    check_info("proximal_step", info, results, (features, target, *head))


def _fallback(arguments: ProximalArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve for the change of the head from its anchor, so that what is small is computed small.

    With mu, t the proximal and the total penalty (sum convention) and the anchor Wa = (mu / t) W, the
    residual R0 = Y - Phi Wa^T is the target of a ridge problem for W_new - Wa (docs/formulas.md, 1.2-1.6).
    The system of the smaller side is formed, factored and solved in float64, and the head refined by its own
    residual. Then it is rounded to what it is stored in; bias, loss and gradient are those of the rounded weight.
    """
    features, target, weight, bias, lam, ridge, lam_diag, sample_weight, reduction, fit_bias, _ = arguments
    rows, width = features.shape[-2:]
    dtype = torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
    phi, old = features.to(torch.float64), weight.to(torch.float64)
    # Not left on the host: a 0-d condition of torch.where would be copied, which synchronises.
    lam = on_device(lam, phi)
    ridge = None if ridge is None else on_device(ridge, phi)
    classes = not target.is_floating_point()

    # The row weights s enter as square roots, which allows zeros.
    if sample_weight is None:
        total = phi.new_full(phi.shape[:-2], rows)
        sqrt_s = phi.new_ones(*phi.shape[:-1], 1)
    else:
        total = sample_weight.sum(-1, dtype=torch.float64)
        sqrt_s = sample_weight.to(torch.float64).sqrt().unsqueeze(-1)
    empty = total == 0
    safe_total = torch.where(empty, 1.0, total)
    scale = safe_total if reduction == MEAN else torch.ones_like(total)

    # Penalties in sum convention: mu pulls to the old head, t (mu and the ridge) is what the system sees.
    mu_bias = scale * lam
    t_bias = mu_bias if ridge is None else mu_bias + scale * ridge
    mu, t = mu_bias.unsqueeze(-1), t_bias.unsqueeze(-1)
    if lam_diag is not None:
        extra = scale.unsqueeze(-1) * lam_diag.to(torch.float64)
        mu, t = mu + extra, t + extra
    shrink = torch.where(t > 0, mu / torch.where(t > 0, t, 1.0), 1.0)
    anchor = old * shrink.unsqueeze(-2)
    free = fit_bias == FREE
    if bias is not None:
        shrink_bias = torch.where(t_bias > 0, mu_bias / torch.where(t_bias > 0, t_bias, 1.0), 1.0)
        # A free bias does not depend on the old one, which may be so large that targets drown in it.
        old_bias = torch.zeros_like(bias, dtype=torch.float64) if free else bias.to(torch.float64)
        anchor_bias = old_bias * shrink_bias.unsqueeze(-1)

    if classes:
        outside = (target < 0) | (target >= weight.shape[-2])
        y = phi.new_zeros(*target.shape, weight.shape[-2])
        if weight.shape[-2]:  # without classes every index is outside
            y = y.scatter(-1, torch.where(outside, 0, target).unsqueeze(-1), 1.0)
    else:
        y = target.to(torch.float64)
    residual = y - phi @ anchor.mT
    if bias is not None:
        residual = residual - anchor_bias.unsqueeze(-2)

    dual, p, q, pulled = rows <= width, phi, residual, None
    if bias is not None and (free or not dual):  # centring the rows fits the bias without a penalty
        share = (sqrt_s * sqrt_s) / safe_total[..., None, None]
        mean_p, mean_q = (share * p).sum(-2, keepdim=True), (share * q).sum(-2, keepdim=True)
        p, q = p - mean_p, q - mean_q
        if not free:
            share_of_bias = (total / (safe_total + t_bias))[..., None, None]
            pull_bias = (mu_bias.unsqueeze(-1) * old_bias - t_bias.unsqueeze(-1) * anchor_bias).unsqueeze(-2)
            weight_of_bias = share_of_bias * t_bias[..., None, None]
            pulled = Pulled(mean_p, weight_of_bias, weight_of_bias * mean_q - share_of_bias * pull_bias)
    p, q = sqrt_s * p, sqrt_s * q
    size = (sqrt_s * y).square().sum((-2, -1)).sqrt()
    if dual:
        ones = sqrt_s if bias is not None and not free else None
        centred = sqrt_s if bias is not None and free else None
        change, info = _dual_change(p, q, t, ones, centred, t_bias if lam_diag is not None else None, size)
    else:
        # Zeros, but with derivatives where the penalties are zero: mu and rho then pull differently.
        pull = (mu.unsqueeze(-2) * old - t.unsqueeze(-2) * anchor).mT
        change, info = _primal_change(p, q, t, pull, pulled, size)

    new = (anchor + change).to(weight.dtype)
    final = y - phi @ new.to(torch.float64).mT
    if bias is None:
        new_bias = weight.new_empty(*new.shape[:-2], 0)
    else:  # what fits best beside the rounded weight
        sums, weights = (sqrt_s * sqrt_s * final).sum(-2), safe_total
        if not free:
            sums, weights = sums + mu_bias.unsqueeze(-1) * old_bias, weights + t_bias
        new_bias = (sums / weights.unsqueeze(-1)).to(bias.dtype)
        final = final - new_bias.to(torch.float64).unsqueeze(-2)
    weighted = sqrt_s * final
    loss = (weighted * weighted).sum((-2, -1)) / scale
    grad_features = (-2 / scale[..., None, None]) * sqrt_s * weighted @ new.to(torch.float64)

    bad_penalty = ~((lam >= 0) & lam.isfinite())
    if ridge is not None:
        bad_penalty = bad_penalty | ~((ridge >= 0) & ridge.isfinite())
    if lam_diag is not None:
        per_feature = (lam_diag >= 0) & lam_diag.isfinite() & (t > 0)
        bad_penalty = bad_penalty | ~per_feature.all(-1)
        if bias is not None and not free:
            bad_penalty = bad_penalty | ~(t_bias > 0)
    finite = new.isfinite().all(-1).all(-1) & new_bias.isfinite().all(-1)
    info = torch.where((info == 0) & ~finite, 1, info)  # finite data that overflow
    info = data_info(info, features, target, weight, bias)
    if sample_weight is not None:
        good = (sample_weight >= 0) & sample_weight.isfinite()
        info = torch.where(good.all(-1), info, BAD_SAMPLE_WEIGHT)
    info = torch.where(bad_penalty, BAD_PENALTY, info).to(torch.int32)
    # Failures, and steps without data, leave the head as it was.
    keep = (info != 0) | empty
    new = torch.where(keep[..., None, None], weight, new)
    if bias is not None:
        new_bias = torch.where(keep.unsqueeze(-1), bias, new_bias)
    loss = torch.where(info != 0, torch.nan, torch.where(empty, 0.0, loss)).to(dtype)
    grad_features = torch.where(keep[..., None, None], 0.0, grad_features).to(features.dtype)
    return new, new_bias, loss, grad_features, info


REFINEMENTS = 2


def _dual_change(
    p: Tensor,
    q: Tensor,
    t: Tensor,
    ones: Tensor | None,
    centred: Tensor | None,
    t_bias: Tensor | None,
    size: Tensor,
) -> tuple[Tensor, Tensor]:
    """W_new - Wa (..., K, D) from the B x B system, of weighted rows p and targets q; and info.

    ones: the weighted column of ones of a penalised bias; centred: that of a free one. t_bias: the penalty of the bias,
    where t is one for each feature. size: the norm of the targets, against which an error counts.
    """
    pe, penalty, ones_scale = p, t[..., 0], torch.ones_like(size)
    if t_bias is not None:
        pe, penalty, ones_scale = p / t.unsqueeze(-2), torch.ones_like(size), 1 / t_bias
        system = pe @ p.mT
    else:
        system = plain_gram(p.mT, None, torch.float64)[0]
    if ones is not None:
        system = system + ones_scale[..., None, None] * (ones @ ones.mT)
    if centred is not None:
        # Centred rows leave this direction to the penalty alone. No right side has a part in it, so that whatever is
        # added there changes nothing but the condition.
        squares = centred.square().sum((-2, -1))
        level = system.diagonal(dim1=-2, dim2=-1).sum(-1) / torch.where(squares > 0, squares, 1.0)
        system = system + level[..., None, None] * (centred @ centred.mT)
    # A row of weight zero has nothing to say; without a penalty its pivot would be zero.
    silent = (p == 0).all(-1) & (q == 0).all(-1) & (penalty.unsqueeze(-1) == 0)
    diagonal = penalty.unsqueeze(-1) + silent.to(torch.float64)
    factor, info = factor_system(system + torch.diag_embed(diagonal.expand(*p.shape[:-1])))
    alpha = torch.zeros_like(q)
    change, missed = alpha.mT @ pe, q
    for _ in range(1 + REFINEMENTS):
        step = cholesky_solve(missed, factor)
        # Not alpha^T P of the whole: it would lose again what a refinement gave back.
        alpha, change = alpha + step, change + step.mT @ pe
        own = q - p @ change.mT
        if ones is not None:
            own = own - ones_scale[..., None, None] * ones @ (ones.mT @ alpha)
        # The residual of the head, which knows what was lost in A^T P, less the one that alpha promises.
        missed = own - penalty[..., None, None] * alpha
    best = penalty * alpha.square().sum((-2, -1)).sqrt()
    return change, or_inaccurate(info, missed.square().sum((-2, -1)).sqrt(), best, size, p.shape[-2])


class Pulled(NamedTuple):
    """What the penalty t of a fitted bias asks of the weight: weight |right / weight - p change|^2 more."""

    p: Tensor
    """``(..., 1, D)``: the mean of the features."""
    weight: Tensor
    """``(..., 1, 1)``: S t / (S + t), S the sum of the row weights."""
    right: Tensor
    """``(..., 1, K)``: that many times the mean residual at the anchor."""


def _primal_change(
    p: Tensor, q: Tensor, t: Tensor, pull: Tensor, pulled: Pulled | None, size: Tensor
) -> tuple[Tensor, Tensor]:
    """The same from the D x D system, of rows that are centred where there is a bias; pull adds to the right side."""
    width = p.shape[-1]
    t = t.expand(*t.shape[:-1], width)
    system = plain_gram(p, None, torch.float64)[0] + torch.diag_embed(t)
    if pulled is not None:
        system = system + pulled.weight * pulled.p.mT @ pulled.p
    factor, info = factor_system(system)
    change = torch.zeros_like(p.mT @ q)
    gain = torch.zeros_like(size)
    for _ in range(1 + REFINEMENTS):
        slope = p.mT @ (q - p @ change) - t.unsqueeze(-1) * change + pull
        if pulled is not None:
            slope = slope + pulled.p.mT @ (pulled.right - pulled.weight * (pulled.p @ change))
        step = cholesky_solve(slope, factor)
        change = change + step
        gain = (slope * step).sum((-2, -1))  # what this step gained, and the next one at most
    best = (q - p @ change).square().sum((-2, -1)).sqrt()
    return change.mT, or_inaccurate(info, gain.abs().sqrt(), best, size, width)


def _fallback_in_place(arguments: ProximalArguments) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias, loss, grad_features, info = _fallback(arguments)
    arguments.weight.copy_(weight)
    if arguments.bias is not None:
        arguments.bias.copy_(bias)
    return loss, grad_features, info


def _fake(arguments: ProximalArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    features, weight, bias = arguments.features, arguments.weight, arguments.bias
    batch = features.shape[:-2]
    dtype = torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
    return (
        weight.new_empty(weight.shape),
        weight.new_empty(*batch, 0) if bias is None else bias.new_empty(bias.shape),
        features.new_empty(batch, dtype=dtype),
        features.new_empty(features.shape),
        features.new_empty(batch, dtype=torch.int32),
    )


_REST = (
    "Tensor lam, Tensor? ridge, Tensor? lam_diag, Tensor? sample_weight, "
    "int reduction, int fit_bias, int method"
)

PROXIMAL_STEP = define_op(
    f"proximal_step(Tensor features, Tensor target, Tensor weight, Tensor? bias, {_REST}) -> "
    "(Tensor weight, Tensor bias, Tensor loss, Tensor grad_features, Tensor info)",
    arguments=ProximalArguments,
    python=_fallback,
    fake=_fake,
    shapes=shapes,
    check=functools.partial(check_options, "proximal_step"),
    derivative=derivative_of(_fallback),
    cuda=(triton("cfl_ops.triton_kernels.proximal:proximal_step"),),
)
PROXIMAL_STEP_ = define_op(
    f"proximal_step_(Tensor features, Tensor target, Tensor(a!) weight, Tensor(b!)? bias, {_REST}) -> "
    "(Tensor loss, Tensor grad_features, Tensor info)",
    arguments=ProximalArguments,
    python=_fallback_in_place,
    fake=lambda arguments: _fake(arguments)[2:],
    shapes=shapes,
    check=functools.partial(check_options, "proximal_step_"),
    as_data=("features",),
    cuda=(triton("cfl_ops.triton_kernels.proximal:proximal_step_"),),
)


@error_message("proximal_step")
def _explain(info: Tensor, context: Sequence[Tensor]) -> Exception:
    index, code, where = first_failure(info)
    features, target, num_classes = context[0][index], context[1][index], context[2].shape[-2]
    prefix = f"cfl_ops.proximal_step: {where}"
    if code > 0:
        reason = (
            "the new weight or bias leaves the range of float16, or the system is singular: centre or scale the "
            "features, keep the head in float32, or use a larger lam"
            if code == 1 and any(part.dtype == torch.float16 for part in context[2:])
            else f"the system is singular (the leading minor of order {code} is not positive definite): rows or "
            "columns of features depend on one another, or their sizes lie too far apart, and the penalty is zero or "
            "too small to tell; centre or scale the features, or use a larger lam"
        )
        error: Exception = LinAlgError(prefix + reason)
        return error
    if code == BAD_PENALTY:
        return ValueError(
            f"{prefix}lam, ridge and lam_diag must be finite and not negative (and with lam_diag, "
            "positive in sum for every feature and a penalized bias)"
        )
    if code == BAD_SAMPLE_WEIGHT:
        return ValueError(f"{prefix}sample_weight must be finite and not negative")
    if code == BAD_WEIGHT:
        return ValueError(f"{prefix}weight or bias has NaN or Inf")
    if code == BAD_FEATURES:
        row = int((~features.isfinite().all(-1)).nonzero()[0])
        return ValueError(f"{prefix}features has NaN or Inf in row {row}")
    if target.is_floating_point():
        bad = (~target.isfinite().all(-1)).nonzero()
        if len(bad) == 0:
            return ValueError(
                f"{prefix}target leaves the range of float32, in which a step of float32 features and heads is taken: "
                "scale it, or pass them as float64"
            )
        return ValueError(f"{prefix}target has NaN or Inf in row {int(bad[0])}")
    row = int(((target < 0) | (target >= num_classes)).nonzero()[0])
    return IndexError(
        f"{prefix}target must hold class indices from 0 to {num_classes - 1} (weight has {num_classes} rows), "
        f"but got {int(target[row])} in row {row}"
    )
