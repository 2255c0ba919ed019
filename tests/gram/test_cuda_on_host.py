"""exact_gram's CUDA kernel and launcher, emulated (see tests/gpu/on_host.py)."""

from __future__ import annotations

import pytest
import torch
from cfl_ops.ops.gram import cuda


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (2, 33, 70), (1, 100, 130), (1, 300, 20), (2, 700, 9), (0, 3, 4), (2, 0, 5)]
)
def test_exact_gram(kernels, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.rand(shape[:2], dtype=torch.float64)
    for s in (None, weight):
        got = cuda.exact_gram(kernels, x.mT.contiguous().mT, s)
        wide = x.double()
        want = (wide if s is None else wide * s[..., None]).mT @ wide
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-12)
        assert torch.equal(got, got.mT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cupys_launcher_sums_as_the_cpu(nvrtc, dtype: torch.dtype) -> None:
    x, s = torch.randn(2, 40, 70).to(dtype), torch.rand(2, 40, dtype=torch.float64)
    for weight in (None, s):
        got = cuda.exact_gram(nvrtc, x, weight)
        wide = x.double()
        want = (wide if weight is None else wide * weight[..., None]).mT @ wide
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-12)
