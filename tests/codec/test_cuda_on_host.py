"""The codec's CUDA kernels and launchers, emulated (see tests/gpu/on_host.py)."""

from __future__ import annotations

import contextlib
import struct
import types
import zlib

import cfl_ops
import pytest
import torch
from cfl_ops._core import dispatch
from cfl_ops._core.op import OPS, UNSERVED
from cfl_ops.ops.codec import (
    cuda,
    host,
)
from cfl_ops.ops.codec.arguments import DecompressArguments
from cfl_ops.ops.codec.huffman import HUFFMAN_DECODE, HUFFMAN_ENCODE
from cfl_ops.ops.codec.quantize import DEQUANTIZE, QUANTIZE, WEIGHT_RANGE

CODEC = ("weight_range", "quantize", "dequantize", "huffman_encode", "huffman_decode_", "decompress_")


@pytest.fixture
def emulated(kernels):
    """The codec's ops are served by the emulated kernels."""
    library = torch.library.Library("cfl_ops", "IMPL")
    for name in CODEC:
        library.impl(name, dispatch.lazy(OPS[name].cuda[0], OPS[name]), "CPU", allow_override=True)
    yield
    library._destroy()
    dispatch.overrides.install(cfl_ops.config.get_backend())


def normal_symbols(n: int, alphabet: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(n) * alphabet / 12 + alphabet / 2).clamp(0, alphabet - 1).to(dtype)


