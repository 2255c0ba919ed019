"""The codec's ops on a GPU: memory, headers and code on the host, and the kernels of csrc/cuda/codec_kernel.cuh.

The bytes are those of the CPU. What the kernels do not hold (a code tree of more than 1,024 nodes, chunks of more
than 2^15 symbols or more bytes than a block's shared memory) is left to the fallback in torch ops.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import _codec_python as _py
from ._nvrtc import MAX_SHARED_SYMBOLS, PART, THREADS, TILE_BYTES, WARPS

MAX_NODES, MAX_CHUNK_LOG2 = 1024, 15
STATIC_SHARED = 5 << 10
"""Bytes that the kernels declare themselves, with some to spare."""
NO_CHUNK = 2**63 - 1


# --- checksums ----------------------------------------------------------------------------------------------


def _crc_multiply(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ 0xEDB88320 if b & 1 else b >> 1
    return product


def _crc_power(count: int) -> int:
    """x^(8 count): multiplying by it moves a remainder over that many zero bytes."""
    result, square = 0x80000000, 0x00800000
    while count:
        if count & 1:
            result = _crc_multiply(result, square)
        square = _crc_multiply(square, square)
        count >>= 1
    return result


@functools.cache
def crc_tables(device: torch.device) -> Tensor:
    """What block_crc looks up: a row of 256 words further, byte by byte; then each thread's way to the end."""
    row = _crc_power(4 * THREADS)
    entries = [_crc_multiply(value << 8 * byte, row) for byte in range(4) for value in range(256)]
    entries += [_crc_power(4 * (THREADS - thread)) for thread in range(THREADS)]
    return _to_device(struct.pack(f"<{len(entries)}I", *entries), device).view(torch.int32)


def _to_device(data: bytes, device: torch.device) -> Tensor:
    """A copy that does not wait for the GPU."""
    host = _py.from_bytes(data)
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def _shared_memory(device: torch.device) -> int:
    """Bytes that a block can ask for: 99 KB on consumer cards, 227 KB on an H100, less the static ones."""
    if device.type != "cuda":
        return (99 << 10) - STATIC_SHARED
    properties = torch.cuda.get_device_properties(device)
    optin: int = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    return optin - STATIC_SHARED


_STACK_BYTES = 2 * (TILE_BYTES + 4 * 64)
"""The two stacks of lists of a warp (Tile in codec_kernel.cuh)."""


