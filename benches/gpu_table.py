"""On a GPU: what the card can do, then every op's time over its floor and against the vendor's library, in one table.

``python benches/gpu_table.py --out FOLDER`` writes gpu_table.json and gpu_table.md after each row, so that a run
which is cut off leaves what it had. ``--device cpu --small`` rehearses it. Needs nothing but torch and cfl_ops; CuPy
and nvCOMP are peers where they are installed.

The floor of an op is the larger of its bytes over the measured copy rate and its operations over the measured rate
of the unit that does them. Times are medians of CUDA events around one call, warmed up; ours and the peers take
turns. "x floor" is ours over the floor; "ratio" is the fastest peer's time over ours.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cfl_ops
import torch
from torch import Tensor
from torch.nn import functional as F

Call = Callable[[], object]


@dataclass
class Case:
    """One row: ours, its peers, and what bounds it."""

    name: str
    ours: Call
    peers: dict[str, Call] = field(default_factory=dict)
    bytes_moved: float = 0
    flops: float = 0
    unit: str = "float32"
    asked: float | None = None
    op: str = ""
    symbols: int = 0
    """For the codec: the rate is in symbols."""


class Clock:
    """Medians of interleaved calls, by device events or by the host's clock."""

    def __init__(self, device: str, budget: float) -> None:
        self.gpu, self.budget = device == "cuda", budget

    def once(self, call: Call) -> float:
        if not self.gpu:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def medians(self, calls: dict[str, Call]) -> dict[str, float]:
        for call in calls.values():  # compile, load modules, fill caches
            call()
            call()
        if self.gpu:
            torch.cuda.synchronize()
        times: dict[str, list[float]] = {name: [] for name in calls}
        start, rounds = time.perf_counter(), 0
        while rounds < 5 or (time.perf_counter() - start < self.budget and rounds < 200):
            for name, call in calls.items():
                times[name].append(self.once(call))
            rounds += 1
        return {name: statistics.median(values) for name, values in times.items()}


