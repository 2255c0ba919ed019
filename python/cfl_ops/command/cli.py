"""The command line: arguments and options, and what --help says of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer

from . import COMMANDS, deltas, work
from .failures import Code, guarded, say
from .work import Showing

__all__ = ["app", "run"]

app = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

# Any error of a command line; typer's newer versions have click within, and export the most special one only.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]

CODES = (
    "[bold]Exit codes[/]: 0 all is well; 1 the data are corrupt, or not what they should be; 2 a wrong command line, "
    "or a file that is there already; 3 a delta on the wrong base; 4 cannot read or write (no such file, no "
    "permission, the disk is full); 5 not enough memory, or a fault of cfl-ops; 130 interrupted; 141 nobody reads "
    "stdout any more."
)


def run(arguments: Sequence[str]) -> int:
    """Parse the arguments and run; returns the exit code. Errors are one line on stderr."""
    try:
        code = app(args=list(arguments), prog_name="cfl-ops", standalone_mode=False)
    except _ClickException as error:
        name = arguments[0] if arguments else "--help"
        message = error.format_message() or "arguments are missing"  # type: ignore[attr-defined]
        say(name, f"{message.rstrip('.')} (cfl-ops {name} --help)")
        return Code.USAGE
    except typer.Abort:
        return Code.INTERRUPTED
    return code if isinstance(code, int) else Code.GOOD


class Coded(StrEnum):
    """What compress writes."""

    cflz = "cflz"
    safetensors = "safetensors"


class Plain(StrEnum):
    """What decompress writes."""

    safetensors = "safetensors"
    pt = "pt"


class AnyFormat(StrEnum):
    """What patch writes."""

    cflz = "cflz"
    safetensors = "safetensors"
    pt = "pt"


class Kind(StrEnum):
    """Of an error."""

    rms = "rms"
    max = "max"


class Unit(StrEnum):
    """In which an error is given."""

    deviation = "deviation"
    absolute = "absolute"


class Nonfinite(StrEnum):
    """What lossy compression does with NaN and Inf."""

    refuse = "refuse"
    keep = "keep"


def _file(help: str, metavar: str) -> Any:
    return typer.Argument(help=help, metavar=metavar, show_default=False)


IN = "A .safetensors file (plain or compressed), its index.json or its folder; a .cflz; a .pt, .pth or .bin that " \
     "holds a state dict; or - for stdin."  # fmt: skip
In = Annotated[str, _file(IN, "IN")]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        "-f",
        help="Replace OUT, and the files of --json and --picture, if they are there; write to a terminal.",
    ),
]
ForceBeside = Annotated[
    bool, typer.Option("--force", "-f", help="Replace the files of --json and --picture if they are there.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", min=1, show_default="all cores")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar, no table, no totals.")]
NoTable = Annotated[bool, typer.Option("--no-table", help="No table, but the line of totals.")]
Json = Annotated[
    str | None,
    typer.Option(help="Write the table's data here; - is stdout.", metavar="FILE", show_default=False),
]
Picture = Annotated[
    str | None,
    typer.Option(help="Draw bits a parameter, a bar a tensor.", metavar="FILE.png|svg", show_default=False),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Shard = Annotated[
    str | None,
    typer.Option(
        help="Split .safetensors into files of at most so many bytes, with an index.json.",
        metavar="SIZE",
        show_default=False,
    ),
]


def _command(function: Any) -> Any:
    """A subcommand, with the help of COMMANDS, its docstring and the exit codes."""
    name = function.__name__
    first = COMMANDS[name]
    help = "\n\n".join(
        (first[0].upper() + first[1:] + ".", " ".join((function.__doc__ or "").split()), CODES)
    )
    return app.command(name, help=help)(function)


def _run(name: str, threads: int | None, debug: bool, job: functools.partial[None]) -> int:
    if threads is None:
        return guarded(name, debug, job)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return guarded(name, debug, job)
    finally:
        torch.set_num_threads(before)


@_command
def compress(
    source: In,
    out: Annotated[str, _file("A .cflz or .safetensors file; or - for stdout.", "OUT")],
    lossless: Annotated[
        bool, typer.Option("--lossless", help="Every bit comes back. This is the default.")
    ] = False,
    bits: Annotated[
        int | None,
        typer.Option(
            help="Quantise to N bits before coding.", min=1, max=16, metavar="N", show_default=False
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Quantise, so that the tensors take at most so much: 100MB, 1.5GiB, or 40% of their bytes.",
            metavar="SIZE",
            show_default=False,
        ),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            help="Quantise, so that no tensor's error is above this: 0.01.", metavar="X", show_default=False
        ),
    ] = None,
    error_kind: Annotated[
        Kind, typer.Option(help="Whether --error is the rms error or the largest.")
    ] = Kind.rms,
    error_unit: Annotated[
        Unit, typer.Option(help="Whether --error is a part of the tensor's standard deviation, or absolute.")
    ] = Unit.deviation,
    exact: Annotated[
        list[str] | None,
        typer.Option(
            help="Of lossy compression: keep tensors of such names exactly, as in '*.embed.*'; repeatable. (Norms, "
            "biases, integers and tiny tensors are kept exactly anyway.)",
            metavar="PATTERN",
            show_default=False,
        ),
    ] = None,
    min_numel: Annotated[
        int | None,
        typer.Option(
            help="Of lossy compression: keep smaller tensors exactly.", min=0, metavar="N", show_default="256"
        ),
    ] = None,
    nonfinite: Annotated[
        Nonfinite, typer.Option(help="Of lossy compression: refuse NaN and Inf, or keep them exactly.")
    ] = Nonfinite.refuse,
    to: Annotated[
        Coded | None, typer.Option(help="Format of OUT.", show_default="by its ending; cflz")
    ] = None,
    max_shard: Shard = None,
    force: Force = False,
    threads: Threads = None,
    json: Json = None,
    picture: Picture = None,
    no_table: NoTable = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """IN is not changed. OUT is there whole or not at all, and not replaced without --force."""
    lossy = {"--bits": bits, "--budget": budget, "--error": error}
    given = [name for name, value in lossy.items() if value is not None]
    only_lossy = {
        "--exact": bool(exact),
        "--min-numel": min_numel is not None,
        "--nonfinite": nonfinite is not Nonfinite.refuse,
    }
    if len(given) + lossless > 1:
        return _wrong(
            "compress", f"give one of {', '.join([*['--lossless'] * lossless, *given])}, not several"
        )
    if not given and (idle := [name for name, there in only_lossy.items() if there]):
        return _wrong(
            "compress", f"{idle[0]} is a matter of --bits, --budget or --error; lossless keeps all exactly"
        )
    if error is None and (error_kind is not Kind.rms or error_unit is not Unit.deviation):
        return _wrong("compress", "--error-kind and --error-unit are a matter of --error")
    options: dict[str, Any] = {} if given else {"lossless": True}
    if bits is not None:
        options["bits"] = bits
    if error is not None:
        options |= {"error": error, "error_kind": error_kind.value, "error_unit": error_unit.value}
    if exact:
        options["exact"] = list(exact)
    if nonfinite is not Nonfinite.refuse:
        options["nonfinite"] = nonfinite.value
    job = functools.partial(
        work.compress,
        source,
        out,
        to=None if to is None else to.value,
        force=force,
        options=options,
        budget=budget,
        min_numel=min_numel,
        max_shard=max_shard,
        showing=Showing(quiet, not no_table, json, picture, force),
    )
    return _run("compress", threads, debug, job)


@_command
def decompress(
    source: In,
    out: Annotated[str, _file("A .safetensors file, or .pt, .pth or .bin; or - for stdout.", "OUT")],
    to: Annotated[
        Plain | None, typer.Option(help="Format of OUT.", show_default="by its ending; safetensors")
    ] = None,
    max_shard: Shard = None,
    force: Force = False,
    threads: Threads = None,
    json: Json = None,
    picture: Picture = None,
    no_table: NoTable = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """What was compressed without loss comes back bit for bit: a .safetensors file as the same bytes, with its
    metadata, and tied tensors of a .pt file tied.
    """
    job = functools.partial(
        work.decompress,
        source,
        out,
        to=None if to is None else to.value,
        force=force,
        max_shard=max_shard,
        showing=Showing(quiet, not no_table, json, picture, force),
    )
    return _run("decompress", threads, debug, job)


@_command
def inspect(
    source: Annotated[str, _file(IN, "FILE")],
    force: ForceBeside = False,
    json: Json = None,
    picture: Picture = None,
    no_table: NoTable = False,
    debug: Debug = False,
) -> int:
    """Nothing is decoded. The table and the totals go to stdout."""
    showing = Showing(False, not no_table, json, picture, force)
    return _run("inspect", None, debug, functools.partial(work.inspect, source, showing=showing))


@_command
def verify(
    source: Annotated[str, _file(IN, "FILE")],
    original: Annotated[str | None, _file("What it was made of.", "ORIGINAL")] = None,
    force: ForceBeside = False,
    threads: Threads = None,
    json: Json = None,
    picture: Picture = None,
    no_table: NoTable = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Every checksum is looked at, and each bad tensor named on stderr. With ORIGINAL, what was stored without loss
    must be equal bit for bit; of what was quantised the largest and the rms error are shown.
    """
    showing = Showing(quiet, not no_table, json, picture, force)
    return _run("verify", threads, debug, functools.partial(work.verify, source, original, showing=showing))


