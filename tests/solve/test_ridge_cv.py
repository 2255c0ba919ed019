"""ridge_cv against its definition, and scikit-learn's folds."""

from __future__ import annotations

import cfl_ops
import numpy as np
import pytest
import torch
from cfl_ops.ops.solve import ridge_cv as module
from cfl_ops.ops.solve import validation
from extended_precision import left_out, wide

from tests.solve.data import F64, randn
from tests.solve.oracle import features, targets


def test_ridge_cv_scales() -> None:
    """Targets whose squares over- or underflow float32 choose as others do."""
    x, y = randn(40, 5, dtype=torch.float32), randn(40, 3, seed=1, dtype=torch.float32)
    want = cfl_ops.ridge_cv(x, y, [0.1, 1.0, 10.0])
    for scale in (1e25, 1e-25):
        got = cfl_ops.ridge_cv(x, y * scale, [0.1, 1.0, 10.0])
        assert torch.equal(got.lam, want.lam)
        torch.testing.assert_close(got.weight / scale, want.weight, rtol=1e-4, atol=1e-6)


def test_ridge_cv_gcv_against_its_formula() -> None:
    x, y = randn(30, 4), randn(30, 2, seed=3)
    got = cfl_ops.ridge_cv(x, y, [0.5, 5.0], cv="gcv")
    for i, lam in enumerate((0.5, 5.0)):
        hat = x @ torch.linalg.inv(x.mT @ x + lam * torch.eye(4, dtype=F64)) @ x.mT
        want = ((y - hat @ y) / (1 - hat.trace() / 30)).square().mean(0)
        torch.testing.assert_close(got.scores[i], want, rtol=1e-9, atol=0)


def test_ridge_cv_bad_arguments() -> None:
    x, y = randn(6, 2), randn(6, 1)
    for kwargs, message in (
        ({"lams": []}, "lams must be a sequence of at least one number"),
        ({"lams": [-1.0]}, "lams must be finite and not negative"),
        ({"lams": [1.0], "cv": "k"}, "cv must be 'loo', 'gcv' or a number of folds"),
        ({"lams": [1.0], "cv": 7}, "cv must be from 2 to the number of rows"),
    ):
        with pytest.raises(ValueError, match=message):
            cfl_ops.ridge_cv(x, y, **kwargs)
    x[2, 1] = torch.inf
    with pytest.raises(torch.linalg.LinAlgError, match="x or y has NaN or Inf"):
        cfl_ops.ridge_cv(x, y, [1.0])


@pytest.mark.parametrize("per_target", [True, False])
@pytest.mark.parametrize("cv", ["loo", "gcv", 5])
@pytest.mark.parametrize("shape", [(50, 4), (9, 12)])
def test_ridge_cv_many_targets_in_runs(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], cv: str | int, per_target: bool
) -> None:
    """The runs of targets change nothing."""
    x, y = randn(*shape) + 1, randn(shape[0], 150, seed=1)
    options = {"cv": cv, "per_target": per_target, "bias": True}
    want = cfl_ops.ridge_cv(x, y, [0.1, 10.0], **options)
    monkeypatch.setattr(module, "MOMENT_BYTES", 1)
    monkeypatch.setattr(validation, "PREDICTION_BYTES", 1)
    got = cfl_ops.ridge_cv(x, y, [0.1, 10.0], **options)
    assert torch.equal(got.lam, want.lam)
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-11, atol=0)
    torch.testing.assert_close(got.weight, want.weight, rtol=1e-10, atol=1e-12)


def test_folds_are_scored_as_their_definition() -> None:
    """Through the Cholesky factor of a fold of many rows, and directly where the fold has few or is singular."""
    x, y = randn(60, 5), randn(60, 3, seed=1) + 2
    x[:, 4] = x[:, 3]  # singular: the direct way
    for design, bias in ((x[:, :4], False), (x[:, :4], True), (x, False), (x[:24], True)):
        target = y[: len(design)]
        for dtype, rtol in ((F64, 1e-9), (torch.float32, 1e-4)):
            got = cfl_ops.ridge_cv(design.to(dtype), target.to(dtype), [0.5], cv=4, bias=bias)
            want = torch.zeros(3, dtype=F64)
            for held in torch.arange(len(design)).chunk(4):
                rest = torch.ones(len(design), dtype=torch.bool)
                rest[held] = False
                fitted = cfl_ops.ridge(design[rest], target[rest], 0.5, bias=bias)
                weight, intercept = fitted if bias else (fitted, torch.zeros(3, dtype=F64))
                error = target[held] - design[held] @ weight - intercept
                want += error.square().sum(0) / len(design)
            torch.testing.assert_close(got.scores[0], want, rtol=rtol, atol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("cv", ["loo", 2])
@pytest.mark.parametrize(
    ("dtype", "mean", "scale", "rows", "kind"),
    [
        (torch.float32, 0.0, 1e-3, 6, "plain"),
        (torch.float32, 0.0, 1.0, 6, "outlier"),
        (torch.float32, 0.0, 1e-3, 26, "outlier"),
        (torch.float32, 1e3, 1.0, 13, "duplicate"),
        (torch.float32, 1e3, 1e-6, 6, "outlier"),
        (torch.float32, 0.0, 1.0, 14, "plain"),
        (F64, 1e3, 1e3, 13, "outlier"),
        (F64, 0.0, 1e6, 4, "outlier"),
        (F64, 1e6, 1e-3, 26, "duplicate"),
    ],
)
def test_scores_and_choices_are_those_of_refits(dtype, mean, scale, rows, kind, cv, bias) -> None:
    """With 8 more bits: leverages near 1, folds with an outlier, penalties far below X^T X."""
    x, y = features(dtype, rows, 9, mean, scale, kind), targets(dtype, rows)
    lams = [1e-8, 1e-4, 1.0, 1e4]
    folds = None if cv == "loo" else cv
    exact = np.array([left_out(wide(x), wide(y), lam, bias, folds) for lam in lams], np.float64)
    fit = cfl_ops.ridge_cv(x, y, lams, cv=cv, bias=bias)
    np.testing.assert_allclose(fit.scores.numpy(), exact, rtol=2e-3, atol=1e-12)
    chosen = [lams.index(float(lam)) for lam in fit.lam]
    assert (exact[chosen, range(3)] <= 1.002 * exact.min(0)).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 9), (9, 9), (10, 9), (20, 9)])
