"""GramMoments: what gram returns and adds to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cfl_ops._core import checks
from cfl_ops._core.results import result_type

__all__ = ["GramMoments"]


@result_type("gram")
class GramMoments(NamedTuple):
    """The second moments of features ``x (..., B, D)`` and targets ``y (..., B, K)`` with row weights ``s``.

    With ``D' = D + 1`` where a bias column was asked for (a last feature that is 1), else ``D' = D``:
    """

    gram: Tensor
    """``(..., D', D')``: sum of s x x^T, exactly symmetric."""
    cross: Tensor | None
    """``(..., D', K)``: sum of s x y^T, or None without targets."""
    target_sum: Tensor | None
    """``(..., K)``: sum of s y."""
    target_sq: Tensor | None
    """``(..., K)``: sum of s y^2."""
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs of moments
    """``(...)`` float64: sum of s, the number of rows where no weights are given."""

    def __add__(self, other: object) -> GramMoments:
        """The moments of both sets of rows together, made with the same options (a bias column does not show)."""
        if not isinstance(other, GramMoments):
            return NotImplemented
        return self._combine(other)

    def _combine(self, other: GramMoments) -> GramMoments:
        for name, mine, theirs in zip(self._fields, self, other, strict=True):
            if (mine is None) != (theirs is None):
                raise ValueError(
                    f"cfl_ops.GramMoments: cannot add moments with and without targets ({name} is None in one)"
                )
            if mine is not None and theirs is not None and mine.shape[-2:] != theirs.shape[-2:]:
                raise ValueError(
                    f"cfl_ops.GramMoments: cannot add {name} of shape {tuple(mine.shape)} "
                    f"and {tuple(theirs.shape)}"
                )
        return GramMoments._make(
            None if mine is None or theirs is None else mine + theirs
            for mine, theirs in zip(self, other, strict=True)
        )

    def decay(self, rho: float | Tensor) -> GramMoments:
        """All moments times ``rho``, one for all batch elements or one for each: older rows count less."""
        op = "GramMoments.decay"
        factor = checks.coefficient(op, "rho", rho, self.gram.device)
        if factor.ndim and factor.shape != self.count.shape:
            raise ValueError(
                f"cfl_ops.{op}: rho must be 0-d or have the batch shape {tuple(self.count.shape)}, "
                f"but got shape {tuple(factor.shape)}"
            )
        if not isinstance(rho, Tensor):
            check_decay(op, "rho", rho, self.gram.dtype)

        def decayed(field: Tensor) -> Tensor:
            rows = field.ndim - factor.ndim if factor.ndim else 0
            return field * factor.to(field.dtype)[(...,) + (None,) * rows]

        return GramMoments._make(None if field is None else decayed(field) for field in self)

    def to(self, *args: Any, **kwargs: Any) -> GramMoments:
        """As ``Tensor.to``, for every field; a dtype leaves ``count`` in float64."""
        moved = [None if field is None else field.to(*args, **kwargs) for field in self[:4]]
        assert moved[0] is not None
        return GramMoments._make([*moved, self.count.to(moved[0].device)])


def check_decay(op: str, name: str, decay: float, dtype: torch.dtype) -> None:
    """In a graph ``decay`` may be an input, of which nothing is asked here."""
    if dtype == torch.float32 and not is_compiling() and 0 < abs(decay - 1) < 1e-6:
        raise ValueError(
            f"cfl_ops.{op}: {name} must be 1, or differ from it by 1e-6, for float32 moments, but got {decay!r}: "
            "use acc_dtype=torch.float64"
        )
