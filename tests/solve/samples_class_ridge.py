"""Samples of class_solve, the op of class_ridge."""

from __future__ import annotations

import torch
from cfl_ops.ops.solve.class_ridge import CLASS_SOLVE

from tests.contract import Case, OpSpec
from tests.solve.data import F64, SINGLE_AND_DOUBLE, norm, randn


def _class_case(name, rows, cols, classes, kappa, *, batch=(), given="both", same=True, gradcheck=False):
    def make(dtype):
        y = torch.randint(classes, (*batch, rows), generator=torch.Generator().manual_seed(rows))
        y[..., : rows // 2] = 0  # more rows than columns in one class
        target = None if given == "cross" else randn(*batch, rows, classes, seed=4)
        cross = None if given == "target" else randn(*batch, cols, classes, seed=5)
        lam = torch.linspace(0.7, 0.7 if same else 2.0, classes, dtype=F64).expand(*batch, classes)
        return [randn(*batch, rows, cols, seed=3).to(dtype), y, target, cross, lam, kappa]

    return Case(name, make, dtypes=SINGLE_AND_DOUBLE, gradcheck=gradcheck)


def _class_systems(x, y, lam, kappa):
    own = y.unsqueeze(-2) == torch.arange(lam.shape[-1]).unsqueeze(-1)
    square = 1 + (kappa - 1) * own.double()  # (..., K, B)
    rows = x.double().unsqueeze(-3)
    eye = torch.eye(x.shape[-1], dtype=F64)
    return rows.mT @ (square.unsqueeze(-1) * rows) + lam[..., None, None] * eye, square


def _class_oracle(x, y, target, cross, lam, kappa):
    systems, square = _class_systems(x, y, lam, kappa)
    right = torch.zeros(*x.shape[:-2], x.shape[-1], lam.shape[-1], dtype=F64) if cross is None else cross
    if target is not None:
        right = right + x.double().mT @ (square.mT * target)
    weight = torch.linalg.solve(systems, right.mT.unsqueeze(-1)).squeeze(-1).mT
    return weight, torch.zeros(x.shape[:-2], dtype=torch.int32)


def _class_bound(x, y, target, cross, lam, kappa):
    weight, _ = _class_oracle(x, y, target, cross, lam, kappa)
    condition = torch.linalg.cond(_class_systems(x, y, lam, kappa)[0]).amax(-1)[..., None, None]
    return [1e3 * torch.finfo(F64).eps * condition * norm(weight), 0]


SPECS = [
    OpSpec(
        CLASS_SOLVE,
        [
            _class_case("plain", 16, 3, 4, 5.0, gradcheck=True),
            _class_case("kappa 1", 16, 3, 4, 1.0),
            _class_case("kappa below 1", 16, 3, 4, 0.3, given="cross"),
            _class_case("underdetermined", 8, 12, 5, 2.0),
            _class_case("underdetermined, targets", 8, 12, 5, 0.3, given="target", gradcheck=True),
            _class_case("a penalty for each class", 16, 3, 4, 5.0, same=False),
            _class_case("large kappa", 6, 8, 3, 1e9, given="target"),
            _class_case("batch", 12, 3, 3, 2.0, batch=(2,)),
        ],
        _class_oracle,
        _class_bound,
        differentiable=(0, 2, 3, 4),
        grad_outputs=1,
    ),
]
