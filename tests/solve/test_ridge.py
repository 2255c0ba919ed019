"""ridge and ridge_path against scikit-learn, and against more digits on data that a Gram matrix loses."""

from __future__ import annotations

import cfl_ops
import pytest
import torch
from cfl_ops.ops.solve.narrow_ridge import NARROW_RIDGE
from extended_precision import wide

from tests.solve.data import F64, randn
from tests.solve.oracle import assert_loss_is_right, features, ridge_head, targets


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(40, 6), (6, 15)])
def test_ridge_and_its_path_are_scikit_learns(shape: tuple[int, int], bias: bool) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = randn(*shape) + 3, randn(shape[0], 2, seed=5)
    lams = [0.1, 1.0, 30.0]
    for dtype, tolerance in ((F64, 1e-9), (torch.float32, 1e-4)):
        path = cfl_ops.ridge_path(x.to(dtype), y.to(dtype), lams, bias=bias)
        for i, lam in enumerate(lams):
            peer = linear_model.Ridge(alpha=lam, fit_intercept=bias).fit(x.numpy(), y.numpy())
            got = cfl_ops.ridge(x.to(dtype), y.to(dtype), lam, bias=bias)
            for weight, intercept in (
                ((got, None), (path, None)) if not bias else (got, (path[0][i], path[1][i]))
            ):
                weight = weight[i] if not bias and weight is path else weight
                torch.testing.assert_close(
                    weight.double(), torch.from_numpy(peer.coef_.T), rtol=tolerance, atol=tolerance
                )
                if intercept is not None:
                    torch.testing.assert_close(
                        intercept.double(), torch.from_numpy(peer.intercept_), rtol=tolerance, atol=tolerance
                    )


def test_ridge_of_a_far_mean() -> None:
    """A mean of 1e4 takes 8 digits of the raw moments in float32; centring first does not lose them."""
    x, w = randn(200, 3), torch.tensor([[1.0], [-2.0], [0.5]], dtype=F64)
    y = x @ w
    weight, _ = cfl_ops.ridge((x + 1e4).float(), y.float(), 1e-6, bias=True)
    assert float((weight.double() - w).abs().max()) < 5e-3  # the data are rounded to 5e-4
    weight, _ = cfl_ops.ridge(x + 1e4, y, 1e-9, bias=True)
    assert float((weight - w).abs().max()) < 1e-9


def test_ridge_zero_penalty_is_least_squares() -> None:
    x = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    torch.testing.assert_close(cfl_ops.ridge(x, torch.ones(2, 1), 0.0), torch.full((2, 1), 0.5))
    torch.testing.assert_close(cfl_ops.ridge_path(x, torch.ones(2, 1), [0.0])[0], torch.full((2, 1), 0.5))


HARD = [  # dtype, mean, scale, rows, kind, penalty: where the Gram matrix fails, and where the head's dtype nearly does
    (torch.bfloat16, 0.0, 1e6, 6, "outlier", 1e-8),
    (torch.bfloat16, 1e3, 1e6, 13, "outlier", 1e-8),
    (torch.float16, 1e3, 1.0, 26, "duplicate", 1e-4),
    (torch.float32, 1e6, 1.0, 6, "plain", 1e-8),
    (torch.float32, 1e6, 1e-3, 26, "outlier", 1e-4),
    (torch.float32, 0.0, 1e6, 130, "duplicate", 1e-8),
    (F64, 1e6, 1e-6, 13, "plain", 1e-8),
    (F64, 1e3, 1e6, 13, "outlier", 1e-8),
    (F64, 1e6, 1e6, 26, "duplicate", 1e-8),
]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "mean", "scale", "rows", "kind", "lam"), HARD)
def test_small_penalties_on_hard_data(dtype, mean, scale, rows, kind, lam, bias) -> None:
    x, y = features(dtype, rows, 13, mean, scale, kind), targets(dtype, rows)
    best = ridge_head(wide(x), wide(y), lam, bias)
    for head in (cfl_ops.ridge(x, y, lam, bias=bias), cfl_ops.ridge_path(x, y, [lam, 1e4], bias=bias)):
        weight, intercept = head if bias else (head, None)
        weight = weight[0] if weight.ndim == 3 else weight
        if intercept is not None:
            weight = torch.cat([weight, intercept.reshape(-1, 3)[:1]])
        assert_loss_is_right(x, y, weight, best)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, F64])
def test_the_intercept_belongs_to_the_rounded_weight(dtype: torch.dtype) -> None:
    x, w = (randn(300, 5) + 1e4).to(dtype), randn(5, 3, seed=1)
    y = x.double() @ w
    y = (y - y.mean(0) if dtype == torch.float16 else y).to(dtype)  # which holds no 1e5
    best = torch.from_numpy(ridge_head(wide(x), wide(y), 1e-3, True).astype(float))
    eps = torch.finfo(dtype).eps
    path = cfl_ops.ridge_path(x, y, [1e-3], bias=True)
    cv = cfl_ops.ridge_cv(x, y, [1e-3], bias=True)
    for weight, intercept in (
        cfl_ops.ridge(x, y, 1e-3, bias=True),
        (path[0][0], path[1][0]),
        (cv.weight, cv.intercept),
    ):
        error = x.double() @ (weight.double() - best[:-1]) + intercept.double() - best[-1]
        around = x.double() - x.double().mean(0)
        bound = 4 * eps * (around.abs().max() * 5 * best[:-1].abs().max() + intercept.double().abs().max())
        assert float(error.abs().max()) < bound + 1e-9


