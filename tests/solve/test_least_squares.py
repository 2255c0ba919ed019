"""lstsq and pinv beyond the contract: ranks, tolerances, what is not finite."""

from __future__ import annotations

import cfl_ops
import pytest
import torch

from tests.solve.data import F64, randn


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", [(40, 6), (6, 40), (9, 9), (300, 70)])
def test_minimum_norm_at_every_rank(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Small integers, so that the rank is exact: the Penrose conditions, and the norm of the solution."""
    for rank in (0, 1, min(shape) // 2, min(shape) - 1):
        generator = torch.Generator().manual_seed(rank)
        left = torch.randint(-2, 3, (shape[0], rank), generator=generator)
        right = torch.randint(-2, 3, (rank, shape[1]), generator=generator)
        a = (left @ right).to(dtype)
        reference = torch.linalg.pinv(a.double(), rtol=1e-9)
        p = cfl_ops.pinv(a)
        scale = reference.norm().clamp(min=1e-30)
        assert float((p - reference).norm() / scale) < 20 * torch.finfo(dtype).eps * 10
        b = randn(shape[0], 2, dtype=dtype)
        x = cfl_ops.lstsq(a, b)
        assert float((x - reference @ b.double()).norm() / scale) < 100 * torch.finfo(dtype).eps * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_tolerances_mean_what_torch_means(dtype: torch.dtype) -> None:
    u, v = (torch.linalg.qr(randn(n, n, seed=n))[0] for n in (12, 7))
    s = torch.tensor([1e2, 1e1, 1.0, 1e-1, 1e-2, 1e-3, 1e-4], dtype=F64)
    a = ((u[:, :7] * s) @ v.mT).to(dtype)
    b = randn(12, 2, dtype=dtype)
    for kwargs in (
        {"rtol": 3e-4},
        {"atol": 0.3},
        {"rtol": 1e-2, "atol": 3e-3},
        {"rtol": 0.0, "atol": 0.03},
        {"rtol": 1.0},
    ):
        want = torch.linalg.pinv(a.double(), **kwargs)
        torch.testing.assert_close(
            cfl_ops.pinv(a, **kwargs).double(), want, rtol=0, atol=1e-5 * float(want.norm())
        )
        transposed = cfl_ops.pinv(a.mT, **kwargs).double()
        torch.testing.assert_close(transposed, want.mT, rtol=0, atol=1e-5 * float(want.norm()))
    want = torch.linalg.pinv(a.double(), rtol=3e-4) @ b.double()
    torch.testing.assert_close(
        cfl_ops.lstsq(a, b, rtol=3e-4).double(), want, rtol=0, atol=1e-5 * float(want.norm())
    )
    batch = torch.stack([a, a])
    each = cfl_ops.pinv(batch, rtol=torch.tensor([3e-4, 3e-2], dtype=F64))
    torch.testing.assert_close(each[1], cfl_ops.pinv(a, rtol=3e-2))


def test_lstsq_sees_what_a_float32_tolerance_cuts() -> None:
    """Condition 1e6 in float32 storage: the answer is that of the stored numbers in float64."""
    u, v = (torch.linalg.qr(randn(n, n, seed=n))[0] for n in (200, 6))
    a = ((u[:, :6] * torch.logspace(0, -6, 6, dtype=F64)) @ v.mT).float()
    b = (a.double() @ torch.ones(6, 1, dtype=F64)).float()
    want = torch.linalg.lstsq(a.double(), b.double(), driver="gelsd").solution
    got = cfl_ops.lstsq(a, b).double()
    assert float((got - want).norm() / want.norm()) < 1e-4
    cut = torch.linalg.lstsq(a, b, driver="gelsd").solution.double()
    assert float((cut - want).norm() / want.norm()) > 1e-2  # the test would tell


def test_duplicate_and_zero_columns_among_good_neighbours() -> None:
    a = randn(4, 30, 5, dtype=torch.float32)
    a[1, :, 2] = a[1, :, 0]
    a[2, :, 1] = 0
    b = randn(4, 30, 1, dtype=torch.float32)
    x = cfl_ops.lstsq(a, b)
    torch.testing.assert_close(x[1, 2], x[1, 0])
    assert float(x[2, 1].abs()) < 1e-7
    for i in (0, 3):
        torch.testing.assert_close(x[i], cfl_ops.lstsq(a[i], b[i]), rtol=1e-6, atol=1e-7)


def test_not_finite_is_refused_by_name() -> None:
    a = randn(3, 5, 2)
    a[1, 4, 0] = torch.nan
    b = randn(3, 5, 1)
    for call in (lambda: cfl_ops.lstsq(a, b), lambda: cfl_ops.pinv(a), lambda: cfl_ops.factorize(a)):
        with pytest.raises(torch.linalg.LinAlgError, match=r"\(Batch element 1\): a has NaN or Inf in row 4"):
            call()
    x, info = cfl_ops.lstsq_ex(a, b)
    assert info.tolist() == [0, 1, 0]
    assert x[1].isnan().all()
    assert torch.equal(x[[0, 2]].isnan().any(), torch.tensor(False))
    p, info = cfl_ops.pinv_ex(a)
    assert info.tolist() == [0, 1, 0]
    assert p[1].isnan().all()


def test_nan_in_a_right_side_stays_in_its_column() -> None:
    a, b = randn(20, 3, dtype=torch.float32), randn(20, 2, dtype=torch.float32)
    b[4, 1] = torch.nan
    x = cfl_ops.lstsq(a, b)
    assert x[:, 1].isnan().all()
    torch.testing.assert_close(x[:, :1], cfl_ops.lstsq(a, b[:, :1]))


def test_gradients_within_the_matrices_of_one_rank() -> None:
    u, v, b = (
        randn(5, 2).requires_grad_(),
        randn(2, 4, seed=1).requires_grad_(),
        randn(5, 2, seed=2).requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda u, v, b: cfl_ops.lstsq(u @ v, b), (u, v, b), atol=1e-5)
    assert torch.autograd.gradcheck(lambda u, v: cfl_ops.pinv(u @ v), (u, v), atol=1e-5)
    assert torch.autograd.gradgradcheck(lambda u, v: cfl_ops.pinv(u @ v), (u, v), atol=1e-4)
