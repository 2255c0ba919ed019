"""On a GPU: what the card can do, then every op's time over its floor and against the vendor's library, in tables.

``python benches/gpu_table.py --family solve --out FOLDER`` writes gpu_table.json and gpu_table.md after each row, so
that a run which is cut off leaves what it had. One process a family is how it is meant: an error that loses the
GPU's context ends its process only. ``--device cpu --small`` rehearses it. Needs nothing but torch and cfl_ops; CuPy,
QuACK, nvCOMP and dietgpu are peers where they are installed. The rows are those of gpu_cases.py.

Columns:

- *device*: between two events around one call. The GPU is kept busy until the call has returned, so that its kernels
  stand in a queue: without that the events measure the launcher.
- *host*: the call by the host's clock, on an idle GPU, which is not waited for.
- *waits*: the call itself waits for the GPU (or takes the host over 8 ms), so that it could not be queued; *device*
  holds the host's gaps, too.
- *loop*: each of many calls back to back, for small calls: what a training loop sees.
- *floor*: the larger of the bytes over the measured rate of copies and the operations over the measured rate of the
  unit that does them. Inputs that fit the L2 cache are found there: a small call can be below its floor of bytes.
- *ratio*: the fastest peer's device time over ours. *loop ratio*: the same of max(host, device), which is what a loop
  of calls costs.
- *off by*: the largest difference from a reference over its largest value; for symbols the share that differs.

Times are medians of interleaved rounds. Exit status: 0; 1 if a row failed or was not reached; 5 without a device; 70
if the GPU's context was lost (what was measured before is written); 130 if interrupted.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import importlib.metadata
import json
import os
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import cfl_ops
import torch
from gpu_cases import FAMILIES, NOTES, Call, Case, Peers, Work, with_precision

T = TypeVar("T")
Row = dict[str, Any]

LOST = 70
"""The exit status after an error that no later call survives."""


WRONG = 0.01
"""A result so far from its reference, or NaN, is a failure: TF32's products come near 0.001."""


class ContextLost(Exception):
    """Nothing runs on the GPU any more."""


# The clock


@dataclass
class Timing:
    """Seconds of a call."""

    host: float
    device: float
    waits: bool = False
    loop: float | None = None

    @property
    def cost(self) -> float:
        return max(self.host, self.device)

    def report(self) -> dict[str, Any]:
        loop = None if self.loop is None else self.loop * 1e3
        return {
            "device ms": self.device * 1e3,
            "host ms": self.host * 1e3,
            "waits": self.waits,
            "loop ms": loop,
        }


