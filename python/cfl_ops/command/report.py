"""What was done to each tensor, as data, as a table and as a line of totals."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from cfl_ops.ops.codec.atomic import replacing

from .failures import printable

__all__ = ["Bar", "Report", "Row", "human", "progress", "stderr_console", "stdout_console"]

MOST_ROWS = 60
_SMALL = 4096
"""Elements below which a ratio says nothing: the header outweighs it."""


@dataclass
class Row:
    """One tensor. What does not apply is None."""

    name: str
    shape: list[int] | None = None
    dtype: str | None = None
    kind: str | None = None
    parameters: int = 0
    raw_bytes: int = 0
    bytes: int = 0
    bits: int | None = None
    changed: float | None = None
    max_error: float | None = None
    rms_error: float | None = None
    rms_over_std: float | None = None
    seconds: float | None = None
    same_as: str | None = None
    state: str | None = None

    @property
    def bits_per_parameter(self) -> float | None:
        """Of what is stored, headers and all."""
        return 8 * self.bytes / self.parameters if self.parameters else None

    @property
    def ratio(self) -> float | None:
        """Bytes before over bytes now."""
        return self.raw_bytes / self.bytes if self.bytes else None

    def data(self) -> dict[str, Any]:
        """For JSON, where a number that is not finite is a word."""
        out = asdict(self) | {"bits_per_parameter": self.bits_per_parameter, "ratio": self.ratio}
        return {
            key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in out.items()
        }


@dataclass
class Report:
    """All rows of a command, and what is true of the whole."""

    command: str
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def totals(self) -> dict[str, Any]:
        """Sums over the tensors that are stored (a tied one counts once)."""
        stored = [row for row in self.rows if row.same_as is None]
        raw, now = sum(row.raw_bytes for row in stored), sum(row.bytes for row in stored)
        parameters = sum(row.parameters for row in stored)
        return {
            "tensors": len(self.rows),
            "parameters": parameters,
            "raw_bytes": raw,
            "bytes": now,
            "ratio": raw / now if now else None,
            "bits_per_parameter": 8 * now / parameters if parameters else None,
        }

    def data(self) -> dict[str, Any]:
        """What --json writes."""
        return {
            "command": self.command,
            **self.facts,
            "totals": self.totals(),
            "tensors": [row.data() for row in self.rows],
        }

    def write_json(self, path: str | None) -> None:
        """To a file, or to stdout for ``-``."""
        if path is None:
            return
        text = json.dumps(self.data(), indent=1, ensure_ascii=False)
        # What a terminal would obey, or UTF-8 has not, stands in strings only: there JSON has escapes for it.
        text = "\n".join(
            line if line.isprintable() else re.sub(r"[^ -~]", _json_escaped, line)
            for line in text.split("\n")
        )
        text += "\n"
        if path == "-":
            sys.stdout.write(text)
        else:
            with replacing(path) as sink:
                sink.write(text.encode())

    def print_table(self, console: Console, note: str = "") -> None:
        """A row for each tensor, or for the largest and the worst of very many."""
        shown = self._shown()
        columns = [column for column in COLUMNS if any(column[2](row) for row in shown)]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for title, justify, _ in columns:
            table.add_column(
                title,
                justify="right" if justify else "left",
                overflow="fold",
                no_wrap=title != "tensor",
            )
        for row in shown:
            style = "red" if row.state not in (None, "good") else None
            table.add_row(*(Text(printable(cell(row))) for _, _, cell in columns), style=style)
        if shown:
            console.print(table)
        if len(shown) < len(self.rows):
            console.print(
                f"{len(shown)} of {len(self.rows):,} tensors are shown, the largest and the worst; "
                "--json FILE has all.",
                highlight=False,
            )
        if note:
            console.print(printable(note), highlight=False, soft_wrap=True, markup=False)

    def totals_line(self) -> str:
        """Tensors, bytes before and now, ratio, bits."""
        totals = self.totals()
        parts = [f"{totals['tensors']:,} tensor{'s' if totals['tensors'] != 1 else ''}"]
        if totals["parameters"]:
            parts.append(f"{totals['parameters']:,} parameters")
        sizes = [human(totals["raw_bytes"]), human(totals["bytes"])]
        parts.append(" -> ".join(sizes[::-1] if self.command == "decompress" else sizes))
        if totals["ratio"] is not None:
            parts.append(f"ratio {_ratio(totals['ratio'])}")
        if totals["bits_per_parameter"] is not None:
            parts.append(f"{totals['bits_per_parameter']:.3f} bits a parameter")
        if (seconds := self.facts.get("seconds")) is not None:
            parts.append(f"{seconds:.2f} s")
        return ", ".join(parts)

    def _shown(self) -> list[Row]:
        if len(self.rows) <= MOST_ROWS:
            return self.rows
        bad = [row for row in self.rows if row.state not in (None, "good")]
        large = sorted(self.rows, key=lambda row: -row.bytes)
        ratios = sorted(
            (row for row in self.rows if row.ratio is not None and row.parameters >= _SMALL),
            key=lambda row: row.ratio or 0.0,
        )
        errors = sorted(
            (row for row in self.rows if row.rms_over_std is not None),
            key=lambda row: -(row.rms_over_std or 0.0),
        )
        third = MOST_ROWS // 3
        chosen = {
            id(row) for row in (*bad[:third], *large[:third], *ratios[: third // 2], *errors[: third // 2])
        }
        return [row for row in self.rows if id(row) in chosen]


def _json_escaped(match: re.Match[str]) -> str:
    return match[0] if match[0].isprintable() else json.dumps(match[0])[1:-1]


def _ratio(value: float) -> str:
    return f"{value:.3f}" if value < 100 else f"{value:,.0f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _what(row: Row) -> str:
    if row.same_as is not None:
        return f"= {row.same_as}"
    bits = f" {row.bits} bits" if row.bits else ""
    return (row.kind or "") + bits


COLUMNS: Sequence[tuple[str, bool, Any]] = (
    ("tensor", False, lambda row: row.name),
    ("shape", False, lambda row: "" if row.shape is None else "x".join(map(str, row.shape)) or "0-d"),
    ("dtype", False, lambda row: row.dtype or ""),
    ("stored as", False, _what),
    ("bytes", True, lambda row: "" if row.same_as is not None or not row.bytes else human(row.bytes)),
    (
        "bits/param",
        True,
        lambda row: _number(row.bits_per_parameter, ".3f") if row.same_as is None and row.bytes else "",
    ),
    ("ratio", True, lambda row: "" if row.same_as is not None or not row.ratio else _ratio(row.ratio)),
    ("changed", True, lambda row: _number(row.changed, ".3%")),
    ("max error", True, lambda row: _number(row.max_error, ".3g")),
    ("rms/std", True, lambda row: _number(row.rms_over_std, ".4f")),
    ("ms", True, lambda row: "" if row.seconds is None else f"{1000 * row.seconds:.1f}"),
    ("", False, lambda row: "" if row.state == "good" else row.state or ""),
)


def human(count: float) -> str:
    """Bytes in decimal units, as disks and networks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


