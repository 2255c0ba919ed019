"""The codec against zstandard, constriction, torch_ans and dahuffman, on the same symbols, in one process.

Peers that are not installed are skipped, and the table says so (pip install zstandard constriction torch_ans
dahuffman).
All of them run on one thread; ``--threads 2`` shows how ours scales. Each row of sizes also says where the
bits above the ideal Huffman code go.
"""

from __future__ import annotations

import heapq
import importlib.util
import math
from collections.abc import Callable

import cfl_ops
import numpy as np
import pytest
import torch
from _ratio import ROWS, compare, record, time_interleaved
from cfl_ops.ops.codec import blob as blobs
from cfl_ops.ops.codec.blob_reader import parse_blob
from cfl_ops.ops.codec.huffman import CHUNK_LOG2, HUFFMAN_DECODE
from cfl_ops.ops.codec.reference import payload as reference
from cfl_ops.ops.codec.reference.header import HEADER_BYTES, parse
from torch import Tensor

N = 4_000_000
PEERS = {
    name: importlib.util.find_spec(name) is not None
    for name in ("zstandard", "constriction", "torch_ans", "dahuffman")
}
ABSENT = ", ".join(name for name, there in PEERS.items() if not there)
NOTE = f"(not installed: {ABSENT})" if ABSENT else ""