@pytest.mark.parametrize("shape", [(30, 6), (5, 9)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_penalty_for_each_target(shape: tuple[int, int], bias: bool) -> None:
    x, y = randn(*shape), randn(shape[0], 2, seed=1)
    lam = torch.tensor([0.1, 10.0])

    def weight_of(result):
        return result[0] if bias else result

    together = weight_of(cfl_ops.ridge(x, y, lam, bias=bias))
    assert together.shape == (shape[1], 2)
    for k in range(2):
        alone = weight_of(cfl_ops.ridge(x, y[:, k : k + 1], float(lam[k]), bias=bias))
        torch.testing.assert_close(together[:, k : k + 1], alone, rtol=1e-10, atol=1e-12)


def test_how_many_dimensions_penalties_have_says_what_they_are() -> None:
    """Batch dimensions first, then the targets; nothing is broadcast to a batch that the data do not have."""
    x, y = randn(2, 8, 3), randn(2, 8, 2, seed=1)
    lam = torch.tensor([[0.1, 1.0], [2.0, 30.0]], dtype=F64)
    of_batch, of_targets = cfl_ops.ridge(x, y, lam[0]), cfl_ops.ridge(x, y, lam)
    for i in range(2):
        torch.testing.assert_close(of_batch[i], cfl_ops.ridge(x[i], y[i], float(lam[0, i])))
        torch.testing.assert_close(of_targets[i], cfl_ops.ridge(x[i], y[i], lam[i]))
    torch.testing.assert_close(cfl_ops.ridge(x, y, lam[:1])[1], cfl_ops.ridge(x[1], y[1], lam[0]))
    for data, bad in (
        (0, torch.ones(3)),
        (0, torch.ones(2, 2)),
        (slice(None), torch.ones(3)),
        (0, torch.ones(0)),
    ):
        with pytest.raises(ValueError, match="lam must be a number, or have shape"):
            cfl_ops.ridge(x[data], y[data], bad)
    with pytest.raises(ValueError, match="lam must be finite and not negative"):
        cfl_ops.ridge(x[0], y[0], torch.tensor([1.0, -1.0]))


def test_a_penalty_of_zero_is_the_minimum_norm_fit_of_centred_rows() -> None:
    """Centred rows depend on one another, and a constant column is zero: neither may look like a direction."""
    for dtype, tolerance in ((torch.float32, 1e-5), (F64, 1e-11)):
        x, y = (randn(6, 9) + 1e3).to(dtype), randn(6, 2, seed=1).to(dtype)
        x[:, 4] = 0.1
        rows, wanted = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
        best = torch.linalg.pinv(rows, rtol=1e-10) @ wanted
        for lam in (0.0, torch.tensor(0.0), torch.tensor([0.0, 0.0])):
            weight, _ = cfl_ops.ridge(x, y, lam, bias=True)
            torch.testing.assert_close(weight.double(), best, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("order", [3, 12, 40, 90])
def test_the_condition_is_not_underestimated(order: int) -> None:
    """That of the system with a unit diagonal: by no more than 10 times; on both ways to it."""
    for exponent in range(0, 8, 2):
        u, v = (torch.linalg.qr(randn(order + 5, order, seed=s))[0] for s in (0, 1))
        x = (u * torch.logspace(0, -exponent / 2, order, dtype=F64)) @ v[:order].mT
        system = x.mT @ x + 1e-12 * torch.eye(order, dtype=F64)
        scale = system.diagonal().rsqrt()
        exact = float(torch.linalg.cond(system * scale * scale[:, None]))
        lam = torch.tensor(1e-12, dtype=F64)
        for solve in (NARROW_RIDGE, NARROW_RIDGE.python):
            _, condition = solve(x, x[:, :1], None, lam)
            assert 0.1 * exact <= float(condition) <= 10 * order**1.5 * exact


@pytest.mark.parametrize("shape", [(30, 5), (5, 9)])
def test_derivatives_where_the_gram_matrix_is_not_used(shape: tuple[int, int]) -> None:
    x, y = randn(*shape), randn(shape[0], 2, seed=1)
    x[:, 1] = x[:, 0] + 1e-6 * x[:, 1]
    lam = torch.tensor(1e-8, dtype=F64)
    x, y, lam = (value.requires_grad_() for value in (x, y, lam))
    rows = torch.cat([x, lam.sqrt() * torch.eye(shape[1], dtype=F64)])
    exact = torch.linalg.pinv(rows) @ torch.cat([y, y.new_zeros(shape[1], 2)])
    grad = randn(shape[1], 2, seed=3)
    want = torch.autograd.grad((exact * grad).sum(), (x, y, lam))
    got = torch.autograd.grad((cfl_ops.ridge(x, y, lam) * grad).sum(), (x, y, lam))
    for mine, theirs in zip(got, want, strict=True):
        assert (
            float((mine - theirs).norm() / theirs.norm()) < 1e-2
        )  # of the plain formula, which loses 14 digits


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("cols", [0, 3])
@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_hardly_any_rows_columns_or_targets(rows: int, cols: int, count: int, bias: bool) -> None:
    """One row and a bias leave no row free to differ: with several penalties that raised IndexError."""
    x, y = randn(rows, cols), randn(rows, count)
    weights, offsets = cfl_ops.ridge_path(x, y, [0.5, 0.5], bias=bias), None
    if bias:
        weights, offsets = weights
    for lam in (0.5, torch.full((count,), 0.5)):
        head = cfl_ops.ridge(x, y, lam, bias=bias)
        weight = head[0] if bias else head
        assert weight.shape == (cols, count)
        torch.testing.assert_close(weight, weights[1])
        if bias and rows == 1:
            torch.testing.assert_close(x @ weight + head[1], y)
    assert offsets is None or offsets.shape == (2, count)


@pytest.mark.parametrize("shape", [(5, 7), (7, 7), (40, 7)])
def test_targets_without_a_part_in_an_outlying_row(shape: tuple[int, int]) -> None:
    """All of the fit lies where X^T X has only rounding beside the outlier: 4 to 35 % off at several penalties."""
    x, y = randn(*shape, dtype=F64), randn(shape[0], 2, dtype=F64)
    x[0], y[0] = 1e7 * torch.rand(shape[1], dtype=F64), 0
    want = torch.linalg.solve(x.mT @ x + 1e9 * torch.eye(7, dtype=F64), x.mT @ y)
    for weight in (
        cfl_ops.ridge_path(x, y, [1e9, 2e9])[0],
        cfl_ops.ridge(x, y, torch.full((2,), 1e9)),
        cfl_ops.ridge_cv(x, y, [1e9]).weight,
    ):
        assert float((weight - want).norm()) <= 1e-9 * float(want.norm())


def by_rows(x: torch.Tensor, y: torch.Tensor, lam: torch.Tensor) -> torch.Tensor:
    """Ridge by X X^T + lam I, which torch differentiates: right for fewer rows than columns."""
    system = x @ x.mT + torch.diag_embed(lam.expand(y.shape[-1])[:, None] * torch.ones(len(x), dtype=F64))
    return (x.mT @ torch.linalg.solve(system, y.mT.unsqueeze(-1))).squeeze(-1).mT


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("lam", [1e-4, 1e-8, 1e-12])
def test_derivatives_with_fewer_rows_than_columns_and_small_penalties(scale: float, lam: float) -> None:
    """R goes to 0 with lam and Z to infinity: gradients were 60 % to 6e5 times off, W was right."""
    x, y, grad = scale * randn(5, 20, dtype=F64), randn(5, 3, dtype=F64), randn(20, 3, dtype=F64)
    given = [value.requires_grad_() for value in (x, y, torch.full((3,), lam, dtype=F64))]
    want = torch.autograd.grad((by_rows(*given) * grad).sum(), given)
    for weight in (cfl_ops.ridge(*given), cfl_ops.ridge_path(x, y, [1.0, lam])[1]):
        got = torch.autograd.grad((weight * grad).sum(), given, allow_unused=True)
        for mine, exact in zip(got, want, strict=True):
            assert mine is None or float((mine - exact).norm()) <= 1e-11 * float(exact.norm())
    labels = torch.tensor([0, 1, 2, 0, 1])
    for kappa in (1.0, 5.0):
        got = torch.autograd.grad(
            (cfl_ops.class_ridge(x, labels, lam, num_classes=3, kappa=kappa) * grad).sum(), x
        )[0]
        exact = torch.zeros_like(x)
        for k in range(3):
            own = (labels == k).double()
            root = (1 + (kappa - 1) * own).sqrt()[:, None]
            one = by_rows(root * x, root * own[:, None], torch.full((1,), lam, dtype=F64))
            exact += torch.autograd.grad((one * grad[:, k : k + 1]).sum(), x)[0]
        assert float((got - exact).norm()) <= 1e-11 * float(exact.norm())


@pytest.mark.parametrize("lams", [[0.0], [0.0, 1.0]])
def test_derivatives_of_the_minimum_norm_fit(lams: list[float]) -> None:
    x, y, grad = randn(3, 6, dtype=F64).requires_grad_(), randn(3, 2, dtype=F64), randn(6, 2, dtype=F64)
    want = torch.autograd.grad(((torch.linalg.pinv(x) @ y) * grad).sum(), x)[0]
    got = torch.autograd.grad((cfl_ops.ridge_path(x, y, lams)[0] * grad).sum(), x)[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
