"""Failures that depend on the data: an ``info`` tensor by the op, an exception by the function that checks it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cfl_ops._core.op import LIB, transforming

Explain = Callable[[Tensor, Sequence[Tensor]], Exception]
_EXPLAIN: dict[str, Explain] = {}


def error_message(name: str) -> Callable[[Explain], Explain]:
    """Register the function that turns a failed op's info into the exception to raise."""

    def register(function: Explain) -> Explain:
        _EXPLAIN[name] = function
        return function

    return register


def check_info(name: str, info: Tensor, results: Sequence[Tensor], context: Sequence[Tensor]) -> None:
    """Raise if ``info`` is not all zero. Synchronises a GPU.

    In a compiled graph this is an op that declares to write to ``results``: nothing else would keep the
    compiler from dropping a check whose outcome no one reads.
    """
    if is_compiling() or transforming():
        torch.ops.cfl_ops.raise_if_.default(name, list(results), info, list(context))
    elif info.is_cpu and info.ndim == 0:  # one problem on a CPU: this look is all that its call pays
        if info.item() != 0:
            raise _explained(name, info, context)
    else:
        _raise_if(name, results, info, context)


def _raise_if(name: str, results: Sequence[Tensor], info: Tensor, context: Sequence[Tensor]) -> None:
    if capturing(info):
        return  # a captured graph cannot synchronise: use the _ex form there
    if any_failed(info):
        raise _explained(name, info, context)


def _explained(name: str, info: Tensor, context: Sequence[Tensor]) -> Exception:
    """The exception, which has the info too: of a batch it says which elements failed."""
    if name in _EXPLAIN:
        error = _EXPLAIN[name](info, context)
    elif " must be " in name and context and context[0].numel() == 1:  # a number of a graph, see checks.py
        error = ValueError(f"cfl_ops.{name}, but got {context[0].item()}")
    else:
        error = ValueError(f"cfl_ops.raise_if_: op must be one with an error message, but got {name!r}")
    error.info = info  # type: ignore[attr-defined]
    return error


def capturing(info: Tensor) -> bool:
    """Whether a CUDA graph captures what made ``info``, which no host can look at then."""
    return info.is_cuda and torch.cuda.is_current_stream_capturing()


def any_failed(info: Tensor) -> bool:
    """Whether ``info`` is not all zero. Synchronises a GPU."""
    return info.item() != 0 if info.ndim == 0 else bool(info.count_nonzero())  # faster than any()


def _raise_if_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    name: str,
    results: list[Tensor],
    flags: Tensor,
    context: list[Tensor],
) -> tuple[None, None]:
    def front(value: Any, dim: Any) -> Any:
        return value if dim is None else value.movedim(dim, 0)

    moved = [front(*item) for item in zip(results, in_dims[1], strict=True)]
    given = [front(*item) for item in zip(context, in_dims[3], strict=True)]
    check_info(name, front(flags, in_dims[2]), moved, given)
    return None, None


LIB.define(
    "raise_if_(str op, Tensor(a!)[] results, Tensor info, Tensor[] context) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)
LIB.impl("raise_if_", _raise_if, "CompositeExplicitAutograd")
torch.library.register_fake("cfl_ops::raise_if_", lambda op, results, info, context: None, lib=LIB)
torch.library.register_vmap("cfl_ops::raise_if_", _raise_if_vmap, lib=LIB)


def first_failure(info: Tensor) -> tuple[tuple[int, ...], int, str]:
    """The index of the first failed batch element, its info, and how to name it in a message."""
    index = tuple(int(i) for i in info.nonzero()[0]) if info.ndim else ()
    where = "" if not index else f"(Batch element {index[0] if len(index) == 1 else index}): "
    return index, int(info[index]), where
