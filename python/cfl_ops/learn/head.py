"""What all solved heads share: a batch as rows, the loss with its gradient, and how they meet autograd."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from cfl_ops._core import checks
from cfl_ops._core.handover import backward
from cfl_ops._core.state import StateModule, in_inference_mode, makes_state

__all__ = ["Batch", "Head", "as_batch", "squared_loss"]

METHODS = ("proximal", "ridge", "ema_ridge")
CHECKS = ("now", "next", "skip")
ABOUT_CLASSES = (
    "int64 targets are classes: those of a regression must be floating point; ignore_index= of a ClosedFormLinear "
    "leaves rows of one class out."
)


class Batch(NamedTuple):
    """A batch as rows, without a graph."""

    features: Tensor
    """``(B, D)``."""
    target: Tensor
    """``(B, K)`` floating point, or classes ``(B,)`` int64."""
    sample_weight: Tensor | None
    """``(B,)``."""
    wide: bool = False
    """Whether features in half precision are to be computed with, and their gradient given, in float32."""

    def widened(self) -> Batch:
        """The batch to compute with (rows travel between processes as they are)."""
        if not self.wide or self.features.dtype not in (torch.float16, torch.bfloat16):
            return self
        return self._replace(features=self.features.float())

    @property
    def classes(self) -> bool:
        """Whether the targets are class indices."""
        return self.target.dtype is torch.int64


class Head(StateModule):
    """A linear head whose weight and bias are solved for, not descended; what a training loop calls.

    A subclass solves: it has :meth:`_solve` and :meth:`_evaluate`, of a batch of rows.
    """

    in_features: int
    out_features: int
    name: str
    """That of error messages."""
    process_group: Any = None
    """Over which processes a batch is spread; ``"auto"``: all, where a default group is initialised."""
    feature_dim: int = -1
    ignore_index: int | None = None

    def _solve(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Set the head; the loss at the new one and its gradient for the rows."""
        raise NotImplementedError

    def _evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss at the present head and its gradient for the rows."""
        raise NotImplementedError

    def _is_skipped(self, loss: Tensor, features: Tensor) -> bool:
        """Whether this loss is that of a bad batch, whose zero gradient would become NaN among NaN activations."""
        return False

    def _is_idle(self) -> bool:
        """Whether it is zero, and has not been solved yet."""
        return False

    def _rows(self, features: Any, target: Any, sample_weight: Any, together: bool) -> Batch:
        """The batch as rows; raises for what does not fit. together: other processes wait for this one's rows."""
        batch = as_batch(
            self.name,
            features,
            target,
            sample_weight,
            self.in_features,
            self.feature_dim,
            self.out_features == 1,
        )
        rows, shape = batch.features.shape[0], batch.target.shape
        if shape != ((rows,) if batch.classes else (rows, self.out_features)):
            raise _misfit(self.name, features, target, self.out_features)
        if batch.sample_weight is not None:
            checks.sample_weight(self.name, batch.sample_weight, rows, "the rows of features")
        return batch if self.ignore_index is None or not batch.classes else self._without_ignored(batch)

    def _without_ignored(self, batch: Batch) -> Batch:
        """Rows of ``ignore_index`` with the class 0 and the weight 0."""
        rows, target, weight, _ = batch
        ignored: Tensor = target == self.ignore_index  # type: ignore[assignment]
        if weight is None:
            dtype = torch.promote_types(rows.dtype, torch.float32)
            weight = torch.ones(target.shape, dtype=dtype, device=target.device)
        return Batch(rows, torch.where(ignored, 0, target), torch.where(ignored, 0.0, weight))

    def update(
        self, features: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Solve the head on this batch, and leave the backward pass to the caller.

        Args:
            features: ``(..., D)``; all dimensions but the last (or ``feature_dim``) are rows.
            target: ``(..., K)`` floating point, or class indices ``(...)`` int64; its rows may be flat.
            sample_weight: ``(...)`` weights of the rows, which may be flat, too.

        Returns:
            ``(loss, grad_features)``: the loss at the new head, and its gradient for the features, in their
            shape and dtype: ``features.backward(grad_features)``.

        """
        if in_inference_mode():
            return self._as_state(features, target, sample_weight)
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # as torch.no_grad(), which costs 3 us
        try:
            return self._run(features, target, sample_weight)
        finally:
            torch._C._set_grad_enabled(enabled)

    def _run(
        self,
        features: Tensor,
        target: Tensor,
        sample_weight: Tensor | None,
        wide: bool = False,
        solve: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """The loss, and its gradient in the shape of the features; wide: in float32 for those in half precision."""
        if solve and not is_compiling() and torch._C._current_graph_task_id() >= 0:
            raise RuntimeError(
                f"cfl_ops.{self.name}: was called within a backward pass, where activation checkpointing runs a "
                "forward again and would solve the head twice: keep the head out of the checkpointed part"
            )
        batch = self._rows(features, target, sample_weight, solve or self.training)
        if wide:
            batch = batch._replace(wide=True)
        loss, grad = self._solve(batch) if solve else self._evaluate(batch)
        if features.ndim == 2:
            return loss, grad
        if self.feature_dim in (-1, features.ndim - 1):
            return loss, grad.reshape(features.shape)
        moved = features.movedim(self.feature_dim, -1).shape
        return loss, grad.reshape(moved).movedim(-1, self.feature_dim)

    @makes_state
    def _as_state(self, *args: Any) -> tuple[Tensor, Tensor]:
        return self._run(*args)

    def step(self, features: Tensor, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """Solve the head on this batch, then backpropagate its gradient into what made the features.

        Takes what :meth:`update` takes, and returns the loss at the new head, without a graph. It solves in eval mode,
        too. Not under ``fullgraph=True`` nor ``torch.export``: it calls backward, so that compiled steps, and loss
        scaling, need :meth:`loss`.
        """
        loss, grad_features = self.update(features, target, sample_weight=sample_weight)
        if features.requires_grad and not self._is_skipped(loss, features):
            backward(features, grad_features)
        return loss

    def loss(
        self,
        features: Tensor,
        target: Tensor,
        *,
        sample_weight: Tensor | None = None,
        solve: bool | None = None,
    ) -> Tensor:
        """The loss for a training loop: ``loss.backward()`` gives the features their gradient.

        In train mode it solves the head on the batch first, and is the loss at the new head. In eval mode it is the
        loss at the present head. It stands where ``F.cross_entropy(head(features), target)`` stood: it can be scaled
        (AMP), added to other losses, averaged by DDP, and compiled with the backbone in one graph. Where
        ``head(features)`` takes part in another loss, call it after this: a solve writes to the head in place.

        Args:
            features, target, sample_weight: as for :meth:`update`.
            solve: whether to solve, whatever the mode.

        Raises:
            RuntimeError: it is called within a backward pass, as activation checkpointing does.

        """
        solve = self.training if solve is None else checks.flag(self.name, "solve", solve)
        if in_inference_mode():
            return self._as_state(features, target, sample_weight, True, solve)[0]
        if not torch.is_grad_enabled():
            return self._run(features, target, sample_weight, True, solve)[0]
        with torch.no_grad():
            loss, grad = self._run(features, target, sample_weight, True, solve)
        if not solve and not self.training and not is_compiling() and self._is_idle():
            warnings.warn(
                f"cfl_ops.{self.name}: a loss in eval mode does not solve the head, which is still zero: nothing is "
                "trained. Call head.train() (a backbone may stay in eval mode)",
                stacklevel=2,
            )
        if self._is_skipped(loss, features) or not features.requires_grad:
            return loss.requires_grad_()  # a leaf: its backward pass reaches nothing, a frozen backbone say
        out: Tensor = _WithGradient.apply(features, (loss, grad))  # type: ignore[no-untyped-call]
        return out


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient for the features is known."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, known: tuple[Tensor, Tensor]) -> Tensor:
        loss, ctx.gradient = known  # of which autograd need not know: nobody writes to it
        ctx.dtype = features.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor, None]:
        gradient: Tensor = ctx.gradient
        if not is_compiling():
            if torch.is_grad_enabled():
                raise RuntimeError(
                    "cfl_ops.learn: the loss of a solved head has no second derivative (create_graph=True): a penalty "
                    "on the gradient would lose the head's part of it; use F.mse_loss(head(features), target) for that"
                )
            if scale.is_cpu and scale.item() == 1 and gradient.dtype == ctx.dtype:
                return gradient, None
        # In float32 until it is scaled: what float16 could not hold is what loss scaling is for.
        return (gradient * scale).to(ctx.dtype), None


def as_batch(
    name: str,
    features: Any,
    target: Any,
    sample_weight: Any,
    width: int,
    feature_dim: int = -1,
    one_target: bool = False,
) -> Batch:
    """Features, targets and weights of any leading dimensions as rows.

    one_target: a floating-point target may lack the last dimension.
    """
    checks.floating(name, "features", features, 1)
    if isinstance(target, Tensor) and target.dtype is not torch.int64 and target.dtype not in checks.FLOATS:
        raise TypeError(
            f"cfl_ops.{name}: target must be floating point, or int64 class indices, but got {target.dtype}"
        )
    core = 0 if isinstance(target, Tensor) and target.dtype is torch.int64 else 1
    if one_target and core and isinstance(target, Tensor) and target.ndim == features.ndim - 1 == 1:
        target = target.unsqueeze(-1)
    if feature_dim != -1 and features.ndim > 1:
        features = _features_last(name, "features", features, feature_dim)
        if core and isinstance(target, Tensor) and target.ndim == features.ndim > 2:
            target = _features_last(name, "target", target, feature_dim)
    checks.size(name, "features", features, -1, width, "the head's in_features")
    _check_rows(name, "target", target, core, features)
    if sample_weight is not None:
        _check_rows(name, "sample_weight", sample_weight, 0, features)
        sample_weight = sample_weight.reshape(-1)
    rows, target = _flat(features.detach(), 1), _flat(target, core)
    return Batch(rows, target, sample_weight)


def _misfit(name: str, features: Tensor, target: Tensor, outputs: int) -> ValueError:
    """For a target of another shape."""
    lead, shape = tuple(features.shape[:-1]), tuple(target.shape)
    dense = (*lead, outputs)
    if target.dtype is torch.int64:
        hint = "; one-hot targets must be floating point" if shape == dense else ""
        return ValueError(
            f"cfl_ops.{name}: target must have shape {lead} (class indices{hint}), but got {shape}"
        )
    return ValueError(
        f"cfl_ops.{name}: target must have shape {dense} (or be int64 class indices), but got {shape}"
    )


def check_classes(name: str, target: Tensor, outputs: int) -> None:
    """Raise for class indices that are none."""
    bad = (target < 0) | (target >= outputs)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        error = IndexError(
            f"cfl_ops.{name}: target must hold class indices from 0 to {outputs - 1}, but got {int(target[row])} in "
            f"row {row}"
        )
        error.add_note(ABOUT_CLASSES)
        raise error


def refuse_bad(name: str, batch: Batch, outputs: int) -> None:
    """Raise for what no solve would take, naming the row."""
    rows, target, weight, _ = batch
    if batch.classes:
        check_classes(name, target, outputs)
    finite = rows.isfinite().all() & (target.isfinite().all() if not batch.classes else True)
    if weight is not None:
        finite &= ((weight >= 0) & weight.isfinite()).all()
    if not bool(finite):
        if weight is not None and bool((weight < 0).any()):
            raise ValueError(f"cfl_ops.{name}: sample_weight must be finite and not negative")
        raise ValueError(f"cfl_ops.{name}: {not_finite(batch)}")


def _features_last(name: str, argument: str, value: Tensor, dim: int) -> Tensor:
    if not -value.ndim <= dim < value.ndim:
        raise ValueError(
            f"cfl_ops.{name}: {argument} must have a dimension {dim} (feature_dim), but got shape {tuple(value.shape)}"
        )
    return value.movedim(dim, -1)


def _flat(value: Tensor, core: int) -> Tensor:
    """All dimensions but the last ``core`` as one; a reshape that changes nothing would cost 2 us."""
    leading = value.ndim - core
    if leading == 1:
        return value
    return value.unsqueeze(0) if leading < 1 else value.flatten(0, leading - 1)


def _check_rows(name: str, argument: str, value: Any, core: int, features: Tensor) -> None:
    """Rows are flattened, as those of ``features`` are: in the same order only where they lie in the same shape."""
    if not isinstance(value, Tensor):
        checks.tensor(name, argument, value, core)
    mine, theirs = value.shape[: value.ndim - core], features.shape[:-1]
    if len(mine) > 1 and len(theirs) > 1 and mine != theirs:
        raise ValueError(
            f"cfl_ops.{name}: {argument} must lie in the rows of features, {tuple(theirs)} or flat, but got shape "
            f"{tuple(value.shape)}"
        )


def squared_loss(
    batch: Batch,
    weight: Tensor,
    bias: Tensor | None,
    *,
    total: Tensor | float | None = None,
    kappa: float = 1.0,
    target_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The squared loss of a head on a batch, and its gradient for the features.

    Args:
        batch: the rows. float64 is computed in float64, all else in float32 (half precision overflows at 256).
        weight: ``(K, D)``.
        bias: ``(K,)`` or None.
        total: what the sum over the rows is divided by; None: their number, or the sum of their weights.
        kappa, target_scale: of Hui and Belkin's loss, see :func:`cfl_ops.rescaled_proximal_step`.

    Returns:
        ``(loss, grad_features)``, the latter in the dtype of the features. A class out of range is no error here.

    """
    if torch._C._is_any_autocast_enabled():  # which would have the products in half precision
        with torch.autocast(batch.features.device.type, enabled=False):
            return squared_loss(batch, weight, bias, total=total, kappa=kappa, target_scale=target_scale)
    batch = batch.widened()
    dtype = torch.float64 if torch.float64 in (batch.features.dtype, weight.dtype) else torch.float32
    weight = weight.to(dtype)
    residual = F.linear(batch.features.to(dtype), weight, None if bias is None else bias.to(dtype))
    factor = None if batch.sample_weight is None else batch.sample_weight.to(dtype).unsqueeze(-1)
    if batch.classes:
        own = batch.target.unsqueeze(-1) == torch.arange(weight.shape[0], device=weight.device)
        residual = residual - target_scale * own.to(dtype)
        if kappa != 1.0:
            square = 1 + (kappa - 1) * own.to(dtype)
            factor = square if factor is None else factor * square
    else:
        residual = residual - batch.target.to(dtype)
    if total is None:
        rows = batch.features.shape[0]
        total = rows if batch.sample_weight is None else batch.sample_weight.sum(dtype=dtype)
        total = (
            torch.clamp(total, min=torch.finfo(dtype).tiny) if isinstance(total, Tensor) else max(1, total)
        )
    weighted = residual if factor is None else factor * residual
    loss = (weighted * residual).sum() / total
    return loss, (weighted @ weight * (2 / total)).to(batch.features.dtype)


def not_finite(batch: Batch) -> str:
    """What of a batch whose loss is not finite has NaN or Inf, and in which row."""
    for name, value in batch._asdict().items():
        if isinstance(value, Tensor) and value.is_floating_point():
            bad = (~value.isfinite()).nonzero()
            if len(bad):
                return f"{name} has NaN or Inf in row {int(bad[0, 0])}"
    return "the head has NaN or Inf, or the squares of the errors overflow"
