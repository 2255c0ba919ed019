"""Ambient autocast changes no closed form: every public function gives what it gives without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.core.public_calls import CALLS, Call
from tests.core.test_numbers import assert_equal

ROWS = [pytest.param(call, id=f"{name}-{i}") for name, calls in CALLS.items() for i, call in enumerate(calls)]


def single(tree: Any) -> Any:
    """With float32 where there is float64, which autocast leaves alone."""
    return pytree.tree_map_only(Tensor, lambda t: t.float() if t.dtype == torch.float64 else t.clone(), tree)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("call", ROWS)
def test_results_are_those_without_autocast(call: Call, dtype: torch.dtype) -> None:
    want = call.function(**single(call.arguments))
    with torch.autocast("cpu", dtype=dtype):
        got = call.function(**single(call.arguments))
    assert_equal(got, want)
