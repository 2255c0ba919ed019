"""Ratios: ours and a peer timed in one run, interleaved, and printed beside the floor.

A bench is a pytest-benchmark test whose group names the problem; ``compare`` times every contender in turn,
again and again, and keeps each one's minimum, so that a busy machine slows all of them alike. The ratio, the
floor and the figure that was asked for go into ``benchmark.extra_info`` and onto the terminal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """The least seconds of each contender, by name; ours is called "ours"."""

    seconds: dict[str, float]

    @property
    def peer(self) -> str:
        """The fastest of the others."""
        return min((name for name in self.seconds if name != "ours"), key=self.seconds.__getitem__)

    @property
    def speedup(self) -> float:
        """The strongest peer's time over ours: above 1 we are faster."""
        return self.seconds[self.peer] / self.seconds["ours"]


def time_interleaved(
    contenders: dict[str, Callable[[], object]],
    *,
    budget: float = 1.0,
    least: int = 5,
    synchronize: bool = False,
) -> Timing:
    """The least time of each contender over interleaved rounds, for ``budget`` seconds or ``least`` rounds.

    A call shorter than 200 us is repeated inside one measurement.
    """

    def once(function: Callable[[], object], repeats: int) -> float:
        if synchronize:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        if synchronize:
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / repeats

    repeats = {}
    for name, function in contenders.items():
        once(function, 1)
        repeats[name] = max(1, int(2e-4 / max(once(function, 1), 1e-7)))
    best = dict.fromkeys(contenders, float("inf"))
    start, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - start < budget:
        for name, function in contenders.items():
            best[name] = min(best[name], once(function, repeats[name]))
        rounds += 1
        if rounds >= least and time.perf_counter() - start > 20 * budget:
            break
    return Timing(best)


ROWS: list[dict[str, object]] = []


def compare(
    benchmark,
    title: str,
    ours: Callable[[], object],
    peers: dict[str, Callable[[], object]],
    *,
    flops: float = 0.0,
    bytes_moved: float = 0.0,
    asked: float | None = None,
    budget: float = 1.0,
    note: str = "",
    synchronize: bool = False,
) -> Timing:
    """Time ours against the peers, let pytest-benchmark time ours, and record the ratio.

    Args:
        benchmark: the pytest-benchmark fixture.
        title: what the row of the table is called.
        ours: our call.
        peers: the others, by name; the ratio is to the fastest.
        flops: FLOPs that the problem needs (the triangle's, say), for the rate and the floor.
        bytes_moved: bytes that it must read and write.
        asked: the speedup to reach, if one was asked for.
        budget: seconds to spend.
        note: shown beside.
        synchronize: time a GPU.
    """
    timing = time_interleaved({"ours": ours, **peers}, budget=budget, synchronize=synchronize)
    _add_row(benchmark, title, timing, flops, bytes_moved, asked, note)
    benchmark.pedantic(ours, rounds=3, iterations=1, warmup_rounds=1)
    return timing


def record(
    benchmark,
    title: str,
    seconds: dict[str, float],
    *,
    flops: float = 0.0,
    bytes_moved: float = 0.0,
    asked: float | None = None,
    note: str = "",
) -> Timing:
    """As ``compare``, for times that were measured elsewhere (in a process of its own, say)."""
    timing = Timing(seconds)
    _add_row(benchmark, title, timing, flops, bytes_moved, asked, note)
    benchmark.pedantic(lambda: None, rounds=1)
    return timing


def _add_row(
    benchmark, title: str, timing: Timing, flops: float, bytes_moved: float, asked: float | None, note: str
) -> None:
    row = {
        "group": benchmark.group or "",
        "title": title,
        "ours_ms": timing.seconds["ours"] * 1e3,
        **{f"{name}_ms": value * 1e3 for name, value in timing.seconds.items() if name != "ours"},
        "peer": timing.peer,
        "speedup": timing.speedup,
        "asked": asked,
        "gflops": flops / timing.seconds["ours"] / 1e9 if flops else None,
        "gbytes": bytes_moved / timing.seconds["ours"] / 1e9 if bytes_moved else None,
        "note": note,
    }
    ROWS.append(row)
    benchmark.extra_info.update({key: value for key, value in row.items() if value is not None})
