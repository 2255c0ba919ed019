"""class_ridge against its definition."""

from __future__ import annotations

import cfl_ops
import pytest
import torch

from tests.solve.data import F64, randn


@pytest.mark.parametrize("kappa", [0.25, 1.0, 6.0])
def test_class_ridge_is_its_definition(kappa: float) -> None:
    x, y, old = randn(40, 6), torch.arange(40) % 3, randn(6, 4, seed=2)
    y[:20] = 0
    got = cfl_ops.class_ridge(x, y, 0.4, num_classes=4, kappa=kappa, scale=2.0, prox=0.3, weight=old)
    for k in range(4):
        square = 1 + (kappa - 1) * (y == k).double()
        system = x.mT @ (square.unsqueeze(-1) * x) + 0.7 * torch.eye(6, dtype=F64)
        want = torch.linalg.solve(system, x.mT @ (square * 2.0 * (y == k)) + 0.3 * old[:, k])
        torch.testing.assert_close(got[:, k], want, rtol=1e-10, atol=1e-12)


def test_class_ridge_bad_arguments() -> None:
    x, y = randn(4, 2), torch.tensor([0, 1, 2, 3])
    with pytest.raises(IndexError, match="from 0 to 2, but got 3 in row 3"):
        cfl_ops.class_ridge(x, y, 1.0, num_classes=3)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        cfl_ops.class_ridge(torch.ones(4, 2), y, 0.0, num_classes=4, kappa=2.0)
    with pytest.raises(ValueError, match="weight must be given"):
        cfl_ops.class_ridge(x, y, 1.0, num_classes=4, prox=1.0)
    with pytest.raises(ValueError, match="kappa must be finite and positive"):
        cfl_ops.class_ridge(x, y, 1.0, num_classes=4, kappa=0.0)
