"""Samples of lstsq and pinv, and of the helpers they are made of."""

from __future__ import annotations

import torch
from cfl_ops.ops.solve.graph_factors import FACTORS
from cfl_ops.ops.solve.least_squares import LSTSQ, PINV
from cfl_ops.ops.solve.small_pinv import SMALL_PINV
from cfl_ops.ops.solve.tall import TALL_FACTOR, TALL_GRAM
from torch import Tensor

from tests.contract import Case, OpSpec
from tests.solve.data import F64, SINGLE_AND_DOUBLE, norm, number, randn


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
    a64 = a.double()
    bad = ~a64.isfinite().all(-1).all(-1)
    if a.numel() == 0:
        return a64.mT, torch.zeros(a.shape[:-2], dtype=torch.int64), torch.ones(a.shape[:-2])
    safe = torch.where(bad[..., None, None], 0.0, a64)
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
    return [4 * eps * norm(p.nan_to_num(0.0)), 0, 0]


def _lstsq_oracle(a, b, rtol):
    p, rank, _ = _true_pinv(a, rtol)
    return p @ b.double(), rank, _pinv_oracle(a, rtol, None)[2]


def _lstsq_bound(a, b, rtol):
    p, _, condition = _true_pinv(a, rtol)
    dtype = torch.promote_types(a.dtype, b.dtype)
    eps = torch.finfo(dtype).eps + 1e3 * torch.finfo(F64).eps * condition[..., None, None] ** 2
    return [4 * eps * norm(p.nan_to_num(0.0)) * norm(b.double()), 0, 0]


def _matrix_cases(sides, more):
    def case(name, rows, cols, **extra):
        return _matrix_case(name, rows, cols, sides=sides, more=more, **extra)

    return [
        case("tall", 12, 5, gradcheck=True),
        case("underdetermined", 4, 9, gradcheck=True),
        case("long", 300, 7, dtypes=SINGLE_AND_DOUBLE),
        case("batch", 9, 4, batch=(2, 5)),
        case("underdetermined batch", 3, 8, batch=(11,)),
        case("deficient", 20, 6, rank=3),
        case("deficient underdetermined", 5, 12, rank=2, dtypes=SINGLE_AND_DOUBLE),
        case("deficient batch", 15, 6, rank=4, batch=(5,), dtypes=SINGLE_AND_DOUBLE),
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
        t = randn(*batch, rows, cols, seed=rows + cols).to(dtype)
        b = None if sides is None else randn(*batch, rows, sides, seed=sides).to(dtype)
        if factor:
            return [t, b, 1e8, 1e-13, 1e-2]
        return [t, b, randn(*batch, cols, cols, seed=7).triu() if rotate else None]

    return Case(name, make, dtypes=(torch.float32,) if factor else SINGLE_AND_DOUBLE)


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
        1e2 * torch.finfo(F64).eps * condition * norm(inverse),
        0.0,
        _tall_gram_bound(t, b, None)[1],
        0,
        0,
    ]


def _small_pinv_oracle(a, limit):
    p, _, _ = _true_pinv(a)
    return p, torch.zeros(a.shape[:-2], dtype=torch.int32)


SPECS = [
    OpSpec(
        LSTSQ,
        [
            *_matrix_cases(2, (None,)),
            _matrix_case("rtol", 9, 5, sides=2, more=(number(0.3),), dtypes=SINGLE_AND_DOUBLE),
        ],
        _lstsq_oracle,
        _lstsq_bound,
        differentiable=(0, 1),
        grad_outputs=1,
    ),
    OpSpec(
        PINV,
        [
            *_matrix_cases(None, (None, None)),
            _matrix_case("rtol", 9, 5, more=(number(0.3), None), dtypes=SINGLE_AND_DOUBLE),
            _matrix_case("atol", 4, 7, more=(None, number(1.0)), batch=(3,), dtypes=SINGLE_AND_DOUBLE),
            _matrix_case("both", 9, 5, more=(number(0.1), number(1.0)), dtypes=SINGLE_AND_DOUBLE),
        ],
        _pinv_oracle,
        _pinv_bound,
        differentiable=(0,),
        grad_outputs=1,
    ),
    OpSpec(
        TALL_GRAM,
        [
            _tall_case("plain", 40, 5),
            _tall_case("sides", 131, 9, 3),
            _tall_case("rotated", 57, 6, 2, rotate=True),
            _tall_case("batch", 30, 4, 1, rotate=True, batch=(3,)),
            _tall_case("one row", 1, 3, 1),
            _tall_case("long", 5000, 8, 2, rotate=True),
        ],
        _tall_gram_oracle,
        _tall_gram_bound,
    ),
    OpSpec(
        TALL_FACTOR,
        [
            _tall_case("plain", 60, 5, factor=True),
            _tall_case("sides", 80, 9, 3, factor=True),
            _tall_case("batch", 70, 4, 2, batch=(3,), factor=True),
        ],
        _tall_factor_oracle,
        _tall_factor_bound,
    ),
    OpSpec(
        SMALL_PINV,
        [
            _matrix_case("tall", 9, 5, batch=(11,), more=(1e8,), dtypes=SINGLE_AND_DOUBLE),
            _matrix_case("underdetermined", 6, 20, batch=(3,), more=(1e8,), dtypes=SINGLE_AND_DOUBLE),
        ],
        _small_pinv_oracle,
        lambda a, limit: _pinv_bound(a, None, None)[:2],
    ),
    OpSpec(  # its factors are tested as factorize's in a graph (tests/core/test_compile.py)
        FACTORS,
        [
            _matrix_case("tall", 20, 5, more=(None,)),
            _matrix_case("underdetermined", 5, 12, rank=2, more=(None,), dtypes=SINGLE_AND_DOUBLE),
            _matrix_case("batch", 15, 6, rank=4, batch=(5,), more=(None,), dtypes=SINGLE_AND_DOUBLE),
            _matrix_case("rtol", 9, 5, more=(number(0.3),), dtypes=SINGLE_AND_DOUBLE),
            _matrix_case("no rows", 0, 3, more=(None,)),
        ],
        lambda a, rtol: [None, None, None, *_pinv_oracle(a, rtol, None)[1:], None],
        lambda a, rtol: [torch.inf] * 3 + [0.0] * 3,  # bases of a null space are many
    ),
]
