"""ridge_cv against its definition, and scikit-learn's folds."""

from __future__ import annotations

import cfl_ops
import pytest
import torch
from cfl_ops.ops.solve import ridge_cv as module

from tests.solve.data import F64, randn


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
    monkeypatch.setattr(module, "PREDICTION_BYTES", 1)
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
