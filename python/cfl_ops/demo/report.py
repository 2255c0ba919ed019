"""Pictures, tables and words of a run, in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import jinja2
import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from .data import Dataset
from .display import Outcome
from .heads import DEFAULT, HEADS
from .split import Split
from .summary import Cell, Summary, difference, sentences, split_sentences, summarize
from .training import REFIT_RIDGE, TURN, Run

__all__ = ["write"]

# Okabe and Ito's colours, which the colour-blind can tell apart, and for more heads than they are two of Tol's;
# each has a marker, too.
COLORS = {
    "proximal": "#0072b2",
    "ridge": "#e69f00",
    "rescaled": "#56b4e9",
    "ema-ridge": "#d55e00",
    "recursive": "#222222",
    "algorithm-2": "#882255",
    "algorithm-2-cached": "#999933",
    "squared": "#009e73",
    "cross-entropy": "#cc5490",
}
MARKERS = dict(zip(COLORS, "osvPX<>^D", strict=True))
GLYPHS = dict(zip("osvPX<>^D", "●■▼✚✖◀▶▲◆", strict=True))
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7eb",
    "axes.axisbelow": True,
    "svg.hashsalt": "cfl_ops",
}
SAMPLES = 12


def write(folder: Path, outcome: Outcome, data: Dataset, facts: Mapping[str, str]) -> Path:
    """Write ``index.html`` and ``results.json`` into a folder.

    Args:
        folder: made if missing.
        outcome: what was trained; unfinished runs are marked as such, and so is a run stopped before its end.
        data: what it was trained on.
        facts: names and values for the section on how the demo was run.

    Returns:
        The path of the report.

    """
    summary = summarize(outcome.runs, data)
    words = sentences(summary, data) + split_sentences(outcome.splits)
    folder.mkdir(parents=True, exist_ok=True)
    results = _results(outcome, summary, data, facts, words)
    (folder / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["difference"] = lambda value: difference(value, data)
    template = environment.from_string((files(__package__) / "template.html.j2").read_text())
    with mpl.rc_context(STYLE):
        pictures = {
            "curves": _curves(summary, data),
            "metric": _metric_picture(summary, data) if summary.cells else "",
            "speed": _speed_picture(summary) if summary.cells else "",
            "parts": _split_picture(outcome.splits, summary) if outcome.splits else "",
        }
    page = template.render(
        data=data,
        summary=summary,
        sentences=words,
        facts=facts,
        interrupted=outcome.interrupted,
        splits={(each.head, each.batch_size): each for each in outcome.splits},
        compiled=any(run.compiled for run in outcome.runs),
        heads=HEADS,
        colors=COLORS,
        glyphs={head: GLYPHS[marker] for head, marker in MARKERS.items()},
        samples=_samples(outcome.runs, data),
        refit_ridge=REFIT_RIDGE,
        turn=TURN,
        **pictures,
    )
    report = folder / "index.html"
    report.write_text(page, encoding="utf-8")
    return report


# Results.json


def _results(
    outcome: Outcome, summary: Summary, data: Dataset, facts: Mapping[str, str], words: Sequence[str]
) -> dict[str, Any]:
    def cell(entry: Cell) -> dict[str, Any]:
        return {
            "head": entry.head,
            "batch_size": entry.batch_size,
            "complete": entry.complete,
            "diverged": entry.diverged,
            "online": asdict(entry.online) if entry.online else None,
            "refit": asdict(entry.refit) if entry.refit else None,
            "steps_per_second": entry.steps_per_second,
            "step_ms": entry.step_ms,
            "step_ms_quartiles": entry.step_ms_quartiles,
            "ratio": entry.ratio,
            "ratio_range": entry.ratio_range,
        }

    def run(entry: Run) -> dict[str, Any]:
        seconds = entry.step_seconds
        cuts = quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        return {
            **asdict(entry.setting),
            "steps_done": entry.steps_done,
            "finished": entry.finished,
            "failure": entry.failure,
            "online": _finite(entry.online),
            "refit": _finite(entry.refit),
            "compiled": entry.compiled,
            "moved": dict(zip(("kind", "bytes"), entry.moved, strict=True)) if entry.moved else None,
            "step_seconds_quartiles": cuts,
            "curve": [[point.step, point.seconds, _finite(point.metric)] for point in entry.points],
        }

    return {
        "metric": data.metric,
        "interrupted": outcome.interrupted,
        "facts": dict(facts),
        "reference": summary.reference,
        "sentences": list(words),
        "summary": [cell(entry) for entry in summary.cells.values()],
        "comparisons": [asdict(entry) | {"verdict": entry.verdict} for entry in summary.comparisons],
        "split_seconds": [asdict(entry) | {"total": entry.total} for entry in outcome.splits],
        "runs": [run(entry) for entry in outcome.runs],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# Pictures


def _axes(width: float = 5.0, height: float = 3.3) -> Axes:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _svg(axes: Axes) -> str:
    """The figure as a data URI: an image of its own, so that the ids of several do not meet."""
    stream = io.BytesIO()
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic metric axis where the values differ by much."""
    if values and min(values) > 0 and max(values) > 6 * min(values):
        axes.set_yscale("log")
        axes.set_ylim(0.8 * min(values), 1.3 * max(values))
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.minorticks_off()