class Series:
    """What was measured of one call so far."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.host: list[float] = []
        self.device: list[tuple[float, bool]] = []
        """Seconds, and whether the GPU was waiting for the host."""
        self.ahead = 0.0
        """Seconds that the GPU is kept busy before the call."""

    def timing(self, loop: float | None) -> Timing:
        queued = [seconds for seconds, late in self.device if not late]
        seconds = statistics.median(queued or [seconds for seconds, _ in self.device])
        return Timing(statistics.median(self.host), seconds, not queued, loop)


class Clock:
    """Times of calls, by the host's clock and by the GPU's events; on a CPU both are the host's."""

    MARGIN, LONGEST = 1e-4, 8e-3
    """Seconds that the GPU is kept busy: beyond the host's time, and at most."""

    def __init__(self, device: str, quick: bool = False) -> None:
        self.gpu = device == "cuda"
        self.rounds, self.loop_seconds = (5, 3e-4) if quick else (40, 5e-3)
        if self.gpu:
            torch.cuda._sleep(1000)
            self.idle()
            cycles = 5_000_000
            self.cycles = cycles / self.between(lambda: torch.cuda._sleep(cycles))

    def idle(self) -> None:
        if self.gpu:
            torch.cuda.synchronize()

    def lost(self) -> bool:
        """Whether an error has taken the GPU's context with it."""
        try:
            self.idle()
        except Exception:
            return True
        return False

    def warm(self, call: Call, calls: int = 2) -> float:
        """Compile, load, fill caches; seconds of the last call and its work."""
        for _ in range(calls - 1):
            call()
        self.idle()
        start = time.perf_counter()
        call()
        self.idle()
        return time.perf_counter() - start

    def host(self, call: Call) -> float:
        self.idle()
        start = time.perf_counter()
        call()
        taken = time.perf_counter() - start
        self.idle()
        return taken

    def between(self, call: Call) -> float:
        if not self.gpu:
            return self.host(call)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        return self.elapsed(begin, end)

    def elapsed(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return max(1e-7, begin.elapsed_time(end) / 1e3)  # their resolution is half a microsecond

    def queued(self, call: Call, ahead: float) -> tuple[float, bool]:
        """The call's kernels in a queue behind ``ahead`` seconds of work; and whether the call outlasted that."""
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(int(ahead * self.cycles))
        begin.record()
        call()
        late = begin.query()
        end.record()
        return self.elapsed(begin, end), late

    def round(self, series: Series) -> None:
        """One more measurement of each kind."""
        taken = self.host(series.call)
        series.host.append(taken)
        if not self.gpu:
            series.device.append((taken, False))
            return
        series.ahead = series.ahead or min(self.LONGEST, 2 * taken + self.MARGIN)
        seconds, late = self.queued(series.call, series.ahead)
        while late and series.ahead < self.LONGEST:
            series.ahead = min(self.LONGEST, 4 * series.ahead)
            seconds, late = self.queued(series.call, series.ahead)
        series.device.append((seconds, late))

    def loop(self, call: Call, each: float) -> float | None:
        """Seconds of each of many calls back to back; of long calls that says nothing new."""
        if each > 2e-3:
            return None
        count = max(5, min(200, int(self.loop_seconds / each)))

        def many() -> None:
            for _ in range(count):
                call()

        return statistics.median(self.between(many) for _ in range(3)) / count

    def times(self, calls: Peers, seconds: float) -> dict[str, Timing]:
        """Medians of interleaved rounds of calls that are warm: at least 3, or 1 where they take long."""
        start = time.perf_counter()
        every = {name: Series(call) for name, call in calls.items()}
        for rounds in range(1, self.rounds + 1):
            for series in every.values():
                self.round(series)
            spent = time.perf_counter() - start
            if spent > 3 * seconds or (spent > seconds and rounds >= 3):
                break
        return {name: s.timing(self.loop(s.call, s.timing(None).cost)) for name, s in every.items()}


# A row


def attempt(row: Row, where: str, call: Callable[[], T], clock: Clock | None) -> T | None:
    """What the call returns; what goes wrong is written into the row, and None returned."""
    try:
        return call()
    except Exception as error:
        note(row, where, error)
        if clock is not None and clock.lost():
            raise ContextLost(where) from error
        return None


def note(row: Row, where: str, error: BaseException) -> None:
    line = f"{type(error).__name__}: {error}".split("\n")[0][:200]
    text = "".join(traceback.format_exception(error))
    row.setdefault("failures", []).append({"where": where, "error": line, "traceback": text})


def ceilings(report: dict[str, Any], options: argparse.Namespace, clock: Clock) -> None:
    """Bytes per second of a copy (read plus written), and FLOP/s of matrix products by type; about 2 seconds."""
    device, small, rates = options.device, options.small, report["ceilings"]

    def copy() -> float:
        n = (1 << 22) if small else (1 << 28)
        source = torch.randn(n, device=device)
        return 8 * n / time_of(partial(torch.empty_like(source).copy_, source))

    def product(dtype: torch.dtype, precision: str, n: int) -> float:
        n = 256 if small else n
        a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
        return 2 * n**3 / time_of(with_precision(precision, lambda: a @ b))

    def time_of(call: Call) -> float:
        clock.warm(call)
        return clock.times({"it": call}, 0.1)["it"].device

    units: dict[str, Callable[[], float]] = {
        "copy": copy,
        "bfloat16": partial(product, torch.bfloat16, "highest", 8192),
        "tf32": partial(product, torch.float32, "high", 8192),
        "float32": partial(product, torch.float32, "highest", 4096),
        "float64": partial(product, torch.float64, "highest", 4096),
    }
    for unit, measured in units.items():
        if not rates.get(unit):  # neither known nor measured
            rates[unit] = attempt(report, f"ceiling of {unit}", measured, clock)
    rates["tf32x3"] = rates["tf32"] / 3 if rates["tf32"] else None


def measure(
    row: Row, case: Case, rates: dict[str, Any], clock: Clock, seconds: float, slow: set[str]
) -> None:
    """Fill in a row: ours first, then with the peers by turns, as long as there is time.

    A peer that takes over 50 ms and 20 times as long as ours is not timed by turns, and in later rows not at all.
    """
    start = time.perf_counter()

    def left() -> float:
        return start + seconds - time.perf_counter()

    work = attempt(row, "making it", case.make, clock)
    if work is None or attempt(row, "ours", lambda: clock.warm(work.ours), clock) is None:
        return
    timings = attempt(row, "ours", lambda: clock.times({"ours": work.ours}, min(0.05, seconds / 4)), clock)
    if timings is None:
        return
    enter(row, work, timings, rates)
    if work.check is not None:
        off = row["off by"] = attempt(row, "check", work.check, clock)
        if off is not None and not off < WRONG:
            note(row, "check", ValueError(f"ours is off by {off:.2g} of the reference's largest value"))
    peers = dict(work.peers)
    for library in work.libraries:
        peers |= attempt(row, "preparing peers", library, clock) or {}
    calls, once = {"ours": work.ours}, {}
    for name, call in peers.items():
        if name in slow or (left() < 0 and len(calls) + len(once) > 1):
            row.setdefault("left out", []).append(name)
            continue
        taken = attempt(row, name, lambda call=call: clock.warm(call), clock)  # type: ignore[misc]
        if taken is None:
            continue
        limit = max(0.05, 20 * timings["ours"].cost)
        if taken > limit:  # once more: the machine may have been busy
            taken = min(taken, attempt(row, name, lambda call=call: clock.warm(call, 1), clock) or taken)  # type: ignore[misc]
        if taken > limit:
            once[name] = Timing(taken, taken)
            slow.add(name)
        else:
            calls[name] = call
    together = attempt(row, "by turns", lambda: clock.times(calls, max(left(), seconds / 4)), clock)
    enter(row, work, (together or timings) | once, rates)


def enter(row: Row, work: Work, timings: dict[str, Timing], rates: dict[str, Any]) -> None:
    """The figures of a row, from its times."""
    ours = timings["ours"]
    peers = {name: timing for name, timing in timings.items() if name != "ours"}
    row |= ours.report() | {"peers": {name: timing.report() for name, timing in peers.items()}}
    floors = {
        kind: amount / rates[kind]
        for kind, amount in (("copy", work.bytes_moved), (work.unit, work.flops))
        if amount and rates.get(kind)
    }
    if floors:
        bound = max(floors, key=floors.__getitem__)
        row |= {"floor ms": floors[bound] * 1e3, "bound": "bytes" if bound == "copy" else bound}
        row["x floor"] = ours.device / floors[bound]
        if "copy" in floors:
            row["bytes floor ms"] = floors["copy"] * 1e3
    if work.count:
        row["rate"], row["counted"] = work.count / ours.device, work.counted
    if peers:
        peer = min(peers, key=lambda name: peers[name].device)
        cheap = min(peers, key=lambda name: peers[name].cost)
        row |= {"peer": peer, "ratio": peers[peer].device / ours.device}
        row |= {"loop peer": cheap, "loop ratio": peers[cheap].cost / ours.cost}


def backend(op: str, device: str) -> str:
    try:
        return cfl_ops.config.backend_of(op, device)
    except Exception:
        return "-"


# The report

COLUMNS = (
    "case", "backend", "device ms", "host ms", "waits", "loop ms", "floor ms", "x floor", "fastest peer", "device ms",
    "host ms", "ratio", "loop ratio", "asked", "rate", "off by",
)  # fmt: skip
RATES = {"symbols": (1e9, "Gsym/s"), "systems": (1e6, "M systems/s")}


def cells(row: Row) -> list[str]:
    def show(source: Row, key: str, form: str) -> str:
        value = source.get(key)
        return "" if value is None else format(value, form)

    peer = row["peers"].get(row.get("peer"), {})
    name = row.get("peer", "")
    loop = show(row, "loop ratio", ".2f")
    if loop and row["loop peer"] != name:
        loop += f" ({row['loop peer']})"
    unit, suffix = RATES.get(row.get("counted", ""), (1.0, ""))
    rate = f"{row['rate'] / unit:.4g} {suffix}" if "rate" in row else ""
    floor = show(row, "floor ms", ".4f")
    if floor:
        other = (
            f", bytes {row['bytes floor ms']:.4f}"
            if row["bound"] != "bytes" and "bytes floor ms" in row
            else ""
        )
        floor += f" ({row['bound']}{other})"
    asked = row.get("asked")
    return [
        row["case"], row["backend"], show(row, "device ms", ".4f"), show(row, "host ms", ".4f"),
        "yes" if row["waits"] else "", show(row, "loop ms", ".4f"), floor, show(row, "x floor", ".2f"), name,
        show(peer, "device ms", ".4f") + (", waits" if peer.get("waits") else ""), show(peer, "host ms", ".4f"),
        show(row, "ratio", ".2f"), loop, "" if asked is None else str(asked), rate, show(row, "off by", ".1e"),
    ]  # fmt: skip


def line(row: Row) -> str:
    """A row of the table; of one that failed, why."""
    if "not run" in row:
        return f"| limit reached ({row['why']}), not run: {'; '.join(row['not run'])} |" + " |" * (
            len(COLUMNS) - 1
        )
    if "device ms" in row:
        return f"| {' | '.join(cells(row))} |"
    failure = row.get("failures", [{"where": "", "error": "not finished"}])[-1]
    why = f"**FAILED** ({failure['where']}): {failure['error']}".replace("|", "/")
    return f"| {row['case']} | {row['backend']} | {why} |" + " |" * (len(COLUMNS) - 3)


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [f"# {report['device']}, {report['date']}", ""]
    lines += [
        f"{key}: {report[key]}  " for key in ("software", "CUDA C++", "peers installed") if key in report
    ]
    if report.get("ended"):
        lines += ["", f"**{report['ended']}**"]
    if report.get("running"):
        lines += ["", f"**Cut off in: {report['running']}**"]
    lines += ["", "| ceiling | measured |", "| --- | --- |"]
    for name, rate in report["ceilings"].items():
        shown = (
            "-" if not rate else f"{rate / 1e9:.0f} GB/s" if name == "copy" else f"{rate / 1e12:.2f} TFLOP/s"
        )
        lines.append(f"| {name} | {shown} |")
    for family in dict.fromkeys(row["family"] for row in report["rows"]):
        lines += ["", f"## {family}", ""]
        lines += [NOTES[family], ""] if family in NOTES else []
        lines += [f"| {' | '.join(COLUMNS)} |", "|" + " --- |" * len(COLUMNS)]
        lines += [line(row) for row in report["rows"] if row["family"] == family]
    left_out = [(row["case"], row["left out"]) for row in report["rows"] if "left out" in row]
    if left_out:
        lines += ["", "Peers that were slow in a row before, or for which no time was left:", ""]
        lines += [f"- {case}: {', '.join(names)}" for case, names in left_out]
    failures: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in (report, *report["rows"]):
        for failure in row.get("failures", ()):
            same = failures.setdefault((failure["where"], failure["error"]), [])
            same.append((row.get("case", "the run"), failure["traceback"]))
    if failures:
        lines += ["", "## What failed"]
    for (where, error), rows in failures.items():
        lines += ["", f"{where}, {error}", "", f"in: {'; '.join(case for case, _ in rows)}", ""]
        lines += ["```", rows[0][1].rstrip(), "```"]
    return "\n".join(lines) + "\n"


def write(report: dict[str, Any], folder: Path) -> None:
    """Both files, each whole or as it was."""
    for name, text in (
        ("gpu_table.json", json.dumps(report, indent=1) + "\n"),
        ("gpu_table.md", markdown(report)),
    ):
        fresh = folder / f"{name}.new"
        fresh.write_text(text)
        fresh.replace(folder / name)


def versions() -> str:
    found = [f"torch {torch.__version__}", f"CUDA {torch.version.cuda}", f"python {sys.version.split()[0]}"]
    for package in ("triton", "numpy"):
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def peers_installed() -> str:
    """Of the packages that hold peers; dietgpu has none, see gpu_cases."""
    packages = (
        "cupy",
        "cupy-cuda13x",
        "cupy-cuda12x",
        "quack-kernels",
        "nvidia-nvcomp-cu13",
        "nvidia-nvcomp-cu12",
    )
    found = [f"MAGMA {'with' if torch.cuda.has_magma else 'without'}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


# The run


def run(report: dict[str, Any], options: argparse.Namespace, until: float) -> None:
    """Every row of every family, each with its share of the time that is left."""
    clock = attempt(report, "the clock", lambda: Clock(options.device, options.small), None)
    if clock is None:
        raise ContextLost("the clock")
    cases = [
        (family, case)
        for family in options.family or FAMILIES
        for case in FAMILIES[family](options.device, options.small)
    ]
    slow: dict[str, set[str]] = {}
    index = -1
    try:
        ceilings(report, options, clock)
        begin(report, cases[0][1], options.out)
        for index, (family, case) in enumerate(cases):
            left = until - time.perf_counter()
            if left <= 0:
                not_run(report, cases[index:], "time")
                return
            row = {"family": family, "case": case.name, "op": case.op, "size": case.size, "dtype": case.dtype}
            row |= {"backend": backend(case.op, options.device), "asked": case.asked}
            report["rows"].append(row)
            share = min(options.row_seconds, max(0.05, left / (len(cases) - index)))
            measure(row, case, report["ceilings"], clock, share, slow.setdefault(family, set()))
            print(progress(row), flush=True)
            begin(report, cases[index + 1][1] if index + 1 < len(cases) else None, options.out)
            attempt(row, "freeing memory", lambda: free(clock), clock)
    except (ContextLost, KeyboardInterrupt) as error:
        lost = isinstance(error, ContextLost)
        if not lost:
            note(report, "interrupted", error)
        not_run(report, cases[index + 1 :], "the context is lost" if lost else "interrupted")
        raise


def begin(report: dict[str, Any], case: Case | None, folder: Path) -> None:
    """Write what there is, and which row comes: a process that hangs or dies leaves its name."""
    report["running"] = case and case.name
    write(report, folder)


def free(clock: Clock) -> None:
    gc.collect()
    if clock.gpu:
        torch.cuda.empty_cache()


def not_run(report: dict[str, Any], cases: Sequence[tuple[str, Case]], why: str) -> None:
    for family in dict.fromkeys(family for family, _ in cases):
        names = [case.name for other, case in cases if other == family]
        report["rows"].append({"family": family, "case": "limit reached", "why": why, "not run": names})


def progress(row: Row) -> str:
    if "device ms" not in row:
        return f"{row['case']}: FAILED"
    ratio = f", {row['ratio']:.2f} x {row['peer']}" if "ratio" in row else ""
    return f"{row['case']}: device {row['device ms']:.4f} ms, host {row['host ms']:.4f} ms{ratio}"


def stop(number: int, frame: object) -> None:
    """GNU timeout sends the signal twice: the second must not end the writing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu-table"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a rehearsal")
    parser.add_argument("--seconds", type=float, default=200, help="stop starting rows after this time")
    parser.add_argument("--row-seconds", type=float, default=4, help="the most that a row may take")
    parser.add_argument("--family", action="append", choices=sorted(FAMILIES))
    parser.add_argument("--ceilings", type=Path, help="a gpu_table.json whose ceilings are taken")
    options = parser.parse_args(arguments)
    until = time.perf_counter() + options.seconds
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_table: there is no CUDA device (--device cpu --small rehearses)")
        return 5  # as pytest's: nothing to run
    torch.manual_seed(0)
    options.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "device": "CPU (a rehearsal)", "date": time.strftime("%Y-%m-%d"), "software": versions(), "CUDA C++": "?",
        "peers installed": peers_installed(), "ceilings": {}, "rows": [], "running": None, "ended": "",
    }  # fmt: skip
    if options.device == "cuda":
        report["device"] = attempt(report, "the device", torch.cuda.get_device_name, None) or "CUDA"
    report["CUDA C++"] = attempt(report, "config", lambda: cfl_ops.config.info()["CUDA C++"], None)
    if options.ceilings:
        report["ceilings"] = (
            attempt(report, "--ceilings", lambda: json.loads(options.ceilings.read_text())["ceilings"], None)
            or {}
        )
    status = 0
    gc.freeze()  # what the imports made need not be gone through after each row
    try:
        run(report, options, until)
    except ContextLost as error:
        status, report["ended"] = LOST, f"The GPU's context was lost ({error}): what came after was not run."
    except KeyboardInterrupt:
        status, report["ended"] = 130, "Interrupted: the table of what there was."
    except Exception as error:  # of this script itself
        note(report, "gpu_table", error)
        status, report["ended"] = 1, "gpu_table itself failed."
    finally:
        gc.unfreeze()
    report["running"] = None
    failed = any("failures" in row or "not run" in row for row in (report, *report["rows"]))
    write(report, options.out)
    print(markdown(report), flush=True)
    return status or int(failed)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)  # a script's background jobs would ignore it
    faulthandler.register(signal.SIGINT, chain=True)  # where a kernel hangs, only this says in which call
    result = main()
    if result == LOST:  # a tidy exit would meet the same error in destructors, and end with another status
        os._exit(result)
    raise SystemExit(result)
