"""Sample inputs, oracles and error bounds of the cholesky family."""

from __future__ import annotations

import torch
from cfl_ops.ops.cholesky.recursive_rows import RECURSIVE_RIDGE_
from cfl_ops.ops.cholesky.safe import SAFE
from cfl_ops.ops.cholesky.update import UPDATE, UPDATE_
from torch import Tensor

from tests.contract import Case, OpSpec

WIDE = (torch.float32, torch.float64)
F32 = (torch.float32,)


def spd(order: int, batch: tuple[int, ...] = (), seed: int = 0) -> Tensor:
    """A positive definite matrix of condition number about 30, in float64."""
    generator = torch.Generator().manual_seed(1000 * order + seed)
    root = torch.randn(*batch, order, 2 * order + 2, generator=generator, dtype=torch.float64)
    return root @ root.mT / (2 * order + 2)


def _case(name, order, rank, alpha=1.0, decay=1.0, batch=(), edit=None, scale=1.0, gradcheck=False, dtypes=WIDE,
          opcheck=None):  # fmt: skip
    def make(dtype: torch.dtype):
        generator = torch.Generator().manual_seed(order * 100 + rank)
        L = torch.linalg.cholesky(spd(order, batch)) * scale
        V = torch.randn(*batch, order, rank, generator=generator, dtype=torch.float64) * scale
        if alpha < 0 and rank:  # half of what can be taken away
            inside = torch.linalg.solve_triangular(L, V, upper=False)
            norm = torch.linalg.matrix_norm(inside, 2)[..., None, None]
            V = V / torch.where(norm > 0, norm, 1.0) * (0.7 * (decay / -alpha) ** 0.5)
        L, V = L.to(dtype), V.to(dtype)
        if edit is not None:
            L, V = edit(L, V)
        return [L, V, alpha, decay]

    # opcheck asks about the op's Python life, which few cases show.
    return Case(
        name, make, dtypes=dtypes, gradcheck=gradcheck, opcheck=gradcheck if opcheck is None else opcheck
    )


def _new_factor(L, V, alpha, decay):
    lower, V = L.double().tril(), V.double()
    matrix = decay * lower @ lower.mT + alpha * V @ V.mT
    factor, info = torch.linalg.cholesky_ex(matrix.nan_to_num(0, 0, 0))
    info = torch.where(lower.isfinite().all(-1).all(-1), info, -2)
    info = torch.where(V.isfinite().all(-1).all(-1), info, -1)
    return factor, info.to(torch.int32)


def _oracle(L, V, alpha, decay):
    factor, info = _new_factor(L, V, alpha, decay)
    return torch.where((info != 0)[..., None, None], L.double().tril(), factor), info


def _oracle_(L, V, alpha, decay):
    out, info = _oracle(L, V, alpha, decay)
    return out + L.double().triu(1), info


def _bound(L, V, alpha, decay):
    """Backward stable: the error of a perturbation of eps sqrt(D + k) of what went in, N = |[L V]|.

    It reaches the factor through the condition N |L'^-1| (Sun 1991; for a downdate N is that of the old factor).
    """
    factor, info = _new_factor(L, V, alpha, decay)
    order, rank = V.shape[-2:]
    if order == 0 or factor.numel() == 0:
        return 0.0, 0
    both = torch.cat((L.double().tril() * decay**0.5, V.double() * abs(alpha) ** 0.5), -1).nan_to_num(0, 0, 0)
    size = torch.linalg.matrix_norm(both, 2)
    smallest = torch.linalg.svdvals(factor)[..., -1]
    eps = torch.finfo(L.dtype).eps
    # The oracle is a float64 computation itself: its matrix was rounded once for each product.
    bound = 8 * eps * (order + rank) ** 0.5 * size * size / smallest
    if alpha >= 0:  # a semi-definite matrix (a vmap test's flipped L) has no one factor; see test_ops.py
        bound = torch.where(info > 0, torch.inf, bound)
        return torch.where(info < 0, 0.0, bound)[..., None, None], 0
    return torch.where(info != 0, 0.0, bound)[..., None, None], 0


