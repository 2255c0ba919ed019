"""Makes calls in fresh processes: a server that has imported everything forks one for each batch.

A line of JSON on stdin asks for calls; lines on stdout tell of each call before it is made and after. So the last
line before the process died names the call that it died of.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import cfl_ops
import torch
from cfl_ops._core import dispatch
from torch import Tensor

from tests.fuzz import sabotage
from tests.fuzz.mutate import Call, Placed, make_call, realize
from tests.fuzz.targets import targets

MOST_MEMORY = 1 << 30
"""What a batch may map beyond what is mapped when it begins."""

warnings.simplefilter("ignore")

EXPECTED = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, MemoryError)
INTERNAL = (
    "INTERNAL ASSERT",
    "bug to PyTorch",
    "aoti_torch_get_",
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
        outcome["shared"] = _writes_to_shared(call, placed)
        if call.mode == "requires_grad":
            _differentiate(out, placed)
        del out
    except Exception as error:
        message = str(error)
        outcome = {"ok": False, "error": f"{type(error).__name__}: {message[:300]}"}
        if call.valid:
            failures.append("a valid call raised")
        if not isinstance(error, EXPECTED):
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
    values = out if isinstance(out, (tuple, list)) else (out,)
    outputs = [t for t in values if isinstance(t, Tensor) and t.requires_grad]
    inputs = [arg for arg in placed.args if isinstance(arg, Tensor) and arg.requires_grad]
    if outputs and inputs:
        with contextlib.suppress(*EXPECTED):
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
    written = (
        {id(placed.regions[i]) for i in call.target.writes if i in placed.regions} if returned else set()
    )
    return [
        f"{call.target.arguments[i]} was changed" + ("" if returned else ", and the call raised")
        for i, region in placed.regions.items()
        if id(region) not in written and region.now() != region.before
    ]


def _writes_to_shared(call: Call, placed: Placed) -> bool:
    """Whether it was asked to write to memory that another argument has as well, or that elements share."""
    filled = [i for i in placed.regions if placed.args[i].numel()]
    owners = Counter(id(placed.regions[i]) for i in filled)
    folded = [i for i in filled if call.slots[i].layout in ("overlapping", "expanded")]
    return any(
        owners[id(placed.regions[i])] > 1 or (i in folded and not placed.args[i].is_contiguous())
        for i in call.target.writes
        if i in filled
    )


def batch(job: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> None:
    """The calls of a job, in this process."""
    faulthandler.enable()
    faulthandler.register(signal.SIGPROF, chain=True)  # a traceback, then death
    chosen = targets(job["backend"], job["public"], job["op"])
    cfl_ops.config.set_backend(job["backend"])
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: PTH123, SIM115
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MOST_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for index in range(job["start"], job["stop"]):
        if job["sabotage"]:
            call = sabotage.call(index)
        else:
            call = make_call(chosen, job["seed"], index, job["keep"])
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
    targets("native")
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
