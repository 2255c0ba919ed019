"""budget: an error, or a number of bytes, instead of bits. Both are kept: what counts are the blobs themselves.

Which bits serve is decided on integers (histograms, sizes of blobs) and on sums that are the same on every device
(measure.py).
"""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cfl_ops.ops.codec.bits import dense
from cfl_ops.ops.codec.blob import (
    checked_options,
    quantised_bits,
    store_lossless,
    store_planned,
)
from cfl_ops.ops.codec.measure import deviation_of, errors_of
from cfl_ops.ops.codec.plan import Grid, Options, Palette, as_rows, find_grid, ranges_of
from cfl_ops.ops.codec.policy import OP, Decision, told
from cfl_ops.ops.codec.quantize import WEIGHT_RANGE, to_bins
from cfl_ops.ops.codec.sample import sample_index

MOST_BITS = 16
_PROBE_BITS = 12
"""Of the histogram that sizes and errors are guessed from; each bit more is a bit more of entropy."""
_SAMPLE = 1 << 18
_PLANNED_BITS = 8
"""Outliers are left out of the range as compress(bits=8) does, whatever the bits will be."""
_PARTS, _LARGE = 16, 1 << 20
"""Steps are a part of a bit apart: a 16th in large tensors, where it is many bytes, a quarter in others."""
_ROUNDS = 6
_SPARE = 400
"""So small a part of the bytes may stay unused."""
_LOSSLESS = {torch.bfloat16: 0.68, torch.float16: 0.85, torch.float32: 0.84, torch.float64: 0.94}
"""What weights usually take bit for bit, as a part of their bytes: a first guess, then measured."""


def compress_within(decision: Decision) -> Tensor:
    """The tensor with steps as long as its error budget allows, measured on the blob; bit for bit where none serve."""
    w, options, budget = decision.value.detach(), decision.options, decision.budget
    assert options is not None
    assert budget is not None
    if w.numel() == 0:
        return store_lossless(OP, decision.where, w)
    # A uniform grid errs by step / sqrt(12) in the mean, and by step / 2 at most.
    part = 1.0 if budget.kind == "rms" else 1 / math.sqrt(3)
    absolute = budget.unit == "absolute"
    if absolute:
        options = options._replace(unit=budget.error, max_error=part)
    else:
        options = options._replace(max_error=budget.error * part)
    options = checked_options(w, options._replace(allocated=1))
    grid = find_grid(w, options)
    if not isinstance(grid, Grid) or bool((grid.minimum == grid.maximum).all()):
        return _smaller(store_planned(w, grid, options), w, decision)
    limit = budget.error * (1.0 if absolute else deviation_of(w))
    steps = 2.0**grid.bits
    span = float(grid.maximum.to(torch.float64) * 0.25 - grid.minimum.to(torch.float64) * 0.25)
    if grid.levels and options.per == "tensor":
        enough = span / limit / part / math.sqrt(0.75) if limit > span / 2.0**MOST_BITS else grid.levels
        # Outliers do not count in the plan's deviation, which is that of 1,024 weights: 2 % off, or far below.
        steps = max(1.0, 1.002 * (enough if grid.levels < 1.1 * enough else grid.levels))
    while True:
        bits = max(1, math.ceil(math.log2(steps)))
        if bits > MOST_BITS:
            return store_lossless(OP, decision.where, w)
        stretch = 2.0**bits / steps if options.per == "tensor" else 1.0
        blob = store_planned(w, grid._replace(bits=bits, stretch=stretch), options)
        if not quantised_bits(blob):
            return _smaller(blob, w, decision)
        errors = errors_of(w, blob, budget.kind == "rms")
        off = errors.rms if budget.kind == "rms" else errors.largest
        if off <= limit:
            return _smaller(blob, w, decision)
        if options.per != "tensor":
            steps = 2.0 ** (bits + 1)
            continue
        steps *= _shortage(
            span / steps * (1 / math.sqrt(0.75) if budget.kind == "rms" else 2), off, limit, budget.kind
        )