def _floor(data: Dataset) -> float:
    """What stands for zero errors on a logarithmic axis: half a mistake."""
    return data.resolution / 2 if data.classes else 1e-6


def _curves(summary: Summary, data: Dataset) -> list[dict[str, str]]:
    """For each batch size a picture against steps and one against time."""
    pictures = []
    for batch_size in summary.batch_sizes:
        for against in ("steps", "seconds of training"):
            axes = _axes()
            shown: list[float] = []
            for head in summary.heads:
                cell = summary.cells.get((head, batch_size))
                if cell is not None:
                    shown += _curve(axes, cell, data, against)
            _scale(axes, shown)
            axes.set_xlabel(against)
            axes.set_ylabel(data.metric)
            axes.set_title(f"batch size {batch_size}", loc="left", fontsize=10, fontweight="bold")
            axes.xaxis.set_major_locator(MaxNLocator(6))
            label = f"{data.metric} against {against} at batch size {batch_size}"
            pictures.append({"source": _svg(axes), "label": label})
    return pictures


def _curve(axes: Axes, cell: Cell, data: Dataset, against: str) -> list[float]:
    """Mean over the seeds, and the band from the least to the greatest; returns the values shown."""
    at: dict[int, list[tuple[float, float]]] = {}
    for run in cell.runs:
        for point in run.points:
            if math.isfinite(point.metric):
                at.setdefault(point.step, []).append((point.seconds, max(point.metric, _floor(data))))
    steps = sorted(at)
    if not steps:
        return []
    x = [float(step) if against == "steps" else fmean(second for second, _ in at[step]) for step in steps]
    mean = [fmean(metric for _, metric in at[step]) for step in steps]
    low = [min(metric for _, metric in at[step]) for step in steps]
    high = [max(metric for _, metric in at[step]) for step in steps]
    axes.fill_between(x, low, high, color=COLORS[cell.head], alpha=0.15, linewidth=0)
    axes.plot(x, mean, color=COLORS[cell.head], marker=MARKERS[cell.head], markersize=3, linewidth=1.4)
    return low + high


def _by_batch_size(axes: Axes, summary: Summary) -> None:
    """A place on the horizontal axis for each batch size."""
    axes.set_xticks(range(len(summary.batch_sizes)), [str(size) for size in summary.batch_sizes])
    axes.set_xlabel("batch size")
    axes.set_xlim(-0.55, len(summary.batch_sizes) - 0.45)
    axes.grid(axis="x", visible=False)


def _metric_picture(summary: Summary, data: Dataset) -> str:
    axes = _axes(_wide(summary), 3.6)
    place_width = min(0.17, 0.85 / len(summary.heads))
    shown: list[float] = []
    lows: list[float] = []
    for place, head in enumerate(summary.heads):
        for group, batch_size in enumerate(summary.batch_sizes):
            cell = summary.cells.get((head, batch_size))
            if cell is None:
                continue
            x = group + place_width * (place - (len(summary.heads) - 1) / 2)
            for entry, offset, face in (
                (cell.online, 0.0, COLORS[head]),
                (cell.refit, 0.4 * place_width, "white"),
            ):
                if entry is None:
                    continue
                mean, half = max(entry.mean, _floor(data)), entry.half or 0.0
                axes.errorbar(
                    x + offset,
                    mean,
                    yerr=half,
                    fmt=MARKERS[head],
                    markersize=6,
                    color=COLORS[head],
                    markerfacecolor=face,
                    capsize=2,
                    linewidth=1.2,
                )
                shown.append(mean)
                lows += [mean + half, max(mean - half, mean / 3)]
    _scale(axes, shown + lows)
    _by_batch_size(axes, summary)
    axes.set_ylabel(data.metric)
    return _svg(axes)


