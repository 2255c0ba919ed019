"""How right every op is, cell by cell: ``python benches/accuracy.py [--every 11] [--only ridge] [--out rows.json]``.

Each probe runs an op over a grid of means, scales, shapes, penalties and dtypes and compares with an oracle of its own,
which has more digits than the op (NumPy's extended precision, mpmath, or a refit for every row left out). What comes
out is an error over its bound: up to 1 is right. An exception or a warning is no wrong number in silence; those cells
are counted as told. The table names the worst cell of every probe: that is what a user can meet.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cfl_ops
import mpmath
import numpy as np
import torch
from torch import Tensor

Wide = np.longdouble  # 64 bits of mantissa on x86: oracle of what is computed in float64
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
WIDTH, TARGETS = 13, 3
MARKER = "<!-- written by benches/accuracy.py -->"


@dataclass(frozen=True)
class Cell:
    """One problem. ``mean`` and ``scale`` are those of the features: mean + scale * normal."""

    dtype: str = "float32"
    mean: float = 0.0
    scale: float = 1.0
    ratio: float = 2.0
    """Rows over columns."""
    lam: float = 1.0
    kind: str = "plain"
    """"plain", "duplicate" (two equal columns), "dead" (a column of zeros) or "outlier" (a row 1,000 times as far)."""

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" if isinstance(value, float) else str(value)
                         for name, value in asdict(self).items())  # fmt: skip


def grid(every: int, **fixed: Iterable[Any]) -> Iterator[Cell]:
    """Every cell, or each so many-th."""
    axes: dict[str, Iterable[Any]] = {
        "dtype": DTYPES,
        "mean": (0.0, 1.0, 1e3, 1e6),
        "scale": (1e-6, 1e-3, 1.0, 1e3, 1e6),
        "ratio": (0.1, 0.5, 1.0, 2.0, 10.0),
        "lam": (1e-8, 1e-4, 1.0, 1e4, 1e8),
        "kind": ("plain", "duplicate", "dead", "outlier"),
    } | fixed
    for index, values in enumerate(itertools.product(*axes.values())):
        cell = Cell(**dict(zip(axes, values, strict=True)))
        if index % every == 0 and (cell.dtype != "float16" or cell.mean + 5 * cell.scale < 6e4):
            yield cell


def data(cell: Cell, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features (n, D) and targets (n, K) of about unit size in the cell's dtype."""
    make = torch.Generator().manual_seed(seed)
    rows = max(2, round(cell.ratio * WIDTH))
    z = torch.randn(rows, WIDTH, generator=make, dtype=torch.float64)
    y = z @ torch.randn(WIDTH, TARGETS, generator=make, dtype=torch.float64) / math.sqrt(WIDTH)
    y = y + 0.3 * torch.randn(rows, TARGETS, generator=make, dtype=torch.float64) + 1
    if cell.kind == "duplicate":
        z[:, 1] = z[:, 0]
    if cell.kind == "outlier":
        z[0] *= 1e3 if cell.dtype != "float16" else 10
    x = cell.mean + cell.scale * z
    if cell.kind == "dead":
        x[:, 2] = 0
    return x.to(DTYPES[cell.dtype]), y.to(DTYPES[cell.dtype])


def wide(value: Tensor) -> np.ndarray:
    return value.detach().double().numpy().astype(Wide)


def least_squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """argmin |a x - b| for a of full column rank, by Householder reflections in extended precision."""
    a, b = a.copy(), b.copy()
    columns = a.shape[1]
    for j in range(columns):
        v = a[j:, j].copy()
        norm = np.sqrt(v @ v)
        if norm == 0:
            raise ZeroDivisionError("the oracle needs a full column rank")
        v[0] += norm if v[0] >= 0 else -norm
        v /= np.sqrt(v @ v)
        a[j:] -= 2 * np.outer(v, v @ a[j:])
        b[j:] -= 2 * np.outer(v, v @ b[j:])
    x = np.zeros((columns, b.shape[1]), Wide)
    for j in range(columns - 1, -1, -1):
        x[j] = (b[j] - a[j, j + 1 : columns] @ x[j + 1 :]) / a[j, j]
    return x


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
        x = np.concatenate([x, np.ones((rows, 1), Wide)], 1)
    penalty = np.full(x.shape[1], lam, Wide)
    if bias == "free":
        penalty[columns] = 0
    root = np.ones((rows, 1), Wide) if weight is None else np.sqrt(weight)[:, None]
    pull = np.zeros((x.shape[1], y.shape[1]), Wide) if anchor is None else anchor
    below = np.diag(np.sqrt(penalty))
    return least_squares(np.concatenate([x * root, below]), np.concatenate([y * root, below @ pull]))


