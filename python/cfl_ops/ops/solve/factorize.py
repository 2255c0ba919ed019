"""factorize: one factorisation of a matrix of any shape and rank, for many right sides. Made of other ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cfl_ops._core import checks
from cfl_ops._core.failures import check_info, error_message
from cfl_ops._core.op import transforming
from cfl_ops._core.results import public
from cfl_ops._core.state import makes_state, normal
from cfl_ops.ops.solve.graph_factors import graph_factors
from cfl_ops.ops.solve.least_squares import factored, matrix_error, pinv_arguments
from cfl_ops.ops.solve.tall import Factors as _Factors  # the frozen signature of Factorization says _Factors
from cfl_ops.ops.solve.tall import minimum_norm, refined_pinv, underdetermined

__all__ = ["Factorization", "factorize"]


@public
@dataclass(frozen=True)
class Factorization:
    """A factored matrix ``a (..., M, N)``: solves, its rank, condition and determinant from one factorisation.

    Made by :func:`factorize`. Holds no graph: use :func:`lstsq` or :func:`pinv` for gradients in ``a``; a
    solve is differentiable in its right side. ``torch.load(weights_only=True)`` reads what ``torch.save`` wrote.
    """

    a: Tensor
    rank: Tensor
    """``(...)`` int64: the numerical rank, by the rule of :func:`lstsq`."""
    _factors: _Factors | None

    def __getstate__(self) -> dict[str, Any]:
        """For pickles, which name no class of the package but this one."""
        return {
            "a": self.a,
            "rank": self.rank,
            "factors": None if self._factors is None else tuple(self._factors),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What :meth:`__getstate__` returned."""
        factors = state["factors"]
        self.__dict__.update(
            a=state["a"], rank=state["rank"], _factors=None if factors is None else _Factors(*factors)
        )

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
        return minimum_norm(self.a, b, f).to(dtype)

    def pinv(self) -> Tensor:
        """The pseudoinverse ``(..., N, M)``."""
        if self._factors is None:
            return self.a.new_zeros(self.a.mT.shape)
        return refined_pinv(self.a, self._factors).to(self.a.dtype)

    @property
    def singular_values(self) -> Tensor:
        """``(..., min(M, N))`` float64, falling; those that were cut are 0."""
        return self._decompose() if is_compiling() else self._singular_values

    @cached_property
    def _singular_values(self) -> Tensor:
        return self._decompose()

    @makes_state
    def _decompose(self) -> Tensor:
        f = self._factors
        if f is None:
            return self.a.new_zeros(*self.a.shape[:-2], 0, dtype=torch.float64)
        # On the orthogonal path alone it is right times orthonormal rows, basis^T.
        if f.basis is None or f.by_gram is not None:
            p = refined_pinv(self.a, f)
            values = torch.linalg.svdvals(
                torch.linalg.qr(p if underdetermined(self.a) else p.mT, mode="r")[1]
            )
        else:
            values = torch.linalg.svdvals(f.right)
        kept = torch.arange(values.shape[-1], device=values.device) < self.rank.unsqueeze(-1)
        return torch.where(kept, 1 / torch.where(kept, values, 1.0), 0.0).sort(-1, descending=True)[0]

    @property
    def condition(self) -> Tensor:
        """``(...)`` float64: the largest singular value over the smallest that was not cut (1 at rank 0)."""
        values = self.singular_values
        if values.shape[-1] == 0:
            return torch.ones(values.shape[:-1], dtype=torch.float64, device=values.device)
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


torch.serialization.add_safe_globals([Factorization])


def factorize(a: Tensor, *, rtol: float | Tensor | None = None) -> Factorization:
    """Factor ``a (..., M, N)`` once, for many right sides.

    Not differentiable in ``a``, in either mode: gradients and tangents of ``a`` are dropped (use :func:`lstsq` or
    :func:`pinv`).

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
    return _factorize(a, rtol)


@makes_state
def _factorize(a: Tensor, rtol: float | Tensor | None) -> Factorization:
    a, relative, _ = pinv_arguments("factorize", a, rtol, None)
    a = normal(a.detach())
    batch = a.shape[:-2]
    if a.numel() == 0:
        return Factorization(a, torch.zeros(batch, dtype=torch.int64, device=a.device), None)
    if is_compiling() or transforming():
        factors = graph_factors(a, relative)
    else:
        factors = factored(a, relative, None)
    check_info("factorize", factors.info, [factors.left, factors.right, factors.rank], [a])
    return Factorization(a, factors.rank, factors)


@error_message("factorize")
def _factorize_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    return matrix_error("factorize", info, context[0])
