"""State that outlives a call: it can be written to in and out of inference mode, and loads whole or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting

P = ParamSpec("P")
R = TypeVar("R")


def in_inference_mode() -> bool:
    """Whether what is made now is made in inference mode (of which the compiler, that cannot trace it, knows)."""
    return not is_compiling() and torch.is_inference_mode_enabled()


def from_inference_mode(tensor: Tensor) -> bool:
    """Whether a tensor was made in inference mode."""
    return not is_compiling() and tensor.is_inference()


def makes_state(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose results are state: without a graph, and made outside inference mode.

    A tensor that is made in inference mode can be neither written to nor saved for a derivative outside it.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if (
            is_exporting()
        ):  # a program has no graph of derivatives, and no_grad around writes cannot be exported
            return function(*args, **kwargs)
        if not in_inference_mode():
            with torch.no_grad():
                return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():  # leaving inference mode lets gradients in
            return function(*args, **kwargs)

    return call


@makes_state
def normal(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of one that was made in inference mode."""
    return tensor.clone() if from_inference_mode(tensor) else tensor


class StateModule(nn.Module):
    """A module whose own parameters and buffers are set by its methods, not by an optimiser.

    A state_dict that does not fit (a shape, integers for floating point, in strict mode a name too few or too
    many) leaves them as they were. Those that were made in inference mode, by a load or a move, become normal.
    """

    def _stores(self) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
        for store in (self._parameters, self._buffers):
            for name, value in store.items():
                if value is not None:
                    yield store, name, value

    def _make_normal(self) -> None:
        """Before the state is written to."""
        for store, name, value in self._stores():
            if from_inference_mode(value):
                copy = normal(value.detach())
                store[name] = nn.Parameter(copy, value.requires_grad) if store is self._parameters else copy

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        self._make_normal()
        before = [(store, name, value, value.detach().clone()) for store, name, value in self._stores()]
        failures = (error_msgs, missing_keys, unexpected_keys) if strict else (error_msgs,)
        known = sum(map(len, failures))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        for _, name, value, _ in before:
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.is_floating_point() != value.is_floating_point():
                error_msgs.append(
                    f"{prefix}{name} must be of the kind of {value.dtype}, but got {given.dtype}."
                )
        if sum(map(len, failures)) > known:
            for store, name, value, content in before:
                with torch.no_grad():
                    value.copy_(content)
                store[name] = value


class PreciseModule(StateModule):
    """A module whose buffers keep their dtypes, which were chosen: what changes dtypes (``half()``,
    ``parent.to(torch.bfloat16)``, a state_dict of another dtype) leaves them, what moves them does.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreciseModule:
        def moved(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            return out if out.dtype == tensor.dtype else tensor.to(out.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        dtypes = {name: value.dtype for _, name, value in self._stores()}
        super()._load_from_state_dict(*args)
        for store, name, value in self._stores():
            if value.dtype != dtypes[name]:  # assign=True takes the tensors as they come
                store[name] = value.to(dtypes[name])
