"""A linear head that is solved, not descended: Algorithm 1 of Closed-Form Last Layer Optimization."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from cfl_ops._core import checks
from cfl_ops._core.deferred import DeferredCheck
from cfl_ops._core.state import from_inference_mode, makes_state
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.gram.moments import GramMoments
from cfl_ops.ops.proximal.codes import BIAS_FITS, REDUCTIONS
from cfl_ops.ops.proximal.rescaled import rescaled_proximal_step
from cfl_ops.ops.proximal.step import proximal_step, proximal_step_, proximal_step_ex_

from .accumulate import accumulate, solve
from .distributed import Traffic, group_of
from .global_head import solve_together
from .head import ABOUT_CLASSES, CHECKS, METHODS, Batch, Head, check_classes, not_finite, squared_loss
from .head_moments import (
    Penalties,
    as_unit,
    mean_square,
    rows_count,
    rows_mean_square,
    solve_moments,
)
from .refit import refit
from .schedules import LamSchedule, RelativeLam

__all__ = ["ClosedFormLinear"]

NAME = "learn.ClosedFormLinear"
STEP_BEFORE = "It was the step before this one that failed; it left the head as it was."
WORDS = {
    "method": METHODS, "reduction": tuple(REDUCTIONS), "fit_bias": tuple(BIAS_FITS), "check_when": CHECKS,
}  # fmt: skip
TOGETHER = {*WORDS, "kappa", "target_scale", "lam_diag", "relative"}
NO_TRAFFIC = Traffic("none", 0, 0, 0)


# Standard deviation of the initial weight, of in_features D and out_features K.
INITS = {
    "zeros": lambda d, k: 0.0,
    "lecun": lambda d, k: math.sqrt(1 / d),
    "xavier": lambda d, k: math.sqrt(2 / (d + k)),
    "he": lambda d, k: math.sqrt(2 / d),
}


class ClosedFormLinear(Head):
    r"""``nn.Linear`` whose weight and bias are set by a closed-form step on each batch.

    Algorithm 1 of the paper is one forward and one backward through the backbone for each batch, with any
    optimiser for the backbone::

        for x, y in loader:
            loss = head.loss(backbone(x), y)  # solves the head; F.cross_entropy(head(...), y) before
            loss.backward()
            optimizer.step()  # the backbone's parameters only
            optimizer.zero_grad()

    :meth:`step` does the first two lines in one call, a little faster. The parameters have ``requires_grad=False``, so
    an optimiser passes over them, and the state_dict is that
    of ``nn.Linear``; one that does not fit leaves them as they were. As those of ``nn.Linear`` they follow
    ``parent.to(dtype)``; a step computes in float32 or wider and rounds to their dtype (on features with a large mean
    half precision costs much of the loss: centre them, or keep the head in float32). A head that was made
    under :func:`torch.inference_mode` can be updated outside it. lam and the other options are plain attributes:
    change ``head.lam``, or give it a schedule.

    *Several processes.* With ``process_group="auto"`` and an initialised group of several ranks every solve is that of
    the global batch: ranks exchange their rows, or the moments of them, whichever are fewer bytes (:attr:`traffic`).
    All have the same head; the loss is that of the global batch; the features' gradient is scaled by the number of
    ranks, so that the mean which DistributedDataParallel and ``fully_shard`` take is the gradient of that loss. Ranks
    that differ in options raise, all of them; a rank may have no rows. Keep the head out of ``fully_shard``.

    Args:
        in_features: D, the width of the features.
        out_features: K, targets or classes.
        lam: the proximal coefficient (``method="proximal"``), or the ridge coefficient (the other methods): a number,
            a 0-d tensor or a schedule such as :class:`cfl_ops.learn.CosineLam`.
        bias: whether there is a bias.
        method: ``"proximal"`` stays near the last head (Eq. 13-15); ``"ridge"`` forgets it (Eq. 10-12);
            ``"ema_ridge"`` is a moving average of ridge solutions, ``W <- decay W + (1 - decay) W_ridge``, the rival of
            the paper's related work (Barboni et al. 2025), in which head and backbone descend different losses.
        ridge: a ridge coefficient beside the proximal one.
        lam_diag: ``(D,)``, added to lam feature by feature (not for the bias). A buffer: it moves with the module, and
            is in its state_dict.
        relative: multiply lam, lam_diag and ridge by trace(Phi^T Phi) / (B D), the mean square of the features, so that
            they do not depend on the features' scale.
        reduction: ``"mean"`` or ``"sum"``, see :func:`cfl_ops.proximal_step`.
        fit_bias: ``"penalized"`` or ``"free"``, likewise.
        kappa, target_scale: of Hui and Belkin's rescaled loss (Eq. 29-32), for classes: an error in the own class
            counts kappa times, and its target is ``target_scale``. Not with ``lam_diag``, row weights or a free bias.
        decay: of ``"ema_ridge"``, in [0, 1).
        feature_dim: the dimension of the features; 1 for maps ``(B, D, H, W)``, whose points are rows. Targets then
            lie in the points: classes ``(B, H, W)``, or ``(B, K, H, W)``.
        ignore_index: rows of this class take no part.
        init: ``"zeros"`` (the paper's choice with SGD), ``"lecun"`` (with Adam), ``"xavier"`` or ``"he"``: a
            normal distribution; the bias starts at zero.
        check: when bad data raise. ``"now"``: in the step that meets them, which synchronises a GPU in each step.
            ``"next"``: in the next step, or in :meth:`check`, so that the host runs ahead as it does with a
            gradient head; the step that failed left the head as it was, and on a CPU its backward pass does not
            reach the backbone (on a GPU it has a gradient of zero, which is NaN behind NaN activations).
            ``"skip"``: never for what the values are; such a step leaves the head as it was, is counted in
            :attr:`skipped`, has a loss of NaN, and its backward pass does not reach the backbone. (It must where
            several processes wait for each other's gradients, in a compiled graph, and for float16 features, whose
            GradScaler leaves such a step out itself: in the first two look at the loss, and leave out
            ``optimizer.step()``. The running statistics of a BatchNorm have seen the batch all the same.)
        process_group: ``"auto"``, None (each process solves for itself), or a group.
        device, dtype: of the parameters.

    Example:
        >>> import torch
        >>> from cfl_ops.learn import ClosedFormLinear
        >>> backbone, head = torch.nn.Linear(4, 8), ClosedFormLinear(8, 3, lam=0.1)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> loss = head.loss(backbone(x), y)
        >>> loss.backward()
        >>> backbone.weight.grad.shape, head(backbone(x)).shape
        (torch.Size([8, 4]), torch.Size([16, 3]))

    """

    name = NAME
    lam_diag: Tensor | None
    skipped: Tensor
    """How many steps ``check="skip"`` has skipped."""

    @makes_state
    def __init__(
        self,
        in_features: int,
        out_features: int,
        lam: float | Tensor | LamSchedule = 1.0,
        bias: bool = True,
        method: str = "proximal",
        *,
        ridge: float | Tensor = 0.0,
        lam_diag: Tensor | None = None,
        relative: bool = False,
        reduction: str = "mean",
        fit_bias: str = "penalized",
        kappa: float = 1.0,
        target_scale: float = 1.0,
        decay: float = 0.9,
        feature_dim: int = -1,
        ignore_index: int | None = None,
        init: str = "zeros",
        check: str = "now",
        process_group: Any = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.choice(NAME, "method", method, METHODS)
        checks.choice(NAME, "reduction", reduction, tuple(REDUCTIONS))
        checks.choice(NAME, "fit_bias", fit_bias, tuple(BIAS_FITS))
        checks.choice(NAME, "init", init, tuple(INITS))
        checks.choice(NAME, "check", check, CHECKS)
        if isinstance(process_group, str):
            checks.choice(NAME, "process_group", process_group, ("auto",))
        self.in_features = checks.integer(NAME, "in_features", in_features, 0)
        self.out_features = checks.integer(NAME, "out_features", out_features, 0)
        self._complete = False
        self._lam_tensor = torch.zeros((), dtype=torch.float64, device="cpu")
        self.lam = lam
        self.ridge = checks.penalty(NAME, "ridge", ridge)
        self.relative = checks.flag(NAME, "relative", relative)
        self.method, self.reduction, self.fit_bias, self.init = method, reduction, fit_bias, init
        self.kappa = float(checks.number(NAME, "kappa", kappa, checks.POSITIVE))
        self.target_scale = float(checks.number(NAME, "target_scale", target_scale, checks.POSITIVE))
        self.decay = float(checks.number(NAME, "decay", decay, checks.NOT_NEGATIVE))
        if self.decay >= 1:
            raise ValueError(f"cfl_ops.{NAME}: decay must be below 1, but got {decay}")
        self.feature_dim = checks.integer(NAME, "feature_dim", feature_dim)
        self.ignore_index = (
            None if ignore_index is None else checks.integer(NAME, "ignore_index", ignore_index)
        )
        self.check_when, self.process_group = check, process_group
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype), requires_grad=False
        )
        if checks.flag(NAME, "bias", bias):
            self.bias = nn.Parameter(
                torch.empty(out_features, device=device, dtype=dtype), requires_grad=False
            )
        else:
            self.register_parameter("bias", None)
        if lam_diag is not None:
            checks.floating(NAME, "lam_diag", lam_diag, 1)
            checks.size(NAME, "lam_diag", lam_diag, -1, self.in_features, "in_features")
            lam_diag = lam_diag.detach().clone().to(device)
        self.register_buffer("lam_diag", lam_diag)
        self.traffic: Traffic = NO_TRAFFIC
        self._outcome: DeferredCheck | None = None
        self._pending: list[Batch] = []
        self._moments: GramMoments | None = None
        self._agreed = False
        self._solved = False
        self._complete = True
        self._check_options()
        self.reset_parameters()

    def __setattr__(self, name: str, value: Any) -> None:
        """Options may be set at any time: they are checked as those of the constructor are."""
        if name == "lam":  # not registered, a parameter or not
            object.__setattr__(self, name, value)
            return
        if name in WORDS:
            checks.choice(NAME, name, value, WORDS[name])
        elif name == "check":
            raise AttributeError(f"cfl_ops.{NAME}: check is a method; when bad data raise is head.check_when")
        super().__setattr__(name, value)
        if name in TOGETHER and self.__dict__.get("_complete", False):
            self._check_options()

    @property
    def rescaled(self) -> bool:
        """Whether the loss is Hui and Belkin's."""
        return self.kappa != 1.0 or self.target_scale != 1.0

    @property
    def lam(self) -> float | Tensor | LamSchedule:
        """The coefficient; in a graph a number is read from a tensor, so that another one does not recompile."""
        return self._lam

    @lam.setter
    def lam(self, value: float | Tensor | LamSchedule) -> None:
        kind = "schedule"
        if not isinstance(value, LamSchedule):
            value = checks.penalty(NAME, "lam", value)
            kind = "tensor" if isinstance(value, Tensor) else "number"
            if not isinstance(value, Tensor):
                self._lam_tensor.fill_(value)
            elif value.requires_grad:
                raise TypeError(f"cfl_ops.{NAME}: lam must not require grad: a step has no derivative in it")
        self._lam, self._lam_kind = value, kind
        if kind == "schedule" and self.__dict__.get("_complete", False):
            self._check_options()

    def _check_options(self) -> None:
        def refuse(what: str) -> NoReturn:
            raise ValueError(f"cfl_ops.{NAME}: {what}")

        if self.lam_diag is not None and self.method != "proximal":
            refuse(f'lam_diag is for method="proximal", but got {self.method!r}')
        if self.rescaled:
            if self.lam_diag is not None:
                refuse("kappa and target_scale take no lam_diag")
            if self.bias is not None and self.fit_bias == "free":
                refuse("kappa and target_scale take no free bias")
        part: Any = self._lam
        while self.relative and isinstance(part, LamSchedule):
            if isinstance(part, RelativeLam):
                refuse("relative=True and a RelativeLam would both scale lam: use one of them")
            part = getattr(part, "lam", None)
        if self.check_when == "skip" and "skipped" not in self._buffers:
            count = torch.zeros((), dtype=torch.int64, device=self.weight.device)
            self.register_buffer("skipped", count, persistent=False)
        if self.check_when == "next" and (self.rescaled or self.method == "ema_ridge"):
            refuse(
                'check="next" is for the squared loss and the methods "proximal" and "ridge": use "now" or "skip"'
            )

    def reset_parameters(self) -> None:
        """Draw the initial weight again; the bias becomes zero."""
        with torch.no_grad():
            if self.check_when == "skip":
                self.skipped.zero_()
            if self.init == "zeros" or self.weight.numel() == 0:
                self.weight.zero_()
            else:
                self.weight.normal_(std=INITS[self.init](self.in_features, self.out_features))
            if self.bias is not None:
                self.bias.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """The prediction ``features W^T + b`` of the present head; of maps a map. A loss of it trains no head."""
        if not self._solved and self.training and not is_compiling() and features.requires_grad:
            self._warn_if_idle()
        weight, bias = self.weight, self.bias
        if features.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
            # A solve takes them as they are: so does the prediction, in the wider dtype of both.
            dtype = torch.promote_types(features.dtype, weight.dtype)
            features, weight = features.to(dtype), weight.to(dtype)  # type: ignore[assignment]
            bias = None if bias is None else bias.to(dtype)  # type: ignore[assignment]
        if self.feature_dim in (-1, features.ndim - 1):
            return F.linear(features, weight, bias)
        return F.linear(features.movedim(self.feature_dim, -1), weight, bias).movedim(-1, self.feature_dim)

    def _warn_if_idle(self) -> None:
        if torch.is_grad_enabled() and self._is_idle():
            warnings.warn(
                f"cfl_ops.{NAME}: the head is zero until it is solved, and no gradient reaches the features through "
                "it: a loss such as cross_entropy(head(features), y) trains nothing; use head.loss(features, y)",
                stacklevel=4,
            )

    # Solving

    def _solve(self, batch: Batch) -> tuple[Tensor, Tensor]:
        self.check()
        self._own_weight()
        self._solved = True
        group = None if self.process_group is None else group_of(self.process_group)
        if group is None:
            return self._solve_here(batch, *self._penalties(batch))
        return solve_together(self, group, batch, None, solve=True)

    def _rows(self, features: Any, target: Any, sample_weight: Any, together: bool) -> Batch:
        if not together or self.process_group is None:
            return super()._rows(features, target, sample_weight, False)
        group = group_of(self.process_group)
        try:
            batch = super()._rows(features, target, sample_weight, together)
            if group is not None:
                # What an op would refuse here alone must be known before ranks exchange rows.
                self._check_classes(batch)
        except Exception as error:
            if group is not None:
                solve_together(self, group, None, error, solve=True)
            raise
        return batch

    def _penalties(
        self, batch: Batch | None, moments: GramMoments | None = None
    ) -> tuple[Any, Any, Tensor | None]:
        """lam, ridge and lam_diag as the proximal step takes them, for a batch or its moments."""
        # In a graph the number itself would be a constant.
        number = self._lam_kind == "number"
        lam: Any = self._lam_tensor if number and is_compiling() else self._lam
        ridge, diagonal = self.ridge, self.lam_diag

        def square() -> Tensor:
            return mean_square(moments, self.in_features) if moments is not None else rows_mean_square(batch)

        if self._lam_kind == "schedule":
            lam = lam.value(moments.count if moments is not None else rows_count(batch), square)
        if self.relative or self.method != "proximal":  # they are more than passed on, and may have been set
            lam, ridge = checks.penalty(NAME, "lam", lam), checks.penalty(NAME, "ridge", ridge)
        if self.relative:
            scale = as_unit(square())
            lam, ridge = lam * scale, ridge * scale
            diagonal = None if diagonal is None else diagonal * scale
        if self.method != "proximal":
            lam, ridge = 0.0, lam + ridge
        return lam, ridge, diagonal

    def _is_skipped(self, loss: Tensor, features: Tensor) -> bool:
        when = self.check_when
        # What fails later is not waited for on a GPU. GradScaler leaves a step out that has NaN, and needs to see it.
        if (
            when == "now"
            or is_compiling()
            or (when == "next" and loss.is_cuda)
            or features.dtype == torch.float16
        ):
            return False
        # Else DistributedDataParallel waits for a backward pass.
        return bool(loss.isnan()) and group_of(self.process_group) is None

    def _is_idle(self) -> bool:
        if self._solved or bool(self.weight.any()):
            return False
        self._solved = True  # told once
        return True

    def _own_weight(self) -> Tensor:
        weight: Tensor | None = self._parameters.get("weight")
        if weight is not None and from_inference_mode(weight):
            self._make_normal()
            weight = self._parameters["weight"]
        if weight is None:
            raise RuntimeError(
                f"cfl_ops.{NAME}: weight must be a parameter of the head, which a step sets, but it is computed from "
                "others (torch.nn.utils.parametrize, prune), or this is a replica of nn.DataParallel: use "
                "DistributedDataParallel"
            )
        if hasattr(weight, "device_mesh"):
            raise RuntimeError(
                f"cfl_ops.{NAME}: weight is a DTensor: keep the head out of fully_shard (shard the backbone, or use "
                "ignored_params=set(head.parameters())); all ranks solve for the whole head"
            )
        return weight

    def _solve_here(
        self, batch: Batch, lam: Any, ridge: Any, lam_diag: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The solve of this batch alone."""
        if self.rescaled or self.method == "ema_ridge":
            return self._solve_beside(batch, lam, ridge)
        rows, target, sample_weight, _ = batch.widened()
        weight = self._parameters["weight"]
        assert weight is not None
        arguments = (rows, target, weight, self.bias)
        options: dict[str, Any] = {
            "lam": lam, "ridge": ridge, "lam_diag": lam_diag, "reduction": self.reduction, "fit_bias": self.fit_bias,
            "sample_weight": sample_weight,
        }  # fmt: skip
        when = self.check_when
        if when == "now" or (when == "next" and is_compiling()):
            try:
                return proximal_step_(*arguments, **options)
            except IndexError as error:
                if not is_compiling():
                    error.add_note(ABOUT_CLASSES)
                raise
        (loss, grad_features), info = proximal_step_ex_(*arguments, **options)
        if when == "skip":
            self.skipped.add_(info != 0)
            return loss, grad_features
        if self._outcome is None:
            self._outcome = DeferredCheck("proximal_step", STEP_BEFORE)
        self._outcome.defer(info, lambda: (rows, target, weight))
        return loss, grad_features

    def _solve_beside(self, batch: Batch, lam: Any, ridge: Any) -> tuple[Tensor, Tensor]:
        """Steps that are not made in place: of the rescaled loss, and the average of ridge heads."""
        batch = batch.widened()
        rows, target, sample_weight, _ = batch
        weight, bias = self.weight, self.bias
        try:
            if self.rescaled:
                if sample_weight is not None:
                    raise ValueError(
                        f"cfl_ops.{NAME}: kappa and target_scale take no sample_weight or ignore_index"
                    )
                step = rescaled_proximal_step(
                    rows, target, weight, bias, lam=lam, ridge=ridge, kappa=self.kappa,
                    target_scale=self.target_scale, reduction=self.reduction,
                )  # fmt: skip
            else:
                step = proximal_step(
                    rows, target, weight, bias, lam=0.0, ridge=ridge, sample_weight=sample_weight,
                    reduction=self.reduction, fit_bias=self.fit_bias,
                )  # fmt: skip
        except (ValueError, IndexError, LinAlgError):
            if self.check_when != "skip" or is_compiling():
                raise
            return self._skip(rows)
        self._adopt(step.weight, step.bias)
        return self._evaluate_here(batch) if self.method == "ema_ridge" else (step.loss, step.grad_features)

    def _skip(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        self.skipped.add_(1)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        return rows.new_full((), math.nan, dtype=dtype), torch.zeros_like(rows)

    def _adopt(self, weight: Tensor, bias: Tensor | None) -> None:
        """Set the head to a solution; an average moves towards it."""
        for mine, new in ((self.weight, weight), (self.bias, bias)):
            if mine is not None and new is not None:
                new = new.to(torch.promote_types(mine.dtype, new.dtype))
                mine.copy_(
                    torch.lerp(new, mine.to(new.dtype), self.decay) if self.method == "ema_ridge" else new
                )

    def _evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        # An evaluation of one rank alone must not wait for the others.
        group = group_of(self.process_group) if self.training else None
        return (
            self._evaluate_here(batch)
            if group is None
            else solve_together(self, group, batch, None, solve=False)
        )

    def _evaluate_here(self, batch: Batch, total: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check_classes(batch)
        if total is None and self.reduction == "sum":
            total = 1.0
        loss, grad = squared_loss(
            batch, self.weight, self.bias, total=total, kappa=self.kappa, target_scale=self.target_scale
        )
        if self.check_when == "now" and not is_compiling() and not bool(loss.isfinite()):
            raise ValueError(f"cfl_ops.{NAME}: {not_finite(batch)}")
        return loss, grad

    def _check_classes(self, batch: Batch) -> None:
        """Raise for classes that a solve would not take, where the solve is not the first to look at them."""
        if batch.classes and self.check_when == "now" and not is_compiling():
            check_classes(NAME, batch.target, self.out_features)

    def _solve_moments(self, moments: GramMoments) -> None:
        lam, ridge, diagonal = self._penalties(None, moments)
        self._adopt(*solve_moments(
            moments, self.weight, self.bias, Penalties(lam, ridge, diagonal, self.reduction, self.fit_bias)
        ))  # fmt: skip

    def accumulate(self, features: Tensor, target: Tensor, *, sample_weight: Tensor | None = None) -> None:
        """Keep a batch for the next :meth:`solve`, which is then that of all such batches together.

        What is kept are its rows, without their graph, as long as they are fewer bytes than moments in float64; then
        the moments. It is in no state_dict. Takes what :meth:`update` takes. With gradients at the present head, which
        are the same for one large batch and many small ones, this is Algorithm 2 (cached) with accumulation::

            for x, y in parts:
                features = backbone(x)
                (head.loss(features, y, solve=False) / len(parts)).backward()
                head.accumulate(features, y)
            head.solve()
            optimizer.step()

        Algorithm 1 needs the new head before the first backward pass, so a forward pass more: accumulate all parts
        under ``torch.no_grad()``, :meth:`solve`, then a pass with ``head.loss(features, y, solve=False)``.
        """
        accumulate(self, self._rows(features, target, sample_weight, False))

    def discard(self) -> None:
        """Forget what was accumulated."""
        self._pending, self._moments = [], None

    def solve(self) -> Tensor:
        """Solve the head on all batches of :meth:`accumulate`; the loss there, without a graph.

        With nothing accumulated the head stays as it is, and the loss is 0. Over several processes it is all batches of
        all ranks, of which some may have none. Where it raises, what was accumulated is still there (:meth:`discard`
        forgets it).
        """
        return solve(self)

    def refit(
        self,
        loader: Iterable[Any],
        backbone: nn.Module | None = None,
        *,
        lam: float = 1e-3,
        relative: bool = True,
        progress: bool = False,
    ) -> ClosedFormLinear:
        """A head for the present backbone, re-estimated on all batches of a loader; this one stays as it is.

        The paper evaluates either the head as training left it (online), or this one: ridge on the whole training set.
        The batches are streamed into moments in float64; over several processes they are summed. The bias is
        penalised, or free, as this head's is.

        Args:
            loader: yields ``(features, target)``, or ``(x, target)`` with ``backbone``, and a weight of the rows if
                there is a third.
            backbone: is run in eval mode, without gradients, and put back into the mode it was in.
            lam: the ridge coefficient, of the mean loss.
            relative: whether lam is multiplied by the mean square of the features.
            progress: a bar with the time left (needs tqdm).

        Returns:
            A new head. ``head.load_state_dict(new.state_dict())`` adopts it.

        Raises:
            ValueError: no rows came; or a rescaled loss (kappa), which has no moments.

        """
        return refit(self, loader, backbone, lam=lam, relative=relative, progress=progress)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        key = prefix + "lam_diag"
        if self.lam_diag is not None and key not in state_dict:  # of an nn.Linear, say
            state_dict = {**state_dict, key: self.lam_diag}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def check(self) -> None:
        """With ``check="next"``: raise now if the last step failed. Waits for a GPU to have done that step."""
        if self._outcome is not None:
            self._outcome.check()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes along: not the outcome of a step on its way."""
        return {**self.__dict__, "_outcome": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> ClosedFormLinear:
        """A process group is shared with the copy."""
        memo[id(self.process_group)] = self.process_group
        out = type(self).__new__(type(self))
        memo[id(self)] = out
        out.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return out

    def extra_repr(self) -> str:
        """The options that are not the defaults, for ``repr``."""
        plain = {
            "method": "proximal", "ridge": 0.0, "relative": False, "reduction": "mean", "fit_bias": "penalized",
            "kappa": 1.0, "target_scale": 1.0, "feature_dim": -1, "ignore_index": None,
        }  # fmt: skip
        given = {name: getattr(self, name) for name in plain}
        others = [f"{name}={value!r}" for name, value in given.items() if value != plain[name]]
        bias = f"bias={self.bias is not None}"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return ", ".join([sizes, f"lam={self.lam}", bias, *others])
