"""least squares: lstsq, pinv and factorize through a column-equilibrated float64 Gram, for any rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.batching import expand_batch
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import Derivative, define_op
from cfl_ops._core.results import public
from cfl_ops._gpu.launch import cuda_cpp
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.gram.gram import GRAM
from cfl_ops.ops.solve import cuda
from cfl_ops.ops.solve.ridge_solve import RIDGE_SOLVE

__all__ = ["Factorization", "factorize", "lstsq", "lstsq_ex", "pinv", "pinv_ex"]

WIDE = torch.float64
NOT_FINITE = 1
UNRESOLVED = 2  # while a CUDA graph is captured: the matrix needs the path that waits for the GPU

# The rule that decides on a path. All of it is about the matrix with its columns scaled to length 1.
WELL_CONDITIONED = 1e8  # trace of the inverse Gram up to which one pass is exact to float32, two to float64
SHIFT = 1e-13  # of the first pass: below it a float64 Gram is rounding
KEPT = 1e-2  # the second Gram's eigenvalues below this are cut: singular values under sqrt(KEPT SHIFT) = 3e-8


# --- the factorisation --------------------------------------------------------------------------------------


class _Factors(NamedTuple):
    """The pseudoinverse of a tall matrix (m, s), m >= s, as ``right left^T t^T`` or, where ``basis`` is given,
    as ``right basis^T``. All float64.
    """

    t: Tensor
    """The matrix, in its own dtype; float64 ones with columns scaled by powers of two."""
    left: Tensor
    right: Tensor
    basis: Tensor | None
    rank: Tensor
    info: Tensor
    """int32: NOT_FINITE where the matrix has NaN or Inf, UNRESOLVED where no path could be chosen."""
    cross: Tensor | None
    """``t^T b`` where a right side came along, and no basis is given."""

    def pinv(self) -> Tensor:
        if self.basis is None:
            return (self.right @ self.left.mT) @ self.t.to(WIDE).mT
        return self.right @ self.basis.mT

    def solve(self, b: Tensor) -> Tensor:
        """Pinv b"""
        if self.basis is not None:
            x = self.basis.mT @ b.to(WIDE)
        else:
            x = self.left.mT @ (self.t.to(WIDE).mT @ b.to(WIDE) if self.cross is None else self.cross)
        return self.right @ x

    def solve_transposed(self, b: Tensor) -> Tensor:
        """pinv^T b"""
        x = self.right.mT @ b.to(WIDE)
        return self.t.to(WIDE) @ (self.left @ x) if self.basis is None else self.basis @ x


def _tall_gram_python(t: Tensor, b: Tensor | None, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """With Q = T W (or T): Q^T Q and Q^T B, in float64."""
    q = t if w is None else t.to(WIDE) @ w
    if b is not None and b.dtype != q.dtype:
        q, b = q.to(WIDE), b.to(WIDE)
    moments = GRAM(q, b, None, False, 0, WIDE)
    return moments[0], moments[1]


def _tall_gram_fake(t: Tensor, b: Tensor | None, w: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, order = t.shape[:-2], t.shape[-1]
    return (
        t.new_empty(*batch, order, order, dtype=WIDE),
        t.new_empty(*batch, order, 0 if b is None else b.shape[-1], dtype=WIDE),
    )


TALL_GRAM = define_op(
    "tall_gram(Tensor t, Tensor? b, Tensor? w) -> (Tensor gram, Tensor cross)",
    python=_tall_gram_python,
    fake=_tall_gram_fake,
    core_dims=(2, 2, 2),
    helper=True,
)
NARROW = 64  # the widest matrix (and right side) that the kernel of tall_gram is made for


def _gram(t: Tensor, b: Tensor | None = None, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    narrow = t.shape[-1] <= NARROW and (b is None or b.shape[-1] <= NARROW)
    result: tuple[Tensor, Tensor] = (TALL_GRAM if narrow else _tall_gram_python)(t, b, w)
    return result


def _identity(order: int, like: Tensor) -> Tensor:
    return torch.eye(order, dtype=WIDE, device=like.device)


def _inverse(system: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of positive definite matrices, and whether it failed."""
    order = system.shape[-1]
    identity = _identity(order, system).expand(system.shape)
    inverse, info = RIDGE_SOLVE(system, identity, torch.zeros((), dtype=WIDE), None)
    return inverse, info != 0


