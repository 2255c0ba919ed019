"""Fuzz the ops: ``python -m tests.fuzz.run --calls 100000 --seed 1 --workers 2``.

Fails where a call ends its process, takes too long, raises what no user should see, raises though it is valid, or
changes what it should not. Where backends disagree about what they take is reported.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from tests.fuzz.targets import Target

HERE = Path(__file__).parent
BACKENDS = ("native", "python", "triton")
BATCH = {"native": 500, "python": 250, "triton": 10}
TRITON_SHARE = 400
"""One call in so many goes to Triton's interpreter, which takes a second for each."""
CPU_LIMIT = {"native": 10.0, "python": 10.0, "triton": 120.0}
"""Seconds of CPU time for a call."""
WALL_FACTOR = 10
"""Of the limit, in seconds by the clock: of a call that waits, or on a busy machine."""
MOST_EXAMPLES = 3


def guard_library(folder: Path) -> Path | None:
    """guard_malloc.c, built; None where there is no compiler."""
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    out = folder / "guard_malloc.so"
    command = [compiler, "-shared", "-fPIC", "-O2", "-o", out, HERE / "guard_malloc.c", "-ldl"]
    return out if subprocess.run(command, check=False).returncode == 0 else None


class Server:
    """A process of tests.fuzz.worker, and what it says."""

    def __init__(self, folder: Path, number: int, library: Path | None) -> None:
        self.errors = folder / f"stderr{number}.txt"
        environment = os.environ | {
            "TRITON_INTERPRET": "1",
            "OMP_NUM_THREADS": "1",
            "MALLOC_PERTURB_": "165",  # what was freed is not what it was
        }
        if library is not None:
            environment["LD_PRELOAD"] = str(library)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors.open("wb"),
            env=environment,
            cwd=HERE.parents[1],
        )
        self.rest = b""
        if "ready" not in (self.read(300.0) or {}):
            raise RuntimeError(f"the worker did not start:\n{self.errors.read_text()[-3000:]}")

    def read(self, timeout: float) -> dict[str, Any] | None:
        """The next message; None if none comes in time."""
        end = time.monotonic() + timeout
        stdout = self.process.stdout
        assert stdout is not None
        while b"\n" not in self.rest:
            if not select.select([stdout], [], [], max(end - time.monotonic(), 0))[0]:
                return None
            data = os.read(stdout.fileno(), 1 << 16)
            if not data:
                raise RuntimeError(f"the worker ended:\n{self.errors.read_text()[-3000:]}")
            self.rest += data
        line, self.rest = self.rest.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def run(self, job: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A batch: outcomes, and at last, if its process died, one with ``died``."""
        before = self.errors.stat().st_size
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps(job) + "\n").encode())
        self.process.stdin.flush()
        pid, index, hung = 0, job["start"] - 1, False
        while True:
            message = self.read(WALL_FACTOR * job["limit"] if not hung else 60.0)
            if message is None:
                if not pid:
                    raise RuntimeError("the worker does not answer")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if hung else signal.SIGABRT)  # that one leaves a traceback
                hung = True
            elif "pid" in message:
                pid = message["pid"]
            elif "exit" in message:
                if message["exit"] > 0:
                    raise RuntimeError(f"the worker failed:\n{self.errors.read_text()[-3000:]}")
                if message["exit"] < 0:
                    yield {"index": index, "ok": False, "died": self._death(message["exit"], hung, before)}
                return
            elif "ok" in message:
                yield message
            else:
                index = message["index"]

    def _death(self, code: int, hung: bool, before: int) -> str:
        with self.errors.open("rb") as file:
            file.seek(before)
            text = file.read().decode(errors="replace")
        what = "hang" if hung or code == -signal.SIGPROF else "crash"
        return f"{what} ({'no answer' if hung else signal.Signals(-code).name})\n{_traceback(text)}"

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _traceback(text: str) -> str:
    """What was printed, without the frames that every call has."""
    dull = ("/fuzz/worker.py", "/fuzz/targets.py", "/torch/_", "Extension modules", "<frozen runpy>")
    lines = [line for line in text.splitlines() if line.strip() and not any(word in line for word in dull)]
    return "\n".join(lines)[:1500]


@dataclass
class Failure:
    op: str
    backend: str
    index: int
    kind: str
    text: str
    alone: bool = True
    """Whether the call does it in a process of its own as well."""
    first: int = 0
    """Of the calls before it in the same process."""
    keep: list[int] | None = None
    """The steps that are enough, if not all are needed."""


@dataclass
class Report:
    calls: int = 0
    accepted: int = 0
    failures: list[Failure] = field(default_factory=list)
    outcomes: dict[str, dict[int, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    unclear: list[tuple[str, str, int, str]] = field(default_factory=list)
    """Backend, public function, call and error, where that does not say whose it is."""
    shared: dict[tuple[str, str], list[int]] = field(default_factory=lambda: defaultdict(list))
    """Calls by op and backend."""
    seconds: float = 0.0

    def disagreements(self) -> Iterator[tuple[str, int, str, str]]:
        """Calls that one backend took and the other did not, or whose results differ in shape or dtype."""
        native, python = self.outcomes["native"], self.outcomes["python"]
        for index in sorted(native.keys() & python.keys()):
            a, b = native[index], python[index]
            if "died" in a or "died" in b:
                continue
            if a["ok"] != b["ok"]:
                taken, raised = ("native", b) if a["ok"] else ("python", a)
                yield a["op"], index, f"{taken} takes it, the other does not", raised["error"]
            elif a["ok"] and a["results"] != b["results"]:
                yield a["op"], index, "results differ", f"native {a['results']}, python {b['results']}"


def _kind(outcome: dict[str, Any]) -> str | None:
    if "died" in outcome:
        return outcome["died"].split("\n", 1)[0]
    return outcome.get("failure")


class Run:
    """Batches in a queue, and workers that make them."""

    def __init__(self, options: argparse.Namespace, sabotage: bool = False) -> None:
        self.options = options
        self.sabotage = sabotage
        """Calls that it must notice instead of those of ops, for its own tests."""
        self.report = Report()
        self.lock = threading.Lock()
        self.jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self.queued = 0
        self.examples: Counter[tuple[str, str, str]] = Counter()
        self.problem: BaseException | None = None

    def targets(self, backend: str) -> Sequence[Target]:
        from tests.fuzz.targets import targets

        return targets(backend, self.options.public, self.options.op)

    def job(self, backend: str, start: int, stop: int, keep: Sequence[int] | None = None) -> dict[str, Any]:
        o = self.options
        job = {"seed": o.seed, "public": o.public, "op": o.op, "backend": backend, "sabotage": self.sabotage}
        return job | {"limit": o.limit or CPU_LIMIT[backend], "start": start, "stop": stop, "keep": keep}

    def enqueue(self, backend: str, start: int, stop: int, keep: Sequence[int] | None = None) -> None:
        self.jobs.put(self.job(backend, start, stop, keep))
        self.queued += stop - start

    def enqueue_all(self) -> None:
        """The calls that were asked for; native and Python get the same ones."""
        from cfl_ops._core import dispatch

        o = self.options
        if o.backend == "all":
            triton = o.calls // TRITON_SHARE if dispatch.triton_available() and self.targets("triton") else 0
            backends = ("native", "python") if dispatch.extension_available() else ("python",)
            counts = dict.fromkeys(backends, (o.calls - triton) // len(backends)) | {"triton": triton}
        else:
            counts = {o.backend: o.calls}
        for backend, count in counts.items():
            for start in range(0, count, BATCH[backend]):
                self.enqueue(backend, start, min(start + BATCH[backend], count))

    def work(self, server: Server, bar: Any) -> None:
        try:
            while True:
                try:
                    job = self.jobs.get_nowait()
                except queue.Empty:
                    return
                self.batch(server, job, bar)
        except BaseException as error:
            self.problem = error

    def batch(self, server: Server, job: dict[str, Any], bar: Any) -> None:
        start = job["start"]
        while start < job["stop"]:
            first, start, failed = start, job["stop"], []
            for outcome in server.run(job | {"start": first}):
                self.take(job["backend"], outcome, bar)
                if _kind(outcome) is not None:
                    failed.append(outcome)
                if "died" in outcome:
                    start = max(outcome["index"], first) + 1
            for outcome in failed:
                self.examine(server, job["backend"], outcome, first)

    def take(self, backend: str, outcome: dict[str, Any], bar: Any) -> None:
        with self.lock:
            bar.update()
            self.report.calls += 1
            self.report.accepted += outcome["ok"]
            if outcome.get("shared"):
                self.report.shared[outcome["op"], backend].append(outcome["index"])
            error = outcome.get("error", "")
            if outcome.get("op", "").startswith("public.") and error and ": cfl_ops" not in error:
                self.report.unclear.append((backend, outcome["op"], outcome["index"], error))
            if self.options.backend == "all":
                self.report.outcomes[backend][outcome["index"]] = outcome

    def add(self, failure: Failure) -> None:
        with self.lock:
            self.report.failures.append(failure)

    def examine(self, server: Server, backend: str, outcome: dict[str, Any], first: int) -> None:
        """A failure: is it one in a process of its own, and with fewer steps?"""
        from tests.fuzz.mutate import make_call

        index, kind = outcome["index"], _kind(outcome)
        text = outcome["died"] if "died" in outcome else outcome.get("error", "it returned")
        if self.sabotage:
            self.add(Failure("", backend, index, kind, text))
            return
        call = make_call(self.targets(backend), self.options.seed, index)
        failure = Failure(call.target.name, backend, index, kind, text, first=first)
        with self.lock:
            self.examples[failure.op, backend, kind] += 1
            known = self.examples[failure.op, backend, kind] > MOST_EXAMPLES
        if not known and not kind.startswith("hang"):  # that would take as long again
            failure.alone = self.again(server, backend, index, None) == kind
            keep = list(range(call.count))
            for step in range(call.count) if failure.alone and call.count > 1 else ():
                fewer = [k for k in keep if k != step]
                if self.again(server, backend, index, fewer) == kind:
                    keep = fewer
            failure.keep = keep if len(keep) < call.count else None
        self.add(failure)

    def again(self, server: Server, backend: str, index: int, keep: list[int] | None) -> str | None:
        """The kind of failure that the call is in a process of its own."""
        kinds = [_kind(outcome) for outcome in server.run(self.job(backend, index, index + 1, keep))]
        return kinds[-1] if kinds else None

    def how(self, failure: Failure) -> str:
        """The command that makes the call again."""
        o = self.options
        where = f"{o.seed}:{failure.index}" if failure.alone else f"{o.seed}:{failure.first}-{failure.index}"
        if failure.keep is not None:
            where += "/" + ",".join(map(str, failure.keep))
        op = f" --op {o.op}" if o.op else ""
        public = "" if o.public else " --no-public"
        return f"python -m tests.fuzz.run --backend {failure.backend}{op}{public} --reproduce {where}"

    def go(self) -> Report:
        for backend in BACKENDS:
            self.targets(backend)  # before threads ask for them
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="fuzz") as name:
            folder = Path(name)
            library = guard_library(folder)
            if library is None:
                print("no C compiler: only the arguments lie at guard pages", file=sys.stderr)
            servers = [Server(folder, i, library) for i in range(self.options.workers)]
            with tqdm(
                total=self.queued, desc="fuzz", unit=" calls", disable=self.options.quiet, smoothing=0.05
            ) as bar:
                threads = [threading.Thread(target=self.work, args=(server, bar)) for server in servers]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            for server in servers:
                server.close()
        if self.problem is not None:
            raise self.problem
        self.report.seconds = time.monotonic() - began
        return self.report

    def lines(self) -> Iterator[str]:
        """The report."""
        from tests.fuzz.mutate import describe, make_call

        r, o = self.report, self.options
        groups: dict[tuple[str, str, str], list[Failure]] = defaultdict(list)
        for failure in r.failures:
            groups[failure.op, failure.backend, failure.kind].append(failure)
        yield (f"{r.calls} calls ({r.accepted} returned) in {r.seconds:.0f} s, seed {o.seed}: "
               f"{len(r.failures)} failures of {len(groups)} kinds")  # fmt: skip
        for (op, backend, kind), failures in sorted(groups.items()):
            simple = min(
                failures, key=lambda f: (not f.alone, len(f.keep) if f.keep is not None else 9, f.index)
            )
            yield f"\n## {op}, {backend}: {kind} ({len(failures)} times)"
            if self.sabotage:
                yield simple.text
                continue
            call = make_call(self.targets(backend), o.seed, simple.index, simple.keep)
            yield from describe(call)
            if not simple.alone:
                yield f"    not alone: only after the calls from {simple.first} on, in one process"
            yield f"    {self.how(simple)}"
            yield "    | " + simple.text.strip().replace("\n", "\n    | ")
        unclear = defaultdict(list)
        for backend, op, index, error in r.unclear:
            unclear[op, error.split(":")[0]].append((backend, index, error))
        if unclear:
            yield f"\n# Errors of public functions that do not begin with cfl_ops: {len(r.unclear)} (no failure)"
        for (op, _), items in sorted(unclear.items()):
            backend, index, text = items[0]
            yield f"- {op} ({len(items)} times), {backend} {o.seed}:{index}: {text[:150]}"
        if r.shared:
            yield "\n# Took arguments that share memory with what they write (no failure)"
        for (op, backend), indices in sorted(r.shared.items()):
            yield f"- {op}, {backend} ({len(indices)} times), first {o.seed}:{min(indices)}"
        found = defaultdict(list)
        for op, index, what, text in r.disagreements():
            found[op, what].append((index, text))
        if found:
            yield f"\n# native and python disagree on {sum(map(len, found.values()))} calls (no failure)"
        for (op, what), items in sorted(found.items()):
            index, text = items[0]
            yield f"- {op}: {what} ({len(items)} times), first {o.seed}:{index}: {text}"


def reproduce(options: argparse.Namespace) -> Run:
    """``SEED:INDEX``, ``SEED:FIRST-LAST`` or ``SEED:INDEX/STEPS``."""
    from tests.fuzz.mutate import describe, make_call

    seed, _, rest = options.reproduce.partition(":")
    calls, _, steps = rest.partition("/")
    first, _, last = calls.partition("-")
    options.seed, options.workers = int(seed), 1
    keep = [int(step) for step in steps.split(",") if step] if "/" in rest else None
    run = Run(options)
    start, stop = int(first), int(last or first) + 1
    for backend in ("native", "python") if options.backend == "all" else (options.backend,):
        run.enqueue(backend, start, stop, keep)
    print(*describe(make_call(run.targets(backend), options.seed, stop - 1, keep)), sep="\n", flush=True)
    return run


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000, help="over all backends (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--op", help="one op (gram), or one public function (public.gram)")
    parser.add_argument("--backend", choices=("all", *BACKENDS), default="all")
    parser.add_argument(
        "--public", action=argparse.BooleanOptionalAction, default=True, help="public functions too"
    )
    parser.add_argument("--limit", type=float, help="seconds of CPU time for a call")
    parser.add_argument("--reproduce", metavar="SEED:INDEX", help="make one call again")
    parser.add_argument("--report", type=Path, help="write the report there as well")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    for text in ("ComplexHalf", "Sparse", "Casting complex"):  # of torch, about what is asked for
        warnings.filterwarnings("ignore", text)
    if options.reproduce:
        run = reproduce(options)
    else:
        run = Run(options)
        run.enqueue_all()
    run.go()
    text = "\n".join(run.lines())
    print(text)
    if options.report:
        options.report.write_text(text + "\n")
    return 1 if run.report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