def test_leave_one_out_at_penalty_zero_is_that_of_minimum_norm_fits(
    shape: tuple[int, int], bias: bool
) -> None:
    """Of all ranks: rows that depend on others, and rows that do not."""
    x, y = randn(*shape), randn(shape[0], 2, seed=1)
    x[:, 8] = 0
    x[1:3, :8] = x[0, :8]  # of equal features, none is independent of the others
    x[3] = 0
    x[3, 8] = 1  # and this one is
    want = torch.zeros(2, dtype=F64)
    for i in range(shape[0]):
        keep = torch.arange(shape[0]) != i
        mean_x, mean_y = (x[keep].mean(0), y[keep].mean(0)) if bias else (x[0] * 0, y[0] * 0)
        weight = torch.linalg.pinv(x[keep] - mean_x, rtol=1e-10) @ (y[keep] - mean_y)
        want += (y[i] - mean_y - (x[i] - mean_x) @ weight).square() / shape[0]
    for lams in ([0.0], [0.0, 1.0]):
        got = cfl_ops.ridge_cv(x, y, lams, bias=bias).scores[0]
        torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def test_gcv_of_interpolating_fits() -> None:
    """Residuals and mean room both go to 0 with the penalty; their ratio does not."""
    x, y = randn(6, 10), randn(6, 2, seed=1)
    inverse = torch.linalg.inv(x @ x.mT)
    want = 6 * (inverse @ y).square().sum(0) / inverse.trace() ** 2
    for dtype, rtol in ((F64, 1e-9), (torch.float32, 1e-4)):
        got = cfl_ops.ridge_cv(x.to(dtype), y.to(dtype), [0.0, 1e-13], cv="gcv").scores
        torch.testing.assert_close(got, want.expand(2, 2), rtol=rtol, atol=0)


def test_a_target_that_is_nearly_met_is_scored_in_float64() -> None:
    x, w = (
        randn(60, 4, dtype=torch.float32),
        torch.tensor([[1.0, 2.0], [0.5, -1.0], [4.0, 0.25], [-2.0, 1.0]]),
    )
    y = x @ w  # up to float32's rounding
    y[:, 1] += 100 * x[:, 0].sign()  # beside one that is not
    lams = [1e-10, 1e-4]
    for cv in ("loo", 4):
        got = cfl_ops.ridge_cv(x, y, lams, cv=cv)
        want = cfl_ops.ridge_cv(x.double(), y.double(), lams, cv=cv)
        torch.testing.assert_close(got.scores, want.scores, rtol=1e-3, atol=0)


def test_a_constant_fold_of_large_targets_has_no_variance() -> None:
    x, y = randn(20, 3), randn(20, 1, seed=1)
    y[:5] = 1e9 + 0.1
    for target in (y, y.float()):
        chosen = cfl_ops.ridge_cv(x.to(target.dtype), target, [0.1, 10.0], cv=4, per_target=False, bias=True)
        assert chosen.lam.item() in (0.1, 10.0)
        assert bool(chosen.scores.isfinite().all())


@pytest.mark.parametrize("unit", [1e13, 1e-13])
@pytest.mark.parametrize("bias", [False, True])
def test_folds_of_large_and_small_targets(unit: float, bias: bool) -> None:
    """They are scaled in float64 then, and the rows of a fold stayed float32."""
    x, y = randn(24, 20), randn(24, 2)
    big, plain = (cfl_ops.ridge_cv(x, y * s, [0.1, 1.0], cv=5, bias=bias) for s in (unit, 1.0))
    torch.testing.assert_close(big.scores / unit**2, plain.scores, rtol=1e-4, atol=0)
    assert torch.equal(big.lam, plain.lam)
