"""rescaled_proximal_step and the short forms, against oracles that solve each class alone."""

from __future__ import annotations

import cfl_ops
import pytest
import torch
from torch.nn import functional as F


def one_system_for_each_class(features, labels, weight, bias, lam, ridge, kappa, scale_to, reduction):
    """K weighted systems of D' x D', nothing shared."""
    phi, old = features.double(), weight.double()
    if bias is not None:
        phi = torch.cat([phi, torch.ones(len(phi), 1, dtype=torch.float64)], 1)
        old = torch.cat([old, bias.double()[:, None]], 1)
    scale = len(phi) if reduction == "mean" else 1
    new = []
    for k in range(len(weight)):
        own = (labels == k).double()
        s = 1 + (kappa - 1) * own
        system = phi.mT @ (s[:, None] * phi) + scale * (lam + ridge) * torch.eye(
            phi.shape[1], dtype=torch.float64
        )
        new.append(torch.linalg.solve(system, phi.mT @ (s * scale_to * own) + scale * lam * old[k]))
    new = torch.stack(new)
    own = F.one_hot(labels, len(weight)).double()
    s = 1 + (kappa - 1) * own
    residual = scale_to * own - phi @ new.mT
    width = features.shape[1]
    return new, (s * residual.square()).sum() / scale, -2 / scale * (s * residual) @ new[:, :width]


@pytest.mark.parametrize("shape", [(7, 20), (40, 6), (12, 12)])
@pytest.mark.parametrize("kappa", [1.0, 5.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_one_system_for_each_class(shape, kappa, reduction, with_bias) -> None:
    features, weight = torch.randn(*shape, dtype=torch.float64), torch.randn(4, shape[1], dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64) if with_bias else None
    labels = torch.randint(3, (shape[0],))  # class 3 has no rows
    step = cfl_ops.rescaled_proximal_step(
        features, labels, weight, bias, lam=0.3, ridge=0.1, kappa=kappa, target_scale=4.0, reduction=reduction
    )
    new, loss, grad = one_system_for_each_class(
        features, labels, weight, bias, 0.3, 0.1, kappa, 4.0, reduction
    )
    torch.testing.assert_close(step.weight, new[:, : shape[1]], rtol=1e-9, atol=1e-9)
    if with_bias:
        torch.testing.assert_close(step.bias, new[:, -1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(step.loss, loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(step.grad_features, grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(7, 20), (40, 6)])
def test_float32_and_envelope(shape) -> None:
    """grad_features is the derivative of the whole objective through the solve."""
    features, labels = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True),
        torch.randint(3, (shape[0],)),
    )
    weight = torch.randn(3, shape[1], dtype=torch.float64)
    step = cfl_ops.rescaled_proximal_step(features, labels, weight, lam=0.3, kappa=3.0, target_scale=2.0)
    objective = step.loss + 0.3 * (step.weight - weight).square().sum()
    (total,) = torch.autograd.grad(objective, features)
    torch.testing.assert_close(step.grad_features.detach(), total)
    small = cfl_ops.rescaled_proximal_step(
        features.detach().float(), labels, weight.float(), lam=0.3, kappa=3.0, target_scale=2.0
    )
    assert small.weight.dtype == torch.float32
    torch.testing.assert_close(small.weight.double(), step.weight.detach(), rtol=1e-4, atol=1e-5)


def test_bad_arguments() -> None:
    features, labels, weight = torch.ones(3, 2), torch.tensor([0, 1, 2]), torch.zeros(2, 2)
    call = cfl_ops.rescaled_proximal_step
    with pytest.raises(ValueError, match="kappa must be finite and positive, but got 0"):
        call(features, labels, weight, lam=1.0, kappa=0)
    with pytest.raises(ValueError, match="target_scale must be finite and positive"):
        call(features, labels, weight, lam=1.0, target_scale=float("nan"))
    with pytest.raises(TypeError, match="labels must be int64 class indices"):
        call(features, labels.float(), weight, lam=1.0)
    with pytest.raises(IndexError, match="but got 2 in row 2"):
        call(features, labels, weight, lam=1.0, kappa=2.0)
    with pytest.raises(ValueError, match="features has NaN or Inf in row 1"):
        call(torch.tensor([[1.0, 1], [torch.nan, 1], [1, 1]]), labels % 2, weight, lam=1.0, kappa=2.0)
    with pytest.raises(ValueError, match="features must have 2 dimensions"):
        call(features.expand(2, 3, 2), labels, weight, lam=1.0)


def test_proximal_update_is_the_step_without_its_gradient() -> None:
    features, labels, weight, bias = (
        torch.randn(5, 8),
        torch.randint(3, (5,)),
        torch.randn(3, 8),
        torch.randn(3),
    )
    step = cfl_ops.proximal_step(features, labels, weight, bias, lam=0.5)
    new, new_bias = cfl_ops.proximal_update(features, labels, weight, bias, lam=0.5)
    assert torch.equal(new, step.weight)
    assert torch.equal(new_bias, step.bias)


@pytest.mark.parametrize("shape", [(7, 20), (40, 6)])
def test_ridge_step_minimises_its_objective(shape) -> None:
    features, target = torch.randn(*shape, dtype=torch.float64), torch.randn(shape[0], 2, dtype=torch.float64)
    step = cfl_ops.ridge_step(features, target, lam=0.2, fit_bias="free")
    w, b = step.weight.clone().requires_grad_(), step.bias.clone().requires_grad_()
    loss = (target - F.linear(features, w, b)).square().sum() / shape[0] + 0.2 * w.square().sum()
    assert max(float(g.abs().max()) for g in torch.autograd.grad(loss, (w, b))) < 1e-13
    with pytest.raises(TypeError, match="needs num_classes"):
        cfl_ops.ridge_step(features, torch.zeros(shape[0], dtype=torch.int64), lam=0.2)


def test_data_are_checked_without_a_step_of_their_own() -> None:
    """A head over a small target_scale overflowed in half precision, and a penalty that kappa makes up for was none."""
    features, labels = torch.randn(8, 4), torch.arange(8) % 3
    old = torch.full((3, 4), 6e4, dtype=torch.float16)
    step = cfl_ops.rescaled_proximal_step(features, labels, old, lam=1.0, target_scale=0.1)
    wide_step = cfl_ops.rescaled_proximal_step(features, labels, old.double(), lam=1.0, target_scale=0.1)
    torch.testing.assert_close(step.weight.double(), wide_step.weight, rtol=2e-3, atol=2e-2)
    with pytest.raises(ValueError, match="lam must be finite and not negative"):
        cfl_ops.rescaled_proximal_step(features, labels, torch.zeros(3, 4), lam=float("nan"))
