"""Tensors with the negative bit (``z.conj().imag``), read or written, give what plain ones give, on every backend."""

from __future__ import annotations

from typing import Any

import cfl_ops
import pytest
import torch
from torch import Tensor

from tests import contract
from tests.core.public_calls import CALLS, Call
from tests.core.test_contract import CASES, skip_unless_served
from tests.core.test_numbers import assert_equal


def dense(value: Tensor) -> Tensor:
    """With the negative bit, in memory of its own."""
    return torch._neg_view(-value) if value.is_floating_point() else value


def negative(value: Any) -> Any:
    """The same values as the imaginary part of a conjugate, if it is a floating-point tensor."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    if value.dtype == torch.bfloat16:  # has no complex numbers
        return dense(value)
    z = torch.complex(torch.zeros_like(value), -value)
    out = z.conj().imag
    assert out.is_neg() or out.numel() == 0
    return out


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_ops(spec: contract.OpSpec, case: contract.Case, backend: str) -> None:
    skip_unless_served(spec, backend)
    args = case.make(torch.float32 if torch.float32 in case.dtypes else case.dtypes[0])
    want, bounds = spec.oracle(*args), spec.bound(*args)
    changed = [negative(arg) for arg in args]
    out = contract.as_tuple(spec.op(*changed))
    got = tuple(changed[i].resolve_neg() for i in spec.mutates if changed[i] is not None) + out
    contract.assert_within(got, want, bounds)


@pytest.mark.parametrize(
    "call",
    [pytest.param(call, id=f"{name}-{i}") for name, calls in CALLS.items() for i, call in enumerate(calls)],
)
@pytest.mark.parametrize("backend", [None, "python"])
def test_public_functions(call: Call, backend: str | None) -> None:
    with cfl_ops.config.use_backend(backend):
        tensors = {name: value for name, value in call.arguments.items() if isinstance(value, Tensor)}
        out, _ = call()
        for parts in (
            lambda v: v,
            negative,
            lambda v: torch.complex(v, v).real if v.is_floating_point() else v,
        ):
            given = {
                name: (dense if name == "out" else parts)(value.clone())  # which must be contiguous
                for name, value in tensors.items()
            }
            got, _ = call(**given)
            assert_close(got, out)


def assert_close(got: Any, want: Any) -> None:
    """Strides may choose another order of additions."""
    from torch.utils import _pytree as pytree

    a, b = (
        [v.resolve_neg() if isinstance(v, Tensor) else v for v in pytree.tree_leaves(tree)]
        for tree in (got, want)
    )
    if any(isinstance(v, Tensor) and v.is_floating_point() for v in b):
        words = [[v for v in leaves if isinstance(v, str)] for leaves in (a, b)]
        assert words[0] == words[1]
        numbers = [[v for v in leaves if not isinstance(v, str)] for leaves in (a, b)]
        torch.testing.assert_close(*numbers, rtol=1e-9, atol=1e-9)
    else:
        assert_equal(a, b)