def _negative(L: Tensor, V: Tensor):
    L[..., :, ::2] *= -1
    return L, V


def _nan_v(L: Tensor, V: Tensor):
    V.view(-1, *V.shape[-2:])[0, -1, 0] = torch.nan
    return L, V


def _inf_l(L: Tensor, V: Tensor):
    L.view(-1, *L.shape[-2:])[-1, -1, 0] = torch.inf
    return L, V


def _nan_above(L: Tensor, V: Tensor):
    return L + torch.full_like(L, torch.nan).triu(1), V


def _too_much(L: Tensor, V: Tensor):
    """The last matrix of the batch loses more than it has, at pivot 4."""
    flat = V.view(-1, *V.shape[-2:])
    flat[-1] = 0
    flat[-1, 3, 0] = 2 * L.reshape(-1, *L.shape[-2:])[-1, 3].norm()
    return L, V


def _zero_v(L: Tensor, V: Tensor):
    return L, torch.zeros_like(V)


UPDATES = [
    _case("rank one", 7, 1, gradcheck=True),
    _case("batch decay", 6, 2, 2.5, 0.9, batch=(3,), gradcheck=True),
    _case("downdate", 6, 3, -0.5, gradcheck=True),
    _case("downdate rank one", 40, 1, -1.0),
    _case("downdate decay batch", 12, 5, -1.5, 0.8, batch=(2, 3)),
    _case("two panels", 49, 1),
    _case("panels and tail rank three", 71, 3),
    _case("rank nine", 35, 9, 0.3),
    _case("more vectors than rows", 9, 30),
    _case("group of matrices", 12, 1, batch=(19,)),
    _case("group rank two decay", 9, 2, 0.5, 0.7, batch=(19,)),
    _case("group downdate", 10, 1, -1.0, batch=(17,)),
    _case("order one", 1, 1, batch=(4,)),
    _case("order two", 2, 1, batch=(18,)),
    _case("no vectors", 8, 0, decay=0.25, opcheck=True),
    _case("alpha zero", 8, 2, 0.0, 0.5),
    _case("no change", 8, 2, edit=_zero_v),
    _case("order zero", 0, 2, opcheck=True),
    _case("order zero batch", 0, 1, batch=(3,)),
    _case("no batch", 5, 1, batch=(0,)),
    _case("negative diagonal", 37, 1, edit=_negative),
    _case("negative diagonal group", 8, 1, batch=(16,), edit=_negative),
    _case("negative diagonal downdate", 37, 2, -1.0, edit=_negative),
    _case("tiny", 20, 2, scale=1e-30, dtypes=F32),
    _case("huge", 20, 2, scale=1e30, dtypes=F32),
    _case("huge group", 8, 1, scale=1e30, batch=(17,), dtypes=F32),
    _case("nan in V", 9, 2, batch=(18,), edit=_nan_v),
    _case("inf in L", 40, 1, edit=_inf_l),
    _case("inf in L group", 9, 1, batch=(17,), edit=_inf_l),
    _case("nan above the diagonal", 35, 1, edit=_nan_above),
    _case("too much", 9, 1, -1.0, batch=(17,), edit=_too_much),
    _case("too much, one matrix", 45, 2, -1.0, edit=_too_much),
]


def _export():
    args = _case("", 6, 2, batch=(3,)).make(torch.float32)
    other = _case("", 6, 2, batch=(5,)).make(torch.float32)
    batch = torch.export.Dim("batch", min=2, max=512)
    return args, ({0: batch}, {0: batch}), other


# Safe_cholesky


def _safe_case(name, order, batch=(), edit=None, gradcheck=False):
    def make(dtype: torch.dtype):
        a = spd(order, batch)
        return [(a if edit is None else edit(a)).to(dtype), 0.5]

    return Case(name, make, dtypes=WIDE, gradcheck=gradcheck, opcheck=gradcheck)


