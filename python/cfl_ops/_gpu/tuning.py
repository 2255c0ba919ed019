"""Which tile sizes and how many warps a kernel gets: measured choices by op, size and architecture, as JSON.

A file maps an op to a list of rules, each with ``if`` (what it is for) and ``use`` (what the launcher takes).
A rule matches a problem when each key of ``if`` equals the problem's value, or with ``max_`` or ``min_`` before
it bounds it, when ``min_shared`` bytes of shared memory can be had, and when ``slow_float64`` is what the card is.
The first rule that matches is taken,
from the first of these files that has one:

1. the user's own, which ``python -m cfl_ops autotune`` writes (``$CFL_OPS_CACHE``, or ``~/.cache/cfl_ops``);
2. ``rules/<architecture>.json`` of the package;
3. ``rules/default.json``: it fits 99 KB of shared memory, and has a rule for every problem.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cfl_ops._gpu.device import Device, device_of

FORMAT = 1
_forced: dict[str, dict[str, Any]] = {}


@contextlib.contextmanager
def force(op: str, use: dict[str, Any]) -> Iterator[None]:
    """Have one choice for an op: the autotuner's candidates."""
    before = _forced.get(op)
    _forced[op] = use
    try:
        yield
    finally:
        if before is None:
            del _forced[op]
        else:
            _forced[op] = before


def cache_folder() -> Path:
    """Where the user's own files are."""
    if "CFL_OPS_CACHE" in os.environ:
        return Path(os.environ["CFL_OPS_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "cfl_ops"


def user_file(device: Device) -> Path:
    """The user's file for this card."""
    return cache_folder() / "tuning" / f"{device.slug}.json"


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The rules of a file; raises ValueError with its path if it is not one of ours."""
    try:
        data = json.loads(path.read_text())
        rules: dict[str, list[dict[str, Any]]] = data["rules"]
        good = data["format"] == FORMAT and all(
            isinstance(rule["if"], dict) and isinstance(rule["use"], dict)
            for op in rules.values()
            for rule in op
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"cfl_ops: {path} is not a tuning file ({error}); remove it") from None
    if not good:
        raise ValueError(f"cfl_ops: {path} is not a tuning file of format {FORMAT}; remove it")
    return rules


def write(path: Path, device: Device, rules: dict[str, list[dict[str, Any]]], note: str) -> None:
    """A file of rules, under a temporary name until it is complete."""
    data = {
        "format": FORMAT,
        "device": device.name,
        "architecture": device.architecture,
        "note": note,
        "rules": rules,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    temporary.replace(path)


@functools.cache
def _files(device: Device) -> tuple[dict[str, list[dict[str, Any]]], ...]:
    package = Path(__file__).parent / "rules"
    paths = (user_file(device), package / f"{device.architecture}.json", package / "default.json")
    return tuple(read(path) for path in paths if path.is_file())


def matches(rule: dict[str, Any], problem: dict[str, Any], device: Device) -> bool:
    """Whether a rule is for this problem on this card."""
    for key, value in rule["if"].items():
        if key == "min_shared":
            if device.shared_memory < value:
                return False
        elif key == "slow_float64":
            if device.slow_float64 != value:
                return False
        elif key.startswith(("max_", "min_")):
            have = problem[key[4:]]
            if have > value if key.startswith("max_") else have < value:
                return False
        elif problem[key] != value:
            return False
    return True


@functools.lru_cache(maxsize=4096)
def choose_cached(op: str, device: Device, problem: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """The rule for a problem, remembered."""
    for rules in _files(device):
        for rule in rules.get(op, ()):
            if matches(rule, dict(problem), device):
                return dict(rule["use"])
    raise KeyError(f"cfl_ops: no tuning rule for {op} with {dict(problem)}")


def choose(op: str, device: torch.device, **problem: Any) -> dict[str, Any]:
    """What the launcher of an op takes on this device: a dictionary of its options."""
    if op in _forced:
        return _forced[op]
    return choose_cached(op, device_of(device), tuple(problem.items()))


def forget() -> None:
    """Read the files again."""
    _files.cache_clear()
    choose_cached.cache_clear()
