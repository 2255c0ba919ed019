"""plan: how many bits a tensor gets, which of its weights are kept exactly, and how large the error will be.

All of it is found on a few weights (sample.py), with sums of integers: the decisions stand in the bytes, so they must
not depend on the order in which a device or an instruction set adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cfl_ops._core.failures import check_info
from cfl_ops.ops.codec.bits import INTS, dense
from cfl_ops.ops.codec.quantize import WEIGHT_RANGE, allocate_bits, entropy_of, from_bins, probe, to_bins
from cfl_ops.ops.codec.sample import LEAST_SAMPLE, sample_index

LOOK = 1024
"""Weights of a tensor that are looked at; 32 of each group where rows or blocks have ranges of their own."""
LEAST_GROUP = 256
"""In a smaller group an exception costs more than the bits that it saves."""
FAR = 10.0
"""So many ranges of the middle half away from it, a weight is an outlier."""
_FEW = 64
_GRAIN = 2.0**20


def is_plain(counts: Tensor, bits: int, max_error: float, zero_bins: bool) -> bool:
    """Whether a histogram of 256 bins (on the CPU) shows that ``bits`` keep to the error, without a closer look.

    It never says so wrongly: the standard deviation is that of the bins less half a bin, and the fullest bin may be
    a single value at the edge of its bin. Few occupied bins may be few values, and a wide gap two clusters.
    """
    bins = torch.arange(256)
    first = counts * bins
    total, mean, squares = int(counts.sum()), int(first.sum()), int((first * bins).sum())
    occupied = counts.nonzero().flatten()
    if len(occupied) <= _FEW or int(occupied.diff().max()) > 192:
        return False
    deviation = math.sqrt(max(0.0, squares / total - (mean / total) ** 2)) - 0.5
    share = int(counts.max()) / total * (1.0 if zero_bins else 0.25)
    return 2.0 ** (8 - bits) * math.sqrt(1 / 12 + share) <= max_error * deviation


def palette_of(flat: Tensor, limit: int) -> tuple[Tensor, Tensor] | None:
    """The different values of a 1-d tensor, bit for bit, and the number of each weight's; None if they are many."""
    bits = flat.view(INTS[flat.element_size()])
    found = bits[sample_index(len(bits), max(1, len(bits) // LOOK), bits.device)].unique()
    for _ in range(2):  # the second time with what the sample had not met
        if len(found) > limit:
            return None
        symbols = torch.bucketize(bits, found, out_int32=True)
        strange = found[symbols.clamp(max=len(found) - 1)] != bits
        count = int(strange.count_nonzero())
        if count == 0:
            return found.view(flat.dtype), symbols.to(torch.uint8)
        if count > len(bits) // 8:
            return None
        found = torch.cat([found, bits[strange].unique()]).unique()
    return None


class Spread(NamedTuple):
    """How the weights of each group lie. Quarters of weights, float64, on the CPU: no difference overflows."""

    low: Tensor
    """Outside of low..high is what the bulk of the group does not reach by far."""
    high: Tensor
    middle: Tensor
    """One of that bulk."""
    deviation: Tensor
    """The standard deviation without the outermost weights; of two clusters far apart, that within a cluster."""


def spread_of(look: Tensor, max_error: float) -> Spread:
    """Of some weights of each group, ``(groups, n)`` on the CPU."""
    x = look.to(torch.float64).mul(0.25)
    n = x.shape[1]
    kept = torch.ones_like(x, dtype=torch.bool)
    if n >= 32:
        for outermost in (x.argmin(-1, keepdim=True), x.argmax(-1, keepdim=True)):
            kept.scatter_(1, outermost, False)
        # More than one of each side may be far out; weights with such tails everywhere keep them.
        ends = x.sort(-1).values[:, [n // 4, n - 1 - n // 4]]
        reach = (ends[:, 1:] - ends[:, :1]) * FAR
        far = (x < ends[:, :1] - reach) | (x > ends[:, 1:] + reach)
        kept &= ~(far & (reach > 0) & (far.sum(-1, keepdim=True) <= n // 64))
        sparse = (reach == 0).flatten().nonzero().flatten()
        if len(sparse):
            kept[sparse] = _usual(x[sparse], ends[sparse, :1])
    low, high = torch.where(kept, x, math.inf).amin(-1), torch.where(kept, x, -math.inf).amax(-1)
    deviation, middle = _deviation(x, kept, low, high), low.clone()
    # Two clusters far apart leave the middle of the range empty.
    place = (x - low.unsqueeze(-1)) / (high - low).unsqueeze(-1)
    hollow = ((high > low) & ~(kept & (place > 0.25) & (place < 0.75)).any(-1)).nonzero().flatten()
    if len(hollow):
        _part(x, kept, hollow, Spread(low, high, middle, deviation), max_error)
    rare = (deviation == 0) & (x.amax(-1) > x.amin(-1))
    if bool(rare.any()):  # nothing but the outermost differs
        rows = x[rare]
        deviation[rare] = _deviation(
            rows, torch.ones_like(rows, dtype=torch.bool), rows.amin(-1), rows.amax(-1)
        )
    margin = (high - low) * (0.5 if n > LOOK // 2 else 1.0)  # fewer weights reach less far
    return Spread(low - margin, high + margin, middle, deviation)


def _usual(x: Tensor, zero: Tensor) -> Tensor:
    """Which weights of each row, most of which are ``zero``, are no outliers: the others are compared among themselves.

    Two others or fewer are outliers.
    """
    distance = (x - zero).abs()
    usual = torch.where(distance > 0, distance, math.nan).nanmedian(-1, keepdim=True).values
    others = (distance > 0).sum(-1, keepdim=True)
    far = torch.where(others <= 2, distance > 0, distance > usual * FAR)
    most = torch.where(others <= 2, 2, (others // 8).clamp(max=max(2, x.shape[1] // 64)))
    return ~(far & (far.sum(-1, keepdim=True) <= most))


def _part(x: Tensor, kept: Tensor, hollow: Tensor, spread: Spread, max_error: float) -> None:
    """Mend the spread of those rows that a gap of more than 3/4 of their range parts in two clusters."""
    low, high, middle, deviation = spread
    values = torch.where(kept[hollow], x[hollow], math.inf).sort(-1).values
    gaps = values.diff(dim=-1)
    gap, at = torch.where(gaps.isfinite(), gaps, 0.0).max(-1, keepdim=True)
    parted = gap.squeeze(-1) > 0.75 * (high - low)[hollow]
    if bool(parted.any()):
        rows = hollow[parted]
        below, above = values.gather(1, torch.cat([at, at + 1], 1))[parted].unbind(-1)
        left = kept[rows] & (x[rows] <= below.unsqueeze(-1))
        right = kept[rows] & ~left
        share = left.sum(-1).to(torch.float64) / kept[rows].sum(-1)
        within = torch.maximum(
            _deviation(x[rows], left, low[rows], below) * share.sqrt(),
            _deviation(x[rows], right, above, high[rows]) * (1 - share).sqrt(),
        )
        # Two values have no deviation within a cluster: then that of both stands.
        deviation[rows] = torch.where(within > 0, within, deviation[rows])
        # No grid has room for both clusters: the larger one is what is quantised.
        apart = (within > 0) & ((high - low)[rows] > 2.0**16 * math.sqrt(12) * max_error * within)
        larger = share >= 0.5
        high[rows] = torch.where(apart & larger, below, high[rows])
        low[rows] = torch.where(apart & ~larger, above, low[rows])
        middle[rows] = low[rows]


def _deviation(x: Tensor, kept: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The standard deviation of the kept ones of each row, which lie in low..high: sums of integers."""
    span, n = (high - low).unsqueeze(-1), kept.sum(-1)
    place = (
        torch.where(kept & (span > 0), (x - low.unsqueeze(-1)) / span * _GRAIN, 0.0).round().to(torch.int64)
    )
    spread = n * (place * place).sum(-1) - place.sum(-1) ** 2
    return spread.to(torch.float64).sqrt() / (n * _GRAIN) * span.squeeze(-1)


def look_at(rows: Tensor) -> Tensor:
    """Some weights of each row, on the CPU."""
    groups, size = rows.shape
    count = LOOK if groups == 1 else 32
    return rows[:, sample_index(size, max(1, size // count), rows.device)].cpu()


def spread_of_groups(rows: Tensor, look: Tensor, span: Tensor, max_error: float) -> Spread:
    """The spread of each row as its look shows it; 32 weights of a sparse row may show hardly any of it."""
    spread = spread_of(look, max_error)
    doubtful = (span > 16 * spread.deviation).nonzero().flatten()
    if len(rows) == 1 or len(doubtful) == 0:
        return spread
    more = sample_index(rows.shape[1], max(1, rows.shape[1] // LOOK), rows.device)
    found = spread_of(rows[doubtful.to(rows.device)][:, more].cpu(), max_error)
    for field, better in zip(spread, found, strict=True):
        field[doubtful] = better
    return spread


def outside(
    rows: Tensor, spread: Spread, span: Tensor, bits: int, max_error: float
) -> tuple[Tensor, Tensor] | None:
    """Which weights are better kept exactly than within the range, as the budget of the error asks; None: none.

    ``span``: the quarter of each row's range. Returns their places, rising, and their rows.
    """
    size, element = rows.shape[1], rows.element_size()
    needed = bins_needed(span, spread.deviation, max_error)
    cut = ((needed > 2.0**bits) & (span > spread.high - spread.low)).nonzero().flatten()
    if len(cut) == 0:
        return None
    low, high = ((end[cut] * 4).to(rows.dtype).to(rows.device) for end in (spread.low, spread.high))
    there = cut.to(rows.device)
    if len(rows) == 1:
        found = _outside_of_pieces(rows[0], low, high)
        owner = torch.zeros_like(found)
    else:
        some = rows[there]
        owner, column = ((some < low.unsqueeze(-1)) | (some > high.unsqueeze(-1))).nonzero(as_tuple=True)
        found = there[owner] * size + column
    # An exception costs its index and its value. Where no number of bits serves: half of what raw bytes would.
    most = torch.where(needed[cut] > 2.0**16, size * element // (2 * (8 + element)), 4 + size // 1024)
    count = torch.bincount(owner, minlength=len(cut))
    kept = (count <= most.to(rows.device))[owner]
    if not bool(kept.any()):
        return None
    return found[kept], there[owner[kept]]


def _outside_of_pieces(flat: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Places of the weights outside of low..high: most pieces have none, as their ranges tell in one quick pass."""
    width = 1024
    whole = len(flat) // width * width
    found = []
    for first, rows in ((0, flat[:whole].view(-1, width)), (whole, flat[whole:].unsqueeze(0))):
        minimum, maximum, _, _ = WEIGHT_RANGE(rows, 0, 1)
        some = ((minimum < low) | (maximum > high)).nonzero().flatten()
        piece = rows[some]
        row, column = ((piece < low) | (piece > high)).nonzero(as_tuple=True)
        found.append(first + some[row] * width + column)
    return torch.cat(found)


def bins_needed(span: Tensor, deviation: Tensor, max_error: float) -> Tensor:
    """Of a range, so that the error of a uniform grid, step / sqrt(12), keeps to the budget."""
    needed = span / (math.sqrt(12) * max_error * deviation)
    return torch.where(span > 0, needed, 0.0)


def root_mean_square(values: Tensor) -> float:
    """Of float64 numbers, added without rounding: their order does not matter."""
    few = values[sample_index(len(values), max(1, len(values) // LOOK))].tolist()
    if not all(map(math.isfinite, few)):
        return math.inf
    return math.sqrt(math.fsum(value * value for value in few) / max(1, len(few)))


def measured_error(
    look: Tensor, minimum: Tensor, maximum: Tensor, bits: int, deviation: Tensor, zero_bins: bool
) -> float:
    """The rms error of the weights that were looked at, relative to their groups' deviations (of 256 groups)."""
    some = sample_index(len(look), max(1, len(look) // 256))
    look, minimum, maximum, deviation = look[some], minimum[some], maximum[some], deviation[some]
    low, high = minimum.unsqueeze(-1), maximum.unsqueeze(-1)
    back = from_bins(to_bins(look, minimum, maximum, bits), minimum, maximum, bits)
    if zero_bins:
        back = torch.where(back == zero_bin(minimum, maximum, bits).unsqueeze(-1), 0, back)
    step = (maximum.to(torch.float64) * 0.25 - minimum.to(torch.float64) * 0.25) / 2.0**bits
    off = (back.to(torch.float64) * 0.25 - look.to(torch.float64) * 0.25).abs() / step.unsqueeze(-1) * 2.0**16
    kept = (look >= low) & (look <= high) & (step > 0).unsqueeze(-1)
    off = torch.where(kept, off, 0.0).round().clamp(max=2.0**24).to(torch.int64)
    mean = (off * off).sum(-1).to(torch.float64) / kept.sum(-1).clamp(min=1)
    error = mean.sqrt() / 2.0**16 * step / deviation
    return root_mean_square(torch.where(mean > 0, error, 0.0))


def zero_bin(minimum: Tensor, maximum: Tensor, bits: int) -> Tensor:
    """The centre of the bin that 0 falls into, of each range; NaN where 0 is not in it."""
    zero = to_bins(torch.zeros_like(minimum).unsqueeze(-1), minimum, maximum, bits)
    centre = from_bins(zero, minimum, maximum, bits).squeeze(-1)
    return torch.where((minimum <= 0) & (maximum >= 0), centre, math.nan)


def as_rows(flat: Tensor, per: str, width: int, block_size: int | None) -> Sequence[Tensor]:
    """The groups of weights as rows; the last block may be shorter than the others."""
    if per == "tensor":
        return [flat.unsqueeze(0)]
    if per == "row":
        return [flat.view(-1, width)]
    assert block_size is not None
    whole = len(flat) // block_size * block_size
    parts = [flat[:whole].view(-1, block_size)] if whole else []
    return [*parts, flat[whole:].unsqueeze(0)] if whole < len(flat) else parts


class Options(NamedTuple):
    """Of :func:`compress`, as it takes them."""

    floor: float = 6
    probe_bits: int = 4
    bits: int | None = None
    fraction: float = 0.03
    per: str = "tensor"
    block_size: int | None = None
    nonfinite: str = "refuse"
    max_error: float = 0.02
    zero: str = "centre"
    allocated: int | None = None
    """Not an argument of compress: N to begin with, instead of H + floor; it grows as that does."""
    unit: float | None = None
    """Not an argument of compress: what max_error is a part of, instead of the standard deviation."""


class Grid(NamedTuple):
    """How a tensor is quantised."""

    weights: Tensor
    """Those given, with others of the range in the place of the exceptions."""
    bits: int
    minimum: Tensor
    """Of all of them, whatever shares a range."""
    maximum: Tensor
    exceptions: Tensor | None
    """The places of what is kept exactly: int64, rising; None where nothing is."""
    entropy: float
    """What the bits came from, or NaN."""
    error: float
    """The rms error relative to the standard deviation; 0 where it is not passed for certain."""
    levels: float = 0.0
    """Of the range, so many steps would keep to the error, if that was asked for and found by its formula; else 0."""
    stretch: float = 1.0
    """The range is made so many times as long, for a step between those of two numbers of bits (one range only)."""


def stretched(grid: Grid) -> Tensor:
    """The upper end of the range made longer, rounded down; as it was where there is no such number."""
    low, high = float(grid.minimum), float(grid.maximum)
    wanted = low + (high - low) * grid.stretch
    found = torch.tensor(wanted, dtype=torch.float64).to(grid.maximum.dtype)
    if float(found) > wanted:
        found = torch.nextafter(found, torch.zeros_like(found).fill_(low))
    longer = math.isfinite(float(found)) and float(found) > high
    return found.to(grid.maximum.device) if longer else grid.maximum


class Palette(NamedTuple):
    """A tensor of few different values."""

    values: Tensor
    symbols: Tensor


def find_grid(w: Tensor, options: Options) -> Grid | Palette | None:
    """What compress does with weights (at least one); None: no grid serves, keep their bytes."""
    flat, given, max_error = dense(w), options.bits, options.max_error
    zero_bins = options.zero == "exact"
    exceptions = None
    weights = flat
    if options.nonfinite == "keep":
        bad = ~flat.isfinite()
        if bool(bad.any()):
            exceptions, good = bad.nonzero().flatten(), flat[~bad]
            weights = torch.where(bad, good[0] if good.numel() else 0, flat).to(w.dtype)

    def measure(weights: Tensor) -> tuple[Tensor, Tensor, Tensor, float, int]:
        """Range, histogram of 256 bins, entropy and bits."""
        if given is not None:
            minimum, maximum, counts = probe("compress", weights, 8, LEAST_SAMPLE / weights.numel())
            return minimum, maximum, counts.cpu(), math.nan, given
        # The bins of fewer bits are unions of those of more.
        minimum, maximum, counts = probe("compress", weights, max(8, options.probe_bits), options.fraction)
        counts = counts.cpu()
        entropy = float(entropy_of(counts.view(1 << options.probe_bits, -1).sum(1)))
        if options.allocated is not None:
            return minimum, maximum, counts.view(256, -1).sum(1), math.nan, options.allocated
        return (
            minimum,
            maximum,
            counts.view(256, -1).sum(1),
            entropy,
            allocate_bits(entropy, floor=options.floor),
        )

    minimum, maximum, counts, entropy, bits = measure(weights)
    most = 0.0

    def grid(error: float = 0.0) -> Grid:
        by_formula = most if bits <= max(1, math.ceil(math.log2(max(most, 1.0)))) else 0.0
        return Grid(weights.view(w.shape), bits, minimum, maximum, exceptions, entropy, error, by_formula)

    by_histogram = options.per == "tensor" and options.unit is None
    if exceptions is None and (
        bool(minimum == maximum) or (by_histogram and is_plain(counts, bits, max_error, zero_bins))
    ):
        return grid()
    if int(counts.count_nonzero()) <= _FEW:
        palette = palette_of(flat, min(256, flat.numel() // 32, 256 if given is None else 1 << bits))
        if palette is not None:
            return Palette(*palette)
    if max_error == math.inf or bool(minimum == maximum):
        return grid()

    views = as_rows(weights, options.per, w.shape[-1] if w.ndim else 1, options.block_size)
    looks = [look_at(rows) for rows in views]
    ranges = [ranges_of(rows) for rows in views]
    spreads = [
        spread_of_groups(rows, look, span, max_error)
        for rows, look, (_, _, span) in zip(views, looks, ranges, strict=True)
    ]
    if options.unit is not None:
        for spread in spreads:
            spread.deviation.fill_(0.25 * options.unit)

    def needed() -> Tensor:
        found = [
            bins_needed(span, spread.deviation, max_error)
            for (_, _, span), spread in zip(ranges, spreads, strict=True)
        ]
        return torch.cat(found)

    def at_least(bits: int, levels: float) -> int:
        return max(bits, math.ceil(math.log2(max(levels, 1.0)))) if given is None else bits

    if options.per != "tensor":  # H, which is the whole tensor's, may be far from what its groups need
        bits = at_least(bits, min(2.0**16, float(needed().nan_to_num(0.0).median())))
    cuts = [
        outside(rows, spread, span, bits, max_error)
        if options.per == "tensor" or rows.shape[1] >= LEAST_GROUP
        else None
        for rows, spread, (_, _, span) in zip(views, spreads, ranges, strict=True)
    ]
    if any(cut is not None for cut in cuts):
        weights, first, found = weights.clone(), 0, [] if exceptions is None else [exceptions]
        for rows, spread, cut in zip(views, spreads, cuts, strict=True):
            if cut is not None:
                place, row = cut
                weights[first + place] = (spread.middle * 4).to(rows.dtype).to(rows.device)[row]
                found.append(first + place)
            first += rows.numel()
        exceptions = torch.cat(found).sort().values
        minimum, maximum, counts, entropy, bits = measure(weights)
        views = as_rows(weights, options.per, w.shape[-1] if w.ndim else 1, options.block_size)
        ranges = [ranges_of(rows) for rows in views]
    if given is None:
        levels = needed()
        most = root_mean_square(levels.clamp(max=2.0**16) if len(levels) > 1 else levels)
        if most > 2.0**16:
            return None
        bits = at_least(bits, most)

    def error_of(bits: int) -> float:
        errors = [
            measured_error(look, low, high, bits, spread.deviation, zero_bins)
            for look, spread, (low, high, _) in zip(looks, spreads, ranges, strict=True)
        ]
        groups = [len(look) for look in looks]
        return math.sqrt(sum(n * error**2 for n, error in zip(groups, errors, strict=True)) / sum(groups))

    error = error_of(bits)
    for _ in range(16):  # a value that many share may lie at the edge of its bin
        if given is None and bits < 16 and error > max_error:
            bits += 1
            error = error_of(bits)
    return None if given is None and error > max_error else grid(error)


def ranges_of(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest and the largest weight of each row, and the quarter of what lies between, on the CPU."""
    minimum, maximum, _, info = WEIGHT_RANGE(rows, 0, 1)
    check_info("compress", info, [minimum, maximum], [])
    minimum, maximum = minimum.cpu(), maximum.cpu()
    return minimum, maximum, maximum.to(torch.float64) * 0.25 - minimum.to(torch.float64) * 0.25
