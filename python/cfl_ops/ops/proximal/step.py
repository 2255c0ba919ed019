"""proximal: the closed-form proximal step of a linear head, through the smaller side of the problem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.batching import expand_batch
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import Derivative, define_op
from cfl_ops._core.results import result_type
from cfl_ops._gpu.launch import triton
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.gram.gram import GRAM
from cfl_ops.ops.proximal.codes import BAD_FEATURES, BAD_PENALTY, BAD_SAMPLE_WEIGHT, BAD_TARGET, BAD_WEIGHT
from cfl_ops.ops.solve.ridge_solve import RIDGE_SOLVE
from cfl_ops.ops.solve.system import on_device

__all__ = [
    "ProximalStep",
    "proximal_step",
    "proximal_step_",
    "proximal_step_ex",
    "proximal_step_ex_",
    "proximal_update",
    "ridge_step",
]

REDUCTIONS = ("mean", "sum")
BIAS_FITS = ("penalized", "free")
METHODS = ("auto", "cholesky", "cg")


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


# --- the op: fallback, fake, derivative ---------------------------------------------------------------------


def _widen(value: Tensor, dims: int) -> Tensor:
    """``value (...)`` with ``dims`` trailing dimensions of size 1, unless it is 0-d."""
    return value[(...,) + (None,) * dims] if value.ndim else value


def _proximal_python(
    features: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lam: Tensor,
    ridge: Tensor | None,
    lam_diag: Tensor | None,
    sample_weight: Tensor | None,
    reduction: str,
    fit_bias: str,
    method: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Solve for the change of the head from its anchor, so that what is small is computed small.

    With mu, t the proximal and the total penalty (sum convention) and the anchor Wa = (mu / t) W, the
    residual R0 = Y - Phi Wa^T is the target of a ridge problem for W_new - Wa (formulas 1.2-1.6). The
    system of the smaller side is formed, factored and solved in float64.
    """
    rows, width = features.shape[-2:]
    dtype = torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
    phi, old = features.to(dtype), weight.to(dtype)
    wide = torch.float64
    lam = on_device(lam, phi)  # a 0-d condition of torch.where on the host would be copied, which waits
    ridge = None if ridge is None else on_device(ridge, phi)
    classes = not target.is_floating_point()

    # Row weights enter as square roots, which allows zeros.
    if sample_weight is None:
        total = phi.new_full(phi.shape[:-2], rows, dtype=wide)
        root = phi.new_ones(*phi.shape[:-1], 1)
    else:
        total = sample_weight.sum(-1, dtype=wide)
        root = sample_weight.to(dtype).sqrt().unsqueeze(-1)
    empty = total == 0
    safe_total = torch.where(empty, 1.0, total)
    scale = safe_total if reduction == "mean" else torch.ones_like(total)

    # Penalties in sum convention: mu pulls to the old head, t = mu + rho is what the system sees.
    mu_bias = scale * lam.to(wide)
    t_bias = mu_bias if ridge is None else mu_bias + scale * ridge.to(wide)
    mu, t = mu_bias.unsqueeze(-1), t_bias.unsqueeze(-1)
    if lam_diag is not None:
        extra = scale.unsqueeze(-1) * lam_diag.to(wide)
        mu, t = mu + extra, t + extra
    shrink = torch.where(t > 0, mu / torch.where(t > 0, t, 1.0), 1.0)
    anchor = old * shrink.unsqueeze(-2).to(dtype)
    free = fit_bias == "free"
    if bias is not None:
        shrink_bias = torch.where(t_bias > 0, mu_bias / torch.where(t_bias > 0, t_bias, 1.0), 1.0)
        anchor_bias = bias.to(dtype) if free else bias.to(dtype) * shrink_bias.unsqueeze(-1).to(dtype)

    prediction = phi @ anchor.mT
    if bias is not None:
        prediction = prediction + anchor_bias.unsqueeze(-2)
    if classes:
        outside = (target < 0) | (target >= weight.shape[-2])
        label = torch.where(outside, 0, target).unsqueeze(-1)
        residual = (-prediction).scatter_add(-1, label, torch.ones_like(prediction[..., :1]))
    else:
        residual = target.to(dtype) - prediction

    if bias is not None and free:  # centring the rows fits the bias without a penalty
        share = (root * root) / safe_total.to(dtype)[..., None, None]
        mean_phi, mean_residual = (share * phi).sum(-2), (share * residual).sum(-2)
        p, q = root * (phi - mean_phi.unsqueeze(-2)), root * (residual - mean_residual.unsqueeze(-2))
    else:
        p, q = root * phi, root * residual
    p64, q64, root64 = p.to(wide), q.to(wide), root.to(wide)
    ones_column = bias is not None and not free

    if rows <= width:  # dual: B x B
        if lam_diag is None:
            pe64, ridge_term, ones_scale = p64, t[..., 0], torch.ones_like(t_bias)
        else:
            pe64, ridge_term = p64 / t.unsqueeze(-2), torch.ones_like(total)
            ones_scale = 1 / t_bias
        system = GRAM(p.mT, None, None, False, 0, wide)[0] if lam_diag is None else pe64 @ p64.mT
        if ones_column:
            system = system + ones_scale[..., None, None] * (root64 @ root64.mT)
        # A row of weight zero has nothing to say; without a penalty its pivot would be zero.
        silent = (root64.squeeze(-1) == 0) & (ridge_term.unsqueeze(-1) == 0)
        diagonal = ridge_term.unsqueeze(-1) + silent.to(wide)
        system = system + torch.diag_embed(diagonal.expand(*p.shape[:-1]))
        alpha, info = RIDGE_SOLVE(system, q64, torch.zeros((), dtype=wide), None)
        change = alpha.mT @ pe64
        scaled_residual = ridge_term[..., None, None] * alpha
        if ones_column:
            change_bias = ones_scale.unsqueeze(-1) * (root64 * alpha).sum(-2)
    else:  # primal: D x D
        moments = GRAM(p, q, None, False, 0, wide)
        system, right = moments[0] + torch.diag_embed(t.expand(*t.shape[:-1], width)), moments[1]
        if ones_column:  # eliminate the column of ones
            pivot = total + t_bias
            safe_pivot = torch.where(pivot > 0, pivot, 1.0)[..., None, None]
            column, ones_right = p64.mT @ root64, q64.mT @ root64
            system = system - column @ column.mT / safe_pivot
            right = right - column @ ones_right.mT / safe_pivot
        solution, info = RIDGE_SOLVE(system, right, torch.zeros((), dtype=wide), None)
        change = solution.mT
        scaled_residual = q64 - p64 @ change.mT
        if ones_column:
            change_bias = ((ones_right - change @ column) / safe_pivot).squeeze(-1)
            scaled_residual = scaled_residual - root64 * change_bias.unsqueeze(-2)

    new = (anchor.to(wide) + change).to(dtype)
    if bias is None:
        new_bias = new.new_empty(*new.shape[:-2], 0)
    elif free:
        # A centred fit passes through the means.
        new_bias = anchor_bias + mean_residual - (change.to(dtype) @ mean_phi.unsqueeze(-1)).squeeze(-1)
    else:
        new_bias = (anchor_bias.to(wide) + change_bias).to(dtype)
    loss = (scaled_residual * scaled_residual).sum((-2, -1)) / scale
    gradient = (-2 / scale[..., None, None]) * root64 * scaled_residual
    grad_features = gradient.to(dtype) @ new

    # Failures, and steps without data, leave the head as it was.
    bad_penalty = ~((lam >= 0) & lam.isfinite())
    if ridge is not None:
        bad_penalty = bad_penalty | ~((ridge >= 0) & ridge.isfinite())
    if lam_diag is not None:
        per_feature = (lam_diag >= 0) & lam_diag.isfinite() & (t > 0)
        bad_penalty = bad_penalty | ~per_feature.all(-1) | (ones_column & ~(t_bias > 0))
    if bias is not None:
        bad_weight = ~(weight.isfinite().all(-1).all(-1) & bias.isfinite().all(-1))
    else:
        bad_weight = ~weight.isfinite().all(-1).all(-1)
    info = torch.where(bad_weight, BAD_WEIGHT, info)
    if classes:
        info = torch.where(outside.any(-1), BAD_TARGET, info)
    else:
        info = torch.where(target.isfinite().all(-1).all(-1), info, BAD_TARGET)
    info = torch.where(features.isfinite().all(-1).all(-1), info, BAD_FEATURES)
    if sample_weight is not None:
        good = (sample_weight >= 0) & sample_weight.isfinite()
        info = torch.where(good.all(-1), info, BAD_SAMPLE_WEIGHT)
    info = torch.where(bad_penalty, BAD_PENALTY, info).to(torch.int32)
    keep = (info != 0) | empty
    new = torch.where(keep[..., None, None], old, new).to(weight.dtype)
    if bias is not None:
        new_bias = torch.where(keep.unsqueeze(-1), bias.to(dtype), new_bias).to(bias.dtype)
    loss = torch.where(info != 0, torch.nan, torch.where(empty, 0.0, loss)).to(dtype)
    grad_features = torch.where(keep[..., None, None], 0.0, grad_features).to(features.dtype)
    return new, new_bias, loss, grad_features, info


