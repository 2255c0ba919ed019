"""From runs to numbers with intervals, and to sentences that say what they show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles, stdev

from scipy import stats

from .data import Dataset
from .heads import HEADS
from .split import Split
from .training import Run

__all__ = [
    "Cell",
    "Comparison",
    "Interval",
    "Summary",
    "difference",
    "interval",
    "number",
    "sentences",
    "split_sentences",
    "summarize",
]

# A ratio of the quartiles of a step's time that a machine with nothing else to do stays below.
BUSY = 1.5


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half width of its 95 % interval; None with fewer than two seeds."""

    mean: float
    half: float | None
    count: int

    def text(self, digits: int = 2) -> str:
        """``1.23 ± 0.45``, or the mean alone."""
        if self.half is None:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"


def interval(values: Sequence[float], resolution: float = 0.0) -> Interval | None:
    """Mean and Student-t 95 % interval of the finite values; None if there is none.

    The half width is at least ``resolution``, the step in which the values move: a few seeds that make
    equally many mistakes by chance would give an interval of no width.
    """
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return None
    n = len(values)
    if n == 1:
        return Interval(values[0], None, 1)
    half = float(stats.t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)
    return Interval(fmean(values), max(half, resolution), n)


@dataclass(frozen=True)
class Cell:
    """One head at one batch size, over the seeds."""

    head: str
    batch_size: int
    runs: list[Run]
    complete: bool
    """False where no seed finished: then the unfinished ones are shown."""
    online: Interval | None
    refit: Interval | None
    step_ms: float
    step_ms_quartiles: tuple[float, float]
    ratio: float | None = None
    """Steps per second over those of the reference head: the median of the quotients of paired steps."""
    ratio_range: tuple[float, float] | None = None
    """The least and the greatest such ratio of a seed."""

    @property
    def steps_per_second(self) -> float:
        """One over the median step time."""
        return 1000 / self.step_ms

    @property
    def diverged(self) -> int:
        """How many seeds diverged."""
        return sum(run.failure is not None for run in self.runs)

    @property
    def steps(self) -> int:
        """The most steps that a seed took."""
        return max(run.steps_done for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """The difference of two heads' metrics, paired by seed (same initialisation, same batches)."""

    head: str
    other: str
    batch_size: int
    difference: Interval

    @property
    def verdict(self) -> str:
        """``lower``, ``higher``, or ``unclear`` where the interval holds zero or there is none."""
        half = self.difference.half
        if half is None or abs(self.difference.mean) < 1.000001 * half:
            return "unclear"
        return "lower" if self.difference.mean < 0 else "higher"


@dataclass(frozen=True)
class Summary:
    """All that the report says in numbers."""

    heads: list[str]
    batch_sizes: list[int]
    reference: str | None
    """The head whose steps per second the others are compared with."""
    cells: dict[tuple[str, int], Cell]
    comparisons: list[Comparison]


def summarize(runs: Sequence[Run], data: Dataset) -> Summary:
    """Group the runs that took a step by head and batch size."""
    runs = [run for run in runs if run.steps_done]
    heads = [name for name in HEADS if any(run.setting.head == name for run in runs)]
    batch_sizes = sorted({run.setting.batch_size for run in runs})
    reference = next((name for name in ("cross-entropy", "squared") if name in heads), None)
    cells = {}
    for batch_size in batch_sizes:
        here = {name: _runs_of(runs, name, batch_size) for name in heads}
        for name in heads:
            if here[name]:
                cells[name, batch_size] = _cell(data, here[name], here.get(reference or "", []))
    pairs = [("proximal", other) for other in heads if other != "proximal"] if "proximal" in heads else []
    comparisons = []
    for batch_size in batch_sizes:
        for head, other in pairs:
            difference = _difference(data, cells.get((head, batch_size)), cells.get((other, batch_size)))
            if difference is not None:
                comparisons.append(Comparison(head, other, batch_size, difference))
    return Summary(heads, batch_sizes, reference, cells, comparisons)


def _runs_of(runs: Sequence[Run], head: str, batch_size: int) -> list[Run]:
    """The finished runs, or those that there are if none is."""
    mine = [run for run in runs if run.setting.head == head and run.setting.batch_size == batch_size]
    return [run for run in mine if run.finished] or mine


def _cell(data: Dataset, runs: list[Run], reference: list[Run]) -> Cell:
    milliseconds = [1000 * seconds for run in runs for seconds in run.step_seconds]
    low, _, high = quantiles(milliseconds, n=4) if len(milliseconds) > 1 else milliseconds * 3
    ratio, ratio_range = None, None
    if reference:
        # Steps of equal number are neighbours in time, so a busy moment of the machine, which may make the
        # median itself jump, is as likely to fall on either: their quotients have the better median.
        theirs = {run.setting.seed: run.step_seconds for run in reference}
        quotients = [
            [other / own for own, other in zip(run.step_seconds, theirs[run.setting.seed], strict=False)]
            for run in runs
            if run.setting.seed in theirs
        ]
        if quotients:
            ratio = median(quotient for each in quotients for quotient in each)
            ratio_range = min(map(median, quotients)), max(map(median, quotients))
    return Cell(
        runs[0].setting.head,
        runs[0].setting.batch_size,
        runs,
        complete=all(run.finished for run in runs),
        online=interval([run.online for run in runs], data.resolution),
        refit=interval([run.refit for run in runs if run.refit is not None], data.resolution),
        step_ms=median(milliseconds),
        step_ms_quartiles=(low, high),
        ratio=ratio,
        ratio_range=ratio_range,
    )


def _difference(data: Dataset, cell: Cell | None, other: Cell | None) -> Interval | None:
    if cell is None or other is None:
        return None
    theirs = {run.setting.seed: run.online for run in other.runs}
    values = [run.online - theirs[run.setting.seed] for run in cell.runs if run.setting.seed in theirs]
    return interval(values, data.resolution)


def sentences(summary: Summary, data: Dataset) -> list[str]:
    """What the numbers show, in words that follow from them."""
    said = []
    if summary.cells and data.tuned_as != data.name:
        said.append(
            f"Learning rates and penalties were not tuned for this data but for {data.tuned_as}: before you "
            "compare heads, try others (--lr, --lam, factors of ten)."
        )
    said += [_comparison_sentence(summary, batch_size, data) for batch_size in summary.batch_sizes]
    said += [_refit_sentence(summary, head, data) for head in summary.heads if HEADS[head].closed_form]
    said += [_speed_sentence(summary, head) for head in summary.heads if HEADS[head].closed_form]
    for (head, batch_size), cell in summary.cells.items():
        if cell.diverged:
            said.append(
                f"{HEADS[head].label} diverged at batch size {batch_size} in {cell.diverged} of "
                f"{len(cell.runs)} seeds; its numbers there are those of the others."
            )
    slowest = max(
        (cell.step_ms_quartiles[1] / cell.step_ms_quartiles[0] for cell in summary.cells.values()), default=1
    )
    if slowest > BUSY:
        said.append(
            f"The times of like steps varied up to {slowest:.1f}-fold within their middle half, so the "
            "machine was busy with other work: take the speeds with caution."
        )
    return [sentence for sentence in said if sentence]


def _comparison_sentence(summary: Summary, batch_size: int, data: Dataset) -> str:
    """The proximal head against each other head, at one batch size."""
    ours = summary.cells.get(("proximal", batch_size))
    rivals = [item for item in summary.comparisons if item.batch_size == batch_size]
    if ours is None or ours.online is None or not rivals:
        return ""
    verdicts: dict[str, list[str]] = {}
    for item in rivals:
        theirs = summary.cells[item.other, batch_size].online
        if theirs is not None:
            name = f"{HEADS[item.other].label} ({number(theirs.mean, data)})"
            verdicts.setdefault("alone" if item.difference.half is None else item.verdict, []).append(name)
    words = {
        "lower": "which is lower than {}",
        "higher": "which is higher than {}",
        "unclear": "which these seeds do not tell apart from {}",
        "alone": "beside {}; one seed gives no interval, so nothing follows from it",
    }
    parts = [words[key].format(_join(verdicts[key])) for key in words if key in verdicts]
    what = "test error" if data.classes else "test mean squared error"
    return (
        f"At batch size {batch_size}, {HEADS['proximal'].label} ends at a {what} of "
        f"{number(ours.online.mean, data)}, {', and '.join(parts)}."
    )


def _refit_sentence(summary: Summary, head: str, data: Dataset) -> str:
    """What solving a closed-form head again on all training data changes."""
    parts = []
    for batch_size in summary.batch_sizes:
        cell = summary.cells.get((head, batch_size))
        if cell is not None and cell.online is not None and cell.refit is not None:
            change = f"{number(cell.online.mean, data)} to {number(cell.refit.mean, data)}"
            parts.append(f"from {change} at batch size {batch_size}")
    if not parts:
        return ""
    return f"Solved once more, on the whole training set, the {HEADS[head].label} head goes {_join(parts)}."


def _speed_sentence(summary: Summary, head: str) -> str:
    """Steps per second against the reference head."""
    parts = []
    for batch_size in summary.batch_sizes:
        cell = summary.cells.get((head, batch_size))
        if cell is not None and cell.ratio is not None:
            parts.append(f"{cell.ratio:.2f} at batch size {batch_size}")
    if not parts or summary.reference is None:
        return ""
    return (
        f"Steps per second of {HEADS[head].label} over those of {HEADS[summary.reference].label}: "
        f"{_join(parts)}."
    )


def split_sentences(splits: Sequence[Split]) -> list[str]:
    """What share of a step each head itself takes, at the largest batch size."""
    if not splits:
        return []
    size = max(split.batch_size for split in splits)
    parts = [
        f"{100 * split.solve / split.total:.0f} % of it for {HEADS[split.head].label}"
        for split in splits
        if split.batch_size == size
    ]
    return [f"Of the time of a step at batch size {size} the head takes {_join(parts)}."]


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def number(value: float, data: Dataset) -> str:
    """A metric with its unit, at the precision of the report."""
    return f"{value:.{data.digits}f}{data.unit}"


def difference(value: Interval, data: Dataset) -> str:
    """A difference of metrics with its sign and interval; of percentages in points."""
    text = f"{round(value.mean, data.digits) + 0.0:+.{data.digits}f}".replace("-", "\N{MINUS SIGN}")
    half = "" if value.half is None else f" ± {value.half:.{data.digits}f}"
    return text + half + (" points" if data.classes else "")
