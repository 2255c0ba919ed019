"""The Huffman code against a heap's, on hard inputs, and against every kind of damage."""

from __future__ import annotations

import functools
import heapq
import itertools
import struct
import zlib

import cfl_ops
import numpy as np
import pytest
import torch
from cfl_ops import CorruptDataError
from cfl_ops.ops.codec import codes
from cfl_ops.ops.codec.huffman import CHUNK_LOG2, HUFFMAN_DECODE, HUFFMAN_ENCODE
from cfl_ops.ops.codec.reference import payload as reference
from cfl_ops.ops.codec.reference.header import HEADER_BYTES, parse
from cfl_ops.ops.codec.reference.huffman_code import code_lengths, pack_lengths, unpack_lengths
from torch import Tensor

from tests.codec.helpers import (
    DATA,
    EXHAUSTIVE,
    cuts_and_extensions,
    flips,
    golden_symbols,
    normal_symbols,
    same,
)


def oracle_lengths(counts: list[int]) -> list[int]:
    """Huffman lengths with a heap; as good as any, though not tied the same way."""
    heap = [(count, [symbol]) for symbol, count in enumerate(counts) if count]
    lengths = [0] * len(counts)
    if len(heap) == 1:
        return [int(count > 0) for count in counts]
    tick = itertools.count()
    heap = [(count, next(tick), symbols) for count, symbols in heap]  # type: ignore[misc]
    heapq.heapify(heap)
    while len(heap) > 1:
        a, b = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in a[2] + b[2]:  # type: ignore[misc]
            lengths[symbol] += 1
        heapq.heappush(heap, (a[0] + b[0], next(tick), a[2] + b[2]))  # type: ignore[misc]
    return lengths


@functools.lru_cache
def symbol_cases() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(8)
    random = torch.randint(0, 256, (100_000,), generator=generator, dtype=torch.int32)
    # Counts like Fibonacci's give the longest codes there are.
    fibonacci = [1, 1]
    while sum(fibonacci) < 150_000:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    deep = torch.cat([torch.full((count,), s, dtype=torch.uint8) for s, count in enumerate(fibonacci)])
    shuffled = deep[torch.randperm(len(deep), generator=generator)]
    return {
        "empty": torch.empty(0, dtype=torch.uint8),
        "empty 2-d": torch.empty(3, 0, dtype=torch.uint16),
        "scalar": torch.tensor(7, dtype=torch.uint8),
        "one symbol": torch.full((70_000,), 255, dtype=torch.uint8),
        "one 16-bit symbol": torch.full((40_000,), 65_535, dtype=torch.int32).to(torch.uint16),
        "two symbols": (random > 250).to(torch.uint8),
        "three symbols": (random % 3).to(torch.uint8),
        "uniform": random.to(torch.uint8),
        "all 256 once": torch.arange(256, dtype=torch.int32).to(torch.uint8),
        "normal 3-d": normal_symbols(33 * 40 * 50, 8).view(33, 40, 50),
        "normal 4 bits": normal_symbols(65_536, 4),
        "normal 10 bits": normal_symbols(70_000, 10),
        "normal 12 bits": normal_symbols(70_000, 12),
        "normal 16 bits": normal_symbols(40_000, 16),
        "all 65536 once": torch.randperm(65_536, generator=generator).to(torch.int32).to(torch.uint16),
        "deep": deep,
        "deep, shuffled": shuffled,
        "deep 16-bit": (shuffled.to(torch.int32) * 2000 + 17).to(torch.uint16),
        "few": torch.tensor([5, 5, 9, 1000], dtype=torch.int32).to(torch.uint16),
    }


@functools.lru_cache
def fallback_payload(name: str) -> Tensor:
    symbols = symbol_cases()[name]
    return reference.encode(symbols, tuple(symbols.shape), CHUNK_LOG2, 0)


@pytest.mark.parametrize("name", list(symbol_cases()))
def test_huffman_round_trip_and_equal_bytes(backend: str, name: str) -> None:
    symbols = symbol_cases()[name]
    payload = cfl_ops.huffman_encode(symbols)
    assert same(payload, fallback_payload(name)), "all write the same"
    assert same(cfl_ops.huffman_decode(payload), symbols)
    out = torch.full_like(symbols, 99)
    assert cfl_ops.huffman_decode(payload, out) is out
    assert same(out, symbols)