def _wide(summary: Summary) -> float:
    """A picture's width in inches, which grows with the number of marks side by side."""
    return 5.6 if len(summary.heads) <= len(DEFAULT) else 9.0


def _speed_picture(summary: Summary) -> str:
    axes = _axes(_wide(summary), 3.6)
    many = len(summary.heads) > len(DEFAULT)
    width = 0.8 / len(summary.heads)
    for place, head in enumerate(summary.heads):
        for group, batch_size in enumerate(summary.batch_sizes):
            cell = summary.cells.get((head, batch_size))
            if cell is None:
                continue
            x = group + width * (place - (len(summary.heads) - 1) / 2)
            rate = cell.steps_per_second
            fast, slow = (1000 / value for value in cell.step_ms_quartiles)
            axes.bar(x, rate, 0.9 * width, color=COLORS[head])
            axes.errorbar(
                x,
                rate,
                yerr=[[max(rate - slow, 0)], [max(fast - rate, 0)]],
                color="#333",
                capsize=2,
                linewidth=1,
            )
            if cell.ratio is not None:
                text = f"{cell.ratio:.2f}"
                axes.annotate(
                    text,
                    (x, max(fast, rate)),
                    (0, 3),
                    textcoords="offset points",
                    ha="center",
                    size=8,
                    rotation=90 if many else 0,
                )
    _by_batch_size(axes, summary)
    axes.set_ylabel("steps per second")
    axes.margins(y=0.12)
    return _svg(axes)


def _split_picture(splits: Sequence[Split], summary: Summary) -> str:
    """A bar for each head and batch size: backbone, then head in its colour, then the rest."""
    axes = _axes(_wide(summary), 3.6)
    width = 0.8 / len(summary.heads)
    for split in splits:
        place = summary.heads.index(split.head)
        x = summary.batch_sizes.index(split.batch_size) + width * (place - (len(summary.heads) - 1) / 2)
        color, below = COLORS[split.head], 0.0
        for seconds, style in (
            (split.backbone, {"color": "#c3cad3"}),
            (split.solve, {"color": color}),
            (split.overhead, {"facecolor": "white", "edgecolor": color, "hatch": "/////", "linewidth": 0.8}),
        ):
            axes.bar(x, 1000 * seconds, 0.9 * width, bottom=below, **style)
            below += 1000 * seconds
    handles = [
        Patch(facecolor="white", edgecolor="#555", hatch="/////", label="overhead"),
        Patch(facecolor="#555", label="head (its own colour)"),
        Patch(facecolor="#c3cad3", label="backbone"),
    ]
    axes.legend(handles=handles, frameon=False, fontsize=9, loc="upper left")
    _by_batch_size(axes, summary)
    axes.set_ylabel("milliseconds of a step")
    axes.margins(y=0.3)
    return _svg(axes)


# Sample images


def _samples(runs: Sequence[Run], data: Dataset) -> dict[str, Any] | None:
    """Test images with what each head says, from the first seed at the smallest batch size."""
    able = [run for run in runs if run.predictions is not None]
    if data.test_images is None or not able:
        return None
    first = min(able, key=lambda run: (run.setting.batch_size, run.setting.seed))
    mine = {
        run.setting.head: run.predictions
        for run in able
        if (run.setting.batch_size, run.setting.seed) == (first.setting.batch_size, first.setting.seed)
    }
    truth = data.test_y.cpu()
    wrong = torch.stack([prediction != truth for prediction in mine.values() if prediction is not None]).sum(
        0
    )
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(truth), generator=generator).tolist()
    # The hardest first: those that the most heads get wrong.
    hard = sorted((i for i in order if wrong[i]), key=lambda i: -int(wrong[i]))[: SAMPLES // 2]
    chosen = hard + [i for i in order if i not in hard][: SAMPLES - len(hard)]
    images = [
        {
            "source": _png(data.test_images[i]),
            "truth": int(truth[i]),
            "answers": [
                {"head": head, "value": int(answer[i]), "right": bool(answer[i] == truth[i])}
                for head, answer in mine.items()
                if answer is not None
            ],
        }
        for i in chosen
    ]
    return {
        "images": images,
        "batch_size": first.setting.batch_size,
        "seed": first.setting.seed,
        "hard": len(hard),
    }


def _png(image: torch.Tensor) -> str:
    stream = io.BytesIO()
    imsave(stream, image.numpy(), cmap="gray_r", vmin=0, vmax=1, format="png")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
