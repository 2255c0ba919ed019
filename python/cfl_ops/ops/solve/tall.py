"""The pseudoinverse of tall matrices in factors, of any rank, through a column-equilibrated float64 Gram matrix.

lstsq, pinv and factorize are made of :func:`factor_any`; its steps are the ops tall_gram and tall_factor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.op import define_op
from cfl_ops.ops.gram.gram import plain_gram
from cfl_ops.ops.solve.codes import UNRESOLVED
from cfl_ops.ops.solve.ridge_solve import RIDGE_SOLVE

# The rule that decides on a path. All of it is about the matrix with its columns scaled to length 1.
WELL_CONDITIONED = 1e8  # trace of the inverse Gram up to which one pass is exact to float32, two to float64
SHIFT = 1e-13  # of the first pass: below it a float64 Gram is rounding
KEPT = 1e-2  # the second Gram's eigenvalues below this are cut: singular values under sqrt(KEPT SHIFT) = 3e-8

NARROW = 64
"""The most columns, of the matrix and of the right side, that the kernels of these ops are made for."""


class Factors(NamedTuple):
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
    by_gram: Tensor | None = None
    """Which float64 matrices were inverted by their Gram matrix, by our rule; None of narrower ones and by a tolerance.

    One refinement mends the squared condition of a Gram matrix, and what the orthogonal path, whose errors are those
    of the longest rows, does to short ones.
    """

    def refined(self, result: Tensor, change: Callable[[], Tensor]) -> Tensor:
        """The result with its refinement, where that is needed."""
        if self.by_gram is None:
            return result
        return result + change()

    def pinv(self) -> Tensor:
        """``(s, m)``"""
        if self.basis is None:
            return (self.right @ self.left.mT) @ self.t.double().mT
        return self.right @ self.basis.mT

    def solve(self, b: Tensor) -> Tensor:
        """``pinv b``"""
        if self.basis is not None:
            x = self.basis.mT @ b.double()
        else:
            x = self.left.mT @ (self.t.double().mT @ b.double() if self.cross is None else self.cross)
        return self.right @ x

    def solve_transposed(self, b: Tensor) -> Tensor:
        """``pinv^T b``"""
        x = self.right.mT @ b.double()
        return self.t.double() @ (self.left @ x) if self.basis is None else self.basis @ x


def underdetermined(a: Tensor) -> bool:
    """Whether it has fewer rows than columns: then its transpose is the tall matrix."""
    return a.shape[-2] < a.shape[-1]


def factor_any(a: Tensor, cut: Callable[[Tensor], Tensor] | None, b: Tensor | None = None) -> Factors:
    """The factors of the tall one of a and its transpose; ``b`` comes along where that is a."""
    return _factor_tall(a.mT, cut) if underdetermined(a) else _factor_tall(a, cut, b)


def refined_pinv(a: Tensor, factors: Factors) -> Tensor:
    """The pseudoinverse in float64, from the factors that factor_any made of a."""
    under = underdetermined(a)
    result = factors.pinv().mT if under else factors.pinv()

    def newton() -> Tensor:
        if under:
            return result @ (identity(a.shape[-2], a) - a.double() @ result)
        return (identity(a.shape[-1], a) - result @ a.double()) @ result

    return factors.refined(result, newton)


def minimum_norm(a: Tensor, b: Tensor, factors: Factors) -> Tensor:
    """The solution in float64, from the factors that factor_any made of a."""
    apply = Factors.solve_transposed if underdetermined(a) else Factors.solve
    solution = apply(factors, b)
    return factors.refined(solution, lambda: apply(factors._replace(cross=None), b.double() - a @ solution))


def _factor_tall(t: Tensor, cut: Callable[[Tensor], Tensor] | None, b: Tensor | None = None) -> Factors:
    """Factor tall matrices ``t (..., m, s)``; ``cut`` of the largest singular value, or None for our rule."""
    if cut is not None:
        unit, right, rank, bad = _by_svd(t, cut, equilibrate=False)
        return Factors(t, right, right, unit, rank, bad.to(torch.int32), None)
    return _factor_float64(t, b) if t.dtype == torch.float64 else _factor_float32(t, b)


def _factor_float32(t: Tensor, b: Tensor | None) -> Factors:
    """By our rule; narrower dtypes likewise."""
    order = t.shape[-1]
    if b is not None and (b.dtype != t.dtype or b.shape[-1] > NARROW):
        b = None
    shift = max(SHIFT, 8 * order * torch.finfo(torch.float64).eps)
    args = TallFactorArguments(t, b, WELL_CONDITIONED, shift, KEPT)
    # The kernel is made for many rows; many small matrices go side by side through ridge_solve.
    served = order <= NARROW and (t.ndim == 2 or t.shape[-2] >= 4 * order)
    left, right, cross, rank, info = TALL_FACTOR(*args) if served else _tall_factor_python(args)
    return Factors(t, left, right, None, rank, info, None if b is None else cross)


def _factor_float64(t: Tensor, b: Tensor | None) -> Factors:
    """By our rule; what the Gram matrix cannot resolve by the orthogonal path."""
    order = t.shape[-1]
    # Squares of float64 numbers may overflow: scale the columns by powers of two.
    bad = ~t.isfinite().all(-1).all(-1)
    largest = torch.where(bad.unsqueeze(-1), 1.0, t.abs().amax(-2))
    exponent = torch.frexp(torch.where(largest > 0, largest, 1.0))[1].clamp(-1000, 1000)
    scaled = torch.ldexp(t, -exponent.unsqueeze(-2))
    gram, cross = _gram(scaled, b)
    usable = (gram.diagonal(dim1=-2, dim2=-1) > 0) & ~bad.unsqueeze(-1)
    left, _, resolved = equilibrated_inverse(gram, usable, WELL_CONDITIONED)
    hard = ~resolved & ~bad
    right = torch.diag_embed(torch.ldexp(torch.ones_like(largest), -exponent))
    rank = torch.where(bad, 0, order)
    basis: Tensor | None = None
    info = bad.to(torch.int32)
    if not may_synchronise(t):
        info = torch.where(hard, UNRESOLVED, info)
    elif bool(hard.all()):
        basis, right, rank, _ = _by_svd(t, _rounding(order), equilibrate=True)
    elif bool(hard.any()):
        basis = mixed = scaled @ left
        mixed[hard], right[hard], rank[hard], _ = _by_svd(t[hard], _rounding(order), equilibrate=True)
    return Factors(scaled, left, right, basis, rank, info, None if b is None else cross, resolved)


def _rounding(order: int) -> Callable[[Tensor], Tensor]:
    return lambda top: order * torch.finfo(torch.float64).eps * top


def may_synchronise(t: Tensor) -> bool:
    """Whether the data may choose the path: on a GPU that synchronises, which no captured graph can."""
    return not (t.is_meta or (t.is_cuda and torch.cuda.is_current_stream_capturing()))


def identity(order: int, like: Tensor) -> Tensor:
    """In float64, on the device of ``like``."""
    return torch.eye(order, dtype=torch.float64, device=like.device)


def equilibrated_inverse(gram: Tensor, usable: Tensor, limit: float) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of Gram matrices, the lengths of the columns, and which inverses float64 resolves.

    It goes through the Gram matrix of columns of length 1; those that are not ``usable`` are not scaled. Resolved is
    what has an inverse there whose trace is at most ``limit``.
    """
    order = gram.shape[-1]
    scale = torch.where(usable, gram.diagonal(dim1=-2, dim2=-1), 1.0).sqrt()
    outer_scale = scale.unsqueeze(-1) * scale.unsqueeze(-2)
    system = gram / outer_scale
    eye = identity(order, gram).expand(system.shape)
    inverse, info = RIDGE_SOLVE(system, eye, torch.zeros((), dtype=torch.float64), None)
    resolved = (info == 0) & (inverse.diagonal(dim1=-2, dim2=-1).sum(-1) <= limit)
    return inverse / outer_scale, scale, resolved