def mean_loss(x: np.ndarray, y: np.ndarray, head: np.ndarray, weight: np.ndarray | None = None) -> float:
    """The mean over rows of |y - x w|^2, (D + 1, K) heads having the bias last."""
    if head.shape[0] > x.shape[1]:
        x = np.concatenate([x, np.ones((x.shape[0], 1), Wide)], 1)
    squares = np.square(y - x @ head)
    if weight is not None:
        return float((weight @ squares).sum() / weight.sum())
    return float(squares.sum() / x.shape[0])


def rounded(head: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return wide(torch.from_numpy(head.astype(np.float64)).to(dtype))


def loss_over_bound(
    x: Tensor, y: Tensor, head: np.ndarray, best: np.ndarray, dtype: torch.dtype, *, factored: bool = False
) -> float:
    """The head's loss over twice that of the rounded best one and a thousandth of the targets' mean square.

    What storing a head in half precision costs is a matter of luck, so there it is the most that it can cost.
    """
    x64, y64, stored = wide(x), wide(y), rounded(best, dtype)
    if not np.isfinite(stored).all():
        return 0.0  # no head of this dtype is right
    loss = mean_loss(x64, y64, stored)
    if dtype.itemsize == 2:
        moved = np.abs(x64) @ np.abs(best[: x64.shape[1]]) * Wide(torch.finfo(dtype).eps / 2)
        loss = max(loss, mean_loss(x64, y64, best) + float(np.square(moved).sum() / len(y64)))
    if factored:  # by a QR in this dtype, whose backward error is a few eps |X| |W|
        moved = 10 * torch.finfo(dtype).eps * np.sqrt(np.square(x64).sum() * np.square(best).sum())
        loss += float(moved**2 / len(y64))
    return mean_loss(x64, y64, head) / (2 * loss + 1e-3 * float(np.square(y64).sum() / len(y64)))


Probe = Callable[[Cell], dict[str, float]]
PROBES: dict[str, tuple[Callable[[int], Iterator[Cell]], Probe]] = {}


def probe(name: str, **fixed: Iterable[Any]) -> Callable[[Probe], Probe]:
    def register(function: Probe) -> Probe:
        PROBES[name] = (lambda every: grid(every, **fixed)), function
        return function

    return register


@probe("proximal_step")
def _proximal_step(cell: Cell) -> dict[str, float]:
    x, y = data(cell)
    result: dict[str, float] = {}
    old = torch.randn(TARGETS, WIDTH, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    for bias, start in itertools.product(("none", "penalized", "free"), (torch.zeros_like(old), old)):
        b = None if bias == "none" else torch.zeros(TARGETS, dtype=x.dtype)
        step = cfl_ops.proximal_step(
            x, y, start, b, lam=cell.lam, fit_bias="free" if bias == "free" else "penalized"
        )
        head, anchor = wide(step.weight).T, wide(start).T
        if step.bias is not None:
            head = np.concatenate([head, wide(step.bias)[None]])
            anchor = np.concatenate([anchor, np.zeros((1, TARGETS), Wide)])
        best = ridge_oracle(wide(x), wide(y), len(x) * cell.lam, bias, anchor)
        true, said = mean_loss(wide(x), wide(y), head), float(step.loss)
        size = float(np.square(wide(y)).sum() / len(y))
        worst = {
            "loss of the head": loss_over_bound(x, y, head, best, x.dtype),
            # Below 1e-9 of the targets' mean square a loss is 0 for all that anybody does with it.
            "reported loss, 5 %": abs(said - true) / (0.05 * true + 1e-9 * size),
        }
        result = {key: max(value, result.get(key, 0.0)) for key, value in worst.items()}
    return result


@probe("rescaled_proximal_step", kind=("plain",), scale=(1e-3, 1.0, 1e3))
def _rescaled(cell: Cell) -> dict[str, float]:
    x, labels = data(cell)[0], torch.arange(max(2, round(cell.ratio * WIDTH))) % TARGETS
    result: dict[str, float] = {}
    for kappa in (1e-3, 7.0, 1e6):
        start = torch.zeros(TARGETS, WIDTH, dtype=x.dtype)
        step = cfl_ops.rescaled_proximal_step(x, labels, start, lam=cell.lam, kappa=kappa, target_scale=2.0)
        worst = _class_loss(x, labels, wide(step.weight).T, kappa, 2.0, len(x) * cell.lam)
        result = {key: max(value, result.get(key, 0.0)) for key, value in worst.items()}
    return result


def _class_loss(
    x: Tensor, labels: Tensor, head: np.ndarray, kappa: float, scale: float, lam: float
) -> dict[str, float]:
    """The loss of a head of the rescaled squared loss, over its bound."""
    x64, loss, least, most, size = wide(x), 0.0, 0.0, 0.0, 0.0
    for k in range(TARGETS):
        own = (labels == k).numpy()
        weight, target = np.where(own, Wide(kappa), Wide(1)), np.where(own, Wide(scale), Wide(0))[:, None]
        best = ridge_oracle(x64, target, lam, weight=weight)
        stored = rounded(best, x.dtype)
        if not np.isfinite(stored).all():
            return {"loss of the head": 0.0}  # no head of this dtype is right
        size += float((weight @ np.square(target)).sum() / weight.sum())
        loss += mean_loss(x64, target, head[:, k : k + 1], weight)
        least += mean_loss(x64, target, stored, weight)
        # As in loss_over_bound; here in float32 too, since there are only as many chances as classes.
        moved = np.abs(x64) @ np.abs(best) * Wide(torch.finfo(x.dtype).eps / 2)
        most += mean_loss(x64, target, best, weight) + float((weight @ np.square(moved)).sum() / weight.sum())
    bound = 2 * max(least, most) + 1e-3 * size
    return {"loss of the head": loss / bound if bound else 0.0}


@probe("class_ridge", kind=("plain",), scale=(1e-3, 1.0, 1e3))
def _class_ridge(cell: Cell) -> dict[str, float]:
    x, labels = data(cell)[0], torch.arange(max(2, round(cell.ratio * WIDTH))) % TARGETS
    result = 0.0
    for kappa in (1e-3, 7.0, 1e6):
        head = cfl_ops.class_ridge(x, labels, cell.lam, num_classes=TARGETS, kappa=kappa, scale=2.0)
        result = max(result, _class_loss(x, labels, wide(head), kappa, 2.0, cell.lam)["loss of the head"])
    return {"loss of the head": result}


@probe("ridge")
def _ridge(cell: Cell) -> dict[str, float]:
    x, y = data(cell)
    plain = cfl_ops.ridge(x, y, cell.lam)
    weight, offset = cfl_ops.ridge(x, y, cell.lam, bias=True)
    with_bias = np.concatenate([wide(weight), wide(offset)[None]])
    best = [ridge_oracle(wide(x), wide(y), cell.lam, bias) for bias in ("none", "free")]
    return {
        "loss of the head": loss_over_bound(x, y, wide(plain), best[0], x.dtype),
        "loss, intercept": loss_over_bound(x, y, with_bias, best[1], x.dtype),
    }


@probe("ridge_path", lam=(1.0,))
def _ridge_path(cell: Cell) -> dict[str, float]:
    x, y = data(cell)
    lams, worst = (1e-8, 1e-4, 1.0, 1e4, 1e8), 0.0
    weights, offsets = cfl_ops.ridge_path(x, y, lams, bias=True)
    for lam, weight, offset in zip(lams, weights, offsets, strict=True):
        head = np.concatenate([wide(weight), wide(offset)[None]])
        worst = max(worst, loss_over_bound(x, y, head, ridge_oracle(wide(x), wide(y), lam, "free"), x.dtype))
    return {"loss, intercept": worst}


@probe("ridge_cv", lam=(1.0,), dtype=("float32", "float64"))
def _ridge_cv(cell: Cell) -> dict[str, float]:
    x, y = data(cell)
    lams, result = (1e-8, 1e-4, 1.0, 1e4, 1e8), {}
    for bias, cv in itertools.product((False, True), ("loo", 2)):
        fit = cfl_ops.ridge_cv(x, y, lams, cv=cv, bias=bias)
        exact = np.array([_left_out(wide(x), wide(y), lam, bias, cv) for lam in lams], np.float64)
        scores = fit.scores.numpy()
        chosen = [lams.index(float(lam)) for lam in fit.lam]
        best, got = exact.min(0), exact[chosen, range(TARGETS)]
        what = "leave-one-out" if cv == "loo" else "2 folds"
        result[f"{what} error of the choice, 1 %"] = max(
            float(((got - best) / (0.01 * best)).max()),
            result.get(f"{what} error of the choice, 1 %", 0.0),
        )
        result[f"{what} scores, 1 %"] = max(
            float((np.abs(scores - exact) / (0.01 * exact + 1e-9 * np.square(wide(y)).mean())).max()),
            result.get(f"{what} scores, 1 %", 0.0),
        )
    return result


def _left_out(x: np.ndarray, y: np.ndarray, lam: float, bias: bool, cv: str | int) -> np.ndarray:
    """(K): the mean squared error of rows left out, by refits."""
    rows, total = len(x), np.zeros(y.shape[1], Wide)
    for held in np.array_split(np.arange(rows), rows if cv == "loo" else cv):
        keep = np.setdiff1d(np.arange(rows), held)
        head = ridge_oracle(x[keep], y[keep], lam, "free" if bias else "none")
        design = np.concatenate([x[held], np.ones((len(held), 1), Wide)], 1) if bias else x[held]
        total += np.square(y[held] - design @ head).sum(0)
    return total / rows


@probe("lstsq", lam=(0.0,), kind=("plain", "outlier"), ratio=(1.0, 2.0, 10.0))
def _lstsq(cell: Cell) -> dict[str, float]:
    x, y = data(cell)
    best = least_squares(wide(x), wide(y))
    return {"loss of the solution": loss_over_bound(x, y, wide(cfl_ops.lstsq(x, y)), best, x.dtype)}


@probe("pinv", lam=(0.0,), kind=("plain",), dtype=("float32", "float64"))
def _pinv(cell: Cell) -> dict[str, float]:
    x, _ = data(cell)
    eps, own = torch.finfo(x.dtype).eps, wide(cfl_ops.pinv(x))
    a = wide(x) if len(x) >= WIDTH else wide(x).T
    best = least_squares(a, np.eye(len(a), dtype=Wide))
    best = best if len(x) >= WIDTH else best.T
    values = np.linalg.svd(x.double().numpy(), compute_uv=False)
    bound = 20 * eps * max(x.shape) * values[0] / values[-1]
    if bound > 0.1:
        return {}
    return {
        "error, 20 eps n cond": float(np.sqrt(np.square(own - best).sum() / np.square(best).sum())) / bound
    }


@probe("factorize", lam=(0.0,), kind=("plain",), dtype=("float64",), ratio=(1.0, 2.0, 10.0))
def _factorize(cell: Cell) -> dict[str, float]:
    x, _ = data(cell)
    f, values = cfl_ops.factorize(x), _singular_values(x)
    bound = 20 * torch.finfo(x.dtype).eps * max(x.shape) * float(values[0] / values[-1])
    if bound > 0.1:
        return {}
    best = least_squares(wide(x), np.eye(len(x), dtype=Wide))
    error = float(np.sqrt(np.square(wide(f.pinv()) - best).sum() / np.square(best).sum()))
    log = float(np.log(values).sum())
    return {
        "pinv, 20 eps n cond": error / bound,
        "condition, the same": abs(float(f.condition) * float(values[-1] / values[0]) - 1) / bound,
        "logdet, the same": abs(float(f.logdet) - log) / bound if len(x) == WIDTH else 0.0,
    }


def _singular_values(x: Tensor) -> np.ndarray:
    with mpmath.workdps(40):
        values = mpmath.svd_r(mpmath.matrix(x.double().tolist()), compute_uv=False)
        return np.array([float(value) for value in values])


@probe("ridge_solve", kind=("plain",), mean=(0.0,), scale=(1e-6, 1.0, 1e6), ratio=(2, 3, 5, 8, 13, 30),
       lam=tuple(10.0**k for k in range(0, 19)))  # fmt: skip
def _ridge_solve(cell: Cell) -> dict[str, float]:
    """Here the ratio is the order and lam the condition number; the smaller eigenvalues are spread or all least."""
    order, worst = int(cell.ratio), 0.0
    make = torch.Generator().manual_seed(order)
    for trial in range(6):
        basis, _ = torch.linalg.qr(torch.randn(order, order, generator=make, dtype=torch.float64))
        values = torch.logspace(0, -math.log10(cell.lam), order, dtype=torch.float64)
        if trial % 2:
            values = torch.cat([torch.ones(order - 1, dtype=torch.float64), values[-1:]])
        graded = 10.0 ** (3 * torch.randn(order, generator=make, dtype=torch.float64)) if trial > 3 else 1.0
        a = (basis * values) @ basis.mT * cell.scale
        a = ((a + a.mT) / 2 * graded * torch.as_tensor(graded).reshape(-1, 1)).to(DTYPES[cell.dtype])
        b = torch.randn(order, 1, generator=make, dtype=torch.float64).to(a.dtype)
        if not bool(a.isfinite().all()):
            continue
        x, info = cfl_ops.ridge_solve_ex(a, b)
        if int(info):
            continue
        with mpmath.workdps(60):
            lower = a.double().tril()
            full = mpmath.matrix((lower + lower.tril(-1).mT).tolist())
            try:
                exact = mpmath.lu_solve(full, mpmath.matrix(b.double().tolist()))
            except ZeroDivisionError:
                return {"forward error, 10 %": math.inf}
            change = mpmath.norm(mpmath.matrix(x.double().tolist()) - exact) / mpmath.norm(exact)
            top = torch.finfo(a.dtype).max
            if max(map(abs, exact)) < top and min(map(abs, exact)) > torch.finfo(a.dtype).tiny:
                worst = max(worst, float(change) / 0.1)
    return {"forward error, 10 %": worst}


@probe("RecursiveRidge", dtype=("float32", "float64"), lam=(1e-8, 1.0, 1e8), kind=("plain", "outlier"))
def _recursive_ridge(cell: Cell) -> dict[str, float]:
    x, y = data(cell)
    best = ridge_oracle(wide(x), wide(y), cell.lam)
    model = cfl_ops.RecursiveRidge(WIDTH, TARGETS, alpha=cell.lam, dtype=x.dtype)
    sliding = cfl_ops.RecursiveRidge(WIDTH, TARGETS, alpha=cell.lam, dtype=x.dtype, window=len(x))
    for row, target in zip(x, y, strict=True):
        sliding.update(1e3 * row.flip(0), target)
    for row, target in zip(x, y, strict=True):
        model.update(row, target)
        sliding.update(row, target)
    return {
        "loss of the head, of a QR": loss_over_bound(
            x, y, wide(model.weight).T, best, x.dtype, factored=True
        ),
        "loss, window after rows x 1000": loss_over_bound(
            x, y, wide(sliding.weight).T, best, x.dtype, factored=True
        ),
    }


@probe("learn.Ridge", lam=(1e-4, 1.0, 1e4), kind=("plain",))
def _learn_ridge(cell: Cell) -> dict[str, float]:
    from cfl_ops.learn import Ridge

    x, y = data(cell)
    y = y.double() + 257
    model = Ridge(alpha=cell.lam).fit(x, y)
    head = np.concatenate([wide(model.coef_).T, wide(model.intercept_)[None]])
    best = ridge_oracle(wide(x), wide(y), cell.lam, "free")
    x64, y64 = wide(x), wide(y)
    bound = 2 * mean_loss(x64, y64, rounded(best, model.coef_.dtype)) + 1e-3 * float(np.var(y64))
    return {"loss, targets + 257": mean_loss(x64, y64, head) / bound}


@probe("gram", lam=(0.0,), kind=("plain",))
def _gram(cell: Cell) -> dict[str, float]:
    x, y = data(cell)
    moments = cfl_ops.gram(x, y)
    eps = torch.finfo(moments.gram.dtype).eps
    a, b = wide(x), wide(y)
    bound = len(x) * eps
    return {
        "gram, n eps |X|'|X|": float((np.abs(wide(moments.gram) - a.T @ a) / (np.abs(a).T @ np.abs(a))).max())
        / bound,
        "cross, the same": float((np.abs(wide(moments.cross) - a.T @ b) / (np.abs(a).T @ np.abs(b))).max())
        / bound,
    }


@probe("cholesky_update", dtype=("float32", "float64"), lam=(1e-8, 1.0, 1e8), kind=("plain", "outlier"))
def _cholesky_update(cell: Cell) -> dict[str, float]:
    x, _ = data(cell)
    start = math.sqrt(cell.lam) * torch.eye(WIDTH, dtype=x.dtype)
    factor = cfl_ops.cholesky_update(start, x.mT.contiguous())
    a = wide(start) @ wide(start).T + wide(x).T @ wide(x)
    eps = torch.finfo(x.dtype).eps
    error = np.abs(wide(factor) @ wide(factor).T - a).max() / np.abs(a).max()
    return {"L L^T, 10 eps (D + n)": float(error) / (10 * eps * (WIDTH + len(x)))}


@probe(
    "spd_inverse",
    dtype=("float32", "float64"),
    lam=(1e-8, 1e-4, 1.0, 1e4, 1e8),
    kind=("plain",),
    ratio=(1.0, 2.0, 10.0),
)
def _spd_inverse(cell: Cell) -> dict[str, float]:
    x, _ = data(cell)
    a = (x.double().mT @ x.double() + cell.lam * torch.eye(WIDTH, dtype=torch.float64)).to(x.dtype)
    inverse = wide(cfl_ops.spd_inverse(a))
    with mpmath.workdps(50):
        exact = mpmath.matrix(((a.double() + a.double().mT) / 2).tolist()) ** -1
        best = np.array([[float(exact[i, j]) for j in range(WIDTH)] for i in range(WIDTH)])
    return {
        "forward error, 10 %": float(np.linalg.norm((inverse - best).astype(float)) / np.linalg.norm(best))
        / 0.1
    }


@probe("compress", lam=(0.0,), ratio=(1, 33, 256, 40_000), kind=("plain", "outlier", "sparse", "mask"))
def _compress(cell: Cell) -> dict[str, float]:
    """Here the ratio is the number of weights; an outlier is 500 deviations away."""
    count = int(cell.ratio)
    z = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    if cell.kind == "outlier":
        z[count // 2] = 500
    w = cell.mean + cell.scale * z
    if cell.kind == "sparse":
        w = torch.where(z.abs() < 1, 0.0, w)
    w = w.to(DTYPES[cell.dtype])
    if cell.kind == "mask":
        w = torch.where(z > 0, torch.full_like(w, torch.finfo(w.dtype).min), 0)
    if not bool(w.isfinite().all()):
        return {}
    blob = cfl_ops.compress(w)
    back = wide(cfl_ops.decompress(blob))
    good = np.abs(z.numpy()) < 100
    deviation = float(np.std(wide(w)[good])) if cell.kind != "mask" else float(np.std(wide(w)))
    error = float(np.sqrt(np.square(back - wide(w)).mean()))
    return {
        "rms error, 2 % of a deviation": error / (0.02 * deviation) if error else 0.0,
        "size, raw + 160 bytes": blob.numel() / (w.numel() * w.element_size() + 160),
    }


@dataclass
class Row:
    """What one measure of one probe came to."""

    op: str
    measure: str
    cells: int
    told: int
    wrong: int
    worst: float
    where: str


def sweep(name: str, every: int = 1) -> list[Row]:
    cells, run = PROBES[name]
    rows: dict[str, Row] = {}
    told = 0
    for cell in cells(every):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                measures = run(cell)
        except (torch.linalg.LinAlgError, ValueError, ZeroDivisionError, UserWarning):
            told += 1
            continue
        for measure, value in measures.items():
            row = rows.setdefault(measure, Row(name, measure, 0, 0, 0, 0.0, ""))
            value = math.inf if math.isnan(value) else value
            row.cells += 1
            row.wrong += int(value > 1)
            if value > row.worst:
                row.worst, row.where = float(value), str(cell)
    return [replace(row, told=told) for row in rows.values()]


def table(rows: Iterable[Row]) -> str:
    lines = [
        "| op | error over bound | cells | told | beyond | worst | worst cell |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.op} | {row.measure} | {row.cells} | {row.told} | {row.wrong} | {row.worst:.2g} | {row.where} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="only each so many-th cell")
    parser.add_argument("--backend", choices=("native", "python"), help="instead of the best there is")
    parser.add_argument("--only", nargs="*", default=list(PROBES), choices=list(PROBES))
    parser.add_argument("--out", type=Path, help="the rows as JSON")
    parser.add_argument(
        "--page", type=Path, help="a page whose table between its two markers is written anew"
    )
    args = parser.parse_args()
    from tqdm import tqdm

    with cfl_ops.config.use_backend(args.backend):
        rows = [row for name in tqdm(args.only) for row in sweep(name, args.every)]
    print(table(rows))
    if args.out:
        args.out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if args.page:
        before, after = args.page.read_text().split(MARKER)[::2]
        args.page.write_text(f"{before}{MARKER}\n{table(rows)}\n{MARKER}{after}")


if __name__ == "__main__":
    main()
