"""torch.compile of public functions as a training loop calls them: one graph serves any number of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import cfl_ops
import pytest
import torch
from torch import Tensor


def gram(x: Tensor, y: Tensor) -> Tensor:
    return cfl_ops.gram(x, y, bias_column=True).gram


def proximal(features: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    step, info = cfl_ops.proximal_step_ex(features, target, weight, bias, lam=0.5)
    return (*step, info)


def ridge(matrix: Tensor, right: Tensor) -> tuple[Tensor, ...]:
    return tuple(cfl_ops.ridge_solve_ex(matrix, right, 0.1))


CALLS: list[tuple[Callable[..., Any], Callable[[int], Sequence[Tensor]]]] = [
    (gram, lambda rows: (torch.randn(rows, 7), torch.randn(rows, 3))),
    (
        proximal,
        lambda rows: (torch.randn(rows, 12), torch.randn(rows, 3), torch.randn(3, 12), torch.randn(3)),
    ),
    (ridge, lambda rows: (torch.randn(rows, 30).cov(), torch.randn(rows, 2))),
]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("function", "make"), CALLS, ids=[function.__name__ for function, _ in CALLS])
def test_one_graph_for_any_number_of_rows(
    function: Callable[..., Any], make: Callable[[int], Sequence[Tensor]], backend: str
) -> None:
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for rows, stance in ((9, "default"), (16, "fail_on_recompile"), (21, "fail_on_recompile")):
        args = make(rows)
        with torch.compiler.set_stance(stance):
            got = compiled(*args)
        torch.testing.assert_close(got, function(*args), rtol=0, atol=0)