def ceilings(device: str, small: bool, clock: Clock) -> dict[str, float]:
    """Bytes per second of a copy (read plus written), and FLOP/s of matrix products by type."""
    n = (1 << 22) if small else (1 << 28)
    source = torch.randn(n, device=device)
    target = torch.empty_like(source)
    rates = {"copy": 8 * n / clock.medians({"copy": lambda: target.copy_(source)})["copy"]}
    source = target = torch.empty(0)  # give the memory back
    size = 256 if small else 8192
    for unit, dtype, precision in (
        ("bfloat16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("float32", torch.float32, "highest"),
        ("float64", torch.float64, "highest"),
    ):
        n = size // 2 if unit == "float64" else size
        a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
        torch.set_float32_matmul_precision(precision)
        rates[unit] = 2 * n**3 / clock.medians({"mm": lambda a=a, b=b: a @ b})["mm"]  # type: ignore[misc]
        torch.set_float32_matmul_precision("highest")
    rates["tf32x3"] = rates["tf32"] / 3
    return rates


def with_precision(precision: str, call: Call) -> Call:
    """``call`` under a setting of float32 products."""

    def run() -> object:
        torch.set_float32_matmul_precision(precision)
        try:
            return call()
        finally:
            torch.set_float32_matmul_precision("highest")

    return run


def captured(call: Call, gpu: bool) -> Call:
    """A replay of the call's CUDA graph; on a CPU the call itself."""
    if not gpu:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def gram_cases(device: str, small: bool) -> Iterator[Callable[[], Case]]:
    rows = 2048 if small else 65536
    modes = (
        ("bfloat16", torch.bfloat16, "highest", "bfloat16"),
        ("tf32", torch.float32, "high", "tf32"),
        ("float32", torch.float32, "highest", "tf32x3"),
    )
    for width in (64, 128) if small else (512, 1024, 2048, 4096):
        for name, dtype, precision, unit in modes:

            def make(width=width, name=name, dtype=dtype, precision=precision, unit=unit) -> Case:
                x = torch.randn(rows, width, device=device).to(dtype)
                return Case(
                    f"gram {name} {rows} x {width}",
                    with_precision(precision, lambda: cfl_ops.gram(x)),
                    {"torch.mm": with_precision(precision, lambda: torch.mm(x.mT, x))},
                    x.element_size() * rows * width + 4 * width**2, rows * width * (width + 1), unit,
                    1.5 if width >= 1024 else 1.0, "gram",
                )  # fmt: skip

            yield make

    def exact() -> Case:
        n, d = (1024, 64) if small else (16384, 1024)
        x = torch.randn(n, d, device=device, dtype=torch.float64)
        peers = {"torch.mm": lambda: torch.mm(x.mT, x)}
        return Case(
            f"gram float64 {n} x {d}", lambda: cfl_ops.gram(x), peers, 8 * (n * d + d * d), n * d * (d + 1),
            "float64", 1.0, "gram",
        )  # fmt: skip

    def linear() -> Case:
        n, d, width = (1024, 32, 64) if small else (65536, 784, 1024)
        x, w = torch.randn(n, d, device=device), torch.randn(width, d, device=device)

        def peer() -> Tensor:
            h = F.relu(x @ w.mT)
            return h.mT @ h

        flops = 2 * n * d * width + n * width * (width + 1)
        return Case(
            f"linear_gram {n} x {d} -> {width}", lambda: cfl_ops.linear_gram(x, w), {"mm, relu, mm": peer},
            4 * (n * d + width * d + width**2), flops, "tf32x3", 1.0, "linear_gram",
        )  # fmt: skip

    yield exact
    yield linear


def proximal_cases(device: str, small: bool) -> Iterator[Callable[[], Case]]:
    targets = 10 if small else 1000
    sizes = (
        [(16, 64)] if small else [(32, 512), (128, 512), (128, 2048), (128, 4096), (256, 2048), (1024, 512)]
    )
    for rows, width in sizes:
        for graph in (False, True):

            def make(rows=rows, width=width, graph=graph) -> Case:
                features = torch.randn(rows, width, device=device).relu_()
                labels = torch.randint(targets, (rows,), device=device)
                weight, bias = torch.zeros(targets, width, device=device), torch.zeros(targets, device=device)
                lam = torch.ones((), dtype=torch.float64, device=device)
                leaf = features.clone().requires_grad_()
                head = torch.nn.Linear(width, targets, device=device)
                optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)

                def ours() -> object:
                    return cfl_ops.proximal_step_ex_(features, labels, weight, bias, lam=lam)

                def cross_entropy() -> None:
                    optimizer.zero_grad(set_to_none=False)
                    if leaf.grad is not None:
                        leaf.grad.zero_()
                    F.cross_entropy(head(leaf), labels).backward()
                    optimizer.step()

                gpu = device == "cuda" and graph
                flops = 2 * (3 * rows * width * targets + min(rows, width) ** 2 * max(rows, width) / 2)
                return Case(
                    f"proximal_step_ {rows} x {width}, K = {targets}{', graph' if graph else ''}",
                    captured(ours, gpu), {"cross-entropy head": captured(cross_entropy, gpu)},
                    4 * (2 * rows * width + 2 * targets * width), flops, "tf32x3", 1.0, "proximal_step_",
                )  # fmt: skip

            yield make


