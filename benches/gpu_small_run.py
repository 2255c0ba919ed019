"""A small run of every GPU kernel, for compute-sanitizer: each result is compared with the CPU's."""

from __future__ import annotations

import cfl_ops
import torch


def codec(backend: str) -> None:
    """Bytes of the GPU against those of the CPU, at sizes that are no multiple of anything."""
    symbols = (torch.randn(70001) * 20 + 128).clamp(0, 255).to(torch.uint8)
    wide = (torch.randn(40003) * 80 + 512).clamp(0, 1023).to(torch.uint16)
    w = torch.randn(33, 1021)
    got = [cfl_ops.huffman_encode(s.cuda()) for s in (symbols, wide)] + [cfl_ops.compress(w.cuda(), bits=8)]
    back = [cfl_ops.huffman_decode(got[0]), cfl_ops.huffman_decode(got[1]), cfl_ops.decompress(got[2])]
    with cfl_ops.config.use_backend(None):
        want = [cfl_ops.huffman_encode(symbols), cfl_ops.huffman_encode(wide), cfl_ops.compress(w, bits=8)]
        assert all(torch.equal(g.cpu(), e) for g, e in zip(got, want, strict=True)), backend
        whole = [symbols, wide, cfl_ops.decompress(want[2])]
    assert all(torch.equal(g.cpu(), e) for g, e in zip(back, whole, strict=True)), backend


def systems(order: int) -> None:
    """Systems that a warp solves, and that go by tiles; factors of one panel and of several."""
    a = torch.randn(3, order, 2 * order)
    a, b = a @ a.mT / order, torch.randn(3, order, 4)
    want = torch.linalg.solve(a, b)
    torch.testing.assert_close(cfl_ops.ridge_solve(a.cuda(), b.cuda()).cpu(), want, rtol=1e-3, atol=1e-3)
    factor, v = torch.linalg.cholesky(a), torch.randn(3, order, 2)
    got = cfl_ops.cholesky_update(factor.cuda(), v.cuda()).cpu()
    torch.testing.assert_close(got @ got.mT, a + v @ v.mT, rtol=1e-4, atol=1e-3)


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("gpu_small_run needs a CUDA device")
    torch.manual_seed(0)
    x, y, labels = torch.randn(70, 37), torch.randn(70, 5), torch.randint(5, (70,))
    for backend in ("triton", "native", "nvrtc", "python"):
        try:
            with cfl_ops.config.use_backend(backend):
                for acc in (torch.float32, torch.float64):
                    got = cfl_ops.gram(x.cuda(), y.cuda(), bias_column=True, acc_dtype=acc)
                    torch.testing.assert_close(
                        got.gram.cpu()[:37, :37], (x.T.to(acc) @ x.to(acc)), rtol=1e-4, atol=1e-4
                    )
        except RuntimeError as error:
            if "cannot serve" not in str(error) and "was asked for" not in str(error):
                raise
            print(f"{backend}: {error}")
    for backend in ("native", "nvrtc"):
        try:
            with cfl_ops.config.use_backend(backend):
                codec(backend)
        except RuntimeError as error:
            if "was asked for" not in str(error):
                raise
            print(f"{backend}: {error}")
    for backend in ("native", "nvrtc", "triton"):
        try:
            with cfl_ops.config.use_backend(backend):
                for order in (20, 50, 130):
                    systems(order)
        except RuntimeError as error:
            if "was asked for" not in str(error):
                raise
            print(f"{backend}: {error}")
    step = cfl_ops.proximal_step(x.cuda(), labels.cuda(), torch.zeros(5, 37).cuda(), lam=0.1)
    want = cfl_ops.proximal_step(x, labels, torch.zeros(5, 37), lam=0.1)
    torch.testing.assert_close(step.weight.cpu(), want.weight, rtol=1e-4, atol=1e-5)
    torch.cuda.synchronize()
    print("ok")


if __name__ == "__main__":
    main()