def _safe_oracle(a, max_jitter):
    lower = a.double().tril()
    dead = lower.diagonal(dim1=-2, dim2=-1) == 0
    full = lower + lower.tril(-1).mT + torch.diag_embed(dead.double())
    factor, info = torch.linalg.cholesky_ex(full.nan_to_num(0, 0, 0))
    info = torch.where(full.isfinite().all(-1).all(-1), (info != 0).int(), -1).to(torch.int32)
    return None if bool((info != 0).any()) else factor, torch.zeros(a.shape[:-2]), info


def _safe_bound(a, max_jitter):
    """A Cholesky factorisation of the matrix scaled to a unit diagonal: row i of L is as large as sqrt(a_ii)."""
    factor, _, _ = _safe_oracle(a, max_jitter)
    if factor is None or factor.numel() == 0:
        return 0.0, torch.inf if factor is None else 0.0, 0
    rows = factor.norm(dim=-1)
    unit = factor / rows.unsqueeze(-1)
    condition = torch.linalg.svdvals(unit)[..., -1] ** -2
    order = a.shape[-1]
    relative = 8 * order * torch.finfo(a.dtype).eps * condition[..., None, None]
    return relative * rows.unsqueeze(-1), 0.0, 0


def _dead(a: Tensor) -> Tensor:
    a[..., 2, :] = 0
    a[..., :, 2] = 0
    return a


def _badly_scaled(a: Tensor) -> Tensor:
    scale = torch.logspace(-12, 12, a.shape[-1], dtype=torch.float64)
    return a * scale.unsqueeze(-1) * scale


def _nan(a: Tensor) -> Tensor:
    a[..., -1, 0] = torch.nan
    return a


SAFE_CASES = [
    _safe_case("definite", 7, gradcheck=True),
    _safe_case("batch", 5, (2,), gradcheck=True),
    _safe_case("batch dead", 6, (3,), _dead),
    _safe_case("badly scaled", 9, edit=_badly_scaled),
    _safe_case("upper ignored", 5, edit=lambda a: a.tril() + torch.full_like(a, 7.0).triu(1)),
    _safe_case("zero", 4, edit=torch.zeros_like),
    _safe_case("order zero", 0, (2,)),
    _safe_case("no batch", 3, (0,)),
    _safe_case("nan", 4, edit=_nan),
    _safe_case("indefinite", 4, edit=lambda a: -a),
]


def _safe_export():
    batch = torch.export.Dim("batch", min=2, max=512)
    return [spd(5, (3,)).float(), 0.5], ({0: batch},), [spd(5, (4,)).float(), 0.5]


# recursive_ridge_


def _rows_case(name, order, targets, rows, batch=(), decay=1.0, floor=0.0, remove=False, weighted=False, scale=1.0,
               edit=None, dtypes=WIDE, rows_dtype=None, opcheck=False):  # fmt: skip
    """A state, and rows of which half of what could be removed goes where they are."""

    def make(dtype: torch.dtype):
        generator = torch.Generator().manual_seed(order * 100 + rows)
        L, V, *_ = _case("", order, rows, -1.0 if remove else 1.0, batch=batch).make(torch.float64)
        rotated = torch.randn(*batch, targets, order, generator=generator, dtype=torch.float64)
        y = torch.randn(*batch, rows, targets, generator=generator, dtype=torch.float64)
        weight = torch.rand(*batch, rows, generator=generator, dtype=torch.float64) if weighted else None
        if weight is not None and rows > 1:
            weight[..., 1] = 0
        state = [(L * scale).to(dtype), (rotated * scale).to(dtype)]
        given = [(t * scale).to(rows_dtype or dtype) for t in (V.mT, y)]
        args = [*state, *given, None if weight is None else weight.to(dtype), decay, floor, remove]
        if edit is not None:
            edit(args)
        return args

    return Case(name, make, dtypes=dtypes, opcheck=opcheck)


