"""Mutated files of weights into their readers: ``python -m tests.fuzz.files --runs N``.

Seeds are the files of tests/data/files (``--seeds`` writes them anew): .cflz of both versions, .safetensors compressed
and plain, an index with its shards. A run changes one of them in one to four places, by bytes or by what its JSON says,
and mostly repairs the checksums, so that the checks behind them are met. What then comes must be CorruptDataError, or
tensors; and where no checksum was repaired, those that were written. A shard that is not there may be
FileNotFoundError, a dtype that torch has not ValueError. Memory is bounded. What fails is kept, with the seed and
number that make it again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cfl_ops
import torch
from cfl_ops import CorruptDataError
from cfl_ops.ops.codec.archive import first_checksum
from cfl_ops.ops.codec.reference.header import from_bytes
from cfl_ops.ops.codec.safetensors_file import notes_text
from torch import Tensor

from tests.codec.file_helpers import equal_states, first_version, safetensors_bytes
from tests.codec.forge import EXTREMES, ITEMSIZE, repair_blob, repair_file, repair_first_file

SEEDS = Path(__file__).parents[1] / "data" / "files"
INDEX = "sharded.safetensors.index.json"
MEMORY = 3 << 30
WORDS: tuple[Any, ...] = (
    *(
        "",
        "a",
        "\ud800",
        "../a",
        "/etc/passwd",
        "\0",
        "F32",
        "BF16",
        "F4",
        "U8",
        "F6_E2M3",
        "bfloat16",
        "float32",
    ),
    *(None, True, [], {}, [1], 0, -1, 1, 2, 3, 8, 255, 2**31, 2**32, 2**53, 2**63, 2**64, 2**70, 1.5, 1e300),
)
"""What a value of the JSON is replaced by."""


def states() -> dict[str, Tensor]:
    """What the seeds hold: each kind of blob, a tie, sizes that need padding."""
    g = torch.Generator().manual_seed(5)
    w = torch.randn(300, generator=g)
    return {
        "quantised": w * 0.1,
        "exponents": (w * 0.02).bfloat16().view(10, 30),
        "palette": torch.tensor([0.0, 1.0, -2.0]).half().repeat(100),
        "steps": torch.tensor(7),
        "odd": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 3),
        "tied": torch.empty(0),
    }


def write_seeds() -> None:
    """The corpus."""
    shutil.rmtree(SEEDS, ignore_errors=True)
    SEEDS.mkdir()
    state = states()
    state["tied"] = state["quantised"]
    lossy = {"overrides": {"exponents": "exact"}, "bits": 6, "max_error": 1}
    cfl_ops.save_file(state, SEEDS / "second.cflz", metadata={"k": "v"}, **lossy)
    distinct = {name: value for name, value in state.items() if name != "tied"}
    (SEEDS / "first.cflz").write_bytes(first_version(cfl_ops.compress_state_dict(distinct, **lossy)))
    cfl_ops.save_safetensors(state, SEEDS / "lossy.safetensors", lossless=False, **lossy)
    cfl_ops.save_safetensors(state, SEEDS / "lossless.safetensors")
    cfl_ops.save_safetensors(state, SEEDS / "sharded.safetensors", max_shard_size=700)
    data = b"".join(
        bytes(value.reshape(-1).contiguous().view(torch.uint8).tolist()) for value in plain().values()
    )
    header, at = {}, 0
    for name, value in plain().items():
        dtype = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}[value.dtype]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": [at, at + value.nbytes]}
        at += value.nbytes
    (SEEDS / "plain.safetensors").write_bytes(safetensors_bytes(header, data))


def plain() -> dict[str, Tensor]:
    """Of a file that others wrote."""
    return {
        "w": torch.arange(12.0).view(3, 4),
        "steps": torch.tensor(3),
        "flags": torch.tensor([True, False]),
    }


class Seed(NamedTuple):
    name: str
    data: bytes
    want: dict[str, Tensor]


def seeds() -> list[Seed]:
    """Each file that is mutated, and what it holds; shards of the index are not mutated on their own."""
    names = sorted(path.name for path in SEEDS.iterdir() if "-of-" not in path.name)
    return [Seed(name, (SEEDS / name).read_bytes(), cfl_ops.load_file(SEEDS / name)) for name in names]


def mutate_bytes(rng: random.Random, data: bytearray) -> None:
    """In place."""
    at = rng.randrange(len(data)) if data else 0
    kind = rng.randrange(8)
    if not data or kind == 0:
        data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8, 60)))
    elif kind == 1:
        del data[at : at + rng.choice((1, 2, 4, 8, 60))]
    elif kind == 2:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 3:
        data[at] = rng.choice((0, 1, 2, 3, 127, 128, 255, rng.randrange(256)))
    elif kind == 4:
        size = rng.choice((2, 4, 8))
        value = rng.choice((*EXTREMES, len(data), len(data) - 1, at)) % 256**size
        data[at : at + size] = value.to_bytes(size, "little")
    elif kind == 5:
        other = rng.randrange(len(data))
        size = rng.choice((1, 4, 8, 56, 200))
        data[at : at + size] = data[other : other + size]
    elif kind == 6:
        del data[at:]
    else:
        data.extend(data[at : at + 100])


def mutate_json(rng: random.Random, value: Any, depth: int = 0) -> Any:
    """Another value, or the same one changed somewhere inside."""
    if depth > 12 or not isinstance(value, (dict, list)) or not value or rng.random() < 0.12:
        if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.5:
            return value + rng.choice((-8, -1, 1, 8))
        return rng.choice(WORDS)
    if isinstance(value, list):
        out = list(value)
        at = rng.randrange(len(out))
        out[at : at + 1] = rng.choice(([], [out[at]] * 2, [mutate_json(rng, out[at], depth + 1)]))
        return out
    changed = dict(value)
    key = rng.choice(list(changed))
    kind = rng.randrange(8)
    if kind == 0:
        del changed[key]
    elif kind == 1:
        changed[str(rng.choice((*WORDS, *changed)))] = changed[key]
    elif kind == 2:
        changed[key], changed[other] = changed[other := rng.choice(list(changed))], changed[key]
    else:
        changed[key] = mutate_json(rng, changed[key], depth + 1)
    return changed


def repair_blobs(rng: random.Random, data: bytearray, begin: int, end: int) -> None:
    """The checksums of the headers of the blobs that stand there, of some."""
    at = begin
    while 0 <= (at := data.find(b"CFLC", at, end)) < end - 16:
        total = int.from_bytes(data[at + 8 : at + 16], "little")
        if data[at + 5] in (0, 1, 2) and 56 <= total <= end - at and rng.random() < 0.7:
            blob = bytearray(data[at : at + total])
            with contextlib.suppress(struct.error, IndexError, MemoryError, OverflowError):
                if blob[6] < len(ITEMSIZE):
                    repair_blob(blob)
                    data[at : at + total] = blob
        at += 4


def mend_archive(rng: random.Random, data: bytearray) -> None:
    """Of either version, the checksums and sometimes the lengths."""
    with contextlib.suppress(struct.error, IndexError):
        if int.from_bytes(data[4:8], "little") == 1:
            if rng.random() < 0.7:
                struct.pack_into("<Q", data, 8, len(data))
            repair_blobs(rng, data, 28, len(data))
            repair_first_file(data)
            return
        end = len(data) - 28
        if rng.random() < 0.7:
            struct.pack_into("<Q", data, end + 8, len(data))
            data[-4:] = b"CFLE"
        index_bytes, _, count = struct.unpack_from("<QQI", data, end)
        at = start = end - index_bytes
        if start >= 16:
            repair_blobs(rng, data, 16, start)
            place = 16
            for _ in range(min(count, 20)):  # and the index's own checksums of the blobs
                size, _, of, name = struct.unpack_from("<QIII", data, at)
                if of == 0xFFFFFFFF and place + size <= start and rng.random() < 0.9:
                    struct.pack_into(
                        "<I", data, at + 8, first_checksum(from_bytes(bytes(data[place : place + size])))
                    )
                    place += size
                at += 20 + name
        repair_file(data)


def mutate_safetensors(rng: random.Random, data: bytearray, mended: bool) -> bytearray:
    """By the JSON of the header; the notes of ours sealed anew."""
    size = int.from_bytes(data[:8], "little")
    try:
        header, body = json.loads(bytes(data[8 : 8 + size])), data[8 + size :]
    except (ValueError, RecursionError, OverflowError):
        return data
    if mended:
        repair_blobs(rng, body, 0, len(body))
    notes = None
    with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
        notes = json.loads(header["__metadata__"]["cfl_ops"])
    if notes is not None and rng.random() < 0.6:
        notes = mutate_json(rng, notes)
    else:
        header = mutate_json(rng, header)
    if mended and isinstance(header, dict) and isinstance(notes, dict):
        with contextlib.suppress(KeyError, TypeError, AttributeError, ValueError):
            for name, note in notes["tensors"].items():
                entry = header[name]
                start, stop = entry["data_offsets"]
                if "padding" in note and rng.random() < 0.9:
                    note["checksum"] = first_checksum(from_bytes(bytes(body[start : stop - note["padding"]])))
        with contextlib.suppress(KeyError, TypeError, ValueError):
            sealed = json.loads(notes_text(notes["tensors"], notes["aliases"], notes["shard"]))
            notes = {**sealed, **{key: value for key, value in notes.items() if key != "checksum"}}
    if isinstance(header, dict) and notes is not None and isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["cfl_ops"] = json.dumps(notes)
    text = json.dumps(header).encode()
    return bytearray(len(text).to_bytes(8, "little") + text + body)


def make(chosen: list[Seed], seed: int, index: int) -> tuple[Seed, bytes, bool]:
    """The run of that number: the seed, the bytes, and whether checksums were repaired."""
    rng = random.Random(f"{seed}:{index}")
    start = rng.choice(chosen)
    data = bytearray(start.data)
    mended = rng.random() < 0.8
    if start.name == INDEX:
        if rng.random() < 0.7:
            data = bytearray(json.dumps(mutate_json(rng, json.loads(data))).encode())
        else:
            mutate_bytes(rng, data)
        return start, bytes(data), True
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        if start.name.endswith(".safetensors") and rng.random() < 0.6:
            data = mutate_safetensors(rng, data, mended)
        else:
            mutate_bytes(rng, data)
    if mended and start.name.endswith(".cflz"):
        mend_archive(rng, data)
    return start, bytes(data), mended or start.name == "plain.safetensors"


def judge(start: Seed, path: Path, mended: bool) -> str:
    """ "refused" or "read"; raises for all else."""
    try:
        got = cfl_ops.load_file(path)
    except CorruptDataError as error:
        if not str(error).startswith("cfl_ops."):
            raise
        return "refused"
    except FileNotFoundError:
        if start.name != INDEX:
            raise
        return "refused"
    except ValueError as error:
        if "must have a dtype that torch has" in str(error) or "even number of F4" in str(error):
            return "refused"
        raise
    assert all(isinstance(value, Tensor) for value in got.values())
    # Without any metadata compressed tensors are another tool's bytes, and come back as these, with a warning.
    foreign = path.suffix == ".safetensors" and b'"__metadata__"' not in path.read_bytes()
    if not mended and not foreign and not equal_states(got, start.want):
        raise AssertionError("tensors that nobody wrote, and no checksum was repaired")
    return "read"


def runs(seed: int, numbers: range, keep: Path, report: Callable[[str], None] = print) -> dict[str, int]:
    """Makes these runs in this process."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    counts = {"refused": 0, "read": 0, "failed": 0}
    chosen = seeds()
    memory = Path("/dev/shm")
    try:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
            folder = Path(name)
            for path in SEEDS.iterdir():  # the shards
                shutil.copy(path, folder)
            for number in numbers:
                start, data, mended = make(chosen, seed, number)
                path = folder / start.name
                path.write_bytes(data)
                try:
                    counts[judge(start, path, mended)] += 1
                except Exception as error:
                    counts["failed"] += 1
                    keep.mkdir(parents=True, exist_ok=True)
                    kept = keep / f"{seed}_{number}_{start.name}"
                    kept.write_bytes(data)
                    text = str(error).splitlines()[:1]
                    report(
                        f"--seed {seed} --first {number} --runs 1: {type(error).__name__}: {text}; kept {kept}"
                    )
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.files")
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first run")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz/files"), help="where failing files go")
    parser.add_argument("--seeds", action="store_true", help="write the corpus anew, and end")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.seeds:
        write_seeds()
        return 0
    begin, step = time.perf_counter(), -(-options.runs // options.workers)
    last = options.first + options.runs
    parts = [
        (options.seed, range(first, min(last, first + step)), options.keep)
        for first in range(options.first, last, step)
    ]
    if len(parts) < 2:
        done = [runs(*part) for part in parts]
    else:
        with multiprocessing.get_context("spawn").Pool(len(parts)) as pool:
            done = pool.starmap(runs, parts)
    total = {key: sum(counts[key] for counts in done) for key in ("refused", "read", "failed")}
    seconds = time.perf_counter() - begin
    print(f"{options.runs} files in {seconds:.0f} s: " + ", ".join(f"{n} {key}" for key, n in total.items()))
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
