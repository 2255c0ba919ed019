"""Where a call's time goes on a GPU: its kernels, how often each runs, and how long the host takes to launch them.

Usage: python benches/gpu_profile.py [--match TEXT ...] [--device cpu --small]
"""

from __future__ import annotations

import argparse
import time

import gpu_cases
import torch
from torch.profiler import ProfilerActivity, profile

CALLS = 5
MATCH = (
    "proximal_step_ float32 128 x 2048, K = 1000",
    "proximal_step_ float32 256 x 2048, K = 1000",
    "gram bfloat16 65536 x 1024",
    "gram float32 60000 x 784 + bias, 10 classes",
    "ridge_solve float32 one of 1024",
    "ridge_solve float32 4000 of 128, 1 side",
    "cholesky_update float32 4096, rank 16",
    "huffman_encode uint8 268435456",
    "huffman_decode_ uint8 268435456",
)
"""What was slowest over its floor in the first run."""


def show(case: gpu_cases.Case, gpu: bool) -> None:
    """A case's kernels, those that took longest first."""
    work = case.make()
    for _ in range(3):
        work.ours()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    wait = torch.cuda.synchronize if gpu else lambda: None
    wait()
    with profile(activities=activities) as profiler:
        began = time.perf_counter()
        for _ in range(CALLS):
            work.ours()
        host = (time.perf_counter() - began) / CALLS
        wait()
    if gpu:
        # Not the torch ops, whose times are their kernels'.
        events = [e for e in profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    else:
        events = list(profiler.key_averages())
    time_of = (lambda e: e.self_device_time_total) if gpu else (lambda e: e.self_cpu_time_total)
    events.sort(key=time_of, reverse=True)
    count = sum(e.count for e in events) / CALLS
    total = sum(map(time_of, events)) / CALLS
    print(f"{case.name}: {count:g} kernels, {total:.1f} us of them, {host * 1e6:.1f} us of the host, a call")
    for event in events[:14]:
        print(
            f"  {time_of(event) / CALLS:9.1f} us  {event.count / CALLS:5.1f} x  {event.key[:110]}", flush=True
        )


def main() -> int:
    """Each case that a text of --match is the beginning of."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--match", nargs="+", default=MATCH, help="beginnings of cases' names")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--small", action="store_true", help="the rehearsal's sizes: the first case of a family"
    )
    options = parser.parse_args()
    for list_cases in gpu_cases.FAMILIES.values():
        cases = list_cases(options.device, options.small)
        if options.small:
            cases = cases[:1]
        else:
            cases = [
                c for c in cases if c.name.startswith(tuple(options.match)) and not c.name.endswith("graph")
            ]
        for case in cases:
            show(case, options.device == "cuda")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
