"""Samples of ridge_fit, the op of ridge and ridge_path, and of its step narrow_ridge."""

from __future__ import annotations

import torch
from cfl_ops.ops.solve.narrow_ridge import NARROW_RIDGE
from cfl_ops.ops.solve.ridge_fit import RIDGE_FIT

from tests.contract import Case, OpSpec
from tests.solve.data import F64, SINGLE_AND_DOUBLE, norm, randn


def _fit_case(
    name, rows, cols, lam, *, bias=False, given="y", batch=(), targets=2, mean=0.0, gradcheck=False
):
    def make(dtype):
        penalties = torch.as_tensor(lam, dtype=F64).expand(*batch, -1, -1)
        y = None if given == "cross" else randn(*batch, rows, targets, seed=1).to(dtype)
        cross = None
        if given != "y":
            cross = randn(*batch, penalties.shape[-2], cols, targets, seed=2)
        return [(randn(*batch, rows, cols) + mean).to(dtype), y, cross, penalties, bias]

    return Case(name, make, dtypes=SINGLE_AND_DOUBLE, gradcheck=gradcheck)


def _systems(x, y, cross, lam, bias):
    """One for each fit and target, (..., L, K, D, D), and its right side."""
    x64 = x.double() - (x.double().mean(-2, keepdim=True) if bias else 0.0)
    targets = y.shape[-1] if y is not None else cross.shape[-1]
    right = torch.zeros(*lam.shape[:-1], x.shape[-1], targets, dtype=F64) if cross is None else cross.double()
    if y is not None:
        right = right + (
            x64.mT @ (y.double() - (y.double().mean(-2, keepdim=True) if bias else 0.0))
        ).unsqueeze(-3)
    penalties = lam.expand(*lam.shape[:-1], targets)[..., None, None]
    return (x64.mT @ x64)[..., None, None, :, :] + penalties * torch.eye(x.shape[-1], dtype=F64), right


def _oracle(x, y, cross, lam, bias):
    systems, right = _systems(x, y, cross, lam, bias)
    weight = torch.linalg.solve(systems, right.mT.unsqueeze(-1)).squeeze(-1).mT
    return weight, torch.zeros(x.shape[:-2], dtype=torch.int32)


def _bound(x, y, cross, lam, bias):
    """As that of any solution by a Gram matrix in float64."""
    weight, _ = _oracle(x, y, cross, lam, bias)
    condition = torch.linalg.cond(_systems(x, y, cross, lam, bias)[0]).amax(-1)[..., None, None]
    return [1e3 * torch.finfo(F64).eps * condition * norm(weight), 0]


def _narrow_case(name, rows, cols, *, given="both", batch=()):
    def make(dtype):
        b = None if given == "right" else randn(*batch, rows, 3, seed=1).to(dtype)
        right = None if given == "b" else randn(*batch, cols, 3, seed=2)
        return [randn(*batch, rows, cols).to(dtype), b, right, torch.full(batch, 0.3, dtype=F64)]

    return Case(name, make, dtypes=SINGLE_AND_DOUBLE)


def _narrow_oracle(t, b, right, lam):
    """The condition is an estimate: tests/solve/test_ridge.py says within what."""
    system = t.double().mT @ t.double() + lam[..., None, None] * torch.eye(t.shape[-1], dtype=F64)
    total = (0 if b is None else t.double().mT @ b.double()) + (0 if right is None else right)
    return torch.linalg.solve(system, total), None


def _narrow_bound(t, b, right, lam):
    solution, _ = _narrow_oracle(t, b, right, lam)
    system = t.double().mT @ t.double() + lam[..., None, None] * torch.eye(t.shape[-1], dtype=F64)
    return [1e2 * torch.finfo(F64).eps * torch.linalg.cond(system)[..., None, None] * norm(solution), 0]


SPECS = [
    OpSpec(
        NARROW_RIDGE,
        [
            _narrow_case("plain", 30, 6),
            _narrow_case("targets", 70, 9, given="b"),
            _narrow_case("right sides", 12, 4, given="right", batch=(3,)),
            _narrow_case("more columns than rows", 3, 7),
        ],
        _narrow_oracle,
        _narrow_bound,
    ),
    OpSpec(
        RIDGE_FIT,
        [
            _fit_case("plain", 9, 4, [[0.5]], gradcheck=True),
            _fit_case("bias", 12, 4, [[0.5]], bias=True, mean=100.0),
            _fit_case("underdetermined", 4, 7, [[0.5]], bias=True, given="both", gradcheck=True),
            _fit_case("right sides alone", 9, 4, [[0.5]], given="cross"),
            _fit_case("path", 9, 4, [[0.1], [1.0], [9.0]], bias=True, given="both", gradcheck=True),
            _fit_case("underdetermined path", 4, 7, [[0.1], [1.0]]),
            _fit_case("a penalty for each target", 9, 4, [[0.1, 8.0]], bias=True, gradcheck=True),
            _fit_case("batch", 9, 4, [[0.5]], batch=(3,)),
            _fit_case("batch of paths", 5, 6, [[0.5], [2.0]], batch=(2, 2), given="both"),
            _fit_case("ill-conditioned", 9, 4, [[1e-3]], mean=1e3),
            _fit_case("no rows", 0, 3, [[0.5]], given="both"),
        ],
        _oracle,
        _bound,
        differentiable=(0, 1, 2, 3),
        grad_outputs=1,
    ),
]
