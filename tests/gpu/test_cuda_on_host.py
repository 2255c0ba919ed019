"""The CUDA kernels and their launchers without a GPU: compiled for the CPU, where a block's threads run in turn.

tests/gpu/cuda_on_host.h holds the dialect. Everything but the hardware takes part: the torch binding, the Python
around it, launchers, kernels, barriers, warp collectives. The results must be those of the CPU kernels, bit by bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import subprocess
import types
import zlib
from pathlib import Path

import cfl_ops
import pytest
import torch
from cfl_ops._core import dispatch
from cfl_ops._core.op import OPS, UNSERVED
from cfl_ops._gpu import native, sources
from cfl_ops._gpu import nvrtc as nvrtc_module
from cfl_ops.ops.cholesky import cuda as _cholesky_cuda
from cfl_ops.ops.codec import cuda as _codec_cuda
from cfl_ops.ops.codec import host as _codec_host
from cfl_ops.ops.codec.blob import DecompressArguments
from cfl_ops.ops.codec.huffman import HUFFMAN_DECODE, HUFFMAN_ENCODE
from cfl_ops.ops.codec.quantize import DEQUANTIZE, QUANTIZE, WEIGHT_RANGE
from cfl_ops.ops.gram import cuda as gram_cuda
from cfl_ops.ops.solve import cuda as _solve_cuda

from tests import contract

ROOT = Path(__file__).parents[2]
CODEC = ("weight_range", "quantize", "dequantize", "huffman_encode", "huffman_decode_", "decompress_")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory):
    """Registers the kernels of csrc/cuda for CPU tensors."""
    library = tmp_path_factory.mktemp("on_host") / "libcfl_on_host.so"
    torch_root = Path(torch.__file__).parent
    sources = [
        str(ROOT / "csrc" / "cuda" / f"{name}.{kind}")
        for name in ("codec", "gram", "solve", "cholesky")
        for kind in ("cu", "cpp")
    ]
    compile_on_host(
        *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(torch_root / "include"), "-x", "c++"),
        *(*sources, "-o", str(library), f"-L{torch_root / 'lib'}", "-ltorch_cpu"),
    )
    torch.ops.load_library(str(library))
    return native.kernels("native")


def compile_on_host(*arguments: str) -> None:
    command = ["g++", "-std=c++20", "-O2", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-ffp-contract=off"]
    command += ["-DCFL_CUDA_ON_HOST", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'gpu'}", *arguments]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs g++")
    except subprocess.CalledProcessError as error:
        if "_Float16" in error.stderr:
            pytest.skip("needs a g++ that knows _Float16")
        raise AssertionError(error.stderr) from None


@pytest.fixture
def emulated(kernels):
    """The codec's ops are served by the emulated kernels."""
    library = torch.library.Library("cfl_ops", "IMPL")
    for name in CODEC:
        library.impl(name, OPS[name].launcher("native"), "CPU", allow_override=True)
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
        got = _codec_cuda.huffman_encode(kernels, symbols, [n], chunk_log2, 5)
        assert torch.equal(got, want)
        # A view that starts at an odd byte: chunks are read as aligned words all the same.
        for begin, end in ((0, n), (n // 3, n - n // 5)):
            out = torch.empty(end - begin, dtype=symbols.dtype)
            assert int(_codec_cuda.huffman_decode_(kernels, got[5:], out, begin)) == 0
            assert torch.equal(out, symbols[begin:end])


@pytest.mark.parametrize("name", ["normal8", "normal10", "skewed"])
def test_any_address(kernels, name: str) -> None:
    """Symbols and outputs that do not start at a word, and slices that start and end anywhere in a tile."""
    symbols = SYMBOLS[name]()
    n = symbols.numel()
    for offset in (1, 2, 3):
        shifted = torch.empty(n + offset, dtype=symbols.dtype)[offset:].copy_(symbols)
        payload = HUFFMAN_ENCODE(symbols, [n], 12, 0)
        assert torch.equal(_codec_cuda.huffman_encode(kernels, shifted, [n], 12, 0), payload)
        for begin, end in ((0, n), (4096, n), (2047, 2049), (5 * offset, n - 1)):
            room = torch.full((n + 8,), 77, dtype=symbols.dtype)
            out = room[offset : offset + end - begin]
            assert int(_codec_cuda.huffman_decode_(kernels, payload, out, begin)) == 0
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
        assert torch.equal(_codec_cuda.huffman_encode(kernels, s, [n], 13, 0), want)
        out = torch.empty_like(s)
        assert int(_codec_cuda.huffman_decode_(kernels, want, out, 0)) == 0
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
    python = {f"host_{part}": getattr(_codec_host, part) for part in ("code", "head", "parse")}
    monkeypatch.setattr(_codec_cuda, "_ops", types.SimpleNamespace(**python))
    assert torch.equal(_codec_cuda.huffman_encode(kernels, symbols, [n], 12, 7), want)
    out = torch.empty_like(symbols)
    assert int(_codec_cuda.huffman_decode_(kernels, want[7:], out, 0)) == 0
    assert torch.equal(out, symbols)


@pytest.mark.parametrize("lists", [1, 3])
def test_shared_memory_for_few_warps(kernels, lists: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the lists of all warps do not fit, fewer decode."""
    symbols = normal_symbols(20000, 256, torch.uint8)
    payload = HUFFMAN_ENCODE(symbols, [20000], 15, 0)
    facts = torch.ops.cfl_ops.host_parse(payload, payload.numel(), 0, 20000)[0].tolist()
    room = (
        _codec_cuda.decode_shared(facts[5], 15, facts[6], 1, facts[8])
        + (lists + 1) * _codec_cuda._stack_bytes()
    )
    monkeypatch.setattr(_codec_cuda, "_shared_memory", lambda device: room - 1)
    spy, out = Spy(kernels), torch.empty_like(symbols)
    assert int(_codec_cuda.huffman_decode_(spy, payload, out, 0)) == 0
    assert [(name, args[-4]) for name, args in spy.calls] == [("decode", lists)]
    assert torch.equal(out, symbols)


def test_a_refused_launch_leaves_nothing_for_the_next(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runtime keeps an error until it is asked for: the next launch, a good one, must not find it."""
    symbols = normal_symbols(20000, 256, torch.uint8)
    payload = HUFFMAN_ENCODE(symbols, [20000], 15, 0)
    out, weights = torch.empty_like(symbols), torch.randn(2, 50)
    monkeypatch.setenv("CFL_ON_HOST_REFUSE", "1")
    with pytest.raises(RuntimeError, match=r"cfl_ops\.huffman_decode"):
        _codec_cuda.huffman_decode_(kernels, payload, out, 0)
    monkeypatch.delenv("CFL_ON_HOST_REFUSE")
    assert not _codec_cuda.quantize(kernels, weights, 8, False)[-1].any()
    assert int(_codec_cuda.huffman_decode_(kernels, payload, out, 0)) == 0
    assert torch.equal(out, symbols)


def test_the_first_bad_chunk_is_reported(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFL_ON_HOST_ORDER", "reverse")
    symbols = normal_symbols(5000, 64, torch.uint8)
    payload = HUFFMAN_ENCODE(symbols, [5000], 10, 0)
    facts = torch.ops.cfl_ops.host_parse(payload, payload.numel(), 2048, 1)[0].tolist()
    payload[facts[4] + facts[7]] ^= 1  # the first byte of chunk 2
    payload[-1] ^= 1
    out = torch.empty_like(symbols)
    assert int(_codec_cuda.huffman_decode_(kernels, payload, out, 0)) == 1002
    assert int(_codec_cuda.huffman_decode_(kernels, payload, out[:1024], 3500)) == 1004
    assert int(_codec_cuda.huffman_decode_(kernels, payload, out[:1024], 1024)) == 0


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
            assert int(_codec_cuda.huffman_decode_(kernels, forged, got, 0)) == verdict
            assert verdict or torch.equal(got, want)
            verdicts.add(verdict)
    assert {0, 1000} <= verdicts  # some bits only change symbols, others the sizes of lists


@pytest.fixture
def waits(emulated, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the copies to the host: all that synchronises goes through to_host."""
    sizes: list[int] = []
    to_host = _codec_cuda.to_host
    monkeypatch.setattr(_codec_cuda, "to_host", lambda data: (sizes.append(data.numel()), to_host(data))[1])
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
        *header, raw = _codec_cuda.read_header(payload)
        assert header == [0, symbols.element_size(), 70000, (70000,)]
        out = torch.empty_like(symbols)
        assert int(HUFFMAN_DECODE(_codec_cuda.with_first_bytes(payload, raw), out, 0)) == 0
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
    monkeypatch.setattr(_codec_cuda, "synchronises", lambda data: True)
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
                got = _codec_cuda.weight_range(launcher, w, bits, every)
                assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_chunk_that_outgrows_its_slot_is_encoded_again(kernels) -> None:
    """A code made for a mostly constant tensor, and one chunk of all the rare symbols."""
    symbols = torch.zeros(40 * 1024, dtype=torch.uint8)
    symbols[1024:2048] = torch.arange(1024).remainder(256).to(torch.uint8)
    want = HUFFMAN_ENCODE(symbols, [40, 1024], 10, 0)
    assert torch.equal(_codec_cuda.huffman_encode(kernels, symbols, [40, 1024], 10, 0), want)


def test_chunks_beyond_shared_memory(kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits that go to the slot itself, and a payload whose decoding is left to the fallback."""
    symbols = normal_symbols(5000, 256, torch.uint8)
    want = HUFFMAN_ENCODE(symbols, [5000], 12, 0)
    monkeypatch.setattr(_codec_cuda, "_shared_memory", lambda device: 256)
    assert torch.equal(_codec_cuda.huffman_encode(kernels, symbols, [5000], 12, 0), want)
    assert _codec_cuda.huffman_decode_(kernels, want, torch.empty_like(symbols), 0) is UNSERVED


def test_no_damaged_byte_is_decoded(kernels) -> None:
    symbols = normal_symbols(2500, 64, torch.uint8)
    payload = _codec_cuda.huffman_encode(kernels, symbols, [2500], 10, 0)
    for at in range(0, payload.numel(), max(1, payload.numel() // 60)):
        damaged = payload.clone()
        damaged[at] ^= 1 << at % 8
        out = torch.empty_like(symbols)
        want = HUFFMAN_DECODE(damaged, torch.empty_like(symbols), 0)
        assert int(want) != 0
        assert torch.equal(_codec_cuda.huffman_decode_(kernels, damaged, out, 0), want)


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
        got = _codec_cuda.quantize(kernels, w, bits, True)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        symbols, low, high = want[:3]
        back = _codec_cuda.dequantize(kernels, symbols, low, high, bits)
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 33, 70), (1, 100, 130), (1, 300, 20), (2, 700, 9), (0, 3, 4), (2, 0, 5)]
)
def test_exact_gram(kernels, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[:2], dtype=torch.float64)
    for s in (None, weight):
        got = gram_cuda.exact_gram(kernels, x.mT.contiguous().mT, s)
        wide = x.double()
        want = (wide if s is None else wide * s[..., None]).mT @ wide
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-12)
        assert torch.equal(got, got.mT)


# --- solve and cholesky: the samples of the contract, within its bounds --------------------------------------

LINALG = {
    "ridge_solve": _solve_cuda.ridge_solve,
    "small_pinv": _solve_cuda.small_pinv,
    "cholesky_update": _cholesky_cuda.cholesky_update,
    "cholesky_update_": _cholesky_cuda.cholesky_update_,
}
SAMPLES = [
    pytest.param(spec, case, dtype, id=f"{spec.op.name}-{case.name.replace(' ', '_')}-{str(dtype)[6:]}")
    for spec in contract.load()
    if spec.op.name in LINALG
    for case in spec.cases
    for dtype in case.dtypes
]


def check_sample(kernels, spec: contract.OpSpec, args) -> None:
    """As test_contract.py's test_oracle."""
    args = contract.clone_args(args)
    want, bounds = spec.oracle(*args), spec.bound(*args)
    out = LINALG[spec.op.name](kernels, *args)
    out = contract.as_tuple(spec.op.python(*args) if out is UNSERVED else out)
    contract.assert_within(tuple(args[i] for i in spec.mutates) + out, want, bounds)


@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(("spec", "case", "dtype"), SAMPLES)
def test_samples_of_the_contract(
    kernels, spec, case, dtype, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFL_ON_HOST_ORDER", order)
    args = case.make(dtype)
    check_sample(kernels, spec, args)
    if order == "reverse":  # column-major, and not dense
        for change in (lambda t: t.mT.contiguous().mT, lambda t: t.repeat_interleave(2, -1)[..., ::2]):
            check_sample(kernels, spec, [change(a) if torch.is_tensor(a) and a.ndim > 1 else a for a in args])


def system(order: int, sides: int, batch: int, dtype: torch.dtype, condition: float = 10.0):
    """Systems of a given condition number, and right sides."""
    q = torch.linalg.qr(torch.randn(batch, order, order, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), order, dtype=torch.float64)
    return ((q * values) @ q.mT).to(dtype), torch.randn(batch, order, sides, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("order", "sides", "batch"),
    [(1, 1, 9), (7, 2, 5), (8, 1, 33), (16, 130, 3), (31, 1, 2), (32, 5, 2), (40, 3, 5), (64, 1, 3), (64, 67, 1),
     (65, 1, 1), (96, 33, 2), (200, 2, 1), (70, 200, 1), (65, 1, 300)],
)  # fmt: skip
def test_ridge_solve_at_every_size(kernels, order: int, sides: int, batch: int, dtype: torch.dtype) -> None:
    gram, cross = system(order, sides, batch, dtype)
    solution, info = _solve_cuda.ridge_solve(
        kernels, gram, cross, torch.tensor(0.01, dtype=torch.float64), None
    )
    assert not info.any()
    wide = gram.double() + 0.01 * torch.eye(order, dtype=torch.float64)
    want = torch.linalg.solve(wide, cross.double())
    bound = 4 * order * torch.finfo(dtype).eps * 10 * torch.linalg.matrix_norm(want)[:, None, None]
    assert ((solution.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("order", [6, 20, 50])
def test_float32_systems_in_doubt_are_solved_in_float64(kernels, order: int) -> None:
    """Half of them lose their last digits in float32; the others are not solved twice."""
    gram, cross = system(order, 1, 6, torch.float32)
    factor = torch.eye(order, dtype=torch.float64).repeat(3, 1, 1)
    factor[:, -1] = torch.randn(3, order) / order**0.5
    factor[:, -1, -1] = 6e-4  # a last pivot of 4e-7, float32's rounding errors are of 1e-7
    gram[::2] = (factor @ factor.mT).float()
    lam = torch.tensor(0.0)
    calls = []

    class Counting:
        def solve_small(self, *args) -> None:
            kernels.solve_small(*args)
            calls.append(args[8].clone())

    solution, info = _solve_cuda.ridge_solve(Counting(), gram, cross, lam, None)
    assert not info.any()
    assert calls[0].ne(0).tolist() == [True, False] * 3
    lower = gram.double().tril()
    want = torch.linalg.solve(lower + lower.tril(-1).mT, cross.double())
    error = (solution.double() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    assert (error[::2] <= 3 * torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rows", "cols"), [(1, 1), (8, 8), (16, 8), (5, 40), (33, 16), (17, 50), (40, 32), (32, 33)]
)
def test_small_pinv_at_every_size(kernels, nvrtc, rows: int, cols: int, dtype: torch.dtype) -> None:
    a = torch.randn(7, rows, cols, dtype=torch.float64)
    if rows > 1 and cols > 1:
        a[2, :, 0] = a[2, :, 1]  # loses rank in one direction, and below in the other
        a[2, 0] = a[2, 1]
    a[3, 0, 0] = torch.nan
    a[4] *= 1e-20
    a = a.to(dtype)
    for served in (kernels, nvrtc):
        got, info = _solve_cuda.small_pinv(served, a, 1e8)
        lost = rows > 1 and cols > 1
        assert info.tolist() == [0, 0, int(lost), 1, 0, 0, 0]
        for i in (0, 1, 4, 5, 6):
            wide = a[i].double()
            want = torch.linalg.pinv(wide)
            squared = torch.linalg.cond(wide) ** 2
            bound = 8 * (rows + cols) * (torch.finfo(torch.float64).eps * squared + torch.finfo(dtype).eps)
            assert torch.linalg.matrix_norm(got[i].double() - want) <= bound * torch.linalg.matrix_norm(want)


@pytest.mark.parametrize(("order", "bad"), [(5, 3), (40, 33), (64, 64), (70, 70), (130, 40), (130, 97)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_lost_minor_is_named(kernels, order: int, bad: int, dtype: torch.dtype) -> None:
    gram, cross = system(order, 2, 3, dtype)
    gram[1, bad - 1, bad - 1] = -1.0
    solution, info = _solve_cuda.ridge_solve(kernels, gram, cross, torch.tensor(0.0), None)
    assert info.tolist() == [0, bad, 0]
    assert solution[1].isnan().all()
    assert solution[::2].isfinite().all()


@pytest.mark.parametrize(("order", "block"), [(65, 1024), (100, 1024), (160, 64), (129, 32)])
def test_factor(kernels, order: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_solve_cuda, "BLOCK", block)
    matrices = system(order, 1, 2, torch.float64)[0]
    factors, info = _solve_cuda.factor(kernels, matrices)
    assert not info.any()
    assert torch.equal(factors, factors.tril())
    error = torch.linalg.matrix_norm(factors @ factors.mT - matrices)
    assert (error <= order * torch.finfo(torch.float64).eps * torch.linalg.matrix_norm(matrices)).all()
    matrices[0, 80 % order, 80 % order] = -1.0
    assert _solve_cuda.factor(kernels, matrices)[1].tolist() == [80 % order + 1, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("order", "rank"), [(1, 1), (33, 2), (64, 5), (100, 17), (130, 40), (40, 0)])
@pytest.mark.parametrize("alpha", [1.0, -0.3])
def test_cholesky_update_at_every_size(
    kernels, order: int, rank: int, alpha: float, dtype: torch.dtype
) -> None:
    spec = next(spec for spec in contract.load() if spec.op.name == "cholesky_update")
    root = torch.randn(2, order, 2 * order + 2, dtype=torch.float64)
    L = torch.linalg.cholesky(root @ root.mT).to(dtype)
    V = 0.3 * torch.randn(2, order, rank, dtype=torch.float64).to(dtype)
    check_sample(kernels, spec, [L, V, alpha, 0.9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_downdates_of_several_passes_fail_where_the_fallback_does(
    kernels, dtype: torch.dtype, seed: int
) -> None:
    """What a pass leaves of a pivot is compared with the pivot of the start; in place nothing changes then."""
    torch.manual_seed(seed)
    order, rank = 12, 70
    L = torch.randn(6, order, order, dtype=torch.float64).tril_() / 4
    L.diagonal(dim1=-2, dim2=-1).abs_().add_(1)
    V = torch.randn(6, order, rank, dtype=torch.float64)
    V *= torch.linspace(0.02, 0.2, 6)[:, None, None]
    L[5], V[5] = torch.eye(order), 0.0
    V[5, 7] = ((1 - 3 * torch.finfo(dtype).eps) / rank) ** 0.5  # three eps of a pivot are left
    L, V = L.to(dtype), V.to(dtype)
    want, info = cfl_ops.ops.cholesky.update._update_python(L, V, -1.0, 1.0)
    assert info[0] == 0
    assert info[4] > 0
    assert info[5] == 8
    got, codes = _cholesky_cuda.cholesky_update(kernels, L, V, -1.0, 1.0)
    assert torch.equal(codes, info)
    torch.testing.assert_close(got, want, rtol=0, atol=1e4 * torch.finfo(dtype).eps)
    again = L.clone()
    assert torch.equal(_cholesky_cuda.cholesky_update_(kernels, again, V, -1.0, 1.0), info)
    assert torch.equal(again[info != 0], L[info != 0])


# --- the launcher for CuPy ----------------------------------------------------------------------------------

GLUE = """
#include "cuda/codec_kernel.cuh"
#include "cuda/gram_kernel.cuh"
#include "cuda/solve_kernel.cuh"
#include "cuda/cholesky_kernel.cuh"
#include <utility>
using namespace cfl::cuda;
template <class... P, size_t... I>
int call(void (*kernel)(P...), std::index_sequence<I...>, int64_t blocks, int threads, size_t shared, void** args,
         const size_t* sizes, int count) {
  constexpr size_t want[] = {sizeof(P)...};
  if (count != sizeof...(P)) return 1;
  for (int i = 0; i < count; ++i) if (sizes[i] != want[i]) return 2 + i;
  on_host::launch(blocks, threads, shared, [=] { kernel(*static_cast<P*>(args[I])...); });
  return 0;
}
template <class... P>
int call(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, void** args, const size_t* sizes,
         int count) {
  return call(kernel, std::index_sequence_for<P...>(), blocks, threads, shared, args, sizes, count);
}
"""


@pytest.fixture(scope="module")
def nvrtc(tmp_path_factory: pytest.TempPathFactory):
    """The launcher for CuPy with a CuPy whose kernels are those of this machine's C++ compiler."""
    np = pytest.importorskip("numpy")
    names = [name for family in sources.HEADERS for name in nvrtc_module.names(family)]
    text = GLUE
    for i, name in enumerate(names):
        plain = name.replace("cfl::cuda::uint", "uint")
        text += f"""extern "C" int call_{i}(int64_t blocks, int threads, size_t shared, void** args,
                        const size_t* sizes, int count) {{
  return call(&{plain}, blocks, threads, shared, args, sizes, count);
}}
"""
    folder = tmp_path_factory.mktemp("nvrtc")
    (folder / "glue.cpp").write_text(text)
    compile_on_host(str(folder / "glue.cpp"), "-o", str(folder / "libglue.so"))
    glue = ctypes.CDLL(str(folder / "libglue.so"))

    class Function:
        def __init__(self, name: str) -> None:
            self.call = getattr(glue, f"call_{names.index(name)}")
            self.max_dynamic_shared_size_bytes = 48 << 10

        def __call__(self, grid, block, args, *, shared_mem: int) -> None:
            assert block[0] <= 256
            assert 0 <= shared_mem <= self.max_dynamic_shared_size_bytes
            assert all(isinstance(a, np.generic) for a in args)
            held = [np.array(a) for a in args]
            pointers = (ctypes.c_void_p * len(held))(*(a.ctypes.data for a in held))
            sizes = (ctypes.c_size_t * len(held))(*(a.nbytes for a in held))
            code = self.call(
                ctypes.c_int64(grid[0]),
                ctypes.c_int(block[0]),
                ctypes.c_size_t(shared_mem),
                pointers,
                sizes,
                len(held),
            )
            assert code == 0, f"{code}: wrong number of arguments (1) or size of argument {code - 2}"

    nothing = contextlib.nullcontext
    cuda = types.SimpleNamespace(
        Device=lambda index: nothing(), Stream=types.SimpleNamespace(from_external=lambda stream: nothing())
    )
    kernels = nvrtc_module.Nvrtc.__new__(nvrtc_module.Nvrtc)
    kernels.cupy, kernels.numpy = types.SimpleNamespace(cuda=cuda), np
    kernels.module = lambda family: types.SimpleNamespace(get_function=Function)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc_module, "_current_stream", lambda device: None)
        yield kernels


@pytest.mark.parametrize("name", ["one", "normal8", "normal10", "uniform16"])
def test_cupys_launcher_gives_the_payload_of_the_cpu(nvrtc, name: str) -> None:
    symbols = SYMBOLS[name]()
    n = symbols.numel()
    want = HUFFMAN_ENCODE(symbols, [n], 12, 3)
    got = _codec_cuda.huffman_encode(nvrtc, symbols, [n], 12, 3)
    assert torch.equal(got, want)
    out = torch.empty(n - n // 3, dtype=symbols.dtype)
    assert int(_codec_cuda.huffman_decode_(nvrtc, got[3:], out, n // 3)) == 0
    assert torch.equal(out, symbols[n // 3 :])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cupys_launcher_quantises_decodes_and_sums_as_the_cpu(nvrtc, dtype: torch.dtype) -> None:
    for bits in (5, 10, 14):
        w = torch.randn(3, 500).to(dtype)
        symbols, low, high, counts, info = QUANTIZE(w, bits, True)
        for a, b in zip(
            _codec_cuda.quantize(nvrtc, w, bits, True), (symbols, low, high, counts, info), strict=True
        ):
            assert torch.equal(a, b)
        want = DEQUANTIZE(symbols, low, high, bits)
        assert torch.equal(_codec_cuda.dequantize(nvrtc, symbols, low, high, bits), want)
        payload, out = HUFFMAN_ENCODE(symbols, [3, 500], 10, 0), torch.empty(1500, dtype=dtype)
        assert (
            int(_codec_cuda.decompress_(nvrtc, DecompressArguments(payload, low, high, bits, 500, out, 0)))
            == 0
        )
        assert torch.equal(out, want.flatten())
    x, s = torch.randn(2, 40, 70).to(dtype), torch.rand(2, 40, dtype=torch.float64)
    for weight in (None, s):
        got = gram_cuda.exact_gram(nvrtc, x, weight)
        wide = x.double()
        want = (wide if weight is None else wide * weight[..., None]).mT @ wide
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "case", "dtype"), [p for p in SAMPLES if p.values[2] in (torch.float32, torch.float64)]
)
def test_cupys_launcher_passes_the_samples_of_the_contract(nvrtc, spec, case, dtype) -> None:
    check_sample(nvrtc, spec, case.make(dtype))


def test_cupys_launcher_solves_larger_systems(nvrtc) -> None:
    for order, sides in ((20, 70), (50, 3), (64, 1), (90, 40)):
        gram, cross = system(order, sides, 3, torch.float32)
        solution, info = _solve_cuda.ridge_solve(nvrtc, gram, cross, torch.tensor(0.5), None)
        assert not info.any()
        wide = gram.double() + 0.5 * torch.eye(order, dtype=torch.float64)
        torch.testing.assert_close(
            solution.double(), torch.linalg.solve(wide, cross.double()), rtol=0, atol=1e-4
        )
