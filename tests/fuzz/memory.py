"""Bytes that an op keeps of each call: ``python -m tests.fuzz.memory --calls 100000 [--op gram]``.

Each op's smallest sample is called again and again in a process of its own. What malloc has given out tells
single bytes, where the size of the process tells pages; Python's objects come from malloc as well (PYTHONMALLOC).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MOST_BYTES = 8.0
"""A call may keep, on average, in the best third of the calls: what is kept once, in a cache, is no leak."""
LEAST_CALLS = 900


class _MallocInfo(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def malloc_tells() -> bool:
    """Whether the C library says how much it has given out."""
    return hasattr(ctypes.CDLL(None), "mallinfo2")


def given_out() -> int:
    gc.collect()
    function = ctypes.CDLL(None).mallinfo2
    function.restype = _MallocInfo
    info = function()
    return int(info.uordblks + info.hblkhd)


def growth(call: Any, calls: int, seconds: float) -> tuple[float, int]:
    """Bytes a call in the best of three runs of calls, and how many calls were made."""
    for _ in range(20):  # the first one imports what it needs
        call()
    began = time.process_time()
    for _ in range(100):
        call()
    each = (time.process_time() - began) / 100
    third = max(min(calls, int(seconds / each)), LEAST_CALLS) // 3
    while True:
        grown = []
        for _ in range(3):
            before = given_out()
            for _ in range(third):
                call()
            grown.append((given_out() - before) / third)
        if min(grown) <= MOST_BYTES or 3 * third >= calls:
            return min(grown), 3 * third
        third *= 4  # what malloc loses between blocks until they fit ends after some thousand calls; a leak does not


def measure(names: Sequence[str], calls: int, seconds: float, leak: int) -> None:
    """A line of JSON for each op; each has a process of its own."""
    import torch

    from tests.contract import clone_args
    from tests.fuzz.targets import targets

    torch.set_num_threads(1)
    for target in targets("native"):
        if names and target.name not in names:
            continue
        sys.stdout.flush()
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            if status:
                raise SystemExit(f"{target.name}: ended with status {status}")
            continue
        samples = [make() for _, make in target.samples]
        sizes = [sum(arg.numel() for arg in args if isinstance(arg, torch.Tensor)) for args in samples]
        # Not an empty one, which returns at once.
        args = clone_args(samples[min(range(len(sizes)), key=lambda i: (sizes[i] < 10, sizes[i]))])
        written = [(args[i], args[i].clone()) for i in target.writes if isinstance(args[i], torch.Tensor)]
        kept: list[bytes] = []

        def call(target=target, args=args, written=written, kept=kept) -> None:
            for tensor, value in written:
                tensor.copy_(value)
            target.function("native", *args)
            if leak:
                kept.append(bytes(leak))

        each, made = growth(call, calls, seconds)
        print(json.dumps({"op": target.name, "bytes": each, "calls": made}), flush=True)
        os._exit(0)


def run(calls: int, seconds: float, ops: Sequence[str] = (), leak: int = 0) -> Iterator[dict[str, Any]]:
    """What measure says, from a fresh process."""
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.memory",
        "--here",
        "--calls",
        str(calls),
        "--seconds",
        str(seconds),
    ]
    command += ["--leak", str(leak), *(word for op in ops for word in ("--op", op))]
    # One arena, and no cache of small blocks, so that what is free counts as free.
    tunables = "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1"
    environment = os.environ | {"PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": tunables}
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=root, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"the measurement ended with {process.returncode}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.memory", description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0, help="the most for one op")
    parser.add_argument("--op", action="append", default=[], help="one op; may be given again")
    parser.add_argument("--leak", type=int, default=0, help="bytes to leak a call, to see that it shows")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        measure(options.op, options.calls, options.seconds, options.leak)
        return 0
    leaks = 0
    for row in run(options.calls, options.seconds, options.op, options.leak):
        leaks += row["bytes"] > MOST_BYTES
        print(f"{row['op']:32} {row['bytes']:10.2f} bytes a call of {row['calls']}", flush=True)
    return 1 if leaks else 0


if __name__ == "__main__":
    sys.exit(main())
