"""Every number that a public function takes may be Python's, NumPy's, or stand in an array or tensor of no dimensions.

Bools, strings and None are refused, with the name of the argument.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.core.public_calls import CALLS, Call, documented

KINDS = {
    "number": ("float", "float | Tensor", "float | Tensor | None"),
    "numbers": ("Sequence[float] | Tensor",),
    "integer": ("int", "int | None", "int | Sequence[int]", "str | int", "str | int | None"),
    "flag": ("bool",),
}
# Unlike what their annotations say.
KIND_OF = {"learn.RidgeCV.alphas": "numbers"}

ARGUMENTS = [
    (name, parameter.name, kind)
    for name, signature in documented().items()
    for parameter in signature.parameters.values()
    for kind, annotations in KINDS.items()
    if parameter.annotation in annotations or KIND_OF.get(f"{name}.{parameter.name}") == kind
]


def call_with(function: str, parameter: str) -> Call:
    calls = [call for call in CALLS[function] if parameter in call.arguments]
    assert calls, f"public_calls.py has no call of {function} with {parameter}"
    return calls[0]


def leaves(out: Any) -> list[Any]:
    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in pytree.tree_leaves(out)]


def assert_equal(got: Any, want: Any) -> None:
    assert len(leaves(got)) == len(leaves(want))
    for a, b in zip(leaves(got), leaves(want), strict=True):
        assert type(a) is type(b)
        if isinstance(b, Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        else:
            assert a == b


def forms(kind: str, value: Any) -> list[Any]:
    """The same value in other types."""
    if kind == "flag":
        return [np.bool_(value), np.array(value), torch.tensor(value)]
    if kind == "integer":
        return [np.int64(value), np.int32(value), np.uint8(value), np.array(value), torch.tensor(value)]
    if kind == "numbers":
        return [np.array(value), np.float32(value), torch.tensor(value, dtype=torch.float64), tuple(value),
                [np.float32(v) for v in value], [torch.tensor(v) for v in value]]  # fmt: skip
    whole = (
        [int(value), np.int64(value), np.array(int(value)), torch.tensor(int(value))]
        if value % 1 == 0
        else []
    )
    return [np.float64(value), np.float32(value), np.float16(value), np.array(value), torch.tensor(value),
            np.array(value, np.float32), torch.tensor(value, dtype=torch.float64), Fraction(value), *whole]  # fmt: skip


def refused(kind: str, function: str, parameter: str) -> list[Any]:
    bad: list[Any] = ["1", np.bool_(True), torch.tensor(True), 1j, object(), None, True]
    if kind == "flag":
        bad = ["yes", None, 1, 0.0, np.int64(1), torch.tensor(1)]
    elif kind == "integer":
        bad += [1.0, np.float64(1), torch.tensor(1.0), Fraction(1)]
    elif kind == "numbers":
        bad = ["1", None, 1j, ["1"], [None], [True], [1j], torch.tensor([True])]
    annotation = documented()[function].parameters[parameter].annotation
    if "None" in annotation or parameter == "entropy":
        bad = [value for value in bad if value is not None]
    if "str" in annotation:
        bad = [value for value in bad if not isinstance(value, str)]
    return bad


def test_every_public_function_is_called() -> None:
    assert set(documented()) == set(CALLS)
    assert len(ARGUMENTS) > 80


@pytest.mark.parametrize(("function", "parameter", "kind"), ARGUMENTS)
def test_numbers(function: str, parameter: str, kind: str) -> None:
    call = call_with(function, parameter)
    value = call.arguments[parameter]
    want = call()
    for form in forms(kind, value):
        assert_equal(call(**{parameter: form}), want)
    changed = {"flag": lambda: not value, "numbers": lambda: [v + 1 for v in value]}.get(
        kind, lambda: value + 1
    )()
    if (function, parameter) not in UNSEEN:
        try:
            other = call(**{parameter: changed})
        except (ValueError, ImportError):
            return  # out of range: it was read
        with pytest.raises(AssertionError):  # the argument counts, so that a form that is ignored shows
            assert_equal(other, want)


# What changes nothing that a small call shows.
UNSEEN = {
    ("safe_cholesky", "max_jitter"), ("safe_cholesky_ex", "max_jitter"), ("GramAccumulator.fit", "checkpoint_every"),
    ("GramAccumulator.fit", "progress"), ("GramAccumulator.fit_file", "checkpoint_every"),
    ("GramAccumulator.fit_file", "progress"), ("compress_state_dict", "min_numel"),
    ("compress_state_dict", "max_bytes"),
    ("GramAccumulator", "compensated"), ("ridge_cv", "cv"), ("learn.RidgeCV", "cv"),
    ("learn.RidgeCV", "alpha_per_target"), ("lstsq", "rtol"), ("lstsq_ex", "rtol"), ("pinv", "rtol"),
    ("pinv", "atol"), ("pinv_ex", "rtol"), ("pinv_ex", "atol"), ("factorize", "rtol"),
}  # fmt: skip


@pytest.mark.parametrize(("function", "parameter", "kind"), ARGUMENTS)
def test_what_is_no_number(function: str, parameter: str, kind: str) -> None:
    call = call_with(function, parameter)
    for bad in refused(kind, function, parameter):
        with pytest.raises(TypeError, match=rf"^cfl_ops\.\S+: {re.escape(parameter)} must be "):
            call(**{parameter: bad})


@pytest.mark.parametrize(("function", "parameter", "kind"), [a for a in ARGUMENTS if a[2] == "number"])
def test_no_gradient_is_lost(function: str, parameter: str, kind: str) -> None:
    """A tensor that requires grad is differentiated in, or refused."""
    call = call_with(function, parameter)
    if "Tensor" in documented()[function].parameters[parameter].annotation:
        pytest.skip("takes tensors")
    with pytest.raises(TypeError, match=f"{parameter} must be a number, but got a tensor .*requires grad"):
        call(**{parameter: torch.tensor(call.arguments[parameter], requires_grad=True)})
