"""factorize: one factorisation for many right sides."""

from __future__ import annotations

import math

import cfl_ops
import pytest
import torch

from tests.solve.data import F64, randn


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", [(30, 6), (6, 30), (7, 7)])
def test_factorize(shape: tuple[int, int], dtype: torch.dtype) -> None:
    a, b = randn(*shape, dtype=dtype), randn(shape[0], 3, dtype=dtype)
    f = cfl_ops.factorize(a)
    torch.testing.assert_close(f.solve(b), cfl_ops.lstsq(a, b), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(f.pinv(), cfl_ops.pinv(a), rtol=1e-5, atol=1e-6)
    s = torch.linalg.svdvals(a.double())
    assert int(f.rank) == min(shape)
    torch.testing.assert_close(f.singular_values, s, rtol=1e-6, atol=0)
    torch.testing.assert_close(f.condition, s[0] / s[-1], rtol=1e-6, atol=0)
    torch.testing.assert_close(f.logdet, s.log().sum(), rtol=0, atol=1e-6)


def test_factorize_of_missing_rank() -> None:
    a = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    f = cfl_ops.factorize(a)
    assert int(f.rank) == 1
    assert float(f.logdet) == -float("inf")
    assert float(f.condition) == pytest.approx(1.0)
    empty = cfl_ops.factorize(torch.ones(0, 3))
    assert empty.solve(torch.ones(0, 2)).shape == (3, 2)
    assert int(empty.rank) == 0


def test_a_batch_of_mixed_rank_is_what_its_matrices_are_alone() -> None:
    """float64 matrices whose Gram is inverted, beside one that goes the orthogonal path."""
    a, b = torch.randn(3, 9, 4, dtype=torch.float64), torch.randn(3, 9, 2, dtype=torch.float64)
    a[1, :, 3] = a[1, :, 2]
    a[2, :, 1] *= 1e-3  # without the refinement its solution would lose digits
    both = cfl_ops.factorize(a)
    torch.testing.assert_close(both.singular_values, torch.linalg.svdvals(a), rtol=1e-12, atol=1e-12)
    for index in range(3):
        alone = cfl_ops.factorize(a[index])
        torch.testing.assert_close(both.solve(b)[index], alone.solve(b[index]), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both.pinv()[index], alone.pinv(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(both.condition[index], alone.condition, rtol=1e-10, atol=0)
    mapped = torch.vmap(lambda a, b: cfl_ops.factorize(a).solve(b))(a, b)
    torch.testing.assert_close(mapped, both.solve(b), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_tolerances_in_tensors_are_refused(tolerance: float) -> None:
    a, bad = torch.randn(2, 5, 3), torch.tensor([0.1, tolerance])
    for call in (
        lambda: cfl_ops.factorize(a, rtol=bad),
        lambda: cfl_ops.lstsq(a, a, rtol=bad),
        lambda: cfl_ops.pinv(a, atol=bad),
    ):
        with pytest.raises(
            ValueError, match="Batch element 1.*rtol and atol must be finite and not negative"
        ):
            call()
    solution, info = cfl_ops.lstsq_ex(a, a, rtol=bad)
    assert info.tolist() == [0, -1]
    assert bool(solution[1].isnan().all())


@pytest.mark.parametrize("shape", [(30, 6), (6, 30), (7, 7)])
@pytest.mark.parametrize("condition", [9e3, 1e6, 1e10])
def test_a_factored_float64_matrix_keeps_its_digits(shape: tuple[int, int], condition: float) -> None:
    """The squared condition of a Gram matrix is in none of its members."""
    small = min(shape)
    u, v = (torch.linalg.qr(randn(n, small, seed=n))[0] for n in shape)
    values = torch.logspace(0, -math.log10(condition), small, dtype=F64)
    f = cfl_ops.factorize((u * values) @ v.mT)
    inverse, bound = (v / values) @ u.mT, 200 * condition * torch.finfo(F64).eps
    assert float((f.pinv() - inverse).norm() / inverse.norm()) < bound
    b = randn(shape[0], 2, seed=3)
    assert float((f.solve(b) - inverse @ b).norm() / (inverse.norm() * b.norm())) < bound
    assert abs(float(f.condition) / condition - 1) < bound
    assert abs(float(f.logdet - values.log().sum())) < bound
    torch.testing.assert_close(f.singular_values, values, rtol=bound, atol=0)


def test_a_first_row_of_another_size_costs_no_digits() -> None:
    """Errors of the orthogonal path are those of the longest row; a refinement mends them."""
    a, x = randn(60, 12), randn(12, 1, seed=1)
    a[0] *= 1e10
    b = a @ x
    for solution in (cfl_ops.lstsq(a, b), cfl_ops.factorize(a).solve(b), cfl_ops.lstsq(a[None], b[None])[0]):
        assert float((solution - x).norm() / x.norm()) < 1e-9
    assert float((cfl_ops.pinv(a) @ a - torch.eye(12, dtype=F64)).norm()) < 1e-4
