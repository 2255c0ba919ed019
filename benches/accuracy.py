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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cfl_ops
import mpmath
import numpy as np
import torch
from extended_precision import (
    NoOracle,
    Wide,
    least_squares,
    left_out,
    mean_loss,
    ridge_oracle,
    rounded,
    wide,
)
from torch import Tensor

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


class Over(NamedTuple):
    """An error over its bound; strictly: over the bound that grants nothing for what storing a head or a QR costs."""

    error: float
    strict: float


class Judged(NamedTuple):
    """The loss (or objective) of a head beside those that it may have."""

    own: float
    rounded: float
    """Of the best head in extended precision, rounded to the dtype."""
    granted: float
    """The most that it can be by rounding of that kind."""
    size: float
    """The mean square of the targets."""

    def over(self) -> Over:
        """Over twice the best one's plus 1e-3 of the targets' mean square."""
        bounds = (2 * max(self.granted, self.rounded) + 1e-3 * self.size, 2 * self.rounded + 1e-3 * self.size)
        return Over(*(self.own / bound if bound else 0.0 for bound in bounds))

    def __add__(self, other: tuple[float, ...]) -> Judged:  # type: ignore[override]
        return Judged(*map(sum, zip(self, other, strict=True)))


def judge(
    x: np.ndarray, y: np.ndarray, head: np.ndarray, best: np.ndarray, dtype: torch.dtype, lam: float, *,
    free: bool = True, anchor: np.ndarray | None = None, weight: np.ndarray | None = None,
    storing: bool = False, factored: bool = False,
) -> tuple[Judged, Judged]:  # fmt: skip
    """The mean loss of a head, and with the penalty lam of the sum over rows.

    Args:
        free: a bias, which heads have last, is not penalized.
        anchor: what the penalty pulls to; zeros unless given.
        weight: of the rows.
        storing: what storing a head costs is a matter of luck where predictions cancel; the most that it can cost is
            granted. So it is in half precision.
        factored: a QR in this dtype is granted its backward error, (10 + n / 2) eps |X| |W|: rows that are equal all
            round the same way.

    """
    total = Wide(len(x)) if weight is None else weight.sum()
    size, stored = mean_loss(x, y, np.zeros_like(best), weight), rounded(best, dtype)
    if not np.isfinite(stored).all():
        return Judged(0.0, 0.0, 0.0, size), Judged(0.0, 0.0, 0.0, size)  # no head of this dtype is right
    unit, penalized = Wide(torch.finfo(dtype).eps / 2), x.shape[1] if free else len(best)

    def penalty(distance: np.ndarray) -> float:
        return float(lam / total * np.square(distance[:penalized]).sum())

    def distance(value: np.ndarray) -> np.ndarray:
        return np.abs(value if anchor is None else value - anchor)

    loss, granted, granted_penalty = mean_loss(x, y, stored, weight), 0.0, 0.0
    if storing or dtype.itemsize == 2:
        moved = np.abs(x) @ np.abs(best[: x.shape[1]]) * unit
        granted = mean_loss(x, y, best, weight) + mean_loss(x, moved, 0 * best, weight)
        granted_penalty = penalty(distance(best) + np.abs(best) * unit)
    if factored:
        granted = max(loss, granted) + float(
            np.square((20 + len(x)) * unit) * np.square(x).sum() * np.square(best).sum() / total
        )
    own = mean_loss(x, y, head, weight)
    return (
        Judged(own, loss, granted, size),
        Judged(
            own + penalty(distance(head)), loss + penalty(distance(stored)), granted + granted_penalty, size
        ),
    )


def named(judged: tuple[Judged, Judged], suffix: str = "") -> dict[str, Over]:
    return {"loss" + suffix: judged[0].over(), "objective" + suffix: judged[1].over()}


def worst(*measures: dict[str, Over]) -> dict[str, Over]:
    result: dict[str, Over] = {}
    for measure in measures:
        for key, value in measure.items():
            result[key] = Over(*map(max, value, result.get(key, value)))
    return result


Probe = Callable[[Cell], Mapping[str, float | Over]]
PROBES: dict[str, tuple[Callable[[int], Iterator[Cell]], Probe]] = {}


def probe(name: str, **fixed: Iterable[Any]) -> Callable[[Probe], Probe]:
    def register(function: Probe) -> Probe:
        PROBES[name] = (lambda every: grid(every, **fixed)), function
        return function

    return register