@_command
def diff(
    old: Annotated[str, _file("The checkpoint that the other side has: as IN of compress.", "OLD")],
    new: Annotated[str, _file("The checkpoint that it shall get.", "NEW")],
    out: Annotated[str, _file("A .cflz file; or - for stdout.", "OUT")],
    small: Annotated[
        bool, typer.Option("--small", help="Fewer bytes, more time: old exponents tell where changes are.")
    ] = False,
    force: Force = False,
    threads: Threads = None,
    json: Json = None,
    picture: Picture = None,
    no_table: NoTable = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Lossless. The file knows its base: patch refuses any other. Tensors that joined, left or changed their shape are
    in it too.
    """
    job = functools.partial(
        deltas.diff,
        old,
        new,
        out,
        small=small,
        force=force,
        showing=Showing(quiet, not no_table, json, picture, force),
    )
    return _run("diff", threads, debug, job)


@_command
def patch(
    old: Annotated[str, _file("The checkpoint that the delta was made from: as IN of compress.", "OLD")],
    delta: Annotated[str, _file("What diff wrote; or - for stdin.", "DELTA")],
    out: Annotated[
        str,
        _file(
            "A .cflz file (lossless), .safetensors (compressed if OLD is), or .pt; or - for stdout.", "OUT"
        ),
    ],
    to: Annotated[
        AnyFormat | None, typer.Option(help="Format of OUT.", show_default="by its ending; safetensors")
    ] = None,
    force: Force = False,
    threads: Threads = None,
    json: Json = None,
    picture: Picture = None,
    no_table: NoTable = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """OUT may be OLD (with --force): it is replaced when all is written, and stays as it was where patch fails. Another
    base than the delta's is refused (exit code 3).
    """
    job = functools.partial(
        deltas.patch,
        old,
        delta,
        out,
        to=None if to is None else to.value,
        force=force,
        showing=Showing(quiet, not no_table, json, picture, force),
    )
    return _run("patch", threads, debug, job)


def _wrong(name: str, message: str) -> int:
    say(name, f"{message} (cfl-ops {name} --help)")
    return Code.USAGE
