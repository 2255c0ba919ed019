"""What the fuzzer must notice: calls for its own tests, in the place of those of ops."""

from __future__ import annotations

import ctypes
import signal
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.mutate import Call, Slot
from tests.fuzz.targets import Target


def _read_beyond(backend: str, t: Tensor, count: int) -> None:
    ctypes.string_at(t.data_ptr() + t.numel() * t.element_size(), 1)


def _write_beyond_own(backend: str, t: Tensor, count: int) -> None:
    """Into what is left of torch's own memory to its alignment."""
    own = torch.empty(100)
    ctypes.memset(own.data_ptr() + 400, 0, 9)


def _write_far_beyond_own(backend: str, t: Tensor, count: int) -> None:
    own = torch.empty(100)
    ctypes.memset(own.data_ptr() + 400, 0, 49)


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


def _harmless(backend: str, t: Tensor, count: int) -> None:
    raise ValueError("refused")


SABOTAGE: dict[str, Callable[..., Any]] = {
    "read_beyond": _read_beyond,
    "write_beyond_own": _write_beyond_own,
    "write_far_beyond_own": _write_far_beyond_own,
    "harmless": _harmless,
    "spin": _spin,
    "sleep": _sleep,
    "write_and_raise": _write_and_raise,
    "wrong_type": _wrong_type,
}


def call(index: int) -> Call:
    name, function = list(SABOTAGE.items())[index]
    target = Target(name, ("t", "count"), ("Tensor", "int"), (), function)
    return Call(target, "sabotage", "plain", [Slot(torch.ones(7)), Slot(3)], ["sabotage"], 1)