def _proximal_fake(
    features: Tensor,
    target: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lam: Tensor,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch = features.shape[:-2]
    dtype = torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
    return (
        weight.new_empty(weight.shape),
        weight.new_empty(*batch, 0) if bias is None else bias.new_empty(bias.shape),
        features.new_empty(batch, dtype=dtype),
        features.new_empty(features.shape),
        features.new_empty(batch, dtype=torch.int32),
    )


def _proximal_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8])
    ctx.options = inputs[8:]
    if isinstance(ctx, torch.autograd.function.FunctionCtx):
        ctx.mark_non_differentiable(output[4])


def _proximal_backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """The derivative of the fallback, which is made of differentiable torch ops (so twice, too)."""
    saved = ctx.saved_tensors
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[:8]) if needed]

    def outputs(*varied: Tensor) -> tuple[Tensor, ...]:
        inputs = list(saved)
        for position, value in zip(wanted, varied, strict=True):
            inputs[position] = value
        return _proximal_python(*inputs, *ctx.options)[:4]

    primals, pullback = torch.func.vjp(outputs, *(saved[i] for i in wanted))  # type: ignore[misc]
    cotangents = tuple(
        torch.zeros_like(primal) if grad is None else grad
        for primal, grad in zip(primals, grads[:4], strict=True)
    )
    result: list[Any] = [None] * 11
    for position, grad in zip(wanted, pullback(cotangents), strict=True):
        result[position] = grad
    return tuple(result)


