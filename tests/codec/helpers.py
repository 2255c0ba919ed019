"""What the codec's tests share: fixed inputs, damage, and what to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cfl_ops._core import dispatch
from torch import Tensor

DATA = Path(__file__).parents[1] / "data"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NATIVE = dispatch.extension_available()
if NATIVE:
    from cfl_ops import _C

LEVELS = [f"isa{i}" for i in range(min(_C.best_isa(), 2) + 1)] if NATIVE else []
EXHAUSTIVE = [*LEVELS[-1:], "python"]
"""The checks do not depend on the instruction set: all bits are tried with the best one and the fallback."""


def same(a: Tensor, b: Tensor) -> bool:
    """Equal shape, dtype and bits (torch.equal is not there for uint16)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.numel() == 0 or bool(
        (a.contiguous().view(-1).view(torch.uint8) == b.contiguous().view(-1).view(torch.uint8)).all()
    )


def normal_symbols(n: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    levels = 1 << bits
    value = torch.randn(n, generator=generator) * levels / 9 + levels / 2
    return value.clamp(0, levels - 1).to(torch.int32).to(torch.uint8 if bits <= 8 else torch.uint16)


def flips(data: Tensor) -> Iterator[Tensor]:
    for bit in range(8 * data.numel()):
        damaged = data.clone()
        damaged[bit // 8] ^= 1 << bit % 8
        yield damaged


def cuts_and_extensions(data: Tensor) -> Iterator[Tensor]:
    for size in range(data.numel()):
        yield data[:size]
    for extra in (1, 2, 7, 8, 100):
        yield torch.cat([data, torch.zeros(extra, dtype=torch.uint8)])
        yield torch.cat([data, data[:extra]])


def golden_symbols(n: int, top: int) -> Tensor:
    """A fixed sequence, skewed to small symbols, that needs no random number generator."""
    value, out = 12345, []
    for _ in range(n):
        value = (1103515245 * value + 12345) % 2**31
        out.append((value >> 16) % top * ((value >> 8) % top) // top)
    return torch.tensor(out, dtype=torch.int32)


def golden_weights(dtype: torch.dtype) -> Tensor:
    return (golden_symbols(2000, 97).to(torch.float64).view(20, 100) / 64 - 0.5).to(dtype)


def sample_places(size: int, every: int) -> list[int]:
    """What docs/format.md says of the sample, in plain integers."""
    places = []
    for i, first in enumerate(range(0, size, every)):
        x = (i + 1) * 0x9E3779B97F4A7C15 % 2**64
        x = (x ^ x >> 32) * 0xD6E8FEB86659FD93 % 2**64
        places.append(first + ((x >> 32) * min(every, size - first) >> 32))
    return places


def golden_blobs() -> dict[str, tuple[Tensor, dict[str, Any]]]:
    """What version 2 of a blob added, and outliers: weights and options of each file of tests/data."""
    fine = (golden_symbols(6000, 4000).to(torch.float64) / 2048 - 0.5).to(torch.float32)
    spoiled = fine.clone()
    spoiled[[3, 4321]] = torch.tensor([1e4, -3e3])
    pruned = torch.where(fine.abs() < 0.25, 0.0, fine).view(6, 1000)
    return {
        "blob_palette.bin": ((golden_symbols(2000, 9) / 8 - 0.25).to(torch.bfloat16).view(40, 50), {}),
        "blob_outliers.bin": (spoiled, {}),
        "blob_zero.bin": (pruned, {"zero": "exact", "per": "row", "bits": 8}),
    }


def lossless_sample(dtype: torch.dtype, n: int) -> Tensor:
    """n weights of any dtype that the format knows: normal, of a scale that grows from chunk to chunk."""
    generator = torch.Generator().manual_seed(n)
    w = torch.randn(2 * n, generator=generator, dtype=torch.float64) * 0.02
    w *= (1 + torch.arange(2 * n) // 65_536).to(torch.float64)
    if dtype.is_complex:
        part = {torch.complex32: torch.float16, torch.complex64: torch.float32}.get(dtype, torch.float64)
        return w.to(part).view(dtype)
    if dtype == torch.bool:
        return w[:n] > 0.03
    return (w[:n] if dtype.is_floating_point else (w[:n] * 300).to(torch.int64)).to(dtype)


def golden_lossless() -> dict[str, Tensor]:
    """The tensors of the lossless files of tests/data."""
    w = golden_weights(torch.float64)
    chunk = 1 << 15
    steps = torch.full((2 * chunk + 100,), 3, dtype=torch.int16)
    steps[chunk : 2 * chunk] = -200
    steps[2 * chunk :] = golden_symbols(100, 30_000).to(torch.int16)
    return {
        "lossless_bfloat16.bin": w.to(torch.bfloat16),
        "lossless_float16.bin": w.to(torch.float16),
        "lossless_float32.bin": w.to(torch.float32),
        "lossless_float64.bin": w / 3,
        "lossless_float8.bin": w.to(torch.float8_e4m3fn),
        "lossless_complex64.bin": torch.complex(w.float(), w.float().flip(0)),
        "lossless_int64.bin": golden_symbols(500, 900).to(torch.int64).view(5, 100) - 300,
        "lossless_two_tables.bin": steps,
        "lossless_deep_raw.bin": golden_symbols(6, 250).to(torch.uint8).view((1,) * 14 + (2, 3)),
    }
