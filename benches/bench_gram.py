"""gram against torch.mm and numpy (which finds syrk)."""

from __future__ import annotations

import cfl_ops
import numpy as np
import pytest
import torch
from _ratio import compare

SIZES = [
    (32, 4096, 1.5),
    (512, 512, 1.8),
    (4096, 512, 1.8),
    (1024, 1024, 1.8),
    (8192, 1024, 1.8),
    (2048, 2048, 1.8),
    (65536, 256, 1.5),
    (60000, 785, 1.5),
    (65536, 64, 1.0),
    (128, 1024, 1.0),
    (1000, 100, 1.0),
]


def work(rows: int, width: int, size: int) -> dict[str, float]:
    """One triangle's FLOPs; x read once and the result written once."""
    return {"flops": rows * width * (width + 1), "bytes_moved": size * (rows * width + width * width)}


@pytest.mark.parametrize(("rows", "width", "asked"), SIZES)
@pytest.mark.benchmark(group="gram float32 against torch.mm(x.mT, x, out=) and numpy")
def bench_float32(benchmark, rows: int, width: int, asked: float) -> None:
    x = torch.randn(rows, width)
    out, array = torch.empty(width, width), x.numpy()
    compare(
        benchmark,
        f"B={rows} D={width}",
        lambda: cfl_ops.gram(x),
        {"torch.mm": lambda: torch.mm(x.mT, x, out=out), "numpy": lambda: np.dot(array.T, array)},
        **work(rows, width, 4),
        asked=asked,
    )


@pytest.mark.parametrize(("rows", "width"), [(4096, 512), (8192, 1024), (65536, 256)])
@pytest.mark.benchmark(
    group="gram exact mode (float64 sums of float32) against float32 torch.mm: asked 1 / 1.1"
)
def bench_exact(benchmark, rows: int, width: int) -> None:
    x = torch.randn(rows, width)
    out = torch.empty(width, width)
    compare(
        benchmark,
        f"B={rows} D={width}",
        lambda: cfl_ops.gram(x, acc_dtype=torch.float64),
        {"torch.mm float32": lambda: torch.mm(x.mT, x, out=out)},
        **work(rows, width, 4),
        asked=1 / 1.1,
    )


@pytest.mark.parametrize(("rows", "width"), [(4096, 512), (8192, 1024), (65536, 256)])
@pytest.mark.benchmark(group="gram exact mode against casting to float64")
def bench_exact_cast(benchmark, rows: int, width: int) -> None:
    x = torch.randn(rows, width)

    def cast() -> torch.Tensor:
        wide = x.double()
        return wide.mT @ wide

    compare(
        benchmark,
        f"B={rows} D={width}",
        lambda: cfl_ops.gram(x, acc_dtype=torch.float64),
        {"x.double().mT @ x.double()": cast},
        **work(rows, width, 4),
        asked=2.0,
    )


@pytest.mark.parametrize(("rows", "width"), [(4096, 512), (8192, 1024)])
@pytest.mark.benchmark(group="gram bfloat16 against torch.mm on bfloat16")
def bench_bfloat16(benchmark, rows: int, width: int) -> None:
    x = torch.randn(rows, width).bfloat16()
    out = torch.empty(width, width, dtype=torch.bfloat16)
    compare(
        benchmark,
        f"B={rows} D={width}",
        lambda: cfl_ops.gram(x),
        {"torch.mm": lambda: torch.mm(x.mT, x, out=out)},
        **work(rows, width, 2),
        asked=1.5,
    )


@pytest.mark.benchmark(group="gram, overhead of a small call")
def bench_small(benchmark) -> None:
    x = torch.randn(4, 4)
    compare(benchmark, "B=4 D=4", lambda: cfl_ops.gram(x), {"x.mT @ x": lambda: x.mT @ x})
