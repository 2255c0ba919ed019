"""What safe_cholesky and spd_inverse accept has its digits: a tenth off, or an error. The oracle is mpmath."""

from __future__ import annotations

import math
from collections.abc import Iterator

import cfl_ops
import mpmath
import pytest
import torch

from tests.cholesky.exact import exact, lower_of, matrices, off, pivots

OPS = ("safe_cholesky",)
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def digits() -> Iterator[None]:
    with mpmath.workdps(90):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_inverse_without_jitter_is_right(dtype: torch.dtype, backend: str) -> None:
    """One small pivot was no sign of small eigenvalues: inverses 1.6 to 3.8 times off were accepted."""
    accepted = 0
    for order in (2, 3, 5, 8):
        for a in matrices(order, dtype, order):
            inverse, jitter, info = cfl_ops.spd_inverse_ex(a)
            if int(info) or float(jitter) > 0:
                continue
            accepted += 1
            stored = lower_of(exact(a))
            want = pivots(stored)
            assert want is not None, "no factor of an indefinite matrix without a jitter"
            assert off(cfl_ops.safe_cholesky(a).L.diagonal(), want) < 0.1
            right = stored**-1
            assert mpmath.norm(exact(inverse) - right) < 0.1 * mpmath.norm(right)
    assert accepted > 15


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_a_jitter_gives_is_the_inverse_that_is_stated(dtype: torch.dtype, backend: str) -> None:
    jittered = 0
    for order in (3, 8):
        for a in matrices(order, dtype, order + 20):
            inverse, jitter, info = cfl_ops.spd_inverse_ex(a)
            if int(info) or float(jitter) == 0:
                continue
            jittered += 1
            eps = torch.finfo(dtype).eps
            assert float(jitter) <= 1024 * eps * order, "of the size of rounding"
            stored = lower_of(exact(a))
            for i in range(order):
                stored[i, i] *= 1 + mpmath.mpf(float(jitter))
            right = stored**-1
            assert mpmath.norm(exact(inverse) - right) < 0.1 * mpmath.norm(right)
    assert jittered > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 0.0], [0.0, -0.4]],  # it was taken for a dead column
        [[1.0, 0.4], [0.4, 0.0]],
        [[1.0, 1.2], [1.2, 1.0]],
        [[1.0, 0.0, 0.0], [0.0, 1e-3, 0.0], [0.0, 0.0, -1e-2]],
    ],
)
def test_an_indefinite_matrix_is_refused(rows: list[list[float]], dtype: torch.dtype, backend: str) -> None:
    a = torch.tensor(rows, dtype=dtype)
    for scale in (1e-12, 1.0, 1e12):
        with pytest.raises(torch.linalg.LinAlgError, match="not positive semi-definite"):
            cfl_ops.spd_inverse(scale * a)
        assert int(cfl_ops.safe_cholesky_ex(scale * a)[1]) == 1


def test_a_diagonal_that_rounding_made_negative_is_dead(backend: str) -> None:
    a = torch.diag(torch.tensor([1.0, 2.0, -1e-7]))
    a[2, 0] = a[0, 2] = 1e-7
    L, jitter = cfl_ops.safe_cholesky(a)
    assert float(jitter) == 0
    assert torch.equal(L[2], torch.tensor([0.0, 0.0, 1.0]))


def test_spd_inverse_refuses_a_jitter_that_rounding_does_not_explain(backend: str) -> None:
    """0.1 below semi-definite, which safe_cholesky reports as a jitter."""
    a = torch.full((3, 3), 1.1) - 0.1 * torch.eye(3)
    assert float(cfl_ops.safe_cholesky(a).jitter) > 0.1
    with pytest.raises(torch.linalg.LinAlgError):
        cfl_ops.spd_inverse(a)
    assert int(cfl_ops.spd_inverse_ex(a)[2]) == 1


def test_spd_inverse_warns_of_a_jitter(backend: str, recwarn: pytest.WarningsRecorder) -> None:
    """It returns none, and what it inverts is not quite a."""
    singular = torch.ones(3, 3)
    with pytest.warns(UserWarning, match=r"inverse of a \+ tau diag\(a\) with tau up to .*e-06"):
        cfl_ops.spd_inverse(torch.stack([torch.eye(3), singular]))
    cfl_ops.spd_inverse_ex(singular)
    cfl_ops.spd_inverse(torch.eye(3))
    assert len(recwarn) == 0


@pytest.mark.parametrize(
    ("dtype", "order", "angle"),
    [(torch.float32, 48, 1.4), (torch.float64, 48, 1.0), (torch.float64, 20, 0.6)],
)
def test_kahan_matrices_whose_pivots_hide_the_least_eigenvalue(dtype, order, angle, backend: str) -> None:
    """Inverses 17 to 374 % off were accepted."""
    upper = torch.eye(order, dtype=torch.float64) - math.cos(angle) * torch.ones(order, order).double().triu(
        1
    )
    r = (math.sin(angle) ** torch.arange(order, dtype=torch.float64)).unsqueeze(-1) * upper
    for scale in (1.0, 1e-6, 1e6):
        a = (r.mT @ r * scale).to(dtype)
        inverse, jitter, info = cfl_ops.spd_inverse_ex((a + a.mT) / 2)
        if int(info) == 0 and float(jitter) == 0:
            right = lower_of(exact((a + a.mT) / 2)) ** -1
            assert mpmath.norm(exact(inverse) - right) < 0.1 * mpmath.norm(right)
