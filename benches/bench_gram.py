"""gram against torch.mm and numpy (which finds syrk)."""

from __future__ import annotations

import subprocess
import sys

import cfl_ops
import numpy as np
import pytest
import torch
from _ratio import compare, record
from torch.nn import functional as F

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


@pytest.mark.parametrize("peer", ["torch.mm", "numpy"])
@pytest.mark.parametrize(("rows", "width", "asked"), SIZES)
@pytest.mark.benchmark(group="gram float32 against torch.mm(x.mT, x, out=), and numpy (asked 1.0)")
def bench_float32(benchmark, rows: int, width: int, asked: float, peer: str) -> None:
    x = torch.randn(rows, width)
    out = torch.empty(width, width)
    array, product = x.numpy(), out.numpy()
    m = cfl_ops.gram(x)
    peers = {
        "torch.mm": lambda: torch.mm(x.mT, x, out=out),
        "numpy": lambda: np.dot(array.T, array, out=product),
    }
    # Outputs are preallocated on both sides: fresh memory costs page faults, whoever writes it.
    compare(
        benchmark,
        f"B={rows} D={width}",
        lambda: cfl_ops.gram_(m, x, decay=0.0),
        {peer: peers[peer]},
        **work(rows, width, 4),
        asked=asked if peer == "torch.mm" else 1.0,
        budget=0.6,
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


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.benchmark(group="linear_gram (65536, 256 -> 1024) against linear + activation + gram: asked 1.0")
def bench_linear_gram(benchmark, activation: str) -> None:
    x, weight, bias = torch.randn(65536, 256), torch.randn(1024, 256) / 16, torch.randn(1024)
    act = {"relu": F.relu, "gelu": F.gelu}[activation]
    rows, inputs, width = 65536, 256, 1024
    compare(
        benchmark,
        activation,
        lambda: cfl_ops.linear_gram(x, weight, bias, activation),
        {"linear + activation + gram": lambda: cfl_ops.gram(act(F.linear(x, weight, bias)))},
        flops=2 * rows * inputs * width + rows * width * (width + 1),
        asked=1.0,
    )


@pytest.mark.parametrize(("rows", "width"), [(4096, 512), (8192, 1024), (65536, 256)])
@pytest.mark.benchmark(group="gram on two threads against one: asked 1.7")
def bench_two_threads(benchmark, rows: int, width: int) -> None:
    x = torch.randn(rows, width)

    def on(threads: int):
        def call() -> None:
            torch.set_num_threads(threads)
            cfl_ops.gram(x)

        return call

    compare(benchmark, f"B={rows} D={width}", on(2), {"one thread": on(1)}, **work(rows, width, 4), asked=1.7)


STREAM = """
import sys, time, numpy as np, torch, cfl_ops
path, rows, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
def anonymous():  # resident memory without the pages of mapped files
    fields = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(fields["RssAnon"].split()[0]) / 1024
chunk = torch.randn(4096, width)
cfl_ops.gram(chunk)
baseline = anonymous()
accumulator = cfl_ops.GramAccumulator()
peak = [0.0]
class Watched(cfl_ops.GramAccumulator):
    def update(self, *batch):
        super().update(*batch)
        if self.batches % 50 == 1:
            peak[0] = max(peak[0], anonymous())
start = time.perf_counter()
Watched().fit_file(path)
seconds = time.perf_counter() - start
m = cfl_ops.gram(chunk)
start = time.perf_counter()
for _ in range(rows // 4096):
    cfl_ops.gram_(m, chunk)
memory_seconds = time.perf_counter() - start
print(peak[0] - baseline, seconds, memory_seconds)
"""


@pytest.mark.parametrize(("rows", "width"), [(2_000_000, 512)])
@pytest.mark.benchmark(
    group="GramAccumulator from disk against the same chunks in memory: asked 0.9, and 64 MB"
)
def bench_stream(benchmark, rows: int, width: int, tmp_path) -> None:
    path = tmp_path / "features.npy"
    target = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, width))
    block = np.random.default_rng(0).normal(size=(10_000, width)).astype(np.float32)
    for begin in range(0, rows, 10_000):
        target[begin : begin + 10_000] = block
    target.flush()
    del target
    out = subprocess.run(
        [sys.executable, "-c", STREAM, str(path), str(rows), str(width)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    extra, seconds, memory_seconds = map(float, out)
    record(
        benchmark,
        f"{rows} x {width}: {extra:.0f} MB above the baseline",
        {"ours": seconds, "in memory": memory_seconds},
        flops=rows * width * (width + 1),
        asked=0.9,
    )
