"""A picture of bits a parameter: a bar a layer."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path

from cfl_ops.ops.codec.atomic import replacing

from .failures import UsageError, printable
from .report import Row

__all__ = ["check_picture", "draw"]

FORMATS = (".png", ".svg")
_NAMED = 80
"""More bars than this have no names: they would be too small to read."""


def check_picture(path: str | None) -> None:
    """Say before the work what would be wrong after it (besides what is said of any file)."""
    if path is None:
        return
    if Path(path).suffix.lower() not in FORMATS:
        raise UsageError(f"--picture {path}: the name must end in {' or '.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--picture needs matplotlib: pip install matplotlib")


def draw(path: str, rows: Sequence[Row], title: str) -> None:
    """Draw the rows that have bits a parameter, in the order of the model."""
    from matplotlib.figure import Figure  # it takes a second; pyplot would look for a screen

    stored = [(row, row.bits_per_parameter) for row in rows if row.same_as is None and row.parameters]
    bits = [value for _, value in stored if value is not None]
    raw = [8 * row.raw_bytes / row.parameters for row, _ in stored]
    places = range(len(stored))
    named = len(stored) <= _NAMED
    if named:
        figure = Figure(figsize=(9, 1.3 + 0.22 * max(4, len(stored))), layout="constrained")
        axes = figure.subplots()
        axes.barh(places, raw, color="#dddddd", label="before")
        axes.barh(places, bits, color="#3366aa", label="now")
        axes.set_yticks(places, [_plain(row.name) for row, _ in stored], fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("bits a parameter")
    else:
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.bar(places, raw, width=1.0, color="#dddddd", label="before")
        axes.bar(places, bits, width=1.0, color="#3366aa", label="now")
        axes.set_xlabel("tensor, in the order of the file")
        axes.set_ylabel("bits a parameter")
    # Headers make tiny tensors look huge; the scale is that of the others.
    limit = 1.1 * max([8.0, *raw])
    (axes.set_xlim if named else axes.set_ylim)(0, limit)
    axes.set_title(_plain(title), fontsize=10)
    axes.margins(x=0.005) if not named else axes.margins(y=0.01)
    figure.legend(fontsize=8, ncols=2, loc="outside lower right")
    made = io.BytesIO()
    figure.savefig(made, dpi=120, format=Path(path).suffix.lower()[1:])
    with replacing(path) as sink:
        sink.write(made.getvalue())


def _plain(text: str) -> str:
    return printable(text).replace("$", r"\$")  # matplotlib reads what is between two of them as a formula
