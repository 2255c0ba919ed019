"""Training with a live display, and Ctrl-C as a wish to stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from .data import Dataset
from .heads import HEADS
from .split import Split, measure
from .summary import number, summarize
from .team import ALONE, Team
from .training import Run, Setting, train_side_by_side, warm_up

__all__ = ["Outcome", "stop_on_interrupt", "train"]


@dataclass
class Outcome:
    """What came of the training."""

    runs: list[Run] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    """Where a step's time goes; of the first seed, unless the training was interrupted."""
    interrupted: bool = False


@contextmanager
def stop_on_interrupt(tell: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a wish to stop, which the function tells; a second one is Python's own.

    ``tell`` is called at the first one.
    """
    asked = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        tell()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)


def train(
    groups: Sequence[Sequence[Setting]],
    data: Dataset,
    console: Console,
    stop: Callable[[], bool],
    team: Team = ALONE,
) -> Outcome:
    """Train group after group, then see where the time of a step goes.

    The display is drawn between turns, never while a step is timed.

    Args:
        groups: settings that share batch size and seed, which train side by side.
        data: on the device to train on.
        console: where the display goes.
        stop: whether to stop; must tell all processes of a team the same.
        team: the processes that train together.

    """
    total = sum(setting.steps for group in groups for setting in group)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
        auto_refresh=False,
    )
    task = bar.add_task("starting", total=total)
    runs: list[Run] = []
    drawn = time.monotonic()
    with Live(Group(_table(runs, groups, data), bar), console=console, auto_refresh=False) as live:

        def progress(steps: int) -> None:
            nonlocal drawn
            bar.advance(task, steps)
            if time.monotonic() - drawn > 0.25:
                live.refresh()
                drawn = time.monotonic()

        warm: set[int] = set()
        for group in groups:
            if stop():
                break
            first = group[0]
            bar.update(task, description=f"batch size {first.batch_size}, seed {first.seed}")
            if first.batch_size not in warm:
                warm_up(group, data, team=team)
                warm.add(first.batch_size)
            if not console.is_terminal:
                console.print(f"batch size {first.batch_size}, seed {first.seed}")
            runs += train_side_by_side(group, data, stop=stop, progress=progress, team=team)
            live.update(Group(_table(runs, groups, data), bar), refresh=True)
        splits: list[Split] = []
        for group in groups:
            if not stop() and group[0].seed == groups[0][0].seed:
                bar.update(task, description="timing the parts of a step")
                live.refresh()
                splits += measure(group, data, team=team)
        interrupted = stop()
        bar.update(task, description="interrupted" if interrupted else "done")
        live.refresh()
    if not console.is_terminal:
        console.print()  # rich ends the line on a terminal only
    return Outcome(runs, splits, interrupted)


def _table(runs: Sequence[Run], groups: Sequence[Sequence[Setting]], data: Dataset) -> Table:
    """The metric and the speed of each head and batch size so far."""
    summary = summarize(runs, data)
    table = Table(title=f"{data.title}: {data.metric} (mean so far), and steps per second", expand=True)
    sizes = sorted({group[0].batch_size for group in groups})
    table.add_column("head")
    for size in sizes:
        table.add_column(f"batch {size}", justify="right")
    for setting in groups[0]:
        row = []
        for size in sizes:
            cell = summary.cells.get((setting.head, size))
            if cell is None:
                row.append("...")
                continue
            metric = number(cell.online.mean, data) if cell.online else "diverged"
            row.append(f"{metric}{'' if cell.complete else ' (stopped)'}  {cell.steps_per_second:,.0f}/s")
        table.add_row(HEADS[setting.head].label, *row)
    return table
