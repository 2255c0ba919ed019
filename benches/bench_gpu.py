"""On a GPU: each op against the vendor's library, ratios in one run."""

from __future__ import annotations

import cfl_ops
import pytest
import torch
from _ratio import compare
from torch.nn import functional as F

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("rows", "width"), [(65536, 1024), (65536, 2048), (65536, 512), (256, 4096)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.benchmark(group="gram on a GPU against torch.mm(x.mT, x)")
def bench_gram(benchmark, rows: int, width: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, width, device="cuda").to(dtype)
    compare(
        benchmark,
        f"B={rows} D={width} {str(dtype)[6:]}",
        lambda: cfl_ops.gram(x),
        {"torch.mm": lambda: torch.mm(x.mT, x)},
        flops=rows * width * (width + 1),
        bytes_moved=x.element_size() * rows * width + 4 * width * width,
        asked=1.5 if width >= 1024 else 1.0,
        synchronize=True,
    )


@pytest.mark.parametrize(("rows", "width"), [(32, 512), (128, 2048), (128, 4096), (1024, 512)])
@pytest.mark.benchmark(group="proximal_step_ on a GPU against a cross-entropy head (K = 100)")
def bench_proximal(benchmark, rows: int, width: int) -> None:
    features = torch.randn(rows, width, device="cuda").relu_()
    labels = torch.randint(100, (rows,), device="cuda")
    weight, bias = torch.zeros(100, width, device="cuda"), torch.zeros(100, device="cuda")
    leaf = features.clone().requires_grad_()
    head = torch.nn.Linear(width, 100, device="cuda")
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)

    def cross_entropy() -> None:
        optimizer.zero_grad()
        leaf.grad = None
        F.cross_entropy(head(leaf), labels).backward()
        optimizer.step()

    compare(
        benchmark,
        f"B={rows} D={width}",
        lambda: cfl_ops.proximal_step_ex_(features, labels, weight, bias, lam=1.0),
        {"cross-entropy head": cross_entropy},
        asked=1.0,
        synchronize=True,
    )
