"""proximal_step against the head it replaces, and against the D x D solve of the paper."""

from __future__ import annotations

import cfl_ops
import pytest
import torch
from _ratio import compare
from torch.nn import functional as F

CLASSES = 100


class CrossEntropyHead:
    """Forward, loss, backward (into the features, too) and momentum SGD update of a linear head."""

    def __init__(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        self.features, self.labels = features.clone().requires_grad_(), labels
        self.head = torch.nn.Linear(features.shape[1], CLASSES)
        self.optimizer = torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.features.grad = None
        F.cross_entropy(self.head(self.features), self.labels).backward()
        self.optimizer.step()


def problem(rows: int, width: int) -> tuple[torch.Tensor, ...]:
    features = torch.randn(rows, width).relu_()
    return features, torch.randint(CLASSES, (rows,)), torch.zeros(CLASSES, width), torch.zeros(CLASSES)


def flops(rows: int, width: int) -> float:
    """Multiply-adds times two of the smaller side's chain (docs/formulas.md, 1.4), one triangle of the Gram."""
    if rows < width:
        mac = 3 * rows * width * CLASSES + rows**2 * width / 2 + rows**3 / 6 + rows**2 * CLASSES
    else:
        mac = 2 * rows * width * CLASSES + rows * width**2 / 2 + width**3 / 6 + width**2 * CLASSES
    return 2 * mac


def asked(rows: int, width: int) -> float | None:
    """Speedup over the cross-entropy head: 1 / the ratio asked for."""
    if width == 128 and rows > 128:
        return 1.0
    return {32: 2.0, 128: 1 / 0.9}.get(rows)


@pytest.mark.parametrize("rows", [32, 128, 1024, 4096])
@pytest.mark.parametrize("width", [128, 256, 512, 1024, 2048, 4096])
@pytest.mark.benchmark(group="proximal_step_ against a cross-entropy head (K = 100, lambda = 1)")
def bench_head(benchmark, rows: int, width: int) -> None:
    features, labels, weight, bias = problem(rows, width)
    compare(
        benchmark,
        f"B={rows} D={width}",
        lambda: cfl_ops.proximal_step_(features, labels, weight, bias, lam=1.0),
        {"cross-entropy head": CrossEntropyHead(features, labels)},
        flops=flops(rows, width),
        asked=asked(rows, width),
        budget=0.6,
        note="dual" if rows < width else "primal",
    )


def primal_torch(features, labels, weight, bias):
    """The paper's update: the D x D system (here with the bias as a feature of ones), by Cholesky."""
    rows = features.shape[0]
    wide = torch.cat([features, features.new_ones(rows, 1)], 1)
    head = torch.cat([weight, bias.unsqueeze(1)], 1)
    system = wide.mT @ wide
    system.diagonal().add_(rows)
    right = torch.zeros(CLASSES, wide.shape[1]).index_add_(0, labels, wide) + rows * head
    new = torch.cholesky_solve(right.mT, torch.linalg.cholesky(system)).mT
    residual = -(wide @ new.mT)
    residual[torch.arange(rows), labels] += 1
    gradient = (-2 / rows) * (residual @ new[:, :-1])
    return new, residual.square().sum() / rows, gradient


def dual_torch(features, labels, weight, bias):
    """The B x B system in torch ops."""
    rows = features.shape[0]
    residual = -F.linear(features, weight, bias)
    residual[torch.arange(rows), labels] += 1
    system = features @ features.mT + 1
    system.diagonal().add_(rows)
    alpha = torch.cholesky_solve(residual, torch.linalg.cholesky(system))
    new = torch.addmm(weight, alpha.mT, features)
    return new, rows * alpha.square().sum(), (-2 * alpha) @ new, bias + alpha.sum(0)


@pytest.mark.parametrize(
    ("rows", "width"), [(32, 4096), (512, 512), (1024, 512), (1024, 1024), (512, 1024), (4096, 512)]
)
@pytest.mark.benchmark(group="proximal_step_ against direct forms in torch ops")
def bench_direct(benchmark, rows: int, width: int) -> None:
    features, labels, weight, bias = problem(rows, width)
    compare(
        benchmark,
        f"B={rows} D={width}",
        lambda: cfl_ops.proximal_step_(features, labels, weight, bias, lam=1.0),
        {
            "primal in torch": lambda: primal_torch(features, labels, weight, bias),
            "dual in torch": lambda: dual_torch(features, labels, weight, bias),
        },
        flops=flops(rows, width),
        asked=1.5 if min(rows, width) >= 512 else None,
    )


@pytest.mark.benchmark(group="proximal_step_ against the paper's D x D solve")
def bench_paper_solve(benchmark) -> None:
    features, labels, weight, bias = problem(32, 4096)
    compare(
        benchmark,
        "B=32 D=4096",
        lambda: cfl_ops.proximal_step_(features, labels, weight, bias, lam=1.0),
        {"D x D Cholesky": lambda: primal_torch(features, labels, weight, bias)},
        flops=flops(32, 4096),
        asked=100.0,
    )
