"""Work beside other work: in a second thread on a CPU, on a second stream on a GPU."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

R = TypeVar("R")


def can_overlap(device: torch.device) -> bool:
    """Whether something can run beside what runs now: a GPU has streams; a CPU needs a core that torch leaves free."""
    if device.type == "cuda":
        return True
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return device.type == "cpu" and torch.get_num_threads() < cores


@functools.cache
def _thread() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="cfl_ops")


if hasattr(os, "register_at_fork"):  # a child has no threads of its parent
    os.register_at_fork(after_in_child=_thread.cache_clear)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def beside(work: Callable[[], R], device: torch.device) -> Callable[[], R]:
    """Start some work; what is returned waits for it and gives its result, or raises what it raised."""
    if device.type == "cuda":
        side, current = _stream(device), torch.cuda.current_stream(device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = work()

        def joined() -> R:
            torch.cuda.current_stream(device).wait_stream(side)
            return result

        return joined
    return _thread().submit(work).result
