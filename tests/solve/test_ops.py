"""ridge_solve, lstsq, pinv, factorize, ridge, ridge_path, ridge_cv, class_ridge beyond the contract."""

from __future__ import annotations

import subprocess
import sys

import cfl_ops
import pytest
import torch
from torch import Tensor

F64 = torch.float64


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def spd(batch: int, order: int, dtype: torch.dtype = F64) -> Tensor:
    x = randn(batch, order + 2, order)
    return (x.mT @ x).to(dtype)


# --- ridge_solve --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_ridge_solve_on_every_instruction_set(isa: int, dtype: torch.dtype) -> None:
    """Orders around the tile (4) and batches around the lanes (2 to 16)."""
    if not cfl_ops._core.dispatch.extension_available():
        pytest.skip("no extension")
    from cfl_ops import _C

    if isa > _C.best_isa():
        pytest.skip("this machine lacks it")
    _C.set_isa(isa)
    try:
        for order in (1, 2, 3, 4, 5, 7, 8, 9, 16, 31):
            for batch in (1, 3, 8, 17):
                gram, cross = spd(batch, order, dtype), randn(batch, order, 3, dtype=dtype)
                got = cfl_ops.ridge_solve(gram, cross, 0.1).double()
                system = gram.double() + 0.1 * torch.eye(order, dtype=F64)
                want = torch.linalg.solve(system, cross.double())
                bound = 8 * order * torch.finfo(dtype).eps * torch.linalg.cond(system)
                error = torch.linalg.matrix_norm(got - want) / torch.linalg.matrix_norm(want)
                assert bool((error <= bound).all()), (order, batch)
    finally:
        _C.set_isa(_C.best_isa())


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


# --- lstsq, pinv, factorize -----------------------------------------------------------------------------------


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
        wide = cfl_ops.pinv(a.mT, **kwargs).double()
        torch.testing.assert_close(wide, want.mT, rtol=0, atol=1e-5 * float(want.norm()))
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


def test_gradients_within_the_matrices_of_one_rank() -> None:
    u, v, b = (
        randn(5, 2).requires_grad_(),
        randn(2, 4, seed=1).requires_grad_(),
        randn(5, 2, seed=2).requires_grad_(),
    )
    assert torch.autograd.gradcheck(lambda u, v, b: cfl_ops.lstsq(u @ v, b), (u, v, b), atol=1e-5)
    assert torch.autograd.gradcheck(lambda u, v: cfl_ops.pinv(u @ v), (u, v), atol=1e-5)
    assert torch.autograd.gradgradcheck(lambda u, v: cfl_ops.pinv(u @ v), (u, v), atol=1e-4)


# --- ridge ----------------------------------------------------------------------------------------------------


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


def test_ridge_cv_scales() -> None:
    """Targets whose squares over- or underflow float32 choose as others do."""
    x, y = randn(40, 5, dtype=torch.float32), randn(40, 3, seed=1, dtype=torch.float32)
    want = cfl_ops.ridge_cv(x, y, [0.1, 1.0, 10.0])
    for scale in (1e25, 1e-25):
        got = cfl_ops.ridge_cv(x, y * scale, [0.1, 1.0, 10.0])
        assert torch.equal(got.lam, want.lam)
        torch.testing.assert_close(got.weight / scale, want.weight, rtol=1e-4, atol=1e-6)


def test_ridge_cv_gcv_against_its_formula() -> None:
    x, y = randn(30, 4), randn(30, 2, seed=3)
    got = cfl_ops.ridge_cv(x, y, [0.5, 5.0], cv="gcv")
    for i, lam in enumerate((0.5, 5.0)):
        hat = x @ torch.linalg.inv(x.mT @ x + lam * torch.eye(4, dtype=F64)) @ x.mT
        want = ((y - hat @ y) / (1 - hat.trace() / 30)).square().mean(0)
        torch.testing.assert_close(got.scores[i], want, rtol=1e-9, atol=0)


def test_ridge_cv_bad_arguments() -> None:
    x, y = randn(6, 2), randn(6, 1)
    for kwargs, message in (
        ({"lams": []}, "lams must be a sequence of at least one number"),
        ({"lams": [-1.0]}, "lams must be finite and not negative"),
        ({"lams": [1.0], "cv": "k"}, "cv must be 'loo', 'gcv' or a number of folds"),
        ({"lams": [1.0], "cv": 7}, "cv must be from 2 to the number of rows"),
    ):
        with pytest.raises(ValueError, match=message):
            cfl_ops.ridge_cv(x, y, **kwargs)
    x[2, 1] = torch.inf
    with pytest.raises(torch.linalg.LinAlgError, match="x or y has NaN or Inf"):
        cfl_ops.ridge_cv(x, y, [1.0])