def trained_layer() -> Tensor:
    """The weights of a small network trained on scikit-learn's digits, repeated with noise to N values."""
    from sklearn.datasets import load_digits

    generator = torch.Generator().manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 1000), torch.nn.ReLU(), torch.nn.Linear(1000, 1000),
                                torch.nn.ReLU(), torch.nn.Linear(1000, 10))  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, weight_decay=1e-5)
    for _ in range(150):
        rows = torch.randint(len(x), (128,), generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    w = model[2].weight.detach().flatten()
    return torch.cat([w * (1 + 0.01 * k) for k in range(N // w.numel())])


def weights(kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "normal":
        return torch.randn(N, generator=generator) * 0.05
    if kind == "Laplace":
        u = torch.rand(N, generator=generator, dtype=torch.float64) - 0.5
        return (-0.05 * u.sign() * torch.log1p(-2 * u.abs())).clamp(-1, 1).float()
    if kind == "uniform":
        return torch.rand(N, generator=generator)
    return trained_layer()


KINDS = ("normal", "Laplace", "uniform", "trained")
_symbols: dict[tuple[str, int], Tensor] = {}


def symbols_of(kind: str, bits: int) -> Tensor:
    if (kind, bits) not in _symbols:
        _symbols[kind, bits] = cfl_ops.quantize(weights(kind), bits).symbols
    return _symbols[kind, bits]


def zstd_peers(symbols: Tensor) -> tuple[dict[str, Callable[[], object]], dict[str, Callable[[], object]]]:
    """Encoder and decoder of zstandard level 1 (on byte planes for 16-bit symbols)."""
    if not PEERS["zstandard"]:
        return {}, {}
    import zstandard

    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    array = symbols.numpy()
    if symbols.dtype == torch.uint8:
        blob = compressor.compress(array)
        return {"zstd": lambda: compressor.compress(array)}, {"zstd": lambda: decompressor.decompress(blob)}

    def planes() -> list[bytes]:
        halves = array.view(np.uint8).reshape(-1, 2)
        return [compressor.compress(np.ascontiguousarray(halves[:, i])) for i in (0, 1)]

    parts = planes()
    out = np.empty((len(array), 2), np.uint8)

    def join() -> None:
        for i in (0, 1):
            out[:, i] = np.frombuffer(decompressor.decompress(parts[i]), np.uint8)

    return {"zstd planes": planes}, {"zstd planes": join}


def constriction_peers(symbols: Tensor, bits: int):
    if not PEERS["constriction"]:
        return {}, {}
    import constriction

    array = symbols.numpy().astype(np.int32)

    def model():
        counts = np.bincount(array, minlength=1 << bits).astype(np.float32) + 1e-3
        return constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)

    def encode() -> np.ndarray:
        coder = constriction.stream.stack.AnsCoder()
        coder.encode_reverse(array, model())
        return coder.get_compressed()

    packed, fixed = encode(), model()

    def decode() -> np.ndarray:
        return constriction.stream.stack.AnsCoder(packed).decode(fixed, len(array))

    return {"constriction ANS": encode}, {"constriction ANS": decode}


def torch_ans_peers(symbols: Tensor, bits: int):
    """The quickest of its coders here, of each family."""
    if not PEERS["torch_ans"]:
        return {}, {}
    from torch_ans.utils import TorchANSInterface

    array = symbols.to(torch.int32).view(1, -1)
    table, counts = (
        torch.zeros_like(array),
        torch.bincount(array.view(-1), minlength=1 << bits).float() + 1e-3,
    )
    encoders, decoders = {}, {}
    for name, options in {
        "rANS": {
            "impl": "rans64",
            "freq_precision": 16,
            "num_interleaves": 4,
            "inverse_cdf_precision": "auto",
        },
        "tANS": {"impl": "tans32", "freq_precision": 13, "num_interleaves": 8},
    }.items():
        coder = TorchANSInterface(device="cpu", **options)
        coder.init_params(
            (counts / counts.sum())[None],
            torch.tensor([1 << bits], dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
        )
        packed = coder.encode_with_indexes(array, table)
        encoders[f"torch_ans {name}"] = lambda c=coder: c.encode_with_indexes(array, table)
        decoders[f"torch_ans {name}"] = lambda c=coder, p=packed: c.decode_with_indexes(p, table)
    return encoders, decoders


ASKED = {
    (8, "encode", "normal"): 2.0, (8, "decode", "normal"): 2.8,
    (8, "encode", "Laplace"): 1.5, (8, "decode", "Laplace"): 2.0,
    (10, "encode", "normal"): 3.0, (10, "decode", "normal"): 3.0,
}  # fmt: skip


def _title(kind: str, what: str, n: int, seconds: float) -> str:
    return f"{kind} {what}: ours {n / seconds / 1e6:.0f} Msym/s"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("what", ["encode", "decode"])
@pytest.mark.benchmark(group="huffman against zstd level 1 (10 bits: byte planes)")
def bench_zstd(benchmark, kind: str, bits: int, what: str) -> None:
    symbols = symbols_of(kind, bits)
    encoders, decoders = zstd_peers(symbols)
    if not encoders:
        pytest.skip("zstandard is not installed")
    payload, out = cfl_ops.huffman_encode(symbols), torch.empty_like(symbols)
    size = symbols.element_size() * N + payload.numel()
    if what == "encode":
        ours, peers = lambda: cfl_ops.huffman_encode(symbols), encoders
    else:
        ours, peers = lambda: cfl_ops.huffman_decode(payload, out), decoders
    timing = compare(benchmark, f"{bits} bits {kind} {what}", ours, peers, bytes_moved=size,
                     asked=ASKED.get((bits, what, kind)), note=NOTE)  # fmt: skip
    ROWS[-1]["title"] = f"{bits} bits, {_title(kind, what, N, timing.seconds['ours'])}"


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize(("what", "asked"), [("encode", 3.0), ("decode", 10.0)])
@pytest.mark.benchmark(group="huffman against the best of constriction and torch_ans")
def bench_ans(benchmark, bits: int, what: str, asked: float) -> None:
    symbols = symbols_of("normal", bits)
    peers = {}
    for family in (constriction_peers, torch_ans_peers):
        peers.update(family(symbols, bits)[what == "decode"])
    if not peers:
        pytest.skip("neither constriction nor torch_ans is installed")
    payload, out = cfl_ops.huffman_encode(symbols), torch.empty_like(symbols)
    call = (lambda: cfl_ops.huffman_encode(symbols)) if what == "encode" else (
        lambda: cfl_ops.huffman_decode(payload, out))  # fmt: skip
    # A peer's call takes 20 to 100 ms, and warms up on its own account: ours is that of several in a row.
    calls = 8

    def ours() -> None:
        for _ in range(calls):
            call()

    timing = time_interleaved({"ours": ours, **peers}, budget=3.0)
    timing.seconds["ours"] /= calls
    record(benchmark, f"{bits} bits, {_title('normal', what, N, timing.seconds['ours'])}", timing.seconds,
           asked=asked if bits == 10 else None, note=f"ours: the mean of {calls} calls {NOTE}")  # fmt: skip


@pytest.mark.parametrize("level", [1, 0])
@pytest.mark.benchmark(group="without AVX-512: 1 is AVX2, 0 plain C++")
def bench_narrow_isa(benchmark, level: int) -> None:
    if not cfl_ops._core.dispatch.extension_available():
        pytest.skip("needs the extension")
    from cfl_ops import _C

    symbols = symbols_of("normal", 8)
    _, decoders = zstd_peers(symbols)
    if not decoders or _C.best_isa() < level:
        pytest.skip("zstandard is not installed, or the CPU has no AVX2")
    payload, out = cfl_ops.huffman_encode(symbols), torch.empty_like(symbols)
    _C.set_isa(level)
    try:
        compare(benchmark, f"8 bits normal decode, ISA {level}", lambda: cfl_ops.huffman_decode(payload, out),
                decoders, asked=1.3 if level else None)  # fmt: skip
    finally:
        _C.set_isa(_C.best_isa())


def _ideal_bits(counts: list[int]) -> float:
    """Bits of the optimal code, by the sum of the joined nodes."""
    heap = [count for count in counts if count]
    heapq.heapify(heap)
    total = 0
    while len(heap) > 1:
        joined = heapq.heappop(heap) + heapq.heappop(heap)
        total += joined
        heapq.heappush(heap, joined)
    return float(total)


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.benchmark(group="size above the ideal Huffman code, bits a symbol: asked 0.012")
def bench_size(benchmark, kind: str, bits: int) -> None:
    symbols = symbols_of(kind, bits)
    payload = benchmark.pedantic(lambda: cfl_ops.huffman_encode(symbols), rounds=1)
    header = parse(payload)
    counts = torch.bincount(symbols.to(torch.int32), minlength=1 << bits)
    ideal = _ideal_bits(counts.tolist()) / N
    lengths = torch.tensor(header.lengths + [0] * ((1 << bits) - len(header.lengths)))
    code = float((counts * lengths).sum()) / N if int((lengths > 0).sum()) > 1 else 0.0
    p = counts[counts > 0].double() / N
    table = 8 * (header.data - HEADER_BYTES - 8 * len(header.shape) - 8 * len(header.sizes)) / N
    report = {
        "entropy": -float((p * p.log2()).sum()),
        "ideal Huffman": ideal,
        "ours": 8 * payload.numel() / N,
        "of it: sampled counts": code - ideal,
        "code table": table,
        "chunk sizes and checksums": 64 * len(header.sizes) / N,
        "header": 8 * (HEADER_BYTES + 8 * len(header.shape)) / N,
        "last bytes of chunks": 8 * sum(header.sizes) / N - code,
    }
    benchmark.extra_info.update(report)
    above = report["ours"] - ideal
    parts = ", ".join(f"{name} {value:.4f}" for name, value in list(report.items())[3:])
    print(f"\n{bits} bits {kind}: H {report['entropy']:.4f}, ideal {ideal:.4f}, ours +{above:.4f} ({parts})")
    assert above <= 0.012 or bits > 10


@pytest.mark.parametrize("histogram", [False, True])
@pytest.mark.benchmark(group="quantise float32 to 8 bits against torch eager")
def bench_quantize(benchmark, histogram: bool) -> None:
    w = weights("normal")

    def eager() -> Tensor:
        low, high = w.aminmax()
        index = ((w - low) * (256 / (high - low))).floor().clamp(max=255).to(torch.uint8)
        if histogram:
            torch.bincount(index, minlength=256)
        return index

    def eager_without_counts() -> Tensor:
        low, high = w.aminmax()
        return ((w - low) * (256 / (high - low))).floor().clamp(max=255).to(torch.uint8)

    compare(benchmark, "with the histogram" if histogram else "without",
            lambda: cfl_ops.quantize(w, 8, histogram=histogram), {"torch eager": eager_without_counts},
            bytes_moved=9 * N, asked=2.0 if histogram else 4.0,
            note="torch does not count here either" if histogram else "")  # fmt: skip


@pytest.mark.parametrize("n", [N, 1 << 18])
@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.benchmark(group="decode to float32 in one pass, against decode alone (asked 1 / 1.1)")
def bench_fused(benchmark, bits: int, n: int) -> None:
    w = weights("normal")[:n].clone()
    blob = cfl_ops.compress(w, bits=bits)
    out, symbols = torch.empty_like(w), cfl_ops.quantize(w, bits).symbols
    payload, plain = cfl_ops.huffman_encode(symbols), torch.empty_like(symbols)
    q = cfl_ops.quantize(w, bits)
    title = f"decompress, {bits} bits, {n} values"
    # The ops behind decompress and huffman_decode, for Python's share counts at the smaller size.
    start, op = parse_blob("bench", blob), blobs.DECOMPRESS
    fused = (start.data, start.minimum, start.maximum, bits, n, out, 0)
    compare(benchmark, title, lambda: op(*fused), {
        "decode alone": lambda: HUFFMAN_DECODE(payload, plain, 0),
    }, bytes_moved=4 * n + blob.numel(), asked=1 / 1.1, note="the ops alone")  # fmt: skip
    peers = {
        "two passes": lambda: (cfl_ops.huffman_decode(payload, plain), cfl_ops.dequantize(q)),
        "zero_ of the output": lambda: out.zero_(),
    }
    for peer, call in peers.items():
        compare(
            benchmark_again(benchmark),
            f"{title}, and Python",
            lambda: cfl_ops.decompress(blob, out),
            {peer: call},
        )


class benchmark_again:
    def __init__(self, benchmark) -> None:
        self.group, self.extra_info = benchmark.group, {}

    def pedantic(self, *args: object, **options: object) -> None:
        pass


@pytest.mark.benchmark(group="whole: compress and decompress float32")
def bench_whole(benchmark) -> None:
    w = weights("normal")
    blob, out = cfl_ops.compress(w, bits=8), torch.empty_like(w)
    compare(benchmark, "compress, 8 bits, against a copy", lambda: cfl_ops.compress(w, bits=8),
            {"clone": lambda: w.clone()}, bytes_moved=4 * N)  # fmt: skip
    compare(benchmark_again(benchmark), "compress with its own choice of bits, against a copy",
            lambda: cfl_ops.compress(w), {"clone": lambda: w.clone()}, bytes_moved=4 * N)  # fmt: skip
    compare(benchmark_again(benchmark), "decompress, 8 bits, against a copy", lambda: cfl_ops.decompress(blob, out),
            {"copy_": lambda: out.copy_(w)}, bytes_moved=4 * N)  # fmt: skip


@pytest.mark.parametrize("bits", [8, 10])
@pytest.mark.parametrize("what", ["encode", "decode", "compress", "decompress"])
@pytest.mark.benchmark(group="two threads against one (asked 1.8), ten calls")
def bench_threads(benchmark, what: str, bits: int) -> None:
    symbols, w = symbols_of("normal", bits), weights("normal")
    payload, out = cfl_ops.huffman_encode(symbols), torch.empty_like(symbols)
    blob, floats = cfl_ops.compress(w, bits=bits), torch.empty_like(w)
    call = {
        "encode": lambda: cfl_ops.huffman_encode(symbols),
        "decode": lambda: cfl_ops.huffman_decode(payload, out),
        "compress": lambda: cfl_ops.compress(w, bits=bits),
        "decompress": lambda: cfl_ops.decompress(blob, floats),
    }[what]

    def with_threads(count: int) -> Callable[[], object]:
        def run() -> None:
            torch.set_num_threads(count)  # which may make or end threads, hence several calls
            for _ in range(10):
                call()

        return run

    compare(benchmark, f"{what}, {bits} bits", with_threads(2), {"one thread": with_threads(1)}, asked=1.8)


@pytest.mark.parametrize(("what", "asked"), [("encode", 2.0), ("decode", 50.0)])
@pytest.mark.benchmark(group="the Python fallback against dahuffman, time a symbol")
def bench_fallback(benchmark, what: str, asked: float) -> None:
    if not PEERS["dahuffman"]:
        pytest.skip("dahuffman is not installed")
    import dahuffman

    symbols = symbols_of("normal", 8)
    payload = reference.encode(symbols, (N,), CHUNK_LOG2, 0)
    few = symbols[:100_000].tolist()
    peer = dahuffman.HuffmanCodec.from_data(few)
    encoded = peer.encode(few)
    ours = (lambda: reference.encode(symbols, (N,), CHUNK_LOG2, 0)) if what == "encode" else (
        lambda: reference.decode(payload, 0, N))  # fmt: skip
    theirs = (lambda: peer.encode(few)) if what == "encode" else (lambda: peer.decode(encoded))
    timing = time_interleaved({"ours": ours, "dahuffman": theirs}, budget=3.0)
    speedup = timing.seconds["dahuffman"] / len(few) / (timing.seconds["ours"] / N)
    ROWS.append({
        "group": benchmark.group, "title": f"fallback {_title('normal', what, N, timing.seconds['ours'])}",
        "ours_ms": timing.seconds["ours"] * 1e3,
        "dahuffman_ms": timing.seconds["dahuffman"] * 1e3 * N / len(few), "peer": "dahuffman", "speedup": speedup,
        "asked": asked, "gflops": None, "gbytes": None, "note": "dahuffman on 100,000 symbols, scaled",
    })  # fmt: skip
    benchmark.pedantic(lambda: math.nan, rounds=1)
