"""RecursiveRidge: ridge regression that follows a stream, exactly, one block of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cfl_ops._core import checks
from cfl_ops._core.failures import check_info, error_message
from cfl_ops._core.results import public
from cfl_ops._core.state import PreciseModule, makes_state
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.cholesky.codes import BAD_WEIGHT, NOT_FINITE, UNKNOWN_ROWS
from cfl_ops.ops.cholesky.factor import inverse_by_solves
from cfl_ops.ops.cholesky.update import cholesky_downdate_ex_, cholesky_update_

__all__ = ["RecursiveRidge"]


@public
class RecursiveRidge(PreciseModule):
    r"""Recursive least squares with a ridge, which is the full-covariance Kalman filter of a linear head.

    .. math::
        \Lambda \leftarrow \rho \Lambda + \sum_n s_n x_n x_n^T, \quad
        W \leftarrow W + \sum_n s_n (y_n - W x_n) x_n^T \Lambda^{-1}, \quad
        \Lambda_0 = \alpha I

    (Closed-Form Last Layer Optimization, Appendix B.) All K outputs share one D x D covariance
    ``P = noise Lambda^-1``. It is kept as the Cholesky factor of Lambda (square-root information form), so it
    stays positive definite whatever the rounding; W, which is small, is kept in float64.

    After any number of updates (with forgetting = 1 and no process noise) W is the ridge solution of all rows:
    scikit-learn's ``Ridge(alpha, fit_intercept=False)``. For an intercept append a feature that is 1.

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
            stored. Takes neither forgetting nor process noise.
        dtype: of the factor, whatever the dtype of the rows. After n updates the factor is off by about
            ``eps sqrt(n)`` of its norm, and W by that times the condition number of Lambda at most; float32
            halves time and memory where that is good enough.
        device: where the state lives.

    The state keeps its dtypes, on whose precision it depends: ``half()``, ``parent.to(torch.bfloat16)`` and a
    state_dict of other dtypes do not change them; ``to(device)`` moves it. A state_dict that does not fit leaves
    it as it was. State that was made under :func:`torch.inference_mode` can be updated outside it, and the other
    way round.

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
    """``(D, D)``: the lower Cholesky factor of Lambda."""
    wide_weight: Tensor
    """``(K, D)`` float64; saved states know it by this name."""
    window_rows: Tensor
    """``(window, D + K + 1)``: x, y and weight of the rows in the window, a ring."""
    seen: Tensor
    """How many rows came so far (those of weight 0 included)."""

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
        self.features, self.targets = features, targets
        self.alpha, self.noise = float(alpha), float(noise)
        self.forgetting, self.process_noise, self.window = float(forgetting), float(process_noise), window
        row = features + targets + 1
        self.register_buffer("factor", torch.eye(features, dtype=dtype, device=device) * math.sqrt(alpha))
        self.register_buffer(
            "wide_weight", torch.zeros(targets, features, dtype=torch.float64, device=device)
        )
        self.register_buffer("window_rows", torch.zeros(window or 0, row, dtype=dtype, device=device))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64, device=device))

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        return (
            f"features={self.features}, targets={self.targets}, alpha={self.alpha}, noise={self.noise}, "
            f"forgetting={self.forgetting}, process_noise={self.process_noise}, window={self.window}"
        )

    @property
    def weight(self) -> Tensor:
        """``(K, D)``, in the dtype of the factor."""
        return self.wide_weight.to(self.factor.dtype)

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
            TypeError, ValueError: shapes or dtypes do not fit, NaN or Inf in a row of positive weight, or a
                negative weight. The state is then unchanged.

        """
        rows, sqrt_weight, error, single = self._rows("update", x, y, sample_weight)
        if self.window is None:
            decay = self.forgetting
            if self.process_noise > 0:
                self._diffuse()
                decay = 1.0
            self._learn(rows, sqrt_weight, error, decay)
            self.seen += rows.shape[0]
        else:
            target = error + self._mean(rows)
            for begin in range(0, rows.shape[0], self.window):
                part = slice(begin, begin + self.window)
                sqrt_of_part = None if sqrt_weight is None else sqrt_weight[part]
                self._slide(rows[part], target[part].to(rows.dtype), sqrt_of_part)
        out = error.to(x.dtype)
        return out[0] if single else out

    @makes_state
    def remove(self, x: Tensor, y: Tensor, sample_weight: Tensor | None = None) -> None:
        """Forget rows that were learnt before, exactly, by a downdate (with forgetting = 1 and no process noise).

        Args and errors are those of :meth:`update`; besides:

        Raises:
            torch.linalg.LinAlgError: the rows hold more than the state does, so they cannot have been learnt.
                The state is then unchanged.

        """
        if self.window is not None:
            raise RuntimeError("cfl_ops.RecursiveRidge.remove: the window removes its rows itself")
        rows, sqrt_weight, error, _ = self._rows("remove", x, y, sample_weight)
        rows, error = _weighted(rows, sqrt_weight, error)
        failed = cholesky_downdate_ex_(self.factor, rows.mT) != 0
        check_info("RecursiveRidge.remove", failed.to(torch.int32) * UNKNOWN_ROWS, [self.factor, error], [])
        self._move(rows, -error)

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
        mean = (x.double() @ self.wide_weight.mT).to(x.dtype)
        return_variance = checks.flag("RecursiveRidge.predict", "return_variance", return_variance)
        if not return_variance:
            return mean
        rows = x.reshape(-1, self.features).to(self.factor.dtype)
        half = torch.linalg.solve_triangular(self.factor, rows.mT, upper=False)
        spread = half.square().sum(0).reshape(x.shape[:-1])
        return mean, (self.noise * (1 + spread)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The predicted mean."""
        mean = self.predict(x)
        assert isinstance(mean, Tensor)
        return mean

    def _rows(
        self, method: str, x: Any, y: Any, sample_weight: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, bool]:
        """The checked rows ``(B, D)``, the square roots of their weights ``(B, 1)`` and their errors ``(B, K)``.

        The square roots are None where no weights are given.
        """
        op = f"RecursiveRidge.{method}"
        self._make_normal()
        checks.floating(op, "x", x, 1)
        checks.floating(op, "y", y, 1)
        single = x.ndim == 1
        if single:
            x, y = x.unsqueeze(0), y.unsqueeze(0)
        if x.ndim != 2 or y.ndim != 2 or y.shape[0] != x.shape[0]:
            raise ValueError(
                f"cfl_ops.{op}: x and y must have shapes (B, D) and (B, K), or (D,) and (K,), "
                f"but got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        checks.size(op, "x", x, -1, self.features, "features")
        checks.size(op, "y", y, -1, self.targets, "targets")
        checks.same_device(op, "the state", self.factor, x=x, y=y, sample_weight=sample_weight)
        dtype = self.factor.dtype
        # In a graph what a check hands on is written to, as far as the compiler knows.
        x, y = x.detach().to(dtype, copy=is_compiling()), y.detach().to(torch.float64)
        if sample_weight is None:
            sqrt_weight = None
        else:
            checks.sample_weight(op, sample_weight, x.shape[0], "the rows of x")
            if sample_weight.ndim != 1:
                raise ValueError(
                    f"cfl_ops.{op}: sample_weight must have shape (B,), but got {tuple(sample_weight.shape)}"
                )
            bad = ~((sample_weight >= 0) & sample_weight.isfinite()).all()
            check_info(op, bad.to(torch.int32) * BAD_WEIGHT, [x], [])
            sqrt_weight = sample_weight.detach().reshape(-1, 1).to(dtype).sqrt()
            present = sqrt_weight > 0
            x, y = torch.where(present, x, 0.0), torch.where(present, y, 0.0)
        error = y - self._mean(x)
        if is_compiling() or not math.isfinite(float(error.sum() + x.sum())):  # one look for the usual case
            bad = ~(x.isfinite().all() & y.isfinite().all())
            check_info(op, bad.to(torch.int32) * NOT_FINITE, [x, error], [x.clone(), y])
        return x, sqrt_weight, error, single

    def _mean(self, x: Tensor) -> Tensor:
        return x.double() @ self.wide_weight.mT

    def _learn(self, x: Tensor, sqrt_weight: Tensor | None, error: Tensor, decay: float) -> None:
        x, error = _weighted(x, sqrt_weight, error)
        cholesky_update_(self.factor, x.mT, decay=decay)
        self._move(x, error)

    def _unlearn(self, x: Tensor, sqrt_weight: Tensor | None, error: Tensor) -> bool:
        x, error = _weighted(x, sqrt_weight, error)
        if int(cholesky_downdate_ex_(self.factor, x.mT)) != 0:
            return False
        self._move(x, -error)
        return True

    def _move(self, scaled: Tensor, error: Tensor) -> None:
        """W += error^T X Lambda^-1, Lambda being the new one."""
        gain = torch.cholesky_solve(scaled.mT, self.factor)
        self.wide_weight += (gain.double() @ error).mT

    def _diffuse(self) -> None:
        """Lambda^-1 <- Lambda^-1 / rho + (q2 / noise) I, in float64.

        With Lambda^-1 = U U^T for an upper U (a Cholesky factorisation from the last row up), the new lower
        factor is U^-T.
        """
        eye = torch.eye(self.features, dtype=torch.float64, device=self.factor.device)
        inverse = inverse_by_solves(self.factor.double())
        spread = inverse / self.forgetting + (self.process_noise / self.noise) * eye
        upper = torch.linalg.cholesky(spread.flip(-1, -2)).flip(-1, -2)
        self.factor.copy_(torch.linalg.solve_triangular(upper, eye, upper=True).mT)

    def _slide(self, x: Tensor, y: Tensor, sqrt_weight: Tensor | None) -> None:
        """Learn at most ``window`` rows, then remove as many of the oldest as the window has no room for."""
        assert self.window is not None
        seen, count = int(self.seen), x.shape[0]
        places = torch.arange(seen, seen + count, device=x.device) % self.window
        leaving = self.window_rows[places]  # zeros, which change nothing, until the window is full
        self._learn(x, sqrt_weight, y.double() - self._mean(x), 1.0)
        weight = x.new_ones(count, 1) if sqrt_weight is None else sqrt_weight
        self.window_rows[places] = torch.cat((x, y, weight), -1)
        self.seen += count
        if seen + count <= self.window:
            return
        old_x, old_y, old_sqrt_weight = leaving.split((self.features, self.targets, 1), -1)
        if not self._unlearn(old_x, old_sqrt_weight, old_y.double() - self._mean(old_x)):
            self._rebuild()

    def _rebuild(self) -> None:
        """Where rounding leaves a downdate nothing positive: start from the rows of the window."""
        x, y, sqrt_weight = self.window_rows.double().split((self.features, self.targets, 1), -1)
        scaled = x * sqrt_weight
        factor = torch.eye(self.features, dtype=torch.float64, device=x.device) * math.sqrt(self.alpha)
        cholesky_update_(factor, scaled.mT)  # which no condition number can make fail
        self.factor.copy_(factor)
        self.wide_weight.copy_(torch.cholesky_solve(scaled.mT @ (y * sqrt_weight), factor).mT)


def _weighted(x: Tensor, sqrt_weight: Tensor | None, error: Tensor) -> tuple[Tensor, Tensor]:
    return (x, error) if sqrt_weight is None else (x * sqrt_weight, error * sqrt_weight)


def _explain(method: str, info: Tensor, context: Sequence[Tensor]) -> Exception:
    prefix = f"cfl_ops.RecursiveRidge.{method}:"
    if int(info) == BAD_WEIGHT:
        return ValueError(f"{prefix} sample_weight must be finite and not negative")
    if int(info) == UNKNOWN_ROWS:
        error: Exception = LinAlgError(
            f"{prefix} x holds more than the state does: no positive definite matrix is left"
        )
        return error
    name, value = next(
        item for item in zip(("x", "y"), context, strict=True) if not bool(item[1].isfinite().all())
    )
    row = int((~value.isfinite().all(-1)).nonzero()[0])
    return ValueError(f"{prefix} {name} has NaN or Inf in row {row}")


for _method in ("update", "remove"):
    error_message(f"RecursiveRidge.{_method}")(partial(_explain, _method))
