"""A gradient's way to autograd."""

import torch
from cfl_ops._core.handover import backward
from torch import nn
from torch.overrides import TorchFunctionMode


def test_backward_is_that_of_the_tensor():
    backbone, x, gradient = nn.Linear(3, 4), torch.randn(5, 3), torch.randn(5, 4)
    backbone(x).backward(gradient)
    expected = [p.grad.clone() for p in backbone.parameters()]
    backbone.zero_grad()
    seen = []
    features = backbone(x)
    features.register_hook(seen.append)
    backward(features, gradient)
    for p, grad in zip(backbone.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0)
    assert len(seen) == 1
    backward(backbone(x), gradient)  # accumulates
    torch.testing.assert_close(backbone.bias.grad, 2 * expected[1])


def test_function_modes_see_it():
    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    names = []
    x = torch.ones(2, requires_grad=True)
    y = 2 * x
    with Mode():
        backward(y, torch.ones(2))
    assert "backward" in names
    assert x.grad.tolist() == [2, 2]