@probe("proximal_step")
def _proximal_step(cell: Cell) -> dict[str, Over]:
    x, y = data(cell)
    x64, y64 = wide(x), wide(y)
    result: dict[str, Over] = {}
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
        lam = len(x) * cell.lam
        best = ridge_oracle(x64, y64, lam, bias, anchor)
        judged = judge(x64, y64, head, best, x.dtype, lam, free=bias == "free", anchor=anchor)
        # Below 1e-9 of the targets' mean square a loss is 0 for all that anybody does with it.
        true, said = mean_loss(x64, y64, head), float(step.loss)
        reported = abs(said - true) / (0.05 * true + 1e-9 * judged[0].size)
        result = worst(result, named(judged), {"reported loss, 5 %": Over(reported, reported)})
    return result


@probe("rescaled_proximal_step", kind=("plain",), scale=(1e-3, 1.0, 1e3))
def _rescaled(cell: Cell) -> dict[str, Over]:
    x, labels = data(cell)[0], torch.arange(max(2, round(cell.ratio * WIDTH))) % TARGETS
    result: dict[str, Over] = {}
    for kappa in (1e-3, 7.0, 1e6):
        start = torch.zeros(TARGETS, WIDTH, dtype=x.dtype)
        step = cfl_ops.rescaled_proximal_step(x, labels, start, lam=cell.lam, kappa=kappa, target_scale=2.0)
        judged = _judge_classes(x, labels, wide(step.weight).T, kappa, 2.0, len(x) * cell.lam)
        result = worst(result, named(judged))
    return result


def _judge_classes(
    x: Tensor, labels: Tensor, head: np.ndarray, kappa: float, scale: float, lam: float
) -> tuple[Judged, Judged]:
    """A head of the rescaled squared loss: each class has row weights and targets of its own."""
    x64, each = wide(x), []
    for k in range(TARGETS):
        own = (labels == k).numpy()
        weight, target = np.where(own, Wide(kappa), Wide(1)), np.where(own, Wide(scale), Wide(0))[:, None]
        best = ridge_oracle(x64, target, lam, weight=weight)
        # With as few chances as classes the luck of rounding shows in float32 too.
        each.append(judge(x64, target, head[:, k : k + 1], best, x.dtype, lam, weight=weight, storing=True))
    nothing = Judged(0.0, 0.0, 0.0, 0.0)
    return sum((loss for loss, _ in each), nothing), sum((objective for _, objective in each), nothing)


@probe("class_ridge", kind=("plain",), scale=(1e-3, 1.0, 1e3))
def _class_ridge(cell: Cell) -> dict[str, Over]:
    x, labels = data(cell)[0], torch.arange(max(2, round(cell.ratio * WIDTH))) % TARGETS
    result: dict[str, Over] = {}
    for kappa in (1e-3, 7.0, 1e6):
        head = cfl_ops.class_ridge(x, labels, cell.lam, num_classes=TARGETS, kappa=kappa, scale=2.0)
        result = worst(result, named(_judge_classes(x, labels, wide(head), kappa, 2.0, cell.lam)))
    return result


@probe("ridge")
def _ridge(cell: Cell) -> dict[str, Over]:
    x, y = data(cell)
    x64, y64 = wide(x), wide(y)
    plain = cfl_ops.ridge(x, y, cell.lam)
    weight, offset = cfl_ops.ridge(x, y, cell.lam, bias=True)
    with_bias = np.concatenate([wide(weight), wide(offset)[None]])
    best = [ridge_oracle(x64, y64, cell.lam, bias) for bias in ("none", "free")]
    return named(judge(x64, y64, wide(plain), best[0], x.dtype, cell.lam)) | named(
        judge(x64, y64, with_bias, best[1], x.dtype, cell.lam), ", intercept"
    )


@probe("ridge_path", lam=(1.0,))
def _ridge_path(cell: Cell) -> dict[str, Over]:
    x, y = data(cell)
    lams, result = (1e-8, 1e-4, 1.0, 1e4, 1e8), {}
    weights, offsets = cfl_ops.ridge_path(x, y, lams, bias=True)
    for lam, weight, offset in zip(lams, weights, offsets, strict=True):
        head = np.concatenate([wide(weight), wide(offset)[None]])
        best = ridge_oracle(wide(x), wide(y), lam, "free")
        result = worst(result, named(judge(wide(x), wide(y), head, best, x.dtype, lam), ", intercept"))
    return result


