"""Sample inputs, oracles and error bounds of the solve family."""

from __future__ import annotations

import torch
from cfl_ops.ops.solve.class_ridge import CLASS_SOLVE
from cfl_ops.ops.solve.least_squares import LSTSQ, PINV
from cfl_ops.ops.solve.ridge_cv import RIDGE_CV
from cfl_ops.ops.solve.ridge_solve import RIDGE_SOLVE
from cfl_ops.ops.solve.small_pinv import SMALL_PINV
from cfl_ops.ops.solve.tall import TALL_FACTOR, TALL_GRAM
from torch import Tensor

from tests.contract import Case, OpSpec

WIDE = (torch.float32, torch.float64)
F64 = torch.float64


def _randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def _tensor(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def _working_eps(dtype: torch.dtype) -> float:
    return torch.finfo(F64 if dtype == F64 else torch.float32).eps


def _norm(m: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(m)[..., None, None]


# --- ridge_solve --------------------------------------------------------------------------------------------


def _system_case(name, order, sides=2, *, batch=(), lam=0.5, diag=False, edit=None, gradcheck=False, **extra):
    def make(dtype):
        x = _randn(order * 10 + 1, *batch, order + 3, order)
        gram = x.mT @ x
        if edit is not None:
            gram = edit(gram)
        lams = torch.tensor(lam, dtype=F64)
        if batch and not gradcheck:
            lams = lams * torch.arange(1, 1 + batch[-1]).expand(batch)
        cross = _randn(order * 10 + 2, *batch, order, sides)
        own = (_randn(order * 10 + 3, *batch, order).abs()).to(dtype) if diag else None
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
    eps = _working_eps(torch.promote_types(gram.dtype, cross.dtype))
    narrow = torch.finfo(torch.promote_types(gram.dtype, cross.dtype)).eps
    error = (4 * system.shape[-1] * eps * condition + narrow) * _norm(solution.nan_to_num(0.0))
    return [error, 0]


SOLVE_CASES = [
    _system_case("two", 2, diag=True, gradcheck=True),
    _system_case("batch", 5, batch=(3,), diag=True),
    _system_case("two batch dimensions", 9, 4, batch=(3, 7)),
    _system_case("order 17", 17, 5, batch=(19,)),
    _system_case("order 33", 33, 1, batch=(4,), diag=True, dtypes=WIDE),
    _system_case("order 130", 130, 3, batch=(2,), dtypes=WIDE),
    _system_case("order 130 alone", 130, 3, dtypes=WIDE),
    _system_case("many sides", 6, 70, batch=(3,)),
    _system_case("no sides", 4, 0, batch=(3,)),
    _system_case("order 0", 0, 2, batch=(3,)),
    _system_case("no batch", 3, 2, batch=(0,)),
    _system_case("singular", 6, 2, batch=(5,), lam=0.0, edit=_singular, dtypes=(F64,), opcheck=False),
    _system_case("bad neighbours", 6, 2, batch=(7,), edit=_one_bad, dtypes=WIDE, opcheck=False),
    _system_case("tiny", 6, 2, batch=(3,), lam=0.0, edit=lambda g: g * 1e-30, dtypes=WIDE),
    _system_case("huge", 6, 2, batch=(3,), lam=0.0, edit=lambda g: g * 1e30, dtypes=WIDE),
]

# --- least squares --------------------------------------------------------------------------------------------


def _matrix_case(name, rows, cols, *, sides=None, batch=(), rank=None, edit=None, more=(), **extra):
    """A matrix of small multiples of 1/8, so that a missing rank is missing exactly in every dtype."""

    def make(dtype):
        generator = torch.Generator().manual_seed(rows * 100 + cols)

        def eighths(*shape: int) -> Tensor:
            return torch.randint(-7, 8, shape, generator=generator).double() / 8

        if rank is None:
            a = eighths(*batch, rows, cols)
        else:
            a = (
                eighths(*batch, rows, rank)
                @ torch.randint(-1, 2, (*batch, rank, cols), generator=generator).double()
            )
        if edit is not None:
            a = edit(a)
        args = [a.to(dtype)]
        if sides is not None:
            args.append(eighths(*batch, rows, sides).to(dtype))
        return args + list(more)

    return Case(name, make, **extra)


def _zero_column(a: Tensor) -> Tensor:
    a[..., :, 1] = 0
    return a


def _one_nan(a: Tensor) -> Tensor:
    a[1, 0, 0] = torch.nan
    a[2, 1, 1] = torch.inf
    return a


def _true_pinv(a: Tensor, rtol=None, atol=None) -> tuple[Tensor, Tensor, Tensor]:
    """Pseudoinverse, rank and condition in float64; NaN where a is not finite."""
    wide = a.double()
    bad = ~wide.isfinite().all(-1).all(-1)
    if a.numel() == 0:
        return wide.mT, torch.zeros(a.shape[:-2], dtype=torch.int64), torch.ones(a.shape[:-2])
    safe = torch.where(bad[..., None, None], 0.0, wide)
    if rtol is None and atol is None and 0 not in safe.abs().amax(-2) and a.shape[-2] > a.shape[-1]:
        scale = safe.abs().amax(-2)
        u, s, vt = torch.linalg.svd(safe / scale.unsqueeze(-2), full_matrices=False)
        if bool((s[..., -1] > 1e-10 * s[..., 0]).all()):  # of full rank, whatever the sizes of the columns
            p = (vt.mT / scale.unsqueeze(-1) / s.unsqueeze(-2)) @ u.mT
            return p, torch.full(a.shape[:-2], s.shape[-1]), s[..., 0] / s[..., -1]
    u, s, vt = torch.linalg.svd(safe, full_matrices=False)
    if rtol is None and atol is None:
        cut = 1e-10 * s[..., :1]  # ranks of these samples are missing exactly
    else:
        cut = torch.maximum(
            torch.zeros(()) if atol is None else atol, (0.0 if rtol is None else rtol) * s[..., :1]
        )
    kept = s > cut
    p = (vt.mT * (kept / torch.where(kept, s, 1.0)).unsqueeze(-2)) @ u.mT
    smallest = torch.where(kept, s, torch.inf).amin(-1)
    condition = torch.where(kept.any(-1), s[..., 0] / smallest, 1.0)
    rank = torch.where(bad, 0, kept.sum(-1))
    return torch.where(bad[..., None, None], torch.nan, p), rank, condition


def _pinv_oracle(a, rtol, atol):
    p, rank, _ = _true_pinv(a, rtol, atol)
    return p, rank, (~a.isfinite().all(-1).all(-1)).int() if a.numel() else torch.zeros(a.shape[:-2]).int()


def _pinv_bound(a, rtol, atol):
    """eps of the result's dtype, and of float64 times the condition (twice: Gram and Newton step)."""
    p, _, condition = _true_pinv(a, rtol, atol)
    eps = torch.finfo(a.dtype).eps + 1e3 * torch.finfo(F64).eps * condition[..., None, None] ** 2
    return [4 * eps * _norm(p.nan_to_num(0.0)), 0, 0]


def _lstsq_oracle(a, b, rtol):
    p, rank, _ = _true_pinv(a, rtol)
    return p @ b.double(), rank, _pinv_oracle(a, rtol, None)[2]


def _lstsq_bound(a, b, rtol):
    p, _, condition = _true_pinv(a, rtol)
    dtype = torch.promote_types(a.dtype, b.dtype)
    eps = torch.finfo(dtype).eps + 1e3 * torch.finfo(F64).eps * condition[..., None, None] ** 2
    return [4 * eps * _norm(p.nan_to_num(0.0)) * _norm(b.double()), 0, 0]


def _matrix_cases(sides, more):
    def case(name, rows, cols, **extra):
        return _matrix_case(name, rows, cols, sides=sides, more=more, **extra)

    return [
        case("tall", 12, 5, gradcheck=True),
        case("wide", 4, 9, gradcheck=True),
        case("long", 300, 7, dtypes=WIDE),
        case("batch", 9, 4, batch=(2, 5)),
        case("wide batch", 3, 8, batch=(11,)),
        case("deficient", 20, 6, rank=3),
        case("deficient wide", 5, 12, rank=2, dtypes=WIDE),
        case("deficient batch", 15, 6, rank=4, batch=(5,), dtypes=WIDE),
        case("zero column", 10, 4, edit=_zero_column),
        case("all zero", 10, 4, edit=torch.zeros_like),
        case("not finite", 8, 3, batch=(4,), edit=_one_nan, opcheck=False),
        case("no rows", 0, 3),
        case("no columns", 3, 0),
        case("no batch", 3, 2, batch=(0,)),
        case(
            "columns of many sizes",
            30,
            4,
            edit=lambda a: a * torch.tensor([1e-30, 1.0, 1e10, 1e25]),
            dtypes=(F64,),
        ),
    ]


def _tall_gram_oracle(t, b, w):
    q = t.double() if w is None else t.double() @ w
    return q.mT @ q, q.mT @ (b.double() if b is not None else t.double()[..., :0])


def _tall_gram_bound(t, b, w):
    q = t.double() if w is None else t.double().abs() @ w.abs()
    gamma = 4 * (t.shape[-2] + t.shape[-1] + 8) * torch.finfo(F64).eps
    right = b.double().abs() if b is not None else t.double()[..., :0]
    return [gamma * (q.abs().mT @ q.abs()), gamma * (q.abs().mT @ right)]


def _tall_case(name, rows, cols, sides=None, *, rotate=False, batch=(), factor=False):
    def make(dtype):
        t = _randn(rows + cols, *batch, rows, cols).to(dtype)
        b = None if sides is None else _randn(sides, *batch, rows, sides).to(dtype)
        if factor:
            return [t, b, 1e8, 1e-13, 1e-2]
        return [t, b, _randn(7, *batch, cols, cols).triu() if rotate else None]

    return Case(name, make, dtypes=(torch.float32,) if factor else WIDE)


def _tall_factor_oracle(t, b, *_):
    gram, cross = _tall_gram_oracle(t, b, None)
    eye = torch.eye(t.shape[-1], dtype=F64).expand(gram.shape)
    batch = t.shape[:-2]
    rank, info = torch.full(batch, t.shape[-1]), torch.zeros(batch, dtype=torch.int32)
    return torch.linalg.inv(gram), eye, cross, rank, info


def _tall_factor_bound(t, b, *_):
    inverse = _tall_factor_oracle(t, b)[0]
    condition = torch.linalg.cond(inverse)[..., None, None]
    return [
        1e2 * torch.finfo(F64).eps * condition * _norm(inverse),
        0.0,
        _tall_gram_bound(t, b, None)[1],
        0,
        0,
    ]


def _small_pinv_oracle(a, limit):
    p, _, _ = _true_pinv(a)
    return p, torch.zeros(a.shape[:-2], dtype=torch.int32)


# --- ridge_cv and class_solve -----------------------------------------------------------------------------------


def _cv_case(name, rows, cols, kind, folds, per_target, bias):
    def make(dtype):
        x = _randn(rows, rows, cols) + 2
        y = x @ _randn(1, cols, 3) + _randn(2, rows, 3)
        return [
            x.to(dtype),
            y.to(dtype),
            torch.tensor([0.1, 3.0, 50.0], dtype=F64),
            kind,
            folds,
            per_target,
            bias,
        ]

    return Case(name, make, dtypes=WIDE)


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
    eps = _working_eps(x.dtype) * 64 * x.shape[1]
    size = float(y.double().abs().max())
    return [eps * 10 * size, eps * 100 * size, 0.0, eps * (table + table.sqrt() * size) * 10, 0]


def _class_case(name, rows, cols, classes, kappa, *, batch=(), gradcheck=False):
    def make(dtype):
        y = torch.randint(classes, (*batch, rows), generator=torch.Generator().manual_seed(rows))
        y[..., : rows // 2] = 0  # more rows than columns in one class
        lam = torch.tensor(0.7, dtype=F64)
        return [
            _randn(3, *batch, rows, cols).to(dtype),
            y,
            _randn(4, *batch, cols, classes).to(dtype),
            lam,
            kappa,
        ]

    return Case(name, make, dtypes=WIDE, gradcheck=gradcheck)


def _class_systems(x, y, cross, lam, kappa):
    own = y.unsqueeze(-2) == torch.arange(cross.shape[-1]).unsqueeze(-1)
    square = 1 + (kappa - 1) * own.double()  # (..., K, B)
    wide = x.double().unsqueeze(-3)
    return wide.mT @ (square.unsqueeze(-1) * wide) + lam * torch.eye(x.shape[-1], dtype=F64)


def _class_oracle(x, y, cross, lam, kappa):
    systems = _class_systems(x, y, cross, lam, kappa)
    weight = torch.linalg.solve(systems, cross.double().mT.unsqueeze(-1)).squeeze(-1).mT
    return weight, torch.zeros(x.shape[:-2], dtype=torch.int32)


def _class_bound(x, y, cross, lam, kappa):
    weight, _ = _class_oracle(x, y, cross, lam, kappa)
    condition = torch.linalg.cond(_class_systems(x, y, cross, lam, kappa)).amax(-1)[..., None, None]
    eps = torch.finfo(cross.dtype).eps + 1e3 * torch.finfo(F64).eps * condition
    return [eps * _norm(weight), 0]


# ruff: noqa: E501
SPECS = [
    OpSpec(RIDGE_SOLVE, SOLVE_CASES, _solve_oracle, _solve_bound, differentiable=(1, 2, 3), grad_outputs=1),
    OpSpec(LSTSQ, [*_matrix_cases(2, (None,)), _matrix_case("rtol", 9, 5, sides=2, more=(_tensor(0.3),), dtypes=WIDE)],
           _lstsq_oracle, _lstsq_bound, differentiable=(0, 1), grad_outputs=1),
    OpSpec(PINV, [*_matrix_cases(None, (None, None)), _matrix_case("rtol", 9, 5, more=(_tensor(0.3), None), dtypes=WIDE),
                  _matrix_case("atol", 4, 7, more=(None, _tensor(1.0)), batch=(3,), dtypes=WIDE),
                  _matrix_case("both", 9, 5, more=(_tensor(0.1), _tensor(1.0)), dtypes=WIDE)],
           _pinv_oracle, _pinv_bound, differentiable=(0,), grad_outputs=1),
    OpSpec(TALL_GRAM, [_tall_case("plain", 40, 5), _tall_case("sides", 131, 9, 3), _tall_case("rotated", 57, 6, 2, rotate=True),
                       _tall_case("batch", 30, 4, 1, rotate=True, batch=(3,)), _tall_case("one row", 1, 3, 1),
                       _tall_case("long", 5000, 8, 2, rotate=True)],
           _tall_gram_oracle, _tall_gram_bound),
    OpSpec(TALL_FACTOR, [_tall_case("plain", 60, 5, factor=True), _tall_case("sides", 80, 9, 3, factor=True),
                         _tall_case("batch", 70, 4, 2, batch=(3,), factor=True)],
           _tall_factor_oracle, _tall_factor_bound),
    OpSpec(SMALL_PINV, [_matrix_case("tall", 9, 5, batch=(11,), more=(1e8,), dtypes=WIDE),
                        _matrix_case("wide", 6, 20, batch=(3,), more=(1e8,), dtypes=WIDE)],
           _small_pinv_oracle, lambda a, limit: _pinv_bound(a, None, None)[:2]),
    OpSpec(RIDGE_CV, [_cv_case("loo", 20, 4, "loo", 0, True, False), _cv_case("loo bias", 20, 4, "loo", 0, True, True),
                      _cv_case("loo shared", 20, 4, "loo", 0, False, True), _cv_case("loo wide", 9, 15, "loo", 0, True, True),
                      _cv_case("folds", 23, 4, "folds", 5, True, True), _cv_case("folds shared", 23, 4, "folds", 5, False, False),
                      _cv_case("folds wide", 12, 18, "folds", 4, True, True)],
           _cv_oracle, _cv_bound),
    OpSpec(CLASS_SOLVE, [_class_case("plain", 16, 3, 4, 5.0, gradcheck=True), _class_case("kappa 1", 16, 3, 4, 1.0),
                         _class_case("kappa below 1", 16, 3, 4, 0.3), _class_case("wide", 8, 12, 5, 2.0),
                         _class_case("batch", 12, 3, 3, 2.0, batch=(2,))],
           _class_oracle, _class_bound, differentiable=(0, 2, 3), grad_outputs=1),
]  # fmt: skip