@pytest.mark.parametrize("name", list(symbol_cases()))
def test_huffman_size_is_that_of_an_optimal_code(name: str) -> None:
    symbols = symbol_cases()[name]
    flat = symbols.flatten().to(torch.int64)
    counts = torch.bincount(flat).tolist() if flat.numel() else []
    lengths = oracle_lengths(counts)
    present = sum(count > 0 for count in counts)
    best = sum(c * n for c, n in zip(counts, lengths, strict=True)) if present > 1 else 0
    chunks = -(-len(flat) // 2**CHUNK_LOG2)
    # Header, shape, at most 3 nibbles for a change of length, chunk table, and the chunks' last bytes.
    overhead = HEADER_BYTES + 8 * symbols.ndim + 1.5 * 2 * present + 3 * len(counts) / 256 + 16 + 9 * chunks
    assert best / 8 <= cfl_ops.huffman_encode(symbols).numel() <= best / 8 + overhead


def test_sampled_code_costs_little(backend: str) -> None:
    # 2^19 symbols of 256: every second block is counted. Rare symbols may be missing in the sample.
    symbols = normal_symbols(1 << 19, 8)
    symbols[234_567:234_570] = torch.tensor([0, 255, 1], dtype=torch.uint8)
    payload = cfl_ops.huffman_encode(symbols)
    assert same(cfl_ops.huffman_decode(payload), symbols)
    counts = torch.bincount(symbols.to(torch.int64)).tolist()
    best = sum(c * n for c, n in zip(counts, oracle_lengths(counts), strict=True))
    assert (8 * payload.numel() - best) / symbols.numel() <= 0.012


def test_symbols_that_hide_from_the_sample(backend: str) -> None:
    """The counted blocks hold one symbol only, all others are noise: slower and larger, never wrong."""
    n = 1 << 19
    symbols = torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(9)).to(torch.uint8)
    stride = n // (1024 * 256)
    for begin in range(0, n, 4096 * stride):
        symbols[begin : begin + 4096] = 3
    payload = cfl_ops.huffman_encode(symbols)
    assert same(cfl_ops.huffman_decode(payload), symbols)


@pytest.mark.parametrize("most", [1, 2, 50, 200])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_few_symbols_are_coded_as_if_there_were_no_others(
    backend: str, dtype: torch.dtype, most: int
) -> None:
    """Codes for what a sample has not met would cost a bit a symbol of a constant, and half a bit of two."""
    n = 1 << 19 if dtype == torch.uint8 else 1 << 18  # with an alphabet of 2 to 200, a sample serves
    symbols = torch.arange(n).mul_(40503).remainder_(65521).remainder_(most).to(dtype)
    payload = cfl_ops.huffman_encode(symbols)
    assert same(payload, reference.encode(symbols, (n,), CHUNK_LOG2, 0))
    assert same(cfl_ops.huffman_decode(payload), symbols)
    counts = torch.bincount(symbols.to(torch.int64)).tolist()
    best = sum(c * n for c, n in zip(counts, oracle_lengths(counts), strict=True)) if most > 1 else 0
    assert 8 * payload.numel() <= best * 1.006 + 8 * (9 * n / 2**CHUNK_LOG2 + 200)


def test_lengths_are_optimal() -> None:
    generator = np.random.default_rng(10)
    for size in (1, 2, 3, 17, 256, 1000):
        counts = (generator.pareto(0.5, size) * 3).astype(np.int64).clip(0, 10**9).tolist()
        counts[0] = max(counts[0], 1)
        lengths = code_lengths(counts)
        oracle = oracle_lengths(counts)
        assert sum(c * n for c, n in zip(counts, lengths, strict=True)) == sum(
            c * n for c, n in zip(counts, oracle, strict=True)
        )
        assert unpack_lengths(pack_lengths(lengths), len(lengths)) == lengths


@pytest.mark.parametrize("bits", [8, 10])
def test_random_access(backend: str, bits: int) -> None:
    symbols = normal_symbols(100_000, bits).view(100, 1000)
    payload = cfl_ops.huffman_encode(symbols)
    flat = symbols.flatten()
    chunk = 1 << CHUNK_LOG2
    for start, stop in (
        (0, 0),
        (0, 1),
        (5, 20),
        (chunk - 1, chunk + 1),
        (chunk, 2 * chunk),
        (99_999, 100_000),
    ):
        assert same(cfl_ops.huffman_decode(payload, start=start, stop=stop), flat[start:stop])
    assert same(cfl_ops.huffman_decode(payload, start=60_000), flat[60_000:])
    # Only the chunks asked for are read: damage elsewhere goes unseen, damage in them does not.
    payload[-1] ^= 255
    assert same(cfl_ops.huffman_decode(payload, stop=chunk), flat[:chunk])
    with pytest.raises(CorruptDataError, match="chunk 3"):
        cfl_ops.huffman_decode(payload, start=99_999)