def _proximal_python_(
    features: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor]:
    new, new_bias, loss, grad_features, info = _proximal_python(features, target, weight, bias, *others)
    weight.copy_(new)
    if bias is not None:
        bias.copy_(new_bias)
    return loss, grad_features, info


def _core_dims(args: Sequence[Any]) -> Sequence[int | None]:
    return (2, 2 if args[1].is_floating_point() else 1, 2, 1, 0, 0, 1, 1, None, None, None)


_REST = (
    "Tensor lam, Tensor? ridge, Tensor? lam_diag, Tensor? sample_weight, "
    "str reduction, str fit_bias, str method"
)

PROXIMAL_STEP = define_op(
    f"proximal_step(Tensor features, Tensor target, Tensor weight, Tensor? bias, {_REST}) -> "
    "(Tensor weight, Tensor bias, Tensor loss, Tensor grad_features, Tensor info)",
    python=_proximal_python,
    fake=_proximal_fake,
    core_dims=_core_dims,
    derivative=Derivative(_proximal_setup_context, _proximal_backward),
    cuda=(triton("cfl_ops.triton_kernels.proximal:proximal_step"),),
)
PROXIMAL_STEP_ = define_op(
    f"proximal_step_(Tensor features, Tensor target, Tensor(a!) weight, Tensor(b!)? bias, {_REST}) -> "
    "(Tensor loss, Tensor grad_features, Tensor info)",
    python=_proximal_python_,
    fake=lambda *args: _proximal_fake(*args)[2:],
    core_dims=_core_dims,
    cuda=(triton("cfl_ops.triton_kernels.proximal:proximal_step_"),),
)


@error_message("proximal_step")
def _explain(info: Tensor, context: Sequence[Tensor]) -> Exception:
    index, code, where = first_failure(info)
    features, target = context[0][index], context[1][index]
    prefix = f"cfl_ops.proximal_step: {where}"
    if code > 0:
        error: Exception = LinAlgError(
            f"{prefix}the system is singular (the leading minor of order {code} is not positive definite): "
            "rows or columns of features depend on one another and the penalty is zero or too small to tell; "
            "use a larger lam"
        )
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
        row = int((~target.isfinite().all(-1)).nonzero()[0])
        return ValueError(f"{prefix}target has NaN or Inf in row {row}")
    num_classes = int(context[2])
    row = int(((target < 0) | (target >= num_classes)).nonzero()[0])
    return IndexError(
        f"{prefix}target must hold class indices from 0 to {num_classes - 1} (weight has {num_classes} rows), "
        f"but got {int(target[row])} in row {row}"
    )


