"""class_ridge against its definition."""

from __future__ import annotations

import cfl_ops
import numpy as np
import pytest
import torch
from extended_precision import Wide, wide

from tests.solve.data import F64, randn
from tests.solve.oracle import assert_loss_is_right, features, ridge_head


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


@pytest.mark.parametrize("kappa", [1e-3, 7.0, 1e6])
@pytest.mark.parametrize(
    ("dtype", "mean", "scale", "shape", "lam"),
    [
        (torch.float32, 100.0, 1.0, (4, 6), 1e-4),
        (torch.float32, 0.0, 1e3, (6, 13), 1e-8),
        (torch.float32, 0.0, 1.0, (26, 13), 1e-8),
        (torch.bfloat16, 0.0, 1e3, (6, 13), 1e-8),
        (F64, 1e6, 1.0, (6, 13), 1e-8),
        (F64, 1e6, 1e-3, (26, 13), 1e-4),
        (F64, 0.0, 1e3, (130, 13), 1e8),
    ],
)
def test_class_ridge_loses_no_digits(dtype, mean, scale, shape, lam, kappa) -> None:
    x, labels = features(dtype, *shape, mean, scale), torch.arange(shape[0]) % 3
    head = cfl_ops.class_ridge(x, labels, lam, num_classes=3, kappa=kappa, scale=2.0)
    for k in range(3):
        own = (labels == k).numpy()
        weight, target = np.where(own, Wide(kappa), Wide(1)), np.where(own, Wide(2), Wide(0))[:, None]
        best = ridge_head(wide(x), target, lam, weight=weight)
        assert_loss_is_right(x, torch.from_numpy(target.astype(float)), head[:, k : k + 1], best, weight)


@pytest.mark.parametrize("shape", [(40, 6), (5, 9)])
def test_a_penalty_for_each_class(shape: tuple[int, int]) -> None:
    x, y, old = randn(*shape), torch.arange(shape[0]) % 2, randn(shape[1], 2, seed=2)
    lam, prox = torch.tensor([1.0, 5.0]), torch.tensor([0.5, 0.0])
    options = {"num_classes": 2, "kappa": 3.0, "weight": old}
    together = cfl_ops.class_ridge(x, y, lam, prox=prox, **options)
    for k in range(2):
        alone = cfl_ops.class_ridge(x, y, float(lam[k]), prox=float(prox[k]), **options)
        torch.testing.assert_close(together[:, k], alone[:, k], rtol=1e-10, atol=1e-12)
    for name in ("lam", "prox"):
        with pytest.raises(ValueError, match=rf"{name} must be a number, or have shape \(2,\)"):
            cfl_ops.class_ridge(x, y, **({"lam": 1.0} | {name: torch.ones(3)}), **options)
