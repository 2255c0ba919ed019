"""Training steps with a closed-form head against steps with the cross-entropy head that it replaces."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from _ratio import compare
from cfl_ops.learn import ClosedFormLinear, train_step
from torch import nn
from torch.nn import functional as F

INPUTS, WIDTH, CLASSES = 64, 256, 10  # those of the demo on digits


def network(width: int = WIDTH, inputs: int = INPUTS) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    torch.manual_seed(0)
    sizes = (inputs, width, width, width)
    layers = [layer for d, k in itertools.pairwise(sizes) for layer in (nn.Linear(d, k), nn.GELU())]
    backbone = nn.Sequential(*layers)
    return backbone, torch.optim.SGD(backbone.parameters(), lr=0.003, momentum=0.9, nesterov=True)


def closed_form(x: torch.Tensor, y: torch.Tensor, lam: float, call: str) -> Callable[[], None]:
    (backbone, optimizer), head = network(), ClosedFormLinear(WIDTH, CLASSES, lam=lam)

    def step() -> None:
        if call == "step":
            head.step(backbone(x), y)
        else:
            head.loss(backbone(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def cross_entropy(x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    (backbone, optimizer), head = network(), nn.Linear(WIDTH, CLASSES)
    optimizer.add_param_group({"params": list(head.parameters())})

    def step() -> None:
        F.cross_entropy(head(backbone(x)), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@pytest.mark.parametrize("call", ["step", "loss"])
@pytest.mark.parametrize(("rows", "lam"), [(8, 1.0), (32, 1.0), (128, 0.1)])
@pytest.mark.benchmark(group="a training step of an MLP 64-256-256-256, K = 10, against cross-entropy")
def bench_step(benchmark, rows: int, lam: float, call: str) -> None:
    x, y = torch.randn(rows, INPUTS), torch.randint(CLASSES, (rows,))
    compare(
        benchmark,
        f"B={rows} {call}",
        closed_form(x, y, lam, call),
        {"cross-entropy": cross_entropy(x, y)},
    )


@pytest.mark.parametrize(("rows", "width"), [(300, 512), (1024, 1024)])
@pytest.mark.benchmark(group="Algorithm 2 (cached), the solve beside the backward pass against after it")
def bench_overlap(benchmark, rows: int, width: int) -> None:
    x, y = torch.randn(rows, INPUTS), torch.randint(CLASSES, (rows,))

    def cached(overlap: bool) -> Callable[[], None]:
        (backbone, optimizer), head = network(width), ClosedFormLinear(width, CLASSES, init="lecun")

        def step() -> None:
            train_step(backbone, head, optimizer, x, y, order="backbone-first-cached", overlap=overlap)

        return step

    compare(benchmark, f"B={rows} D={width}", cached(True), {"one after the other": cached(False)})
