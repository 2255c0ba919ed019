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

from cfl_ops._core.op import UNSERVED, Unserved
from cfl_ops._gpu.sources import Constants
from cfl_ops.ops.codec import codes
from cfl_ops.ops.codec.arguments import DecompressArguments
from cfl_ops.ops.codec.reference import payload as reference
from cfl_ops.ops.codec.reference.header import HEADER_BYTES, from_bytes, prefix, symbol_dtype
from cfl_ops.ops.codec.sample import sampled

CODEC = Constants("codec")


@functools.cache
def _ops() -> Any:
    """The ops ``host_*``, which are defined when a GPU first needs them."""
    from cfl_ops.ops.codec import host  # noqa: F401

    return torch.ops.cfl_ops


MAX_NODES, MAX_CHUNK_LOG2 = 1024, 15
STATIC_SHARED = 5 << 10
"""Bytes that the kernels declare themselves, with some to spare."""


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
    row = _crc_power(4 * CODEC.kThreads)
    entries = [_crc_multiply(value << 8 * byte, row) for byte in range(4) for value in range(256)]
    entries += [_crc_power(4 * (CODEC.kThreads - thread)) for thread in range(CODEC.kThreads)]
    host = from_bytes(struct.pack(f"<{len(entries)}I", *entries))
    return host.to(device).view(torch.int32)  # synchronises, once: other streams will read it too