def _by_svd(
    t: Tensor, cut: Callable[[Tensor], Tensor], equilibrate: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The orthogonal path: basis, right, rank, bad."""
    t = t.double()
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
        right = _without_null_space(right, rotated, rank)
    return basis * kept.unsqueeze(-2), right, rank, bad


def _second_pass(
    t: Tensor, gram: Tensor, scale: Tensor, shift: float, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Left and right factors and the rank of matrices that a float64 Gram alone cannot resolve."""
    order = t.shape[-1]
    equilibrated = gram / (scale.unsqueeze(-1) * scale.unsqueeze(-2))
    factor, _ = torch.linalg.cholesky_ex(equilibrated + shift * identity(order, t), upper=True)
    first = torch.linalg.solve_triangular(factor, identity(order, t).expand(factor.shape), upper=True)
    first = first / scale.unsqueeze(-1)
    second, _ = _gram(t, None, first)
    values, vectors = torch.linalg.eigh(second)
    kept = values >= limit
    rank = kept.sum(-1)
    rotated = first @ vectors
    left = rotated * torch.where(kept, values, 1.0).rsqrt().mul(kept).unsqueeze(-2)
    return left, _without_null_space(left, rotated, rank), rank


def _project_out(null: Tensor, matrix: Tensor) -> Tensor:
    """``matrix`` without its part in the range of ``null``."""
    basis = torch.linalg.qr(null)[0]
    for _ in range(2):  # twice is enough
        matrix = matrix - basis @ (basis.mT @ matrix)
    return matrix


def _without_null_space(left: Tensor, scaled_null: Tensor, rank: Tensor) -> Tensor:
    """The columns of ``left`` with the null space projected out; null vectors are the first s - rank."""
    order = left.shape[-1]
    if left.ndim == 2:
        return _project_out(scaled_null[:, : order - int(rank)], left) if int(rank) < order else left
    right = left.clone()
    for index in (rank < order).nonzero().tolist():
        at = tuple(index)
        right[at] = _project_out(scaled_null[at][:, : order - int(rank[at])], left[at])
    return right


def _gram(t: Tensor, b: Tensor | None = None, w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    served = t.shape[-1] <= NARROW and (b is None or b.shape[-1] <= NARROW)
    result: tuple[Tensor, Tensor] = (TALL_GRAM if served else _tall_gram_python)(t, b, w)
    return result


def _tall_gram_python(t: Tensor, b: Tensor | None, w: Tensor | None) -> tuple[Tensor, Tensor]:
    """With Q = T W (or T): Q^T Q and Q^T B, in float64."""
    q = t if w is None else t.double() @ w
    if b is not None and b.dtype != q.dtype:
        q, b = q.double(), b.double()
    moments = plain_gram(q, b, torch.float64)
    return moments[0], moments[1]


def _tall_gram_fake(t: Tensor, b: Tensor | None, w: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, order = t.shape[:-2], t.shape[-1]
    return (
        t.new_empty(*batch, order, order, dtype=torch.float64),
        t.new_empty(*batch, order, 0 if b is None else b.shape[-1], dtype=torch.float64),
    )


TALL_GRAM = define_op(
    "tall_gram(Tensor t, Tensor? b, Tensor? w) -> (Tensor gram, Tensor cross)",
    python=_tall_gram_python,
    fake=_tall_gram_fake,
    shapes={"t": "M S", "b": "M K", "w": "float64 S S"},
    helper=True,
)


class TallFactorArguments(NamedTuple):
    """What the op takes: the matrices and right sides, and the rule of the paths."""

    t: Tensor
    b: Tensor | None
    well_conditioned: float
    shift: float
    kept: float


def _tall_factor_python(args: TallFactorArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """left, right, T^T B, rank and info of float32 (or narrower) matrices by our rule."""
    t, order = args.t, args.t.shape[-1]
    gram, cross = _gram(t, args.b)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    bad = ~diagonal.isfinite().all(-1)
    usable = (diagonal > 0) & ~bad.unsqueeze(-1)
    inverse, scale, resolved = equilibrated_inverse(gram, usable, args.well_conditioned)
    hard = ~resolved & ~bad
    left = torch.where(bad[..., None, None], 0.0, inverse)
    right = identity(order, t).expand(left.shape).contiguous()
    rank = torch.where(bad, 0, order)
    info = bad.to(torch.int32)
    if not may_synchronise(t):
        info = torch.where(hard, UNRESOLVED, info)
    elif bool(hard.any()):
        second = _second_pass(t[hard], gram[hard], scale[hard], args.shift, args.kept)
        left[hard], right[hard], rank[hard] = second
    return left, right, cross, rank, info


def _tall_factor_fake(args: TallFactorArguments) -> tuple[Tensor, ...]:
    t, batch, order = args.t, args.t.shape[:-2], args.t.shape[-1]
    return (
        t.new_empty(*batch, order, order, dtype=torch.float64),
        t.new_empty(*batch, order, order, dtype=torch.float64),
        t.new_empty(*batch, order, 0 if args.b is None else args.b.shape[-1], dtype=torch.float64),
        t.new_empty(batch, dtype=torch.int64),
        t.new_empty(batch, dtype=torch.int32),
    )


def _check(args: TallFactorArguments) -> None:
    for name in ("well_conditioned", "shift", "kept"):
        checks.number("tall_factor", name, getattr(args, name), checks.NOT_NEGATIVE)


TALL_FACTOR = define_op(
    "tall_factor(Tensor t, Tensor? b, float well_conditioned, float shift, float kept) -> "
    "(Tensor left, Tensor right, Tensor cross, Tensor rank, Tensor info)",
    arguments=TallFactorArguments,
    python=_tall_factor_python,
    fake=_tall_factor_fake,
    shapes={"t": "M S", "b": "M K"},
    check=_check,
    helper=True,
)
