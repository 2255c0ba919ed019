"""Sample inputs, oracle and error bound of gram."""

from __future__ import annotations

import torch
from cfl_ops.ops.gram.exact_gram import EXACT_GRAM
from cfl_ops.ops.gram.gram import GRAM, GRAM_
from cfl_ops.ops.gram.linear_gram import ACTIVATIONS, LINEAR_GRAM
from torch import Tensor

from tests.contract import Case, OpSpec

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


# Gram_: the same samples, added to moments that are there already


def _in_place(case: Case, decay: float) -> Case:
    def make(dtype: torch.dtype):
        x, y, weight, bias, classes, acc = case.make(dtype)
        batch, order = x.shape[:-2], x.shape[-1] + bias
        targets = 0 if y is None else classes or y.shape[-1]
        generator = torch.Generator().manual_seed(1)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(acc)

        old = randn(*batch, order, order)
        count = torch.full(batch, 5.0, dtype=torch.float64)
        moments = [
            old + old.mT,
            randn(*batch, order, targets),
            randn(*batch, targets),
            randn(*batch, targets),
        ]
        return [*moments, count, x, y, weight, classes, decay]

    return Case(case.name, make, case.dtypes, opcheck=case.opcheck)


def _stream(gram, cross, target_sum, target_sq, count, x, y, weight, classes, decay):
    bias = gram.shape[-1] > x.shape[-1]
    return (x, y, weight, bias, classes, gram.dtype), (gram, cross, target_sum, target_sq, count)


def _oracle_(*args):
    new_args, old = _stream(*args)
    *new, info = _oracle(*new_args)
    if (info != 0).any():  # refused under float64 accumulation: as it was
        return [*(o.double() for o in old), info]
    return [*((args[-1] * o.double() if args[-1] else 0) + n for o, n in zip(old, new, strict=True)), info]


def _bound_(*args):
    """The bound of the new rows, and rounding of the decayed old moments and of the sum."""
    new_args, old = _stream(*args)
    *new, _ = _bound(*new_args)
    want = _oracle_(*args)
    eps = torch.finfo(args[0].dtype).eps
    rounding = [
        (4 + new_args[0].shape[-2] / 64) * eps * (o.double().abs() + w.nan_to_num(0, 0, 0).abs())
        for o, w in zip(old, want, strict=False)
    ]
    return [*(n + r for n, r in zip(new, rounding, strict=True)), 0]


# Linear_gram


def _layer_case(name, rows, inputs, width, activation="relu", *, bias=True, targets=0, classes=0, weights=False,
                ones=False, batch=(), acc=None, gradcheck=False, dtypes=(torch.float32, torch.float64)):  # fmt: skip
    def make(dtype: torch.dtype):
        x, y, s, _, _, acc_dtype = _case(
            "", rows, inputs, targets=targets, classes=classes, weights=weights, batch=batch, acc=acc,
            gradcheck=gradcheck,
        ).make(dtype)  # fmt: skip
        generator = torch.Generator().manual_seed(2)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        layer_bias = randn(*batch, width) if bias else None
        return [x, randn(*batch, width, inputs), layer_bias, y, s, activation, ones, classes, acc_dtype]

    return Case(name, make, dtypes, gradcheck=gradcheck)


def _layer64(x, weight, bias, activation):
    h = x.double() @ weight.double().mT
    return ACTIVATIONS[activation](h if bias is None else h + bias.double().unsqueeze(-2))


def _oracle_layer(x, weight, bias, y, s, activation, ones, classes, acc):
    h = _layer64(x, weight, bias, activation)
    *moments, info = _oracle(h, y, s, ones, classes, acc)
    return [*moments, torch.zeros_like(info)]


