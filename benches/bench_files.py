"""Files of weights beside the disk: 1 GB compressed and written against a plain copy, both with fsync, and back.

Two torch threads, whatever ``--threads`` says. "Cold" is after the page cache has dropped the file (posix_fadvise on
the file alone), so that what is read comes from the disk; "warm" comes from memory. Then the bytes of a state dict of
many small tensors, those of a GPT-2 of 124 M parameters, over the entropy of its large ones.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cfl_ops
import pytest
import torch
from _ratio import ROWS, record
from cfl_ops.ops.codec.atomic import view_of
from torch import Tensor

TENSORS, NUMEL = 32, 1 << 24
ROUNDS = 4


@pytest.fixture(scope="module")
def gigabyte() -> dict[str, Tensor]:
    """2^30 bytes of bfloat16, N(0, .02), in tensors of 32 MB."""
    g = torch.Generator().manual_seed(0)
    w = (torch.randn(NUMEL, generator=g) * 0.02).to(torch.bfloat16)
    return {f"layers.{i}.weight": w.roll(1009 * i).view(4096, 4096) for i in range(TENSORS)}


@pytest.fixture
def folder() -> Iterator[Path]:
    """On the disk that the temporary files are on (TMPDIR)."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def copy_out(state: dict[str, Tensor], path: Path) -> None:
    """The plain bytes, and fsync."""
    with path.open("wb", buffering=0) as file:
        for value in state.values():
            left = view_of(value.view(-1).view(torch.uint8))
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())


def copy_in(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Into fresh tensors."""
    out = {}
    with path.open("rb", buffering=0) as file:
        for name, value in state.items():
            out[name] = torch.empty_like(value)
            left = view_of(out[name].view(-1).view(torch.uint8))
            while left:
                left = left[file.readinto(left) :]
    return out


def forget(path: Path) -> None:
    """The page cache's copy of a file that is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def least(contenders: dict[str, Callable[[], object]], before: Callable[[], object]) -> dict[str, float]:
    """Seconds, each contender's least of several rounds in turn; and the rates, for disks vary."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(ROUNDS):
        for name, call in contenders.items():
            before()
            start = time.perf_counter()
            kept = call()
            best[name] = min(best[name], time.perf_counter() - start)
            del kept
    return best


SAVES = {
    "cflz": lambda state, path: cfl_ops.save_file(state, path, lossless=True),
    "safetensors": lambda state, path: cfl_ops.save_safetensors(state, path),
}


def peak(call: Callable[[], object]) -> tuple[int, object]:
    """Bytes of memory above what was there, at most, and the result; Linux only."""
    status = Path("/proc/self/status")

    def read(field: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) << 10

    Path("/proc/self/clear_refs").write_text("5")
    before = read("VmRSS")
    kept = call()
    return read("VmHWM") - before, kept


@pytest.mark.parametrize("kind", SAVES)
@pytest.mark.benchmark(
    group="1 GB bfloat16 to the disk, lossless: a copy with fsync against ours (asked 0.5)"
)
def bench_write(benchmark, gigabyte: dict[str, Tensor], folder: Path, kind: str) -> None:
    plain, ours = folder / "plain", folder / f"model.{kind}"
    SAVES[kind]({"w": gigabyte["layers.0.weight"][:64].clone()}, ours)  # what a first call loads
    above, _ = peak(lambda: SAVES[kind](gigabyte, ours))

    def clean() -> None:
        plain.unlink(missing_ok=True)
        ours.unlink(missing_ok=True)
        os.sync()

    seconds = least(
        {"copy and fsync": lambda: copy_out(gigabyte, plain), "ours": lambda: SAVES[kind](gigabyte, ours)},
        clean,
    )
    size = ours.stat().st_size / (TENSORS * NUMEL * 2)
    record(benchmark, f"write {kind}", seconds, asked=0.5, bytes_moved=TENSORS * NUMEL * 2,
           note=f"{size:.3f} of the bytes, {above / (2 * NUMEL):.2f} tensors of memory above the model")  # fmt: skip


@pytest.mark.parametrize("cache", ["cold", "warm"])
@pytest.mark.parametrize("kind", SAVES)
@pytest.mark.benchmark(group="1 GB bfloat16 from the disk, lossless: a copy against ours (asked 0.5)")
def bench_read(benchmark, gigabyte: dict[str, Tensor], folder: Path, kind: str, cache: str) -> None:
    plain, ours = folder / "plain", folder / f"model.{kind}"
    copy_out(gigabyte, plain)
    SAVES[kind](gigabyte, ours)
    model = torch.nn.Module()
    for name, value in gigabyte.items():
        model.register_buffer(name.replace(".", "_"), torch.zeros_like(value))
    renamed = folder / f"renamed.{kind}"
    SAVES[kind]({name.replace(".", "_"): value for name, value in gigabyte.items()}, renamed)
    above, back = peak(lambda: cfl_ops.load_file(ours))
    above -= TENSORS * NUMEL * 2
    assert all(torch.equal(back[name], value) for name, value in gigabyte.items())
    del back

    def before() -> None:
        if cache == "cold":
            for path in (plain, ours, renamed):
                forget(path)

    seconds = least(
        {
            "copy": lambda: copy_in(gigabyte, plain),
            "ours": lambda: cfl_ops.load_file(ours),
            "load_model": lambda: cfl_ops.load_model(model, renamed),
        },
        before,
    )
    into = seconds.pop("load_model")
    record(benchmark, f"read {kind}, {cache}", seconds, asked=0.5 if cache == "cold" else None,
           bytes_moved=TENSORS * NUMEL * 2,
           note=f"load_model {into * 1e3:.0f} ms; {above / (2 * NUMEL):.2f} tensors above the result")  # fmt: skip


def gpt2() -> dict[str, Tensor]:
    """The names and shapes of GPT-2's 124 M parameters, N(0, .02); norms near 1, biases."""
    g, width, layers = torch.Generator().manual_seed(0), 768, 12
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (50257, width), "wpe.weight": (1024, width)}
    for i in range(layers):
        for part, out, into in (
            *(("attn.c_attn", 3 * width, width), ("attn.c_proj", width, width)),
            *(("mlp.c_fc", 4 * width, width), ("mlp.c_proj", width, 4 * width)),
        ):
            shapes[f"h.{i}.{part}.weight"] = (into, out)
            shapes[f"h.{i}.{part}.bias"] = (out,)
        for norm in ("ln_1", "ln_2"):
            shapes[f"h.{i}.{norm}.weight"] = shapes[f"h.{i}.{norm}.bias"] = (width,)
    shapes["ln_f.weight"] = shapes["ln_f.bias"] = (width,)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=g) * 0.02
        state[name] = (value + 1 if "ln" in name and name.endswith("weight") else value).to(torch.bfloat16)
    state["lm_head.weight"] = state["wte.weight"]
    return state


