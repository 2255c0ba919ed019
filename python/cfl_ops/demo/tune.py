"""Choose the demo's learning rates and penalties, with the same effort for each head.

``python -m cfl_ops.demo.tune --data digits --optimizer sgd`` finds one part of defaults.json again.

For each head and batch size: a grid of six learning rates times five penalties is trained with one seed on
80 % of the training part and judged on the other 20 %; the best four are trained with two more seeds; the
lowest mean wins. The judge is the demo's own metric, then the head's own loss where that ties. The test
part takes no part in it.
"""

from __future__ import annotations

import json
import math
from statistics import fmean
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import Progress

from . import data as datasets
from .defaults import BATCH_SIZES, EPOCHS, TABLE
from .training import HEADS, Run, Setting, train_side_by_side

__all__ = ["LEARNING_RATES", "PENALTIES", "choose", "tune"]

LEARNING_RATES = {"sgd": (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3), "adam": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
PENALTIES = {
    "proximal": (0.1, 1.0, 10.0, 100.0, 1000.0),
    "ridge": (1e-3, 1e-2, 0.1, 1.0, 10.0),
    "squared": (0.0, 1e-5, 1e-4, 1e-3, 1e-2),
    "cross-entropy": (0.0, 1e-5, 1e-4, 1e-3, 1e-2),
}
FINALISTS = 4
# Not the demo's seeds.
SEEDS = (1000, 1001, 1002)

Candidate = tuple[float, float]


def _judge(runs: list[Run]) -> tuple[float, float]:
    if any(math.isnan(run.online) for run in runs):
        return math.inf, math.inf
    return fmean(run.online for run in runs), fmean(run.loss for run in runs)


def choose(
    data: datasets.Dataset,
    optimizer: str,
    head: str,
    batch_size: int,
    steps: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The best learning rate and penalty of one head, for one batch size.

    Args:
        data: whose test part is a validation set.
        optimizer: ``"sgd"`` or ``"adam"``.
        head: a name in HEADS.
        batch_size: rows of a batch.
        steps: steps of a run.
        progress: drawn on while it runs.

    Returns:
        ``lr``, ``penalty``, and the ``validation`` metric of the winner (mean over the seeds).
    """
    task = progress.add_task(f"{head} B={batch_size}", total=0) if progress else None

    def train(candidate: Candidate, seed: int) -> Run:
        lr, penalty = candidate
        run = train_side_by_side([Setting(head, batch_size, seed, steps, lr, penalty, optimizer)], data)[0]
        if progress and task is not None:
            progress.advance(task)
        return run

    grid = [(lr, penalty) for lr in LEARNING_RATES[optimizer] for penalty in PENALTIES[head]]
    if progress and task is not None:
        progress.update(task, total=len(grid) + FINALISTS * (len(SEEDS) - 1))
    runs = {candidate: [train(candidate, SEEDS[0])] for candidate in grid}
    finalists = sorted(grid, key=lambda candidate: _judge(runs[candidate]))[:FINALISTS]
    for candidate in finalists:
        runs[candidate] += [train(candidate, seed) for seed in SEEDS[1:]]
    lr, penalty = min(finalists, key=lambda candidate: _judge(runs[candidate]))
    return {"lr": lr, "penalty": penalty, "validation": round(_judge(runs[lr, penalty])[0], 4)}


def tune(
    data: Annotated[str, typer.Option(help="Data set: digits, mnist5k or diabetes.")] = "digits",
    optimizer: Annotated[str, typer.Option(help="sgd or adam.")] = "sgd",
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    write: Annotated[bool, typer.Option(help="Write the outcome into defaults.json.")] = False,
) -> None:
    """Choose the demo's default learning rates and penalties on a validation split."""
    torch.set_num_threads(threads)
    split = datasets.validation_split(datasets.load(data))
    heads = [name for name in HEADS if split.classes or name != "cross-entropy"]
    outcome: dict[str, dict[str, Any]] = {}
    with Progress(console=Console(stderr=True)) as progress:
        for head in heads:
            outcome[head] = {}
            for batch_size in BATCH_SIZES:
                steps = EPOCHS[data] * (len(split.train_x) // batch_size)
                outcome[head][str(batch_size)] = choose(split, optimizer, head, batch_size, steps, progress)
    print(json.dumps(outcome, indent=2))
    if write:
        table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        table.setdefault(data, {})[optimizer] = outcome
        TABLE.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(tune)
