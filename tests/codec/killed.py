"""Ends writers of files at any point, and looks at what is left.

A module of its own (``python -m tests.codec.killed``), whose process imports the package once and forks: each child
writes a checkpoint over another one and is killed, before each call of the system in turn or at random times. The file
must then be the old one or the new one, whole. Shards that were named before their index was may be left.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cfl_ops
import torch
from cfl_ops.ops.codec import atomic

from tests.codec.helpers import same

CALLS = ("open", "write", "pwrite", "lseek", "fsync", "fchmod", "close")


def states() -> list[dict[str, torch.Tensor]]:
    """Two checkpoints of equal names, shapes and sizes."""
    made = []
    for seed in (1, 2):
        g = torch.Generator().manual_seed(seed)
        made.append({f"w{i}": torch.randn(400, 50, generator=g) for i in range(4)})
    return made


def write_archive(state: Any, folder: Path) -> None:
    cfl_ops.save_file(state, folder / "model.cflz", bits=8)


def write_one(state: Any, folder: Path) -> None:
    cfl_ops.save_safetensors(state, folder / "model.safetensors", lossless=False, bits=8)


def write_shards(state: Any, folder: Path) -> None:
    cfl_ops.save_safetensors(
        state, folder / "model.safetensors", lossless=False, bits=8, max_shard_size="40KB"
    )


WRITERS: dict[str, Callable[[Any, Path], None]] = {
    "archive": write_archive,
    "safetensors": write_one,
    "shards": write_shards,
}


def die_before(number: int) -> None:
    """In a child: before that call of the system that writing makes."""
    left = [number]

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    for name in ("replace", "unlink"):
        setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
    atomic.PIECE = 1 << 14  # several writes for each blob


def child(work: Callable[[], None]) -> int:
    """Run in a fork; the process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def check(folder: Path, expected: list[dict[str, torch.Tensor]]) -> str:
    """Which of them the folder holds."""
    got = cfl_ops.load_file(folder)
    for i, state in enumerate(expected):
        if got.keys() == state.keys() and all(same(got[name], state[name]) for name in state):
            return "old" if i == 0 else "new"
    raise AssertionError(f"{folder} holds neither")


def stale(folder: Path) -> list[Path]:
    return [*folder.glob(".cfl-*.tmp")]


def nameless(folder: Path) -> list[Path]:
    """Shards that no index names, but which got their names."""
    index = folder / "model.safetensors.index.json"
    named = set(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else set()
    return [path for path in folder.glob("model-*.safetensors") if path.name not in named]


def at_every_call(kind: str) -> dict[str, int]:
    """Kill before the first call, the second, ..., until a child lives."""
    counts: dict[str, int] = {}
    old, new = states()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        WRITERS[kind](old, folder)
        expected = [cfl_ops.load_file(folder)]
        WRITERS[kind](new, folder)
        expected.append(cfl_ops.load_file(folder))
        for number in range(1, 1000):
            WRITERS[kind](old, folder)

            def work(number: int = number) -> None:
                die_before(number)
                WRITERS[kind](new, folder)

            _, status = os.waitpid(child(work), 0)
            found = check(folder, expected)
            counts[found] = counts.get(found, 0) + 1
            assert len(stale(folder)) <= (5 if kind == "shards" else 1)
            for path in stale(folder) + nameless(folder):
                path.unlink()
            if os.WIFEXITED(status):
                assert found == "new"
                return counts
    raise AssertionError("no child lived")


def at_random(kind: str, kills: int, seed: int) -> dict[str, int]:
    """Kill children that write without end."""
    counts: dict[str, int] = {}
    generator = random.Random(seed)
    pair = states()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = []
        for state in pair:
            start = time.perf_counter()
            WRITERS[kind](state, folder)
            seconds = time.perf_counter() - start
            expected.append(cfl_ops.load_file(folder))

        def work() -> None:
            while True:
                for state in pair:
                    WRITERS[kind](state, folder)

        for _ in range(kills):
            WRITERS[kind](pair[0], folder)
            pid = child(work)
            time.sleep(generator.uniform(0, 4 * seconds))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            found = check(folder, expected)
            counts[found] = counts.get(found, 0) + 1
            for path in stale(folder) + nameless(folder):
                path.unlink()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    out = {kind: [at_every_call(kind), at_random(kind, options.kills, options.seed)] for kind in WRITERS}
    print(json.dumps(out))
    sys.exit(0)


if __name__ == "__main__":
    main()
