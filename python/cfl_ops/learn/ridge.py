"""Ridge and RidgeCV: scikit-learn estimators over the ops. Importing this module imports scikit-learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops.ops.solve.ridge import ridge
from cfl_ops.ops.solve.ridge_cv import ridge_cv

__all__ = ["Ridge", "RidgeCV"]


def _foreign(value: Any) -> Tensor | None:
    """A torch tensor, or an array of another library on any device (DLPack) as one; else None."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray) and hasattr(value, "__dlpack__"):
        return torch.utils.dlpack.from_dlpack(value)
    return None


def _check_tensors(x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The checks that scikit-learn makes of arrays, for tensors."""
    values = {"X": x} if y is None else {"X": x, "y": y}
    for name, value in values.items():
        dims = (2,) if name == "X" else (1, 2)
        if value.ndim not in dims:
            raise ValueError(
                f"cfl_ops.learn: {name} must have {' or '.join(map(str, dims))} dimensions, "
                f"but got shape {tuple(value.shape)}"
            )
        if value.shape[0] == 0:
            raise ValueError(f"cfl_ops.learn: {name} must have at least 1 row, but got {tuple(value.shape)}")
        if not bool(value.isfinite().all()):
            raise ValueError(f"cfl_ops.learn: {name} must be finite, but has NaN or Inf")
    if y is not None and y.shape[0] != x.shape[0]:
        raise ValueError(f"cfl_ops.learn: y must have the {x.shape[0]} rows of X, but got {y.shape[0]}")
    return _as_floating(x), None if y is None else _as_floating(y).to(x.device)


def _as_floating(value: Tensor) -> Tensor:
    """Without a graph; integers as float32 where that holds them all exactly, else as float64."""
    value = value.detach()
    if value.is_floating_point() or value.is_complex():
        return value
    single = value.to(torch.float32)
    return single if bool((single.double() == value.double()).all()) else value.to(torch.float64)


def _as_numpy(value: Any) -> Any:
    """An array of what NumPy has a dtype for; what is no tensor as it is."""
    tensor = _foreign(value)
    if tensor is None:
        return value
    tensor = tensor.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


class _LinearModel(MultiOutputMixin, RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """What Ridge and RidgeCV share: input, prediction and attributes.

    NumPy in gives NumPy attributes and predictions; a torch tensor, or what speaks DLPack (CuPy), gives torch
    tensors on its device. Attributes and predictions have the wider dtype of what they are made of (NumPy integers
    count as float64, those of tensors as float32 where that holds them): nothing is narrowed.
    """

    fit_intercept: bool

    def _validated(self, X: Any, y: Any) -> tuple[Tensor, Tensor, bool]:
        x = _foreign(X)
        if x is not None:
            other = _foreign(y)
            target = torch.as_tensor(y) if other is None else other
            x, checked = _check_tensors(x, target)
            assert checked is not None
            self.n_features_in_ = x.shape[1]
            return x, checked, True
        if y is None:
            raise ValueError(
                f"This {type(self).__name__} estimator requires y to be passed, but the target y is None."
            )
        X, y = validate_data(self, X, y, dtype=[np.float64, np.float32], multi_output=True, y_numeric=True)
        y = np.array(y) if y.dtype in (np.float64, np.float32, np.float16) else np.array(y, dtype=np.float64)
        return torch.from_numpy(np.array(X)), torch.from_numpy(y), False

    def _store(self, weight: Tensor, intercept: Tensor | None, y: Tensor, foreign: bool) -> None:
        coef = weight.mT if y.ndim == 2 else weight[:, 0]
        coef = coef.contiguous()
        if intercept is None:
            offset: Any = 0.0
        elif y.ndim == 2:
            offset = intercept if foreign else intercept.numpy()
        else:
            offset = intercept[0] if foreign else float(intercept[0])
        self.coef_ = coef if foreign else coef.numpy()
        self.intercept_ = offset

    def predict(self, X: Any) -> Any:
        """Predictions ``(n,)`` or ``(n, K)``: a tensor for a tensor, else an array."""
        check_is_fitted(self)
        coef = torch.as_tensor(self.coef_)
        offset = torch.as_tensor(self.intercept_, dtype=coef.dtype, device=coef.device)
        x = _foreign(X)
        if x is not None:
            x, _ = _check_tensors(x, None)
            if x.shape[1] != self.n_features_in_:
                raise ValueError(
                    f"cfl_ops.learn: X must have {self.n_features_in_} features, as in fit, but got {x.shape[1]}"
                )
            dtype = torch.promote_types(x.dtype, coef.dtype)
            working = torch.promote_types(dtype, torch.float32)  # a half-precision result is rounded once
            return (x.to(working) @ coef.to(x.device, working).t() + offset.to(x.device, working)).to(dtype)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        return X @ coef.cpu().numpy().T + offset.cpu().numpy()

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The coefficient of determination R^2 of the prediction, averaged over targets."""
        X, y, sample_weight = (_as_numpy(value) for value in (X, y, sample_weight))
        return float(super().score(X, y, sample_weight))


def _columns(y: Tensor) -> Tensor:
    return y if y.ndim == 2 else y.unsqueeze(-1)


class Ridge(_LinearModel):
    r"""Ridge regression, as :class:`sklearn.linear_model.Ridge`, over :func:`cfl_ops.ridge`.

    .. math:: \min_w \|y - X w\|^2 + \alpha \|w\|^2

    Args:
        alpha: the penalty, not negative, or one for each target; 0 gives the minimum-norm least-squares fit.
        fit_intercept: fit an intercept, which is not penalised.

    Attributes:
        coef_: ``(D,)``, or ``(K, D)`` for targets ``(B, K)``.
        intercept_: a number, or ``(K,)``; 0.0 without an intercept.
        n_features_in_: D.

    Not under ``fullgraph=True`` nor ``torch.export``: scikit-learn's checks look at the data.

    Example:
        >>> import numpy as np
        >>> from cfl_ops.learn import Ridge
        >>> model = Ridge(alpha=2.0).fit(np.array([[0.0], [1.0], [2.0]]), np.array([1.0, 3.0, 5.0]))
        >>> model.predict(np.array([[3.0]]))
        array([5.])
    """

    def __init__(self, alpha: Any = 1.0, *, fit_intercept: bool = True) -> None:
        self.alpha = alpha
        self.fit_intercept = fit_intercept

    def fit(self, X: Any, y: Any) -> Ridge:
        """Fit to ``X (B, D)`` and ``y (B,)`` or ``(B, K)``: NumPy, torch, or what speaks DLPack."""
        several = np.ndim(self.alpha) > 0
        if several:
            alpha: Any = checks.numbers("learn.Ridge", "alpha", self.alpha)
        else:
            alpha = checks.number("learn.Ridge", "alpha", self.alpha, checks.NOT_NEGATIVE)
        x, target, foreign = self._validated(X, y)
        if several:
            if len(alpha) != _columns(target).shape[1]:
                raise ValueError(
                    f"cfl_ops.learn.Ridge: alpha must be a number or have a penalty for each of the "
                    f"{_columns(target).shape[1]} targets, but got {len(alpha)}"
                )
            alpha = alpha.to(x.device)
        bias = checks.flag("learn.Ridge", "fit_intercept", self.fit_intercept)
        result = ridge(x, _columns(target), alpha, bias=bias)
        weight, intercept = result if isinstance(result, tuple) else (result, None)
        self._store(weight, intercept, target, foreign)
        return self


class RidgeCV(_LinearModel):
    r"""Ridge regression with its penalty cross-validated, as :class:`sklearn.linear_model.RidgeCV`.

    Over :func:`cfl_ops.ridge_cv`: one eigendecomposition for all penalties and targets.

    Args:
        alphas: the penalties to choose from.
        fit_intercept: fit an intercept, which is not penalised.
        cv: None or "loo" (leave-one-out), "gcv", or a number of folds.
        alpha_per_target: choose a penalty for each target.

    Attributes:
        coef_, intercept_, n_features_in_: as those of :class:`Ridge`.
        alpha_: the chosen penalty: a number, or ``(K,)`` with ``alpha_per_target`` and targets ``(B, K)``.
        best_score_: minus the mean squared error there, in the form of ``alpha_``.
        scores_: ``(len(alphas), K)``: the mean squared errors.

    Not under ``fullgraph=True`` nor ``torch.export``: as :class:`Ridge`.

    Example:
        >>> import numpy as np
        >>> from cfl_ops.learn import RidgeCV
        >>> x = np.array([[0.0], [1.0], [2.0], [3.0]])
        >>> RidgeCV(alphas=(0.01, 100.0)).fit(x, 2 * x[:, 0]).alpha_
        0.01
    """

    def __init__(
        self,
        alphas: Any = (0.1, 1.0, 10.0),
        *,
        fit_intercept: bool = True,
        cv: str | int | None = None,
        alpha_per_target: bool = False,
    ) -> None:
        self.alphas = alphas
        self.fit_intercept = fit_intercept
        self.cv = cv
        self.alpha_per_target = alpha_per_target

    def fit(self, X: Any, y: Any) -> RidgeCV:
        """Fit to ``X (B, D)`` and ``y (B,)`` or ``(B, K)``: NumPy, torch, or what speaks DLPack."""
        x, target, foreign = self._validated(X, y)
        if x.shape[0] < 2:
            raise ValueError(f"RidgeCV: X must have at least 2 samples, but got n_samples = {x.shape[0]}")
        alphas = self.alphas if np.ndim(self.alphas) else [self.alphas]
        result = ridge_cv(
            x,
            _columns(target),
            checks.numbers("learn.RidgeCV", "alphas", alphas),
            cv="loo" if self.cv is None else self.cv,
            per_target=checks.flag("learn.RidgeCV", "alpha_per_target", self.alpha_per_target),
            bias=checks.flag("learn.RidgeCV", "fit_intercept", self.fit_intercept),
        )
        self._store(result.weight, result.intercept, target, foreign)
        scores = result.scores
        if result.lam.ndim == 0:
            self.alpha_: Any = float(result.lam)
            self.best_score_: Any = -float(scores.mean(1).min())
        else:
            best = -scores.amin(0)
            several = target.ndim == 2
            self.alpha_ = result.lam.cpu().numpy() if several else float(result.lam[0])
            self.best_score_ = best.cpu().numpy() if several else float(best[0])
        self.scores_ = scores if foreign else scores.numpy()
        return self
