"""Choose the demo's learning rates and penalties, with the same effort for each head.

``python -m cfl_ops.demo.tune --data digits --optimizer sgd --write`` finds one part of defaults.json again.

For each head and batch size: a grid of six learning rates times five penalties is trained with one seed on
80 % of the training part and judged on the other 20 %; the best four are trained with four more seeds; the
lowest mean wins, if none of ten further seeds diverges, else the next. Where the winner lies at the edge of
the grid, the grid grows by a row there and the choice is made again, at most twice. The judge is the demo's
own metric, then the head's own loss where that ties. The test part takes no part in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Annotated, Any

import torch
import typer

from . import data as datasets
from .defaults import BATCH_SIZES, EPOCHS, TABLE
from .heads import DEFAULT, HEADS
from .training import Run, Setting, train_side_by_side

__all__ = ["Axis", "choose", "tune"]

# All values that a grid could grow to, and the part of them where it starts.
LEARNING_RATES = tuple(float(f"{digit}e{power}") for power in range(-6, 2) for digit in (1, 3))
FIRST_RATES = {"sgd": (1e-3, 0.3), "adam": (3e-5, 1e-2)}
POWERS = tuple(10.0**power for power in range(-6, 7))
PENALTIES = {name: POWERS if head.closed_form else (0.0, *POWERS[1:]) for name, head in HEADS.items()}
# A ridge forgets, so that its penalty need not hold it back.
FIRST_PENALTIES = {
    name: ((1e-3, 10.0) if "ridge" in name else (0.1, 1000.0)) if head.closed_form else (0.0, 1e-2)
    for name, head in HEADS.items()
}
GROWTHS = 2
FINALISTS = 4
# Not the demo's seeds.
SEEDS = (1000, 1001, 1002, 1003, 1004)
FURTHER_SEEDS = tuple(range(1005, 1015))

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


def _judge(runs: Sequence[Run]) -> tuple[float, float]:
    if any(math.isnan(run.online) for run in runs):
        return math.inf, math.inf
    return fmean(run.online for run in runs), fmean(run.loss for run in runs)


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
    runs: dict[Candidate, list[Run]] = {}

    def judge(candidate: Candidate, seeds: Sequence[int]) -> tuple[float, float]:
        """The mean over these seeds; a run is made once."""
        mine = runs.setdefault(candidate, [])
        for seed in seeds[len(mine) :]:
            lr, penalty = candidate
            setting = Setting(head, batch_size, seed, steps, lr, penalty, optimizer)
            mine += train_side_by_side([setting], data, evaluations=6, refit=False)
        return _judge(mine[: len(seeds)])

    def stable(candidate: Candidate) -> bool:
        """Whether no seed diverges, the further ones included."""
        return judge(candidate, SEEDS + FURTHER_SEEDS)[0] < math.inf

    for growth in range(GROWTHS + 1):
        grid = [(lr, penalty) for lr in rates.values for penalty in penalties.values]
        finalists = sorted(grid, key=lambda candidate: judge(candidate, SEEDS[:1]))[:FINALISTS]
        ranked = sorted(finalists, key=lambda candidate: judge(candidate, SEEDS))
        winner = next((each for each in ranked if stable(each)), ranked[0])
        grown = [rates.grow(winner[0]), penalties.grow(winner[1])] if growth < GROWTHS else []
        if not any(grown):
            break
    return {
        "lr": winner[0],
        "penalty": winner[1],
        "validation": round(judge(winner, SEEDS)[0], 4),
        "runs": sum(len(each) for each in runs.values()),
    }


def tune(
    data: Annotated[str, typer.Option(help="Data set: digits, mnist5k or diabetes.")] = "digits",
    optimizer: Annotated[str, typer.Option(help="sgd or adam.")] = "sgd",
    heads: Annotated[str, typer.Option(help="Which heads.")] = ",".join(DEFAULT),
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
            if HEADS[head].classes_only and not split.classes:
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
