"""The codec against independent oracles, on hard inputs, and against every kind of damage.

"native" runs at each instruction set below the machine's best; "python" is the fallback called directly.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import cfl_ops
import numpy as np
import pytest
import torch
from cfl_ops import CorruptDataError
from cfl_ops._core import dispatch
from cfl_ops.ops.codec import quantize as codec
from cfl_ops.ops.codec.reference import payload as py
from torch import Tensor

DATA = Path(__file__).parents[1] / "data"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NATIVE = dispatch.extension_available()
if NATIVE:
    from cfl_ops import _C

LEVELS = [f"isa{i}" for i in range(min(_C.best_isa(), 2) + 1)] if NATIVE else []


@pytest.fixture(params=[*LEVELS, "python"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with the native kernels at each instruction set, and with the fallback."""
    if request.param == "python":
        dispatch.overrides.install("python")
        yield "python"
        dispatch.overrides.install(os.environ.get("CFL_OPS_BACKEND") or None)
    else:
        _C.set_isa(int(request.param[3:]))
        yield request.param
        _C.set_isa(_C.best_isa())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: threads would only wait for each other. test_threads_... asks for its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


# --- quantize and dequantize --------------------------------------------------------------------------------


def hard_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(70_001, generator=generator, dtype=torch.float64)
    return {
        "normal": x,
        "tiny scale": x * 1e-30,
        "huge scale": x * 1e30,
        "offset": 1e4 + x,
        "constant": torch.full((5,), -0.75, dtype=torch.float64),
        "two values": torch.tensor([3.0, -1.0, 3.0, -1.0], dtype=torch.float64),
        "one": torch.tensor([2.5], dtype=torch.float64),
        "zeros": torch.zeros(17, dtype=torch.float64),
        "zeros of both signs": torch.tensor([-0.0, 0.0, -0.0], dtype=torch.float64),
        "outlier": torch.cat([x[:100] * 1e-3, torch.tensor([1e3], dtype=torch.float64)]),
    }


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [1, 4, 8, 9, 16])
def test_quantize_matches_exact_arithmetic(backend: str, dtype: torch.dtype, bits: int) -> None:
    for name, w64 in hard_weights().items():
        if dtype == torch.float16 and "scale" in name:
            continue
        w = w64.to(dtype)
        q = cfl_ops.quantize(w, bits, histogram=True)
        exact = w.to(torch.float64).numpy().astype(np.longdouble)
        low, high, levels = exact.min(), exact.max(), 2**bits
        assert float(q.minimum) == float(low)
        assert float(q.maximum) == float(high)
        symbols = q.symbols.to(torch.int64).numpy()
        assert q.histogram is not None
        np.testing.assert_array_equal(q.histogram.numpy(), np.bincount(symbols, minlength=levels))
        back = cfl_ops.dequantize(q)
        assert back.dtype == dtype
        if low == high:
            assert (symbols == 0).all()
            assert torch.equal(back, w)
            continue
        # (w - low) * scale in arithmetic of eps: three roundings of a number up to 2^bits.
        ideal = (exact - low) / (high - low) * levels
        eps = 2.0**-53 if dtype == torch.float64 else 2.0**-24
        slack = 4 * eps * levels
        index = np.minimum(np.floor(ideal), levels - 1)
        near_edge = np.abs(ideal - np.round(ideal)) <= slack
        assert (np.abs(symbols - index) <= near_edge).all(), name
        assert symbols[exact.argmax()] == levels - 1
        assert symbols[exact.argmin()] == 0
        # Half a bin, the roundings above, and the last rounding to the dtype.
        centre = low + (symbols + np.longdouble(0.5)) * (high - low) / levels
        unit = max(abs(float(low)), abs(float(high)))
        bound = 4 * eps * unit + (torch.finfo(dtype).eps * unit if dtype.itemsize == 2 else 0)
        assert np.abs(back.to(torch.float64).numpy() - centre).max() <= bound, name


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.float32, [-3.4e38, 3.4e38, 0.0, 1e38]),
        (torch.float32, [0.0, 1e-45, 3e-45, 1.4e-44]),
        (torch.float64, [-1.7e308, 1.7e308, 0.0, 1e308]),
        (torch.float64, [0.0, 5e-324, 1e-323, 4e-323]),
        (torch.float16, [-65504.0, 65504.0, 0.0, 6e-8]),
        (torch.bfloat16, [-3.3e38, 3.3e38, 0.0, 1e-40]),
    ],
)
def test_ranges_at_the_ends_of_the_dtype(backend: str, dtype: torch.dtype, values: list[float]) -> None:
    w = torch.tensor(values, dtype=dtype)
    q = cfl_ops.quantize(w, 8)
    back = cfl_ops.dequantize(q)
    assert back.isfinite().all()
    exact, got = w.double().numpy().astype(np.longdouble), back.double().numpy().astype(np.longdouble)
    bin_size = (exact.max() - exact.min()) / 256
    smallest = np.longdouble(torch.finfo(dtype).smallest_normal) * np.longdouble(torch.finfo(dtype).eps)
    ulp = np.longdouble(torch.finfo(dtype).eps) * np.abs(exact).max()
    assert (np.abs(got - exact) <= bin_size / 2 + ulp + smallest).all()


