"""The card that a tensor is on, as far as launchers want to know it."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

FAST_FLOAT64 = ("sm_60", "sm_70", "sm_80", "sm_90", "sm_100")
"""All others do float64 at 1/32 or 1/64 of the rate of float32."""


@dataclass(frozen=True)
class Device:
    """What a launcher wants to know of a card."""

    name: str
    architecture: str
    multiprocessors: int
    shared_memory: int
    """Bytes that a block can have: 99 KB on consumer cards, 163 on an A100, 227 on an H100."""

    @property
    def slow_float64(self) -> bool:
        """Whether float64 costs much more than twice float32."""
        return self.architecture not in FAST_FLOAT64

    @property
    def slug(self) -> str:
        """The name, as a file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


NO_GPU = Device("interpreter", "none", 132, 99 << 10)
"""What launchers see when they run in Triton's interpreter."""

_pretended: Device | None = None


def device_of(device: torch.device) -> Device:
    """The card that a tensor is on."""
    if _pretended is not None:
        return _pretended
    return _properties(device.index or 0) if device.type == "cuda" else NO_GPU


@functools.cache
def _properties(index: int) -> Device:
    p = torch.cuda.get_device_properties(index)
    shared = getattr(p, "shared_memory_per_block_optin", 99 << 10)
    return Device(p.name, f"sm_{p.major}{p.minor}", p.multi_processor_count, shared)


@contextlib.contextmanager
def pretend(device: Device) -> Iterator[None]:
    """Choose for another card: compile checks, tests."""
    global _pretended
    before, _pretended = _pretended, device
    try:
        yield
    finally:
        _pretended = before
