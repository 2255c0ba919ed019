"""The Cholesky factor of a matrix that grows or shrinks by rows and columns."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cfl_ops._core import checks
from cfl_ops._core.autocast import without_autocast
from cfl_ops._core.batching import expand_batch
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import transforming
from cfl_ops.errors import LinAlgError
from cfl_ops.ops.cholesky.codes import LEAST_EIGENVALUE
from cfl_ops.ops.cholesky.factor import check_factor, least_eigenvalue_above, row_norms
from cfl_ops.ops.cholesky.update import cholesky_update

__all__ = ["cholesky_append", "cholesky_append_ex", "cholesky_delete"]


def cholesky_append(L: Tensor, rows: Tensor, corner: Tensor) -> Tensor:
    r"""The factor of a matrix that grew by m rows and columns.

    .. math:: \begin{pmatrix} A & R^T \\ R & C \end{pmatrix}
              = L' L'^T, \quad
              L' = \begin{pmatrix} L & 0 \\ R L^{-T} & \mathrm{chol}(C - R A^{-1} R^T) \end{pmatrix}

    (Golub and Van Loan, Matrix Computations, section 6.5.)

    Args:
        L: the factor ``(..., D, D)`` of A, float32 or float64; only the lower triangle is read.
        rows: R ``(..., m, D)``, the new rows against the old columns.
        corner: C ``(..., m, m)``, symmetric; only its lower triangle is read.

    Returns:
        ``(..., D + m, D + m)``, lower triangular.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices do not fit.
        torch.linalg.LinAlgError: the grown matrix is not positive definite, or rounding may have changed a new
            squared pivot by a tenth; names the batch index and pivot.

    Costs ``m D^2 + m^2 D + m^3 / 3`` FLOPs, and the copy. Differentiable in all three.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.cholesky_append(torch.eye(1), torch.tensor([[2.0]]), torch.tensor([[5.0]]))
        tensor([[1., 0.],
                [2., 1.]])

    """
    out, info = _append("cholesky_append", L, rows, corner)
    check_info("cholesky_append", info, [out], [])
    return out


def cholesky_append_ex(L: Tensor, rows: Tensor, corner: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`cholesky_append`, but returns ``(L', info)`` instead of raising for what the data holds.

    ``info (...)`` int32: 0, or the order of the first leading minor of the grown matrix that is not positive
    definite to working precision (NaN included); the block of the new corner is then undefined.

    Example:
        >>> import torch, cfl_ops
        >>> L, info = cfl_ops.cholesky_append_ex(torch.eye(1), torch.tensor([[2.0]]), torch.tensor([[4.0]]))
        >>> int(info)
        2

    """
    return _append("cholesky_append_ex", L, rows, corner)


def cholesky_delete(L: Tensor, index: int | Sequence[int]) -> Tensor:
    r"""The factor of a matrix that lost rows and columns.

    Deleting row and column i of A deletes row i of L; what is left of L to the right of column i is repaired
    by the rank-one update with the part of column i below it (Golub and Van Loan, section 6.5).

    Args:
        L: the factor ``(..., D, D)``, float32 or float64; only the lower triangle is read.
        index: what to delete: an integer in ``[-D, D)``, or a sequence of different ones.

    Returns:
        ``(..., D - m, D - m)``, lower triangular.

    Raises:
        TypeError, ValueError: L does not fit, or has NaN or Inf behind what is deleted; an index repeats.
        IndexError: an index is out of range.

    Costs ``2 m (D - i)^2`` FLOPs, i being the first index. Differentiable in L.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.cholesky_delete(torch.tensor([[1.0, 0.0], [2.0, 1.0]]), 0)
        tensor([[2.2361]])

    """
    check_factor("cholesky_delete", "L", L)
    wanted = _sorted_indices("cholesky_delete", index, L.shape[-1])
    out = L.tril()
    while wanted:  # runs of neighbours, the last one first, each in one update
        end = wanted[-1] + 1
        begin = end - 1
        while wanted and wanted[-1] == begin:
            wanted.pop()
            begin -= 1
        begin += 1
        rest = out[..., end:, end:]
        if rest.shape[-1]:
            rest = cholesky_update(rest, out[..., end:, begin:end])
        out = _joined(out[..., :begin, :begin], out[..., end:, :begin], rest)
    return out


