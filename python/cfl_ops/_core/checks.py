"""Argument checks: they raise at once, naming the op, the argument, what came and what was expected.

A small op takes microseconds, and each question to a tensor some 50 ns: what is right is told with few of them.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cfl_ops._core.failures import check_number

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
STRIDED = torch.strided


def tensor(op: str, name: str, value: Any, min_ndim: int) -> None:
    """``value`` is a strided tensor of at least ``min_ndim`` dimensions."""
    if not isinstance(value, Tensor):
        raise TypeError(f"cfl_ops.{op}: {name} must be a tensor, but got {type(value).__name__}")
    if value.layout is not STRIDED:
        raise TypeError(f"cfl_ops.{op}: {name} must be a strided tensor, but got layout {value.layout}")
    if value.ndim < min_ndim:
        raise ValueError(
            f"cfl_ops.{op}: {name} must have at least {min_ndim} dimension{'s' if min_ndim > 1 else ''}, "
            f"but got shape {tuple(value.shape)}"
        )


def floating(op: str, name: str, value: Any, min_ndim: int) -> None:
    """``value`` is a float16, bfloat16, float32 or float64 tensor of at least ``min_ndim`` dimensions."""
    if not isinstance(value, Tensor) or value.layout is not STRIDED or value.ndim < min_ndim:
        tensor(op, name, value, min_ndim)  # raises
    if value.dtype not in FLOATS:
        raise TypeError(
            f"cfl_ops.{op}: {name} must be float16, bfloat16, float32 or float64, but got {value.dtype}"
        )


def same_device(op: str, reference_name: str, reference: Tensor, **others: Tensor | None) -> None:
    """All of ``others`` are on the device of ``reference``."""
    device = reference.device
    for name, value in others.items():
        if value is not None and value.device != device:
            raise ValueError(
                f"cfl_ops.{op}: {name} must be on the device of {reference_name} ({device}), "
                f"but it is on {value.device}"
            )


def size(op: str, name: str, value: Tensor, dim: int, expected: int, of: str) -> None:
    """``value.shape[dim] == expected``, where ``of`` says where the expectation comes from."""
    if value.shape[dim] != expected:
        raise ValueError(
            f"cfl_ops.{op}: {name} must have size {expected} in dimension {dim} ({of}), "
            f"but got shape {tuple(value.shape)}"
        )


def broadcastable(op: str, **batches: torch.Size) -> torch.Size:
    """The common batch shape, or an error that lists the shapes."""
    first = next(iter(batches.values()))
    if all(shape == first for shape in batches.values()):
        return first
    try:
        return torch.Size(torch.broadcast_shapes(*batches.values()))
    except RuntimeError:
        listing = ", ".join(f"{name} {tuple(shape)}" for name, shape in batches.items())
        raise ValueError(f"cfl_ops.{op}: the batch dimensions do not broadcast: {listing}") from None


def choice(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"cfl_ops.{op}: {name} must be one of {', '.join(allowed)}, but got {value!r}")


def coefficient(op: str, name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """A penalty as a float64 tensor: a number must be finite and >= 0; a tensor is checked by the op.

    A number becomes a CPU tensor, so that a schedule does not recompile and no GPU copy is made.
    """
    if type(value) is float and not is_compiling() and 0 <= value < math.inf and not _tracing():
        return _number(value)  # the common case
    if isinstance(value, Tensor):
        if not value.dtype.is_floating_point:
            raise TypeError(f"cfl_ops.{op}: {name} must be a floating-point tensor, but got {value.dtype}")
        if value.ndim > 0:
            same_device(op, "the features", torch.empty(0, device=device), **{name: value})
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"cfl_ops.{op}: {name} must be a number or a tensor, but got {type(value).__name__}")
    if is_compiling() or _tracing():
        number = number_in_graph(value)
        if not (_known(value >= 0) and _known(value < math.inf)):
            good = (number >= 0) & number.isfinite()
            check_number(f"{op}: {name} must be finite and not negative", good, number, [number])
        return number
    if not 0 <= value < math.inf:
        raise ValueError(f"cfl_ops.{op}: {name} must be finite and not negative, but got {value}")
    return _number(float(value))


def positive(op: str, name: str, value: float, results: list[Tensor]) -> float | Tensor:
    """``value``, finite and above 0; in a graph as a tensor. ``results`` is what the graph hands on."""
    wanted = f"{op}: {name} must be finite and positive"
    if not is_compiling():
        if not 0 < value < math.inf:
            raise ValueError(f"cfl_ops.{wanted}, but got {value}")
        return value
    number = number_in_graph(value)
    if not (_known(value > 0) and _known(value < math.inf)):
        check_number(wanted, (number > 0) & number.isfinite(), number, results)
    return number


def outside(value: float, least: float) -> bool:
    """Whether a number is below ``least``, NaN or Inf.

    In a graph a number may be an input, of which nothing is asked here (an answer would be true of this value only):
    the op that takes it checks it when it is run.
    """
    if not is_compiling():
        return not least <= value < math.inf
    return _known(value < least) or _known(value == math.inf) or _known(value != value)  # the last: NaN


def _known(condition: bool) -> bool:
    """Whether a condition on a number holds for all values that it may have in a graph."""
    return torch.fx.experimental.symbolic_shapes.statically_known_true(condition)


def number_in_graph(value: float) -> Tensor:
    """A number, which may be an input of the graph, as a float64 tensor.

    torch.compile makes one graph for all values of a number that is multiplied; with torch.tensor it would not.
    """
    return torch.ones((), dtype=torch.float64, device="cpu") * value


_tracing = torch._C._len_torch_dispatch_stack


@functools.lru_cache(maxsize=1024)
def _number(value: float) -> Tensor:
    """The same tensor for the same number, which nobody writes to."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=torch.float64, device="cpu")


def sample_weight(op: str, value: Any, rows: int, of: str) -> None:
    """``value`` holds a floating-point weight for each row; its sign is the op's to check."""
    floating(op, "sample_weight", value, 1)
    size(op, "sample_weight", value, -1, rows, of)