@pytest.mark.parametrize("per_target", [True, False])
@pytest.mark.parametrize("cv", ["loo", "gcv", 5])
@pytest.mark.parametrize("shape", [(50, 4), (9, 12)])
def test_ridge_cv_many_targets_in_runs(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], cv: str | int, per_target: bool
) -> None:
    """The runs of targets change nothing."""
    module = sys.modules["cfl_ops.ops.solve.ridge_cv"]
    x, y = randn(*shape) + 1, randn(shape[0], 150, seed=1)
    options = {"cv": cv, "per_target": per_target, "bias": True}
    want = cfl_ops.ridge_cv(x, y, [0.1, 10.0], **options)
    monkeypatch.setattr(module, "MOMENT_BYTES", 1)
    monkeypatch.setattr(module, "PREDICTION_BYTES", 1)
    got = cfl_ops.ridge_cv(x, y, [0.1, 10.0], **options)
    assert torch.equal(got.lam, want.lam)
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-11, atol=0)
    torch.testing.assert_close(got.weight, want.weight, rtol=1e-10, atol=1e-12)


def test_folds_are_scored_as_their_definition() -> None:
    """Through the Cholesky factor of a fold of many rows, and directly where the fold has few or is singular."""
    x, y = randn(60, 5), randn(60, 3, seed=1) + 2
    x[:, 4] = x[:, 3]  # singular: the direct way
    for design, bias in ((x[:, :4], False), (x[:, :4], True), (x, False), (x[:24], True)):
        target = y[: len(design)]
        for dtype, rtol in ((F64, 1e-9), (torch.float32, 1e-4)):
            got = cfl_ops.ridge_cv(design.to(dtype), target.to(dtype), [0.5], cv=4, bias=bias)
            want = torch.zeros(3, dtype=F64)
            for held in torch.arange(len(design)).chunk(4):
                rest = torch.ones(len(design), dtype=torch.bool)
                rest[held] = False
                fitted = cfl_ops.ridge(design[rest], target[rest], 0.5, bias=bias)
                weight, intercept = fitted if bias else (fitted, torch.zeros(3, dtype=F64))
                error = target[held] - design[held] @ weight - intercept
                want += error.square().sum(0) / len(design)
            torch.testing.assert_close(got.scores[0], want, rtol=rtol, atol=0)


@pytest.mark.parametrize("kappa", [0.25, 1.0, 6.0])
def test_class_ridge_is_its_definition(kappa: float) -> None:
    x, y, old = randn(40, 6), torch.arange(40) % 3, randn(6, 4, seed=2)
    y[:20] = 0
    got = cfl_ops.class_ridge(x, y, 0.4, num_classes=4, kappa=kappa, scale=2.0, prox=0.3, weight=old)
    for k in range(4):
        square = 1 + (kappa - 1) * (y == k).double()
        system = x.mT @ (square.unsqueeze(-1) * x) + 0.7 * torch.eye(6, dtype=F64)
        want = torch.linalg.solve(system, x.mT @ (square * 2.0 * (y == k)) + 0.3 * old[:, k])
        torch.testing.assert_close(got[:, k], want, rtol=1e-10, atol=1e-12)


def test_class_ridge_bad_arguments() -> None:
    x, y = randn(4, 2), torch.tensor([0, 1, 2, 3])
    with pytest.raises(IndexError, match="from 0 to 2, but got 3 in row 3"):
        cfl_ops.class_ridge(x, y, 1.0, num_classes=3)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        cfl_ops.class_ridge(torch.ones(4, 2), y, 0.0, num_classes=4, kappa=2.0)
    with pytest.raises(ValueError, match="weight must be given"):
        cfl_ops.class_ridge(x, y, 1.0, num_classes=4, prox=1.0)
    with pytest.raises(ValueError, match="kappa must be positive"):
        cfl_ops.class_ridge(x, y, 1.0, num_classes=4, kappa=0.0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: cfl_ops.ridge(x, y, 0.5, bias=True),
        lambda x, y: cfl_ops.ridge_path(x, y, [0.5, 2.0], bias=True),
        lambda x, y: cfl_ops.ridge_solve(x.mT @ x, x.mT @ y, 0.5),
        lambda x, y: cfl_ops.lstsq(x, y),
        lambda x, y: cfl_ops.pinv(x),
        lambda x, y: cfl_ops.class_ridge(x, torch.arange(len(x)) % 3, 0.5, num_classes=3, kappa=3.0),
    ],
    ids=["ridge", "ridge_path", "ridge_solve", "lstsq", "pinv", "class_ridge"],
)
def test_derivatives_vmap_and_fullgraph(function) -> None:
    x, y = randn(8, 3).requires_grad_(), randn(8, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(function, (x, y))
    assert torch.autograd.gradgradcheck(function, (x, y))
    xs, ys = randn(4, 8, 3, seed=2), randn(4, 8, 2, seed=3)
    mapped = torch.vmap(function)(xs, ys)
    each = [function(a, b) for a, b in zip(xs, ys, strict=True)]
    if isinstance(mapped, tuple):
        for position, values in enumerate(mapped):
            torch.testing.assert_close(values, torch.stack([out[position] for out in each]))
    else:
        torch.testing.assert_close(mapped, torch.stack(each))
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(xs[0], ys[0]), each[0])
    torch._dynamo.reset()


def test_importing_cfl_ops_needs_no_scikit_learn() -> None:
    code = "import sys, cfl_ops, cfl_ops.learn; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
