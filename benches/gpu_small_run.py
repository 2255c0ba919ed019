"""A small run of every GPU kernel, for compute-sanitizer: each result is compared with the CPU's.

One that fails is printed with its traceback, and the others still run. ``--device cpu`` rehearses it.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Iterator

import cfl_ops
import torch
from cfl_ops.ops.gram.exact_gram import EXACT_GRAM
from torch import Tensor

Piece = tuple[str, Callable[[], None]]
DEVICE = "cuda"


def on(*tensors: Tensor) -> list[Tensor]:
    return [t.to(DEVICE) for t in tensors]


def expect(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """Relative to the largest element."""
    error = (got.cpu().double() - want.double()).abs().max() / want.double().abs().max()
    assert float(error) <= tolerance, f"relative error {float(error):.2e}, allowed {tolerance:.0e}"


def gram_pieces() -> Iterator[Piece]:
    """Narrow and wide, weighted and not; some large enough for the copy engine's kernel, where there is one."""

    def moments(rows: int, width: int, dtype: torch.dtype, acc: torch.dtype, weighted: bool) -> None:
        x, y = torch.randn(rows, width).to(dtype), torch.randn(rows, 5).to(dtype)
        s = torch.rand(rows).to(dtype) if weighted else torch.ones(rows, dtype=dtype)
        moved = s.to(DEVICE) if weighted else None
        got = cfl_ops.gram(*on(x, y), sample_weight=moved, bias_column=True, acc_dtype=acc)
        want = cfl_ops.gram(x.double(), y.double(), sample_weight=s.double(), bias_column=True)
        expect(got.gram, want.gram)
        expect(got.cross, want.cross, 1e-3)

    f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    for rows, width, dtype, acc, weighted in (
        (70, 37, f32, f32, False), (70, 37, f32, f64, True), (70, 37, bf16, f32, True), (70, 37, f16, f64, True),
        (70, 70, f64, f64, False), (1100, 264, f32, f32, False), (300, 264, bf16, f32, False),
        (300, 264, f16, f32, False), (300, 520, f64, f64, True),
    ):  # fmt: skip
        name = f"gram {rows} x {width} {dtype} sums {acc}{' weighted' if weighted else ''}"
        yield name, lambda a=(rows, width, dtype, acc, weighted): moments(*a)

    def exact(weighted: bool) -> None:
        x, s = torch.randn(2, 300, 70), torch.rand(2, 300, dtype=torch.float64)
        got = EXACT_GRAM(x.to(DEVICE), s.to(DEVICE) if weighted else None)
        expect(got, (x * s[..., None] if weighted else x.double()).mT @ x.double(), 1e-12)

    for weighted in (False, True):  # the CUDA C++ kernel, which gram itself takes on some cards only
        yield f"exact_gram 2 x 300 x 70{' weighted' if weighted else ''}", lambda w=weighted: exact(w)

    def one_product() -> None:
        x = torch.randn(300, 1032)
        torch.set_float32_matmul_precision("high")
        try:
            expect(cfl_ops.gram(x.to(DEVICE)).gram, x.mT @ x, 2e-3)
        finally:
            torch.set_float32_matmul_precision("highest")

    yield "gram 300 x 1032, TF32", one_product


def proximal_pieces() -> Iterator[Piece]:
    def step(rows: int, width: int, dtype: torch.dtype) -> None:
        x, labels = torch.randn(rows, width).to(dtype), torch.randint(5, (rows,))
        weight, bias = torch.randn(5, width), torch.randn(5)
        got = cfl_ops.proximal_step(*on(x, labels, weight, bias), lam=0.1)
        want = cfl_ops.proximal_step(x.double(), labels, weight.double(), bias.double(), lam=0.1)
        expect(got.weight, want.weight)
        expect(got.grad_features, want.grad_features, 1e-3 if dtype == torch.float32 else 2e-2)

    for rows, width, dtype in (
        (20, 70, torch.float32), (70, 100, torch.float32), (50, 70, torch.bfloat16), (70, 37, torch.float32),
    ):  # fmt: skip
        yield f"proximal_step {rows} x {width} {dtype}", lambda a=(rows, width, dtype): step(*a)


