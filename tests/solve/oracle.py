"""Ridge regression with more digits than float64, plainly: what a float64 solution is compared with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Wide = np.longdouble  # 64 bits of mantissa on x86


def wide(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy().astype(Wide)


def least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """argmin |a x - b| for a of full column rank, by Householder reflections."""
    a, b = a.copy(), b.copy()
    columns = a.shape[1]
    for j in range(columns):
        v = a[j:, j].copy()
        v[0] += np.sqrt(v @ v) if v[0] >= 0 else -np.sqrt(v @ v)
        v /= np.sqrt(v @ v)
        a[j:] -= 2 * np.outer(v, v @ a[j:])
        b[j:] -= 2 * np.outer(v, v @ b[j:])
    x = np.zeros((columns, b.shape[1]), Wide)
    for j in range(columns - 1, -1, -1):
        x[j] = (b[j] - a[j, j + 1 : columns] @ x[j + 1 :]) / a[j, j]
    return x


def ridge_head(
    x: np.ndarray, y: np.ndarray, lam: float, bias: bool = False, weight: np.ndarray | None = None
) -> np.ndarray:
    """argmin sum s |y - x w|^2 + lam |w|^2: (D, K), or with a bias, which is free, (D + 1, K)."""
    rows, columns = x.shape
    design = np.concatenate([x, np.ones((rows, 1), Wide)], 1) if bias else x
    root = np.ones((rows, 1), Wide) if weight is None else np.sqrt(weight)[:, None]
    below = np.diag(np.array([np.sqrt(Wide(lam))] * columns + [Wide(0)] * bias))
    pull = np.zeros((design.shape[1], y.shape[1]), Wide)
    return least_squares(np.concatenate([design * root, below]), np.concatenate([y * root, pull]))


def mean_loss(x: np.ndarray, y: np.ndarray, head: np.ndarray, weight: np.ndarray | None = None) -> float:
    if head.shape[0] > x.shape[1]:
        x = np.concatenate([x, np.ones((x.shape[0], 1), Wide)], 1)
    squares = np.square(y - x @ head)
    return float(squares.sum() / len(y) if weight is None else (weight @ squares).sum() / weight.sum())


def assert_loss_is_right(
    x: Tensor, y: Tensor, head: Tensor, best: np.ndarray, weight: np.ndarray | None = None
) -> None:
    """At most twice that of the best head in its dtype, and a thousandth of the targets' mean square."""
    x64, y64 = wide(x), wide(y)
    stored = wide(torch.from_numpy(best.astype(np.float64)).to(head.dtype))
    size = np.square(y64) if weight is None else weight[:, None] * np.square(y64) * (len(y64) / weight.sum())
    bound = 2 * mean_loss(x64, y64, stored, weight) + 1e-3 * float(size.sum() / len(y64))
    assert mean_loss(x64, y64, wide(head), weight) <= bound


def left_out(x: np.ndarray, y: np.ndarray, lam: float, bias: bool, folds: int | None = None) -> np.ndarray:
    """(K): the mean squared error of rows (or folds) left out, by as many refits."""
    rows, total = len(x), np.zeros(y.shape[1], Wide)
    for held in np.array_split(np.arange(rows), folds or rows):
        keep = np.setdiff1d(np.arange(rows), held)
        head = ridge_head(x[keep], y[keep], lam, bias)
        design = np.concatenate([x[held], np.ones((len(held), 1), Wide)], 1) if bias else x[held]
        total += np.square(y[held] - design @ head).sum(0)
    return total / rows


def features(
    dtype: torch.dtype, rows: int, cols: int, mean: float, scale: float, kind: str = "plain"
) -> Tensor:
    """``mean + scale * normal``; "duplicate": two equal columns, "outlier": a row 1,000 times as far."""
    z = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if kind == "duplicate":
        z[:, 1] = z[:, 0]
    if kind == "outlier":
        z[0] *= 1e3
    return (mean + scale * z).to(dtype)


def targets(dtype: torch.dtype, rows: int, count: int = 3) -> Tensor:
    y = torch.randn(rows, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (y + 1).to(dtype)
