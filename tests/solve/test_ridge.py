"""ridge and ridge_path against scikit-learn."""

from __future__ import annotations

import cfl_ops
import pytest
import torch

from tests.solve.data import F64, randn


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(40, 6), (6, 15)])
def test_ridge_and_its_path_are_scikit_learns(shape: tuple[int, int], bias: bool) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = randn(*shape) + 3, randn(shape[0], 2, seed=5)
    lams = [0.1, 1.0, 30.0]
    for dtype, tolerance in ((F64, 1e-9), (torch.float32, 1e-4)):
        path = cfl_ops.ridge_path(x.to(dtype), y.to(dtype), lams, bias=bias)
        for i, lam in enumerate(lams):
            peer = linear_model.Ridge(alpha=lam, fit_intercept=bias).fit(x.numpy(), y.numpy())
            got = cfl_ops.ridge(x.to(dtype), y.to(dtype), lam, bias=bias)
            for weight, intercept in (
                ((got, None), (path, None)) if not bias else (got, (path[0][i], path[1][i]))
            ):
                weight = weight[i] if not bias and weight is path else weight
                torch.testing.assert_close(
                    weight.double(), torch.from_numpy(peer.coef_.T), rtol=tolerance, atol=tolerance
                )
                if intercept is not None:
                    torch.testing.assert_close(
                        intercept.double(), torch.from_numpy(peer.intercept_), rtol=tolerance, atol=tolerance
                    )


def test_ridge_of_a_far_mean() -> None:
    """A mean of 1e4 takes 8 digits of the raw moments in float32; centring first does not lose them."""
    x, w = randn(200, 3), torch.tensor([[1.0], [-2.0], [0.5]], dtype=F64)
    y = x @ w
    weight, _ = cfl_ops.ridge((x + 1e4).float(), y.float(), 1e-6, bias=True)
    assert float((weight.double() - w).abs().max()) < 5e-3  # the data are rounded to 5e-4
    weight, _ = cfl_ops.ridge(x + 1e4, y, 1e-9, bias=True)
    assert float((weight - w).abs().max()) < 1e-9


def test_ridge_zero_penalty_is_least_squares() -> None:
    x = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(cfl_ops.ridge(x, torch.ones(2, 1), 0.0), torch.full((2, 1), 0.5))
    torch.testing.assert_close(cfl_ops.ridge_path(x, torch.ones(2, 1), [0.0])[0], torch.full((2, 1), 0.5))