def linalg_pieces() -> Iterator[Piece]:
    """Systems that a warp solves, and that go by tiles; factors of one panel and of several; small pseudoinverses."""

    def systems(order: int, dtype: torch.dtype) -> None:
        a = torch.randn(3, order, 2 * order, dtype=torch.float64)
        a, b = (a @ a.mT / order).to(dtype), torch.randn(3, order, 4).to(dtype)
        expect(cfl_ops.ridge_solve(*on(a, b)), torch.linalg.solve(a.double(), b.double()), 1e-3)

    def update(order: int, rank: int, dtype: torch.dtype) -> None:
        a = torch.randn(3, order, 2 * order, dtype=torch.float64)
        a, v = a @ a.mT / order, torch.randn(3, order, rank, dtype=torch.float64)
        got = cfl_ops.cholesky_update(*on(torch.linalg.cholesky(a).to(dtype), v.to(dtype))).cpu().double()
        expect(got @ got.mT, a + v @ v.mT)

    def pseudoinverse(rows: int, cols: int) -> None:
        a = torch.randn(7, rows, cols)
        expect(cfl_ops.pinv(a.to(DEVICE)), torch.linalg.pinv(a.double()), 1e-3)

    for dtype in (torch.float32, torch.float64):
        for order in (7, 20, 50, 130):
            yield f"ridge_solve 3 x {order} {dtype}", lambda a=(order, dtype): systems(*a)
        for order, rank in ((20, 2), (70, 5), (130, 40)):
            yield (
                f"cholesky_update 3 x {order}, rank {rank} {dtype}",
                lambda a=(order, rank, dtype): update(*a),
            )
    for rows, cols in ((16, 8), (5, 30)):
        yield f"pinv 7 x {rows} x {cols}", lambda a=(rows, cols): pseudoinverse(*a)


def codec_pieces() -> Iterator[Piece]:
    """Bytes of the GPU against those of the CPU, at sizes that are no multiple of anything."""

    def payload(symbols: Tensor) -> None:
        got, want = cfl_ops.huffman_encode(symbols.to(DEVICE)), cfl_ops.huffman_encode(symbols)
        assert torch.equal(got.cpu(), want), "huffman_encode: other bytes than the CPU's"
        assert torch.equal(cfl_ops.huffman_decode(got).cpu(), symbols), "huffman_decode: other symbols"

    def blob(dtype: torch.dtype) -> None:
        w = torch.randn(33, 1021).to(dtype)
        got, want = cfl_ops.compress(w.to(DEVICE), bits=8), cfl_ops.compress(w, bits=8)
        assert torch.equal(got.cpu(), want), "compress: other bytes than the CPU's"
        assert torch.equal(cfl_ops.decompress(got).cpu(), cfl_ops.decompress(want)), (
            "decompress: other weights"
        )

    yield "huffman uint8", lambda: payload((torch.randn(70001) * 20 + 128).clamp(0, 255).to(torch.uint8))
    yield "huffman uint16", lambda: payload((torch.randn(40003) * 80 + 512).clamp(0, 1023).to(torch.uint16))
    for dtype in (torch.float32, torch.bfloat16):
        yield f"compress {dtype}", lambda dtype=dtype: blob(dtype)


PIECES = {"linalg": linalg_pieces, "codec": codec_pieces, "gram": gram_pieces, "proximal": proximal_pieces}


def main() -> int:
    global DEVICE
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--family", action="append", choices=sorted(PIECES))
    options = parser.parse_args()
    DEVICE = options.device
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("gpu_small_run: there is no CUDA device (--device cpu rehearses)")
        return 5  # as pytest's: nothing to run
    failed = []
    for family in options.family or PIECES:
        for name, piece in PIECES[family]():
            torch.manual_seed(0)
            try:
                piece()
                if DEVICE == "cuda":
                    torch.cuda.synchronize()
                print(f"{name}: ok", flush=True)
            except Exception:
                failed.append(name)
                print(f"{name}: FAILED\n{traceback.format_exc()}", flush=True)
    print(f"{len(failed)} failed: {failed}" if failed else "all ok")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
