"""Answers do not depend on the unit of measurement: of c x, with c^2 times the penalty, they are those of x over c."""

from __future__ import annotations

from collections.abc import Callable

import cfl_ops
import pytest
import torch
from torch import Tensor

Solve = Callable[[Tensor, Tensor, float], list[Tensor]]


def recursive(x: Tensor, y: Tensor, c: float) -> list[Tensor]:
    filter_ = cfl_ops.RecursiveRidge(x.shape[1], 3, alpha=0.1 * c * c, dtype=x.dtype)
    for rows, targets in zip(x.split(4), y.split(4), strict=True):
        filter_.update(rows, targets)
    return [filter_.weight * c]


def proximal(x: Tensor, y: Tensor, c: float) -> list[Tensor]:
    step = cfl_ops.proximal_step(x, y, x.new_zeros(3, x.shape[1]), lam=0.1 * c * c)
    return [step.weight * c, step.loss, step.grad_features * c]


def rescaled(x: Tensor, y: Tensor, c: float) -> list[Tensor]:
    old, labels = x.new_zeros(3, x.shape[1]), torch.arange(len(x)) % 3
    step = cfl_ops.rescaled_proximal_step(x, labels, old, lam=0.1 * c * c, kappa=4.0, target_scale=2.0)
    return [step.weight * c, step.loss, step.grad_features * c]


def with_intercept(x: Tensor, y: Tensor, c: float) -> list[Tensor]:
    weight, intercept = cfl_ops.ridge(x, y, 0.1 * c * c, bias=True)
    return [weight * c, intercept]


def chosen(x: Tensor, y: Tensor, c: float) -> list[Tensor]:
    fit = cfl_ops.ridge_cv(x, y, torch.tensor([0.1, 1.0], dtype=torch.float64) * c * c)
    return [fit.weight * c, fit.scores]


def factors(x: Tensor, y: Tensor, c: float) -> list[Tensor]:
    found = cfl_ops.factorize(x)
    return [found.pinv() * c, found.solve(y) * c, found.condition]


def classes(x: Tensor, y: Tensor, c: float) -> list[Tensor]:
    return [cfl_ops.class_ridge(x, torch.arange(len(x)) % 3, 0.1 * c * c, num_classes=3) * c]


def path(x: Tensor, y: Tensor, c: float) -> list[Tensor]:
    return [cfl_ops.ridge_path(x, y, torch.tensor([0.1, 1.0], dtype=torch.float64) * c * c) * c]


SOLVES: dict[str, Solve] = {
    "ridge": lambda x, y, c: [cfl_ops.ridge(x, y, 0.1 * c * c) * c],
    "ridge with bias": with_intercept,
    "ridge_path": path,
    "ridge_cv": chosen,
    "class_ridge": classes,
    "lstsq": lambda x, y, c: [cfl_ops.lstsq(x, y) * c],
    "pinv": lambda x, y, c: [cfl_ops.pinv(x) * c],
    "factorize": factors,
    "proximal_step": proximal,
    "rescaled_proximal_step": rescaled,
    "RecursiveRidge": recursive,
}
POWERS = {torch.float32: (-55, -30, 30, 55), torch.float64: (-250, -100, 100, 250)}


@pytest.mark.parametrize("backend", ["native", "python"], indirect=True)
@pytest.mark.parametrize("dtype", list(POWERS))
@pytest.mark.parametrize("name", SOLVES)
def test_answers_scale_with_the_features(name: str, dtype: torch.dtype, backend: str) -> None:
    for rows, width in ((30, 8), (8, 30), (12, 12), (200, 5)):
        x, y = torch.randn(rows, width, dtype=dtype), torch.randn(rows, 3, dtype=dtype)
        plain = SOLVES[name](x, y, 1.0)
        for power in POWERS[dtype]:
            c = 2.0**power
            for got, expected in zip(SOLVES[name](x * c, y, c), plain, strict=True):
                assert got.isfinite().all()
                error = (got - expected).double().norm() / expected.double().norm()
                assert error < (1e-3 if dtype == torch.float32 else 1e-8)