def test_noncontiguous_symbols_and_payload(backend: str) -> None:
    symbols = normal_symbols(600, 8).view(20, 30)
    payload = cfl_ops.huffman_encode(symbols.T)
    assert same(cfl_ops.huffman_decode(payload), symbols.T.contiguous())
    spread = torch.zeros(2 * payload.numel(), dtype=torch.uint8)
    spread[::2] = payload
    assert same(cfl_ops.huffman_decode(spread[::2]), symbols.T.contiguous())


def test_argument_errors_name_the_argument() -> None:
    w = torch.randn(4)
    cases = [
        (lambda: cfl_ops.huffman_encode(w), TypeError, "symbols must be uint8 or uint16"),
        (lambda: cfl_ops.huffman_decode(w), TypeError, "payload must be a 1-d uint8 tensor"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    payload = cfl_ops.huffman_encode(torch.zeros(10, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"out must hold 10 elements of torch.uint8"):
        cfl_ops.huffman_decode(payload, torch.empty(9, dtype=torch.uint8))
    with pytest.raises(ValueError, match="out must be contiguous"):
        cfl_ops.huffman_decode(payload, torch.empty(20, dtype=torch.uint8)[::2])
    with pytest.raises(IndexError, match="start and stop must be ordered"):
        cfl_ops.huffman_decode(payload, start=4, stop=11)


def small_payloads() -> dict[str, Tensor]:
    return {
        "8-bit": cfl_ops.huffman_encode(normal_symbols(100, 6)),
        "16-bit": cfl_ops.huffman_encode(normal_symbols(60, 9).view(6, 10)),
        "constant": cfl_ops.huffman_encode(torch.zeros(50, dtype=torch.uint8)),
        "empty": cfl_ops.huffman_encode(torch.zeros(0, dtype=torch.uint8)),
    }


@pytest.mark.parametrize("backend", EXHAUSTIVE, indirect=True)
@pytest.mark.parametrize("name", list(small_payloads()))
def test_every_flip_cut_and_extension_of_a_payload_raises(backend: str, name: str) -> None:
    payload = small_payloads()[name]
    for damaged in itertools.chain(flips(payload), cuts_and_extensions(payload)):
        with pytest.raises(CorruptDataError, match=r"cfl_ops.huffman_decode: "):
            cfl_ops.huffman_decode(damaged)
    # The op itself, without the check of the header before it, says the same of all of them.
    dtype = torch.uint16 if name == "16-bit" else torch.uint8
    out = torch.empty(cfl_ops.huffman_decode(payload).numel(), dtype=dtype)
    for damaged in itertools.chain(flips(payload), cuts_and_extensions(payload)):
        info = HUFFMAN_DECODE(damaged, out, 0)
        assert int(info) != 0
        if backend != "python":
            assert int(info) == int(HUFFMAN_DECODE.python(damaged, out, 0))


@pytest.mark.parametrize("bits", [8, 10])
def test_flips_and_swaps_across_chunks_raise(backend: str, bits: int) -> None:
    symbols = normal_symbols(100_000, bits)
    payload = cfl_ops.huffman_encode(symbols)
    header = parse(payload)
    generator = torch.Generator().manual_seed(15)
    for position in torch.randint(0, 8 * payload.numel(), (60,), generator=generator).tolist():
        damaged = payload.clone()
        damaged[position // 8] ^= 1 << position % 8
        with pytest.raises(CorruptDataError):
            cfl_ops.huffman_decode(damaged)
    parts = list(payload[header.data :].split(header.sizes))
    for a, b in ((0, 1), (1, 2), (0, 3)):
        swapped = list(parts)
        swapped[a], swapped[b] = swapped[b], swapped[a]
        with pytest.raises(CorruptDataError, match=f"chunk {a}"):
            cfl_ops.huffman_decode(torch.cat([payload[: header.data], *swapped]))
    # The entries of the chunk table swapped too.
    table = payload[header.data - 8 * len(parts) : header.data].view(-1, 8)[[1, 0, 2, 3]].flatten()
    head = torch.cat([payload[: header.data - 8 * len(parts)], table])
    with pytest.raises(CorruptDataError, match="header"):
        cfl_ops.huffman_decode(torch.cat([head, parts[1], parts[0], *parts[2:]]))


def forged(
    *,
    symbol_bytes: int = 1,
    chunk_log2: int = 15,
    numel: int = 8,
    alphabet: int = 2,
    shape: tuple[int, ...] = (8,),
    lengths: list[int] | None = None,
    table: bytes | None = None,
    chunks: list[bytes] | None = None,
    sizes: list[int] | None = None,
    ndim: int | None = None,
    table_bytes: int | None = None,
    version: int = 1,
) -> Tensor:
    """A payload whose checksums all fit, whatever it says."""
    if table is None:
        table = pack_lengths([1, 1] if lengths is None else lengths)
    chunks = [b"\x55"] if chunks is None else chunks
    rest = struct.pack(f"<{len(shape)}Q", *shape) + table
    for i, chunk in enumerate(chunks):
        rest += struct.pack("<II", sizes[i] if sizes else len(chunk), zlib.crc32(chunk))
    total = HEADER_BYTES + len(rest) + sum(map(len, chunks))
    head = struct.pack("<4s4BQQ", b"CFLH", version, 1, symbol_bytes, chunk_log2, numel, total)
    head += struct.pack(
        "<III",
        alphabet,
        len(shape) if ndim is None else ndim,
        len(table) if table_bytes is None else table_bytes,
    )
    head += struct.pack("<I", zlib.crc32(rest, zlib.crc32(head)))
    return torch.frombuffer(bytearray(head + rest + b"".join(chunks)), dtype=torch.uint8)


HOSTILE = {
    "huge numel": ({"numel": 2**40, "shape": (2**40,)}, codes.BAD_HEADER),
    "numel above the limit": ({"numel": 2**63, "shape": (2**63,)}, codes.BAD_HEADER),
    "overflowing shape": ({"shape": (2**32, 2**32)}, codes.BAD_HEADER),
    "overflowing shape to the right product": ({"shape": (2**63, 2, 8)}, codes.BAD_HEADER),
    "negative extent": ({"shape": (2**64 - 8,)}, codes.BAD_HEADER),
    "shape of another size": ({"shape": (9,)}, codes.BAD_HEADER),
    "too many dimensions": ({"ndim": 2**31}, codes.BAD_HEADER),
    "huge table": ({"table_bytes": 2**32 - 1}, codes.BAD_HEADER),
    "huge alphabet": ({"alphabet": 2**32 - 1}, codes.BAD_HEADER),
    "alphabet of bytes above 256": ({"alphabet": 257, "lengths": [1, 1] + [0] * 255}, codes.BAD_HEADER),
    "no alphabet": ({"alphabet": 0, "table": b""}, codes.BAD_HEADER),
    "chunks too small": ({"chunk_log2": 3}, codes.BAD_HEADER),
    "chunks too large": ({"chunk_log2": 63}, codes.BAD_HEADER),
    "symbols of 3 bytes": ({"symbol_bytes": 3}, codes.BAD_HEADER),
    "unknown version": ({"version": 2}, codes.BAD_VERSION),
    "Kraft sum above 1": ({"alphabet": 3, "lengths": [1, 1, 1]}, codes.BAD_CODE_TABLE),
    "Kraft sum below 1": ({"alphabet": 3, "lengths": [1, 2, 3]}, codes.BAD_CODE_TABLE),
    "no code at all": ({"alphabet": 2, "lengths": [0, 0]}, codes.BAD_CODE_TABLE),
    "one symbol of length 2": ({"alphabet": 2, "lengths": [0, 2]}, codes.BAD_CODE_TABLE),
    "length above the limit": ({"alphabet": 2, "lengths": [61, 1]}, codes.BAD_CODE_TABLE),
    "table too short": ({"table": b"\x11"[:0]}, codes.BAD_CODE_TABLE),
    "table too long": ({"table": pack_lengths([1, 1]) + b"\0"}, codes.BAD_CODE_TABLE),
    "run beyond the alphabet": ({"table": bytes([0x8D | 0, 0x00 | 0xE0, 0xFF])}, codes.BAD_CODE_TABLE),
    "reserved nibble": ({"table": b"\xff"}, codes.BAD_CODE_TABLE),
    "chunk sizes beyond the end": ({"sizes": [2**32 - 1]}, codes.BAD_CHUNK_SIZES),
    "chunk sizes short of the end": ({"sizes": [0]}, codes.BAD_CHUNK_SIZES),
    "chunk with too few bits": ({"numel": 9, "shape": (9,)}, codes.BAD_CHUNK),
    "chunk with too many bits": ({"chunks": [b"\x55\x55"]}, codes.BAD_CHUNK),
    "second chunk overlapping the first": (
        {
            "numel": 40_000,
            "shape": (40_000,),
            "chunks": [bytes(4096), bytes(904)],
            "sizes": [4096, 2**32 - 4096],
        },
        codes.BAD_CHUNK_SIZES,
    ),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_headers_raise_before_anything_is_allocated(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, code = HOSTILE[name]
    payload = forged(**fields)  # type: ignore[arg-type]
    out = torch.empty(8 if fields.get("numel", 8) != 9 else 9, dtype=torch.uint8)
    assert int(HUFFMAN_DECODE(payload, out, 0)) == code
    if code < codes.BAD_CHUNK:  # the output is not even asked for
        monkeypatch.setattr(torch, "empty", None)
    with pytest.raises(CorruptDataError):
        cfl_ops.huffman_decode(payload)


def test_a_forged_payload_that_is_right_decodes(backend: str) -> None:
    assert cfl_ops.huffman_decode(forged()).tolist() == [1, 0, 1, 0, 1, 0, 1, 0]


def test_random_bytes_raise(backend: str) -> None:
    generator = torch.Generator().manual_seed(16)
    for size in (0, 1, 39, 40, 41, 100, 5000):
        data = torch.randint(0, 256, (size,), generator=generator).to(torch.uint8)
        with pytest.raises(CorruptDataError):
            cfl_ops.huffman_decode(data)


GOLDEN = {
    "huffman_u8.bin": lambda: golden_symbols(3000, 200).to(torch.uint8).view(30, 100),
    "huffman_u16_two_chunks.bin": lambda: torch.cat(
        [torch.zeros(31_000, dtype=torch.int32), golden_symbols(3000, 1000)]
    ).to(torch.uint16),
    "huffman_empty.bin": lambda: torch.empty(2, 0, dtype=torch.uint8),
    "huffman_one_symbol.bin": lambda: torch.full((5,), 42, dtype=torch.uint8),
}


@pytest.mark.parametrize("name", list(GOLDEN))
def test_golden_payloads(backend: str, name: str) -> None:
    golden = torch.frombuffer(bytearray((DATA / name).read_bytes()), dtype=torch.uint8)
    symbols = GOLDEN[name]()
    assert same(cfl_ops.huffman_decode(golden), symbols)
    assert same(cfl_ops.huffman_encode(symbols), golden)


def test_opcheck() -> None:
    symbols = normal_symbols(120, 5).view(3, 40)
    payload = HUFFMAN_ENCODE(symbols, [3, 40], 15, 0)
    check = torch.library.opcheck
    check(HUFFMAN_ENCODE.overload, (symbols, [3, 40], 15, 0))
    check(HUFFMAN_DECODE.overload, (payload, torch.empty_like(symbols), 0))


def test_vmap_is_refused() -> None:
    symbols = normal_symbols(150, 8).view(3, 50)
    with pytest.raises(RuntimeError, match=r"cfl_ops.huffman_encode: .* vmap"):
        torch.vmap(cfl_ops.huffman_encode)(symbols)


def test_compile_fullgraph_and_export() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def through(w: Tensor, payload: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        q, _ = cfl_ops.quantize_ex(w, 6)
        return cfl_ops.dequantize(q) + 0, cfl_ops.huffman_decode(payload, out)

    for n in (100, 3000):
        w = torch.randn(n)
        symbols = normal_symbols(n, 8)
        payload = cfl_ops.huffman_encode(symbols)
        back, decoded = through(w, payload, torch.empty_like(symbols))
        assert same(back, cfl_ops.dequantize(cfl_ops.quantize(w, 6)))
        assert same(decoded, symbols)
    damaged = payload.clone()
    damaged[-1] ^= 1
    with pytest.raises(CorruptDataError):
        through(w, damaged, torch.empty_like(symbols))

    class Encode(torch.nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return cfl_ops.huffman_encode(cfl_ops.quantize_ex(w, 8)[0].symbols)

    rows = torch.export.Dim("rows", min=2, max=5000)
    program = torch.export.export(Encode(), (torch.randn(40, 8),), dynamic_shapes=({0: rows},))
    w = torch.randn(123, 8)
    assert same(program.module()(w), cfl_ops.huffman_encode(cfl_ops.quantize(w, 8).symbols))
