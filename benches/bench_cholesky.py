"""Rank-k updates against refactoring, RecursiveRidge per row, and GPTQ's Hessian against the percdamp loop."""

from __future__ import annotations

import cfl_ops
import numpy as np
import pytest
import torch
from _ratio import compare

ASKED = {(256, 1): 15.0, (1024, 1): 30.0, (1024, 16): 6.0, (1024, 64): 2.5}


def problem(order: int, rank: int, dtype: torch.dtype, batch: tuple[int, ...] = ()):
    root = torch.randn(*batch, order, 2 * order, dtype=torch.float64)
    a = root @ root.mT / (2 * order)
    V = torch.randn(*batch, order, rank, dtype=torch.float64)
    return torch.linalg.cholesky(a).to(dtype), V.to(dtype), (a + V @ V.mT).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["row", "column"])
@pytest.mark.parametrize(("order", "rank"), [*ASKED, (256, 16), (256, 64), (1024, 256), (64, 1)])
@pytest.mark.benchmark(group="cholesky_update_ against torch.linalg.cholesky of the updated matrix")
def bench_update(benchmark, order: int, rank: int, layout: str, dtype: torch.dtype) -> None:
    L, V, updated = problem(order, rank, dtype)
    L = L.contiguous() if layout == "row" else L.mT.contiguous().mT
    asked = ASKED.get((order, rank))
    if asked and dtype == torch.float64:
        asked /= 2
    compare(
        benchmark,
        f"D={order} k={rank} {layout}-major {str(dtype)[6:]}",
        lambda: cfl_ops.cholesky_update_(L, V, 1e-3),
        {"cholesky": lambda: torch.linalg.cholesky(updated)},
        flops=2 * rank * order**2,
        bytes_moved=order**2 * L.element_size(),  # one triangle, read and written
        asked=asked,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "order"), [(1024, 32), (1024, 16), (4096, 8), (4096, 4), (512, 64)])
@pytest.mark.benchmark(group="batched cholesky_update_ against torch.linalg.cholesky")
def bench_batched(benchmark, count: int, order: int, dtype: torch.dtype) -> None:
    L, V, updated = problem(order, 1, dtype, (count,))
    L = L.contiguous()
    asked = 10.0 if (count, order) == (1024, 32) else None
    if asked and dtype == torch.float64:
        asked /= 2
    compare(
        benchmark,
        f"{count} x (D={order}, k=1) {str(dtype)[6:]}",
        lambda: cfl_ops.cholesky_update_(L, V, 1e-3),
        {"cholesky": lambda: torch.linalg.cholesky(updated)},
        flops=2 * order**2 * count,
        bytes_moved=order**2 * L.element_size() * count,
        asked=asked,
    )


@pytest.mark.parametrize("rank", [128, 256, 384, 512])
@pytest.mark.benchmark(group="break-even: cholesky_update against forming and factoring (D = 256)")
def bench_break_even(benchmark, rank: int) -> None:
    L, V, _ = problem(256, rank, torch.float32)
    compare(
        benchmark,
        f"k={rank}",
        lambda: cfl_ops.cholesky_update(L, V),
        {"form and factor": lambda: torch.linalg.cholesky(torch.addmm(L @ L.mT, V, V.mT))},
        flops=2 * rank * 256**2,
    )


@pytest.mark.parametrize("targets", [1, 10])
@pytest.mark.parametrize("width", [8, 32, 96, 200, 512])
@pytest.mark.benchmark(
    group="RecursiveRidge.update of one row against NumPy's recursion and solving anew (float64)"
)
def bench_recursive(benchmark, width: int, targets: int) -> None:
    x, y = torch.randn(width, dtype=torch.float64), torch.randn(targets, dtype=torch.float64)
    model = cfl_ops.RecursiveRidge(width, targets)
    gram, cross = torch.eye(width, dtype=torch.float64), torch.zeros(width, targets, dtype=torch.float64)
    row, target = x.numpy(), y.numpy()
    covariance, weight = np.eye(width), np.zeros((width, targets))

    def recursion() -> None:
        """Without a check, and in covariance form, which loses positive definiteness in the long run."""
        nonlocal covariance, weight
        side = covariance @ row
        gain = side / (1 + row @ side)
        weight += np.outer(gain, target - row @ weight)
        covariance = covariance - np.outer(gain, side)

    def anew() -> torch.Tensor:
        gram.addmm_(x[:, None], x[None], alpha=1e-3)
        cross.addmm_(x[:, None], y[None], alpha=1e-3)
        return torch.cholesky_solve(cross, torch.linalg.cholesky(gram))

    compare(benchmark, f"D={width} K={targets}", lambda: model.update(x, y),
            {"NumPy": recursion, "cholesky + solve": anew}, flops=4 * width**2)  # fmt: skip


def percdamp_loop(hessian: torch.Tensor) -> torch.Tensor:
    """What GPTQ calibrators do: dead columns to 1, then damp by 1 % of the mean diagonal, more where it fails."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    damp, mean = 0.01, float(diagonal.mean())
    while True:
        diagonal += damp * mean
        factor, info = torch.linalg.cholesky_ex(hessian)
        if int(info) == 0:
            return torch.cholesky_inverse(factor)
        damp *= 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", [8, 32, 128, 512, 2048])
@pytest.mark.benchmark(group="safe_cholesky of a definite matrix against torch.linalg.cholesky")
def bench_safe(benchmark, order: int, dtype: torch.dtype) -> None:
    a = problem(order, 1, dtype)[2]
    compare(
        benchmark,
        f"D={order} {str(dtype)[6:]}",
        lambda: cfl_ops.safe_cholesky(a),
        {"cholesky": lambda: torch.linalg.cholesky(a)},
        flops=order**3 / 3,
        bytes_moved=2 * a.nbytes,
        asked=1.0,
    )


@pytest.mark.parametrize("kind", ["definite", "rank deficient", "dead columns"])
@pytest.mark.benchmark(group="spd_inverse of a GPTQ Hessian against the percdamp loop (D = 768)")
def bench_gptq(benchmark, kind: str) -> None:
    rows = 512 if kind == "rank deficient" else 4096
    x = torch.randn(rows, 768) * torch.logspace(-2, 2, 768)
    if kind == "dead columns":
        x[:, ::50] = 0
    hessian = 2 * x.mT @ x
    wide = hessian.double()
    live = wide.diagonal() > 0
    unit = wide.diagonal()[live].sqrt()

    def error(inverse: torch.Tensor) -> float:
        """|H^-1 H - I| over the live columns scaled to unit diagonal: how far off the inverse is used."""
        scaled = inverse.double()[live][:, live] * unit * unit.unsqueeze(-1)
        product = scaled @ (wide[live][:, live] / unit / unit.unsqueeze(-1))
        return float((product - torch.eye(len(unit), dtype=torch.float64)).norm()) / len(unit) ** 0.5

    note = (
        f"residual ours {error(cfl_ops.spd_inverse(hessian)):.1e}, loop {error(percdamp_loop(hessian)):.1e}"
    )
    compare(benchmark, kind, lambda: cfl_ops.spd_inverse(hessian), {"percdamp loop": lambda: percdamp_loop(hessian)},
            flops=768**3, note=note)  # fmt: skip
