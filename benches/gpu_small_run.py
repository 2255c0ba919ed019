"""A small run of every GPU kernel, for compute-sanitizer: each result is compared with the CPU's."""

from __future__ import annotations

import cfl_ops
import torch


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("gpu_small_run needs a CUDA device")
    torch.manual_seed(0)
    x, y, labels = torch.randn(70, 37), torch.randn(70, 5), torch.randint(5, (70,))
    for backend in ("triton", "native", "python"):
        try:
            with cfl_ops.config.use_backend(backend):
                for acc in (torch.float32, torch.float64):
                    got = cfl_ops.gram(x.cuda(), y.cuda(), bias_column=True, acc_dtype=acc)
                    torch.testing.assert_close(
                        got.gram.cpu()[:37, :37], (x.T.to(acc) @ x.to(acc)), rtol=1e-4, atol=1e-4
                    )
        except RuntimeError as error:
            if "cannot serve" not in str(error):
                raise
            print(f"{backend}: {error}")
    step = cfl_ops.proximal_step(x.cuda(), labels.cuda(), torch.zeros(5, 37).cuda(), lam=0.1)
    want = cfl_ops.proximal_step(x, labels, torch.zeros(5, 37), lam=0.1)
    torch.testing.assert_close(step.weight.cpu(), want.weight, rtol=1e-4, atol=1e-5)
    torch.cuda.synchronize()
    print("ok")


if __name__ == "__main__":
    main()