class Bar:
    """What a job tells of how far it is; shown on a terminal, else nothing."""

    def __init__(self, bar: Progress | None = None, task: Any = None) -> None:
        self._bar, self._task = bar, task

    def at(self, name: str) -> None:
        """Which tensor it is at."""
        if self._bar is not None:
            name = printable(name)
            self._bar.update(self._task, description=name if len(name) <= 40 else "..." + name[-37:])

    def advance(self, count: int) -> None:
        """So many bytes more are done."""
        if self._bar is not None:
            self._bar.advance(self._task, count)


def stderr_console() -> Console:
    """As wide as the terminal, or, where none is there to be looked at, as wide as the table needs."""
    return Console(file=sys.stderr, width=None if sys.stderr.isatty() else 240)


def stdout_console() -> Console:
    """The same for a table that is the result."""
    return Console(file=sys.stdout, width=None if sys.stdout.isatty() else 240)


@contextmanager
def progress(total: int, quiet: bool, unit: str = "bytes") -> Iterator[Bar]:
    """A bar with the time left on stderr, if that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield Bar()
        return
    counts = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(),)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        *counts,
        TextColumn("left"),
        TimeRemainingColumn(),
        console=stderr_console(),
        transient=True,
    ) as bar:
        yield Bar(bar, bar.add_task("", total=total))
