"""Forward-mode derivatives (``torch.func.jvp``, ``jacfwd``, ``hessian``) from an op's backward formula.

The backward formula is linear in the gradients it is given, and made of differentiable torch ops. So what it does to
them can itself be pulled back, which applies the transposed formula, J, to the tangents: at about the cost of two
backward passes, and without a second formula for each op that could be wrong.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from cfl_ops._core.autocast import without_autocast


class SavedInputs:
    """What a derivative's setup_context stores, outside of autograd."""

    def __init__(self, needs_input_grad: Sequence[bool]) -> None:
        self.needs_input_grad = tuple(needs_input_grad)
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """As a context of autograd does."""
        self.saved_tensors = tensors


def save_for_forward(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
    """Keep what jvp reads: the arguments of the op and its results."""
    results = (output,) if isinstance(output, Tensor) else tuple(output)
    ctx.save_for_forward(*(value if isinstance(value, Tensor) else None for value in inputs), *results)
    ctx.plain_inputs = tuple(None if isinstance(value, Tensor) else value for value in inputs)
    ctx.one_result = isinstance(output, Tensor)


def jvp_of(
    setup_context: Callable[..., None], backward: Callable[..., Any], differentiable: Sequence[bool]
) -> Callable[..., Any]:
    """The ``jvp`` of an autograd function, given whether a gradient passes each of its results.

    The function has a vmap rule of its own, so that the innermost transform is the one that asks.
    """

    def pushed(
        inputs: Sequence[Any], results: Sequence[Tensor], tangents: Sequence[Tensor | None], one_result: bool
    ) -> list[Tensor | None]:
        wanted = [
            i
            for i, (tangent, value) in enumerate(zip(tangents, inputs, strict=True))
            if tangent is not None and value.is_floating_point()
        ]
        passing = [i for i, passes in enumerate(differentiable) if passes]
        context = SavedInputs([i in wanted for i in range(len(inputs))])
        setup_context(context, tuple(inputs), results[0] if one_result else tuple(results))

        def pulled(*gradients: Tensor) -> tuple[Tensor, ...]:
            given: list[Tensor | None] = [None] * len(results)
            for i, gradient in zip(passing, gradients, strict=True):
                given[i] = gradient
            back = backward(context, *given)
            back = back if isinstance(back, tuple) else (back,)
            return tuple(torch.zeros_like(inputs[i]) if back[i] is None else back[i] for i in wanted)

        zeros = [torch.zeros_like(results[i]) for i in passing]
        _, pullback = torch.func.vjp(pulled, *zeros)  # type: ignore[misc]
        out: list[Tensor | None] = [None] * len(results)
        for i, tangent in zip(passing, pullback(tuple(tangents[i] for i in wanted)), strict=True):
            # Of a result that is a view, torch wants the tangent to have the strides.
            out[i] = torch.zeros_like(results[i]) + tangent
        return out

    @without_autocast
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        count = len(ctx.plain_inputs)
        with _below() as values_of:
            saved = values_of(ctx.saved_tensors)
            inputs = [
                plain if value is None else value
                for value, plain in zip(saved[:count], ctx.plain_inputs, strict=True)
            ]
            out = pushed(inputs, saved[count:], values_of(tangents), ctx.one_result)
        out = _lifted(out)
        return out[0] if ctx.one_result else tuple(out)

    return jvp


@contextlib.contextmanager
def _below() -> Iterator[Callable[[Sequence[Tensor | None]], list[Any]]]:
    """Below the transform that asks for tangents, whose values have none: else the formula's ops would ask again."""
    interpreter = _interpreter()
    if interpreter is None:  # forward_ad itself

        def primals(values: Sequence[Tensor | None]) -> list[Any]:
            with forward_ad._set_fwd_grad_enabled(
                False
            ):  # vmap has no rule for unpack_dual(); views keep tangents
                return [None if value is None else value.clone() for value in values]

        yield primals
        return
    level = interpreter.level()

    def unwrapped(values: Sequence[Tensor | None]) -> list[Any]:
        return [None if v is None else torch._C._functorch._unwrap_for_grad(v, level) for v in values]

    with forward_ad._set_fwd_grad_enabled(True), interpreter.lower():
        yield unwrapped


def _lifted(values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What was computed below the transform, as its own."""
    interpreter = _interpreter()
    if interpreter is None:
        return list(values)
    level = interpreter.level()
    return [None if v is None else torch._C._functorch._wrap_for_grad(v, level) for v in values]


def _interpreter() -> Any:
    """The innermost functorch transform, if that asks for tangents: inside of another one forward_ad does."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return None
    interpreter = retrieve_current_functorch_interpreter()
    return interpreter if interpreter.key() == TransformType.Jvp else None
