"""RecursiveRidge against the batch solution, the Kalman filter of the paper, and its own past."""

from __future__ import annotations

import cfl_ops
import pytest
import torch
from torch import Tensor

F64 = torch.float64


def stream(rows: int, width: int, targets: int = 2, dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, width, generator=generator, dtype=F64)
    truth = torch.randn(width, targets, generator=generator, dtype=F64)
    y = x @ truth + torch.randn(rows, targets, generator=generator, dtype=F64)
    return x.to(dtype), y.to(dtype)


def batch_ridge(x: Tensor, y: Tensor, alpha: float = 1.0, weight: Tensor | None = None) -> Tensor:
    x, y = x.double(), y.double()
    left = x if weight is None else x * weight.double().unsqueeze(-1)
    return torch.linalg.solve(left.mT @ x + alpha * torch.eye(x.shape[1], dtype=F64), left.mT @ y).mT


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("block", [1, 7])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (F64, 1e-10)])
def test_equals_batch_ridge(dtype, bound, block: int) -> None:
    """The asked bounds, on a short stream; the long one is the slow test below."""
    x, y = stream(3000, 12, dtype=dtype)
    model = cfl_ops.RecursiveRidge(12, 2, alpha=0.5, dtype=dtype)
    for begin in range(0, 3000, block):
        model.update(x[begin : begin + block], y[begin : begin + block])
    assert relative(model.weight, batch_ridge(x, y, 0.5)) <= bound


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 1000])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (F64, 1e-10)])
def test_long_stream(dtype, bound, window: int | None) -> None:
    """10^6 updates, or 10^5 steps of a window, each with its downdate."""
    rows = 1_000_000 if window is None else 100_000
    x, y = stream(rows, 16, dtype=dtype)
    model = cfl_ops.RecursiveRidge(16, 2, window=window, dtype=dtype)
    for i in range(rows):
        model.update(x[i : i + 1], y[i : i + 1])
    last = slice(-(window or rows), None)
    assert relative(model.weight, batch_ridge(x[last], y[last])) <= bound


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (F64, 1e-10)])
@pytest.mark.parametrize("block", [1, 5, 90])
def test_window(dtype, bound, block: int) -> None:
    x, y = stream(1200, 9, dtype=dtype)
    model = cfl_ops.RecursiveRidge(9, 2, window=64, dtype=dtype)
    for begin in range(0, 1200, block):
        seen = min(begin + block, 1200)
        model.update(x[begin:seen], y[begin:seen])
        if begin % 30 == 0:
            last = slice(max(0, seen - 64), seen)
            assert relative(model.weight, batch_ridge(x[last], y[last])) <= bound


def test_window_survives_an_outlier_that_drowns_the_rest() -> None:
    """Its downdate leaves only rounding: the state is then rebuilt from the rows of the window."""
    x, y = stream(60, 4, dtype=torch.float32)
    x[20] *= 1e8
    model = cfl_ops.RecursiveRidge(4, 2, window=10, dtype=torch.float32)
    for i in range(60):
        model.update(x[i], y[i])
    assert relative(model.weight, batch_ridge(x[-10:], y[-10:])) <= 1e-4


def test_forgetting_and_weights() -> None:
    x, y = stream(40, 5)
    weight = torch.rand(40, dtype=F64)
    model = cfl_ops.RecursiveRidge(5, 2, alpha=2.0, forgetting=0.9)
    for i in range(40):
        model.update(x[i : i + 1], y[i : i + 1], weight[i : i + 1])
    age = 0.9 ** torch.arange(39, -1, -1, dtype=F64)
    assert relative(model.weight, batch_ridge(x, y, 2.0 * 0.9**40, weight * age)) <= 1e-12


@pytest.mark.parametrize("forgetting", [1.0, 0.95])
def test_is_the_kalman_filter(forgetting: float) -> None:
    """Formulas section 5, in covariance form: predict, gain, update."""
    x, y = stream(60, 4)
    noise, q2, alpha = 0.3, 0.02, 1.5
    model = cfl_ops.RecursiveRidge(4, 2, alpha=alpha, noise=noise, process_noise=q2, forgetting=forgetting)
    eye = torch.eye(4, dtype=F64)
    P, W = noise / alpha * eye, torch.zeros(2, 4, dtype=F64)
    for begin in range(0, 60, 3):
        phi, target = x[begin : begin + 3], y[begin : begin + 3]
        P = P / forgetting + q2 * eye
        gain = P @ phi.mT @ torch.linalg.inv(phi @ P @ phi.mT + noise * torch.eye(3, dtype=F64))
        error = target - phi @ W.mT
        W = W + error.mT @ gain.mT
        P = P - gain @ phi @ P
        torch.testing.assert_close(model.update(phi, target), error, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.weight, W, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.covariance, P, rtol=0, atol=1e-10)
    mean, variance = model.predict(x, return_variance=True)
    torch.testing.assert_close(mean, x @ W.mT, rtol=0, atol=1e-10)
    torch.testing.assert_close(variance, (x @ P * x).sum(-1) + noise, rtol=0, atol=1e-10)


def test_missing_rows_teach_nothing() -> None:
    x, y = stream(8, 3)
    x[2], y[5] = torch.nan, torch.inf
    weight = torch.ones(8, dtype=F64)
    weight[[2, 5]] = 0
    model = cfl_ops.RecursiveRidge(3, 2)
    error = model.update(x, y, weight)
    keep = weight > 0
    assert relative(model.weight, batch_ridge(x[keep], y[keep])) <= 1e-12
    assert (error[~keep] == 0).all()


def test_remove_undoes_update_and_refuses_the_impossible() -> None:
    x, y = stream(30, 4)
    model = cfl_ops.RecursiveRidge(4, 2)
    model.update(x, y)
    model.remove(x[:12], y[:12])
    assert relative(model.weight, batch_ridge(x[12:], y[12:])) <= 1e-11
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(torch.linalg.LinAlgError):
        model.remove(100 * x, y)
    with pytest.raises(ValueError, match="x has NaN or Inf in row 1"):
        model.update(x[:2] * torch.tensor([[1.0], [torch.nan]]), y[:2])
    with pytest.raises(ValueError, match="y has NaN or Inf in row 0"):
        model.update(x[:2], y[:2] * torch.inf)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_checkpoints_and_bad_arguments() -> None:
    x, y = stream(50, 4, dtype=torch.float32)
    model = cfl_ops.RecursiveRidge(4, 2, window=16, dtype=torch.float32)
    model.update(x[:30], y[:30])
    other = cfl_ops.RecursiveRidge(4, 2, window=16, dtype=torch.float32)
    other.load_state_dict(model.state_dict())
    for one in (model, other):
        one.update(x[30:], y[30:])
    assert torch.equal(model.weight, other.weight)
    assert other(x).shape == (50, 2)
    for wrong in ({"alpha": 0.0}, {"noise": -1.0}, {"forgetting": 1.5}, {"window": 0},
                  {"window": 3, "forgetting": 0.9}, {"process_noise": float("nan")}):  # fmt: skip
        with pytest.raises(ValueError, match="RecursiveRidge"):
            cfl_ops.RecursiveRidge(3, 1, **wrong)
    with pytest.raises(ValueError, match="x must have size 4"):
        model.update(x[:, :3], y)
    with pytest.raises(ValueError, match="sample_weight"):
        model.update(x, y, -torch.ones(50))
    assert cfl_ops.RecursiveRidge(0, 2).update(torch.zeros(3, 0), torch.ones(3, 2)).shape == (3, 2)
    assert model.update(x[:0], y[:0]).shape == (0, 2)
