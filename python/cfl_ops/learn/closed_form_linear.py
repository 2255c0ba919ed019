"""A linear head that is solved, not descended: Algorithm 1 of Closed-Form Last Layer Optimization."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfl_ops._core import checks
from cfl_ops._core.deferred import DeferredCheck
from cfl_ops._core.state import StateModule, from_inference_mode, in_inference_mode, makes_state
from cfl_ops.ops.proximal.step import proximal_step_, proximal_step_ex_

__all__ = ["ClosedFormLinear"]

METHODS = ("proximal", "ridge")
CHECKS = ("now", "next")
NAME = "learn.ClosedFormLinear"
STEP_BEFORE = "It was the step before this one that failed; it left the head as it was."


# Standard deviation of the initial weight, of in_features D and out_features K.
INITS = {
    "zeros": lambda d, k: 0.0,
    "lecun": lambda d, k: math.sqrt(1 / d),
    "xavier": lambda d, k: math.sqrt(2 / (d + k)),
    "he": lambda d, k: math.sqrt(2 / d),
}


def _as_rows(value: Tensor, core: int) -> Tensor:
    """All dimensions but the last ``core`` as one; a reshape that changes nothing would cost 2 us."""
    leading = value.ndim - core
    if leading == 1:
        return value
    return value.unsqueeze(0) if leading < 1 else value.flatten(0, leading - 1)


def _check_rows(name: str, value: Any, core: int, features: Tensor) -> None:
    """Rows are flattened, as those of ``features`` are: in the same order only where they lie in the same shape."""
    if not isinstance(value, Tensor):
        checks.tensor(NAME, name, value, core)
    mine, theirs = value.shape[: value.ndim - core], features.shape[:-1]
    if len(mine) > 1 and len(theirs) > 1 and mine != theirs:
        raise ValueError(
            f"cfl_ops.{NAME}: {name} must lie in the rows of features, {tuple(theirs)} or flat, but got shape "
            f"{tuple(value.shape)}"
        )


class ClosedFormLinear(StateModule):
    r"""``nn.Linear`` whose weight and bias are set by a closed-form step on each batch.

    Algorithm 1 of the paper is one forward and one backward through the backbone for each batch, with any
    optimiser for the backbone::

        for x, y in loader:
            features = backbone(x)
            loss = head.step(features, y)  # solves the head, then features.backward(...)
            optimizer.step()  # the backbone's parameters only
            optimizer.zero_grad()

    The parameters have ``requires_grad=False``, so an optimiser passes over them, and the state_dict is that
    of ``nn.Linear``; one that does not fit leaves them as they were. As those of ``nn.Linear`` they follow
    ``parent.to(dtype)``; a step computes in float32 or wider and rounds to their dtype (on features with a large mean
    half precision costs much of the loss: centre them, or keep the head in float32). A head that was made
    under :func:`torch.inference_mode` can be updated outside it. lam and the other options are plain attributes:
    change ``head.lam`` for a schedule.

    Args:
        in_features: D, the width of the features.
        out_features: K, targets or classes.
        lam: the proximal coefficient (``method="proximal"``), or the ridge coefficient (``method="ridge"``).
        bias: whether there is a bias.
        method: ``"proximal"`` stays near the last head (Eq. 13-15); ``"ridge"`` forgets it (Eq. 10-12).
        ridge: a ridge coefficient beside the proximal one.
        relative: multiply lam and ridge by trace(Phi^T Phi) / (B D), the mean square of the features, so that
            they do not depend on the features' scale.
        reduction: ``"mean"`` or ``"sum"``, see :func:`cfl_ops.proximal_step`.
        fit_bias: ``"penalized"`` or ``"free"``, likewise.
        init: ``"zeros"`` (the paper's choice with SGD), ``"lecun"`` (with Adam), ``"xavier"`` or ``"he"``: a
            normal distribution; the bias starts at zero.
        check: when bad data raise. ``"now"``: in the step that meets them, which synchronises a GPU in each
            step. ``"next"``: in the next step, or in :meth:`check`, so that the host runs ahead as it does
            with a gradient head; the step that failed left the head as it was and gave the backbone a gradient
            of zero.
        device, dtype: of the parameters.

    Example:
        >>> import torch
        >>> from cfl_ops.learn import ClosedFormLinear
        >>> backbone, head = torch.nn.Linear(4, 8), ClosedFormLinear(8, 3, lam=0.1)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> loss = head.step(backbone(x), y)
        >>> backbone.weight.grad.shape, head(backbone(x)).shape
        (torch.Size([8, 4]), torch.Size([16, 3]))

    """

    @makes_state
    def __init__(
        self,
        in_features: int,
        out_features: int,
        lam: float | Tensor = 1.0,
        bias: bool = True,
        method: str = "proximal",
        *,
        ridge: float | Tensor = 0.0,
        relative: bool = False,
        reduction: str = "mean",
        fit_bias: str = "penalized",
        init: str = "zeros",
        check: str = "now",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.choice(NAME, "method", method, METHODS)
        checks.choice(NAME, "init", init, tuple(INITS))
        checks.choice(NAME, "check", check, CHECKS)
        self.in_features = checks.integer(NAME, "in_features", in_features, 0)
        self.out_features = checks.integer(NAME, "out_features", out_features, 0)
        self.lam, self.ridge = checks.penalty(NAME, "lam", lam), checks.penalty(NAME, "ridge", ridge)
        self.relative = checks.flag(NAME, "relative", relative)
        self.method, self.reduction, self.fit_bias, self.init = method, reduction, fit_bias, init
        self.check_when = check
        self._outcome: DeferredCheck | None = None
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype), requires_grad=False
        )
        if checks.flag(NAME, "bias", bias):
            self.bias = nn.Parameter(
                torch.empty(out_features, device=device, dtype=dtype), requires_grad=False
            )
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial weight again; the bias becomes zero."""
        with torch.no_grad():
            if self.init == "zeros" or self.weight.numel() == 0:
                self.weight.zero_()
            else:
                self.weight.normal_(std=INITS[self.init](self.in_features, self.out_features))
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """The prediction ``features W^T + b`` of the present head."""
        return F.linear(features, self.weight, self.bias)

    def update(
        self, features: Tensor, target: Tensor, *, sample_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Solve the head on this batch, and leave the backward pass to the caller.

        Args:
            features: ``(..., D)``; all dimensions but the last are rows.
            target: ``(..., K)`` floating point, or class indices ``(...)`` int64; its rows may be flat.
            sample_weight: ``(...)`` weights of the rows, which may be flat, too.

        Returns:
            ``(loss, grad_features)``: the loss at the new head, and its gradient for the features, in their
            shape: ``features.backward(grad_features)``.

        """
        if in_inference_mode():
            return self._update_as_state(features, target, sample_weight)
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)  # as torch.no_grad(), which costs 3 us
        try:
            return self._update(features, target, sample_weight)
        finally:
            torch._C._set_grad_enabled(enabled)

    @makes_state
    def _update_as_state(self, *args: Any) -> tuple[Tensor, Tensor]:
        return self._update(*args)

    def _update(
        self, features: Tensor, target: Tensor, sample_weight: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        checks.floating(NAME, "features", features, 1)
        checks.size(NAME, "features", features, -1, self.in_features, "the head's in_features")
        core = 0 if isinstance(target, Tensor) and target.dtype == torch.int64 else 1
        _check_rows("target", target, core, features)
        if sample_weight is not None:
            _check_rows("sample_weight", sample_weight, 0, features)
        rows = _as_rows(features.detach(), 1)
        target = _as_rows(target, core)
        lam, ridge = self.lam, self.ridge
        if self.relative or self.method == "ridge":  # they are more than passed on, and may have been set
            lam, ridge = checks.penalty(NAME, "lam", lam), checks.penalty(NAME, "ridge", ridge)
        if self.relative:
            mean_square = rows.double().square().mean() if rows.numel() else torch.tensor(1.0)
            lam, ridge = lam * mean_square, ridge * mean_square
        if self.method == "ridge":
            lam, ridge = 0.0, lam + ridge
        self.check()
        weight: Tensor | None = self._parameters.get("weight")
        if weight is not None and from_inference_mode(weight):
            self._make_normal()
            weight = self._parameters["weight"]
        if weight is None:
            raise RuntimeError(
                f"cfl_ops.{NAME}: weight must be a parameter of the head, which a step sets, but it is computed from "
                "others (torch.nn.utils.parametrize, prune)"
            )
        arguments = (rows, target, weight, self.bias)
        options: dict[str, Any] = {
            "lam": lam, "ridge": ridge, "reduction": self.reduction, "fit_bias": self.fit_bias,
            "sample_weight": None if sample_weight is None else sample_weight.reshape(-1),
        }  # fmt: skip
        if self.check_when == "now" or torch.compiler.is_compiling():
            loss, grad_features = proximal_step_(*arguments, **options)
        else:
            (loss, grad_features), info = proximal_step_ex_(*arguments, **options)
            if self._outcome is None:
                self._outcome = DeferredCheck("proximal_step", STEP_BEFORE)
            self._outcome.defer(info, lambda: (rows, target, weight))
        return loss, grad_features if features.ndim == 2 else grad_features.reshape(features.shape)

    def check(self) -> None:
        """With ``check="next"``: raise now if the last step failed. Waits for a GPU to have done that step."""
        if self._outcome is not None:
            self._outcome.check()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: not the outcome of a step on its way."""
        return {**self.__dict__, "_outcome": None}

    def step(self, features: Tensor, target: Tensor, *, sample_weight: Tensor | None = None) -> Tensor:
        """Solve the head on this batch, then backpropagate its gradient into what made the features.

        Takes what :meth:`update` takes, and returns the loss at the new head, without a graph.
        Not under ``fullgraph=True`` nor ``torch.export``: it calls backward; use :meth:`update` there.
        """
        loss, grad_features = self.update(features, target, sample_weight=sample_weight)
        if features.requires_grad:
            features.backward(grad_features)
        return loss

    def extra_repr(self) -> str:
        """The options, for ``repr``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, lam={self.lam}, "
            f"bias={self.bias is not None}, method={self.method!r}"
        )