def _node_bytes(nodes: int, chunk_log2: int, symbol_bytes: int) -> int:
    """The nodes, where their bits start, and what has passed them at the end of each tile."""
    tiles = -(-(symbol_bytes << chunk_log2) // TILE_BYTES)
    return 20 * nodes + 4 * -(-tiles * nodes // 2)


def encode_shared(nodes: int, chunk_log2: int, alphabet: int, symbol_bytes: int) -> int:
    """Bytes of shared memory that codec_encode_kernel needs besides the bits of a chunk."""
    codes = 4 * alphabet if alphabet <= MAX_SHARED_SYMBOLS else 0
    return _node_bytes(nodes, chunk_log2, symbol_bytes) + WARPS * max(_STACK_BYTES, 4 * nodes) + codes


def decode_shared(nodes: int, chunk_log2: int, leaves: int, symbol_bytes: int, largest: int) -> int:
    """Bytes of shared memory that codec_decode_kernel needs besides the stacks of its warps."""
    symbols = 4 * -(-leaves // 2) if leaves <= MAX_SHARED_SYMBOLS else 0
    words = -(-largest // 4) + 2
    return _node_bytes(nodes, chunk_log2, symbol_bytes) + symbols + 4 * (words + words // 2)


# --- quantize -----------------------------------------------------------------------------------------------


def _symbol_dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.uint16


def quantize(kernels: Any, w: Tensor, bits: int, histogram: bool) -> tuple[Tensor, ...]:
    """The op ``cfl_ops::quantize``: two passes over the weights, no synchronisation."""
    batch, size, levels = w.shape[:-1], w.shape[-1], 1 << bits
    groups = batch.numel()
    flat = w.reshape(groups, size).contiguous()
    parts = -(-size // PART)

    def fresh(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=w.device)

    ends, bad = (
        fresh(groups, parts, 2, dtype=torch.float64),
        fresh(groups, parts, dtype=torch.int64),
    )
    minimum, maximum = fresh(groups, dtype=w.dtype), fresh(groups, dtype=w.dtype)
    info, affine = fresh(groups, dtype=torch.int64), fresh(groups, 6, dtype=torch.float64)
    kernels.range(flat, levels, ends, bad, minimum, maximum, info, affine)
    symbols = fresh(groups, size, dtype=_symbol_dtype(bits))
    counts = fresh(groups, levels if histogram else 0, dtype=torch.int64).zero_()
    kernels.quantize(flat, affine, info, levels, symbols, counts if histogram else None)
    return (
        symbols.view(w.shape),
        minimum.view(batch),
        maximum.view(batch),
        counts.view(*batch, counts.shape[1]),
        info.view(batch),
    )


def _affine(kernels: Any, minimum: Tensor, maximum: Tensor, bits: int) -> Tensor:
    affine = torch.empty(minimum.numel(), 6, dtype=torch.float64, device=minimum.device)
    kernels.affine(minimum.contiguous(), maximum.contiguous(), 1 << bits, affine)
    return affine


def dequantize(kernels: Any, symbols: Tensor, minimum: Tensor, maximum: Tensor, bits: int) -> Tensor:
    """The op ``cfl_ops::dequantize``."""
    batch = symbols.shape[:-1]
    one = minimum.numel() == 1 and maximum.numel() == 1
    groups = 1 if one else batch.numel()
    low, high = (
        (minimum.reshape(1), maximum.reshape(1))
        if one
        else (minimum.expand(batch).reshape(-1), maximum.expand(batch).reshape(-1))
    )
    weights = torch.empty(symbols.shape, dtype=minimum.dtype, device=symbols.device)
    if symbols.numel():
        flat = symbols.reshape(groups, -1).contiguous()
        kernels.dequantize(flat, _affine(kernels, low, high, bits), weights)
    return weights


# --- Huffman ------------------------------------------------------------------------------------------------


def _counts(kernels: Any, symbols: Tensor) -> list[int]:
    """As sample_counts of _codec_python."""
    n, alphabet = symbols.numel(), 256
    if symbols.dtype != torch.uint8:
        low, high = (int(end) for end in torch.stack(symbols.view(torch.int16).aminmax()).tolist())
        # Symbols from 2^15 on are the negative ones.
        top = symbols.view(torch.int16)[symbols.view(torch.int16) < 0].amax().item() if low < 0 else 0
        alphabet = int(top) + (1 << 16) + 1 if low < 0 else high + 1
    stride = max(1, n // (1024 * alphabet))
    found = torch.zeros(alphabet, dtype=torch.int64, device=symbols.device)
    block, step = (n, n) if stride == 1 else (4096, 4096 * stride)
    kernels.histogram(symbols, block, step, found)
    counts: list[int] = found.tolist()
    if stride > 1:
        counts = [count * stride if count else 1 for count in counts]
    while counts[-1] == 0:
        counts.pop()
    return counts


def _pack_tree(tree: _py.Tree, alphabet: int, device: torch.device) -> Tensor:
    """As the kernels read it: the nodes, the symbol of each rank, the rank and the leaf of each symbol."""
    codes, odd = [0] * alphabet, [0] * len(tree.nodes)
    nodes: list[int] = []
    for v, node in enumerate(tree.nodes):
        if node.right:
            odd[v + 1] = odd[node.right] = 1 - odd[v]
        else:
            for rank in range(node.first, node.first + (1 << node.bits)):
                codes[tree.symbols[rank]] = v << 16 | rank
        nodes += node.right, node.first, node.bits, odd[v]
    symbols = tree.symbols + [0] * (len(tree.symbols) % 2)
    data = struct.pack(f"<{len(nodes)}i{len(symbols)}H{alphabet}I", *nodes, *symbols, *codes)
    return _to_device(data, device).view(torch.int32)


def huffman_encode(
    kernels: Any, symbols: Tensor, shape: Sequence[int], chunk_log2: int, reserve: int
) -> Tensor:
    """The op ``cfl_ops::huffman_encode``. Waits for the counts, and for the sizes of the chunks."""
    flat, device = symbols.reshape(-1).contiguous(), symbols.device
    n, chunk = flat.numel(), 1 << chunk_log2
    if n == 0:
        return _py.encode(symbols, tuple(shape), chunk_log2, reserve)
    counts = _counts(kernels, flat)
    lengths = _py.code_lengths(counts)
    tree = _py.build_tree(lengths)
    symbol_bytes = flat.element_size()
    shared = encode_shared(len(tree.nodes), chunk_log2, len(lengths), symbol_bytes)
    room = _shared_memory(device) - shared
    if len(tree.nodes) > MAX_NODES or chunk_log2 > MAX_CHUNK_LOG2 or room < 0:
        return _py.encode(symbols, tuple(shape), chunk_log2, reserve)
    packed, leaves = _pack_tree(tree, len(lengths), device), len(tree.symbols)
    # What the counts promise with some room; if a chunk needs more, its size comes back and nothing else.
    bits = sum(count * length for count, length in zip(counts, lengths, strict=True)) if leaves > 1 else 0
    needed = min(chunk * max(lengths), int(1.02 * chunk * bits / sum(counts)) + 2048)
    chunks = -(-n // chunk)
    entries = torch.empty(chunks, 2, dtype=torch.int32, device=device)
    while True:
        slots = torch.empty(chunks, needed // 32 + 1, dtype=torch.int32, device=device)
        staged = slots.shape[1] if 4 * slots.shape[1] <= room else 0
        kernels.encode(
            *(flat, chunk_log2, packed, len(tree.nodes), leaves, len(lengths), crc_tables(device), staged),
            *(shared + 4 * staged, slots, entries),
        )
        table = entries.cpu()
        largest = int(table[:, 0].max())
        if -(-largest // 4) <= slots.shape[1]:
            break
        needed = 8 * largest
    head = _py.head_bytes(
        flat.element_size(),
        chunk_log2,
        n,
        tuple(shape),
        lengths,
        _py.as_bytes(table.view(torch.uint8).flatten()),
    )
    sizes = entries[:, 0].to(torch.int64)
    offsets = sizes.cumsum(0) - sizes
    front = reserve + len(head)
    out = torch.empty(front + int(table[:, 0].sum()), dtype=torch.uint8, device=device)
    out[:front] = _to_device(bytes(reserve) + head, device)
    kernels.gather(slots, entries, offsets, out[front:])
    return out


def huffman_decode_(kernels: Any, payload: Tensor, out: Tensor, start: int) -> Tensor:
    """The op ``cfl_ops::huffman_decode_``. Waits for the header; its info comes without waiting."""
    info = _decode(kernels, payload, out, start, None, 1)
    if info is None:
        from .codec import HUFFMAN_DECODE

        return HUFFMAN_DECODE.python(payload, out, start)  # type: ignore[no-any-return]
    return info


def decompress_(
    kernels: Any, payload: Tensor, minimum: Tensor, maximum: Tensor, bits: int, group_size: int, out: Tensor,
    start: int,
) -> Tensor:  # fmt: skip
    """The op ``cfl_ops::decompress_``: decoding and weights in one kernel."""
    count = out.numel()
    if start < 0 or (count and (start + count - 1) // group_size >= minimum.numel()):
        return torch.tensor(_py.OUT_OF_RANGE, device=payload.device)
    info = _decode(kernels, payload, out, start, _affine(kernels, minimum, maximum, bits), group_size)
    if info is None:
        from .codec import DECOMPRESS

        return DECOMPRESS.python(payload, minimum, maximum, bits, group_size, out, start)  # type: ignore[no-any-return]
    return info


def _decode(
    kernels: Any, payload: Tensor, out: Tensor, start: int, affine: Tensor | None, group_size: int
) -> Tensor | None:
    """The info, or None where the kernel cannot hold the code or a chunk."""
    payload, device, count = payload.contiguous(), payload.device, out.numel()
    try:
        header = _py.parse(payload)
    except _py.Corrupt as error:
        return torch.tensor(error.code, device=device)
    if (
        start < 0
        or start + count > header.numel
        or (affine is None and out.element_size() != header.symbol_bytes)
    ):
        return torch.tensor(_py.OUT_OF_RANGE, device=device)
    if count == 0:
        return torch.tensor(_py.GOOD, device=device)
    first, last = start >> header.chunk_log2, (start + count - 1) >> header.chunk_log2
    largest = max(header.sizes[first : last + 1])
    tree = _py.build_tree(header.lengths)
    nodes, leaves = len(tree.nodes), len(tree.symbols)
    shared = decode_shared(nodes, header.chunk_log2, leaves, header.symbol_bytes, largest)
    lists = min(WARPS, (_shared_memory(device) - shared) // _STACK_BYTES)
    if nodes > MAX_NODES or header.chunk_log2 > MAX_CHUNK_LOG2 or lists < 1:
        return None
    shared += lists * _STACK_BYTES
    table = header.data - 8 * len(header.sizes)
    entries = payload[table + 8 * first : table + 8 * (last + 1)].clone().view(torch.int32).view(-1, 2)
    sizes = entries[:, 0].to(torch.int64)
    offsets = sizes.cumsum(0) - sizes + (header.data + sum(header.sizes[:first]))
    bad = torch.full((), NO_CHUNK, dtype=torch.int64, device=device)
    kernels.decode(
        *(payload, entries, offsets, header.numel, header.chunk_log2, first),
        *(_pack_tree(tree, len(header.lengths), device), nodes, leaves, crc_tables(device)),
        *(affine, group_size, header.symbol_bytes, start, largest, lists, shared, out, bad),
    )
    return torch.where(bad == NO_CHUNK, _py.GOOD, _py.BAD_CHUNK + bad)
