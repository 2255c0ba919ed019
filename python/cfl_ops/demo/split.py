"""Where the time of a training step goes: backbone, head and the rest, in a pass of its own."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import nn

from ..errors import LinAlgError
from .data import Dataset
from .team import ALONE, Batch, Team
from .training import LOSSES, TURN, Learner, Setting, batches, synchronize

__all__ = ["Split", "measure"]

WARM, STEPS = 8, 40


@dataclass(frozen=True)
class Split:
    """Seconds of a step of one head at one batch size, the medians over the pass."""

    head: str
    batch_size: int
    backbone: float
    """Forward, backward and optimiser."""
    solve: float
    """The head: its solve or its loss, and the gradient for the features."""
    overhead: float
    """The rest of the step."""

    @property
    def total(self) -> float:
        """The whole step."""
        return self.backbone + self.solve + self.overhead


class _Clock:
    """Adds up what passes between laps, by name."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.sums = {"backbone": 0.0, "solve": 0.0, "overhead": 0.0}
        self.last = self._now()

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def lap(self, name: str) -> None:
        now = self._now()
        self.sums[name] += now - self.last
        self.last = self._now()


def measure(settings: Sequence[Setting], data: Dataset, *, team: Team = ALONE) -> list[Split]:
    """Time the parts of a step of several heads, with fresh learners that take turns.

    The step is cut between its parts, so that they can be told apart: a head that descends gets its features
    without their graph, and what Algorithm 2 cached does at the same time it does here one after the other.
    Nothing is compiled. A head that diverges within these few steps is left out.

    Args:
        settings: one for each head; they share batch size and seed.
        data: on the device to train on.
        team: the processes that train together.

    Returns:
        A split for each head that went through.

    """
    learners = [Learner(replace(setting, compile=None), data, team) for setting in settings]
    times: dict[int, list[dict[str, float]]] = {place: [] for place in range(len(learners))}
    source = batches(data, settings[0].batch_size, settings[0].seed)
    for _ in range((WARM + STEPS) // TURN):
        turn = list(itertools.islice(source, TURN))
        for place in list(times):
            try:
                times[place] += [_cut_step(learners[place], team.share(batch)) for batch in turn]
            except (ValueError, LinAlgError, RuntimeError) as error:
                if not learners[place].diverged(error, turn[0][0]):
                    raise
                del times[place]
    return [
        Split(
            settings[place].head,
            settings[place].batch_size,
            **{name: median(each[name] for each in laps[WARM:]) for name in laps[0]},
        )
        for place, laps in times.items()
    ]


def _cut_step(learner: Learner, batch: Batch) -> dict[str, float]:
    """One training step, in seconds a part."""
    x, y, dense = batch
    head, order = learner.head, learner.kind.order
    clock = _Clock(x.device)
    features = learner.backbone(x)
    clock.lap("backbone")
    if not isinstance(head, nn.Linear) and order == "head-first":
        _, gradient = head.update(features, y)
    else:
        leaf = features.detach().requires_grad_()
        if not isinstance(head, nn.Linear):
            loss = head.loss(leaf, y, solve=False)
        else:
            loss = LOSSES[learner.setting.head](nn.Identity(), learner.output, leaf, y, dense)
            loss = loss * learner.share_of_loss(len(x))
        torch.autograd.backward(loss)
        assert leaf.grad is not None
        gradient = leaf.grad
    clock.lap("solve")
    features.backward(gradient)
    learner.optimizer.step()
    clock.lap("backbone")
    if not isinstance(head, nn.Linear) and order != "head-first":
        if order == "backbone-first":
            with torch.no_grad():
                features = learner.backbone(x)
            clock.lap("backbone")
        head.update(features.detach(), y)
        clock.lap("solve")
    learner.optimizer.zero_grad()
    clock.lap("overhead")
    return clock.sums