def solve_cases(device: str, small: bool) -> Iterator[Callable[[], Case]]:
    def spd(batch: int, n: int) -> Tensor:
        a = torch.randn(batch, n, n, device=device)
        return a @ a.mT / n + torch.eye(n, device=device)

    def peers_of(a: Tensor, b: Tensor) -> dict[str, Call]:
        peers: dict[str, Call] = {
            "cholesky_ex + cholesky_solve": lambda: torch.cholesky_solve(b, torch.linalg.cholesky_ex(a)[0])
        }
        cupy = cupy_module(device)
        if cupy is not None:
            ca, cb = cupy.from_dlpack(a), cupy.from_dlpack(b)
            peers["cupy.linalg.solve"] = lambda: cupy.linalg.solve(ca, cb)
        return peers

    many = 100 if small else 100000
    for n in (8, 16, 32, 64):

        def batched(n=n) -> Case:
            a, b = spd(many, n), torch.randn(many, n, 1, device=device)
            return Case(
                f"ridge_solve {many} x {n}", lambda: cfl_ops.ridge_solve_ex(a, b, 0.0), peers_of(a, b),
                4 * many * (n * n + 2 * n), many * (n**3 / 3 + 2 * n * n), "float32", 5.0, "ridge_solve",
            )  # fmt: skip

        yield batched
    for n in (64,) if small else (64, 128, 256, 512, 1024):

        def single(n=n) -> Case:
            a, b = spd(1, n)[0], torch.randn(n, 1, device=device)
            return Case(
                f"ridge_solve one {n}", lambda: cfl_ops.ridge_solve_ex(a, b, 0.0), peers_of(a, b),
                4 * n * n, n**3 / 3, "float32", 3.0, "ridge_solve",
            )  # fmt: skip

        yield single

    def small_pinv() -> Case:
        a = torch.randn(many // 10, 16, 8, device=device)
        return Case(
            f"pinv {many // 10} x (16, 8)", lambda: cfl_ops.pinv_ex(a),
            {"torch.linalg.pinv": lambda: torch.linalg.pinv(a)},
            8 * a.numel(), many // 10 * 4 * 16 * 64, "float32", 20.0, "pinv",
        )  # fmt: skip

    yield small_pinv
    for n, rank in [(64, 2)] if small else [(2048, 1), (4096, 16)]:

        def update(n=n, rank=rank) -> Case:
            a, v = spd(1, n)[0], torch.randn(n, rank, device=device)
            factor = torch.linalg.cholesky(a)
            return Case(
                f"cholesky_update {n}, rank {rank}", lambda: cfl_ops.cholesky_update_ex(factor, v),
                {"torch.linalg.cholesky_ex": lambda: torch.linalg.cholesky_ex(a)},
                4 * n * n, 2 * n * n * rank, "float32", 4.0, "cholesky_update",
            )  # fmt: skip

        yield update


def codec_cases(device: str, small: bool) -> Iterator[Callable[[], Case]]:
    n = (1 << 15) if small else (1 << 28)
    for bits in (8, 10):

        def symbols_of(bits=bits) -> Tensor:
            w = torch.randn(n, device=device)
            return cfl_ops.quantize(w, bits).symbols

        def encode(bits=bits, symbols_of=symbols_of) -> Case:
            symbols = symbols_of()
            return Case(
                f"huffman_encode {bits} bits", lambda: cfl_ops.huffman_encode(symbols),
                nvcomp_peers(symbols, False),
                symbols.nbytes + n * bits / 8, op="huffman_encode", symbols=n,
            )  # fmt: skip

        def decode(bits=bits, symbols_of=symbols_of) -> Case:
            symbols = symbols_of()
            payload = cfl_ops.huffman_encode(symbols)
            out = torch.empty_like(symbols)
            return Case(
                f"huffman_decode {bits} bits", lambda: cfl_ops.huffman_decode(payload, out=out),
                nvcomp_peers(symbols, True),
                symbols.nbytes + payload.numel(), op="huffman_decode_", symbols=n,
            )  # fmt: skip

        yield encode
        yield decode

    def quantize() -> Case:
        w = torch.randn(n, device=device)

        def eager() -> Tensor:
            low, high = w.aminmax()
            return ((w - low) * (256 / (high - low))).clamp_(max=255).to(torch.uint8)

        return Case(
            "quantize 8 bits", lambda: cfl_ops.quantize_ex(w, 8), {"torch eager": eager}, 9 * n,
            op="quantize", symbols=n,
        )  # fmt: skip

    def dequantize() -> Case:
        q = cfl_ops.quantize(torch.randn(n, device=device), 8)
        step = (q.maximum - q.minimum) / 256
        return Case(
            "dequantize 8 bits", lambda: cfl_ops.dequantize(q),
            {"torch eager": lambda: (q.symbols.float() + 0.5) * step + q.minimum}, 5 * n, op="dequantize", symbols=n,
        )  # fmt: skip

    def decompress() -> Case:
        blob = cfl_ops.compress(torch.randn(n, device=device), bits=8)
        out = torch.empty(n, device=device)
        return Case(
            "decompress 8 bits", lambda: cfl_ops.decompress(blob, out=out), {}, 4 * n + blob.numel(),
            op="decompress_", symbols=n,
        )  # fmt: skip

    yield quantize
    yield dequantize
    yield decompress


def cupy_module(device: str) -> Any:
    if device != "cuda":
        return None
    try:
        import cupy
    except ImportError:
        return None
    return cupy


def nvcomp_peers(symbols: Tensor, decode: bool) -> dict[str, Call]:
    """nvCOMP's Python package, where it is installed."""
    if not symbols.is_cuda or symbols.dtype != torch.uint8:
        return {}
    try:
        from nvidia import nvcomp  # type: ignore[import-not-found]
    except ImportError:
        return {}
    peers: dict[str, Call] = {}
    for algorithm in ("ANS", "Bitcomp", "Zstd"):
        try:
            codec = nvcomp.Codec(algorithm=algorithm)
            array = nvcomp.as_array(symbols)
            encoded = codec.encode(array)
        except Exception as error:
            print(f"nvCOMP {algorithm}: {error}")
            continue
        name = f"nvCOMP {algorithm}"
        if decode:
            peers[name] = lambda codec=codec, encoded=encoded: codec.decode(encoded)  # type: ignore[misc]
        else:
            peers[name] = lambda codec=codec, array=array: codec.encode(array)  # type: ignore[misc]
    return peers


FAMILIES = {"gram": gram_cases, "proximal": proximal_cases, "solve": solve_cases, "codec": codec_cases}


def run(make: Callable[[], Case], device: str, rates: dict[str, float], clock: Clock) -> dict[str, Any]:
    """One row, or what went wrong."""
    try:
        case = make()
    except Exception as error:
        return {"case": f"{make.__qualname__}", "error": f"{type(error).__name__}: {error}"}
    row: dict[str, Any] = {"case": case.name, "backend": backend(case.op, device), "asked": case.asked}
    try:
        times = clock.medians({"ours": case.ours})
    except Exception as error:
        return row | {"error": f"{type(error).__name__}: {error}"[:300]}
    working = {}
    for name, call in case.peers.items():
        try:
            call()
            working[name] = call
        except Exception as error:
            row.setdefault("peers that failed", {})[name] = f"{type(error).__name__}: {error}"[:200]
    if working:
        times = clock.medians({"ours": case.ours, **working})
    floor = max(case.bytes_moved / rates["copy"], case.flops / rates[case.unit])
    row |= {"ms": times["ours"] * 1e3, "floor ms": floor * 1e3, "x floor": times["ours"] / floor}
    row["peers ms"] = {name: value * 1e3 for name, value in times.items() if name != "ours"}
    if working:
        peer = min(working, key=times.__getitem__)
        row |= {"peer": peer, "ratio": times[peer] / times["ours"]}
    if case.symbols:
        row["Gsym/s"] = case.symbols / times["ours"] / 1e9
    return row


def backend(op: str, device: str) -> str:
    try:
        return cfl_ops.config.backend_of(op, device)
    except KeyError:
        return "-"


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        f"# {report['device']}, {report['date']}",
        "",
        f"torch {report['torch']}, CUDA C++: {report['CUDA C++']}",
    ]
    lines += ["", "| ceiling | measured |", "| --- | --- |"]
    for name, rate in report["ceilings"].items():
        lines.append(
            f"| {name} | {rate / 1e9:.0f} GB/s |"
            if name == "copy"
            else f"| {name} | {rate / 1e12:.2f} TFLOP/s |"
        )
    lines += [
        "",
        "| case | backend | ms | floor ms | x floor | fastest peer | peer ms | ratio | asked | Gsym/s |",
    ]
    lines.append("|" + " --- |" * 10)
    for row in report["rows"]:
        if "error" in row:
            lines.append(f"| {row['case']} | {row.get('backend', '-')} | {row['error']} | | | | | | | |")
            continue

        def show(key: str, digits: int, row: dict[str, Any] = row) -> str:
            return f"{row[key]:.{digits}f}" if row.get(key) is not None else ""

        peer = row.get("peer", "")
        peer_ms = f"{row['peers ms'][peer]:.4f}" if peer else ""
        cells = [
            row["case"],
            row["backend"],
            show("ms", 4),
            show("floor ms", 4),
            show("x floor", 2),
            peer,
            peer_ms,
        ]
        lines.append(f"| {' | '.join([*cells, show('ratio', 2), show('asked', 1), show('Gsym/s', 1)])} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu-table"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes: a rehearsal")
    parser.add_argument("--seconds", type=float, default=200, help="stop starting rows after this time")
    parser.add_argument("--family", action="append", choices=sorted(FAMILIES))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_table: there is no CUDA device (--device cpu --small rehearses)")
        return 5  # as pytest's: nothing to run
    torch.manual_seed(0)
    start, clock = time.perf_counter(), Clock(options.device, 0.05 if options.small else 0.3)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "CPU (a rehearsal)",
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "CUDA C++": cfl_ops.config.info()["CUDA C++"],
        "ceilings": ceilings(options.device, options.small, clock),
        "rows": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for family in options.family or FAMILIES:
        for make in FAMILIES[family](options.device, options.small):
            if time.perf_counter() - start > options.seconds:
                report["rows"].append({"case": family, "error": "not run: out of time"})
                break
            report["rows"].append(run(make, options.device, report["ceilings"], clock))
            (options.out / "gpu_table.json").write_text(json.dumps(report, indent=1) + "\n")
            (options.out / "gpu_table.md").write_text(markdown(report))
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()
    print(markdown(report))
    return int(any("error" in row for row in report["rows"]))


if __name__ == "__main__":
    raise SystemExit(main())
