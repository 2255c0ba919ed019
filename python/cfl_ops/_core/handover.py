"""Handing a gradient to autograd, for what computes it outside of it."""

from __future__ import annotations

from torch import Tensor
from torch._C import _len_torch_function_stack
from torch.autograd.variable import Variable
from torch.compiler import is_compiling

from cfl_ops._core.op import _transform

__all__ = ["backward"]

# What Tensor.backward ends in: the way there, in Python, costs as much as the backward pass of a small layer.
_run = getattr(getattr(Variable, "_execution_engine", None), "run_backward", None)


def backward(value: Tensor, gradient: Tensor) -> None:
    """As ``value.backward(gradient)``, for a gradient of the same shape and dtype.

    What may see the call (subclasses, function modes, the compiler, transforms) sees it.
    """
    if (
        _run is None
        or type(value) is not Tensor
        or is_compiling()
        or _len_torch_function_stack() > 0
        or _transform() is not None
    ):
        value.backward(gradient)
    else:
        _run((value,), (gradient,), False, False, (), True, True)