SYMBOLS = {
    "one": lambda: torch.tensor([7], dtype=torch.uint8),
    "constant": lambda: torch.full((3000,), 200, dtype=torch.uint8),
    "two": lambda: torch.arange(2500).remainder(2).to(torch.uint16),
    "normal8": lambda: normal_symbols(9001, 256, torch.uint8),
    "normal10": lambda: normal_symbols(8193, 1024, torch.uint16),
    "chunks8": lambda: normal_symbols(36000, 256, torch.uint8),  # several tiles to a warp
    "chunks10": lambda: normal_symbols(33000, 1024, torch.uint16),
    "skewed": lambda: (torch.rand(5000) ** 9 * 250).to(torch.uint8),
    "uniform16": lambda: torch.randint(65536, (3000,), dtype=torch.int32).to(torch.uint16),
    "few": lambda: torch.arange(9000).remainder(2).mul(3).to(torch.uint16),  # all are counted after a sample
    "sampled": lambda: torch.randint(3, (40000,), dtype=torch.int32).to(torch.uint16),
}


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize("name", SYMBOLS)
def test_payload_is_that_of_the_cpu(kernels, name: str, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFL_ON_HOST_ORDER", order)
    symbols = SYMBOLS[name]()
    n = symbols.numel()
    for chunk_log2 in (10, 15):
        want = HUFFMAN_ENCODE(symbols, [n], chunk_log2, 5)
        got = cuda.huffman_encode(kernels, symbols, [n], chunk_log2, 5)
        assert torch.equal(got, want)
        # A view that starts at an odd byte: chunks are read as aligned words all the same.
        for begin, end in ((0, n), (n // 3, n - n // 5)):
            out = torch.empty(end - begin, dtype=symbols.dtype)
            assert int(cuda.huffman_decode_(kernels, got[5:], out, begin)) == 0
            assert torch.equal(out, symbols[begin:end])


@pytest.mark.parametrize("name", ["normal8", "normal10", "skewed"])
def test_any_address(kernels, name: str) -> None:
    """Symbols and outputs that do not start at a word, and slices that start and end anywhere in a tile."""
    symbols = SYMBOLS[name]()
    n = symbols.numel()
    for offset in (1, 2, 3):
        shifted = torch.empty(n + offset, dtype=symbols.dtype)[offset:].copy_(symbols)
        payload = HUFFMAN_ENCODE(symbols, [n], 12, 0)
        assert torch.equal(cuda.huffman_encode(kernels, shifted, [n], 12, 0), payload)
        for begin, end in ((0, n), (4096, n), (2047, 2049), (5 * offset, n - 1)):
            room = torch.full((n + 8,), 77, dtype=symbols.dtype)
            out = room[offset : offset + end - begin]
            assert int(cuda.huffman_decode_(kernels, payload, out, begin)) == 0
            assert torch.equal(out, symbols[begin:end])
            assert bool(
                (room[:offset].int() == 77).all() and (room[offset + end - begin :].int() == 77).all()
            )


def test_many_nodes(kernels) -> None:
    """More nodes than lanes, in a deep tree: Fibonacci counts give one code length to each symbol."""
    counts = [1, 1]
    while len(counts) < 18:
        counts.append(counts[-1] + counts[-2])
    symbols = torch.repeat_interleave(torch.arange(18), torch.tensor(counts))
    symbols = symbols[torch.randperm(symbols.numel())].to(torch.uint16)
    spread = (torch.rand(9000) ** 3 * 1200).to(torch.uint16)  # hundreds of nodes
    for s in (symbols, spread):
        n = s.numel()
        want = HUFFMAN_ENCODE(s, [n], 13, 0)
        assert torch.equal(cuda.huffman_encode(kernels, s, [n], 13, 0), want)
        out = torch.empty_like(s)
        assert int(cuda.huffman_decode_(kernels, want, out, 0)) == 0
        assert torch.equal(out, s)


class Spy:
    """Kernels that note how they are called."""

    def __init__(self, kernels) -> None:
        self.kernels, self.calls = kernels, []

    def __getattr__(self, name: str):
        def call(*args) -> None:
            self.calls.append((name, args))
            getattr(self.kernels, name)(*args)

        return call


@pytest.mark.parametrize("name", ["one", "skewed", "normal10"])
def test_without_the_extension(kernels, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CuPy's kernels need no compiler: the host's part is then Python's."""
    symbols = SYMBOLS[name]()
    n = symbols.numel()
    want = HUFFMAN_ENCODE(symbols, [n], 12, 7)
    python = {f"host_{part}": getattr(host, part) for part in ("code", "head", "parse")}
    monkeypatch.setattr(cuda, "_ops", lambda: types.SimpleNamespace(**python))
    assert torch.equal(cuda.huffman_encode(kernels, symbols, [n], 12, 7), want)
    out = torch.empty_like(symbols)
    assert int(cuda.huffman_decode_(kernels, want[7:], out, 0)) == 0
    assert torch.equal(out, symbols)


@pytest.mark.parametrize("lists", [1, 3])
def test_shared_memory_for_few_warps(kernels, lists: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the lists of all warps do not fit, fewer decode."""
    symbols = normal_symbols(20000, 256, torch.uint8)
    payload = HUFFMAN_ENCODE(symbols, [20000], 15, 0)
    facts = torch.ops.cfl_ops.host_parse(payload, payload.numel(), 0, 20000)[0].tolist()
    room = cuda.decode_shared(facts[5], 15, facts[6], 1, facts[8]) + (lists + 1) * cuda._stack_bytes()
    monkeypatch.setattr(cuda, "_shared_memory", lambda device: room - 1)
    spy, out = Spy(kernels), torch.empty_like(symbols)
    assert int(cuda.huffman_decode_(spy, payload, out, 0)) == 0
    assert [(name, args[-4]) for name, args in spy.calls] == [("decode", lists)]
    assert torch.equal(out, symbols)


def test_a_refused_launch_leaves_nothing_for_the_next(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime keeps an error until it is asked for: the next launch, a good one, must not find it."""
    symbols = normal_symbols(20000, 256, torch.uint8)
    payload = HUFFMAN_ENCODE(symbols, [20000], 15, 0)
    out, weights = torch.empty_like(symbols), torch.randn(2, 50)
    monkeypatch.setenv("CFL_ON_HOST_REFUSE", "1")
    with pytest.raises(RuntimeError, match=r"cfl_ops\.huffman_decode"):
        cuda.huffman_decode_(kernels, payload, out, 0)
    monkeypatch.delenv("CFL_ON_HOST_REFUSE")
    assert not cuda.quantize(kernels, weights, 8, False)[-1].any()
    assert int(cuda.huffman_decode_(kernels, payload, out, 0)) == 0
    assert torch.equal(out, symbols)


def test_the_first_bad_chunk_is_reported(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFL_ON_HOST_ORDER", "reverse")
    symbols = normal_symbols(5000, 64, torch.uint8)
    payload = HUFFMAN_ENCODE(symbols, [5000], 10, 0)
    facts = torch.ops.cfl_ops.host_parse(payload, payload.numel(), 2048, 1)[0].tolist()
    payload[facts[4] + facts[7]] ^= 1  # the first byte of chunk 2
    payload[-1] ^= 1
    out = torch.empty_like(symbols)
    assert int(cuda.huffman_decode_(kernels, payload, out, 0)) == 1002
    assert int(cuda.huffman_decode_(kernels, payload, out[:1024], 3500)) == 1004
    assert int(cuda.huffman_decode_(kernels, payload, out[:1024], 1024)) == 0


def test_forged_chunks(kernels) -> None:
    """Bits that were changed behind right checksums: the verdict, and what is decoded, are the CPU's."""
    verdicts = set()
    for dtype, alphabet in ((torch.uint8, 256), (torch.uint16, 1024)):
        symbols = normal_symbols(3000, alphabet, dtype)
        payload = HUFFMAN_ENCODE(symbols, [3000], 11, 0)
        data = int(torch.ops.cfl_ops.host_parse(payload, payload.numel(), 0, 0)[0][4])
        for seed in range(25):
            generator = torch.Generator().manual_seed(seed)
            forged = payload.clone()
            for _ in range(1 + seed % 3):
                at = int(torch.randint(data, forged.numel(), (1,), generator=generator))
                forged[at] ^= 1 << seed % 8
            raw = bytearray(forged.tolist())
            entries = struct.unpack_from("<4I", raw, data - 16)
            cut = data + entries[0]
            sums = zlib.crc32(raw[data:cut]), zlib.crc32(raw[cut:])
            struct.pack_into("<4I", raw, data - 16, entries[0], sums[0], entries[2], sums[1])
            struct.pack_into("<I", raw, 36, zlib.crc32(raw[40:data], zlib.crc32(raw[:36])))
            forged = torch.frombuffer(raw, dtype=torch.uint8)
            want, got = torch.zeros_like(symbols), torch.zeros_like(symbols)
            verdict = int(HUFFMAN_DECODE(forged, want, 0))
            assert int(cuda.huffman_decode_(kernels, forged, got, 0)) == verdict
            assert verdict or torch.equal(got, want)
            verdicts.add(verdict)
    assert {0, 1000} <= verdicts  # some bits only change symbols, others the sizes of lists


@pytest.fixture
def waits(emulated, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the copies to the host: all that synchronises goes through to_host."""
    sizes: list[int] = []
    to_host = cuda.to_host
    monkeypatch.setattr(cuda, "to_host", lambda data: (sizes.append(data.numel()), to_host(data))[1])
    return sizes


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize(("alphabet", "dtype"), [(256, torch.uint8), (1024, torch.uint16)])
def test_waits(waits: list[int], alphabet: int, dtype: torch.dtype, mode) -> None:
    """Two to encode, one to read a header and decode."""
    symbols = normal_symbols(70000, alphabet, dtype)
    with mode():
        payload = HUFFMAN_ENCODE(symbols, [70000], 15, 0)
        assert len(waits) == 2
        waits.clear()
        *header, raw = cuda.read_header(payload)
        assert header == [0, symbols.element_size(), 70000, (70000,)]
        out = torch.empty_like(symbols)
        assert int(HUFFMAN_DECODE(cuda.with_first_bytes(payload, raw), out, 0)) == 0
        assert len(waits) == 1
        assert torch.equal(out, symbols)
        # The payload itself remembers nothing: the op alone reads the header, as it is then.
        payload[0] ^= 1
        assert int(HUFFMAN_DECODE(payload, out, 0)) == 2
        assert len(waits) == 2


@pytest.mark.parametrize("bits", [8, 10])
def test_public_calls_wait_once_for_the_first_bytes(
    waits: list[int], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once more for the outcome of the checks, which is not seen here."""
    w = torch.randn(70000)
    q, blob = cfl_ops.quantize(w, bits), cfl_ops.compress(w, bits=bits)
    payload = cfl_ops.huffman_encode(q.symbols)
    monkeypatch.setattr(cuda, "synchronises", lambda data: True)
    for part in ({}, {"start": 33000, "stop": 69000}):
        waits.clear()
        assert torch.equal(
            cfl_ops.huffman_decode(payload, **part), q.symbols[part.get("start", 0) : part.get("stop")]
        )
        assert len(waits) == 1
        waits.clear()
        assert torch.equal(
            cfl_ops.decompress(blob, **part), cfl_ops.dequantize(q)[part.get("start", 0) : part.get("stop")]
        )
        assert len(waits) == 1
    payload[5] ^= 1
    blob[70] ^= 1
    for call in (lambda: cfl_ops.huffman_decode(payload), lambda: cfl_ops.decompress(blob)):
        with pytest.raises(cfl_ops.CorruptDataError):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weight_range_is_that_of_the_cpu(kernels, nvrtc, dtype: torch.dtype) -> None:
    bad = torch.tensor([[torch.nan, 1.0, 2.0], [0.0, -0.0, 1.0]], dtype=dtype)
    for w in (
        torch.randn(70001).to(dtype),
        torch.randn(3, 500).to(dtype),
        bad,
        torch.empty(2, 0, dtype=dtype),
    ):
        for bits, every in ((4, 33), (10, 1), (0, 1)):
            want = WEIGHT_RANGE(w, bits, every)
            for launcher in (kernels, nvrtc):
                got = cuda.weight_range(launcher, w, bits, every)
                assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_chunk_that_outgrows_its_slot_is_encoded_again(kernels) -> None:
    """A code made for a mostly constant tensor, and one chunk of all the rare symbols."""
    symbols = torch.zeros(40 * 1024, dtype=torch.uint8)
    symbols[1024:2048] = torch.arange(1024).remainder(256).to(torch.uint8)
    want = HUFFMAN_ENCODE(symbols, [40, 1024], 10, 0)
    assert torch.equal(cuda.huffman_encode(kernels, symbols, [40, 1024], 10, 0), want)


def test_chunks_beyond_shared_memory(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits that go to the slot itself, and a payload whose decoding is left to the fallback."""
    symbols = normal_symbols(5000, 256, torch.uint8)
    want = HUFFMAN_ENCODE(symbols, [5000], 12, 0)
    monkeypatch.setattr(cuda, "_shared_memory", lambda device: 256)
    assert torch.equal(cuda.huffman_encode(kernels, symbols, [5000], 12, 0), want)
    assert cuda.huffman_decode_(kernels, want, torch.empty_like(symbols), 0) is UNSERVED


def test_no_damaged_byte_is_decoded(kernels) -> None:
    symbols = normal_symbols(2500, 64, torch.uint8)
    payload = cuda.huffman_encode(kernels, symbols, [2500], 10, 0)
    for at in range(0, payload.numel(), max(1, payload.numel() // 60)):
        damaged = payload.clone()
        damaged[at] ^= 1 << at % 8
        out = torch.empty_like(symbols)
        want = HUFFMAN_DECODE(damaged, torch.empty_like(symbols), 0)
        assert int(want) != 0
        assert torch.equal(cuda.huffman_decode_(kernels, damaged, out, 0), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bits", [1, 6, 8, 11, 16])
def test_quantize_is_that_of_the_cpu(kernels, dtype: torch.dtype, bits: int) -> None:
    huge = torch.finfo(dtype).max
    cases = [
        torch.randn(3, 700).to(dtype),
        torch.randn(1, 70000).to(dtype),
        torch.randn(60, 7).to(dtype),  # groups of fewer weights than lanes
        torch.randn(33, 45).to(dtype),
        torch.full((2, 40), 3.0, dtype=dtype),
        torch.tensor([[0.0, -0.0, 1.0], [torch.nan, 1.0, 2.0], [torch.inf, 0.0, -torch.inf]], dtype=dtype),
        torch.tensor([[-huge, huge, 1.0], [torch.nan, torch.nan, torch.inf]], dtype=dtype),
        torch.tensor([[0.0, torch.finfo(dtype).tiny * 3, torch.finfo(dtype).smallest_normal]], dtype=dtype),
        torch.empty(2, 0, dtype=dtype),
        torch.empty(0, 5, dtype=dtype),
    ]
    for w in cases:
        want = QUANTIZE(w, bits, True)
        got = cuda.quantize(kernels, w, bits, True)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        symbols, low, high = want[:3]
        back = cuda.dequantize(kernels, symbols, low, high, bits)
        assert torch.equal(back, DEQUANTIZE(symbols, low, high, bits))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_blobs_are_exchanged(emulated, dtype: torch.dtype) -> None:
    w = (torch.randn(37, 150) * 0.05).to(dtype)
    w[3, 4] = torch.nan
    options = (
        {"nonfinite": "keep"},
        {"bits": 10, "per": "row", "nonfinite": "keep"},
        {"bits": 5, "per": "block", "block_size": 64, "nonfinite": "keep"},
        {"bits": 9, "per": "block", "block_size": 28, "nonfinite": "keep"},
    )
    for option in options:
        blob = cfl_ops.compress(w, **option)
        back = cfl_ops.decompress(blob)
        part = cfl_ops.decompress(blob, start=1001, stop=3000)
        with cfl_ops.config.use_backend("native" if dispatch.extension_available() else "python"):
            assert torch.equal(cfl_ops.compress(w, **option), blob)
            want = cfl_ops.decompress(blob)
        for got, expected in ((back, want), (part, want.flatten()[1001:3000])):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["one", "normal8", "normal10", "uniform16"])
def test_cupys_launcher_gives_the_payload_of_the_cpu(nvrtc, name: str) -> None:
    symbols = SYMBOLS[name]()
    n = symbols.numel()
    want = HUFFMAN_ENCODE(symbols, [n], 12, 3)
    got = cuda.huffman_encode(nvrtc, symbols, [n], 12, 3)
    assert torch.equal(got, want)
    out = torch.empty(n - n // 3, dtype=symbols.dtype)
    assert int(cuda.huffman_decode_(nvrtc, got[3:], out, n // 3)) == 0
    assert torch.equal(out, symbols[n // 3 :])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cupys_launcher_quantises_and_decodes_as_the_cpu(nvrtc, dtype: torch.dtype) -> None:
    for bits in (5, 10, 14):
        w = torch.randn(3, 500).to(dtype)
        symbols, low, high, counts, info = QUANTIZE(w, bits, True)
        for a, b in zip(cuda.quantize(nvrtc, w, bits, True), (symbols, low, high, counts, info), strict=True):
            assert torch.equal(a, b)
        want = DEQUANTIZE(symbols, low, high, bits)
        assert torch.equal(cuda.dequantize(nvrtc, symbols, low, high, bits), want)
        payload, out = HUFFMAN_ENCODE(symbols, [3, 500], 10, 0), torch.empty(1500, dtype=dtype)
        assert int(cuda.decompress_(nvrtc, DecompressArguments(payload, low, high, bits, 500, out, 0))) == 0
        assert torch.equal(out, want.flatten())
