"""RecursiveRidge: ridge regression that follows a stream, exactly, one block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cfl_ops._core import checks
from cfl_ops._core.failures import check_info, error_message
from cfl_ops._core.op import transforming
from cfl_ops._core.results import public
from cfl_ops._core.state import PreciseModule, from_inference_mode, makes_state
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.cholesky.codes import BAD_STATE, BAD_WEIGHT, LOSSY, TOO_LARGE, UNKNOWN_ROWS
from cfl_ops.ops.cholesky.recursive_rows import RECURSIVE_RIDGE_

__all__ = ["RecursiveRidge"]


@public
class RecursiveRidge(PreciseModule):
    r"""Recursive least squares with a ridge, which is the full-covariance Kalman filter of a linear head.

    .. math::
        \Lambda \leftarrow \rho \Lambda + \sum_n s_n x_n x_n^T, \quad
        W \leftarrow W + \sum_n s_n (y_n - W x_n) x_n^T \Lambda^{-1}, \quad
        \Lambda_0 = \alpha I

    (Closed-Form Last Layer Optimization, Appendix B.) All K outputs share one D x D covariance
    ``P = noise Lambda^-1``. What is kept is the triangular system of a QR factorisation (square-root information
    form): the Cholesky factor L of Lambda, and the targets z as the rotations of the rows left them, so that
    ``L^T W^T = z``. W is solved for when it is asked for.

    After any number of updates (with forgetting = 1 and no process noise) W is the ridge solution of all rows:
    scikit-learn's ``Ridge(alpha, fit_intercept=False)``. For an intercept append a feature that is 1.

    *How exact W is.* As exact as least squares by QR, in whatever order and scale the rows come: with C = cond(L),
    which is the square root of that of Lambda, and r the residuals of all rows and of the prior,

    .. math::
        \|\delta W\| \le c \cdot \text{eps} \cdot C \left(\|W\| + C \|r\| / \|L\|\right)

    (Higham, Accuracy and Stability, Theorem 20.1). c grows with the square root of the number of updates, or with
    forgetting of those that are remembered. Past about 1 / eps rows (8e6 in float32) new ones are lost in rounding.

    *Forgetting and silence.* Where nothing comes (rows of zeros, of weight 0, or never in some direction), forgetting
    lets Lambda sink, at last below what numbers can hold; rounding errors would pass for knowledge then, and W would
    run away (wind-up). So no squared pivot ``L_jj^2`` sinks below ``eps alpha`` (2e-16 alpha in float64, 1e-7 alpha
    in float32; with process noise below ``eps min(alpha, noise / q2)``): what is known of a weight, given those after
    it, is never less. Where a pivot is kept there,
    W is what it was: silence does not move it, however long, and what comes later is weighed against it with the
    weight eps alpha. While all pivots are above, W is exactly the solution with weights that fade.

    Args:
        features: D.
        targets: K.
        alpha: the ridge, > 0: the precision of the prior, in units of ``1 / noise``.
        noise: the variance s2 > 0 of a target around its mean; scales the variances only.
        forgetting: rho in (0, 1]: each call of :meth:`update` first multiplies the weight of everything
            before it, the prior included.
        process_noise: q2 >= 0: each call of :meth:`update` first adds q2 to the variance of every weight
            (``P + q2 I``), a random walk of the truth. Costs ``O(D^3)`` a call.
        window: keep the last ``window`` rows only: older ones are removed by downdates. Their rows are
            stored. A downdate leaves the rounding of what was there before, eps / (1 - h) of what stays for a row of
            leverage h. Where that adds up to more than ``eps max(eps^-1/4, 2 window)`` of a squared pivot or of the
            length of z (after an outlier has left, say, and once in so many rows), the state is computed anew from
            the rows of the window: what downdates add to eps in the bound is no more than that, 2e-12 in float64 and
            6e-6 in float32 for windows of up to 4096 and 27 rows. Takes neither forgetting nor process noise.
        dtype: of the state, float32 or float64, whatever the dtype of the rows. float32 takes half the memory, and
            less time, where its eps is good enough.
        device: where the state lives.

    The state keeps its dtypes, on whose precision it depends: ``half()``, ``parent.to(torch.bfloat16)`` and a
    state_dict of other dtypes do not change them; ``to(device)`` moves it. A state_dict that does not fit, or that
    was made with another alpha, leaves it as it was. The other options are not in it: a model goes on with its own.
    State that was made under :func:`torch.inference_mode` can be updated outside it, and the other way round.

    A call of :meth:`update` with B rows costs ``4 B D^2 + 4 B D K`` FLOPs.

    Example:
        >>> import torch, cfl_ops
        >>> model = cfl_ops.RecursiveRidge(2, 1, alpha=1.0)
        >>> _ = model.update(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]]))
        >>> model.weight.float()
        tensor([[1., 0.]])
        >>> mean, variance = model.predict(torch.eye(2), return_variance=True)
        >>> variance
        tensor([1.5000, 2.0000])

    """

    factor: Tensor
    """``(D, D)``: the lower Cholesky factor L of Lambda."""
    rotated_targets: Tensor
    """``(K, D)``: z^T, with ``L^T W^T = z``."""
    window_rows: Tensor
    """``(window, D + K + 1)``: x, y and the square root of the weight of the rows in the window, a ring."""
    seen: Tensor
    """How many rows came so far (those of weight 0 included)."""
    downdated: Tensor
    """``(D + K,)`` float64: what downdates have lost of the squared pivots and of the lengths of z, over eps."""
    prior: Tensor
    """alpha, which the state was made with."""

    @makes_state
    def __init__(
        self,
        features: int,
        targets: int = 1,
        *,
        alpha: float = 1.0,
        noise: float = 1.0,
        forgetting: float = 1.0,
        process_noise: float = 0.0,
        window: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        op = "RecursiveRidge"
        features, targets = (
            checks.integer(op, "features", features, 0),
            checks.integer(op, "targets", targets, 0),
        )
        alpha = checks.number(op, "alpha", alpha, checks.POSITIVE)
        noise = checks.number(op, "noise", noise, checks.POSITIVE)
        forgetting = checks.number(op, "forgetting", forgetting, checks.SHARE)
        process_noise = checks.number(op, "process_noise", process_noise, checks.NOT_NEGATIVE)
        if window is not None:
            window = checks.integer(op, "window", window, 1)
        if window is not None and (forgetting != 1 or process_noise != 0):
            raise ValueError("cfl_ops.RecursiveRidge: window takes neither forgetting nor process_noise")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"cfl_ops.RecursiveRidge: dtype must be torch.float32 or torch.float64, but got {dtype}"
            )
        limits = torch.finfo(dtype)
        if not limits.tiny <= alpha <= limits.max:
            raise ValueError(
                f"cfl_ops.{op}: alpha must be from {limits.tiny:.2g} to {limits.max:.2g} in {dtype}, but got {alpha}"
            )
        self.features, self.targets = features, targets
        self.alpha, self.noise = float(alpha), float(noise)
        self.forgetting, self.process_noise, self.window = float(forgetting), float(process_noise), window
        row = features + targets + 1
        self.register_buffer("factor", torch.eye(features, dtype=dtype, device=device) * math.sqrt(alpha))
        self.register_buffer("rotated_targets", torch.zeros(targets, features, dtype=dtype, device=device))
        self.register_buffer("window_rows", torch.zeros(window or 0, row, dtype=dtype, device=device))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("downdated", torch.zeros(features + targets, dtype=torch.float64, device=device))
        self.register_buffer("prior", torch.full((), alpha, dtype=torch.float64, device=device))
        eps = torch.finfo(dtype).eps
        # Of what a random walk leaves alone, Lambda <= noise / q2, where that is less.
        most = min(self.alpha, self.noise / self.process_noise) if process_noise > 0 else self.alpha
        self._floor = eps * most if forgetting < 1 else 0.0
        self._most_lost = max(eps**-0.25, 2.0 * (window or 0))
        self._solved: tuple[Any, Tensor] | None = None  # a state's key, and its weight

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        return (
            f"features={self.features}, targets={self.targets}, alpha={self.alpha}, noise={self.noise}, "
            f"forgetting={self.forgetting}, process_noise={self.process_noise}, window={self.window}"
        )

    @property
    def wide_weight(self) -> Tensor:
        """``(K, D)`` float64: W, as the state has it."""
        return self._weight().clone()

    def _weight(self) -> Tensor:
        """That of :attr:`wide_weight` itself, which is kept until the state changes."""
        key = self._state_key()
        if key is not None and self._solved is not None and _same_state(self._solved[0], key):
            return self._solved[1]
        lower, side = self.factor.double(), self.rotated_targets.double()
        weight: Tensor = torch.linalg.solve_triangular(lower.mT, side.mT, upper=True).mT
        self._solved = None if key is None else (key, weight)
        return weight

    @property
    def weight(self) -> Tensor:
        """``(K, D)``: W, in the dtype of the state."""
        return self._weight().to(self.factor.dtype, copy=True)

    @property
    def covariance(self) -> Tensor:
        """``(D, D)``: the covariance P of every output's weights. Costs ``O(D^3)``."""
        return self.noise * torch.cholesky_inverse(self.factor)

    @makes_state
    def update(self, x: Tensor, y: Tensor, sample_weight: Tensor | None = None) -> Tensor:
        """Learn from a block of rows: one time step.

        Args:
            x: features ``(B, D)``, or ``(D,)`` for one row.
            y: targets ``(B, K)``, or ``(K,)`` for one row.
            sample_weight: ``(B,)`` weights s >= 0. A row of weight 0 is missing: it teaches nothing, whatever
                it holds (NaN too), while time passes all the same.

        Returns:
            The errors of the predictions before the update, ``y - W x``, of the shape of y (0 in rows of
            weight 0).

        Not under ``fullgraph=True`` nor ``torch.export`` with a window: which rows leave depends on how many came.

        Raises:
            TypeError, ValueError: shapes or dtypes do not fit, NaN or Inf in a row of positive weight, a
                negative weight, or rows that overflow the dtype of the state. The state is then unchanged.

        """
        rows_x, rows_y = self._rows("update", x, y, sample_weight)
        if self.window is not None:
            error = self._slide(rows_x, rows_y, sample_weight)
        elif self.process_noise > 0:
            # Diffused apart, since rows that are refused leave all as it was.
            factor, side = self._diffused()
            error = self._learn(factor, side, rows_x, rows_y, sample_weight, 1.0)
            self.factor.copy_(factor)
            self.rotated_targets.copy_(side)
            self.seen.add_(rows_x.shape[0])
        else:
            state: Any = self._buffers  # an attribute of a module takes half a microsecond
            factor, side, seen = state["factor"], state["rotated_targets"], state["seen"]
            error = self._learn(factor, side, rows_x, rows_y, sample_weight, self.forgetting)
            seen.add_(rows_x.shape[0])
        if self.forgetting < 1:
            self.downdated.mul_(self.forgetting)
        if error.dtype != x.dtype:
            error = error.to(x.dtype)
        return error.squeeze(0) if x.ndim == 1 else error

    @makes_state
    def remove(self, x: Tensor, y: Tensor, sample_weight: Tensor | None = None) -> None:
        """Forget rows that were learnt before, exactly, by a downdate.

        A downdate leaves the rounding of what was there before: W is then as exact as if eps were eps / (1 - h), for
        rows of leverage h. There are no rows to start anew from, so what would cost more than half of the digits is
        refused.

        Args and errors are those of :meth:`update`, but with forgetting below 1 ``sample_weight`` must be given: of the
        weight of a row ``forgetting ** n`` is left after n further updates.

        Raises:
            RuntimeError: the window removes its rows itself; process noise has blurred what rows taught.
            torch.linalg.LinAlgError: the rows hold more than the state does, so they cannot have been learnt; or
                so nearly all of it that what this and earlier downdates left behind could exceed ``sqrt(eps)`` of a
                squared pivot. The state is then unchanged.

        """
        if self.window is not None:
            raise RuntimeError("cfl_ops.RecursiveRidge.remove: the window removes its rows itself")
        if self.process_noise > 0:
            raise RuntimeError(
                "cfl_ops.RecursiveRidge.remove: process noise has blurred what rows taught; none can be removed"
            )
        if self.forgetting < 1 and sample_weight is None:
            raise ValueError(
                "cfl_ops.RecursiveRidge.remove: sample_weight must say what is left of each row, "
                f"{self.forgetting:g} ** n after n further updates"
            )
        rows_x, rows_y = self._rows("remove", x, y, sample_weight)
        factor, side = self.factor.clone(), self.rotated_targets.clone()
        error, info = RECURSIVE_RIDGE_(factor, side, rows_x, rows_y, sample_weight, 1.0, 0.0, True)
        before, after = _sizes(self.factor, self.rotated_targets), _sizes(factor, side)
        rows = rows_x
        if sample_weight is not None:
            scale = sample_weight.double().sqrt().unsqueeze(-1)
            rows = torch.where(scale > 0, rows_x * scale, 0.0)
        lost = self.downdated + _lost(before, after, factor, rows)
        # z may sink to nothing, and W with it: what that leaves is small beside what W was.
        lossy = (lost * torch.finfo(factor.dtype).eps ** 0.5 > after)[: self.features].any() & (info == 0)
        info = torch.where(lossy, LOSSY, info).to(torch.int32)
        self._check("remove", info, [error, factor, side], rows_x, rows_y, sample_weight)
        self.factor.copy_(factor)
        self.rotated_targets.copy_(side)
        self.downdated.copy_(lost)

    @torch.no_grad()
    def predict(self, x: Tensor, *, return_variance: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The mean ``x W^T (..., K)`` and, if asked for, the variance ``(...)`` of a target around it.

        The variance is ``x^T P x + noise``, the same for all outputs.

        Args:
            x: ``(..., D)``.
            return_variance: whether to return ``(mean, variance)``.

        """
        checks.floating("RecursiveRidge.predict", "x", x, 1)
        checks.size("RecursiveRidge.predict", "x", x, -1, self.features, "features")
        mean = (x.double() @ self._weight().mT).to(x.dtype)
        return_variance = checks.flag("RecursiveRidge.predict", "return_variance", return_variance)
        if not return_variance:
            return mean
        rows = x.reshape(math.prod(x.shape[:-1]), self.features).to(self.factor.dtype)
        half = torch.linalg.solve_triangular(self.factor, rows.mT, upper=False)
        spread = half.square().sum(0).reshape(x.shape[:-1])
        return mean, (self.noise * (1 + spread)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The predicted mean."""
        mean = self.predict(x)
        assert isinstance(mean, Tensor)
        return mean

    def _state_key(self) -> Any:
        """What changes when the state does; None where that cannot be told.

        Written to by a captured graph or another process, tensors do not count up their versions.
        """
        factor, side = self.factor, self.rotated_targets
        if is_compiling() or transforming() or not factor.is_cpu or factor.is_shared():
            return None
        if from_inference_mode(factor) or from_inference_mode(side):
            return None
        # The tensors themselves, for the memory of one that is gone is used again.
        return factor, factor._version, side, side._version

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: all but the solution that is kept."""
        return {**self.__dict__, "_solved": None}

    def _rows(self, method: str, x: Any, y: Any, sample_weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """The rows as ``(B, D)`` and ``(B, K)``, of arguments that fit; the op looks at what they hold."""
        op = f"RecursiveRidge.{method}"
        buffers: Any = self._buffers
        factor = buffers["factor"]
        if not is_compiling() and any(map(Tensor.is_inference, buffers.values())):
            self._make_normal()
        checks.floating(op, "x", x, 1)
        checks.floating(op, "y", y, 1)
        given = x, y
        if x.ndim == 1:
            x, y = x.unsqueeze(0), y.unsqueeze(0)
        shape, shape_of_y = x.shape, y.shape
        if len(shape) != 2 or len(shape_of_y) != 2 or shape_of_y[0] != shape[0]:
            raise ValueError(
                f"cfl_ops.{op}: x and y must have shapes (B, D) and (B, K), or (D,) and (K,), "
                f"but got {tuple(given[0].shape)} and {tuple(given[1].shape)}"
            )
        if shape[1] != self.features or shape_of_y[1] != self.targets:
            checks.size(op, "x", x, -1, self.features, "features")
            checks.size(op, "y", y, -1, self.targets, "targets")
        if sample_weight is not None:
            checks.tensor(op, "sample_weight", sample_weight, 1)
        if not x.device == y.device == factor.device or sample_weight is not None:
            checks.same_device(op, "the state", factor, x=x, y=y, sample_weight=sample_weight)
        if sample_weight is not None:
            checks.sample_weight(op, sample_weight, shape[0], "the rows of x")
            if sample_weight.ndim != 1:
                raise ValueError(
                    f"cfl_ops.{op}: sample_weight must have shape (B,), but got {tuple(sample_weight.shape)}"
                )
        return x, y

    def _learn(
        self,
        factor: Tensor,
        side: Tensor,
        x: Tensor,
        y: Tensor,
        sample_weight: Tensor | None,
        decay: float,
    ) -> Tensor:
        """Fold rows into a state; their errors before."""
        error: Tensor
        error, info = RECURSIVE_RIDGE_(factor, side, x, y, sample_weight, decay, self._floor, False)
        self._check("update", info, [error, factor, side], x, y, sample_weight)
        return error

    def _check(
        self,
        method: str,
        info: Tensor,
        results: Sequence[Tensor],
        x: Tensor,
        y: Tensor,
        sample_weight: Tensor | None,
    ) -> None:
        # In a graph the results are written to, as far as the compiler knows; what tells the dtype is not.
        state = results[1].new_empty(0) if is_compiling() else results[1]
        context = (state, x, y) if sample_weight is None else (state, x, y, sample_weight)
        check_info(f"RecursiveRidge.{method}", info, results, context)

    def _diffused(self) -> tuple[Tensor, Tensor]:
        """L and z^T after ``Lambda^-1 <- Lambda^-1 / rho + t I``, t = q2 / noise, which leaves W.

        With R = L^T the new Lambda is ``R^T (I + t R R^T)^-1 R``. For an upper U with ``U U^T = I + t R R^T``, by a QR
        of ``[sqrt(t) R, I]^T`` from the last column on, ``U^-1 R`` is its factor and ``U^-1 z`` its right side: what is
        rounded in U is a factor of both, and nothing is inverted or squared.
        """
        scale, order = math.sqrt(self.forgetting), self.features
        upper, side = self.factor.tril().mT * scale, self.rotated_targets.mT * scale
        eye = torch.eye(order, dtype=upper.dtype, device=upper.device)
        tall = torch.cat((upper.mT * math.sqrt(self.process_noise / self.noise), eye), 0)
        r = torch.linalg.qr(tall.flip(-1), mode="r")[1]
        r = r * torch.where(r.diagonal() < 0, -1.0, 1.0).to(r.dtype).unsqueeze(-1)
        both = torch.linalg.solve_triangular(r.mT.flip(0, 1), torch.cat((upper, side), -1), upper=True)
        return both[:, :order].mT.contiguous(), both[:, order:].mT.contiguous()

    def _slide(self, x: Tensor, y: Tensor, sample_weight: Tensor | None) -> Tensor:
        """Learn rows, then remove as many of the oldest as the window has no room for; the errors before."""
        assert self.window is not None
        seen, count = int(self.seen), x.shape[0]
        anew = count >= self.window
        factor, side = self.factor, self.rotated_targets
        if anew:  # all that was there leaves: what is learnt here is only for the errors
            factor, side = factor.clone(), side.clone()
        error = self._learn(factor, side, x, y, sample_weight, 1.0)
        rows = torch.cat((x, y, x.new_ones(count, 1)), -1).to(factor.dtype)
        if sample_weight is not None:
            scale = sample_weight.double().sqrt().to(factor.dtype).unsqueeze(-1)
            rows[:, -1:] = scale
            rows = torch.where(scale > 0, rows, 0.0)
        kept = rows[-self.window :]
        first = (seen + count - len(kept)) % self.window
        if first + len(kept) <= self.window:
            places: Any = slice(first, first + len(kept))
        else:
            places = torch.arange(first, first + len(kept), device=x.device) % self.window
        leaving = self.window_rows[places].clone()  # zeros, which change nothing, until the window is full
        self.window_rows[places] = kept
        self.seen.add_(count)
        if anew or (seen + count > self.window and not self._unlearn(leaving)):
            self._rebuild()
        return error

    def _unlearn(self, rows: Tensor) -> bool:
        """Remove rows of the window; False where that may have cost too many digits."""
        x, y, scale = rows.split((self.features, self.targets, 1), -1)
        before = _sizes(self.factor, self.rotated_targets)
        _, info = RECURSIVE_RIDGE_(
            self.factor, self.rotated_targets, x * scale, y * scale, None, 1.0, 0.0, True
        )
        after = _sizes(self.factor, self.rotated_targets)
        lost = self.downdated.add_(_lost(before, after, self.factor, x * scale))
        return int(info) == 0 and bool((lost <= after * self._most_lost).all())

    def _rebuild(self) -> None:
        """The state from the rows of the window, in float64."""
        x, y, scale = self.window_rows.double().split((self.features, self.targets, 1), -1)
        factor = torch.eye(self.features, dtype=torch.float64, device=x.device) * math.sqrt(self.alpha)
        side = factor.new_zeros(self.targets, self.features)
        self._learn(factor, side, x * scale, y * scale, None, 1.0)
        self.factor.copy_(factor)
        self.rotated_targets.copy_(side)
        self.downdated.zero_()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        given = _of_now(state_dict, prefix, self)
        alpha = given.get(prefix + "prior")
        if (
            isinstance(alpha, Tensor)
            and alpha.numel() == 1
            and not alpha.is_meta
            and float(alpha) != self.alpha
        ):
            error_msgs = rest[-1]
            error_msgs.append(
                f"{prefix}prior: the state was made with alpha={float(alpha)}, not {self.alpha}."
            )
            return
        super()._load_from_state_dict(given, prefix, *rest)


def _same_state(one: tuple[Tensor, int, Tensor, int], other: tuple[Tensor, int, Tensor, int]) -> bool:
    return all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))


def _sizes(factor: Tensor, side: Tensor) -> Tensor:
    """The squared pivots of L, which is what a downdate computes with, and the lengths of z."""
    return torch.cat((factor.diagonal().double().square(), torch.linalg.vector_norm(side.double(), dim=-1)))


def _lost(before: Tensor, after: Tensor, factor: Tensor, rows: Tensor) -> Tensor:
    """What the downdate by rows lost of the sizes, over eps: ``1 + |L'^-1 X^T|^2`` times those of the new L.

    For one row that is 1 / (1 - leverage), what is left of its direction (Stewart 1979).
    """
    half = torch.linalg.solve_triangular(factor, rows.to(factor.dtype).mT, upper=False)
    share = 1 + half.double().square().sum()
    sizes = torch.cat((after[: len(factor)], before[len(factor) :]))
    return sizes.mul_(share)


def _of_now(state_dict: Mapping[str, Any], prefix: str, model: RecursiveRidge) -> Mapping[str, Any]:
    """A state that was saved when W was kept instead of z, with z. Its window is computed anew at the next chance."""
    weight, factor = state_dict.get(prefix + "wide_weight"), state_dict.get(prefix + "factor")
    if (
        not isinstance(weight, Tensor)
        or not isinstance(factor, Tensor)
        or prefix + "rotated_targets" in state_dict
    ):
        return state_dict
    if weight.shape != (model.targets, model.features) or factor.shape != model.factor.shape:
        return state_dict
    out = {key: value for key, value in state_dict.items() if key != prefix + "wide_weight"}
    out[prefix + "rotated_targets"] = weight.double() @ factor.double().tril()
    unknown = 0.0 if model.window is None else math.inf
    out.setdefault(
        prefix + "downdated", torch.full((model.features + model.targets,), unknown, dtype=torch.float64)
    )
    out.setdefault(prefix + "prior", torch.tensor(model.alpha, dtype=torch.float64))
    return out


def _explain(method: str, info: Tensor, context: Sequence[Tensor]) -> Exception:
    prefix = f"cfl_ops.RecursiveRidge.{method}:"
    code = int(info)
    dtype = context[0].dtype
    if code == BAD_WEIGHT:
        return ValueError(f"{prefix} sample_weight must be finite and not negative")
    if code in (UNKNOWN_ROWS, LOSSY):
        rest = {
            UNKNOWN_ROWS: "x holds more than the state does: no positive definite matrix is left",
            LOSSY: "x holds so nearly all that the state does that half of the digits would be lost: "
            "learn the rows that stay anew",
        }
        error: Exception = LinAlgError(f"{prefix} {rest[code]}")
        return error
    if code == BAD_STATE:
        return ValueError(f"{prefix} the state has NaN, Inf or a zero pivot")
    if code == TOO_LARGE:
        return ValueError(f"{prefix} x, y or sample_weight is too large for {dtype}, the dtype of the state")
    x, y = (value.to(dtype) for value in context[1:3])  # a number may be too large for it
    if len(context) > 3:
        present = context[3].double().sqrt().to(dtype).unsqueeze(-1) > 0
        x, y = torch.where(present, x, 0.0), torch.where(present, y, 0.0)
    name, value = next(item for item in (("x", x), ("y", y)) if not bool(item[1].isfinite().all()))
    row = int((~value.isfinite().all(-1)).nonzero()[0])
    return ValueError(f"{prefix} {name} has NaN or Inf in row {row}")


for _method in ("update", "remove"):
    error_message(f"RecursiveRidge.{_method}")(partial(_explain, _method))
