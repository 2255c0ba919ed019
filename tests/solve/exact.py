"""Systems of every condition, and their exact solutions: rational arithmetic on the numbers that are stored."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from tests.solve.data import F64, randn

CONDITIONS = tuple(10.0**power for power in (0, 2, 4, 5, 6, 7, 8, 10, 12, 13, 14, 15, 15.5, 16, 17, 19))


class Sample(NamedTuple):
    gram: Tensor
    """(systems, n, n)"""
    cross: Tensor
    """(systems, n, 3): of no use to the solution, of a given solution, and one that sees the smallest eigenvalue."""
    exact: list[list[list[Fraction]] | None]
    """n rows of 3 numbers, or None where the system is not positive definite."""


@functools.cache
def sample(order: int, dtype: torch.dtype, graded: float = 0.0) -> Sample:
    """A spectrum of each kind for each condition; graded: with rows and columns scaled by 10^-graded to 10^graded."""
    grams = torch.cat([_systems(order, condition) for condition in CONDITIONS])
    scale = 10 ** (graded * (2 * torch.rand(grams.shape[:-1], generator=_generator(order), dtype=F64) - 1))
    grams = (grams * scale[..., None] * scale[..., None, :]).to(dtype)
    wide = grams.double()
    _, vectors = torch.linalg.eigh(wide / wide.abs().amax((-1, -2), keepdim=True))
    given = wide @ randn(len(wide), order, 1, seed=2)
    cross = torch.cat([randn(len(wide), order, 1, seed=1), given, vectors[..., :1]], dim=-1).to(dtype)
    return Sample(grams, cross, [solve(g, c) for g, c in zip(grams, cross, strict=True)])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _systems(order: int, condition: float) -> Tensor:
    q = torch.linalg.qr(randn(order, order, seed=int(condition) % 9973 + order)).Q
    one, many, geometric = torch.ones(3, order, dtype=F64).unbind()
    one[-1] = 1 / condition
    many[order // 2 :] = 1 / condition
    geometric = torch.logspace(0, -torch.tensor(condition, dtype=F64).log10().item(), order, dtype=F64)
    negative = one * torch.where(torch.arange(order) == order - 1, -1, 1)
    spectra = [(q * v) @ q.T for v in (one, many, geometric, negative)]
    # Every pivot is the same, and each row along the direction where the rows before it are weakest.
    pivot = condition ** (-1 / max(order - 1, 1))
    factor = torch.zeros(order, order, dtype=F64)
    factor[0, 0] = 1
    for i in range(1, order):
        factor[i, :i] = torch.linalg.svd(factor[:i, :i])[2][-1] * (1 - pivot) ** 0.5
        factor[i, i] = pivot**0.5
    # Rows of random directions, and pivots that no single test of one sees.
    random = randn(order, order, seed=int(condition) % 7919).tril(-1)
    pivots = condition ** -(torch.rand(order, generator=_generator(order), dtype=F64) / 2)
    pivots[0] = 1
    random = (
        random
        / random.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        * (1 - pivots).clamp_min(0).sqrt()[:, None]
    )
    random = random + pivots.sqrt().diag()
    all_of_them = torch.stack([*spectra, factor @ factor.T, random @ random.T])
    return (all_of_them + all_of_them.mT) / 2


def solve(gram: Tensor, cross: Tensor) -> list[list[Fraction]] | None:
    """By elimination in fractions, of the lower triangle; None if a pivot is not positive."""
    lower = gram.double().tril()
    rows = [[Fraction(v) for v in row] for row in (lower + lower.tril(-1).mT).tolist()]
    right = [[Fraction(v) for v in row] for row in cross.double().tolist()]
    order = len(rows)
    for j in range(order):
        if rows[j][j] <= 0:
            return None
        for i in range(j + 1, order):
            factor = rows[i][j] / rows[j][j]
            for c in range(j, order):
                rows[i][c] -= factor * rows[j][c]
            right[i] = [a - factor * b for a, b in zip(right[i], right[j], strict=True)]
    for j in reversed(range(order)):
        right[j] = [v / rows[j][j] for v in right[j]]
        for i in range(j):
            right[i] = [a - rows[i][j] * b for a, b in zip(right[i], right[j], strict=True)]
    return right


def error(solution: Tensor, exact: list[list[Fraction]]) -> float:
    """The largest normwise error of a right side, relative to the exact solution."""
    worst = 0.0
    for column, side in enumerate(zip(*exact, strict=True)):
        largest = max(abs(v) for v in side)
        if largest == 0:
            worst = max(worst, float(solution[:, column].abs().max()))
            continue
        wrong = [
            float((Fraction(v) - e) / largest)
            for v, e in zip(solution[:, column].tolist(), side, strict=True)
        ]
        length = [float(e / largest) for e in side]
        worst = max(worst, (sum(v * v for v in wrong) / sum(v * v for v in length)) ** 0.5)
    return worst


def check(given: Sample, solution: Tensor, info: Tensor, step: int = 1) -> None:
    """What is accepted is right to 10 %, and what is not positive definite is not; what can be solved is accepted."""
    narrow = torch.finfo(given.gram.dtype).eps
    for i, exact in list(enumerate(given.exact))[::step]:
        if exact is None:
            assert info[i] > 0, i
            assert solution[i].isnan().all(), i
            continue
        wide = given.gram[i].double()
        scale = wide.diagonal().rsqrt()
        weakest = float(torch.linalg.eigvalsh(wide * scale * scale[:, None])[0])
        if info[i] != 0:
            assert weakest < 3e-15 or scale.max() / scale.min() > 1e12, (i, weakest)
            assert 0 < info[i] <= len(wide), i
            continue
        found = error(solution[i].double(), exact)
        assert found <= 0.1, (i, weakest, found)
        if narrow > 1e-10 and weakest < 1e-7:  # by way of float64
            assert found <= 3 * narrow, (i, weakest, found)
