"""Matrices that are barely definite, or not quite, and the pivots of stored numbers by mpmath."""

from __future__ import annotations

from collections.abc import Iterator

import mpmath
import torch
from torch import Tensor


def exact(value: Tensor) -> mpmath.matrix:
    return mpmath.matrix(value.double().tolist())


def pivots(a: mpmath.matrix) -> list[mpmath.mpf] | None:
    """The squared pivots of the Cholesky factor, or None where a is not positive definite."""
    a, found = a.copy(), []
    for j in range(a.rows):
        if a[j, j] <= 0:
            return None
        found.append(a[j, j])
        for i in range(j + 1, a.rows):
            for k in range(j + 1, i + 1):
                a[i, k] -= a[i, j] * a[k, j] / found[j]
    return found


def lower_of(a: mpmath.matrix) -> mpmath.matrix:
    """a with its lower triangle mirrored."""
    return mpmath.matrix([[a[max(i, j), min(i, j)] for j in range(a.rows)] for i in range(a.rows)])


def off(squares: Tensor, want: list[mpmath.mpf]) -> float:
    """The largest relative error of squared pivots."""
    return float(max(abs(mpmath.mpf(float(s)) ** 2 / w - 1) for s, w in zip(squares, want, strict=True)))


def matrices(order: int, dtype: torch.dtype, seed: int) -> Iterator[Tensor]:
    """Eigenvalues down to 10^-k, spread or one alone, graded or not, at several scales."""
    make = torch.Generator().manual_seed(seed)
    top, step = (9, 1) if dtype == torch.float32 else (18, 2)
    for k in range(0, top, step):
        basis = torch.linalg.qr(torch.randn(order, order, generator=make, dtype=torch.float64)).Q
        values = torch.logspace(0, -k, order, dtype=torch.float64)
        if k % 2:
            values = torch.cat([torch.ones(order - 1, dtype=torch.float64), values[-1:]])
        graded = 10.0 ** torch.randn(order, generator=make, dtype=torch.float64)
        scale = (1.0, 1e-6, 1e6)[k % 3]
        a = (basis * values) @ basis.mT * graded * graded.unsqueeze(-1) * scale
        yield ((a + a.mT) / 2).to(dtype)
