"""Least squares and ridge regression with more digits than float64, plainly: an oracle for benches and tests."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Wide = np.longdouble  # 64 bits of mantissa on x86


class NoOracle(ArithmeticError):
    """The stored numbers have no answer to compare with."""


def wide(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy().astype(Wide)


def rounded(head: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return wide(torch.from_numpy(head.astype(np.float64)).to(dtype))


def least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """argmin |a x - b| for a of full column rank, by Householder reflections."""
    a, b = a.copy(), b.copy()
    columns = a.shape[1]
    for j in range(columns):
        v = a[j:, j].copy()
        norm = np.sqrt(v @ v)
        if norm == 0:
            raise NoOracle("a must have full column rank")
        v[0] += norm if v[0] >= 0 else -norm
        v /= np.sqrt(v @ v)
        a[j:] -= 2 * np.outer(v, v @ a[j:])
        b[j:] -= 2 * np.outer(v, v @ b[j:])
    x = np.zeros((columns, b.shape[1]), Wide)
    for j in range(columns - 1, -1, -1):
        x[j] = (b[j] - a[j, j + 1 : columns] @ x[j + 1 :]) / a[j, j]
    return x


def _with_ones(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, np.ones((len(x), 1), Wide)], 1)


def ridge_oracle(
    x: np.ndarray,
    y: np.ndarray,
    lam: float | np.ndarray,
    bias: str = "none",
    anchor: np.ndarray | None = None,
    weight: np.ndarray | None = None,
) -> np.ndarray:
    """argmin sum s |y - x w|^2 + lam |w - anchor|^2: (D, K), or (D + 1, K) with a "free" or "penalized" bias."""
    rows, columns = x.shape
    if bias != "none":
        x = _with_ones(x)
    penalty = np.full(x.shape[1], lam, Wide)
    if bias == "free":
        penalty[columns] = 0
    root = np.ones((rows, 1), Wide) if weight is None else np.sqrt(weight)[:, None]
    pull = np.zeros((x.shape[1], y.shape[1]), Wide) if anchor is None else anchor
    below = np.diag(np.sqrt(penalty))
    return least_squares(np.concatenate([x * root, below]), np.concatenate([y * root, below @ pull]))


def mean_loss(x: np.ndarray, y: np.ndarray, head: np.ndarray, weight: np.ndarray | None = None) -> float:
    """The mean over rows of |y - x w|^2, (D + 1, K) heads having the bias last."""
    squares = np.square(y - (_with_ones(x) if head.shape[0] > x.shape[1] else x) @ head)
    return float(squares.sum() / len(y) if weight is None else (weight @ squares).sum() / weight.sum())


def left_out(x: np.ndarray, y: np.ndarray, lam: float, bias: bool, folds: int | None = None) -> np.ndarray:
    """(K): the mean squared error of rows (or folds) left out, by as many refits."""
    rows, total = len(x), np.zeros(y.shape[1], Wide)
    for held in np.array_split(np.arange(rows), folds or rows):
        keep = np.setdiff1d(np.arange(rows), held)
        head = ridge_oracle(x[keep], y[keep], lam, "free" if bias else "none")
        total += np.square(y[held] - (_with_ones(x[held]) if bias else x[held]) @ head).sum(0)
    return total / rows
