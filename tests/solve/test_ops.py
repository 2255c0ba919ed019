"""What all functions of the family promise."""

from __future__ import annotations

import subprocess
import sys

import cfl_ops
import pytest
import torch

from tests.solve.data import randn


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
