"""factorize: one factorisation for many right sides."""

from __future__ import annotations

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