def _shortage(expected: float, off: float, limit: float, kind: str) -> float:
    """How many times as many steps to try, where an error was to be ``expected`` and is ``off``, above the limit.

    What the step does not explain is the rounding of the weights' dtype, which a shorter step leaves as it is.
    """
    if off >= 4 * limit:
        return 2.0
    expected, off = expected / limit, off / limit
    left = math.sqrt(max(0.0, expected**2 - off**2 + 1)) if kind == "rms" else expected - off + 1
    return min(2.0, max(1.005, 1.002 * expected / left)) if left > 0 else 2.0


def _smaller(blob: Tensor, w: Tensor, decision: Decision) -> Tensor:
    """Bit for bit, if that takes no more: of half precision, 10 bits may take more than the weights' own."""
    if blob.numel() * 2 < w.numel() * w.element_size():
        return blob
    exact = store_lossless(OP, decision.where, w)
    return exact if exact.numel() <= blob.numel() else blob


class _Curve:
    """What a tensor takes, and how far it is off, with a range of 2^(level / 16) steps; level 0 keeps every bit."""

    def __init__(
        self, decision: Decision, options: Options, grid: Grid, absolute: bool, palette: Options | None
    ) -> None:
        self.decision, self.options, self.palette = decision, options, palette
        w = decision.value
        n, item = w.numel(), w.element_size()
        counts, step, groups = _histogram(w, grid, options)
        occupied, entropies, squares = _pooled(counts)
        total = int(counts.sum())
        kept = 0 if grid.exceptions is None else grid.exceptions.numel()
        tables = 400 + 8 * w.ndim + 2 * groups * item + kept * (8 + item)
        mantissa, self.exponent = math.frexp(step) if absolute else (1.0, 0)
        """Of a power of four that the costs are still to be multiplied by: squares of tiny steps would be 0."""
        scale = decision.importance * n * (mantissa**2 if absolute else 1 / (_spread(counts) + 1 / 12))
        sizes, costs = [0.0], [4.0**_PROBE_BITS / 12]
        for bits in range(1, MOST_BITS + 1):
            known = min(bits, _PROBE_BITS)
            each = max(1.0, entropies[known] + bits - known)
            symbols = min(occupied[known] << (bits - known), n)
            lengths = min(1.8 * symbols, 0.6 * symbols + 0.4 * (2**bits - symbols))
            sizes.append(tables + n * (each / 8 + 8 / 2**15) + lengths)
            # Squares of distances in half steps of the probe, and what the probe itself is off.
            off = (
                squares[known] / total / 4 + 1 / 12
                if bits <= _PROBE_BITS
                else 4.0 ** (_PROBE_BITS - bits) / 12
            )
            costs.append(off)
        self.bytes = {0: 200 + round(n * item * _LOSSLESS[w.dtype])}
        self.costs = {0: 0.0}
        self.measured: dict[int, int] = {}
        apart = _PARTS if options.per != "tensor" else 1 if n >= _LARGE else _PARTS // 4
        for level in range(_PARTS, _PARTS * MOST_BITS + 1, apart):
            bits, part = -(-level // _PARTS), (level - 1) % _PARTS / _PARTS + 1 / _PARTS
            self.bytes[level] = round(sizes[bits - 1] * (1 - part) + sizes[bits] * part)
            off = costs[bits - 1] ** (1 - part) * costs[bits] ** part
            self.costs[level] = scale * off if step else 0.0

    def weigh(self, exponent: int) -> None:
        """Make the costs multiples of that power of four, the same for all tensors."""
        if self.exponent != exponent:
            self.costs = {
                level: math.ldexp(cost, 2 * (self.exponent - exponent)) for level, cost in self.costs.items()
            }
            self.exponent = exponent

    def guess(self, level: int) -> int:
        """The bytes of a level: as measured, or as much off as what was measured next to it."""
        if level in self.measured:
            return self.measured[level]
        near = min((key for key in self.measured if key), key=lambda key: (abs(key - level), key), default=0)
        if not level or not near:
            return self.bytes[level]
        return round(self.bytes[level] * self.measured[near] / self.bytes[near])

    def make(self, level: int) -> Tensor:
        """The blob of a level."""
        w = self.decision.value.detach()
        if level == 0:
            exact = store_lossless(OP, self.decision.where, w)
            if self.palette is None:
                return exact
            few = store_planned(w, find_grid(w, self.palette), self.palette)
            return few if few.numel() < exact.numel() else exact
        grid = find_grid(w, self.options)
        assert isinstance(grid, Grid)
        bits = -(-level // _PARTS)
        return store_planned(
            w, grid._replace(bits=bits, stretch=2.0 ** (bits - level / _PARTS)), self.options
        )

    def hull(self) -> list[tuple[int, int, float]]:
        """(level, bytes, cost) from the fewest bytes on: each further one saves less of the cost for a byte."""
        points = sorted((self.guess(level), cost, level) for level, cost in self.costs.items())
        found: list[tuple[int, int, float]] = []
        for size, cost, level in points:
            if found and cost >= found[-1][2]:
                continue
            if found and found[-1][1] == size:
                found.pop()
            while len(found) > 1 and (found[-1][2] - cost) * (found[-1][1] - found[-2][1]) >= (
                found[-2][2] - found[-1][2]
            ) * (size - found[-1][1]):
                found.pop()
            found.append((level, size, cost))
        return found


def _histogram(w: Tensor, grid: Grid, options: Options) -> tuple[Tensor, float, int]:
    """Counts of 2^12 bins (on the CPU) of a sample, the rms of the groups' ranges (by 4), and the groups' number."""
    flat, n = dense(grid.weights), w.numel()
    every = max(1, n // _SAMPLE)
    if options.per == "tensor":
        counts = WEIGHT_RANGE(flat, _PROBE_BITS, every)[2].cpu()
        size, low, high = n, grid.minimum.view(1), grid.maximum.view(1)
    else:
        size = w.shape[-1] if options.per == "row" else options.block_size or n
        found = [ranges_of(rows)[:2] for rows in as_rows(flat, options.per, size, options.block_size)]
        low, high = (torch.cat([ends[i] for ends in found]) for i in (0, 1))
        at = sample_index(n, every, flat.device)
        group = (at // size).cpu()
        bins = to_bins(flat[at].cpu().unsqueeze(-1), low[group], high[group], _PROBE_BITS)
        counts = torch.bincount(bins.flatten(), minlength=1 << _PROBE_BITS)
    quarters = high.to(torch.float64) * 0.25 - low.to(torch.float64) * 0.25
    steps: list[float] = quarters.tolist()
    largest = max(steps)
    if not largest:
        return counts, 0.0, len(steps)
    lengths = [size] * (len(steps) - 1) + [n - size * (len(steps) - 1)]
    parts = (length * (step / largest) ** 2 for length, step in zip(lengths, steps, strict=True))
    return counts, largest * math.sqrt(math.fsum(parts) / n), len(steps)


def _pooled(counts: Tensor) -> tuple[list[int], list[float], list[int]]:
    """For each number of bits to 12 the occupied bins, their entropy, and the squares of what a bin's centre is off.

    The last in half bins of the 12 bits, times the counts. An entropy of few samples is corrected for their number.
    """
    total = int(counts.sum())
    occupied, entropies, squares = [1], [0.0], [0]
    for bits in range(1, _PROBE_BITS + 1):
        width = 1 << (_PROBE_BITS - bits)
        some = counts.view(-1, width).sum(1)
        p = some[some > 0].to(torch.float64) / total
        occupied.append(len(p))
        entropies.append(float(-(p * p.log2()).sum()) + (len(p) - 1) / (2 * math.log(2) * total))
        off = (2 * torch.arange(width) + 1 - width) ** 2
        squares.append(int((counts.view(-1, width).sum(0) * off).sum()))
    return occupied, entropies, squares


def _spread(counts: Tensor) -> float:
    """The variance of a histogram, in bins."""
    at = torch.arange(len(counts))
    total, first, second = int(counts.sum()), int((counts * at).sum()), int((counts * at * at).sum())
    return (second * total - first * first) / total**2


def share_bytes(
    decisions: Sequence[Decision],
    fixed: Callable[[Decision], Tensor],
    max_bytes: int,
    absolute: bool,
    keep: bool,
) -> dict[int, Callable[[], Tensor]]:
    """How the blobs of tensors are made, by their numbers, so that all take no more than ``max_bytes`` together.

    The sum of the squared errors is made small: each byte goes where it saves most of it, first as guessed from
    histograms, then with the sizes of the blobs that this chooses, until all that is chosen is measured.

    Args:
        decisions: all tensors.
        fixed: makes the blob of a tensor that takes no share.
        max_bytes: of all blobs.
        absolute: whether errors count as they are; else as parts of their tensor's standard deviation.
        keep: hold the blobs that are made here, so that few are made twice.
    """
    curves: dict[int, _Curve] = {}
    makers: dict[int, Callable[[], Tensor]] = {}
    room = max_bytes
    for i, decision in enumerate(decisions):
        with told(decision):
            curve = _curve(decision, absolute)
            if curve is not None:
                curves[i] = curve
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they come when it is made for good
                blob = fixed(decision)
        room -= blob.numel()
        if keep and decision.options is None:
            makers[i] = _given(blob)
    top = max((curve.exponent for curve in curves.values() if any(curve.costs.values())), default=0)
    for curve in curves.values():
        curve.weigh(top)
    blobs: dict[int, tuple[int, Tensor]] = {}
    best: tuple[float, dict[int, int]] | None = None
    for turn in itertools.count():
        chosen, total, cost = _choose(curves, room)
        unknown = [(i, level) for i, level in chosen.items() if level not in curves[i].measured]
        if not unknown and total > room:
            unknown = [(i, _PARTS) for i, curve in curves.items() if _PARTS not in curve.measured]
        if not unknown and total > room:
            raise ValueError(
                f"cfl_ops.{OP}: max_bytes must be at least {total + max_bytes - room} (1 bit for each weight that "
                f"may be quantised, and what is kept exactly), but got {max_bytes}"
            )
        for i, level in unknown:
            with told(decisions[i]):
                blob = curves[i].make(level)
            curves[i].measured[level] = blob.numel()
            if keep:
                blobs[i] = level, blob
        measured = sum(curves[i].measured[level] for i, level in chosen.items())
        if measured <= room and (best is None or cost < best[0]):
            best = cost, chosen
        if not unknown or (
            best is not None and (turn >= _ROUNDS or room - measured in range(room // _SPARE + 1))
        ):
            break
    assert best is not None
    for i, level in best[1].items():
        made = blobs.get(i)
        again = functools.partial(curves[i].make, level)
        makers[i] = again if made is None or made[0] != level else _given(made[1])
    return makers


def _given(blob: Tensor) -> Callable[[], Tensor]:
    return lambda: blob


def _curve(decision: Decision, absolute: bool) -> _Curve | None:
    """What a tensor takes at each number of bits; None of one that takes no share, or is constant."""
    w, options = decision.value.detach(), decision.options
    if not decision.shares or options is None or w.numel() == 0:
        return None
    exact = None
    for bits in (_PLANNED_BITS, 1):
        options = checked_options(w, options._replace(bits=bits))
        grid = find_grid(w, options)
        if isinstance(grid, Palette) and bits > 1:  # bit for bit, or a grid for the few values
            exact = options
            continue
        if not isinstance(grid, Grid) or bool((grid.minimum == grid.maximum).all()):
            return None
        return _Curve(decision, options, grid, absolute, exact)
    return None


def _choose(curves: dict[int, _Curve], room: int) -> tuple[dict[int, int], int, float]:
    """The level of each tensor, the bytes of all, and what is left of the squared error."""
    hulls = {i: curve.hull() for i, curve in curves.items()}
    total = sum(hull[0][1] for hull in hulls.values())
    at = dict.fromkeys(hulls, 0)
    steps = [
        ((before[2] - after[2]) / (after[1] - before[1]), i, k, after[1] - before[1])
        for i, hull in hulls.items()
        for k, (before, after) in enumerate(itertools.pairwise(hull))
    ]
    for _, i, k, more in sorted(steps, key=lambda step: (-step[0], *step[1:])):
        if at[i] == k and total + more <= room:
            at[i] = k + 1
            total += more
    chosen = {i: hulls[i][k][0] for i, k in at.items()}
    return chosen, total, math.fsum(hulls[i][k][2] for i, k in at.items())