def _rows_system(factor, rotated, x, y, sample_weight, decay, floor, remove):
    """In float64: L and z after the decay; the rows, scaled; the errors, and info."""
    lower, side, x, y = (value.double() for value in (factor.tril(), rotated, x, y))
    weight = x.new_ones(x.shape[:-1]) if sample_weight is None else sample_weight.double()
    info = torch.where((weight >= 0).all(-1), 0, 2)
    scale = weight.clamp(min=0).sqrt().unsqueeze(-1)
    x, y = torch.where(scale > 0, x, 0.0), torch.where(scale > 0, y, 0.0)
    info = torch.where(info != 0, info, -1 * ~(x.isfinite().all(-1).all(-1) & y.isfinite().all(-1).all(-1)))
    known = lower.isfinite().all(-1).all(-1) & side.isfinite().all(-1).all(-1)
    info = torch.where(info != 0, info, 3 * ~known).to(torch.int32)
    lower, side, x, y = (value.nan_to_num(0, 0, 0) for value in (lower, side, x, y))
    weights = torch.linalg.solve_triangular(lower.mT, side.mT, upper=True)
    error = y - x @ weights
    lower, side = lower * decay**0.5, side * decay**0.5
    pivots = lower.diagonal(dim1=-2, dim2=-1)
    if floor:
        lower = lower + torch.diag_embed((floor**0.5 - pivots).clamp(min=0))
        side = torch.where((pivots**2 < floor).any(-1)[..., None, None], (lower.mT @ weights).mT, side)
    return lower, side, x * scale, y * scale, error, info


def _rows_new(*args):
    lower, side, x, y, error, info = _rows_system(*args)
    sign = -1.0 if args[-1] else 1.0
    matrix = lower @ lower.mT + sign * x.mT @ x
    factor, failed = torch.linalg.cholesky_ex(matrix)
    info = torch.where((info == 0) & (failed != 0), 1 if args[-1] else 4, info).to(torch.int32)
    rotated = torch.linalg.solve_triangular(factor, lower @ side.mT + sign * x.mT @ y, upper=False).mT
    return factor, rotated, error, info


def _rows_oracle(*args):
    factor, rotated, error, info = _rows_new(*args)
    bad = (info != 0)[..., None, None]
    upper = args[0].double().triu(1)
    return (
        torch.where(bad, args[0].double(), factor + upper),
        torch.where(bad, args[1].double(), rotated),
        torch.where(bad, torch.nan, error),
        info,
    )


def _rows_bound(*args):
    """Backward stable as a QR: what went in is off by eps sqrt(D + B) of its norm, and comes to L and z by N / s.

    N is the norm of [L X^T], s the smallest singular value of the new L (of the old one in a removal, too: the rows
    are half of what could go). The errors take a triangular solve with the old L.
    """
    lower, side, x, y, _, info = _rows_system(*args)
    factor = _rows_new(*args)[0]
    if factor.numel() == 0 or factor.shape[-1] == 0:
        return 0.0, 0.0, 4 * torch.finfo(args[0].dtype).eps * y.abs(), 0

    def norm(*parts):
        return (
            torch.linalg.matrix_norm(torch.cat(parts, -1), 2) if parts[0].numel() else torch.zeros(info.shape)
        )

    eps = torch.finfo(args[0].dtype).eps * (sum(x.shape[-2:])) ** 0.5
    size, smallest = norm(lower, x.mT), torch.linalg.svdvals(factor)[..., -1]
    targets = torch.cat((side.mT, y), -2).norm(dim=(-1, -2))
    old = torch.linalg.svdvals(args[0].double().tril().nan_to_num(1, 1, 1))
    condition = old[..., 0] / old[..., -1]
    errors = (
        args[3].double().nan_to_num(0, 0, 0).abs().amax((-1, -2)) if y.numel() else torch.zeros(info.shape)
    )
    raw = (
        args[2].double().nan_to_num(0, 0, 0).norm(dim=(-1, -2))
        / old[..., -1]
        * args[1].double().nan_to_num(0).norm(dim=(-1, -2))
    )
    bounds = (8 * eps * size * size / smallest, 8 * eps * targets * (1 + size / smallest),
              8 * eps * (errors + condition * raw))  # fmt: skip
    good = (info == 0)[..., None, None]
    # A semi-definite factor (a vmap test's flipped L) has no bound.
    return *(torch.where(good, bound.nan_to_num(torch.inf)[..., None, None], 0.0) for bound in bounds), 0


