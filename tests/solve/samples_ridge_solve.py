"""Samples of ridge_solve."""

from __future__ import annotations

import torch
from cfl_ops.ops.solve.ridge_solve import RIDGE_SOLVE
from torch import Tensor

from tests.contract import Case, OpSpec
from tests.solve.data import F64, SINGLE_AND_DOUBLE, norm, randn, working_eps


def _system_case(name, order, sides=2, *, batch=(), lam=0.5, diag=False, edit=None, gradcheck=False, **extra):
    def make(dtype):
        x = randn(*batch, order + 3, order, seed=order * 10 + 1)
        gram = x.mT @ x
        if edit is not None:
            gram = edit(gram)
        lams = torch.tensor(lam, dtype=F64)
        if batch and not gradcheck:
            lams = lams * torch.arange(1, 1 + batch[-1]).expand(batch)
        cross = randn(*batch, order, sides, seed=order * 10 + 2)
        own = (randn(*batch, order, seed=order * 10 + 3).abs()).to(dtype) if diag else None
        return [gram.to(dtype), cross.to(dtype), lams, own]

    return Case(name, make, gradcheck=gradcheck, **extra)


def _singular(gram: Tensor) -> Tensor:
    gram[..., -1, :] = gram[..., 0, :]
    gram[..., :, -1] = gram[..., :, 0]
    return gram


def _one_bad(gram: Tensor) -> Tensor:
    gram[1] = -gram[1]
    gram[3, 1, 0] = torch.nan
    gram[4, 0, 0] = torch.inf
    return gram


def _solve_system(gram, cross, lam, lam_diag):
    lower = gram.double().tril()
    shift = lam.expand(gram.shape[:-2]).unsqueeze(-1).expand(gram.shape[:-1])
    if lam_diag is not None:
        shift = shift + lam_diag.double()
    return lower + lower.tril(-1).mT + torch.diag_embed(shift), cross.double()


def _solve_oracle(gram, cross, lam, lam_diag):
    """By eigenvalues, so that what is not definite is seen."""
    system, right = _solve_system(gram, cross, lam, lam_diag)
    usable = system.isfinite().all(-1).all(-1)
    safe = torch.where(usable[..., None, None], system, torch.eye(system.shape[-1], dtype=F64))
    values = torch.linalg.eigvalsh(safe)
    eps = torch.finfo(F64).eps * system.shape[-1]
    good = (
        usable & (values > eps * values.abs().amax(-1, keepdim=True)).all(-1) if values.shape[-1] else usable
    )
    safe = torch.where(good[..., None, None], safe, torch.eye(system.shape[-1], dtype=F64))
    solution = torch.linalg.solve(safe, right)
    return torch.where(good[..., None, None], solution, torch.nan), None


def _solve_bound(gram, cross, lam, lam_diag):
    """n eps cond ||x||, the normwise bound of a Cholesky solve, and the rounding of the result."""
    system, _ = _solve_system(gram, cross, lam, lam_diag)
    solution, _ = _solve_oracle(gram, cross, lam, lam_diag)
    if solution.numel() == 0:
        return [0.0, 0]
    safe = torch.where(solution.isnan().any(-1, keepdim=True), torch.eye(system.shape[-1], dtype=F64), system)
    condition = torch.linalg.cond(safe.nan_to_num(1.0))[..., None, None]
    eps = working_eps(torch.promote_types(gram.dtype, cross.dtype))
    narrow = torch.finfo(torch.promote_types(gram.dtype, cross.dtype)).eps
    error = (4 * system.shape[-1] * eps * condition + narrow) * norm(solution.nan_to_num(0.0))
    return [error, 0]


SOLVE_CASES = [
    _system_case("two", 2, diag=True, gradcheck=True),
    _system_case("batch", 5, batch=(3,), diag=True),
    _system_case("two batch dimensions", 9, 4, batch=(3, 7)),
    _system_case("order 17", 17, 5, batch=(19,)),
    _system_case("order 33", 33, 1, batch=(4,), diag=True, dtypes=SINGLE_AND_DOUBLE),
    _system_case("order 130", 130, 3, batch=(2,), dtypes=SINGLE_AND_DOUBLE),
    _system_case("order 130 alone", 130, 3, dtypes=SINGLE_AND_DOUBLE),
    _system_case("many sides", 6, 70, batch=(3,)),
    _system_case("no sides", 4, 0, batch=(3,)),
    _system_case("order 0", 0, 2, batch=(3,)),
    _system_case("no batch", 3, 2, batch=(0,)),
    _system_case("singular", 6, 2, batch=(5,), lam=0.0, edit=_singular, dtypes=(F64,), opcheck=False),
    _system_case("bad neighbours", 6, 2, batch=(7,), edit=_one_bad, dtypes=SINGLE_AND_DOUBLE, opcheck=False),
    _system_case("tiny", 6, 2, batch=(3,), lam=0.0, edit=lambda g: g * 1e-30, dtypes=SINGLE_AND_DOUBLE),
    _system_case("huge", 6, 2, batch=(3,), lam=0.0, edit=lambda g: g * 1e30, dtypes=SINGLE_AND_DOUBLE),
]


EMPTY = ("no sides", "order 0", "no batch")
SPECS = [
    OpSpec(
        RIDGE_SOLVE,
        SOLVE_CASES,
        _solve_oracle,
        _solve_bound,
        differentiable=(1, 2, 3),
        grad_outputs=1,
        unserved={"native": EMPTY, "triton": (*EMPTY, "order 130", "order 130 alone")},
    ),
]
