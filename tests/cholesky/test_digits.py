"""Downdates and appended rows that are accepted have their digits: a tenth off, or an error. The oracle is mpmath."""

from __future__ import annotations

import math
from collections.abc import Iterator

import cfl_ops
import mpmath
import pytest
import torch

from tests.cholesky.exact import exact, matrices, off, pivots

OPS = ("cholesky_update", "cholesky_update_")
DTYPES = [torch.float32, torch.float64]


@pytest.fixture(autouse=True)
def digits() -> Iterator[None]:
    with mpmath.workdps(90):
        yield


LEVELS = (0.5, 0.999, 1 - 1e-5, 1 - 3e-7, 1 - 1e-9, 1 - 1e-12, 1 - 1e-15, 1.0, 1.001)
"""What share of the last pivot's square, or of a matrix in one direction, is taken away."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_downdate_has_its_digits_or_says_so(rank: int, dtype: torch.dtype, backend: str) -> None:
    """Pivots 20 times off were accepted, and matrices that are not positive definite."""
    make = torch.Generator().manual_seed(rank)
    accepted = refused = 0
    quick = backend != "triton"  # its interpreter takes milliseconds for a column
    for order in (2, 5) if quick else (3,):
        for i, a in enumerate(matrices(order, dtype, order)):
            if not quick and i % 4:
                continue
            L = torch.linalg.cholesky(a.double() + 1e-17 * torch.diag(a.double().diagonal())).to(dtype)
            for level in LEVELS[i % 2 :: 2]:
                p = torch.randn(order, rank, generator=make, dtype=torch.float64)
                p = p / torch.linalg.matrix_norm(p, 2) * math.sqrt(level)
                V = (L.double() @ p).to(dtype)
                out, info = cfl_ops.cholesky_downdate_ex(L, V)
                wanted = pivots(exact(L) * exact(L).T - exact(V) * exact(V).T)
                inside = L.clone()
                assert int(cfl_ops.cholesky_downdate_ex_(inside, V)) == int(info)
                assert torch.equal(inside, out)
                if int(info):
                    refused += 1
                    assert torch.equal(out, L.tril())
                    continue
                accepted += 1
                assert wanted is not None
                assert off(out.diagonal(), wanted) < 0.1
    assert min(accepted, refused) > (15 if quick else 1)


def test_a_batch_of_downdates_is_told_apart(backend: str) -> None:
    """Side by side on a CPU: those that lost their digits stay as they were."""
    make = torch.Generator().manual_seed(0)
    L = torch.linalg.cholesky(torch.eye(6) + 0.3 * torch.ones(6, 6)).repeat(40, 1, 1)
    p = torch.nn.functional.normalize(torch.randn(40, 6, 1, generator=make), dim=-2)
    p[::3] *= math.sqrt(1 - 1e-6)  # what is left of it is rounding
    p[1::3] *= 0.5
    p[2::3] *= 1.1
    for layout in (L, L.mT.contiguous().mT) if backend != "triton" else (L,):
        out, info = cfl_ops.cholesky_downdate_ex(layout, L @ p)
        assert (info[::3] > 0).all()
        assert (info[1::3] == 0).all()
        assert (info[2::3] > 0).all()
        assert torch.equal(out[info > 0], L[info > 0])
        want = torch.linalg.cholesky((L @ L.mT - L @ p @ p.mT @ L.mT)[1::3].double())
        torch.testing.assert_close(out[1::3].double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-25, 1e-18, 1e18, 1e25])
def test_a_harmless_downdate_at_any_scale(scale: float, backend: str) -> None:
    """An ill-conditioned factor is no reason to refuse a small change, and squares may leave the range."""
    L = torch.tensor([[1.0, 0.0], [1.0, 3e-4]]) * scale
    out, info = cfl_ops.cholesky_downdate_ex(L, torch.tensor([[0.25], [0.25]]) * scale)
    assert int(info) == 0
    torch.testing.assert_close(
        out / scale, torch.tensor([[0.9682, 0.0], [0.9682, 3e-4]]), rtol=1e-3, atol=1e-7
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_appended_row_has_its_digits_or_says_so(dtype: torch.dtype) -> None:
    """A copy of an old row passed as one that is new, by the rounding error of its pivot."""
    make = torch.Generator().manual_seed(0)
    accepted = refused = 0
    for order in (1, 4, 7):
        for a in matrices(order, dtype, order):
            L = torch.linalg.cholesky(a.double() + 1e-17 * torch.diag(a.double().diagonal())).to(dtype)
            rows = (L.double() @ torch.randn(order, 1, generator=make, dtype=torch.float64)).mT.to(dtype)
            solved = mpmath.lu_solve(exact(L), exact(rows).T)
            explained = (solved.T * solved)[0]
            for level in LEVELS:
                corner = torch.tensor([[float(explained) / level]], dtype=dtype)
                out, info = cfl_ops.cholesky_append_ex(L, rows, corner)
                if int(info):
                    refused += 1
                    assert int(info) == order + 1
                    continue
                accepted += 1
                left = mpmath.mpf(float(corner)) - explained
                assert left > 0
                assert off(out[-1, -1:], [left]) < 0.1
    assert accepted > 15
    assert refused > 15


def test_several_appended_rows(backend: str) -> None:
    x = torch.randn(9, 4)
    x = torch.cat([x, x[:, :1] + 1e-4 * torch.randn(9, 1), x[:, 1:2]], 1)  # the last depends on the second
    a = x.mT @ x
    L = torch.linalg.cholesky(a[:4, :4])
    assert int(cfl_ops.cholesky_append_ex(L, a[4:, :4], a[4:, 4:])[1]) in (5, 6)
    batch = torch.stack([a[4:, 4:], a[4:, 4:] + torch.eye(2)])
    assert [int(code) > 0 for code in cfl_ops.cholesky_append_ex(L, a[4:, :4], batch)[1]] == [True, False]
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite to working precision"):
        cfl_ops.cholesky_append(L, a[4:, :4], a[4:, 4:])


def test_a_window_of_many_updates_and_downdates(backend: str) -> None:
    """300 rows through a window of 40, in float64: eps for each row and a condition number of 30."""
    steps = 300 if backend != "triton" else 12
    rows = torch.randn(340, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    L = torch.linalg.cholesky(rows[:40].mT @ rows[:40])
    for i in range(steps):
        L = cfl_ops.cholesky_update(L, rows[40 + i, :, None])
        L = cfl_ops.cholesky_downdate(L, rows[i, :, None])
    want = torch.linalg.cholesky(rows[steps : steps + 40].mT @ rows[steps : steps + 40])
    assert ((L - want).abs().max() / want.abs().max()) < 300 * 30 * torch.finfo(torch.float64).eps
