"""What ridge_solve accepts is right: against exact solutions of the stored numbers, at every condition."""

from __future__ import annotations

import cfl_ops
import pytest
import torch
from cfl_ops.ops.solve import cuda
from cfl_ops.ops.solve.system import solve_system

from tests.solve import exact
from tests.solve.data import F64, randn

ORDERS = (2, 3, 5, 8)
ZERO = torch.zeros((), dtype=F64)
everywhere = pytest.mark.parametrize("dtype", [torch.float32, F64])


@everywhere
def test_on_every_instruction_set(instruction_set, dtype: torch.dtype) -> None:
    for order in ORDERS:
        given = exact.sample(order, dtype)
        exact.check(given, *cfl_ops.ridge_solve_ex(given.gram, given.cross))


@everywhere
def test_in_the_fallback(dtype: torch.dtype) -> None:
    for order in ORDERS:
        given = exact.sample(order, dtype)
        exact.check(given, *solve_system(given.gram, given.cross, ZERO, None))


@everywhere
def test_in_cuda_kernels(kernels, dtype: torch.dtype) -> None:
    for order in ORDERS:
        given = exact.sample(order, dtype)
        exact.check(given, *cuda.ridge_solve(kernels, given.gram, given.cross, ZERO, None))


@everywhere
@pytest.mark.parametrize("single", [True, False])
def test_in_triton(single: bool, dtype: torch.dtype) -> None:
    from cfl_ops._core import dispatch
    from cfl_ops._gpu import tuning

    if not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    from cfl_ops.triton_kernels.solve import ridge_solve

    whole = exact.sample(3, dtype)
    some = slice(None, None, 5)  # of six kinds at each condition: each kind at some of them
    given = exact.Sample(whole.gram[some].contiguous(), whole.cross[some].contiguous(), whole.exact[some])
    with tuning.force("ridge_solve", {"single": single, "columns": 4, "num_warps": 1}):
        exact.check(given, *ridge_solve(given.gram, given.cross, ZERO, None))


@pytest.mark.parametrize("graded", [3.0, 20.0, 140.0])
def test_scales_of_many_decades(graded: float) -> None:
    given = exact.sample(4, F64, graded)
    exact.check(given, *cfl_ops.ridge_solve_ex(given.gram, given.cross))
    exact.check(given, *solve_system(given.gram, given.cross, ZERO, None))
    narrow = exact.sample(4, torch.float32, min(graded, 15.0))
    exact.check(narrow, *cfl_ops.ridge_solve_ex(narrow.gram, narrow.cross))


@pytest.mark.parametrize("order", [4, 64, 256])
def test_a_small_eigenvalue_of_either_sign(order: int) -> None:
    """I - (1 - t) v v^T, all numbers exact, has the eigenvalue t, and the inverse I + (1 / t - 1) v v^T."""
    v = torch.where(torch.arange(order) % 3 == 0, -1.0, 1.0).to(F64) / order**0.5
    cross = torch.arange(2 * order, dtype=F64).view(order, 2) % 7 - 3
    cases = [(2.0**-10, 1e-11), (2.0**-30, 1e-5), (2.0**-44, 0.1), (-(2.0**-30), None), (-(2.0**-44), None)]
    for t, bound in cases:
        gram = torch.eye(order, dtype=F64) - (1 - t) * v[:, None] * v
        want = cross + (1 / t - 1) * v[:, None] * (v @ cross)
        for solution, info in (cfl_ops.ridge_solve_ex(gram, cross), solve_system(gram, cross, ZERO, None)):
            assert (info == 0) == (bound is not None), t
            if bound is not None:
                assert ((solution - want).norm(dim=0) <= bound * want.norm(dim=0)).all(), t


def test_a_penalty_is_not_rounded() -> None:
    """lam is float64: of -1 and lam = 1 + 1e-9 float32 would make 0."""
    gram, cross = torch.full((4, 1, 1), -1.0), torch.ones(4, 1, 1)
    torch.testing.assert_close(cfl_ops.ridge_solve(gram, cross, 1 + 2.0**-30), torch.full((4, 1, 1), 2.0**30))
    # What the sum of the diagonal loses is in the residual: 1 + lam is 1 in float64, and singular.
    gram = torch.ones(4, 2, 2, dtype=F64)
    solution, info = cfl_ops.ridge_solve_ex(gram, cross.double().expand(4, 2, 1), 2.0**-60)
    assert (info > 0).all()
    assert solution.isnan().all()


def test_a_right_side_with_nan_stays_in_its_column() -> None:
    """In the careful path too."""
    given = exact.sample(3, F64)
    i = 6 * exact.CONDITIONS.index(1e14)
    cross = given.cross[i].clone()
    cross[1, 1] = torch.nan
    for solution, info in (
        cfl_ops.ridge_solve_ex(given.gram[i], cross),
        solve_system(given.gram[i], cross, ZERO, None),
    ):
        assert info == 0
        assert solution[:, 1].isnan().all()
        whole = given.exact[i]
        assert whole is not None
        assert exact.error(solution[:, [0, 2]], [[row[0], row[2]] for row in whole]) <= 0.1


def test_gradients_of_a_system_that_float32_does_not_prove() -> None:
    """The backward pass solves as the forward pass does: its gradient is that of float64."""
    gram, cross = exact.sample(3, torch.float32).gram[6 * 7], randn(3, 1, dtype=torch.float32)
    wide = gram.double()
    grad = cfl_ops.ridge_solve(gram, cross.requires_grad_()).sum()
    grad.backward()
    want = torch.linalg.solve(wide, torch.ones(3, 1, dtype=F64))
    assert cross.grad is not None
    assert (cross.grad.double() - want).norm() <= 1e-3 * want.norm()
