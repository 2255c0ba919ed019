"""Every public function with an empty tensor in the place of each tensor argument: an answer, or an error of ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import cfl_ops
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.core.public_calls import CALLS, Call

ERRORS = (TypeError, ValueError, IndexError, cfl_ops.LinAlgError)  # CorruptDataError is a ValueError
ARGUMENTS = [
    pytest.param(call, parameter, id=f"{function}-{number}-{parameter}")
    for function, calls in CALLS.items()
    for number, call in enumerate(calls)
    for parameter, value in call.arguments.items()
    if isinstance(value, Tensor)
    or parameter in ("lam", "ridge", "prox", "rtol", "atol", "lams", "rho", "entropy")
]


def emptied(value: Any) -> Iterator[Tensor]:
    """Without elements in each of the dimensions, in all of them, as a vector, and in a new batch dimension."""
    value = torch.as_tensor(value)
    shape = list(value.shape)
    for dim in range(len(shape)):
        yield value.new_empty([*shape[:dim], 0, *shape[dim + 1 :]])
    yield value.new_empty([0] * max(1, len(shape)))
    yield value.new_empty([0])
    yield value.new_empty([0, *shape])
    yield value.to(torch.float64).new_empty([2, 0, *shape[1:]])


def outcome(call: Call, parameter: str, empty: Tensor) -> Any:
    """What the call returns, or the kind of its error; an error that is not ours as it is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pytree.tree_leaves(call(**{parameter: empty}))
    except ERRORS as error:
        return error if not str(error).startswith("cfl_ops.") else type(error)


@pytest.mark.parametrize(("call", "parameter"), ARGUMENTS)
def test_an_empty_tensor(call: Call, parameter: str) -> None:
    for empty in emptied(call.arguments[parameter]):
        outcomes = []
        for backend in (None, "python"):
            with cfl_ops.config.use_backend(backend):
                outcomes.append(outcome(call, parameter, empty.clone()))
        got, want = outcomes
        assert not isinstance(got, Exception), got
        if isinstance(want, type) or isinstance(got, type):
            assert got is want, (got, want, empty.shape)
        else:
            torch.testing.assert_close(
                got, want, equal_nan=True, msg=lambda text, e=empty: f"{text} {e.shape}"
            )
            for leaf in got:
                if isinstance(leaf, Tensor) and leaf.dtype.is_floating_point:
                    assert bool(leaf.isfinite().all()), (parameter, empty.shape, leaf)
