"""Sample inputs, oracle and error bound of proximal_step and proximal_step_."""

from __future__ import annotations

import torch
from cfl_ops.ops.proximal.codes import AUTO, FREE, MEAN, PENALIZED, SUM
from cfl_ops.ops.proximal.step import PROXIMAL_STEP, PROXIMAL_STEP_
from torch import Tensor

from tests.contract import Case, OpSpec

HALVES = (torch.float16, torch.bfloat16)


def _case(name, rows, width, targets=3, *, lam=0.5, ridge=None, classes=False, weights=False, bias=True,
          free=False, diag=False, batch=(), scale=1.0, relu=False, edit=None, reduction=MEAN,
          gradcheck=False, dtypes=None):  # fmt: skip
    def make(dtype: torch.dtype):
        generator = torch.Generator().manual_seed(rows * 1000 + width)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        features = randn(*batch, rows, width) * scale
        features = features.relu() if relu else features
        if edit is not None:
            features = edit(features)
        target = torch.randint(targets, (*batch, rows), generator=generator)
        if not classes:
            target = randn(*batch, rows, targets).to(dtype)
        weight = randn(*batch, rows).abs() if weights else None
        if weight is not None and rows > 1 and not gradcheck:
            weight[..., 1] = 0
        lam_tensor = torch.tensor(lam, dtype=torch.float64)
        if batch and not gradcheck:
            lam_tensor = lam_tensor * torch.arange(1, 1 + batch[-1]).expand(batch)
        return [
            features.to(dtype),
            target,
            randn(*batch, targets, width).to(dtype),
            randn(*batch, targets).to(dtype) if bias else None,
            lam_tensor,
            None if ridge is None else torch.tensor(ridge, dtype=torch.float64),
            (randn(*batch, width).abs() + 0.1).to(dtype) if diag else None,
            None if weight is None else weight.to(dtype),
            reduction,
            FREE if free else PENALIZED,
            AUTO,
        ]

    extra = {} if dtypes is None else {"dtypes": dtypes}
    return Case(name, make, gradcheck=gradcheck, **extra)


def _system(features, target, weight, bias, lam, ridge, lam_diag, sample_weight, reduction, fit_bias, method):
    """The D' x D' system of the stacked head in float64, whatever the op solves instead."""
    phi = features.double()
    batch, rows, width = phi.shape[:-2], *phi.shape[-2:]
    s = torch.ones(*batch, rows, dtype=torch.float64) if sample_weight is None else sample_weight.double()
    total = s.sum(-1)
    scale = total if reduction == MEAN else torch.ones_like(total)
    mu = (scale * lam).unsqueeze(-1).expand(*batch, width).clone()
    rho = scale * (0.0 if ridge is None else ridge)
    if lam_diag is not None:
        mu = mu + scale.unsqueeze(-1) * lam_diag.double()
    t = mu + rho.unsqueeze(-1)
    old = weight.double()
    if bias is not None:
        phi = torch.cat([phi, torch.ones(*batch, rows, 1, dtype=torch.float64)], -1)
        old = torch.cat([old, bias.double().unsqueeze(-1)], -1)
        zero = torch.zeros_like(total)
        mu = torch.cat([mu, (zero if fit_bias == FREE else scale * lam).unsqueeze(-1)], -1)
        t = torch.cat([t, (zero if fit_bias == FREE else scale * lam + rho).unsqueeze(-1)], -1)
    y = target.double() if target.is_floating_point() else None
    if y is None:
        y = torch.nn.functional.one_hot(target, weight.shape[-2]).double()
    weighted = s.unsqueeze(-1) * phi
    return phi, y, s, scale, old, mu, t, phi.mT @ weighted + torch.diag_embed(t), y.mT @ weighted


