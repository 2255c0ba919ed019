"""Makes calls in fresh processes: a server that has imported everything forks one for each batch.

A line of JSON on stdin asks for calls; lines on stdout tell of each call before it is made and after. So the last
line before the process died names the call that it died of.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import cfl_ops
import torch
from cfl_ops._core import dispatch
from torch import Tensor

from tests.fuzz.mutate import Call, Placed, make_call, realize
from tests.fuzz.targets import targets

MOST_MEMORY = 1 << 30
"""What a batch may map beyond what is mapped when it begins."""

warnings.simplefilter("ignore")

OF_TORCH = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, MemoryError)
OF_PUBLIC = (RuntimeError, ValueError, TypeError, NotImplementedError, MemoryError)
INTERNAL = (
    "INTERNAL ASSERT",
    "bug to PyTorch",
    "vector::",
    "basic_string",
    "bad_optional",
    "bad_array_new",
    "max_size()",
    "Unknown exception",
    "unknown exception",
)


def run_call(call: Call, backend: str) -> dict[str, Any]:
    """What came of it: ``failure`` says what is wrong, if something is."""
    placed = realize(call)
    try:
        return _run(call, placed, backend)
    finally:
        placed.free()


def _run(call: Call, placed: Placed, backend: str) -> dict[str, Any]:
    failures: list[str] = []
    outcome: dict[str, Any] = {"ok": True}
    try:
        with _mode(call.mode):
            out = call.target.function(backend, *placed.args)
        outcome["results"] = _shapes(out)
        if call.mode == "requires_grad":
            _differentiate(out, placed)
        del out
    except Exception as error:
        message = str(error)
        outcome = {"ok": False, "error": f"{type(error).__name__}: {message[:300]}"}
        if call.valid:
            failures.append("a valid call raised")
        if not isinstance(error, OF_PUBLIC if call.target.public else OF_TORCH):
            failures.append("an exception of an unexpected type")
        if any(text in message for text in INTERNAL):
            failures.append("a message from the inside")
        del error
    failures += _changes(call, placed, outcome["ok"])
    if failures:
        outcome["failure"] = "; ".join(failures)
    return outcome


def _differentiate(out: Any, placed: Placed) -> None:
    """The derivative must not end the process; whether it is right the contract table asks."""
    outputs = [t for t in ((out,) if isinstance(out, Tensor) else out) if isinstance(t, Tensor) and t.requires_grad]
    inputs = [arg for arg in placed.args if isinstance(arg, Tensor) and arg.requires_grad]
    if outputs and inputs:
        with contextlib.suppress(*OF_TORCH):
            torch.autograd.grad([t.sum() for t in outputs], inputs, allow_unused=True)


def _mode(mode: str) -> contextlib.AbstractContextManager[Any]:
    if mode == "no_grad":
        return torch.no_grad()
    return torch.inference_mode() if mode == "inference_mode" else contextlib.nullcontext()


def _shapes(out: Any) -> list[str]:
    if isinstance(out, Tensor):
        return [f"{str(out.dtype)[6:]}{list(out.shape)}"]
    if isinstance(out, (tuple, list)):
        return [shape for value in out for shape in _shapes(value)]
    return [type(out).__name__]


def _changes(call: Call, placed: Placed, returned: bool) -> list[str]:
    """Arguments that were changed and should not have been: all, if it raised; else those that it does not write."""
    written = {id(placed.regions[i]) for i in call.target.writes if i in placed.regions} if returned else set()
    return [
        f"{call.target.arguments[i]} was changed" + ("" if returned else ", and the call raised")
        for i, region in placed.regions.items()
        if id(region) not in written and region.now() != region.before
    ]


# For the fuzzer's own tests: what it must notice.


def _read_beyond(backend: str, t: Tensor, count: int) -> None:
    ctypes.string_at(t.data_ptr() + t.numel() * t.element_size(), 1)


def _write_beyond_own(backend: str, t: Tensor, count: int) -> None:
    own = torch.empty(100)
    ctypes.memset(own.data_ptr() + 400, 0, 113)


def _spin(backend: str, t: Tensor, count: int) -> None:
    while True:
        pass


def _sleep(backend: str, t: Tensor, count: int) -> None:
    signal.pause()


def _write_and_raise(backend: str, t: Tensor, count: int) -> None:
    t.add_(1)
    raise ValueError("after a write")


def _wrong_type(backend: str, t: Tensor, count: int) -> None:
    raise SystemError("error return without exception set")


SABOTAGE: dict[str, Callable[..., Any]] = {
    "read_beyond": _read_beyond,
    "write_beyond_own": _write_beyond_own,
    "spin": _spin,
    "sleep": _sleep,
    "write_and_raise": _write_and_raise,
    "wrong_type": _wrong_type,
}


def sabotage_call(name: str) -> Call:
    from tests.fuzz.mutate import Slot
    from tests.fuzz.targets import Target

    target = Target(name, ("t", "count"), ("Tensor", "int"), (), SABOTAGE[name])
    return Call(target, "sabotage", "plain", [Slot(torch.ones(7)), Slot(3)], ["sabotage"], 1)


def batch(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """The calls of a job, in this process."""
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)  # a traceback, then death
    cfl_ops.config.set_backend(job["backend"])
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: PTH123, SIM115
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    chosen = targets(job["public"], job["op"])
    for index in range(job["start"], job["stop"]):
        if sabotage := job.get("sabotage"):
            call = sabotage_call(sabotage)
        else:
            call = make_call(chosen, job["seed"], index, job.get("keep"))
        if job["backend"] not in call.target.backends and not (call.target.public or sabotage):
            tell({"index": index, "skipped": True})
            continue
        tell({"index": index})
        signal.setitimer(signal.ITIMER_PROF, job["limit"])
        outcome = run_call(call, job["backend"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        outcome |= {"index": index, "op": call.target.name, "valid": call.valid}
        tell(outcome)


def serve() -> None:
    pipe = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer

    def tell(message: dict[str, Any]) -> None:
        data = (json.dumps(message) + "\n").encode()
        while data:
            data = data[os.write(pipe, data) :]

    torch.set_num_threads(1)
    if dispatch.extension_available():
        from cfl_ops import _C

        _C.poison_fresh_memory(True)
    targets()
    tell({"ready": True})
    for line in sys.stdin:
        job = json.loads(line)
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                tell({"pid": os.getpid()})
                batch(job, tell)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        tell({"exit": os.waitstatus_to_exitcode(status)})


if __name__ == "__main__":
    serve()
