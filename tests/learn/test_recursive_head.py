"""RecursiveHead, against ridge regressions of all rows and the Kalman filter written out."""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import pytest
import sklearn.linear_model
import torch
from cfl_ops.learn import ClosedFormHeads, ClosedFormLinear, RecursiveHead
from torch import Tensor, nn

D, K = 5, 3


def rows(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(count, D, dtype=dtype), torch.randn(count, K, dtype=dtype)


def augmented(x: Tensor, bias: bool) -> Tensor:
    x = x.double()
    return torch.cat((x, torch.ones(len(x), 1, dtype=torch.float64)), 1) if bias else x


class Kalman:
    """formulas.md 5, with the covariance and its inverse written out."""

    def __init__(self, width: int, bias: bool, alpha: float, noise: float, decay: float, walk: float) -> None:
        self.bias, self.noise, self.decay, self.walk = bias, noise, decay, walk
        self.w = torch.zeros(K, width + bias, dtype=torch.float64)
        self.p = noise / alpha * torch.eye(width + bias, dtype=torch.float64)

    def learn(self, x: Tensor, y: Tensor) -> None:
        phi = augmented(x, self.bias)
        p = self.p / self.decay + self.walk * torch.eye(len(self.p), dtype=torch.float64)
        s = phi @ p @ phi.mT + self.noise * torch.eye(len(phi), dtype=torch.float64)
        gain = p @ phi.mT @ torch.linalg.inv(s)
        self.w = self.w + (y.double() - phi @ self.w.mT).mT @ gain.mT
        self.p = p - gain @ phi @ p

    def loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().double().requires_grad_()
        loss = (y.double() - augmented(x, self.bias) @ self.w.mT).square().sum() / len(x)
        return loss.detach(), torch.autograd.grad(loss, x)[0]


OPTIONS = [
    {},
    {"bias": False},
    {"alpha": 0.1, "noise": 0.5},
    {"decay": 0.9},
    {"process_noise": 0.3, "noise": 2.0},
    {"process_noise": 0.3, "decay": 0.8, "bias": False, "alpha": 3.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_the_kalman_filter(options: dict) -> None:
    head = RecursiveHead(D, K, **options)
    want = Kalman(D, options.get("bias", True), options.get("alpha", 1.0), options.get("noise", 1.0),
                  options.get("decay", 1.0), options.get("process_noise", 0.0))  # fmt: skip
    for count in (7, 1, 2, 30, 4):
        x, y = rows(count)
        loss, grad = head.update(x, y)
        want.learn(x, y)
        want_loss, want_grad = want.loss(x, y)
        torch.testing.assert_close(head.weight, want.w[:, :D], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(loss, want_loss, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(grad, want_grad, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(head.covariance, want.p, rtol=1e-9, atol=1e-11)
        if want.bias:
            torch.testing.assert_close(head.bias, want.w[:, D], rtol=1e-9, atol=1e-11)
        else:
            assert head.bias is None
        x = torch.randn(2, 3, D, dtype=torch.float64)
        mean, variance = head.predict(x, return_variance=True)
        phi = augmented(x.reshape(-1, D), want.bias)
        torch.testing.assert_close(mean, (phi @ want.w.mT).reshape(2, 3, K), rtol=1e-9, atol=1e-11)
        want_variance = ((phi @ want.p) * phi).sum(1) + want.noise
        torch.testing.assert_close(variance, want_variance.reshape(2, 3), rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(head(x), mean, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(head.predict(x), mean)


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_ridge_of_all_rows_as_scikit_learn_has_it(classes: bool, bias: bool) -> None:
    head = RecursiveHead(D, K, alpha=0.7, bias=bias)
    seen_x, seen_y, seen_s = [], [], []
    for count in (3, 50, 1, 8):
        x, y = rows(count)
        target = torch.randint(K, (count,)) if classes else y
        weight = torch.rand(count, dtype=torch.float64)
        head.update(x, target, sample_weight=weight)
        seen_x.append(augmented(x, bias))
        seen_y.append(nn.functional.one_hot(target, K).double() if classes else y)
        seen_s.append(weight)
    x, y, s = (torch.cat(parts).numpy() for parts in (seen_x, seen_y, seen_s))
    want = sklearn.linear_model.Ridge(alpha=0.7, fit_intercept=False, solver="cholesky").fit(x, y, s).coef_
    np.testing.assert_allclose(head.weight.numpy(), want[:, :D], rtol=1e-9, atol=1e-11)
    if bias:
        np.testing.assert_allclose(head.bias.numpy(), want[:, D], rtol=1e-9, atol=1e-11)


def test_window_is_the_ridge_of_its_rows() -> None:
    head = RecursiveHead(D, K, window=12, alpha=0.3)
    xs, ys = zip(*(rows(count) for count in (5, 9, 1, 20, 3)), strict=True)
    for x, y in zip(xs, ys, strict=True):
        head.update(x, y)
    x, y = augmented(torch.cat(xs)[-12:], True), torch.cat(ys)[-12:]
    want = torch.linalg.solve(x.mT @ x + 0.3 * torch.eye(D + 1, dtype=torch.float64), x.mT @ y).mT
    torch.testing.assert_close(head.weight, want[:, :D], rtol=1e-9, atol=1e-11)


def test_map_collapse_is_the_proximal_head() -> None:
    """With the covariance dropped before each batch, lam = noise / (B process_noise)."""
    noise, walk = 0.5, 0.02
    proximal = ClosedFormLinear(D, K, dtype=torch.float64)
    for count in (8, 3, 20):
        x, y = rows(count)
        head = RecursiveHead(D, K, noise=noise, alpha=noise / walk)  # P = q2 I: what the walk adds to nothing
        phi = augmented(x, True)
        old = torch.cat((proximal.weight, proximal.bias[:, None]), 1)
        head.update(x, y - phi @ old.mT)  # the filter starts at 0: it learns what the old head leaves
        proximal.lam = noise / (count * walk)
        proximal.update(x, y)
        torch.testing.assert_close(proximal.weight, old[:, :D] + head.weight, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(proximal.bias, old[:, D] + head.bias, rtol=1e-9, atol=1e-11)


def test_stiff_without_forgetting_and_not_with_it() -> None:
    """Why decay: a truth that jumps is followed."""
    x, y = rows(400)
    new = torch.randn(K, D, dtype=torch.float64)
    errors = []
    for options in ({}, {"decay": 0.5}, {"process_noise": 1.0}, {"window": 10}):
        head = RecursiveHead(D, K, bias=False, alpha=0.01, **options)
        head.update(x, y + 5)
        for part in x.split(20):
            head.update(part, part @ new.mT)
        errors.append(float((head.weight - new).norm() / new.norm()))
    assert max(errors[1:]) < 0.05 < errors[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, state: torch.dtype) -> None:
    head, want = RecursiveHead(D, K, dtype=state), Kalman(D, True, 1.0, 1.0, 1.0, 0.0)
    for _ in range(3):
        x, y = rows(9, dtype)
        loss, grad = head.update(x, y)
        want.learn(x, y)
    want_loss, want_grad = want.loss(x, y)
    assert grad.dtype == dtype
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert head.weight.dtype == head.bias.dtype == state
    assert head(x).dtype == dtype
    eps = max(torch.finfo(dtype).eps, torch.finfo(state).eps)
    torch.testing.assert_close(loss.double(), want_loss, rtol=50 * eps, atol=0)
    torch.testing.assert_close(grad.double(), want_grad, rtol=20 * eps, atol=20 * eps)
    mean, variance = head.predict(x, return_variance=True)
    assert mean.dtype == variance.dtype == dtype


def test_leading_dimensions_and_strides() -> None:
    x, y = rows(24)
    one, other = RecursiveHead(D, K), RecursiveHead(D, K)
    loss, grad = one.update(x, y)
    strided = torch.empty(4, D, 6, dtype=torch.float64).transpose(1, 2)
    strided.copy_(x.reshape(4, 6, D))
    got, got_grad = other.update(strided, y.reshape(4, 6, K))
    torch.testing.assert_close(got, loss)
    torch.testing.assert_close(got_grad, grad.reshape(4, 6, D))
    labels = torch.randint(K, (4, 6))
    assert one.update(strided, labels)[0] == other.update(x, labels.reshape(-1))[0]
    assert RecursiveHead(D, K).update(x[0], y[0])[1].shape == (D,)


def test_step_and_loss_reach_the_backbone() -> None:
    backbone = nn.Linear(4, D).double()
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(K, (16,))
    gradients = []
    for call in ("step", "loss"):
        backbone.zero_grad()
        head = RecursiveHead(D, K)
        loss = getattr(head, call)(backbone(x), y)
        if call == "loss":
            loss.backward()
        gradients.append(backbone.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])
    backbone.zero_grad()
    want = (nn.functional.one_hot(y, K) - head(backbone(x))).square().sum() / 16
    want.backward()
    torch.testing.assert_close(loss.detach(), want.detach())
    torch.testing.assert_close(gradients[1], backbone.weight.grad)
    state = copy.deepcopy(head.state_dict())
    torch.testing.assert_close(head.eval().loss(backbone(x), y).detach(), want.detach())  # learns nothing
    assert all(torch.equal(value, state[key]) for key, value in head.state_dict().items())


def test_trains_a_backbone() -> None:
    backbone, head = (
        nn.Sequential(nn.Linear(6, 32), nn.GELU()),
        RecursiveHead(32, 3, process_noise=1e-4, noise=0.1),
    )
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    for _ in range(100):
        x = torch.randn(64, 6)
        head.loss(backbone(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(2000, 6)
    assert (head(backbone(x)).argmax(1) == x[:, :3].argmax(1)).double().mean() > 0.9


@pytest.mark.parametrize("options", [{}, {"process_noise": 0.1, "decay": 0.9}, {"window": 10}], ids=str)
def test_resume_bit_for_bit(options: dict) -> None:
    batches = [rows(6, torch.float32) for _ in range(8)]

    def train(head: RecursiveHead, part: list) -> list[Tensor]:
        return [value for x, y in part for value in head.update(x, y)]

    straight = RecursiveHead(D, K, **options)
    want = train(straight, batches)
    first = RecursiveHead(D, K, **options)
    got = train(first, batches[:4])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = RecursiveHead(D, K, **options)
    second.load_state_dict(torch.load(file, weights_only=True))
    for head in (second, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert all(torch.equal(a, b) for a, b in zip(got + train(head, batches[4:]), want, strict=True))
        assert torch.equal(head.weight, straight.weight)


def test_state_survives_what_modules_go_through() -> None:
    head = RecursiveHead(D, K)
    head.update(*rows(9))
    want = head.weight
    assert not list(head.parameters())
    assert {key.split(".")[0] for key in head.state_dict()} == {"filter"}
    nn.Sequential(head).half()
    assert torch.equal(head.weight, want)
    with pytest.raises(RuntimeError, match="size mismatch"):
        head.load_state_dict(RecursiveHead(D + 1, K).state_dict())
    assert torch.equal(head.weight, want)
    with torch.inference_mode():
        head.update(*rows(3))
    head.update(*rows(3))
    assert "in_features=5" in repr(head)
    assert "process_noise=0.0" in repr(head)


def test_gradient_of_the_prediction() -> None:
    head = RecursiveHead(D, K)
    head.update(*rows(9))
    x = torch.randn(4, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(head, x)
    assert not head.predict(x).requires_grad


def test_autocast_changes_nothing() -> None:
    one, other = RecursiveHead(D, K), RecursiveHead(D, K)
    x, y = rows(9, torch.float32)
    want = one.update(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = other.update(x, y)
        assert torch.equal(other(x), one(x))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("options", [{}, {"process_noise": 0.1}, {"decay": 0.9}], ids=str)
def test_one_graph_for_any_number_of_rows(options: dict) -> None:
    one, other = RecursiveHead(D, K, **options), RecursiveHead(D, K, **options)
    compiled = torch.compile(
        lambda x, y: (other.update(x, y), other(x)), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for i, count in enumerate((6, 9, 4)):
        x, y = rows(count)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            got = compiled(x, y)
        torch.testing.assert_close(got, ((*one.update(x, y),), one(x)))


def test_hard_batches() -> None:
    """No rows, one row, zero rows, equal rows, a feature that is dead, rows of weight 0 that hold NaN."""
    head, want = RecursiveHead(D, K), Kalman(D, True, 1.0, 1.0, 1.0, 0.0)
    x, y = rows(6)
    loss, grad = head.update(x[:0], y[:0])
    assert float(loss) == 0.0
    assert grad.shape == (0, D)
    assert not head.weight.any()
    x[:, 2] = 0
    x[1] = 0
    x[3] = x[4]
    head.update(x, y)
    want.learn(x, y)
    torch.testing.assert_close(head.weight, want.w[:, :D], rtol=1e-9, atol=1e-11)
    assert not head.weight[:, 2].any()
    bad_x, bad_y = (
        torch.cat((x, torch.full((2, D), torch.nan))),
        torch.cat((y, torch.full((2, K), torch.inf))),
    )
    s = torch.tensor([1.0] * 6 + [0.0] * 2)
    loss, grad = head.update(bad_x, bad_y, sample_weight=s)
    want.learn(x, y)
    want_loss, want_grad = want.loss(x, y)
    torch.testing.assert_close(head.weight, want.w[:, :D], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(loss, want_loss)
    torch.testing.assert_close(grad[:6], want_grad)
    assert not grad[6:].any()


@pytest.mark.parametrize("scale", [1e-100, 1e-30, 1e30, 1e100])
def test_scales_of_features_and_targets(scale: float) -> None:
    """With alpha in their units the prediction is the same."""
    x, y = rows(20)
    head, want = RecursiveHead(D, K, alpha=scale**2, bias=False), RecursiveHead(D, K, bias=False)
    for part in (slice(0, 4), slice(4, 20)):
        got = head.update(x[part] * scale, y[part])
        expected = want.update(x[part], y[part])
    torch.testing.assert_close(head(x * scale), want(x), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(got[1] * scale, expected[1], rtol=1e-9, atol=1e-11)


X, Y = torch.ones(4, D), torch.ones(4, K)
LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("features", "target", "weight", "error", "message"),
    [
        (torch.full((4, D), torch.nan), Y, None, ValueError, "features has NaN or Inf in row 0"),
        (X, torch.tensor([[1.0] * K] * 3 + [[torch.inf] * K]), None, ValueError, "target has NaN or Inf in row 3"),
        (X, LABELS - 1, None, IndexError, "from 0 to 2, but got -1 in row 0"),
        (X, LABELS + 1, None, IndexError, "but got 3 in row 2"),
        (torch.ones(4, D + 1), Y, None, ValueError, "features must have size 5"),
        (X, torch.ones(4, K + 1), None, ValueError, r"target must have shape \(4, 3\)"),
        (X, torch.ones(3, K), None, ValueError, r"target must have shape \(4, 3\)"),
        (X, LABELS[:3], None, ValueError, r"target must have shape \(4,\)"),
        (X, LABELS.int().unsqueeze(1).expand(4, K), None, TypeError, "target must be floating point"),
        (X, Y, torch.ones(3), ValueError, "sample_weight must have size 4"),
        (X, Y, -torch.ones(4), ValueError, "sample_weight must be finite and not negative"),
        (X, LABELS, LABELS, TypeError, "sample_weight must be float16"),
        (X.int(), Y, None, TypeError, "features must be float16"),
        ([[1.0]], Y, None, TypeError, "features must be a tensor"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"process_noise": 0.1}, {"window": 5}], ids=str)
def test_what_is_refused_changes_nothing(
    options: dict, features: Tensor, target: Tensor, weight: Tensor, error: type[Exception], message: str
) -> None:
    head = RecursiveHead(D, K, **options)
    head.update(*rows(9))
    state = copy.deepcopy(head.state_dict())
    with pytest.raises(error, match=f"cfl_ops.learn.RecursiveHead: .*{message}"):
        head.update(features, target, sample_weight=weight)
    assert all(torch.equal(value, state[key]) for key, value in head.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must be finite and positive"),
        ({"noise": -1.0}, "noise must be finite and positive"),
        ({"decay": 0.0}, r"learn.RecursiveHead: decay must be in \(0, 1\]"),
        ({"decay": 1.5}, r"learn.RecursiveHead: decay must be in \(0, 1\]"),
        ({"process_noise": math.nan}, "process_noise must be finite"),
        ({"window": 0}, "window must be at least 1"),
        ({"window": 3, "decay": 0.5}, "window takes neither"),
        ({"bias": 1}, "learn.RecursiveHead: bias must be True or False"),
        ({"dtype": torch.float16}, "dtype must be"),
        ({"process_group": "all"}, "learn.RecursiveHead: process_group must be one of auto"),
    ],
)
def test_options_that_are_refused(options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"cfl_ops\..*{message}"):
        RecursiveHead(D, K, **options)
    with pytest.raises(ValueError, match="in_features must be at least 0"):
        RecursiveHead(-1, K)


def test_beside_another_head() -> None:
    heads = ClosedFormHeads({"filter": RecursiveHead(D, K), "step": ClosedFormLinear(D, 1)})
    x = torch.randn(8, D, requires_grad=True)
    heads.loss(x, {"filter": torch.randint(K, (8,)), "step": torch.randn(8, 1)}).backward()
    assert x.grad.any()
