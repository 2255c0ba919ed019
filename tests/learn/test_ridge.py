"""The scikit-learn estimators Ridge and RidgeCV."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from cfl_ops.learn import Ridge, RidgeCV
from sklearn import linear_model
from sklearn.utils.estimator_checks import parametrize_with_checks


@parametrize_with_checks([Ridge(), RidgeCV(), RidgeCV(alpha_per_target=True), RidgeCV(cv=3)])
def test_scikit_learn_checks(estimator, check) -> None:
    check(estimator)


def data(targets: int | None = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(40, 5)) + 1
    y = x @ generator.normal(size=(5, targets or 1)) + generator.normal(size=(40, targets or 1))
    return x, y if targets else y[:, 0]


@pytest.mark.parametrize("targets", [None, 3])
@pytest.mark.parametrize("intercept", [True, False])
def test_ridge_is_scikit_learns(targets: int | None, intercept: bool) -> None:
    x, y = data(targets)
    ours = Ridge(alpha=2.0, fit_intercept=intercept).fit(x, y)
    theirs = linear_model.Ridge(alpha=2.0, fit_intercept=intercept).fit(x, y)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-10)
    np.testing.assert_allclose(ours.intercept_, theirs.intercept_, rtol=1e-10)
    np.testing.assert_allclose(ours.predict(x), theirs.predict(x), rtol=1e-10)
    assert ours.score(x, y) == pytest.approx(theirs.score(x, y))


@pytest.mark.parametrize("per_target", [True, False])
@pytest.mark.parametrize("cv", [None, 5])
def test_ridge_cv_chooses_as_scikit_learn_does(per_target: bool, cv: int | None) -> None:
    if per_target and cv:
        pytest.skip("scikit-learn has no penalty for each target with folds")
    x, y = data()
    alphas = (0.01, 1.0, 5.0, 100.0)
    ours = RidgeCV(alphas, cv=cv, alpha_per_target=per_target).fit(x, y)
    theirs = linear_model.RidgeCV(alphas, cv=cv, alpha_per_target=per_target).fit(x, y)
    np.testing.assert_array_equal(ours.alpha_, theirs.alpha_)
    np.testing.assert_allclose(ours.coef_, theirs.coef_, rtol=1e-8)


class DLPackOnly:
    """An array of another library: nothing but DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **kwargs: object) -> object:
        return self.tensor.__dlpack__(**kwargs)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.tensor.__dlpack_device__()


@pytest.mark.parametrize("wrap", [lambda t: t, DLPackOnly], ids=["torch", "dlpack"])
@pytest.mark.parametrize("estimator", [Ridge(alpha=2.0), RidgeCV()])
def test_tensors_in_tensors_out(estimator, wrap) -> None:
    x, y = data()
    want = estimator.fit(x, y).predict(x)
    tensors = wrap(torch.from_numpy(x)), wrap(torch.from_numpy(y))
    got = estimator.fit(*tensors).predict(tensors[0])
    assert isinstance(got, torch.Tensor)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-10)
    with pytest.raises(ValueError, match="NaN or Inf"):
        estimator.fit(torch.full((3, 2), torch.nan), torch.ones(3))
    with pytest.raises(ValueError, match="rows of X"):
        estimator.fit(torch.ones(3, 2), torch.ones(4))


@pytest.mark.parametrize("estimator", [Ridge(alpha=1e-3), RidgeCV(alphas=(1e-3,))])
@pytest.mark.parametrize(
    ("features", "target", "result"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float64, torch.float64),
        (torch.float16, torch.int64, torch.float32),
        (torch.bfloat16, torch.int16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float16, torch.float64),
        (torch.int32, torch.float16, torch.float32),
        (torch.float32, torch.float32, torch.float32),
    ],
)
def test_nothing_is_narrowed(estimator, features, target, result) -> None:
    """Labels of 257 are 256 in bfloat16, and targets of 1e5 infinite in float16."""
    generator = torch.Generator().manual_seed(0)
    x = (4 * torch.randn(50, 3, generator=generator)).to(features)
    y = x.double() @ torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64) * 8
    y = (y + (1e5 if target in (torch.float32, torch.float64, torch.int64) else 257)).round().to(target)
    model = estimator.fit(x, y)
    assert model.coef_.dtype == result
    want = Ridge(alpha=1e-3).fit(x.double(), y.double()).predict(x.double())
    got = model.predict(x)
    assert got.dtype == result
    torch.testing.assert_close(got.double(), want, rtol=16 * torch.finfo(result).eps, atol=0)
    assert model.score(x, y) > 0.99


def test_numpy_targets_are_not_narrowed() -> None:
    x, y = data()
    y = y + 1e6
    for narrow, wide in (
        (x.astype(np.float32), y),
        (x.astype(np.float32), y.round().astype(np.int64) + 2**40),
    ):
        model = Ridge(alpha=1e-3).fit(narrow, wide)
        assert model.coef_.dtype == np.float64
        want = linear_model.Ridge(alpha=1e-3).fit(narrow.astype(float), wide.astype(float))
        np.testing.assert_allclose(model.predict(narrow), want.predict(narrow.astype(float)), rtol=1e-12)


def test_a_penalty_for_each_target() -> None:
    x, y = data()
    for alpha in ([0.1, 1.0, 50.0], np.array([0.1, 1.0, 50.0]), torch.tensor([0.1, 1.0, 50.0])):
        theirs = linear_model.Ridge(alpha=np.asarray(alpha)).fit(x, y)
        np.testing.assert_allclose(Ridge(alpha=alpha).fit(x, y).coef_, theirs.coef_, rtol=1e-7)
    np.testing.assert_allclose(
        Ridge(alpha=[2.0]).fit(x, y[:, 0]).coef_,
        linear_model.Ridge(alpha=2.0).fit(x, y[:, 0]).coef_,
        rtol=1e-10,
    )
    with pytest.raises(ValueError, match="a penalty for each of the 3 targets, but got 2"):
        Ridge(alpha=[1.0, 2.0]).fit(x, y)
