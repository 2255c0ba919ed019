"""The CUDA kernels of ridge_solve and small_pinv, emulated: beyond what tests/gpu/test_contract_on_host.py asks."""

from __future__ import annotations

import pytest
import torch
from cfl_ops.ops.solve import cuda


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
    solution, info = cuda.ridge_solve(kernels, gram, cross, torch.tensor(0.01, dtype=torch.float64), None)
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

        def solve_careful(self, *args) -> None:
            kernels.solve_careful(*args)

    solution, info = cuda.ridge_solve(Counting(), gram, cross, lam, None)
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
        got, info = cuda.small_pinv(served, a, 1e8)
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
    solution, info = cuda.ridge_solve(kernels, gram, cross, torch.tensor(0.0), None)
    assert info.tolist() == [0, bad, 0]
    assert solution[1].isnan().all()
    assert solution[::2].isfinite().all()


@pytest.mark.parametrize(("order", "block"), [(65, 1024), (100, 1024), (160, 64), (129, 32)])
def test_factor(kernels, order: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "BLOCK", block)
    matrices = system(order, 1, 2, torch.float64)[0]
    factors, info = cuda.factor(kernels, matrices)
    assert not info.any()
    assert torch.equal(factors, factors.tril())
    error = torch.linalg.matrix_norm(factors @ factors.mT - matrices)
    assert (error <= order * torch.finfo(torch.float64).eps * torch.linalg.matrix_norm(matrices)).all()
    matrices[0, 80 % order, 80 % order] = -1.0
    assert cuda.factor(kernels, matrices)[1].tolist() == [80 % order + 1, 0]


def test_cupys_launcher_solves_larger_systems(nvrtc) -> None:
    for order, sides in ((20, 70), (50, 3), (64, 1), (90, 40)):
        gram, cross = system(order, sides, 3, torch.float32)
        solution, info = cuda.ridge_solve(nvrtc, gram, cross, torch.tensor(0.5), None)
        assert not info.any()
        wide = gram.double() + 0.5 * torch.eye(order, dtype=torch.float64)
        torch.testing.assert_close(
            solution.double(), torch.linalg.solve(wide, cross.double()), rtol=0, atol=1e-4
        )