# --- the public functions -----------------------------------------------------------------------------------


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
        torch.linalg.LinAlgError: the system is singular, which takes a penalty of (nearly) zero.

    Half-precision features are computed with in float32; float32 systems are factored in a precision that
    resolves the penalty. Costs ``2 (3 B D K + B^2 D / 2) + B^3 / 3`` FLOPs for B < D, else
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
    step, info = _step("proximal_step", features, target, weight, bias, lam, ridge, lam_diag, reduction,
                       sample_weight, fit_bias, method)  # fmt: skip
    _raise(info, [t for t in step if t is not None], features, target, weight)
    return step


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
    return _step("proximal_step_ex", features, target, weight, bias, lam, ridge, lam_diag, reduction,
                 sample_weight, fit_bias, method)  # fmt: skip


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
        ``(loss, grad_features)``. When it raises, weight and bias are unchanged. Takes no part in autograd.

    Example:
        >>> import torch, cfl_ops
        >>> weight = torch.zeros(1, 2)
        >>> loss, grad = cfl_ops.proximal_step_(torch.eye(2), torch.ones(2, 1), weight, lam=0.5)
        >>> weight
        tensor([[0.5000, 0.5000]])

    """
    (loss, grad_features), info = _step_("proximal_step_", features, target, weight, bias, lam, ridge, lam_diag,
                                         reduction, sample_weight, fit_bias, method)  # fmt: skip
    _raise(info, [loss, grad_features], features, target, weight)
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
    return _step_("proximal_step_ex_", features, target, weight, bias, lam, ridge, lam_diag, reduction,
                  sample_weight, fit_bias, method)  # fmt: skip


def proximal_update(
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
) -> tuple[Tensor, Tensor | None]:
    """The new ``(weight, bias)`` of :func:`proximal_step`, for those who need no gradient.

    Example:
        >>> import torch, cfl_ops
        >>> weight, bias = cfl_ops.proximal_update(torch.eye(2), torch.ones(2, 1), torch.zeros(1, 2), lam=0.5)
        >>> weight
        tensor([[0.5000, 0.5000]])

    """
    step, info = _step("proximal_update", features, target, weight, bias, lam, ridge, lam_diag, reduction,
                       sample_weight, fit_bias, method)  # fmt: skip
    _raise(info, [t for t in step if t is not None], features, target, weight)
    return step.weight, step.bias


def ridge_step(
    features: Tensor,
    target: Tensor,
    num_classes: int | None = None,
    *,
    lam: float | Tensor,
    bias: bool = True,
    reduction: str = "mean",
    sample_weight: Tensor | None = None,
    fit_bias: str = "penalized",
    method: str = "auto",
) -> ProximalStep:
    """The ridge head of this batch alone (Eq. 1-2, 10-12): a step without memory of an earlier head.

    Args:
        features: ``(..., B, D)``.
        target: ``(..., B, K)``, or class indices ``(..., B)`` int64 with ``num_classes``.
        num_classes: K for class indices.
        lam: the ridge coefficient, in the convention of ``reduction``.
        bias: whether to fit a bias.
        reduction, sample_weight, fit_bias, method: as in :func:`proximal_step`.

    Returns:
        :class:`ProximalStep`.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.ridge_step(torch.eye(2), torch.tensor([0, 1]), 2, lam=0.5, bias=False).weight
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]])

    """
    checks.floating("ridge_step", "features", features, 2)
    checks.tensor("ridge_step", "target", target, 1)
    if target.dtype == torch.int64:
        if num_classes is None:
            raise TypeError("cfl_ops.ridge_step: target of class indices (int64) needs num_classes")
        outputs = num_classes
    else:
        checks.floating("ridge_step", "target", target, 2)
        outputs = target.shape[-1]
    dtype = features.dtype if features.dtype == torch.float64 else torch.float32
    weight = features.new_zeros(*features.shape[:-2], outputs, features.shape[-1], dtype=dtype)
    zero_bias = weight.new_zeros(weight.shape[:-1]) if bias else None
    step, info = _step("ridge_step", features, target, weight, zero_bias, 0.0, lam, None, reduction,
                       sample_weight, fit_bias, method)  # fmt: skip
    _raise(info, [t for t in step if t is not None], features, target, weight)
    return step


def _step(op: str, *args: Any) -> tuple[ProximalStep, Tensor]:
    arguments = _arguments(op, *args, in_place=False)
    weight, bias, loss, grad_features, info = PROXIMAL_STEP(*arguments)
    return ProximalStep(weight, None if arguments[3] is None else bias, loss, grad_features), info


def _step_(op: str, *args: Any) -> tuple[tuple[Tensor, Tensor], Tensor]:
    arguments = _arguments(op, *args, in_place=True)
    loss, grad_features, info = PROXIMAL_STEP_(*arguments)
    return (loss, grad_features), info


def _raise(info: Tensor, results: Sequence[Tensor], features: Tensor, target: Tensor, weight: Tensor) -> None:
    check_info("proximal_step", info, results, [features, target, torch.tensor(weight.shape[-2])])


def _arguments(
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
    in_place: bool,
) -> list[Any]:
    """Check the arguments, and bring them to the form the op takes."""
    checks.choice(op, "reduction", reduction, REDUCTIONS)
    checks.choice(op, "fit_bias", fit_bias, BIAS_FITS)
    checks.choice(op, "method", method, METHODS)
    checks.floating(op, "features", features, 2)
    checks.floating(op, "weight", weight, 2)
    checks.size(op, "weight", weight, -1, features.shape[-1], "the width of features")
    checks.tensor(op, "target", target, 1)
    if target.dtype == torch.int64:
        target_dims = 1
        checks.size(op, "target", target, -1, features.shape[-2], "the rows of features")
    else:
        target_dims = 2
        if target.dtype not in checks.FLOATS:
            raise TypeError(
                f"cfl_ops.{op}: target must be floating point, or int64 class indices, but got {target.dtype}"
            )
        checks.floating(op, "target", target, 2)
        checks.size(op, "target", target, -2, features.shape[-2], "the rows of features")
        checks.size(op, "target", target, -1, weight.shape[-2], "the rows of weight")
    if bias is not None:
        checks.floating(op, "bias", bias, 1)
        checks.size(op, "bias", bias, -1, weight.shape[-2], "the rows of weight")
    if lam_diag is not None:
        checks.floating(op, "lam_diag", lam_diag, 1)
        checks.size(op, "lam_diag", lam_diag, -1, features.shape[-1], "the width of features")
    if sample_weight is not None:
        checks.sample_weight(op, sample_weight, features.shape[-2], "the rows of features")
    checks.same_device(op, "features", features, target=target, weight=weight, bias=bias, lam_diag=lam_diag,
                        sample_weight=sample_weight)  # fmt: skip
    lam = checks.coefficient(op, "lam", lam, features.device)
    no_ridge = isinstance(ridge, int | float) and ridge == 0
    beta = None if no_ridge else checks.coefficient(op, "ridge", ridge, features.device)
    args = [features, target, weight, bias, lam, beta, lam_diag, sample_weight]
    core_dims = (2, target_dims, 2, 1, 0, 0, 1, 1)
    if any(arg is not None and arg.ndim > core for arg, core in zip(args, core_dims, strict=True)):
        args = _expand(op, args, core_dims, in_place)
    return [*args, reduction, fit_bias, method]


def _expand(op: str, args: list[Any], core_dims: Sequence[int], in_place: bool) -> list[Any]:
    names = ("features", "target", "weight", "bias", "lam", "ridge", "lam_diag", "sample_weight")
    batch = checks.broadcastable(
        op,
        **{
            name: arg.shape[: arg.ndim - core]
            for name, arg, core in zip(names, args, core_dims, strict=True)
            if arg is not None
        },
    )
    for name, arg, core in zip(names[2:4], args[2:4], core_dims[2:4], strict=True):
        if in_place and arg is not None and arg.shape[: arg.ndim - core] != batch:
            raise ValueError(
                f"cfl_ops.{op}: {name} must have the batch shape {tuple(batch)} to be updated in place, "
                f"but got shape {tuple(arg.shape)}"
            )
    return expand_batch(args, core_dims, batch)