@probe("ridge_cv", lam=(1.0,), dtype=("float32", "float64"))
def _ridge_cv(cell: Cell) -> dict[str, float]:
    x, y = data(cell)
    lams, result = (1e-8, 1e-4, 1.0, 1e4, 1e8), {}
    for bias, cv in itertools.product((False, True), ("loo", 2)):
        fit = cfl_ops.ridge_cv(x, y, lams, cv=cv, bias=bias)
        folds = None if cv == "loo" else cv
        exact = np.array([left_out(wide(x), wide(y), lam, bias, folds) for lam in lams], np.float64)
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


@probe("lstsq", lam=(0.0,), kind=("plain", "outlier"), ratio=(1.0, 2.0, 10.0))
def _lstsq(cell: Cell) -> dict[str, Over]:
    x, y = data(cell)
    best = least_squares(wide(x), wide(y))
    return {
        "loss": judge(wide(x), wide(y), wide(cfl_ops.lstsq(x, y)), best, x.dtype, 0.0, storing=True)[0].over()
    }


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
def _recursive_ridge(cell: Cell) -> dict[str, Over]:
    x, y = data(cell)
    best = ridge_oracle(wide(x), wide(y), cell.lam)
    model = cfl_ops.RecursiveRidge(WIDTH, TARGETS, alpha=cell.lam, dtype=x.dtype)
    sliding = cfl_ops.RecursiveRidge(WIDTH, TARGETS, alpha=cell.lam, dtype=x.dtype, window=len(x))
    for row, target in zip(x, y, strict=True):
        sliding.update(1e3 * row.flip(0), target)
    for row, target in zip(x, y, strict=True):
        model.update(row, target)
        sliding.update(row, target)
    result: dict[str, Over] = {}
    for head, suffix in ((model.weight, ""), (sliding.weight, ", window after rows x 1000")):
        judged = judge(wide(x), wide(y), wide(head).T, best, x.dtype, cell.lam, factored=True)
        result |= named(judged, suffix)
    return result


@probe("learn.Ridge", lam=(1e-4, 1.0, 1e4), kind=("plain",))
def _learn_ridge(cell: Cell) -> dict[str, Over]:
    from cfl_ops.learn import Ridge

    x, y = data(cell)
    y = y.double() + 257
    model = Ridge(alpha=cell.lam).fit(x, y)
    head = np.concatenate([wide(model.coef_).T, wide(model.intercept_)[None]])
    best = ridge_oracle(wide(x), wide(y), cell.lam, "free")
    judged = judge(wide(x), wide(y), head, best, model.coef_.dtype, cell.lam)
    varied = float(np.var(wide(y)))  # 257 is in the intercept
    return named((judged[0]._replace(size=varied), judged[1]._replace(size=varied)), ", targets + 257")


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
        try:
            exact = mpmath.matrix(((a.double() + a.double().mT) / 2).tolist()) ** -1
        except ZeroDivisionError:  # a singular matrix has been inverted
            return {"forward error, 10 %": math.inf}
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
    strictly: int
    strict_worst: float


def sweep(name: str, every: int = 1) -> list[Row]:
    cells, run = PROBES[name]
    rows: dict[str, Row] = {}
    told = 0
    for cell in cells(every):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                measures = run(cell)
        except NoOracle:
            continue
        except (torch.linalg.LinAlgError, ValueError, UserWarning):
            told += 1
            continue
        for measure, value in measures.items():
            row = rows.setdefault(measure, Row(name, measure, 0, 0, 0, 0.0, "", 0, 0.0))
            over = value if isinstance(value, Over) else Over(value, value)
            error, strict = (math.inf if math.isnan(v) else float(v) for v in over)
            row.cells += 1
            row.wrong += error > 1
            row.strictly += strict > 1
            row.strict_worst = max(row.strict_worst, strict)
            if error > row.worst:
                row.worst, row.where = error, str(cell)
    return [replace(row, told=told) for row in rows.values()]


def table(rows: Iterable[Row]) -> str:
    lines = [
        "| op | error over bound | cells | told | beyond | worst | worst cell | strictly beyond, worst |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row.op} | {row.measure} | {row.cells} | {row.told} | {row.wrong} | {row.worst:.2g} | {row.where} "
        f"| {row.strictly}, {row.strict_worst:.2g} |"
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