def synchronises(data: Tensor) -> bool:
    """Whether to read its values synchronises."""
    return data.device.type != "cpu"


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A copy that does not synchronise."""
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


def to_host(data: Tensor) -> Tensor:
    """A copy on the CPU: synchronises, and is the only place in this module that does."""
    if data.device.type != "cuda":
        return data.cpu()
    return torch.empty(data.shape, dtype=data.dtype, pin_memory=True).copy_(data)


def _parse(payload: Tensor, raw: Tensor | None, start: int, count: int) -> tuple[list[int], Tensor, Tensor]:
    """The facts of host_parse, the tree, and the first bytes. Synchronises once, or not where these are given."""
    size = payload.numel()
    if raw is None:
        raw = to_host(payload[: prefix(size)])
    facts, tree = _ops().host_parse(raw, size, start, count)
    if int(facts[0]) < 0:  # a header longer than most
        raw = to_host(payload[: -int(facts[0])])
        facts, tree = _ops().host_parse(raw, size, start, count)
    return facts.tolist(), tree, raw


def read_header(payload: Tensor, raw: Tensor | None = None) -> tuple[int, int, int, tuple[int, ...], Tensor]:
    """What is wrong with a payload (0: nothing), the bytes of a symbol, their number, their shape, the first bytes.

    Synchronises once, and not where the first bytes are given.
    """
    facts, _, raw = _parse(payload, raw, 0, 0)
    return facts[0], facts[1], facts[3], tuple(facts[9:]), raw


def with_first_bytes(payload: Tensor, raw: Tensor) -> Tensor:
    """The payload as the op that decodes it next should get it, which then does not fetch its header again.

    The schemas have no place for the bytes, so they travel on an alias that lives for this one call.
    """
    alias = payload.detach()
    alias.first_bytes = raw  # type: ignore[attr-defined]
    return alias


def _shared_memory(device: torch.device) -> int:
    """Bytes that a block can ask for: 99 KB on consumer cards, 227 KB on an H100, less the static ones."""
    if device.type != "cuda":
        return (99 << 10) - STATIC_SHARED
    properties = torch.cuda.get_device_properties(device)
    optin: int = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    return optin - STATIC_SHARED


def _stack_bytes() -> int:
    """The two stacks of lists of a warp (Tile in codec_kernel.cuh)."""
    return 2 * (CODEC.kTileBytes + 4 * CODEC.kSlack)


def _node_bytes(nodes: int, chunk_log2: int, symbol_bytes: int) -> int:
    """The nodes, where their bits start, and what has passed them at the end of each tile."""
    tiles = -(-(symbol_bytes << chunk_log2) // CODEC.kTileBytes)
    return 20 * nodes + 4 * -(-tiles * nodes // 2)


def encode_shared(nodes: int, chunk_log2: int, alphabet: int, symbol_bytes: int) -> int:
    """Bytes of shared memory that codec_encode_kernel needs besides the bits of a chunk."""
    codes = 4 * alphabet if alphabet <= CODEC.kMaxSharedSymbols else 0
    return (
        _node_bytes(nodes, chunk_log2, symbol_bytes) + CODEC.kWarps * max(_stack_bytes(), 4 * nodes) + codes
    )


def decode_shared(nodes: int, chunk_log2: int, leaves: int, symbol_bytes: int, largest: int) -> int:
    """Bytes of shared memory that codec_decode_kernel needs besides the stacks of its warps."""
    symbols = 4 * -(-leaves // 2) if leaves <= CODEC.kMaxSharedSymbols else 0
    words = -(-largest // 4) + 2
    return _node_bytes(nodes, chunk_log2, symbol_bytes) + symbols + 4 * (words + words // 2)


def _ranges(kernels: Any, flat: Tensor, levels: int) -> tuple[Tensor, ...]:
    """The smallest and the largest finite weight of each row, the number of others, and the row's arithmetic."""
    groups, size = flat.shape
    parts = -(-size // CODEC.kPart)

    def fresh(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=flat.device)

    ends, bad = fresh(groups, parts, 2, dtype=torch.float64), fresh(groups, parts, dtype=torch.int64)
    minimum, maximum = fresh(groups, dtype=flat.dtype), fresh(groups, dtype=flat.dtype)
    info, affine = fresh(groups, dtype=torch.int64), fresh(groups, 6, dtype=torch.float64)
    kernels.range(flat, levels, ends, bad, minimum, maximum, info, affine)
    return minimum, maximum, info, affine


def quantize(kernels: Any, w: Tensor, bits: int, histogram: bool) -> tuple[Tensor, ...]:
    """The op ``cfl_ops::quantize``: two passes over the weights. Does not synchronise."""
    batch, size, levels = w.shape[:-1], w.shape[-1], 1 << bits
    groups = batch.numel()
    flat = w.reshape(groups, size).contiguous()
    minimum, maximum, info, affine = _ranges(kernels, flat, levels)
    symbols = torch.empty(groups, size, dtype=symbol_dtype(bits), device=w.device)
    counts = torch.zeros(groups, levels if histogram else 0, dtype=torch.int64, device=w.device)
    kernels.quantize(flat, affine, info, levels, symbols, counts if histogram else None)
    return (
        symbols.view(w.shape),
        minimum.view(batch),
        maximum.view(batch),
        counts.view(*batch, counts.shape[1]),
        info.view(batch),
    )


def weight_range(kernels: Any, w: Tensor, bits: int, every: int) -> tuple[Tensor, ...]:
    """The op ``cfl_ops::weight_range``: one pass, and with ``bits`` one over the sample. Does not synchronise."""
    batch, size, levels = w.shape[:-1], w.shape[-1], 1 << bits
    groups = batch.numel()
    flat = w.reshape(groups, size).contiguous()
    minimum, maximum, info, affine = _ranges(kernels, flat, levels)
    counts = torch.zeros(groups, levels if bits else 0, dtype=torch.int64, device=w.device)
    if bits:
        sample = sampled(flat, every).contiguous()
        symbols = torch.empty(sample.shape, dtype=symbol_dtype(bits), device=w.device)
        kernels.quantize(sample, affine, info, levels, symbols, counts)
    return minimum.view(batch), maximum.view(batch), counts.view(*batch, counts.shape[1]), info.view(batch)


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


ALPHABETS = {1: 256, 2: 1 << 16}


def _counts(kernels: Any, symbols: Tensor) -> tuple[Tensor, int]:
    """Counts on the host, of all symbols or of one block in so many, as sample_counts of reference/payload.py.

    Which of them are counted depends on the largest symbol; the kernel reads it from the end of the counts.
    """
    n, most = symbols.numel(), ALPHABETS[symbols.element_size()]
    found = torch.zeros(most + 1, dtype=torch.int64, device=symbols.device)
    if most > 256:
        kernels.largest(symbols, found[most:])
    kernels.histogram(symbols, found)
    counts = to_host(found)
    alphabet = int(counts[most]) + 1 if most > 256 else most
    counts, stride = counts[:alphabet], max(1, n // (1024 * alphabet))
    if stride > 1 and reference.few_met(counts.tolist()):
        return to_host(reference.all_counts(symbols, alphabet)), 1
    return counts, stride


def huffman_encode(
    kernels: Any, symbols: Tensor, shape: Sequence[int], chunk_log2: int, reserve: int
) -> Tensor:
    """The op ``cfl_ops::huffman_encode``. Synchronises twice: for the counts, and for the sizes of the chunks.

    (And more often where a sample shows few symbols, and all are counted, or where a chunk outgrew its slot, which
    needs a sample that misleads.)
    """
    flat, device, symbol_bytes = symbols.reshape(-1).contiguous(), symbols.device, symbols.element_size()
    n, chunk = flat.numel(), 1 << chunk_log2
    if n == 0 or chunk_log2 > MAX_CHUNK_LOG2:
        return reference.encode(symbols, tuple(shape), chunk_log2, reserve)
    tree, lengths, facts = _ops().host_code(*_counts(kernels, flat))
    alphabet, nodes, leaves, longest, bits, counted = facts.tolist()
    shared = encode_shared(nodes, chunk_log2, alphabet, symbol_bytes)
    room = _shared_memory(device) - shared
    if nodes > MAX_NODES or room < 0:
        return reference.encode(symbols, tuple(shape), chunk_log2, reserve)
    tree, tables = to_device(tree, device), crc_tables(device)
    # What the counts promise with some room; if a chunk needs more, its size comes back and nothing else.
    needed = min(chunk * longest, int(1.02 * chunk * bits / counted) + 2048) if leaves > 1 else 0
    chunks = -(-n // chunk)
    entries = torch.empty(chunks, 2, dtype=torch.int32, device=device)
    while True:
        slots = torch.empty(chunks, needed // 32 + 1, dtype=torch.int32, device=device)
        staged = slots.shape[1] if 4 * slots.shape[1] <= room else 0
        kernels.encode(
            *(flat, chunk_log2, tree, nodes, leaves, alphabet, tables, staged),
            *(shared + 4 * staged, slots, entries),
        )
        table = to_host(entries)
        largest = int(table[:, 0].max())
        if -(-largest // 4) <= slots.shape[1]:
            break
        needed = 8 * largest
    front = reserve + HEADER_BYTES + 8 * len(shape) + lengths.numel() + 8 * chunks
    out = torch.empty(front + int(table[:, 0].sum()), dtype=torch.uint8, device=device)
    sizes = entries[:, 0].to(torch.int64)
    kernels.gather(slots, entries, sizes.cumsum(0) - sizes, out[front:])
    head = _ops().host_head(table, lengths, list(shape), symbol_bytes, chunk_log2, n, alphabet, reserve)
    out[:front] = to_device(head, device)
    return out


def huffman_decode_(kernels: Any, payload: Tensor, out: Tensor, start: int) -> Tensor | Unserved:
    """The op ``cfl_ops::huffman_decode_``. Synchronises once, for the header; not for its info."""
    info = _decode(kernels, payload, out, start, None, 1)
    return UNSERVED if info is None else info


def decompress_(kernels: Any, args: DecompressArguments) -> Tensor | Unserved:
    """The op ``cfl_ops::decompress_``: decoding and weights in one kernel. Synchronises once, for the header."""
    if not args.in_range():
        return codes.info(codes.OUT_OF_RANGE, args.payload.device)
    affine = _affine(kernels, args.minimum, args.maximum, args.bits)
    info = _decode(kernels, args.payload, args.out, args.start, affine, args.group_size)
    return UNSERVED if info is None else info


def _decode(
    kernels: Any, payload: Tensor, out: Tensor, start: int, affine: Tensor | None, group_size: int
) -> Tensor | None:
    """The info, or None where the kernel cannot hold the code or a chunk."""
    raw = getattr(payload, "first_bytes", None)
    payload, device, count = payload.contiguous(), payload.device, out.numel()
    facts, tree, _ = _parse(payload, raw, start, count)
    code, symbol_bytes, chunk_log2, numel, data, nodes, leaves, before, largest = facts[:9]
    if code != codes.GOOD:
        return codes.info(code, device)
    if start < 0 or start + count > numel or (affine is None and out.element_size() != symbol_bytes):
        return codes.info(codes.OUT_OF_RANGE, device)
    info = codes.info(codes.GOOD, device)
    if count == 0:
        return info
    shared = decode_shared(nodes, chunk_log2, leaves, symbol_bytes, largest)
    lists = min(CODEC.kWarps, (_shared_memory(device) - shared) // _stack_bytes())
    if nodes > MAX_NODES or chunk_log2 > MAX_CHUNK_LOG2 or lists < 1:
        return None
    shared += lists * _stack_bytes()
    first, last = start >> chunk_log2, (start + count - 1) >> chunk_log2
    table = data - 8 * -(-numel >> chunk_log2)
    entries = payload[table + 8 * first : table + 8 * (last + 1)].clone().view(torch.int32).view(-1, 2)
    sizes = entries[:, 0].to(torch.int64)
    offsets = sizes.cumsum(0) - sizes + (data + before)
    kernels.decode(
        *(payload, entries, offsets, numel, chunk_log2, first),
        *(to_device(tree, device), nodes, leaves, crc_tables(device)),
        *(affine, group_size, symbol_bytes, start, largest, lists, shared, out, info),
    )
    return info
