"""The rows of gpu_table.py: the problems of each family, the most important first, their peers, and what bounds them.

A function of FAMILIES lists the cases of a family; nothing is allocated before ``Case.make()`` is called. Sizes that
are no powers of two are among them: most kernels have a path of their own for edges. Rows that capture CUDA graphs
come last in their family: a capture that fails can leave its process odd.

Peers of the small solves count only where they compute a status for each system, as ``ridge_solve_ex`` does (CuPy
computes one, and looks at it where ``cupyx.errstate(linalg="raise")`` asks for that).
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import cfl_ops
import torch
from torch import Tensor
from torch.nn import functional as F

Call = Callable[[], object]
Peers = dict[str, Call]


@dataclass
class Work:
    """What a row times: our call, its peers, and what it has to move and to multiply."""

    ours: Call
    peers: Peers = field(default_factory=dict)
    libraries: tuple[Callable[[], Peers], ...] = ()
    """More peers, of packages that may be missing or broken, or that take long to prepare."""
    bytes_moved: float = 0
    flops: float = 0
    unit: str = "float32"
    count: float = 0
    counted: str = ""
    """What a rate counts: symbols or systems."""
    check: Callable[[], float] | None = None
    """How far our result is from a reference: of a row that is fast and wrong, this tells."""


@dataclass
class Case:
    """A row before it is made, so that a row that cannot be made has a name, too."""

    op: str
    dtype: str
    size: str
    make: Callable[[], Work]
    asked: float | str | None = None

    @property
    def name(self) -> str:
        return f"{self.op} {self.dtype} {self.size}"


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((got - want).abs().max() / want.abs().max())


def share_of_different(got: Tensor, want: Tensor) -> float:
    return float((got != want).sum()) / max(1, want.numel())


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def with_precision(precision: str, call: Call) -> Call:
    """``call`` under a setting of float32 products."""

    def run() -> object:
        torch.set_float32_matmul_precision(precision)
        try:
            return call()
        finally:
            torch.set_float32_matmul_precision("highest")

    return run


def with_library(library: str, call: Call) -> Call:
    """``call`` with torch's linear algebra by ``library``, ``"cusolver"`` or ``"magma"``."""
    prefer = torch.backends.cuda.preferred_linalg_library

    def run() -> object:
        before = prefer()
        prefer(library)
        try:
            return call()
        finally:
            prefer(before)

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


# Gram


MODES = {  # the dtype of the features, torch's setting, the unit that multiplies
    "bfloat16": (torch.bfloat16, "highest", "bfloat16"),
    "tf32": (torch.float32, "high", "tf32"),
    "float32": (torch.float32, "highest", "tf32x3"),
    "float64": (torch.float64, "highest", "float64"),
}


