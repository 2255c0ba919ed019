"""Samples of ridge_cv."""

from __future__ import annotations

import torch
from cfl_ops.ops.solve.ridge_cv import RIDGE_CV

from tests.contract import Case, OpSpec
from tests.solve.data import F64, SINGLE_AND_DOUBLE, randn, working_eps


def _cv_case(name, rows, cols, kind, folds, per_target, bias):
    def make(dtype):
        x = randn(rows, cols, seed=rows) + 2
        y = x @ randn(cols, 3, seed=1) + randn(rows, 3, seed=2)
        return [
            x.to(dtype),
            y.to(dtype),
            torch.tensor([0.1, 3.0, 50.0], dtype=F64),
            kind,
            folds,
            per_target,
            bias,
        ]

    return Case(name, make, dtypes=SINGLE_AND_DOUBLE)


def _fit_ridge(x, y, lam, bias):
    mean_x, mean_y = (x.mean(0), y.mean(0)) if bias else (x[0] * 0, y[0] * 0)
    xc, yc = x - mean_x, y - mean_y
    weight = torch.linalg.solve(xc.mT @ xc + lam * torch.eye(x.shape[1], dtype=F64), xc.mT @ yc)
    return weight, mean_y - mean_x @ weight


def _cv_oracle(x, y, lams, kind, folds, per_target, bias):
    """Every fit by itself."""
    x, y = x.double(), y.double()
    rows = x.shape[0]
    pieces = torch.arange(rows).tensor_split(folds if kind == "folds" else rows)
    scores, shared = [], []
    for lam in lams:
        errors, relative = torch.zeros(y.shape[1], dtype=F64), []
        for held in pieces:
            rest = torch.ones(rows, dtype=torch.bool)
            rest[held] = False
            weight, intercept = _fit_ridge(x[rest], y[rest], lam, bias)
            square = (y[held] - x[held] @ weight - intercept).square()
            errors += square.sum(0) / rows
            if kind == "folds":
                relative.append((square.mean(0) / y[held].var(0, correction=0)).mean())
        scores.append(errors)
        shared.append(torch.stack(relative).mean() if relative else errors.mean())
    table = torch.stack(scores)
    chosen = table.argmin(0) if per_target else torch.stack(shared).argmin()
    lam = lams[chosen]
    fits = [_fit_ridge(x, y, value, bias) for value in lam.expand(y.shape[1])]
    weight = torch.stack([fit[0][:, k] for k, fit in enumerate(fits)], -1)
    intercept = torch.stack([fit[1][k] for k, fit in enumerate(fits)]) if bias else weight.new_zeros(0)
    return weight, intercept, lam, table, torch.zeros((), dtype=torch.int32)


def _cv_bound(x, y, lams, *rest):
    """Predictions are made in the working precision: their error enters each residual."""
    *_, table, _ = _cv_oracle(x, y, lams, *rest)
    eps = working_eps(x.dtype) * 64 * x.shape[1]
    size = float(y.double().abs().max())
    return [eps * 10 * size, eps * 100 * size, 0.0, eps * (table + table.sqrt() * size) * 10, 0]


SPECS = [
    OpSpec(
        RIDGE_CV,
        [
            _cv_case("loo", 20, 4, "loo", 0, True, False),
            _cv_case("loo bias", 20, 4, "loo", 0, True, True),
            _cv_case("loo shared", 20, 4, "loo", 0, False, True),
            _cv_case("loo underdetermined", 9, 15, "loo", 0, True, True),
            _cv_case("folds", 23, 4, "folds", 5, True, True),
            _cv_case("folds shared", 23, 4, "folds", 5, False, False),
            _cv_case("folds underdetermined", 12, 18, "folds", 4, True, True),
        ],
        _cv_oracle,
        _cv_bound,
    ),
]