def _project_out(null: Tensor, matrix: Tensor) -> Tensor:
    """``matrix`` without its part in the range of ``null``."""
    basis = torch.linalg.qr(null)[0]
    for _ in range(2):  # twice is enough
        matrix = matrix - basis @ (basis.mT @ matrix)
    return matrix


def _minimum_norm(left: Tensor, scaled_null: Tensor, rank: Tensor) -> Tensor:
    """The columns of ``left`` with the null space projected out; null vectors are the first s - rank."""
    order = left.shape[-1]
    if left.ndim == 2:
        return _project_out(scaled_null[:, : order - int(rank)], left) if int(rank) < order else left
    right = left.clone()
    for index in (rank < order).nonzero().tolist():
        at = tuple(index)
        right[at] = _project_out(scaled_null[at][:, : order - int(rank[at])], left[at])
    return right


def _second_pass(
    t: Tensor, gram: Tensor, scale: Tensor, shift: float, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Left and right factors and the rank of matrices that a float64 Gram alone cannot resolve."""
    order = t.shape[-1]
    equilibrated = gram / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    factor, _ = torch.linalg.cholesky_ex(equilibrated + shift * _identity(order, t), upper=True)
    first = torch.linalg.solve_triangular(factor, _identity(order, t).expand(factor.shape), upper=True)
    first = first / scale.unsqueeze(-1)
    second, _ = _gram(t, None, first)
    values, vectors = torch.linalg.eigh(second)
    kept = values >= limit
    rank = kept.sum(-1)
    rotated = first @ vectors
    left = rotated * torch.where(kept, values, 1.0).rsqrt().mul(kept).unsqueeze(-2)
    return left, _minimum_norm(left, rotated, rank), rank


def _may_look(t: Tensor) -> bool:
    """Whether the data may choose the path: on a GPU that waits for it, which no captured graph can."""
    return not (t.is_meta or (t.is_cuda and torch.cuda.is_current_stream_capturing()))


def _by_svd(
    t: Tensor, cut: Callable[[Tensor], Tensor], equilibrate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The orthogonal path: basis, right, rank, bad."""
    t = t.to(WIDE)
    bad = ~t.isfinite().all(-1).all(-1)
    t = torch.where(bad[..., None, None], 0.0, t)
    scale = torch.ones_like(t[..., 0, :])
    if equilibrate:
        largest = t.abs().amax(-2)
        scale = torch.where(largest > 0, largest, 1.0)
        length = torch.linalg.vector_norm(t / scale.unsqueeze(-2), dim=-2)
        scale = scale * torch.where(largest > 0, length, 1.0)
    basis, values, vectors = torch.linalg.svd(t / scale.unsqueeze(-2), full_matrices=False)
    # torch's singular values fall; the null vectors shall come first, as they do from eigh.
    basis, values, vectors = basis.flip(-1), values.flip(-1), vectors.flip(-2).mT
    kept = values > cut(values[..., -1:])
    rank = kept.sum(-1)
    rotated = vectors / scale.unsqueeze(-1)
    right = rotated * (kept / torch.where(kept, values, 1.0)).unsqueeze(-2)
    if equilibrate:
        right = _minimum_norm(right, rotated, rank)
    return basis * kept.unsqueeze(-2), right, rank, bad


def _tall_factor_python(
    t: Tensor, b: Tensor | None, well_conditioned: float, shift: float, kept: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """left, right, T^T B, rank and info of float32 (or narrower) matrices by our rule."""
    order = t.shape[-1]
    gram, cross = _gram(t, b)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    bad = ~diagonal.isfinite().all(-1)
    scale = torch.where((diagonal > 0) & ~bad.unsqueeze(-1), diagonal, 1.0).sqrt()
    outer_scale = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    inverse, failed = _inverse(gram / outer_scale)
    hard = (failed | ~(inverse.diagonal(dim1=-2, dim2=-1).sum(-1) <= well_conditioned)) & ~bad
    left = torch.where(bad[..., None, None], 0.0, inverse / outer_scale)
    right = _identity(order, t).expand(left.shape).contiguous()
    rank = torch.where(bad, 0, order)
    info = bad.to(torch.int32)
    if not _may_look(t):
        info = torch.where(hard, UNRESOLVED, info)
    elif bool(hard.any()):
        second = _second_pass(t[hard], gram[hard], scale[hard], shift, kept)
        left[hard], right[hard], rank[hard] = second
    return left, right, cross, rank, info


def _tall_factor_fake(t: Tensor, b: Tensor | None, *_: float) -> tuple[Tensor, ...]:
    batch, order = t.shape[:-2], t.shape[-1]
    return (
        t.new_empty(*batch, order, order, dtype=WIDE),
        t.new_empty(*batch, order, order, dtype=WIDE),
        t.new_empty(*batch, order, 0 if b is None else b.shape[-1], dtype=WIDE),
        t.new_empty(batch, dtype=torch.int64),
        t.new_empty(batch, dtype=torch.int32),
    )


TALL_FACTOR = define_op(
    "tall_factor(Tensor t, Tensor? b, float well_conditioned, float shift, float kept) -> "
    "(Tensor left, Tensor right, Tensor cross, Tensor rank, Tensor info)",
    python=_tall_factor_python,
    fake=_tall_factor_fake,
    core_dims=(2, 2, None, None, None),
    helper=True,
)


def _factors(t: Tensor, cut: Callable[[Tensor], Tensor] | None, b: Tensor | None = None) -> _Factors:
    """Factor tall matrices ``t (..., m, s)``; ``cut`` of the largest singular value, or None for our rule."""
    order = t.shape[-1]
    if cut is not None:
        unit, right, rank, bad = _by_svd(t, cut, equilibrate=False)
        return _Factors(t, right, right, unit, rank, bad.to(torch.int32), None)
    if t.dtype != WIDE:
        if b is not None and (b.dtype != t.dtype or b.shape[-1] > NARROW):
            b = None
        shift = max(SHIFT, 8 * order * torch.finfo(WIDE).eps)
        # The kernel is made for many rows; many small matrices go side by side through ridge_solve.
        narrow = order <= NARROW and (t.ndim == 2 or t.shape[-2] >= 4 * order)
        tall_factor: Callable[..., Any] = TALL_FACTOR if narrow else _tall_factor_python
        left, right, cross, rank, info = tall_factor(t, b, WELL_CONDITIONED, shift, KEPT)
        return _Factors(t, left, right, None, rank, info, None if b is None else cross)

    # Squares of float64 numbers may overflow: scale the columns by powers of two.
    bad = ~t.isfinite().all(-1).all(-1)
    largest = torch.where(bad.unsqueeze(-1), 1.0, t.abs().amax(-2))
    exponent = torch.frexp(torch.where(largest > 0, largest, 1.0))[1].clamp(-1000, 1000)
    scaled = torch.ldexp(t, -exponent.unsqueeze(-2))
    gram, cross = _gram(scaled, b)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where((diagonal > 0) & ~bad.unsqueeze(-1), diagonal, 1.0).sqrt()
    outer_scale = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    inverse, failed = _inverse(gram / outer_scale)
    hard = (failed | ~(inverse.diagonal(dim1=-2, dim2=-1).sum(-1) <= WELL_CONDITIONED)) & ~bad
    left = inverse / outer_scale
    right = torch.diag_embed(torch.ldexp(torch.ones_like(largest), -exponent))
    rank = torch.where(bad, 0, order)
    basis: Tensor | None = None
    info = bad.to(torch.int32)
    if not _may_look(t):
        info = torch.where(hard, UNRESOLVED, info)
    elif bool(hard.all()):
        basis, right, rank, _ = _by_svd(t, _rounding(order), equilibrate=True)
    elif bool(hard.any()):
        basis = mixed = scaled @ left
        mixed[hard], right[hard], rank[hard], _ = _by_svd(t[hard], _rounding(order), equilibrate=True)
    return _Factors(scaled, left, right, basis, rank, info, None if b is None else cross)


def _rounding(order: int) -> Callable[[Tensor], Tensor]:
    return lambda top: order * torch.finfo(WIDE).eps * top


def _cut(a: Tensor, rtol: Tensor | None, atol: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """torch.linalg.pinv's rule, or None for ours."""
    if rtol is None and atol is None:
        return None
    default = max(a.shape[-2:]) * torch.finfo(a.dtype).eps

    def cut(top: Tensor) -> Tensor:
        absolute = torch.zeros((), dtype=WIDE) if atol is None else atol.to(WIDE)
        if rtol is None:
            relative = torch.where(absolute > 0, 0.0, default)
        else:
            relative = rtol.to(WIDE)
        absolute, relative = (v.unsqueeze(-1) if v.ndim else v for v in (absolute, relative))
        return torch.maximum(absolute.to(top.device), relative.to(top.device) * top)

    return cut


# --- the ops ------------------------------------------------------------------------------------------------


def _nan_where(bad: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    if bad.is_cpu and bad.ndim == 0 and not bad.item():  # the usual case, and cheaper to ask
        return value.to(dtype)
    return torch.where(bad[..., None, None], torch.nan, value).to(dtype)


def _small_pinv_python(a: Tensor, limit: float) -> tuple[Tensor, Tensor]:
    """The pseudoinverse of matrices of full rank, and info: 1 where it is not to be used.

    It is the first pass of the general path, for batches of small matrices side by side.
    """
    wide = a.shape[-2] < a.shape[-1]
    t = (a.mT if wide else a).to(WIDE)
    gram = t.mT @ t
    square = gram.diagonal(dim1=-2, dim2=-1)
    usable = (square > 1e-250) & (square < 1e250)
    scale = torch.where(usable, square, 1.0).sqrt()
    outer_scale = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    inverse, failed = _inverse(torch.where(usable.all(-1)[..., None, None], gram / outer_scale, 0.0))
    good = usable.all(-1) & ~failed & (inverse.diagonal(dim1=-2, dim2=-1).sum(-1) <= limit)
    result = (inverse / outer_scale) @ t.mT
    if a.dtype == WIDE:
        result = result + (_identity(t.shape[-1], a) - result @ t) @ result
    result = torch.where(good[..., None, None], result, torch.nan).to(a.dtype)
    return (result.mT if wide else result).contiguous(), (~good).to(torch.int32)


SMALL_PINV = define_op(
    "small_pinv(Tensor a, float limit) -> (Tensor pinv, Tensor info)",
    python=_small_pinv_python,
    fake=lambda a, limit: (
        a.new_empty(*a.shape[:-2], a.shape[-1], a.shape[-2]),
        a.new_empty(a.shape[:-2], dtype=torch.int32),
    ),
    core_dims=(2, None),
    cuda=cuda_cpp(cuda.small_pinv),
    helper=True,
)


def _is_small_batch(a: Tensor) -> bool:
    return a[..., 0, 0].numel() > 1 and min(a.shape[-2:]) <= NARROW and a.shape[-2] * a.shape[-1] <= 8192


def _pinv_python(a: Tensor, rtol: Tensor | None, atol: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, (rows, cols) = a.shape[:-2], a.shape[-2:]
    if a.numel() == 0:
        zero = torch.zeros(batch, dtype=torch.int64, device=a.device)
        return a.new_zeros(*batch, cols, rows), zero, zero.to(torch.int32)
    if rtol is None and atol is None and _is_small_batch(a):
        result, code = SMALL_PINV(a, WELL_CONDITIONED)
        rank = torch.full(batch, min(rows, cols), dtype=torch.int64, device=a.device)
        info = torch.zeros(batch, dtype=torch.int32, device=a.device)
        hard = code != 0
        if not _may_look(a):
            result = _nan_where(hard, result, a.dtype)
            info = torch.where(hard, UNRESOLVED, info)
        elif bool(hard.any()):
            result[hard], rank[hard], info[hard] = _general_pinv(a[hard], None)
        return result, rank, info
    return _general_pinv(a, _cut(a, rtol, atol))


def _general_pinv(a: Tensor, cut: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, cols = a.shape[-2:]
    wide = rows < cols
    f = _factors(a.mT if wide else a, cut)
    result = f.pinv()
    if wide:
        result = result.mT
    if a.dtype == WIDE and f.basis is None:  # one Newton step: the Gram's squared condition is mended
        if wide:
            result = result + result @ (_identity(rows, a) - a @ result)
        else:
            result = result + (_identity(cols, a) - result @ a) @ result
    return _nan_where(f.info != 0, result, a.dtype).contiguous(), f.rank, f.info


def _pinv_fake(a: Tensor, rtol: Tensor | None, atol: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch = a.shape[:-2]
    return (
        a.new_empty(*batch, a.shape[-1], a.shape[-2]),
        a.new_empty(batch, dtype=torch.int64),
        a.new_empty(batch, dtype=torch.int32),
    )


def _mark(ctx: Any, *outputs: Tensor) -> None:
    if isinstance(ctx, torch.autograd.function.FunctionCtx):
        ctx.mark_non_differentiable(*outputs)


def _pinv_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(inputs[0], output[0])
    _mark(ctx, output[1], output[2])


def _pinv_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """With P the pseudoinverse, from dP = -P dA P + P P^T dA^T (I - A P) + (I - P A) dA^T P^T P."""
    if grad is None:
        return None, None, None
    saved, inverse = ctx.saved_tensors
    a, p, g = saved.to(WIDE), inverse.to(WIDE), grad.to(WIDE)
    pt, gt = p.mT, g.mT
    off_columns, off_rows = gt - a @ (p @ gt), gt - (gt @ p) @ a  # (I - A P) g^T and g^T (I - P A)
    result = (off_columns @ p) @ pt + pt @ (p @ off_rows) - pt @ (g @ pt)
    return result.to(saved.dtype), None, None


PINV = define_op(
    "pinv(Tensor a, Tensor? rtol, Tensor? atol) -> (Tensor pinv, Tensor rank, Tensor info)",
    python=_pinv_python,
    fake=_pinv_fake,
    core_dims=(2, 0, 0),
    derivative=Derivative(_pinv_setup_context, _pinv_backward),
    composite=True,
)


def _lstsq_python(a: Tensor, b: Tensor, rtol: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch, (rows, cols) = a.shape[:-2], a.shape[-2:]
    dtype = torch.promote_types(a.dtype, b.dtype)
    if a.numel() == 0 or b.shape[-1] == 0:
        solution = torch.zeros(*batch, cols, b.shape[-1], dtype=dtype, device=a.device)
        if a.numel() == 0:
            zero = torch.zeros(batch, dtype=torch.int64, device=a.device)
            return solution, zero, zero.to(torch.int32)
    wide = rows < cols
    f = _factors(a.mT if wide else a, _cut(a, rtol, None), None if wide else b)
    solution = f.solve_transposed(b) if wide else f.solve(b)
    if a.dtype == WIDE and f.basis is None:  # one refinement: the Gram's squared condition is mended
        residual = b.to(WIDE) - a @ solution
        f = f._replace(cross=None)
        solution = solution + (f.solve_transposed(residual) if wide else f.solve(residual))
    return _nan_where(f.info != 0, solution, dtype), f.rank, f.info


def _lstsq_fake(a: Tensor, b: Tensor, rtol: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    batch = a.shape[:-2]
    dtype = torch.promote_types(a.dtype, b.dtype)
    return (
        a.new_empty(*batch, a.shape[-1], b.shape[-1], dtype=dtype),
        a.new_empty(batch, dtype=torch.int64),
        a.new_empty(batch, dtype=torch.int32),
    )


def _lstsq_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, output[0])
    _mark(ctx, output[1], output[2])


def _lstsq_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    """With P = A^+, r = b - A x and u = P^T xbar: bbar = u and
    Abar = -u x^T + r (P u)^T + (P^T x) ((I - P A) xbar)^T.
    """
    if grad is None:
        return None, None, None
    a, b, rtol, solution = ctx.saved_tensors
    p = PINV(a.to(WIDE) if a.dtype == WIDE else a, rtol, None)[0].to(WIDE)
    wide_a, x, g = a.to(WIDE), solution.to(WIDE), grad.to(WIDE)
    u = p.mT @ g
    grad_a = None
    if ctx.needs_input_grad[0]:
        residual = b.to(WIDE) - wide_a @ x
        off_rows = g - wide_a.mT @ u
        grad_a = residual @ (p @ u).mT - u @ x.mT + (p.mT @ x) @ off_rows.mT
        grad_a = grad_a.to(a.dtype)
    return grad_a, u.to(b.dtype), None


LSTSQ = define_op(
    "lstsq(Tensor a, Tensor b, Tensor? rtol) -> (Tensor solution, Tensor rank, Tensor info)",
    python=_lstsq_python,
    fake=_lstsq_fake,
    core_dims=(2, 2, 0),
    derivative=Derivative(_lstsq_setup_context, _lstsq_backward),
    composite=True,
)


@error_message("lstsq")
def _explain_lstsq(info: Tensor, context: Sequence[Tensor]) -> Exception:
    return _explain("lstsq", info, context[0])


@error_message("pinv")
def _explain_pinv(info: Tensor, context: Sequence[Tensor]) -> Exception:
    return _explain("pinv", info, context[0])


@error_message("factorize")
def _explain_factorize(info: Tensor, context: Sequence[Tensor]) -> Exception:
    return _explain("factorize", info, context[0])


def _explain(op: str, info: Tensor, a: Tensor) -> Exception:
    index, _, where = first_failure(info)
    row = int((~a[index].isfinite().all(-1)).nonzero()[0])
    error: Exception = LinAlgError(f"cfl_ops.{op}: {where}a has NaN or Inf in row {row}")
    return error


# --- the public functions -----------------------------------------------------------------------------------


def _tolerance(op: str, name: str, value: float | Tensor | None, a: Tensor) -> Tensor | None:
    return None if value is None else checks.coefficient(op, name, value, a.device)


def _lstsq_arguments(
    op: str, a: Tensor, b: Tensor, rtol: float | Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    checks.floating(op, "a", a, 2)
    checks.floating(op, "b", b, 2)
    checks.size(op, "b", b, -2, a.shape[-2], "the rows of a")
    checks.same_device(op, "a", a, b=b)
    relative = _tolerance(op, "rtol", rtol, a)
    if b.dtype == WIDE:
        a = a.to(WIDE)
    batches = {"a": a.shape[:-2], "b": b.shape[:-2]}
    if relative is None and batches["a"] == batches["b"]:
        return a, b, None
    if relative is not None:
        batches["rtol"] = relative.shape
    args = expand_batch((a, b, relative), (2, 2, 0), checks.broadcastable(op, **batches))
    return args[0], args[1], args[2]


def lstsq(a: Tensor, b: Tensor, *, rtol: float | Tensor | None = None) -> Tensor:
    r"""The least-squares solution of minimum norm, for matrices of any shape and rank.

    .. math:: X = A^+ B

    (Efficient Deep Learning, section 7.3: the layer-local solve.)

    The columns of ``a`` (its rows where it is wide) are equilibrated and their Gram matrix is accumulated in
    float64. Where it is well conditioned it is inverted; where not, a second pass on the orthogonalised
    columns (CholeskyQR2) tells the rank; what is cut is projected out, so that the solution is the one of
    minimum norm. float64 matrices whose Gram cannot be resolved take an orthogonal path (SVD).

    Args:
        a: ``(..., M, N)``, of any strides.
        b: ``(..., M, K)``.
        rtol: None for the rule above, which cuts only what the stored numbers cannot resolve: after
            equilibration, directions with a singular value under 3e-8 (float32 and narrower), or under
            ``min(M, N) * eps`` of the largest (float64). A number: as ``torch.linalg.pinv``'s, the singular
            values of ``a`` as it stands that are at most ``rtol`` times the largest count as zero.

    Returns:
        ``(..., N, K)`` of the promoted dtype. Without rows or columns it is zero.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit, or rtol is negative, NaN or Inf.
        torch.linalg.LinAlgError: ``a`` has NaN or Inf; the message names the batch index. A NaN in ``b``
            stays in its column of the solution.

    Differentiable (twice) in a and b; where ``a`` is rank-deficient, within the matrices of its rank. Costs
    ``M N^2`` (one triangle) or ``4 M N^2`` multiply-adds of float64 for ``M >= N``.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.lstsq(torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.tensor([[2.0], [4.0]]))
        tensor([[1.5000],
                [1.5000]])
    """
    args = _lstsq_arguments("lstsq", a, b, rtol)
    solution: Tensor
    solution, _, info = LSTSQ(*args)
    check_info("lstsq", info, [solution], [args[0]])
    return solution


def lstsq_ex(a: Tensor, b: Tensor, *, rtol: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As :func:`lstsq`, but returns ``(solution, info)`` and never raises for data.

    ``info (...)`` int32 is 1 where ``a`` has NaN or Inf, and the solution NaN there; else 0. On a GPU the call waits
    once, to choose between the Gram matrix and the orthogonal path; where a CUDA graph is captured, it does not,
    and info is 2 (the solution NaN) where the orthogonal path would be needed. A given ``rtol`` always needs it.

    Example:
        >>> import torch, cfl_ops
        >>> solution, info = cfl_ops.lstsq_ex(torch.full((1, 1), torch.nan), torch.ones(1, 1))
        >>> int(info)
        1
    """
    solution, _, info = LSTSQ(*_lstsq_arguments("lstsq_ex", a, b, rtol))
    return solution, info


def _pinv_arguments(
    op: str, a: Tensor, rtol: float | Tensor | None, atol: float | Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    checks.floating(op, "a", a, 2)
    relative, absolute = _tolerance(op, "rtol", rtol, a), _tolerance(op, "atol", atol, a)
    if relative is None and absolute is None:
        return a, None, None
    batches = {"a": a.shape[:-2]}
    for name, value in (("rtol", relative), ("atol", absolute)):
        if value is not None:
            batches[name] = value.shape
    args = expand_batch((a, relative, absolute), (2, 0, 0), checks.broadcastable(op, **batches))
    return args[0], args[1], args[2]


def pinv(a: Tensor, *, rtol: float | Tensor | None = None, atol: float | Tensor | None = None) -> Tensor:
    r"""The pseudoinverse, for matrices of any shape and rank.

    .. math:: A^+ = \lim_{\delta \to 0} (A^T A + \delta I)^{-1} A^T

    Computed as :func:`lstsq` is (Efficient Deep Learning, section 7.3).

    Args:
        a: ``(..., M, N)``, of any strides.
        rtol: the relative tolerance, ``torch.linalg.pinv``'s: singular values of ``a`` as it stands that are
            at most ``max(atol, rtol * the largest)`` count as zero.
        atol: the absolute tolerance. With neither, the rule of :func:`lstsq`.

    Returns:
        ``(..., N, M)``, of the dtype of ``a``. Without rows or columns it is zero.

    Raises:
        TypeError, ValueError: ``a`` is not a matrix, or a tolerance is negative, NaN or Inf.
        torch.linalg.LinAlgError: ``a`` has NaN or Inf; the message names the batch index.

    Differentiable (twice); where ``a`` is rank-deficient, within the matrices of its rank. Costs
    ``2 M N^2`` or ``5 M N^2`` multiply-adds of float64 for ``M >= N``.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.pinv(torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 4.0]]))
        tensor([[0.5000, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.2500]])
    """
    args = _pinv_arguments("pinv", a, rtol, atol)
    result: Tensor
    result, _, info = PINV(*args)
    check_info("pinv", info, [result], [args[0]])
    return result


def pinv_ex(
    a: Tensor, *, rtol: float | Tensor | None = None, atol: float | Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As :func:`pinv`, but returns ``(pinv, info)`` and never raises for data.

    ``info (...)`` int32 is 1 where ``a`` has NaN or Inf, and the pseudoinverse NaN there; else 0. On a GPU it waits
    as :func:`lstsq_ex` does, and not where a CUDA graph is captured: there info may be 2.

    Example:
        >>> import torch, cfl_ops
        >>> inverse, info = cfl_ops.pinv_ex(torch.full((1, 1), torch.inf))
        >>> int(info)
        1
    """
    result, _, info = PINV(*_pinv_arguments("pinv_ex", a, rtol, atol))
    return result, info


# --- factorize ----------------------------------------------------------------------------------------------


@public
@dataclass(frozen=True)
class Factorization:
    """A factored matrix ``a (..., M, N)``: solves, its rank, condition and determinant from one factorisation.

    Made by :func:`factorize`. Holds no graph: use :func:`lstsq` or :func:`pinv` for gradients in ``a``; a
    solve is differentiable in its right side.
    """

    a: Tensor
    rank: Tensor
    """``(...)`` int64: the numerical rank, by the rule of :func:`lstsq`."""
    _factors: _Factors | None

    def solve(self, b: Tensor) -> Tensor:
        """The minimum-norm least-squares solution ``(..., N, K)`` for ``b (..., M, K)``."""
        checks.floating("Factorization.solve", "b", b, 2)
        checks.size("Factorization.solve", "b", b, -2, self.a.shape[-2], "the rows of a")
        checks.same_device("Factorization.solve", "a", self.a, b=b)
        dtype = torch.promote_types(self.a.dtype, b.dtype)
        f = self._factors
        if f is None:
            batch = checks.broadcastable("Factorization.solve", a=self.a.shape[:-2], b=b.shape[:-2])
            return torch.zeros(*batch, self.a.shape[-1], b.shape[-1], dtype=dtype, device=b.device)
        wide = self.a.shape[-2] < self.a.shape[-1]
        apply = f.solve_transposed if wide else f.solve
        x = apply(b)
        if self.a.dtype == WIDE and f.basis is None:
            x = x + apply(b.to(WIDE) - self.a @ x)
        return x.to(dtype)

    def pinv(self) -> Tensor:
        """The pseudoinverse ``(..., N, M)``."""
        if self._factors is None:
            return self.a.new_zeros(self.a.mT.shape)
        p = self._factors.pinv()
        return (p.mT if self.a.shape[-2] < self.a.shape[-1] else p).to(self.a.dtype)

    @cached_property
    def singular_values(self) -> Tensor:
        """``(..., min(M, N))`` float64, falling; those that were cut are 0."""
        f = self._factors
        if f is None:
            return self.a.new_zeros(*self.a.shape[:-2], 0, dtype=WIDE)
        # The pseudoinverse is right times a matrix with orthonormal rows: Q^T = left^T t^T, or basis^T.
        if f.basis is None:
            p = f.pinv()
            values = torch.linalg.svdvals(torch.linalg.qr(p.mT, mode="r")[1])
        else:
            values = torch.linalg.svdvals(f.right)
        kept = torch.arange(values.shape[-1], device=values.device) < self.rank.unsqueeze(-1)
        return torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0).sort(-1, descending=True)[0]

    @property
    def condition(self) -> Tensor:
        """``(...)`` float64: the largest singular value over the smallest that was not cut (1 at rank 0)."""
        values = self.singular_values
        if values.shape[-1] == 0:
            return torch.ones(values.shape[:-1], dtype=WIDE, device=values.device)
        smallest = torch.where(values > 0, values, torch.inf).amin(-1)
        return torch.where(self.rank > 0, values[..., 0] / smallest, 1.0)

    @property
    def logdet(self) -> Tensor:
        """``(...)`` float64: log |det a| where a is square; in general the sum of the logarithms of the
        singular values that were not cut. -inf where a square matrix is singular.
        """
        values = self.singular_values
        total = torch.where(values > 0, values, 1.0).log().sum(-1)
        square = self.a.shape[-2] == self.a.shape[-1]
        return torch.where(self.rank < values.shape[-1], -torch.inf, total) if square else total


def factorize(a: Tensor, *, rtol: float | Tensor | None = None) -> Factorization:
    """Factor ``a (..., M, N)`` once, for many right sides.

    Args:
        a: any shape and rank, of any strides.
        rtol: as for :func:`lstsq`.

    Returns:
        :class:`Factorization`, with ``solve(b)``, ``pinv()``, ``rank``, ``condition``, ``logdet`` and
        ``singular_values``.

    Raises:
        TypeError, ValueError: ``a`` is not a floating-point matrix, or rtol is negative, NaN or Inf.
        torch.linalg.LinAlgError: ``a`` has NaN or Inf; the message names the batch index.

    Costs what :func:`lstsq` does; a solve costs ``M N K`` multiply-adds.

    Example:
        >>> import torch, cfl_ops
        >>> f = cfl_ops.factorize(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
        >>> f.solve(torch.ones(2, 1)).squeeze(-1), int(f.rank), float(f.condition)
        (tensor([0.5000, 2.0000]), 2, 4.0)
    """
    a, relative, _ = _pinv_arguments("factorize", a, rtol, None)
    a = a.detach()
    batch = a.shape[:-2]
    if a.numel() == 0:
        return Factorization(a, torch.zeros(batch, dtype=torch.int64, device=a.device), None)
    wide = a.shape[-2] < a.shape[-1]
    factors = _factors(a.mT if wide else a, _cut(a, relative, None))
    check_info("factorize", factors.info, [factors.left], [a])
    return Factorization(a, factors.rank, factors)
