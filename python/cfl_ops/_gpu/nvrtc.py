"""The kernels of csrc/cuda compiled at run time by CuPy's NVRTC, for installations without a CUDA compiler.

The sources come with the package. CuPy keeps what it compiled in its own cache (``~/.cupy/kernel_cache``), by
the text of the source: hence one text without includes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cfl_ops._gpu.sources import RANKS, Constants, source

CODEC = Constants("codec")
GRAM = Constants("exact")
SOLVE = Constants("solve")
CHOLESKY = Constants("cholesky")

OPTIONS = ("-std=c++20", "-diag-suppress=177")  # a family does not use all of device.cuh
_SYMBOLS = {torch.uint8: "uint8_t", torch.uint16: "uint16_t"}
_COMPUTED = (("float", "float"), ("float", "double"), ("double", "double"))
_SMALL_ORDERS = (8, 16, 32, 64)
_FLOATS = {torch.float16: "Half", torch.bfloat16: "BFloat", torch.float32: "float", torch.float64: "double"}


def names(family: str) -> list[str]:
    """The instantiations that are compiled."""
    symbols, floats = tuple(_SYMBOLS.values()), tuple(_FLOATS.values())
    kernels = {
        "codec": [
            "codec_gather_kernel<uint8_t>",
            *(f"codec_{what}_kernel<{s}>" for what in ("largest", "histogram", "encode") for s in symbols),
            *(f"codec_decode_kernel<{s}, {t}>" for s in symbols for t in (s, *floats)),
            *(f"codec_{what}_kernel<{t}>" for what in ("range", "ends", "affine") for t in floats),
            *(f"codec_quantize_kernel<{t}, {s}>" for t in floats for s in symbols),
            *(f"codec_dequantize_kernel<{s}, {t}>" for t in floats for s in symbols),
        ],
        "exact": [f"exact_gram_kernel<{t}>" for t in floats],
        "solve": [
            *(f"solve_small_kernel<{t}, {c}, {n}>" for t, c in _COMPUTED for n in _SMALL_ORDERS),
            *(f"solve_{kind}_kernel<{t}>" for kind in ("careful", "tiled") for t in ("float", "double")),
            *(f"solve_pinv_kernel<{t}, {n}>" for t in ("float", "double") for n in _SMALL_ORDERS[:-1]),
        ],
        "cholesky": [
            *(f"cholesky_update_kernel<{_FLOATS[t]}, {r}>" for t, ranks in RANKS.items() for r in ranks),
            *(f"cholesky_choose_kernel<{t}>" for t in ("float", "double")),
        ],
    }
    return [qualified(name) for name in kernels[family]]


def qualified(name: str) -> str:
    """``f<uint8_t>`` -> ``cfl::cuda::f<cfl::cuda::uint8_t>``: NVRTC has no other uint8_t."""
    head, arguments = name[:-1].split("<")
    plain = ("float", "double")
    types = [t if t in plain or t.isdigit() else f"cfl::cuda::{t}" for t in arguments.split(", ")]
    return f"cfl::cuda::{head}<{', '.join(types)}>"


def _current_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.current_stream(device)


def _small_solve(order: int, element: int) -> tuple[int, int, int]:
    """Systems of a warp, warps of a block and bytes of a warp: SmallSolve of solve_kernel.cuh."""
    systems = max(1, 32 // order)
    numbers = order * (order + 16 // element) + (order if systems > 1 else 0)
    held = systems * numbers * element
    return systems, 1 if held > 32 << 10 else 2 if held > 16 << 10 else 4 if held > 8 << 10 else 8, held


def _counting_blocks(symbols: int) -> int:
    return min(1024, -(-symbols // (16 * CODEC.kThreads)))


class Nvrtc:
    """The same calls as :class:`cfl_ops._gpu.native.Native`."""

    def __init__(self) -> None:
        import cupy
        import numpy

        self.cupy, self.numpy = cupy, numpy
        self.modules: dict[str, Any] = {}

    def module(self, family: str) -> Any:
        """Compiled once for each device that uses it (CuPy sees to that)."""
        if family not in self.modules:
            self.modules[family] = self.cupy.RawModule(
                code=source(family), options=OPTIONS, name_expressions=names(family)
            )
        return self.modules[family]

    def launch(
        self,
        name: str,
        device: torch.device,
        blocks: int,
        shared: int,
        *arguments: Any,
        threads: int | None = None,
    ) -> None:
        """Put a kernel into torch's current stream. CuPy does not follow that stream by itself."""
        np = self.numpy
        with self.cupy.cuda.Device(device.index):
            function = self.module(name.split("_")[0]).get_function(qualified(name))
            if shared > 24 << 10:  # more than 48 KB, with the static part, must be asked for
                function.max_dynamic_shared_size_bytes = shared
            current = _current_stream(device)
            from_external = getattr(self.cupy.cuda.Stream, "from_external", None)  # CuPy 14
            if current is None or (from_external and hasattr(current, "__cuda_stream__")):
                stream = self.cupy.cuda.Stream.from_external(current)
            else:  # an older torch
                stream = self.cupy.cuda.ExternalStream(current.cuda_stream, device.index)
            plain = [
                np.uint64(0 if a is None else a.data_ptr()) if a is None or isinstance(a, Tensor) else a
                for a in arguments
            ]
            with stream:
                function((blocks,), (threads or CODEC.kThreads,), tuple(plain), shared_mem=shared)

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
            shared = 4 * min(counts.numel() - 1, CODEC.kMaxShared)
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
        parts = -(-size // CODEC.kPart)
        if size:
            self.launch(
                *(
                    f"codec_range_kernel<{kind}>",
                    weights.device,
                    min(CODEC.kMostBlocks, groups * parts),
                    0,
                    weights,
                ),
                *(np.int64(groups), np.int64(size), np.int64(parts), ends, bad),
            )
        self.launch(
            *(
                f"codec_ends_kernel<{kind}>",
                weights.device,
                min(CODEC.kMostBlocks, -(-groups // CODEC.kWarps)),
                0,
            ),
            *(ends, bad, np.int64(groups), np.int64(parts), np.int32(levels), minimum, maximum, info, affine),
        )

    def affine(self, minimum: Tensor, maximum: Tensor, levels: int, affine: Tensor) -> None:
        """The arithmetic of each group from its range."""
        groups, np = minimum.numel(), self.numpy
        if groups:
            self.launch(
                *(
                    f"codec_affine_kernel<{_FLOATS[minimum.dtype]}>",
                    minimum.device,
                    -(-groups // CODEC.kThreads),
                    0,
                ),
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
        parts = -(-size // CODEC.kPart)
        self.launch(
            *(f"codec_quantize_kernel<{kind}>", weights.device, min(CODEC.kMostBlocks, groups * parts)),
            4 * levels if counts is not None and levels <= CODEC.kMaxShared else 0,
            *(weights, np.int64(groups), np.int64(size), np.int64(parts), affine, info, np.int32(levels)),
            *(symbols, counts),
        )

    def dequantize(self, symbols: Tensor, affine: Tensor, weights: Tensor) -> None:
        """Symbols to weights."""
        n, np = symbols.numel(), self.numpy
        if n:
            self.launch(
                f"codec_dequantize_kernel<{_SYMBOLS[symbols.dtype]}, {_FLOATS[weights.dtype]}>",
                *(
                    symbols.device,
                    min(CODEC.kMostBlocks, -(-n // (CODEC.kSpan * CODEC.kWarps))),
                    0,
                ),
                *(symbols, np.int64(n), np.int64(symbols.shape[1]), affine, weights),
            )

    def exact_gram(
        self, x: Tensor, weight: Tensor | None, workspace: Tensor, arrived: Tensor, gram: Tensor
    ) -> None:
        """X (matrices, rows, columns) of any strides, weight (matrices, rows) float64 or None."""
        np = self.numpy
        batch, rows, cols = x.shape
        tiles, splits = -(-cols // GRAM.kGramTile), workspace.shape[1]
        if batch and cols:
            weight_strides = (0, 0) if weight is None else weight.stride()
            self.launch(
                f"exact_gram_kernel<{_FLOATS[x.dtype]}>", x.device, tiles * (tiles + 1) // 2 * batch * splits, 0,
                x, *map(np.int64, (rows, cols, *x.stride())), weight, *map(np.int64, weight_strides),
                np.int32(splits), np.int64(-(-rows // splits)), workspace, arrived, gram,
            )  # fmt: skip

    def solve_small(
        self, matrices: Tensor, rights: Tensor, lam: float, shift: Tensor | None, tolerance: float, in_float64: bool,
        only: Tensor | None, solutions: Tensor, info: Tensor, again: Tensor | None,
    ) -> None:  # fmt: skip
        """See solve.cuh, here and below."""
        np = self.numpy
        batch, n, columns = rights.shape
        if batch == 0:
            return
        order = next(o for o in _SMALL_ORDERS if o >= n)
        element = 8 if in_float64 else matrices.element_size()
        kind = f"{_FLOATS[matrices.dtype]}, {'double' if in_float64 else _FLOATS[matrices.dtype]}, {order}"
        systems, warps, held = _small_solve(order, element)
        blocks = -(-batch * max(1, -(-columns // SOLVE.kColumnsPerWarp)) // (warps * systems))
        if element != matrices.element_size():
            blocks = min(blocks, SOLVE.kSecondLookBlocks)
        self.launch(
            f"solve_small_kernel<{kind}>", matrices.device, blocks, warps * held,
            matrices, rights, np.float64(lam), shift, np.int64(batch), np.int32(n), np.int64(columns),
            np.float64(tolerance), only, solutions, info, again, threads=32 * warps,
        )  # fmt: skip

    def solve_careful(
        self,
        matrices: Tensor,
        rights: Tensor,
        lam: float,
        shift: Tensor | None,
        solutions: Tensor,
        info: Tensor,
    ) -> None:
        """The systems with info other than 0 once more."""
        np = self.numpy
        batch, n, columns = rights.shape
        if batch:
            self.launch(
                f"solve_careful_kernel<{_FLOATS[matrices.dtype]}>", matrices.device,
                min(batch, SOLVE.kSecondLookBlocks), 0, matrices, rights, np.float64(lam), shift, np.int64(batch),
                np.int32(n), np.int64(columns), solutions, info, threads=SOLVE.kCareful,
            )  # fmt: skip

    def small_pinv(self, a: Tensor, limit: float, tolerance: float, results: Tensor, info: Tensor) -> None:
        """The smaller side up to 32."""
        np = self.numpy
        batch, rows, cols = a.shape
        n = min(rows, cols)
        order = next(o for o in _SMALL_ORDERS if o >= n)
        systems, warps, held = _small_solve(order, 8)
        held += systems * 2 * order * 8
        if batch:
            self.launch(
                f"solve_pinv_kernel<{_FLOATS[a.dtype]}, {order}>", a.device, -(-batch // (warps * systems)),
                warps * held, a, np.int64(batch), np.int32(max(rows, cols)), np.int32(n), np.int32(rows < cols),
                np.float64(limit), np.float64(tolerance), results, info, threads=32 * warps,
            )  # fmt: skip

    def solve_tiled(
        self, matrices: Tensor, rights: Tensor, lam: float, shift: Tensor | None, tolerance: float, work: Tensor,
        inverse: Tensor, flags: Tensor, solutions: Tensor, factors: Tensor | None, info: Tensor,
    ) -> None:  # fmt: skip
        """Tile by tile in float64."""
        np = self.numpy
        batch, n, columns = rights.shape
        tiles, right_tiles = -(-n // SOLVE.kSide), -(-columns // SOLVE.kSide)
        blocks = batch * (tiles * (tiles + 1) // 2 + 2 * tiles * right_tiles)
        if blocks:
            self.launch(
                f"solve_tiled_kernel<{_FLOATS[matrices.dtype]}>", matrices.device, blocks, 0,
                matrices, rights, np.float64(lam), shift, *map(np.int64, (batch, n, columns)),
                np.float64(tolerance), work, inverse, flags, flags[-1:], solutions, factors, info,
            )  # fmt: skip

    def cholesky_update(
        self, matrices: Tensor, vectors: Tensor, scale_l: float, scale_v: float, check: bool, down: bool,
        breakdown: float, out: Tensor, reflectors: Tensor, flags: Tensor, found: Tensor,
    ) -> None:  # fmt: skip
        """See cholesky.cuh, here and below."""
        np = self.numpy
        batch, n, rank = vectors.shape
        real = np.float64 if matrices.dtype == torch.float64 else np.float32
        held = next(r for r in RANKS[matrices.dtype] if r >= rank)
        blocks = batch * -(-n // CHOLESKY.kPanel)
        if blocks:
            self.launch(
                f"cholesky_update_kernel<{_FLOATS[matrices.dtype]}, {held}>", matrices.device, blocks, 0,
                np.int64(n), np.int64(rank), matrices, *map(np.int64, matrices.stride()), vectors,
                *map(np.int64, vectors.stride()), real(scale_l), real(scale_v), np.int32(check), np.int32(down),
                real(breakdown), out, reflectors, flags, flags[-1:], found, threads=CHOLESKY.kPanel,
            )  # fmt: skip

    def cholesky_choose(
        self, matrices: Tensor, found: Tensor, failed: bool, out: Tensor, info: Tensor
    ) -> None:
        """The factors of the systems that failed, or of those that did not."""
        np = self.numpy
        batch, n = matrices.shape[:2]
        each = min(1, n) if n <= 128 else min(1024, -(-n // CODEC.kWarps))
        if batch * each:
            self.launch(
                f"cholesky_choose_kernel<{_FLOATS[matrices.dtype]}>", matrices.device, batch * each, 0,
                np.int64(each), np.int64(n), matrices, *map(np.int64, matrices.stride()), out,
                *map(np.int64, out.stride()), found, np.int32(len(found)), np.int64(batch), np.int32(failed), info,
            )  # fmt: skip
