"""Choose the demo's learning rates and penalties, with the same effort for each head.

``python -m cfl_ops.demo.tune --data digits --optimizer sgd --write`` finds one part of defaults.json again.

For each head and batch size: a grid of six learning rates times five penalties is trained with one seed on
80 % of the training part and judged on the other 20 %; the best four are trained with four more seeds; the
lowest mean wins. Where the winner lies at the edge of the grid, the grid grows by a row there and the
choice is made again, at most twice. The judge is the demo's own metric, then the head's own loss where that
ties. The test part takes no part in it.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F

from .. import proximal_step_ex
from . import data as datasets
from .defaults import BATCH_SIZES, EPOCHS, TABLE
from .training import HEADS, Learner, Setting, batches, dense_targets

__all__ = ["Axis", "choose", "train_together", "tune"]

# All values that a grid could grow to, and the part of them where it starts.
LEARNING_RATES = tuple(float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3))
FIRST_RATES = {"sgd": (1e-3, 0.3), "adam": (3e-5, 1e-2)}
POWERS = tuple(10.0**power for power in range(-6, 7))
PENALTIES = {
    "proximal": POWERS,
    "ridge": POWERS,
    "squared": (0.0, *POWERS[1:]),
    "cross-entropy": (0.0, *POWERS[1:]),
}
FIRST_PENALTIES = {
    "proximal": (0.1, 1000.0),
    "ridge": (1e-3, 10.0),
    "squared": (0.0, 1e-2),
    "cross-entropy": (0.0, 1e-2),
}
GROWTHS = 2
FINALISTS = 4
# Not the demo's seeds.
SEEDS = (1000, 1001, 1002, 1003, 1004)

Candidate = tuple[float, float]


class Axis:
    """A stretch of a ladder of values, which can grow by one at either end."""

    def __init__(self, ladder: Sequence[float], first: tuple[float, float]) -> None:
        self.ladder = ladder
        self.low, self.high = ladder.index(first[0]), ladder.index(first[1])

    @property
    def values(self) -> Sequence[float]:
        """The present stretch."""
        return self.ladder[self.low : self.high + 1]

    def grow(self, value: float) -> bool:
        """Grow where ``value`` is at an end that can grow; returns whether it did."""
        place = self.ladder.index(value)
        if place == self.low > 0:
            self.low -= 1
        elif place == self.high < len(self.ladder) - 1:
            self.high += 1
        else:
            return False
        return True


def train_together(
    data: datasets.Dataset,
    optimizer: str,
    head: str,
    batch_size: int,
    steps: int,
    candidates: Sequence[Candidate],
    seed: int,
) -> list[tuple[float, float]]:
    """Train a network for each candidate, all as one: the same arithmetic as training.Learner, batched.

    Args:
        data: whose test part is a validation set.
        optimizer: ``"sgd"`` or ``"adam"``.
        head: a name in HEADS.
        batch_size: rows of a batch.
        steps: steps to take.
        candidates: pairs of a learning rate and a penalty.
        seed: of the initial network and the order of the data.

    Returns:
        For each candidate the metric and the head's own loss; infinities where it diverged.

    """
    count = len(candidates)
    learner = Learner(Setting(head, batch_size, seed, steps, lr=1.0, penalty=0.0, optimizer=optimizer), data)
    rates, penalties = torch.tensor(candidates).unbind(1)
    parameters = {
        name: value.detach().expand(count, *value.shape).clone().requires_grad_()
        for name, value in learner.backbone.named_parameters()
    }
    weight, bias = (
        value.detach().expand(count, *value.shape).clone()
        for value in (learner.head.weight, learner.head.bias)
    )
    closed_form = HEADS[head].closed_form
    trained = list(parameters.values())
    if not closed_form:
        trained += [weight.requires_grad_(), bias.requires_grad_()]
    rows = [rates.reshape(-1, *[1] * (each.ndim - 1)) for each in trained]
    # A step is linear in the learning rate: take it at rate 1, then go back by what was too much.
    steppers = {
        "sgd": lambda: torch.optim.SGD(trained, lr=1.0, momentum=0.9, nesterov=True),
        "adam": lambda: torch.optim.Adam(trained, lr=1.0),
    }
    stepper = steppers[optimizer]()

    def backbone(x: Tensor) -> Tensor:
        def one(values: dict[str, Tensor]) -> Tensor:
            features: Tensor = torch.func.functional_call(learner.backbone, values, x)
            return features

        features: Tensor = torch.vmap(one)(parameters)
        return features

    def losses(output: Tensor, y: Tensor) -> Tensor:
        """The loss of each candidate."""
        if head == "cross-entropy":
            everyone = y.repeat(count)
            return (
                F.cross_entropy(output.flatten(0, 1), everyone, reduction="none").reshape(count, -1).mean(1)
            )
        return (output - dense_targets(data, y)).square().sum(-1).mean(-1)

    failed = torch.zeros(count, dtype=torch.bool)
    for x, y, _ in itertools.islice(batches(data, batch_size, seed), steps):
        features = backbone(x)
        if closed_form:
            with torch.no_grad():
                lam, ridge = (penalties, 0.0) if head == "proximal" else (0.0, penalties)
                target = y.expand(count, *y.shape)
                step, info = proximal_step_ex(features.detach(), target, weight, bias, lam=lam, ridge=ridge)
                weight, bias = step.weight, step.bias if step.bias is not None else bias
                failed |= info != 0
            torch.autograd.backward(features, step.grad_features)
        else:
            output = features @ weight.mT + bias.unsqueeze(1)
            squares = weight.square().sum((1, 2)) + bias.square().sum(1)
            torch.autograd.backward((losses(output, y) + penalties * squares).sum())
        before = [each.detach().clone() for each in trained]
        stepper.step()
        stepper.zero_grad()
        with torch.no_grad():
            for each, old, rate in zip(trained, before, rows, strict=True):
                torch.lerp(old, each, rate, out=each)
    with torch.no_grad():
        output = backbone(data.test_x) @ weight.mT + bias.unsqueeze(1)
        metrics = [learner.metric(each) for each in output]
        outcome = zip(metrics, losses(output, data.test_y).tolist(), failed.tolist(), strict=True)
    return [
        (math.inf, math.inf) if lost or math.isnan(metric) else (metric, loss)
        for metric, loss, lost in outcome
    ]


def choose(data: datasets.Dataset, optimizer: str, head: str, batch_size: int, steps: int) -> dict[str, Any]:
    """The best learning rate and penalty of one head, for one batch size.

    Args:
        data: whose test part is a validation set.
        optimizer: ``"sgd"`` or ``"adam"``.
        head: a name in HEADS.
        batch_size: rows of a batch.
        steps: steps of a run.

    Returns:
        ``lr``, ``penalty``, the ``validation`` metric of the winner (mean over the seeds), and how many
        ``runs`` it took.

    """
    rates = Axis(LEARNING_RATES, FIRST_RATES[optimizer])
    penalties = Axis(PENALTIES[head], FIRST_PENALTIES[head])
    scores: dict[tuple[Candidate, int], tuple[float, float]] = {}

    def best(candidates: Sequence[Candidate], seeds: Sequence[int]) -> list[Candidate]:
        """From the lowest mean over these seeds to the highest; a run is made once."""
        for seed in seeds:
            new = [candidate for candidate in candidates if (candidate, seed) not in scores]
            if new:
                found = train_together(data, optimizer, head, batch_size, steps, new, seed)
                scores.update(zip([(candidate, seed) for candidate in new], found, strict=True))

        def mean(candidate: Candidate) -> tuple[float, float]:
            metrics, losses = zip(*(scores[candidate, seed] for seed in seeds), strict=True)
            return fmean(metrics), fmean(losses)

        return sorted(candidates, key=mean)

    for growth in range(GROWTHS + 1):
        grid = [(lr, penalty) for lr in rates.values for penalty in penalties.values]
        winner = best(best(grid, SEEDS[:1])[:FINALISTS], SEEDS)[0]
        grown = [rates.grow(winner[0]), penalties.grow(winner[1])] if growth < GROWTHS else []
        if not any(grown):
            break
    validation = fmean(scores[winner, seed][0] for seed in SEEDS)
    return {"lr": winner[0], "penalty": winner[1], "validation": round(validation, 4), "runs": len(scores)}


def tune(
    data: Annotated[str, typer.Option(help="Data set: digits, mnist5k or diabetes.")] = "digits",
    optimizer: Annotated[str, typer.Option(help="sgd or adam.")] = "sgd",
    heads: Annotated[str, typer.Option(help="Which heads.")] = ",".join(HEADS),
    batch_sizes: Annotated[str, typer.Option(help="Which batch sizes.")] = ",".join(map(str, BATCH_SIZES)),
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    write: Annotated[bool, typer.Option("--write", help="Put the outcome into defaults.json.")] = False,
) -> None:
    """Choose the demo's default learning rates and penalties on a validation split."""
    torch.set_num_threads(threads)
    split = datasets.validation_split(datasets.load(data))
    for batch_size in map(int, batch_sizes.split(",")):
        steps = EPOCHS[data] * (len(split.train_x) // batch_size)
        for head in heads.split(","):
            if head == "cross-entropy" and not split.classes:
                continue
            found = choose(split, optimizer, head, batch_size, steps)
            print(f"{data} {optimizer} {head} batch size {batch_size}: {json.dumps(found)}", flush=True)
            if write:
                table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
                sizes = table.setdefault(data, {}).setdefault(optimizer, {}).setdefault(head, {})
                sizes[str(batch_size)] = found
                TABLE.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(tune)
