"""T1: training steps per second with a closed-form head over those with a cross-entropy head (rSPS).

A ResNet-18 on 32 x 32 images (synthetic, K = 100) trains for real in the cells given; the two heads take turns
step by step, and the ratio of their median step times is printed beside the paper's (A100, CIFAR-100) and with
the spread of the ratio of neighbouring steps. Cells too slow for this machine are modelled with --model:
(backbone + cross-entropy head) / (backbone + closed-form head), both heads timed at the cell's size and the
backbone (forward, backward, update) at B = 32 and that D, times B / 32. They are marked "model".

Run: python benches/paper/t1.py --cells 32x512,32x4096,128x4096
     python benches/paper/t1.py --cells '' --model all
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from cfl_ops.learn import ClosedFormLinear
from resnet import resnet18
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

CLASSES = 100
PAPER = {  # rSPS of ResNet-18 on an A100, by B and D
    32: dict(zip((128, 256, 512, 1024, 2048, 4096), (1.11, 1.11, 0.98, 0.86, 0.65, 0.37), strict=True)),
    128: dict(zip((128, 256, 512, 1024, 2048, 4096), (0.98, 0.97, 0.95, 0.88, 0.72, 0.52), strict=True)),
    1024: dict(zip((128, 256, 512, 1024, 2048, 4096), (0.92, 0.93, 0.92, 0.92, 0.89, 0.84), strict=True)),
    4096: dict(zip((128, 256, 512, 1024, 2048, 4096), (0.89, 0.88, 0.87, 0.90, 0.89, 0.88), strict=True)),
}


def steps(rows: int, features: int, width: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step with the closed-form head, and one with cross-entropy, of twin networks."""
    x, y = torch.randn(rows, 3, 32, 32), torch.randint(CLASSES, (rows,))

    def twin() -> tuple[nn.Sequential, torch.optim.Optimizer]:
        torch.manual_seed(0)
        backbone = resnet18(width, features)
        return backbone, torch.optim.SGD(backbone.parameters(), lr=0.01, momentum=0.9, nesterov=True)

    backbone, optimizer = twin()
    closed = ClosedFormLinear(features, CLASSES, lam=1.0)

    def closed_form() -> None:
        closed.step(backbone(x), y)
        optimizer.step()
        optimizer.zero_grad()

    rival, rival_optimizer = twin()
    head = nn.Linear(features, CLASSES)
    rival_optimizer.add_param_group({"params": list(head.parameters())})

    def cross_entropy() -> None:
        F.cross_entropy(head(rival(x)), y).backward()
        rival_optimizer.step()
        rival_optimizer.zero_grad()

    return closed_form, cross_entropy


def head_seconds(rows: int, features: int) -> tuple[float, float]:
    """Seconds of the closed-form head and of the cross-entropy head alone, from features to their gradient."""
    x, y = torch.randn(rows, features).relu_(), torch.randint(CLASSES, (rows,))
    closed, head = ClosedFormLinear(features, CLASSES, lam=1.0), nn.Linear(features, CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    leaf = x.clone().requires_grad_()

    def closed_form() -> None:
        closed.step(leaf, y)
        leaf.grad = None

    def cross_entropy() -> None:
        F.cross_entropy(head(leaf), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        leaf.grad = None

    closed_times, cross_times = measure((closed_form, cross_entropy), 15)
    return min(closed_times), min(cross_times)


def backbone_seconds(features: int, width: int) -> float:
    """Seconds of the backbone's forward, backward and update at B = 32."""
    backbone = resnet18(width, features)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.01, momentum=0.9, nesterov=True)
    x, gradient = torch.randn(32, 3, 32, 32), torch.randn(32, features)

    def step() -> None:
        backbone(x).backward(gradient)
        optimizer.step()
        optimizer.zero_grad()

    return min(measure((step,), 4)[0])


def measure(contenders: tuple[Callable[[], None], ...], repeats: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in contenders]
    for function in contenders:
        function()
    for repeat in range(repeats):
        order = range(len(contenders)) if repeat % 2 == 0 else reversed(range(len(contenders)))
        for i in order:
            start = time.perf_counter()
            contenders[i]()
            times[i].append(time.perf_counter() - start)
    return times


def main(
    cells: Annotated[
        str, typer.Option(help="BxD, separated by commas: trained for real")
    ] = "32x512,32x4096,128x4096",
    width: Annotated[int, typer.Option(help="width of the first stage; 64 is ResNet-18")] = 64,
    repeats: Annotated[int, typer.Option(help="steps of each head")] = 8,
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
    model: Annotated[str, typer.Option(help="BxD, separated by commas, or all: modelled")] = "",
) -> None:
    """Print rSPS for each cell beside the paper's."""
    torch.set_num_threads(threads)
    table = Table(title=f"rSPS of a width-{width} ResNet-18, {threads} thread(s), K = {CLASSES}")
    for name in (
        "B",
        "D",
        "cross-entropy ms",
        "closed form ms",
        "rSPS",
        "spread (quartiles)",
        "paper (A100)",
    ):
        table.add_column(name, justify="right")
    for cell in filter(None, cells.split(",")):
        rows, features = (int(part) for part in cell.split("x"))
        closed, cross = measure(steps(rows, features, width), repeats)
        ratios = [b / a for a, b in zip(closed, cross, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        table.add_row(
            str(rows), str(features), f"{statistics.median(cross) * 1e3:.1f}",
            f"{statistics.median(closed) * 1e3:.1f}",
            f"{statistics.median(cross) / statistics.median(closed):.3f}", f"{low:.3f} - {high:.3f}",
            f"{PAPER.get(rows, {}).get(features, float('nan')):.2f}",
        )  # fmt: skip
    everything = [f"{rows}x{features}" for rows, row in PAPER.items() for features in row]
    backbones: dict[int, float] = {}
    for cell in everything if model == "all" else filter(None, model.split(",")):
        rows, features = (int(part) for part in cell.split("x"))
        if features not in backbones:
            backbones[features] = backbone_seconds(features, width)
        backbone = backbones[features] * rows / 32
        closed_head, cross_head = head_seconds(rows, features)
        table.add_row(
            str(rows), str(features), f"{(backbone + cross_head) * 1e3:.1f}",
            f"{(backbone + closed_head) * 1e3:.1f}", f"{(backbone + cross_head) / (backbone + closed_head):.3f}",
            "model", f"{PAPER.get(rows, {}).get(features, float('nan')):.2f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