def test_order_is_kept_not_mirrored(backend: str) -> None:
    w = torch.linspace(-1, 3, 500)
    symbols = cfl_ops.quantize(w, 5).symbols.to(torch.int64)
    assert (symbols.diff() >= 0).all()
    assert symbols[0] == 0
    assert symbols[-1] == 31
    assert (cfl_ops.dequantize(cfl_ops.quantize(w, 5)).diff() >= 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_and_blocks(backend: str, dtype: torch.dtype) -> None:
    w = (torch.randn(7, 3, 45, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    rows = cfl_ops.quantize(w, 6, per="row", histogram=True)
    assert rows.minimum.shape == (7, 3)
    assert torch.equal(rows.minimum, w.amin(-1) + 0.0)
    for i, j in itertools.product(range(7), range(3)):
        alone = cfl_ops.quantize(w[i, j], 6, histogram=True)
        assert same(rows.symbols[i, j], alone.symbols)
        assert rows.histogram is not None
        assert alone.histogram is not None
        assert torch.equal(rows.histogram[i, j], alone.histogram)
        assert torch.equal(cfl_ops.dequantize(rows)[i, j], cfl_ops.dequantize(alone))
    for size in (1, 10, 45, 945, 4000):
        blocks = cfl_ops.quantize(w, 6, per="block", block_size=size)
        pieces = [cfl_ops.dequantize(cfl_ops.quantize(piece, 6)) for piece in w.flatten().split(size)]
        assert torch.equal(cfl_ops.dequantize(blocks).flatten(), torch.cat(pieces))


def test_strides_and_empty_shapes(backend: str) -> None:
    base = torch.randn(40, 60, generator=torch.Generator().manual_seed(3))
    for view in (base.T, base[::3, 5::7], base[0].expand(9, 60), base[:, :0]):
        q = cfl_ops.quantize(view, 8)
        assert same(q.symbols, cfl_ops.quantize(view.contiguous(), 8).symbols)
        assert cfl_ops.dequantize(q).shape == view.shape
    for shape in ((0,), (3, 0), (0, 4)):
        q = cfl_ops.quantize(torch.empty(shape), 8, per="row", histogram=True)
        assert q.symbols.shape == shape
        assert q.minimum.shape == shape[:-1]
        assert q.histogram is not None
        assert q.histogram.shape == (*shape[:-1], 256)
        assert (q.histogram == 0).all()
        assert cfl_ops.dequantize(q).shape == shape
    scalar = cfl_ops.quantize(torch.tensor(1.5), 8)
    assert scalar.symbols.shape == ()
    assert float(cfl_ops.dequantize(scalar)) == 1.5


@pytest.mark.parametrize("dtype", FLOATS)
def test_nonfinite_weights_are_refused_with_their_count(backend: str, dtype: torch.dtype) -> None:
    w = torch.randn(200_000, generator=torch.Generator().manual_seed(4)).to(dtype)
    w[[0, 77_777, 199_999]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    with pytest.raises(
        ValueError, match=r"cfl_ops.quantize: w must be finite, but it has 3 NaN or Inf values"
    ):
        cfl_ops.quantize(w)
    with pytest.raises(ValueError, match=r"cfl_ops.compress.*3 NaN or Inf values"):
        cfl_ops.compress(w)
    with pytest.raises(ValueError, match=r"cfl_ops.compress.*3 NaN or Inf values"):
        cfl_ops.compress(w, bits=8)
    with pytest.raises(ValueError, match=r"cfl_ops.estimate_entropy.*3 NaN or Inf values"):
        cfl_ops.estimate_entropy(w)
    q, info = cfl_ops.quantize_ex(w)
    assert int(info) == 3
    finite = w[w.isfinite()]
    assert float(q.minimum) == float(finite.min())
    assert float(q.maximum) == float(finite.max())
    assert (q.symbols == 0).all()
    q, info = cfl_ops.quantize_ex(torch.tensor([[math.nan, math.inf], [1.0, 2.0]], dtype=dtype), per="row")
    assert info.tolist() == [2, 0]
    assert q.symbols[1].tolist() == [0, 255]


def test_backends_agree_bit_for_bit() -> None:
    if not NATIVE:
        pytest.skip("needs the extension")
    generator = torch.Generator().manual_seed(5)
    for dtype, bits in itertools.product(FLOATS, (1, 3, 8, 11, 16)):
        w = (torch.randn(3, 5000, generator=generator) * torch.tensor([[1.0], [1e-3], [50.0]])).to(dtype)
        for level in range(min(_C.best_isa(), 2) + 1):
            _C.set_isa(level)
            try:
                native = codec.QUANTIZE(w, bits, True)
                for mine, theirs in zip(native, codec._quantize_python(w, bits, True), strict=True):
                    assert same(mine, theirs)
                back = codec.DEQUANTIZE(*native[:3], bits)
                assert same(back, codec._dequantize_python(*native[:3], bits))
            finally:
                _C.set_isa(_C.best_isa())


def test_argument_errors_name_the_argument() -> None:
    w = torch.randn(4)
    cases = [
        (lambda: cfl_ops.quantize(w.int()), TypeError, "quantize: w must be float16"),
        (lambda: cfl_ops.quantize(w, 0), ValueError, "bits must be an integer from 1 to 16, but got 0"),
        (lambda: cfl_ops.quantize(w, 17), ValueError, "but got 17"),
        (lambda: cfl_ops.quantize(w, 8.0), ValueError, "but got 8.0"),  # type: ignore[arg-type]
        (lambda: cfl_ops.quantize(w, per="column"), ValueError, "per must be one of"),
        (lambda: cfl_ops.quantize(w, block_size=3), ValueError, "block_size must be given with"),
        (lambda: cfl_ops.quantize(w, per="block", block_size=0), ValueError, "positive integer, but got 0"),
        (lambda: cfl_ops.quantize(w.sum(), per="row"), ValueError, "at least 1 dimension"),
        (lambda: cfl_ops.huffman_encode(w), TypeError, "symbols must be uint8 or uint16"),
        (lambda: cfl_ops.huffman_decode(w), TypeError, "payload must be a 1-d uint8 tensor"),
        (lambda: cfl_ops.decompress([1]), TypeError, "blob must be a tensor, but got list"),  # type: ignore[arg-type]
        (lambda: cfl_ops.compress(w, nonfinite="drop"), ValueError, "nonfinite must be one of"),
        (lambda: cfl_ops.estimate_entropy(w, fraction=0.0), ValueError, r"fraction must be in \(0, 1\]"),
        (lambda: cfl_ops.dequantize(w), TypeError, "q must be a QuantizedTensor"),  # type: ignore[arg-type]
        (lambda: cfl_ops.compress_state_dict({"a": 3}), TypeError, r"state_dict\['a'\] must be a tensor"),  # type: ignore[dict-item]
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
    with pytest.raises(TypeError, match=r"out must be torch.float32"):
        cfl_ops.decompress(cfl_ops.compress(w), torch.empty(4, dtype=torch.float64))


# --- entropy and bits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("bits", "fraction"), [(4, 0.03), (4, 1.0), (8, 0.5)])
def test_entropy_is_that_of_the_sampled_histogram(
    backend: str, dtype: torch.dtype, bits: int, fraction: float
) -> None:
    w = torch.randn(50, 1000, generator=torch.Generator().manual_seed(6)).to(dtype)
    exact = w.double().numpy().ravel()
    index = np.minimum((exact - exact.min()) / (exact.max() - exact.min()) * 2**bits, 2**bits - 1).astype(int)
    counts = np.bincount(index[:: max(1, round(1 / fraction))])
    p = counts[counts > 0] / counts.sum()
    # Two roundings of the bin index may move a weight to the next bin: allow for a few of them.
    assert (
        abs(float(cfl_ops.estimate_entropy(w, bits=bits, fraction=fraction)) + (p * np.log2(p)).sum()) < 2e-3
    )


def test_entropy_of_degenerate_tensors_and_allocation(backend: str) -> None:
    for w in (torch.empty(0), torch.tensor(3.0), torch.full((100,), 2.0)):
        assert float(cfl_ops.estimate_entropy(w)) == 0.0
    w = torch.randn(9999, generator=torch.Generator().manual_seed(7))
    assert torch.equal(cfl_ops.estimate_entropy(w), cfl_ops.estimate_entropy(w))
    # N = H + c rounded half up, within 1 and 16.
    assert cfl_ops.allocate_bits(2.5, floor=6) == 9
    assert cfl_ops.allocate_bits(2.49, floor=6) == 8
    assert cfl_ops.allocate_bits(0.0, floor=0) == 1
    assert cfl_ops.allocate_bits(14.0, floor=6) == 16


# --- Huffman ------------------------------------------------------------------------------------------------


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
    return py.encode(symbols, tuple(symbols.shape), codec.CHUNK_LOG2, 0)


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
    chunks = -(-len(flat) // 2**codec.CHUNK_LOG2)
    # Header, shape, at most 3 nibbles for a change of length, chunk table, and the chunks' last bytes.
    overhead = (
        py.HEADER_BYTES + 8 * symbols.ndim + 1.5 * 2 * present + 3 * len(counts) / 256 + 16 + 9 * chunks
    )
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


def test_lengths_are_optimal() -> None:
    generator = np.random.default_rng(10)
    for size in (1, 2, 3, 17, 256, 1000):
        counts = (generator.pareto(0.5, size) * 3).astype(np.int64).clip(0, 10**9).tolist()
        counts[0] = max(counts[0], 1)
        lengths = py.code_lengths(counts)
        oracle = oracle_lengths(counts)
        assert sum(c * n for c, n in zip(counts, lengths, strict=True)) == sum(
            c * n for c, n in zip(counts, oracle, strict=True)
        )
        assert py.unpack_lengths(py.pack_lengths(lengths), len(lengths)) == lengths


@pytest.mark.parametrize("bits", [8, 10])
def test_random_access(backend: str, bits: int) -> None:
    symbols = normal_symbols(100_000, bits).view(100, 1000)
    payload = cfl_ops.huffman_encode(symbols)
    flat = symbols.flatten()
    chunk = 1 << codec.CHUNK_LOG2
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


# --- weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options", [{}, {"bits": 8}, {"bits": 11, "per": "row"}, {"floor": 4, "per": "block", "block_size": 999}]
)
def test_compress_round_trip(backend: str, dtype: torch.dtype, options: dict[str, object]) -> None:
    w = (torch.randn(41, 1000, generator=torch.Generator().manual_seed(11)) * 0.05).to(dtype)
    blob = cfl_ops.compress(w, **options)  # type: ignore[arg-type]
    back = cfl_ops.decompress(blob)
    per = {key: value for key, value in options.items() if key in ("per", "block_size")}
    bits = options.get("bits") or cfl_ops.allocate_bits(
        cfl_ops.estimate_entropy(w),
        floor=float(options.get("floor", 6)),  # type: ignore[arg-type]
    )
    expected = cfl_ops.dequantize(cfl_ops.quantize(w, bits, **per))  # type: ignore[arg-type]
    assert same(back, expected)
    out = torch.full_like(w, math.nan)
    assert cfl_ops.decompress(blob, out) is out
    assert same(out, expected)
    for start, stop in ((0, 1), (998, 1003), (32_000, 33_000), (40_999, 41_000)):
        assert same(cfl_ops.decompress(blob, start=start, stop=stop), expected.flatten()[start:stop])


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_written_behind_the_decoder(backend: str, dtype: torch.dtype, bits: int) -> None:
    # Several chunks, outputs within the caches and beyond, at each alignment; nothing around them changes.
    n = 280_000 if backend.startswith("isa") else 70_000
    w = (torch.randn(n, generator=torch.Generator().manual_seed(5)) * 0.05).to(dtype)
    blob = cfl_ops.compress(w, bits=bits)
    expected = cfl_ops.dequantize(cfl_ops.quantize(w, bits))
    for shift, start, stop in (
        (0, 0, n),
        (1, 0, n),
        (3, 5, n - 7),
        (15, 32_768, 65_536),
        (7, 32_000, 66_000),
    ):
        buffer = torch.full((n + 40,), 7.0, dtype=dtype)
        out = buffer[shift : shift + stop - start]
        cfl_ops.decompress(blob, out, start=start, stop=stop)
        assert same(out, expected[start:stop])
        assert bool((buffer[:shift] == 7).all())
        assert bool((buffer[shift + stop - start :] == 7).all())


@pytest.mark.parametrize("group_size", [1, 50, 5000, 32_768, 40_000])
def test_ranges_that_end_within_chunks(backend: str, group_size: int) -> None:
    n = 100_000
    w = torch.randn(n, generator=torch.Generator().manual_seed(6)) * torch.linspace(0.1, 2, n)
    options = {"per": "block", "block_size": group_size}
    blob = cfl_ops.compress(w, bits=9, **options)  # type: ignore[arg-type]
    expected = cfl_ops.dequantize(cfl_ops.quantize(w, 9, **options))  # type: ignore[arg-type]
    assert same(cfl_ops.decompress(blob), expected)
    assert same(cfl_ops.decompress(blob, start=4999, stop=77_777), expected[4999:77_777])


@pytest.mark.parametrize("bits", [1, 4, 8, 9, 10, 12])
@pytest.mark.parametrize("kind", ["normal", "constant", "two values", "rising"])
def test_compress_writes_the_bytes_of_quantize_and_encode(backend: str, kind: str, bits: int) -> None:
    # Large enough for a sampled code at the lower numbers of bits, exact at the others.
    n = 1_100_000 if backend != "python" else 50_000
    w = {
        "normal": lambda: torch.randn(n, generator=torch.Generator().manual_seed(7)),
        "constant": lambda: torch.full((n,), 0.3),
        "two values": lambda: (torch.arange(n) % 3 == 0).float(),
        "rising": lambda: torch.linspace(-3, 5, n),
    }[kind]()
    blob = cfl_ops.compress(w, bits=bits)
    assert same(blob[64:], cfl_ops.huffman_encode(cfl_ops.quantize(w, bits).symbols))


def test_ranges_that_do_not_fit_the_weights_stay_within_memory(backend: str) -> None:
    # The op behind compress is public to torch.ops: wrong ranges give wrong symbols and nothing worse.
    w = torch.linspace(-1e30, 1e30, 70_000)
    w[5] = math.nan
    for low, high, bits in ((0.0, 1.0, 8), (0.0, 1.0, 10), (3.0, 3.0, 10), (1.0, -1.0, 4)):
        payload = torch.ops.cfl_ops.quantize_encode(
            w, torch.tensor(low), torch.tensor(high), bits, [70_000], 10, 0
        )
        assert int(cfl_ops.huffman_decode(payload).to(torch.int32).max()) < 2**bits


@pytest.mark.parametrize("dtype", FLOATS)
def test_compress_of_degenerate_tensors(backend: str, dtype: torch.dtype) -> None:
    for w in (
        torch.empty(0),
        torch.empty(3, 0, 2),
        torch.tensor(-2.5),
        torch.full((4, 5), 0.125),
        torch.zeros(70_000),
        torch.tensor([1.0, -1.0]),
    ):
        back = cfl_ops.decompress(cfl_ops.compress(w.to(dtype), bits=12))
        assert back.shape == w.shape
        assert back.dtype == dtype
        if w.numel() and w.min() == w.max():
            assert torch.equal(back, w.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_nonfinite_weights_are_kept_on_request(backend: str, dtype: torch.dtype) -> None:
    w = torch.randn(50, 1000, generator=torch.Generator().manual_seed(12)).to(dtype)
    w[3, 7], w[49, 999], w[0, 0] = math.nan, math.inf, -math.inf
    blob = cfl_ops.compress(w, bits=8, nonfinite="keep")
    back = cfl_ops.decompress(blob)
    bad = ~w.isfinite()
    assert torch.equal(back.isfinite(), ~bad)
    assert torch.equal(back[bad].nan_to_num(5.0), w[bad].nan_to_num(5.0))
    finite = w[~bad]
    step = float(finite.max() - finite.min()) / 256
    assert (back[~bad] - finite).double().abs().max() <= step / 2 + torch.finfo(dtype).eps * 8
    assert same(
        cfl_ops.decompress(blob, start=3000, stop=3100).nan_to_num(1.0),
        back.flatten()[3000:3100].nan_to_num(1.0),
    )
    only = torch.tensor([math.nan, math.inf], dtype=dtype)
    again = cfl_ops.decompress(cfl_ops.compress(only, bits=3, nonfinite="keep"))
    assert torch.equal(again.nan_to_num(5.0, posinf=7.0), only.nan_to_num(5.0, posinf=7.0))


def test_state_dict_and_file(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(13)
    model = torch.nn.Sequential(torch.nn.Linear(60, 50), torch.nn.BatchNorm1d(50), torch.nn.Linear(50, 3))
    state: dict[str, Tensor] = dict(model.state_dict())
    state |= {
        "flags": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "half": torch.randn(999).half(),
        "nothing": torch.empty(0, 5),
        "ünïcode/名": torch.arange(5),
    }
    path = tmp_path / "model.cflz"
    size = cfl_ops.save_file(state, path, bits=8)
    assert size == path.stat().st_size
    back = cfl_ops.load_file(path)
    assert list(back) == list(state)
    for name, value in state.items():
        if value.dtype in FLOATS and value.numel() >= 256:
            assert same(back[name], cfl_ops.dequantize(cfl_ops.quantize(value, 8)))
        else:
            assert same(back[name], value)
    model.load_state_dict({name: back[name] for name in model.state_dict()})
    # A failing write leaves the old file and no temporary one.
    with pytest.raises(ValueError, match=r"NaN or Inf.*state_dict\['bad'\]"):
        cfl_ops.save_file({"bad": torch.full((300,), math.nan)}, path)
    assert path.stat().st_size == size
    assert [item.name for item in tmp_path.iterdir()] == ["model.cflz"]


# --- damage -------------------------------------------------------------------------------------------------


def small_payloads() -> dict[str, Tensor]:
    return {
        "8-bit": cfl_ops.huffman_encode(normal_symbols(100, 6)),
        "16-bit": cfl_ops.huffman_encode(normal_symbols(60, 9).view(6, 10)),
        "constant": cfl_ops.huffman_encode(torch.zeros(50, dtype=torch.uint8)),
        "empty": cfl_ops.huffman_encode(torch.zeros(0, dtype=torch.uint8)),
    }


EXHAUSTIVE = [*LEVELS[-1:], "python"]
"""The checks do not depend on the instruction set: all bits are tried with the best one and the fallback."""


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
        info = codec.HUFFMAN_DECODE(damaged, out, 0)
        assert int(info) != 0
        if backend != "python":
            assert int(info) == int(codec._huffman_decode_python(damaged, out, 0))


@pytest.mark.parametrize("backend", EXHAUSTIVE, indirect=True)
@pytest.mark.parametrize("kind", ["quantised", "rows", "kept", "raw"])
def test_every_flip_cut_and_extension_of_a_blob_raises(backend: str, kind: str) -> None:
    w = torch.randn(5, 8, generator=torch.Generator().manual_seed(14))
    if kind == "raw":
        blob = cfl_ops.compress_state_dict({"w": w})["w"]
    elif kind == "kept":
        w[1, 2] = math.inf
        blob = cfl_ops.compress(w, bits=4, nonfinite="keep")
    else:
        blob = cfl_ops.compress(w, bits=4, per="row" if kind == "rows" else "tensor")
    assert cfl_ops.decompress(blob).shape == (5, 8)
    for damaged in itertools.chain(flips(blob), cuts_and_extensions(blob)):
        with pytest.raises(CorruptDataError):
            cfl_ops.decompress(damaged)


def test_every_flip_cut_and_extension_of_a_file_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.cflz"
    cfl_ops.save_file({"a": torch.randn(20), "b": torch.randn(40)}, path, bits=3, min_numel=30)
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    for damaged in itertools.chain(flips(data), cuts_and_extensions(data)):
        path.write_bytes(py.as_bytes(damaged))
        with pytest.raises(CorruptDataError):
            cfl_ops.load_file(path)


@pytest.mark.parametrize("bits", [8, 10])
def test_flips_and_swaps_across_chunks_raise(backend: str, bits: int) -> None:
    symbols = normal_symbols(100_000, bits)
    payload = cfl_ops.huffman_encode(symbols)
    header = py.parse(payload)
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
        table = py.pack_lengths([1, 1] if lengths is None else lengths)
    chunks = [b"\x55"] if chunks is None else chunks
    rest = struct.pack(f"<{len(shape)}Q", *shape) + table
    for i, chunk in enumerate(chunks):
        rest += struct.pack("<II", sizes[i] if sizes else len(chunk), zlib.crc32(chunk))
    total = py.HEADER_BYTES + len(rest) + sum(map(len, chunks))
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
    "huge numel": ({"numel": 2**40, "shape": (2**40,)}, py.BAD_HEADER),
    "numel above the limit": ({"numel": 2**63, "shape": (2**63,)}, py.BAD_HEADER),
    "overflowing shape": ({"shape": (2**32, 2**32)}, py.BAD_HEADER),
    "overflowing shape to the right product": ({"shape": (2**63, 2, 8)}, py.BAD_HEADER),
    "negative extent": ({"shape": (2**64 - 8,)}, py.BAD_HEADER),
    "shape of another size": ({"shape": (9,)}, py.BAD_HEADER),
    "too many dimensions": ({"ndim": 2**31}, py.BAD_HEADER),
    "huge table": ({"table_bytes": 2**32 - 1}, py.BAD_HEADER),
    "huge alphabet": ({"alphabet": 2**32 - 1}, py.BAD_HEADER),
    "alphabet of bytes above 256": ({"alphabet": 257, "lengths": [1, 1] + [0] * 255}, py.BAD_HEADER),
    "no alphabet": ({"alphabet": 0, "table": b""}, py.BAD_HEADER),
    "chunks too small": ({"chunk_log2": 3}, py.BAD_HEADER),
    "chunks too large": ({"chunk_log2": 63}, py.BAD_HEADER),
    "symbols of 3 bytes": ({"symbol_bytes": 3}, py.BAD_HEADER),
    "unknown version": ({"version": 2}, py.BAD_VERSION),
    "Kraft sum above 1": ({"alphabet": 3, "lengths": [1, 1, 1]}, py.BAD_CODE_TABLE),
    "Kraft sum below 1": ({"alphabet": 3, "lengths": [1, 2, 3]}, py.BAD_CODE_TABLE),
    "no code at all": ({"alphabet": 2, "lengths": [0, 0]}, py.BAD_CODE_TABLE),
    "one symbol of length 2": ({"alphabet": 2, "lengths": [0, 2]}, py.BAD_CODE_TABLE),
    "length above the limit": ({"alphabet": 2, "lengths": [61, 1]}, py.BAD_CODE_TABLE),
    "table too short": ({"table": b"\x11"[:0]}, py.BAD_CODE_TABLE),
    "table too long": ({"table": py.pack_lengths([1, 1]) + b"\0"}, py.BAD_CODE_TABLE),
    "run beyond the alphabet": ({"table": bytes([0x8D | 0, 0x00 | 0xE0, 0xFF])}, py.BAD_CODE_TABLE),
    "reserved nibble": ({"table": b"\xff"}, py.BAD_CODE_TABLE),
    "chunk sizes beyond the end": ({"sizes": [2**32 - 1]}, py.BAD_CHUNK_SIZES),
    "chunk sizes short of the end": ({"sizes": [0]}, py.BAD_CHUNK_SIZES),
    "chunk with too few bits": ({"numel": 9, "shape": (9,)}, py.BAD_CHUNK),
    "chunk with too many bits": ({"chunks": [b"\x55\x55"]}, py.BAD_CHUNK),
    "second chunk overlapping the first": (
        {
            "numel": 40_000,
            "shape": (40_000,),
            "chunks": [bytes(4096), bytes(904)],
            "sizes": [4096, 2**32 - 4096],
        },
        py.BAD_CHUNK_SIZES,
    ),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_headers_raise_before_anything_is_allocated(
    backend: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, code = HOSTILE[name]
    payload = forged(**fields)  # type: ignore[arg-type]
    out = torch.empty(8 if fields.get("numel", 8) != 9 else 9, dtype=torch.uint8)
    assert int(codec.HUFFMAN_DECODE(payload, out, 0)) == code
    if code < py.BAD_CHUNK:  # the output is not even asked for
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
        with pytest.raises(CorruptDataError):
            cfl_ops.decompress(data)


# --- golden files -------------------------------------------------------------------------------------------


def golden_symbols(n: int, top: int) -> Tensor:
    """A fixed sequence, skewed to small symbols, that needs no random number generator."""
    value, out = 12345, []
    for _ in range(n):
        value = (1103515245 * value + 12345) % 2**31
        out.append((value >> 16) % top * ((value >> 8) % top) // top)
    return torch.tensor(out, dtype=torch.int32)


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


def golden_weights(dtype: torch.dtype) -> Tensor:
    return (golden_symbols(2000, 97).to(torch.float64).view(20, 100) / 64 - 0.5).to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_golden_blobs(backend: str, dtype: torch.dtype) -> None:
    name = f"weights_{str(dtype).split('.')[1]}.bin"
    golden = torch.frombuffer(bytearray((DATA / name).read_bytes()), dtype=torch.uint8)
    w = golden_weights(dtype)
    assert same(cfl_ops.compress(w, bits=7, per="row"), golden)
    back = cfl_ops.decompress(golden)
    half_bin = (w.double().amax(-1) - w.double().amin(-1)) / 2**8
    eps = torch.finfo(dtype).eps * 2
    assert ((back.double() - w.double()).abs().amax(-1) <= half_bin + eps).all()


def test_golden_file(backend: str) -> None:
    back = cfl_ops.load_file(DATA / "state.cflz")
    assert torch.equal(back["steps"], torch.tensor(7))
    w = golden_weights(torch.float32)
    assert same(back["weight"], cfl_ops.dequantize(cfl_ops.quantize(w, 7)))


# --- the op contract ----------------------------------------------------------------------------------------


def test_opcheck() -> None:
    w = torch.randn(3, 40)
    symbols, minimum, maximum, _, _ = codec.QUANTIZE(w, 5, False)
    payload = codec.HUFFMAN_ENCODE(symbols, [3, 40], 15, 0)
    check = torch.library.opcheck
    check(codec.QUANTIZE.overload, (w, 5, True))
    check(codec.QUANTIZE.overload, (w.double().T, 12, False))
    check(codec.DEQUANTIZE.overload, (symbols, minimum, maximum, 5))
    check(
        codec.DEQUANTIZE.overload,
        (symbols, minimum.clone().requires_grad_(), maximum.clone().requires_grad_(), 5),
    )
    check(codec.HUFFMAN_ENCODE.overload, (symbols, [3, 40], 15, 0))
    check(codec.HUFFMAN_DECODE.overload, (payload, torch.empty_like(symbols), 0))
    check(codec.DECOMPRESS.overload, (payload, minimum, maximum, 5, 40, torch.empty_like(w), 0))


def test_dequantize_derivatives() -> None:
    symbols = normal_symbols(60, 6).view(3, 20)
    low = torch.tensor([-1.0, 0.2, 3.0], dtype=torch.float64, requires_grad=True)
    high = torch.tensor([2.0, 0.9, 3.5], dtype=torch.float64, requires_grad=True)

    def weights(a: Tensor, b: Tensor) -> Tensor:
        return codec.DEQUANTIZE(symbols, a, b, 6)

    assert torch.autograd.gradcheck(weights, (low, high))
    assert torch.autograd.gradgradcheck(weights, (low, high))


def test_vmap() -> None:
    w = torch.randn(4, 3, 50)
    together = torch.vmap(lambda x: cfl_ops.quantize_ex(x, 8, per="row")[0][:3], in_dims=1)(w)
    for i in range(3):
        alone = cfl_ops.quantize(w[:, i], 8, per="row")
        assert same(together[0][i], alone.symbols)
        assert same(together[1][i], alone.minimum)
    back = torch.vmap(lambda s, a, b: codec.DEQUANTIZE(s, a, b, 8))(*together)
    assert same(back[1], cfl_ops.dequantize(cfl_ops.quantize(w[:, 1], 8, per="row")))
    with pytest.raises(RuntimeError, match=r"cfl_ops.huffman_encode: .* vmap"):
        torch.vmap(cfl_ops.huffman_encode)(together[0])


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


def test_threads_do_not_change_the_bytes() -> None:
    symbols, w = normal_symbols(300_000, 8), torch.randn(300_000)
    words = normal_symbols(300_000, 10)
    # Zeros where the sample looks, noise elsewhere: the payload outgrows what the sample promised.
    hidden = torch.randint(0, 256, (512, 4096), dtype=torch.uint8)
    hidden[::8] = 0
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            payload = cfl_ops.huffman_encode(symbols)
            assert same(cfl_ops.huffman_decode(payload), symbols)
            blob = cfl_ops.compress(w, bits=8)
            assert same(cfl_ops.decompress(blob), cfl_ops.dequantize(cfl_ops.quantize(w, 8)))
            outgrown = cfl_ops.huffman_encode(hidden)
            assert same(cfl_ops.huffman_decode(outgrown), hidden)
            results.append((payload, blob, cfl_ops.compress(w), cfl_ops.huffman_encode(words), outgrown))
        for result in results[1:]:
            assert all(same(*pair) for pair in zip(result, results[0], strict=True))
    finally:
        torch.set_num_threads(before)


def test_result_survives_pickle_and_pytree(tmp_path: Path) -> None:
    q = cfl_ops.quantize(torch.randn(10), 4)
    torch.save(q, tmp_path / "q.pt")
    back = torch.load(tmp_path / "q.pt", weights_only=True)
    assert isinstance(back, cfl_ops.QuantizedTensor)
    assert same(back.symbols, q.symbols)
    leaves, spec = torch.utils._pytree.tree_flatten(q)
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), cfl_ops.QuantizedTensor)