def _set(position, index, value):
    def edit(args):
        args[position][index] = value

    return edit


def _low(args):
    """A pivot far below the others, under which the decay would bring it."""
    args[0][..., 2, :] *= 1e-4


ROWS = [
    _rows_case("one row", 7, 2, 1, opcheck=True),
    _rows_case("weights", 6, 3, 5, batch=(3,), weighted=True, decay=0.9, opcheck=True),
    _rows_case("two panels", 50, 2, 1),
    _rows_case("panels and many targets", 71, 19, 3, decay=0.7),
    _rows_case("full panel", 64, 33, 2),
    _rows_case("more rows than features", 66, 3, 150),
    _rows_case("column of rows", 1, 1, 9),
    _rows_case("remove", 12, 2, 3, remove=True, opcheck=True),
    _rows_case("remove one", 40, 17, 1, batch=(2, 2), remove=True, weighted=True),
    _rows_case("floor", 9, 2, 2, batch=(2,), decay=0.5, floor=1e-4, edit=_low, opcheck=True),
    _rows_case("floor of all", 35, 3, 1, decay=1e-3, floor=2.0),
    _rows_case("half rows", 6, 2, 3, rows_dtype=torch.bfloat16),
    _rows_case("no rows", 5, 2, 0, decay=0.25),
    _rows_case("no targets", 5, 0, 2),
    _rows_case("no features", 0, 2, 3),
    _rows_case("no batch", 4, 2, 3, batch=(0,)),
    _rows_case("tiny", 20, 2, 2, scale=1e-30, dtypes=F32),
    _rows_case("huge", 20, 2, 2, scale=1e15, dtypes=F32),
    _rows_case("nan in x", 9, 2, 3, batch=(2,), edit=_set(2, (1, 2, 3), torch.nan)),
    _rows_case("inf in y", 9, 2, 3, edit=_set(3, (2, 1), torch.inf)),
    _rows_case("nan in a row of weight 0", 9, 2, 3, weighted=True, edit=_set(2, (1, 4), torch.nan)),
    _rows_case("negative weight", 9, 2, 3, batch=(2,), weighted=True, edit=_set(4, (0, 2), -1.0)),
    _rows_case("nan in L", 9, 2, 3, edit=_set(0, (5, 2), torch.nan)),
    _rows_case("inf in z", 9, 2, 3, edit=_set(1, (1, 2), torch.inf)),
    _rows_case("unknown rows", 9, 2, 1, batch=(2,), remove=True, edit=_set(2, (1, 0, 3), 1e3)),
]


def _rows_export():
    args = _rows_case("", 6, 2, 1, batch=(3,)).make(torch.float32)
    other = _rows_case("", 6, 2, 1, batch=(5,)).make(torch.float32)
    batch = torch.export.Dim("batch", min=2, max=512)
    return args, ({0: batch}, {0: batch}, {0: batch}, {0: batch}), other


SPECS = [
    # Triton's interpreter takes a second for each sample: test_ops.py runs some of them on it.
    OpSpec(UPDATE, UPDATES, _oracle, _bound, differentiable=(0, 1), grad_outputs=1, triton_dtypes=(),
           export_dynamic=_export),
    OpSpec(UPDATE_, UPDATES, _oracle_, _bound, mutates=(0,), triton_dtypes=(), export_dynamic=_export),
    OpSpec(RECURSIVE_RIDGE_, ROWS, _rows_oracle, _rows_bound, mutates=(0, 1), triton_dtypes=(),
           export_dynamic=_rows_export),
    OpSpec(SAFE, SAFE_CASES, _safe_oracle, _safe_bound, differentiable=(0,), grad_outputs=1,
           export_dynamic=_safe_export),
]  # fmt: skip