def _oracle(*args):
    features, bias = args[0], args[3]
    phi, y, s, scale, old, mu, _, system, right = _system(*args)
    width, batch = features.shape[-1], features.shape[:-2]
    info = torch.zeros(batch, dtype=torch.int32)
    if features.shape[-2] == 0:
        new = old
    else:
        new = torch.linalg.solve(system, (right + old * mu.unsqueeze(-2)).mT).mT
    residual = y - phi @ new.mT
    loss = (s.unsqueeze(-1) * residual.square()).sum((-2, -1)) / torch.where(scale == 0, 1.0, scale)
    head = new[..., :width]
    grad = -2 / scale[..., None, None] * s.unsqueeze(-1) * residual @ head
    new_bias = new.new_zeros(*batch, 0) if bias is None else new[..., width]
    return head, new_bias, loss, grad, info


def _bound(*args):
    """Error propagated through the solve, in norms.

    e_R is what rounding does to the residual at the anchor and to the moments, Z = G^-1 Phi^T S how the head
    answers to the residual (its norm is at most 1 / (2 sqrt t)), and cond the system's condition number up to
    the spread that the native float32 path trusts times the order (past it all is float64).
    """
    features, _, weight, bias = args[:4]
    dtype = torch.promote_types(torch.promote_types(features.dtype, weight.dtype), torch.float32)
    eps, eps64 = torch.finfo(dtype).eps, torch.finfo(torch.float64).eps
    rows, width = features.shape[-2:]
    if rows == 0 or features.numel() == 0:
        zero = torch.zeros(features.shape[:-2], dtype=torch.float64)
        return [0.0, 0.0, zero, 0.0, 0]
    phi, y, s, scale, old, _, _, system, _ = _system(*args)
    head, new_bias, loss, grad, _ = _oracle(*args)
    new = torch.cat([head, new_bias.unsqueeze(-1)], -1) if bias is not None else head

    def norm(m: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(m)

    gamma = 8 * (max(rows, width) + 8)
    root = s.sqrt().unsqueeze(-1)
    residual_error = eps * gamma * (norm(root * phi) * (norm(old) + norm(new)) + norm(root * y))
    inverse = torch.linalg.inv(system)
    answer = torch.linalg.matrix_norm(inverse @ (root * phi).mT, 2)
    condition = torch.linalg.cond(system)
    solve_eps = torch.where(condition < 30 * 8 * max(rows, width), eps * condition, eps + eps64 * condition)
    change = norm(new - old) + norm(old)
    primal = torch.linalg.matrix_norm(inverse, 2) * norm(root * phi) if rows > width else answer
    error = primal * residual_error + gamma * solve_eps * change
    narrow = torch.finfo(weight.dtype).eps if weight.dtype in HALVES else 0.0
    # Loss, gradient and bias are those of the weight as it is rounded.
    error = error + narrow * norm(new)
    error_weight = error[..., None, None]
    residual = torch.linalg.matrix_norm(root * (y - phi @ new.mT))
    reach = torch.linalg.matrix_norm(root * phi, 2)
    error_residual = residual_error + reach * error
    error_bias = (error + narrow * norm(new) * reach / s.sum(-1).clamp_min(1e-300).sqrt()).unsqueeze(-1)
    error_loss = (2 * residual * error_residual + error_residual**2) / scale + gamma * eps * loss
    top = s.sqrt().max(-1).values
    error_grad = 2 * top / scale * (error_residual * norm(head) + (residual + error_residual) * error)
    narrow_grad = torch.finfo(features.dtype).eps if features.dtype in HALVES else 0.0
    error_grad = (
        error_grad[..., None, None] + narrow_grad * grad.abs() + gamma * eps * norm(grad)[..., None, None]
    )
    if features.dtype == torch.float16:
        error_grad = error_grad + 2.0**-24  # its least subnormal
    return [error_weight, error_bias, error_loss, error_grad, 0]


def _duplicate(features: Tensor) -> Tensor:
    features[..., 1, :] = features[..., 0, :]
    features[..., :, -1] = features[..., :, 0]
    return features


def _dead(features: Tensor) -> Tensor:
    features[..., :, ::3] = 0
    features[..., 2, :] = 0
    return features


F32, WIDE = (torch.float32,), (torch.float32, torch.float64)
CASES = [
    _case("dual classes", 7, 21, classes=True, gradcheck=True),
    _case("primal classes", 31, 6, classes=True, ridge=0.2, gradcheck=True),
    _case("dual dense", 9, 17, ridge=0.3, weights=True, gradcheck=True),
    _case("primal dense", 25, 8, weights=True, gradcheck=True),
    _case("square", 12, 12, lam=0.1, relu=True),
    _case("dual free", 8, 13, free=True, weights=True, gradcheck=True),
    _case("primal free", 19, 5, free=True, ridge=0.1, weights=True, gradcheck=True),
    _case("dual diagonal", 6, 11, diag=True, ridge=0.2, weights=True, gradcheck=True),
    _case("primal diagonal", 16, 4, diag=True, ridge=0.2, gradcheck=True),
    _case("dual diagonal free", 6, 11, diag=True, free=True),
    _case("no bias", 5, 9, bias=False),
    _case("no bias primal", 15, 9, bias=False, reduction=SUM),
    _case("sum", 10, 14, reduction=SUM, ridge=0.5, weights=True),
    _case("batch", 6, 10, batch=(2, 3), weights=True),
    _case("batch primal", 12, 5, batch=(3,), classes=True),
    _case("one row", 1, 8),
    _case("one feature", 9, 1),
    _case("one target", 9, 14, 1),
    _case("no rows", 0, 6),
    _case("no batch", 4, 6, batch=(0,)),
    _case("dependent rows, small lambda", 16, 24, lam=1e-5, edit=_duplicate, dtypes=WIDE),
    _case("dead columns, small lambda", 40, 12, lam=1e-5, edit=_dead, dtypes=WIDE),
    _case("ill conditioned square", 48, 48, lam=1e-6, relu=True, dtypes=WIDE),
    _case("tiny features", 8, 16, scale=1e-12, lam=1e-24, bias=False, dtypes=WIDE),
    _case("huge features", 8, 16, scale=1e8, lam=1e10, dtypes=WIDE),
    _case("larger", 130, 300, 10, classes=True, relu=True, lam=1.0, dtypes=WIDE),
    _case("larger primal", 300, 130, 10, classes=True, relu=True, lam=1.0, dtypes=WIDE),
]  # fmt: skip


def _in_place(function):
    def wrapped(*args):
        weight, bias, *rest = function(*args)
        return [weight, bias, *rest] if args[3] is not None else [weight, *rest]

    return wrapped


def _export():
    args = _case("", 9, 17, weights=True, ridge=0.3).make(torch.float32)
    other = _case("", 13, 17, weights=True, ridge=0.3).make(torch.float32)
    other[2:6] = args[2:6]
    rows = torch.export.Dim("rows", min=2, max=16)  # one side of B <= D: the other is another program
    return args, ({0: rows}, {0: rows}, None, None, None, None, {0: rows}), other


UNSERVED = (
    torch.float64,
    # The primal side, a free bias, penalties by feature, more than one head: torch ops around gram and ridge_solve.
    "primal classes", "dual dense", "primal dense", "dual free", "primal free", "dual diagonal", "primal diagonal",
    "dual diagonal free", "no bias primal", "sum", "batch", "batch primal", "one feature", "no rows", "no batch",
    "dead columns, small lambda", "larger", "larger primal",
)  # fmt: skip
SPECS = [
    OpSpec(
        PROXIMAL_STEP,
        CASES,
        _oracle,
        _bound,
        differentiable=(0, 1, 2, 3, 4, 5, 6, 7),
        grad_outputs=4,
        export_dynamic=_export,
        unserved={"triton": UNSERVED},
    ),
    OpSpec(
        PROXIMAL_STEP_,
        CASES,
        _in_place(_oracle),
        _in_place(_bound),
        mutates=(2, 3),
        export_dynamic=_export,
        unserved={"triton": UNSERVED},
    ),
]