def ideal_bytes(value: Tensor) -> float:
    """Of bfloat16: sign and mantissa as they are, exponents at their entropy."""
    exponents = (value.view(torch.int16).to(torch.int32) >> 7) & 255
    counts = torch.bincount(exponents.view(-1), minlength=256).double()
    p = counts[counts > 0] / counts.sum()
    return value.numel() * (8 - float((p * p.log2()).sum())) / 8


@pytest.mark.parametrize("kind", SAVES)
@pytest.mark.benchmark(
    group="GPT-2's 148 tensors: bytes over the entropy of its 50 matrices (asked 1.03 at most)"
)
def bench_many_small(benchmark, folder: Path, kind: str) -> None:
    state = gpt2()
    large = {name: value for name, value in state.items() if value.ndim == 2 and name != "lm_head.weight"}
    ideal = sum(map(ideal_bytes, large.values()))
    path = folder / f"model.{kind}"
    start = time.perf_counter()
    size = SAVES[kind](state, path)
    seconds = time.perf_counter() - start
    raw = sum(value.nbytes for name, value in state.items() if name != "lm_head.weight")
    benchmark.extra_info.update(ratio=size / ideal, ideal=ideal, size=size)
    ROWS.append({
        "group": benchmark.group, "title": f"{kind}: {size / 1e6:.1f} MB of {raw / 1e6:.1f}, ideal {ideal / 1e6:.1f}",
        "ours_ms": seconds * 1e3, "size_ms": seconds * 1e3, "peer": "size", "speedup": size / ideal, "asked": None,
        "gflops": None, "gbytes": raw / seconds / 1e9, "note": f"{len(state)} names",
    })  # fmt: skip
    assert size <= 1.03 * ideal
    benchmark.pedantic(lambda: None, rounds=1)
