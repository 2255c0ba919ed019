"""Weights to bytes and back: what quantize and the Huffman code promise, for every way to group them."""

from __future__ import annotations

import itertools
import math

import cfl_ops
import pytest
import torch
from cfl_ops import CorruptDataError
from cfl_ops.ops.codec.blob import DECOMPRESS
from cfl_ops.ops.codec.huffman import HUFFMAN_ENCODE
from cfl_ops.ops.codec.quantize import QUANTIZE

from tests.codec.helpers import (
    DATA,
    EXHAUSTIVE,
    FLOATS,
    cuts_and_extensions,
    flips,
    golden_blobs,
    golden_weights,
    normal_symbols,
    same,
)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "options",
    [
        *({}, {"bits": 8}, {"bits": 11, "per": "row"}),
        {"floor": 4, "per": "block", "block_size": 999, "max_error": math.inf},
    ],
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
@pytest.mark.parametrize("kind", ["normal", "constant", "rising"])
def test_compress_writes_the_bytes_of_quantize_and_encode(backend: str, kind: str, bits: int) -> None:
    # Large enough for a sampled code at the lower numbers of bits, exact at the others.
    n = 1_100_000 if backend != "python" else 50_000
    w = {
        "normal": lambda: torch.randn(n, generator=torch.Generator().manual_seed(7)),
        "constant": lambda: torch.full((n,), 0.3),
        "rising": lambda: torch.linspace(-3, 5, n),
    }[kind]()
    blob = cfl_ops.compress(w, bits=bits, max_error=math.inf)
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
def test_nonfinite_weights_are_refused_with_their_count(backend: str, dtype: torch.dtype) -> None:
    w = torch.randn(200_000, generator=torch.Generator().manual_seed(4)).to(dtype)
    w[[0, 77_777, 199_999]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    for options in ({}, {"bits": 8}, {"bits": 8, "per": "block", "block_size": 200_000}):
        with pytest.raises(ValueError, match=r"cfl_ops.compress: .*w must be finite.*3 NaN or Inf values"):
            cfl_ops.compress(w, **options)  # type: ignore[arg-type]


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


def test_argument_errors_name_the_argument() -> None:
    w = torch.randn(4)
    cases = [
        (lambda: cfl_ops.decompress([1]), TypeError, "blob must be a tensor, but got list"),  # type: ignore[arg-type]
        (lambda: cfl_ops.compress(w, nonfinite="drop"), ValueError, "nonfinite must be one of"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()
    with pytest.raises(TypeError, match=r"out must be torch.float32"):
        cfl_ops.decompress(cfl_ops.compress(w), torch.empty(4, dtype=torch.float64))


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


def test_random_bytes_raise(backend: str) -> None:
    generator = torch.Generator().manual_seed(16)
    for size in (0, 1, 39, 40, 41, 100, 5000):
        data = torch.randint(0, 256, (size,), generator=generator).to(torch.uint8)
        with pytest.raises(CorruptDataError):
            cfl_ops.decompress(data)


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


@pytest.mark.parametrize("name", list(golden_blobs()))
def test_golden_blobs_of_version_2_and_outliers(backend: str, name: str) -> None:
    golden = torch.frombuffer(bytearray((DATA / name).read_bytes()), dtype=torch.uint8)
    w, options = golden_blobs()[name]
    assert same(cfl_ops.compress(w, **options), golden)
    back = cfl_ops.decompress(golden)
    if "palette" in name:
        assert same(back, w)
    elif "zero" in name:
        assert bool((back[w == 0] == 0).all())
        assert bool(((back - w).abs().amax(-1) <= (w.amax(-1) - w.amin(-1)) / 256).all())
    else:
        far = w.abs() > 100
        assert same(back[far], w[far])
        assert float((back - w).square().mean().sqrt()) <= 0.02 * float(w[~far].std())


def test_opcheck() -> None:
    w = torch.randn(3, 40)
    symbols, minimum, maximum, _, _ = QUANTIZE(w, 5, False)
    payload = HUFFMAN_ENCODE(symbols, [3, 40], 15, 0)
    torch.library.opcheck(DECOMPRESS.overload, (payload, minimum, maximum, 5, 40, torch.empty_like(w), 0))


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
