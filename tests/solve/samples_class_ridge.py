"""Samples of class_solve, the op of class_ridge."""

from __future__ import annotations

import torch
from cfl_ops.ops.solve.class_ridge import CLASS_SOLVE

from tests.contract import Case, OpSpec
from tests.solve.data import F64, SINGLE_AND_DOUBLE, norm, randn


def _class_case(name, rows, cols, classes, kappa, *, batch=(), gradcheck=False):
    def make(dtype):
        y = torch.randint(classes, (*batch, rows), generator=torch.Generator().manual_seed(rows))
        y[..., : rows // 2] = 0  # more rows than columns in one class
        lam = torch.tensor(0.7, dtype=F64)
        return [
            randn(*batch, rows, cols, seed=3).to(dtype),
            y,
            randn(*batch, cols, classes, seed=4).to(dtype),
            lam,
            kappa,
        ]

    return Case(name, make, dtypes=SINGLE_AND_DOUBLE, gradcheck=gradcheck)


def _class_systems(x, y, cross, lam, kappa):
    own = y.unsqueeze(-2) == torch.arange(cross.shape[-1]).unsqueeze(-1)
    square = 1 + (kappa - 1) * own.double()  # (..., K, B)
    rows = x.double().unsqueeze(-3)
    return rows.mT @ (square.unsqueeze(-1) * rows) + lam * torch.eye(x.shape[-1], dtype=F64)


def _class_oracle(x, y, cross, lam, kappa):
    systems = _class_systems(x, y, cross, lam, kappa)
    weight = torch.linalg.solve(systems, cross.double().mT.unsqueeze(-1)).squeeze(-1).mT
    return weight, torch.zeros(x.shape[:-2], dtype=torch.int32)


def _class_bound(x, y, cross, lam, kappa):
    weight, _ = _class_oracle(x, y, cross, lam, kappa)
    condition = torch.linalg.cond(_class_systems(x, y, cross, lam, kappa)).amax(-1)[..., None, None]
    eps = torch.finfo(cross.dtype).eps + 1e3 * torch.finfo(F64).eps * condition
    return [eps * norm(weight), 0]


SPECS = [
    OpSpec(
        CLASS_SOLVE,
        [
            _class_case("plain", 16, 3, 4, 5.0, gradcheck=True),
            _class_case("kappa 1", 16, 3, 4, 1.0),
            _class_case("kappa below 1", 16, 3, 4, 0.3),
            _class_case("underdetermined", 8, 12, 5, 2.0),
            _class_case("batch", 12, 3, 3, 2.0, batch=(2,)),
        ],
        _class_oracle,
        _class_bound,
        differentiable=(0, 2, 3),
        grad_outputs=1,
    ),
]
