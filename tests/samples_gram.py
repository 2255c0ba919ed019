"""Sample inputs, oracle and error bound of gram."""

from __future__ import annotations

import torch
from cfl_ops.gram import GRAM
from contract import Case, OpSpec
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in HALVES else dtype


def _case(name, rows, width, *, targets=0, classes=0, weights=False, bias=False, batch=(), scale=1.0,
          edit=None, acc=None, gradcheck=False, dtypes=None, opcheck=True):  # fmt: skip
    def make(dtype: torch.dtype):
        generator = torch.Generator().manual_seed(rows * 1000 + width)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        x = randn(*batch, rows, width) * scale
        if edit is not None:
            x = edit(x)
        y = randn(*batch, rows, targets) if targets else None
        if classes:
            y = torch.randint(classes, (*batch, rows), generator=generator)
        weight = randn(*batch, rows).abs() if weights else None
        if weight is not None and rows and not gradcheck:
            weight[..., 0] = 0
        return [x, y, weight, bias, classes, acc or _acc(dtype)]

    extra = {} if dtypes is None else {"dtypes": dtypes}
    return Case(name, make, gradcheck=gradcheck, opcheck=opcheck, **extra)


def _oracle(x, y, weight, bias, classes, acc):
    wide = x.double()
    batch, rows = wide.shape[:-2], wide.shape[-2]
    if bias:
        wide = torch.cat([wide, torch.ones(*batch, rows, 1, dtype=torch.float64)], -1)
    s = torch.ones(*batch, rows, dtype=torch.float64) if weight is None else weight.double()
    target = torch.zeros(*batch, rows, 0, dtype=torch.float64) if y is None else y
    if classes:
        target = torch.nn.functional.one_hot(y, classes)
    target = target.double()
    left = (wide * s.unsqueeze(-1)).mT
    weighted = target * s.unsqueeze(-1)
    info = torch.zeros(batch, dtype=torch.int32)
    if acc == torch.float64 and x.dtype != torch.float64:
        info = torch.where(wide.isfinite().all(-1).all(-1), info, -1)
    return left @ wide, left @ target, weighted.sum(-2), (weighted * target).sum(-2), s.sum(-1), info


def _bound(x, y, weight, bias, classes, acc):
    """Each sum of B products, of which one factor was rounded once more for the weight: gamma_(B + 2).

    One least subnormal of the accumulator for each product covers underflow.
    """
    rows = x.shape[-2]
    absolute = [t.abs() if isinstance(t, Tensor) and t.is_floating_point() else t for t in (x, y, weight)]
    magnitudes = _oracle(*absolute, bias, classes, acc)
    finfo = torch.finfo(acc)
    slack = (rows + 2) * finfo.smallest_normal * finfo.eps
    # Half rounding of s x where a backend weights in the input's dtype is not allowed: acc counts.
    relative = (rows + 2) * finfo.eps
    bounds = [relative * m.nan_to_num(0, 0, 0) + slack for m in magnitudes[:4]]
    return [*bounds, (rows + 2) * torch.finfo(torch.float64).eps * magnitudes[4], 0]


def _zero_row(x: Tensor) -> Tensor:
    x[..., 1, :] = 0
    x[..., :, 2] = 0
    return x


def _nan(x: Tensor) -> Tensor:
    x[..., 3, 1] = torch.nan
    return x


def _inf(x: Tensor) -> Tensor:
    x[..., 2, 0] = torch.inf
    return x


F32, F64 = (torch.float32,), (torch.float64,)
CASES = [
    _case("dense targets", 37, 19, targets=5),
    _case("bias weights dense", 23, 17, targets=3, weights=True, bias=True, gradcheck=True),
    _case("bias weights classes", 41, 7, classes=4, weights=True, bias=True, gradcheck=True),
    _case("features only", 16, 33, gradcheck=True),
    _case("tall", 1003, 5, targets=2, bias=True),
    _case("wide", 3, 130, targets=2, weights=True),
    _case("batch", 9, 6, targets=2, batch=(2, 3), weights=True, bias=True),
    _case("rank one, zero row and column", 8, 6, edit=lambda x: _zero_row(x[..., :1].expand_as(x).clone())),
    _case("one sample", 1, 9, targets=2, bias=True),
    _case("one feature", 12, 1, targets=1, bias=True),
    _case("no rows", 0, 5, targets=3, weights=True, bias=True),
    _case("no columns", 6, 0, targets=2, bias=True),
    _case("no batch", 4, 3, batch=(0,), targets=2),
    _case("tiny", 30, 8, scale=1e-18, targets=2, dtypes=F32),
    _case("huge", 30, 8, scale=1e17, targets=2, dtypes=F32),
    _case("huge float64", 30, 8, scale=1e150, dtypes=F64),
    _case("nan", 9, 8, edit=_nan, dtypes=(torch.float32, torch.float64), opcheck=False),
    _case("exact", 300, 21, targets=3, weights=True, bias=True, acc=torch.float64,
          dtypes=(torch.float32, *HALVES)),
    _case("exact huge", 20, 9, scale=1e30, acc=torch.float64, dtypes=F32),
    _case("exact inf", 20, 9, edit=_inf, acc=torch.float64, dtypes=F32),
]  # fmt: skip


def _export():
    case = CASES[1]
    args = case.make(torch.float32)
    rows = torch.export.Dim("rows", min=2, max=4096)
    dynamic = ({0: rows}, {0: rows}, {0: rows})
    other = _case("", 51, 17, targets=3, weights=True, bias=True).make(torch.float32)
    return args, dynamic, other


SPECS = [
    OpSpec(
        GRAM,
        CASES,
        _oracle,
        _bound,
        differentiable=(0, 1, 2),
        grad_outputs=5,
        triton_dtypes=(torch.float32, torch.float64, torch.float16),
        export_dynamic=_export,
    )
]