def _bound_layer(x, weight, bias, y, s, activation, ones, classes, acc):
    """The features err by e = 2 gamma_C (|x| |W|^T + |b|) (every activation here has slope <= 1.13): the sums by
    |h|^T e + e^T |h| + e^T e beyond the bound of a gram, in the dtype that the features are stored in.
    """
    eps = torch.finfo(x.dtype).eps
    sizes = x.double().abs() @ weight.double().abs().mT
    if bias is not None:
        sizes = sizes + bias.double().abs().unsqueeze(-2)
    e = 2 * (x.shape[-1] + 4) * eps * sizes
    h = _layer64(x, weight, bias, activation).abs()
    own = _bound(h.to(acc), y, s, ones, classes, acc)
    spread = _oracle(h + e, None if y is None or classes else y.abs(), s, ones, 0, torch.float64)
    exact = _oracle(h, None if y is None or classes else y.abs(), s, ones, 0, torch.float64)
    extra = [a - b for a, b in zip(spread[:2], exact[:2], strict=True)]
    if classes:
        extra[1] = _oracle(e, y, s, ones, classes, torch.float64)[1]
    slack = 4 * torch.finfo(acc).eps * (own[0] + extra[0]).abs().max() if own[0].numel() else 0.0
    return [own[0] + extra[0] + slack, own[1] + extra[1] + slack, *own[2:]]


LAYER_CASES = [
    _layer_case("relu dense", 23, 5, 9, targets=2, weights=True, ones=True),
    _layer_case("gelu classes", 23, 5, 9, "gelu", classes=3, weights=True, ones=True, gradcheck=True),
    _layer_case("gelu_tanh", 17, 6, 4, "gelu_tanh", targets=2, gradcheck=True),
    _layer_case("silu batch", 9, 6, 4, "silu", targets=2, batch=(2,), weights=True),
    _layer_case("tanh exact", 17, 6, 4, "tanh", acc=torch.float64, dtypes=(torch.float32,)),
    _layer_case("celu", 17, 6, 4, "celu", bias=False, gradcheck=True),
    _layer_case("identity", 17, 6, 4, "identity", bias=False, targets=1, ones=True),
    _layer_case("no rows", 0, 3, 4, targets=2),
]


def _export_in_place():
    _, dynamic, other = _export()
    old = _in_place(CASES[1], 0.5).make(torch.float32)
    return old, (None,) * 5 + dynamic, [*old[:5], *other[:3], *old[8:]]


def _export_layer():
    args = LAYER_CASES[0].make(torch.float32)
    other = _layer_case("", 41, 5, 9, targets=2, weights=True, ones=True).make(torch.float32)
    rows = torch.export.Dim("rows", min=2, max=4096)
    return args, ({0: rows}, None, None, {0: rows}, {0: rows}), other


def _exact_case(name: str, rows: int, width: int, weights: bool, batch: tuple[int, ...] = (2,)) -> Case:
    def make(dtype: torch.dtype):
        x, _, weight, *_ = _case("", rows, width, weights=weights, batch=batch).make(dtype)
        return [x, None if weight is None else weight.double()]

    return Case(name, make)


def _oracle_exact(x, weight):
    return [_oracle(x, None, weight, False, 0, torch.float64)[0]]


def _bound_exact(x, weight):
    return [_bound(x, None, weight, False, 0, torch.float64)[0]]


SPECS = [
    OpSpec(
        EXACT_GRAM,
        [
            _exact_case("weights", 19, 7, True),
            _exact_case("plain", 70, 66, False),
            _exact_case("no rows", 0, 5, True),
            _exact_case("no batch dimension", 6, 4, False, ()),
        ],
        _oracle_exact,
        _bound_exact,
    ),
    OpSpec(
        GRAM,
        CASES,
        _oracle,
        _bound,
        differentiable=(0, 1, 2),
        grad_outputs=5,
        export_dynamic=_export,
    ),
    OpSpec(
        GRAM_,
        [_in_place(case, decay) for case, decay in zip(CASES, [1.0, 0.5, 0.25, 0.0] * 9, strict=False)],
        _oracle_,
        _bound_,
        mutates=(0, 1, 2, 3, 4),
        export_dynamic=_export_in_place,
    ),
    OpSpec(
        LINEAR_GRAM,
        LAYER_CASES,
        _oracle_layer,
        _bound_layer,
        differentiable=(0, 1, 2, 3, 4),
        grad_outputs=5,
        export_dynamic=_export_layer,
    ),
]
