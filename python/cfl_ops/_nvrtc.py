"""The kernels of csrc/cuda compiled at run time by CuPy's NVRTC, for installations without a CUDA compiler.

The sources come with the package. CuPy keeps what it compiled in its own cache (``~/.cupy/kernel_cache``), by
the text of the source: hence one text without includes. Never run on a GPU; the tests compile it.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

THREADS, WARPS, PART, MAX_SHARED, TILE_BYTES, MAX_SHARED_SYMBOLS = 256, 8, 1 << 15, 8192, 1 << 11, 4096
"""As in device.cuh and codec_kernel.cuh."""
MOST_BLOCKS, SPAN = 1 << 20, 1 << 12
OPTIONS = ("-std=c++20",)

_SYMBOLS = {torch.uint8: "uint8_t", torch.uint16: "uint16_t"}
_FLOATS = {torch.float16: "Half", torch.bfloat16: "BFloat", torch.float32: "float", torch.float64: "double"}


def source() -> str:
    """All kernels as one text: NVRTC needs no folder of headers for it."""
    here = Path(__file__).parent
    roots = [here / "csrc", *(parent / "csrc" for parent in here.parents)]  # installed, or editable
    root = next((root for root in roots if (root / "cuda" / "device.cuh").is_file()), None)
    if root is None:
        raise RuntimeError("cfl_ops: the CUDA sources are not installed beside the package")
    text = ""
    for name in ("device.cuh", "codec_kernel.cuh", "gram_kernel.cuh"):
        text += (root / "cuda" / name).read_text()
    return re.sub(r'^#(pragma once|include "cuda/.*)$', "", text, flags=re.MULTILINE)


def names() -> list[str]:
    """The instantiations that are compiled."""
    symbols, floats = tuple(_SYMBOLS.values()), tuple(_FLOATS.values())
    kernels = ["codec_gather_kernel<uint8_t>"]
    kernels += [f"codec_{what}_kernel<{s}>" for what in ("largest", "histogram", "encode") for s in symbols]
    kernels += [f"codec_decode_kernel<{s}, {t}>" for s in symbols for t in (s, *floats)]
    kernels += [f"codec_{what}_kernel<{t}>" for what in ("range", "ends", "affine") for t in floats]
    kernels += [f"codec_quantize_kernel<{t}, {s}>" for t in floats for s in symbols]
    kernels += [f"codec_dequantize_kernel<{s}, {t}>" for t in floats for s in symbols]
    kernels += [f"exact_gram_kernel<{t}>" for t in floats]
    return [qualified(name) for name in kernels]


def qualified(name: str) -> str:
    """``f<uint8_t>`` -> ``cfl::cuda::f<cfl::cuda::uint8_t>``: NVRTC has no other uint8_t."""
    head, arguments = name[:-1].split("<")
    types = [t if t in ("float", "double") else f"cfl::cuda::{t}" for t in arguments.split(", ")]
    return f"cfl::cuda::{head}<{', '.join(types)}>"


def _current_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.current_stream(device)


def _counting_blocks(symbols: int) -> int:
    return min(1024, -(-symbols // (16 * THREADS)))


class Nvrtc:
    """The same calls as :class:`cfl_ops._cuda.Native`."""

    def __init__(self) -> None:
        import cupy
        import numpy

        self.cupy, self.numpy = cupy, numpy

    @functools.cached_property
    def module(self) -> Any:
        """Compiled once for each device that uses it (CuPy sees to that)."""
        return self.cupy.RawModule(code=source(), options=OPTIONS, name_expressions=names())

    def launch(self, name: str, device: torch.device, blocks: int, shared: int, *arguments: Any) -> None:
        """Put a kernel into torch's current stream. CuPy does not follow that stream by itself."""
        np = self.numpy
        with self.cupy.cuda.Device(device.index):
            function = self.module.get_function(qualified(name))
            if shared > 24 << 10:  # more than 48 KB, with the static part, must be asked for
                function.max_dynamic_shared_size_bytes = shared
            current = _current_stream(device)
            if hasattr(current, "__cuda_stream__") or current is None:
                stream = self.cupy.cuda.Stream.from_external(current)
            else:  # an older torch
                stream = self.cupy.cuda.ExternalStream(current.cuda_stream, device.index)
            plain = [
                np.uint64(0 if a is None else a.data_ptr()) if a is None or isinstance(a, Tensor) else a
                for a in arguments
            ]
            with stream:
                function((blocks,), (THREADS,), tuple(plain), shared_mem=shared)

    def largest(self, symbols: Tensor, largest: Tensor) -> None:
        """See codec.cuh, here and below."""
        n, blocks = symbols.numel(), _counting_blocks(symbols.numel())
        if n:
            name = f"codec_largest_kernel<{_SYMBOLS[symbols.dtype]}>"
            self.launch(name, symbols.device, blocks, 0, symbols, self.numpy.int64(n), largest)

    def histogram(self, symbols: Tensor, counts: Tensor) -> None:
        """Counts of all symbols, or of a sample."""
        n, blocks = symbols.numel(), _counting_blocks(symbols.numel())
        if n:
            name = f"codec_histogram_kernel<{_SYMBOLS[symbols.dtype]}>"
            shared = 4 * min(counts.numel() - 1, MAX_SHARED)
            self.launch(name, symbols.device, blocks, shared, symbols, self.numpy.int64(n), counts)

    def encode(
        self, symbols: Tensor, chunk_log2: int, tree: Tensor, nodes: int, leaves: int, alphabet: int,
        crc_tables: Tensor, staged_words: int, shared: int, slots: Tensor, entries: Tensor,
    ) -> None:  # fmt: skip
        """Chunks into their slots."""
        np = self.numpy
        self.launch(
            *(f"codec_encode_kernel<{_SYMBOLS[symbols.dtype]}>", symbols.device, entries.shape[0], shared),
            *(symbols, np.int64(symbols.numel()), np.int32(chunk_log2), tree, np.int32(nodes)),
            *(np.int32(leaves), np.int32(alphabet), crc_tables, slots, np.int64(slots.shape[1])),
            *(np.int32(staged_words), entries),
        )

    def gather(self, slots: Tensor, entries: Tensor, offsets: Tensor, out: Tensor) -> None:
        """Chunks from their slots to their places."""
        self.launch(
            *("codec_gather_kernel<uint8_t>", slots.device, offsets.numel(), 0),
            *(slots, self.numpy.int64(slots.shape[1]), entries, offsets, out),
        )

    def decode(
        self, payload: Tensor, entries: Tensor, offsets: Tensor, n: int, chunk_log2: int, first_chunk: int,
        tree: Tensor, nodes: int, leaves: int, crc_tables: Tensor, affine: Tensor | None, group_size: int,
        symbol_bytes: int, start: int, largest: int, lists: int, shared: int, out: Tensor, info: Tensor,
    ) -> None:  # fmt: skip
        """Chunks to symbols, or with ``affine`` to weights."""
        np, kind = self.numpy, f"uint{8 * symbol_bytes}_t"
        to = kind if affine is None else _FLOATS[out.dtype]
        self.launch(
            *(f"codec_decode_kernel<{kind}, {to}>", out.device, offsets.numel(), shared),
            *(payload, entries, offsets, np.int64(n), np.int32(chunk_log2), np.int64(first_chunk), tree),
            *(np.int32(nodes), np.int32(leaves), crc_tables, affine, np.int64(group_size), np.int64(start)),
            *(np.int64(out.numel()), np.int32(largest), np.int32(lists), out, info),
        )

    def range(
        self, weights: Tensor, levels: int, ends: Tensor, bad: Tensor, minimum: Tensor, maximum: Tensor,
        info: Tensor, affine: Tensor,
    ) -> None:  # fmt: skip
        """The range of each group, and its arithmetic."""
        np, kind = self.numpy, _FLOATS[weights.dtype]
        groups, size = weights.shape
        if groups == 0:
            return
        parts = -(-size // PART)
        if size:
            self.launch(
                *(
                    f"codec_range_kernel<{kind}>",
                    weights.device,
                    min(MOST_BLOCKS, groups * parts),
                    0,
                    weights,
                ),
                *(np.int64(groups), np.int64(size), np.int64(parts), ends, bad),
            )
        self.launch(
            *(f"codec_ends_kernel<{kind}>", weights.device, min(MOST_BLOCKS, -(-groups // WARPS)), 0),
            *(ends, bad, np.int64(groups), np.int64(parts), np.int32(levels), minimum, maximum, info, affine),
        )

    def affine(self, minimum: Tensor, maximum: Tensor, levels: int, affine: Tensor) -> None:
        """The arithmetic of each group from its range."""
        groups, np = minimum.numel(), self.numpy
        if groups:
            self.launch(
                *(f"codec_affine_kernel<{_FLOATS[minimum.dtype]}>", minimum.device, -(-groups // THREADS), 0),
                *(minimum, maximum, np.int64(groups), np.int32(levels), affine),
            )

    def quantize(
        self,
        weights: Tensor,
        affine: Tensor,
        info: Tensor,
        levels: int,
        symbols: Tensor,
        counts: Tensor | None,
    ) -> None:
        """Weights to symbols, and their counts."""
        np, kind = self.numpy, f"{_FLOATS[weights.dtype]}, {_SYMBOLS[symbols.dtype]}"
        groups, size = weights.shape
        if groups == 0 or size == 0:
            return
        parts = -(-size // PART)
        self.launch(
            *(f"codec_quantize_kernel<{kind}>", weights.device, min(MOST_BLOCKS, groups * parts)),
            4 * levels if counts is not None and levels <= MAX_SHARED else 0,
            *(weights, np.int64(groups), np.int64(size), np.int64(parts), affine, info, np.int32(levels)),
            *(symbols, counts),
        )

    def dequantize(self, symbols: Tensor, affine: Tensor, weights: Tensor) -> None:
        """Symbols to weights."""
        n, np = symbols.numel(), self.numpy
        if n:
            self.launch(
                f"codec_dequantize_kernel<{_SYMBOLS[symbols.dtype]}, {_FLOATS[weights.dtype]}>",
                *(symbols.device, min(MOST_BLOCKS, -(-n // (SPAN * WARPS))), 0),
                *(symbols, np.int64(n), np.int64(symbols.shape[1]), affine, weights),
            )

    def exact_gram(self, x: Tensor, weight: Tensor | None, gram: Tensor) -> None:
        """X (matrices, rows, columns) of any strides, weight (matrices, rows) float64 or None."""
        np = self.numpy
        batch, rows, cols = x.shape
        tiles = -(-cols // 64)
        if batch and cols:
            weight_strides = (0, 0) if weight is None else weight.stride()
            self.launch(
                *(f"exact_gram_kernel<{_FLOATS[x.dtype]}>", x.device, tiles * (tiles + 1) // 2 * batch, 0, x),
                *map(np.int64, (rows, cols, *x.stride())),
                *(weight, *map(np.int64, weight_strides), gram),
            )