def gram_cases(device: str, small: bool) -> list[Case]:
    def plain(mode: str, rows: int, width: int) -> Work:
        dtype, precision, unit = MODES[mode]
        x = torch.randn(rows, width, device=device).to(dtype)
        ours = with_precision(precision, lambda: cfl_ops.gram(x))
        exact = x if dtype == torch.float64 else x.float()
        return Work(
            ours, {"torch.mm": with_precision(precision, lambda: torch.mm(x.mT, x))},
            (partial(quack_peers, x),) if mode == "bfloat16" else (),
            x.nbytes + (8 if mode == "float64" else 4) * width**2, rows * width * (width + 1), unit,
            check=lambda: apart(ours().gram, exact.mT @ exact),  # type: ignore[attr-defined]
        )  # fmt: skip

    def exact(rows: int, width: int) -> Work:
        x = torch.randn(rows, width, device=device)

        def ours() -> Any:
            return cfl_ops.gram(x, acc_dtype=torch.float64)

        def peer() -> Tensor:
            wide = x.double()
            return wide.mT @ wide

        return Work(
            ours, {"torch.mm of a float64 copy": peer}, (), 4 * rows * width + 8 * width**2,
            rows * width * (width + 1), "float64", check=lambda: apart(ours().gram, peer()),
        )  # fmt: skip

    def moments(rows: int, width: int, classes: int) -> Work:
        x, labels = torch.randn(rows, width, device=device), torch.randint(classes, (rows,), device=device)

        def ours() -> Any:
            return cfl_ops.gram(x, labels, num_classes=classes, bias_column=True)

        def peer() -> tuple[Tensor, Tensor]:
            wide = F.pad(x, (0, 1), value=1.0)
            return wide.mT @ wide, wide.mT @ F.one_hot(labels, classes).to(wide.dtype)

        return Work(
            ours, {"pad, one_hot, 2 mm": peer}, (), 4 * rows * width + 8 * rows + 4 * (width + 1) ** 2,
            rows * width * (width + 1), "tf32x3", check=lambda: apart(ours().gram, peer()[0]),
        )  # fmt: skip

    def linear(rows: int, inputs: int, width: int) -> Work:
        x, w = torch.randn(rows, inputs, device=device), torch.randn(width, inputs, device=device)

        def peer() -> Tensor:
            h = F.relu(x @ w.mT)
            return h.mT @ h

        return Work(
            lambda: cfl_ops.linear_gram(x, w), {"mm, relu, mm": peer}, (),
            4 * (rows * inputs + width * inputs + width**2),
            2 * rows * inputs * width + rows * width * (width + 1), "tf32x3",
            check=lambda: apart(cfl_ops.linear_gram(x, w).gram, peer()),
        )  # fmt: skip

    many, few = (2048, 1024) if small else (65536, 16384)
    sizes = [
        ("bfloat16", many, 1024, 1.5), ("float32", many, 1024, 1.5), ("bfloat16", many, 2048, 1.5),
        ("bfloat16", many, 4096, 1.5), ("float32", many, 2048, 1.5), ("float64", few, 1024, 1.0),
        ("bfloat16", 60000, 785, 1.0), ("float32", 60000, 785, 1.0), ("tf32", many, 2048, 1.5),
        ("tf32", many, 1024, 1.5), ("float32", many, 4096, 1.5), ("tf32", many, 4096, 1.5),
        ("bfloat16", many, 512, 1.0), ("float32", many, 512, 1.0), ("tf32", many, 512, 1.0),
        ("float64", 10000, 785, None),
    ]  # fmt: skip
    if small:
        sizes = [(mode, min(rows, 3000), width // 16, asked) for mode, rows, width, asked in sizes]
    cases = [
        Case("gram", mode, f"{rows} x {width}", partial(plain, mode, rows, width), asked)
        for mode, rows, width, asked in sizes
    ]
    n, d, width = (1000, 30, 60) if small else (65536, 784, 1024)
    rows, pixels = (1000, 49) if small else (60000, 784)
    others = [
        Case("gram", "float32", f"{rows} x {pixels} + bias, 10 classes", partial(moments, rows, pixels, 10)),
        Case("linear_gram", "float32", f"{n} x {d} -> {width}", partial(linear, n, d, width), 1.0),
        Case("exact_gram", "float32 to float64", f"{few} x {width}", partial(exact, few, width)),
        Case("exact_gram", "float32 to float64", f"{rows} x {pixels}", partial(exact, rows, pixels)),
    ]
    return cases[:6] + others + cases[6:]


def quack_peers(x: Tensor) -> Peers:
    """QuACK's product of one triangle, stored in both halves: the rival for half precision."""
    if not (x.is_cuda and installed("quack")):
        return {}
    from quack.gemm_interface import gemm_symmetric  # type: ignore[import-not-found]

    a = x.mT
    return {"quack gemm_symmetric": lambda: gemm_symmetric(a, a.mT)}


# Proximal


def proximal_cases(device: str, small: bool) -> list[Case]:
    def make(rows: int, width: int, targets: int, half: bool, graph: bool) -> Work:
        features = torch.randn(rows, width, device=device).relu_()
        if half:
            features = features.bfloat16()
        labels = torch.randint(targets, (rows,), device=device)
        weight, bias = torch.zeros(targets, width, device=device), torch.zeros(targets, device=device)
        lam = torch.ones((), dtype=torch.float64, device=device)
        leaf = features.clone().requires_grad_()
        head = torch.nn.Linear(width, targets, device=device)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
        gpu = device == "cuda" and graph

        def ours() -> object:
            return cfl_ops.proximal_step_ex_(features, labels, weight, bias, lam=lam)

        def cross_entropy() -> None:
            optimizer.zero_grad(set_to_none=False)
            if leaf.grad is not None:
                leaf.grad.zero_()
            with torch.autocast(device, torch.bfloat16, enabled=half, cache_enabled=False):
                logits = head(leaf)
            F.cross_entropy(logits.float(), labels).backward()
            optimizer.step()

        def check() -> float:
            old = torch.zeros_like(weight), torch.zeros_like(bias)
            got, _ = cfl_ops.proximal_step_ex(features, labels, *old, lam=lam)
            with cfl_ops.config.use_backend("python"):
                want, _ = cfl_ops.proximal_step_ex(features, labels, *old, lam=lam)
            return apart(got.weight, want.weight)

        return Work(
            captured(ours, gpu), {}, (lambda: {"cross-entropy head": captured(cross_entropy, gpu)},),
            2 * features.nbytes + 2 * weight.nbytes,
            2 * (3 * rows * width * targets + min(rows, width) ** 2 * max(rows, width) / 2), "tf32x3",
            check=check,
        )  # fmt: skip

    sizes = [
        (256, 2048, 1000, False), (128, 512, 1000, False), (32, 512, 1000, False), (128, 2048, 1000, False),
        (100, 1000, 37, False), (128, 2048, 1000, True), (128, 4096, 1000, False), (1024, 512, 1000, False),
        (250, 2000, 1000, True),
    ]  # fmt: skip
    if small:
        sizes = [(max(8, rows // 16), width // 16, 10, half) for rows, width, _, half in sizes]
    return [
        Case(
            "proximal_step_", "bfloat16" if half else "float32",
            f"{rows} x {width}, K = {targets}{', graph' if graph else ''}",
            partial(make, rows, width, targets, half, graph), 1.0,
        )
        for graph in (False, True) for rows, width, targets, half in sizes
    ]  # fmt: skip


# Solve


def spd(batch: tuple[int, ...], n: int, dtype: torch.dtype, device: str) -> Tensor:
    a = torch.randn(*batch, n, n, device=device, dtype=dtype)
    return a @ a.mT / n + torch.eye(n, device=device, dtype=dtype)


def ridge_work(batch: tuple[int, ...], n: int, sides: int, dtype: torch.dtype, device: str) -> Work:
    a, b = spd(batch, n, dtype, device), torch.randn(*batch, n, sides, device=device, dtype=dtype)

    def ours() -> tuple[Tensor, Tensor]:
        return cfl_ops.ridge_solve_ex(a, b, 0.0)

    systems = a.shape[:-2].numel()
    return Work(
        ours, spd_peers(a, b), (partial(cupy_peers, a, b),),
        a.nbytes + 2 * b.nbytes, systems * (n**3 / 3 + 2 * n * n * sides), str(dtype)[6:],
        systems if batch else 0, "systems",
        check=lambda: apart(ours()[0], triangular(a, b)[0]),
    )  # fmt: skip


def triangular(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    factor, info = torch.linalg.cholesky_ex(a)
    half = torch.linalg.solve_triangular(factor, b, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True), info


def spd_peers(a: Tensor, b: Tensor) -> Peers:
    """torch's solvers of positive definite systems, each with its info, by both libraries where torch has both."""

    def cholesky() -> tuple[Tensor, Tensor]:
        factor, info = torch.linalg.cholesky_ex(a)
        return torch.cholesky_solve(b, factor), info

    ways: Peers = {  # the likely fastest first
        "cholesky_ex + 2 solve_triangular": lambda: triangular(a, b),
        "cholesky_ex + cholesky_solve": cholesky,
        "solve_ex": lambda: torch.linalg.solve_ex(a, b),
    }
    if not a.is_cuda:
        return ways
    peers = {f"cuSOLVER {way}": with_library("cusolver", call) for way, call in ways.items()}
    if a.ndim > 2 and b.shape[-1] > 1:  # cuSOLVER's batches have one right side: torch loops over the systems
        del peers["cuSOLVER cholesky_ex + cholesky_solve"]
    if torch.cuda.has_magma:
        del ways["cholesky_ex + 2 solve_triangular"]  # cuBLAS's, whatever is preferred
        peers |= {f"MAGMA {way}": with_library("magma", call) for way, call in ways.items()}
    return peers


def cupy_peers(a: Tensor, b: Tensor) -> Peers:
    """CuPy's LU (cuBLAS's batched one up to 256), and cuSOLVER's Cholesky, whose batches have one right side."""
    if not (a.is_cuda and installed("cupy")):
        return {}
    import cupy
    from cupyx import lapack

    # CuPy does not follow torch's stream.
    stream = torch.cuda.current_stream()
    if hasattr(cupy.cuda.Stream, "from_external") and hasattr(stream, "__cuda_stream__"):
        outside = cupy.cuda.Stream.from_external(stream)
    else:  # before CuPy 14
        outside = cupy.cuda.ExternalStream(stream.cuda_stream, stream.device_index)
    left, right = cupy.from_dlpack(a), cupy.from_dlpack(b)

    def on_stream(solve: Callable[[Any, Any], object]) -> Call:
        def run() -> object:
            with outside:
                return solve(left, right)

        return run

    peers = {"cupy.linalg.solve": on_stream(cupy.linalg.solve)}
    if b.shape[-1] == 1:
        peers["cupyx.lapack.posv"] = on_stream(lapack.posv)
    return peers


def solve_cases(device: str, small: bool) -> list[Case]:
    def pinv(batch: int, rows: int, cols: int) -> Work:
        a = torch.randn(batch, rows, cols, device=device)
        return Work(
            lambda: cfl_ops.pinv_ex(a), {"torch.linalg.pinv": lambda: torch.linalg.pinv(a)}, (),
            2 * a.nbytes, batch * 4 * rows * cols**2, count=batch, counted="systems",
            check=lambda: apart(cfl_ops.pinv_ex(a[:100])[0], torch.linalg.pinv(a[:100])),  # its SVDs take seconds
        )  # fmt: skip

    def update(batch: tuple[int, ...], n: int, rank: int, dtype: torch.dtype) -> Work:
        a = spd(batch, n, dtype, device)
        v = torch.randn(*batch, n, rank, device=device, dtype=dtype)
        factor, updated = torch.linalg.cholesky_ex(a)[0], a + v @ v.mT
        systems = factor.shape[:-2].numel()
        return Work(
            lambda: cfl_ops.cholesky_update_ex(factor, v),
            {"cholesky_ex of the updated matrix": lambda: torch.linalg.cholesky_ex(updated)}, (),
            factor.nbytes + v.nbytes, systems * 2 * n * n * rank, str(dtype)[6:],
            systems if batch else 0, "systems",
            check=lambda: apart(
                cfl_ops.cholesky_update_ex(factor, v)[0], torch.linalg.cholesky_ex(updated)[0]
            ),
        )  # fmt: skip

    f32, f64 = torch.float32, torch.float64
    orders = [(128, f32), (512, f32), (1024, f32), (64, f32), (256, f32), (777, f32), (100, f32), (512, f64)]
    updates = [
        ((), 2048, 1, f32, 4.0), ((), 4096, 16, f32, 4.0), ((1024,), 32, 1, f32, None),
        ((), 1000, 3, f32, None), ((1000,), 33, 5, f32, None), ((), 2048, 16, f64, None),
    ]  # fmt: skip
    many = 10000
    if small:
        many, orders = 50, [(n // 8, dtype) for n, dtype in orders]
        updates = [
            (tuple(b // 50 for b in batch), max(8, n // 32), rank, dtype, asked)
            for batch, n, rank, dtype, asked in updates
        ]
    singles = [
        Case("ridge_solve", str(dtype)[6:], f"one of {n}", partial(ridge_work, (), n, 1, dtype, device), 3.0)
        for n, dtype in orders
    ]
    factors = [
        Case(
            "cholesky_update", str(dtype)[6:], f"{f'{batch[0]} of ' if batch else ''}{n}, rank {rank}",
            partial(update, batch, n, rank, dtype), asked,
        )
        for batch, n, rank, dtype, asked in updates
    ]  # fmt: skip
    inverses = [
        Case("small_pinv", "float32", f"{many} of {rows} x {cols}", partial(pinv, many, rows, cols), asked)
        for rows, cols, asked in ((16, 8, 20.0), (19, 7, None))
    ]
    return singles[:3] + factors[:3] + inverses + singles[3:] + factors[3:]


def batch_of(n: int, sides: int, dtype: torch.dtype) -> int:
    """So many systems as keep a card busy for 0.1 to 5 ms, and as 4 GB hold with a solver's copies."""
    most = {8: 400_000, 16: 200_000, 32: 100_000, 33: 100_000, 64: 100_000, 100: 6_000, 128: 4_000}[n]
    # Beyond 64, ours is torch ops in float64.
    copies, size = (2, dtype.itemsize) if n <= 64 else (6, 8)
    return min(most, int(4e9 / ((copies * n * n + 4 * n * sides) * size)) // 1000 * 1000)


def small_solve_cases(device: str, small: bool) -> list[Case]:
    cases = []
    f32, f64 = torch.float32, torch.float64
    for dtype, sides in ((f32, 1), (f64, 1), (f32, 4), (f32, 64), (f64, 4), (f64, 64)):
        for n in (32, 16, 64, 128, 8, 33, 100):
            batch = 20 if small else batch_of(n, sides, dtype)
            asked = 5.0 if n in (8, 16, 32, 64) and sides == 1 and dtype == torch.float32 else None
            size = f"{batch} of {n}, {sides} side{'s' if sides > 1 else ''}"
            make = partial(ridge_work, (batch,), n, sides, dtype, device)
            cases.append(Case("ridge_solve", str(dtype)[6:], size, make, asked))
    return cases


# Codec


def codec_cases(device: str, small: bool) -> list[Case]:
    def symbols_of(n: int, bits: int) -> Tensor:
        return cfl_ops.quantize(torch.randn(n, device=device), bits).symbols

    def encode(n: int, bits: int) -> Work:
        symbols = symbols_of(n, bits)
        size = cfl_ops.huffman_encode(symbols).numel()
        return Work(
            lambda: cfl_ops.huffman_encode(symbols), {},
            libraries(symbols, False),
            symbols.nbytes + size, count=n, counted="symbols",
            check=lambda: share_of_different(cfl_ops.huffman_decode(cfl_ops.huffman_encode(symbols)), symbols),
        )  # fmt: skip

    def decode(n: int, bits: int) -> Work:
        symbols = symbols_of(n, bits)
        payload, out = cfl_ops.huffman_encode(symbols), torch.empty_like(symbols)
        return Work(
            lambda: cfl_ops.huffman_decode(payload, out=out), {},
            libraries(symbols, True),
            symbols.nbytes + payload.numel(), count=n, counted="symbols",
            check=lambda: share_of_different(cfl_ops.huffman_decode(payload), symbols),
        )  # fmt: skip

    def quantize(n: int, bits: int) -> Work:
        w = torch.randn(n, device=device)

        def eager() -> Tensor:
            low, high = w.aminmax()
            return ((w - low) * (2**bits / (high - low))).clamp_(max=2**bits - 1).to(torch.uint8)

        def check() -> float:
            got = cfl_ops.quantize_ex(w, bits)[0].symbols
            with cfl_ops.config.use_backend("python"):
                return share_of_different(got, cfl_ops.quantize_ex(w, bits)[0].symbols)

        return Work(
            lambda: cfl_ops.quantize_ex(w, bits), {"torch eager": eager}, (), 9 * n, count=n, counted="symbols",
            check=check,
        )  # fmt: skip

    def dequantize(n: int, bits: int) -> Work:
        q = cfl_ops.quantize(torch.randn(n, device=device), bits)
        step = (q.maximum - q.minimum) / 2**bits

        def eager() -> Tensor:
            return (q.symbols.float() + 0.5) * step + q.minimum

        return Work(
            lambda: cfl_ops.dequantize(q), {"torch eager": eager}, (), 5 * n, count=n, counted="symbols",
            check=lambda: apart(cfl_ops.dequantize(q), eager()),
        )  # fmt: skip

    def compress(n: int, bits: int) -> Work:
        w = torch.randn(n, device=device)
        size = cfl_ops.compress(w, bits=bits).numel()
        return Work(lambda: cfl_ops.compress(w, bits=bits), {}, (), 8 * n + size, count=n, counted="symbols")

    def decompress(n: int, bits: int) -> Work:
        w = torch.randn(n, device=device)
        blob, out = cfl_ops.compress(w, bits=bits), torch.empty(n, device=device)

        def check() -> float:
            return apart(cfl_ops.decompress(blob), cfl_ops.dequantize(cfl_ops.quantize(w, bits)))

        return Work(
            lambda: cfl_ops.decompress(blob, out=out), {}, (), 4 * n + blob.numel(), count=n, counted="symbols",
            check=check,
        )  # fmt: skip

    # The second is no multiple of a chunk's 32,768 symbols, nor of a vector's 16.
    n, odd = (1 << 15, 50_001) if small else (1 << 28, 100_000_007)
    rows = [
        ("huffman_decode_", decode, n, 8, "150 Gsym/s"), ("huffman_encode", encode, n, 8, "150 Gsym/s"),
        ("huffman_decode_", decode, n, 10, "80 Gsym/s"), ("huffman_encode", encode, n, 10, "80 Gsym/s"),
        ("decompress_", decompress, n, 8, None), ("quantize", quantize, n, 8, None),
        ("dequantize", dequantize, n, 8, None), ("huffman_decode_", decode, odd, 8, None),
        ("huffman_encode", encode, odd, 8, None), ("quantize_encode", compress, n, 8, None),
        ("decompress_", decompress, odd, 8, None), ("quantize", quantize, odd, 8, None),
    ]  # fmt: skip
    return [
        Case(op, f"uint{8 if bits == 8 else 16}", f"{count} symbols of {bits} bits",
             partial(make, count, bits), asked)
        for op, make, count, bits, asked in rows
    ]  # fmt: skip


def libraries(symbols: Tensor, decode: bool) -> tuple[Callable[[], Peers], ...]:
    nvcomp = (partial(nvcomp_peers, symbols, decode, algorithm) for algorithm in ("ANS", "Bitcomp", "Zstd"))
    return (partial(dietgpu_peers, symbols, decode), *nvcomp)


def nvcomp_peers(symbols: Tensor, decode: bool, algorithm: str) -> Peers:
    """nvCOMP's Python package; without the stream it would work on one of its own."""
    if not (symbols.is_cuda and symbols.dtype == torch.uint8 and installed("nvidia.nvcomp")):
        return {}
    from nvidia import nvcomp  # type: ignore[import-not-found]

    stream = torch.cuda.current_stream().cuda_stream
    codec = nvcomp.Codec(algorithm=algorithm, cuda_stream=stream)
    array = nvcomp.as_array(symbols, cuda_stream=stream)
    call = partial(codec.decode, codec.encode(array)) if decode else partial(codec.encode, array)
    return {f"nvCOMP {algorithm}": call}


def dietgpu_peers(symbols: Tensor, decode: bool) -> Peers:
    """dietgpu's ANS, of the library of torch ops that the environment's DIETGPU names: it has no package."""
    path = os.environ.get("DIETGPU")
    if not (path and symbols.is_cuda and symbols.dtype == torch.uint8):
        return {}
    torch.ops.load_library(path)
    ops, memory = torch.ops.dietgpu, torch.empty(1 << 28, dtype=torch.uint8, device=symbols.device)
    if not decode:
        return {"dietgpu ANS": lambda: ops.compress_data(False, [symbols], False, memory)}
    packed, sizes, _ = ops.compress_data(False, [symbols], False, memory)
    packed, out = packed[0, : int(sizes[0])].clone(), torch.empty_like(symbols)
    return {"dietgpu ANS": lambda: ops.decompress_data(False, [packed], [out], False, memory)}


FAMILIES = {
    "solve_small": small_solve_cases,
    "solve": solve_cases,
    "codec": codec_cases,
    "gram": gram_cases,
    "proximal": proximal_cases,
}

NOTES = {
    "solve_small": "Batches of positive definite systems, side by side. Each solver computes a status for each system.",
}
"""What is printed over a family's table."""