@without_autocast
def _append(op: str, L: Tensor, rows: Tensor, corner: Tensor) -> tuple[Tensor, Tensor]:
    check_factor(op, "L", L)
    check_factor(op, "corner", corner)
    checks.floating(op, "rows", rows, 2)
    checks.size(op, "rows", rows, -1, L.shape[-1], "the order of L")
    checks.size(op, "rows", rows, -2, corner.shape[-1], "the order of corner")
    for name, value in (("rows", rows), ("corner", corner)):
        if value.dtype != L.dtype:
            raise TypeError(
                f"cfl_ops.{op}: {name} must have the dtype of L ({L.dtype}), but got {value.dtype}"
            )
    checks.same_device(op, "L", L, rows=rows, corner=corner)
    batch = checks.broadcastable(op, L=L.shape[:-2], rows=rows.shape[:-2], corner=corner.shape[:-2])
    L, rows, corner = expand_batch((L.tril(), rows, corner), (2, 2, 2), batch)
    left = torch.linalg.solve_triangular(L.mT, rows, upper=True, left=False)
    lower = corner.tril()
    symmetric = lower + lower.tril(-1).mT
    right, info = torch.linalg.cholesky_ex(symmetric - left @ left.mT)
    if right.shape[-1] and not _clear(L, right, corner):
        lost = _lost_pivot(L.detach(), left.detach(), right.detach(), lower.detach())
        info = torch.where(info != 0, info, lost)
    return _joined(L, left, right), torch.where(info != 0, info + L.shape[-1], info)


def _clear(L: Tensor, right: Tensor, corner: Tensor) -> bool:
    """Whether the pivots are so large that none can be lost: on a CPU a look at them is cheaper than the sums below."""
    if not L.is_cpu or is_compiling() or transforming() or L.numel() == 0 or right.numel() != 1:
        return False
    least, largest = L.diagonal(dim1=-2, dim2=-1).amin(), L.abs().amax()
    return float(least) > 0.01 * float(largest) and float(right) ** 2 > 0.05 * float(corner)


def _lost_pivot(L: Tensor, left: Tensor, right: Tensor, corner: Tensor) -> Tensor:
    """The order of the new pivot that rounding may have changed by a tenth, as in with_lost_digits; 0 for none.

    Rounding changes an entry of the grown matrix by eps of the sizes of its row and column, and so entry i, j of
    C - R A^-1 R^T by eps of c_i r_j + r_i c_j, c the size of the corner's rows and r = c + 2 |R A^-1| diag(A)^1/2.
    """
    back = torch.linalg.solve_triangular(L, left, upper=False, left=False)
    size = corner.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().unsqueeze(-1)
    known = L.shape[-1] > 0
    reach = size + 2 * back.abs() @ row_norms(L) if known else size
    scaled = right / (size.sqrt() * reach.sqrt())
    # A fourth, for r is a sum of magnitudes, and roundings have signs.
    least = LEAST_EIGENVALUE / 4 * torch.finfo(L.dtype).eps * (L.shape[-1] + right.shape[-1]) ** 0.5
    worst = scaled.diagonal(dim1=-2, dim2=-1).argmin(-1) + 1
    return torch.where(least_eigenvalue_above(scaled, least), 0, worst).to(torch.int32)


def _joined(top: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The lower triangular matrix of blocks ``[[top, 0], [left, right]]``."""
    above = torch.cat((top, top.new_zeros(*top.shape[:-1], right.shape[-1])), -1)
    return torch.cat((above, torch.cat((left, right), -1)), -2)


def _sorted_indices(op: str, index: int | Sequence[int], order: int) -> list[int]:
    one = getattr(index, "ndim", None) == 0 or isinstance(index, str) or not isinstance(index, Iterable)
    several: Iterable[Any] = [index] if one else index  # type: ignore[assignment]
    order = operator.index(order)  # a graph is made for the rows that are deleted
    given = [checks.integer(op, "index", i) for i in several]
    for i in given:
        if not -order <= i < order:
            raise IndexError(f"cfl_ops.{op}: index must be in [{-order}, {order}), but got {i}")
    wanted = sorted(operator.index(i) % order for i in given)
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"cfl_ops.{op}: index must not repeat, but got {index!r}")
    return wanted


@error_message("cholesky_append")
def _append_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    _, code, where = first_failure(info)
    error: Exception = LinAlgError(
        f"cfl_ops.cholesky_append: {where}the grown matrix is not positive definite to working precision "
        f"(the leading minor of order {code})"
    )
    return error
