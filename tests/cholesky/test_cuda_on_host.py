"""The CUDA kernels of cholesky_update, emulated: beyond what tests/gpu/test_contract_on_host.py asks."""

from __future__ import annotations

import cfl_ops
import pytest
import torch
from cfl_ops.ops.cholesky import cuda

from tests import contract
from tests.gpu.on_host import check_sample


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
    check_sample(kernels, spec, None, [L, V, alpha, 0.9])


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
    got, codes = cuda.cholesky_update(kernels, L, V, -1.0, 1.0)
    assert torch.equal(codes, info)
    torch.testing.assert_close(got, want, rtol=0, atol=1e4 * torch.finfo(dtype).eps)
    again = L.clone()
    assert torch.equal(cuda.cholesky_update_(kernels, again, V, -1.0, 1.0), info)
    assert torch.equal(again[info != 0], L[info != 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_downdate_that_lost_its_digits(kernels, dtype: torch.dtype) -> None:
    """Every pivot keeps more than 10 eps of itself, and what the last one has left is rounding all the same."""
    L = torch.linalg.cholesky(torch.eye(40) + torch.ones(40, 40)).to(dtype).repeat(3, 1, 1)
    p = torch.nn.functional.normalize(torch.randn(3, 40, 1, dtype=torch.float64), dim=-2)
    p[1] *= (1 - 40 * torch.finfo(dtype).eps) ** 0.5
    p[::2] *= 0.5
    V = (L.double() @ p).to(dtype)
    got, codes = cuda.cholesky_update(kernels, L, V, -1.0, 1.0)
    want, info = cfl_ops.ops.cholesky.update._update_python(L, V, -1.0, 1.0)
    assert (codes > 0).tolist() == (info > 0).tolist() == [False, True, False]
    torch.testing.assert_close(got, want, rtol=0, atol=1e3 * torch.finfo(dtype).eps)
    assert torch.equal(cuda.cholesky_update_(kernels, L, V, -1.0, 1.0), codes)
