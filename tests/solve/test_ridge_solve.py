"""ridge_solve beyond the contract."""

from __future__ import annotations

import cfl_ops
import pytest
import torch

from tests.solve.data import F64, randn, spd


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_ridge_solve_on_every_instruction_set(instruction_set, dtype: torch.dtype) -> None:
    """Orders around the tile (4) and batches around the lanes (2 to 16)."""
    for order in (1, 2, 3, 4, 5, 7, 8, 9, 16, 31):
        for batch in (1, 3, 8, 17):
            gram, cross = spd(batch, order, dtype), randn(batch, order, 3, dtype=dtype)
            got = cfl_ops.ridge_solve(gram, cross, 0.1).double()
            system = gram.double() + 0.1 * torch.eye(order, dtype=F64)
            want = torch.linalg.solve(system, cross.double())
            bound = 8 * order * torch.finfo(dtype).eps * torch.linalg.cond(system)
            error = torch.linalg.matrix_norm(got - want) / torch.linalg.matrix_norm(want)
            assert bool((error <= bound).all()), (order, batch)


def test_ridge_solve_names_the_bad_system() -> None:
    gram = spd(5, 4)
    gram[3] = 0
    with pytest.raises(
        torch.linalg.LinAlgError, match=r"\(Batch element 3\): the system is not positive definite"
    ):
        cfl_ops.ridge_solve(gram, randn(5, 4, 1))
    solution, info = cfl_ops.ridge_solve_ex(gram, randn(5, 4, 1))
    assert info.tolist() == [0, 0, 0, 1, 0]
    assert solution[3].isnan().all()
    good = [0, 1, 2, 4]
    assert torch.equal(solution[good], cfl_ops.ridge_solve(gram[good], randn(5, 4, 1)[good]))


def test_ridge_solve_doubtful_float32_is_solved_in_float64() -> None:
    """The float32 factorisation of this system loses its last pivot; the answer is float64's."""
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2.0**-23]]).expand(20, 2, 2)
    cross = torch.tensor([[1.0], [1.0 + 2.0**-23]]).expand(20, 2, 1)
    expected = torch.tensor([[0.0], [1.0]]).expand(20, 2, 1)
    torch.testing.assert_close(cfl_ops.ridge_solve(gram, cross), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lam", [-1.0, float("nan"), float("inf")])
def test_ridge_solve_refuses_bad_penalties(lam: float) -> None:
    gram, cross = spd(2, 3), randn(2, 3, 1)
    with pytest.raises(ValueError, match="lam must be finite and not negative"):
        cfl_ops.ridge_solve(gram, cross, lam)
    with pytest.raises(ValueError, match="lam and lam_diag must be finite and not negative"):
        cfl_ops.ridge_solve(gram, cross, torch.tensor([1.0, lam]))
    _, info = cfl_ops.ridge_solve_ex(gram, cross, torch.tensor([1.0, lam]))
    assert info.tolist() == [0, -1]


def test_ridge_solve_bad_arguments() -> None:
    with pytest.raises(ValueError, match="gram must have size 3 in dimension -2"):
        cfl_ops.ridge_solve(torch.ones(2, 3), torch.ones(3, 1))
    with pytest.raises(ValueError, match="cross must have size 3"):
        cfl_ops.ridge_solve(torch.eye(3), torch.ones(2, 1))
    with pytest.raises(TypeError, match="gram must be float16"):
        cfl_ops.ridge_solve(torch.eye(3, dtype=torch.int64), torch.ones(3, 1))
    with pytest.raises(ValueError, match="do not broadcast"):
        cfl_ops.ridge_solve(spd(2, 3), randn(5, 3, 1))
