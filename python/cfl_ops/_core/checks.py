"""Argument checks: they raise at once, naming the op, the argument, what came and what was expected.

A small op takes microseconds, and each question to a tensor some 50 ns: what is right is told with few of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.compiler import is_compiling

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
STRIDED = torch.strided
MOST = 2**63 - 1


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


class Range(NamedTuple):
    """Which numbers an argument takes: in words, and as a question."""

    words: str
    holds: Callable[[Any], Any]
    """Of a number, or of a number in a tensor."""


# Comparisons alone, which a compiled graph can ask of its inputs too; NaN is in none of them.
FINITE = Range("finite", lambda value: (value > -math.inf) & (value < math.inf))
NOT_NEGATIVE = Range("finite and not negative", lambda value: (value >= 0) & (value < math.inf))
POSITIVE = Range("finite and positive", lambda value: (value > 0) & (value < math.inf))
SHARE = Range("in (0, 1]", lambda value: (value > 0) & (value <= 1))


def number(op: str, name: str, value: Any, wanted: Range = FINITE) -> float:
    """A real number as a float (an int stays one): Python's, NumPy's, or the one in an array or tensor without
    dimensions, which is read (that synchronises a GPU). No bool, string, None, nor what requires a gradient.

    In a graph a number may be an input. Nothing is asked of it here, for the answer would be true of one value only:
    the op that is given it asks.
    """
    kind = type(value)
    if kind is not float:
        if kind is not int:
            value = _real(op, name, value)
        elif not -MOST <= value <= MOST:  # more than an op can be given as an integer
            value = float(value) if abs(value) < 2**1024 - 2**970 else math.inf
    if wanted.holds(value) is False:  # not a question of a graph's
        raise ValueError(f"cfl_ops.{op}: {name} must be {wanted.words}, but got {value}")
    out: float = value
    return out


def scalar(op: str, name: str, value: Any, wanted: Range, results: Sequence[Tensor]) -> Any:
    """A :func:`number` that torch ops are given; in a graph a 0-d float64 tensor, checked when the graph is run.

    ``results`` is what the graph goes on with: nothing else would keep the compiler from dropping the check.
    """
    if not is_compiling():
        return number(op, name, value, wanted)
    return _in_graph(op, name, value, wanted, results)


def _in_graph(
    op: str, name: str, value: Any, wanted: Range, results: Sequence[Tensor] | None = None
) -> Tensor:
    """A number of a graph as a tensor; the check is of the tensor, where it is one that goes on itself."""
    kind = type(value)
    if kind is not float and kind is not int:
        value = _real(op, name, value)
    out = number_in_graph(value)
    if not _known(wanted.holds(value)):
        text = f"{op}: {name} must be {wanted.words}"
        bad = (~wanted.holds(out)).to(torch.int32)
        torch.ops.cfl_ops.raise_if_.default(
            text, [out] if results is None else list(results), bad, [out.clone()]
        )
    return out


def number_in_graph(value: float) -> Tensor:
    """A number as a 0-d float64 tensor.

    torch.compile makes one graph for all values of a number that is multiplied; with torch.tensor it would not.
    """
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def _known(condition: Any) -> bool:
    """Whether a condition on a number holds for all values that it may have in a graph."""
    return torch.fx.experimental.symbolic_shapes.statically_known_true(condition)


def integer(op: str, name: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """An integer from ``least`` to ``most`` (with ``least`` alone, to what an op can be given).

    Integers come from where numbers do, see :func:`number`.
    """
    if type(value) is not int:
        value = _integer(op, name, value)
    if least is not None and not least <= value <= (MOST if most is None else most):
        if most is not None:
            wanted = f"an integer from {least} to {most}"
        else:
            wanted = f"at least {least}" if value < least else "less than 2^63"
        raise ValueError(f"cfl_ops.{op}: {name} must be {wanted}, but got {value}")
    out: int = value
    return out


def numbers(op: str, name: str, values: Any) -> Tensor:
    """A sequence of numbers that are finite and >= 0, or an array of one dimension, as a float64 tensor."""
    if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) != 1:
        raise TypeError(f"cfl_ops.{op}: {name} must be a sequence of numbers, but got {_shown(values)}")
    if is_compiling():
        return torch.stack([_in_graph(op, name, value, NOT_NEGATIVE) for value in values])
    return torch.tensor([number(op, name, value, NOT_NEGATIVE) for value in values], dtype=torch.float64)


def flag(op: str, name: str, value: Any) -> bool:
    """True or False: Python's, NumPy's, or the one in an array or tensor without dimensions."""
    if value is True or value is False:
        return value
    found = _scalar(value)
    if not isinstance(found, bool):
        raise TypeError(f"cfl_ops.{op}: {name} must be True or False, but got {_shown(value)}")
    return found


def _real(op: str, name: str, value: Any) -> Any:
    found = _scalar(value)
    if isinstance(found, bool) or not isinstance(found, Real | torch.SymFloat | torch.SymInt):
        raise TypeError(f"cfl_ops.{op}: {name} must be a number, but got {_shown(value)}")
    if not isinstance(found, Real):
        return found
    try:
        return float(found)
    except OverflowError:
        return math.inf  # an integer or fraction beyond all floats


def _integer(op: str, name: str, value: Any) -> Any:
    found = _scalar(value)
    if isinstance(found, bool) or not isinstance(found, Integral | torch.SymInt):
        raise TypeError(f"cfl_ops.{op}: {name} must be an integer, but got {_shown(value)}")
    return int(found) if isinstance(found, Integral) else found


def _scalar(value: Any) -> Any:
    """What an array or tensor without dimensions holds (NumPy's numbers are such, too); else the value."""
    if isinstance(value, Tensor) and value.requires_grad:
        return value  # as a number it would lose its gradient
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _shown(value: Any) -> str:
    """The value of a kind that is refused, for a message: its type, and what tells it from one that is not."""
    if isinstance(value, Tensor):
        grad = " that requires grad" if value.requires_grad else ""
        return f"a tensor of {value.dtype} and shape {tuple(value.shape)}{grad}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, str | float) else type(value).__name__


def choice(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """``value`` is one of the words ``allowed``."""
    if not isinstance(value, str):
        raise TypeError(f"cfl_ops.{op}: {name} must be one of {', '.join(allowed)}, but got {_shown(value)}")
    one_of(op, name, value, allowed)


def one_of(op: str, name: str, value: Any, allowed: Iterable[Any]) -> None:
    """``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(
            f"cfl_ops.{op}: {name} must be one of {', '.join(map(str, allowed))}, but got {value!r}"
        )


def coefficient(op: str, name: str, value: Any, device: torch.device) -> Tensor:
    """A penalty as a tensor: a number must be finite and >= 0, and becomes float64; a tensor is checked by the op.

    A number becomes a CPU tensor, so that a schedule does not recompile and no GPU copy is made.
    """
    if type(value) is float and not is_compiling() and 0 <= value < math.inf and not _tracing():
        return _number(value)  # the common case
    if isinstance(value, Tensor):
        given = real_tensor(op, name, value)
        if given.ndim > 0:
            same_device(op, "the features", torch.empty(0, device=device), **{name: given})
        return given
    if isinstance(value, bool | str) or value is None:
        raise TypeError(f"cfl_ops.{op}: {name} must be a number or a tensor, but got {_shown(value)}")
    if is_compiling():
        return _in_graph(op, name, value, NOT_NEGATIVE)
    value = number(op, name, value, NOT_NEGATIVE)
    return number_in_graph(value) if _tracing() else _number(float(value))


def one_coefficient(op: str, name: str, value: Any, device: torch.device) -> Tensor:
    """A :func:`coefficient` of a function that takes no batches: one number, in a tensor without dimensions."""
    out = coefficient(op, name, value, device)
    if out.ndim:
        raise ValueError(
            f"cfl_ops.{op}: {name} must be a number or a 0-d tensor, but got shape {tuple(out.shape)}"
        )
    return out


def penalty(op: str, name: str, value: Any) -> float | Tensor:
    """A tensor, whose data the op checks, or a number that is finite and >= 0."""
    if isinstance(value, Tensor):
        return real_tensor(op, name, value)
    return number(op, name, value, NOT_NEGATIVE)


def real_tensor(op: str, name: str, value: Tensor) -> Tensor:
    """A strided tensor of real numbers: integers become float64."""
    if value.dtype in FLOATS and value.layout is STRIDED:
        return value
    tensor(op, name, value, 0)
    if value.dtype is torch.bool or value.dtype.is_floating_point or value.is_complex() or value.is_quantized:
        raise TypeError(f"cfl_ops.{op}: {name} must be a tensor of real numbers, but got {value.dtype}")
    out: Tensor = value.double()
    return out


def is_zero(value: Any) -> bool:
    """Whether a penalty is the number 0: a tensor, whose data no check reads, is not."""
    return (type(value) is float or not isinstance(value, Tensor | bool)) and bool(value == 0)


_tracing = torch._C._len_torch_dispatch_stack


@functools.lru_cache(maxsize=1024)
def _number(value: float) -> Tensor:
    """The same tensor for the same number, which nobody writes to.

    It outlives the transform that first asked for it, whose wrapper would be an error in the next one.
    """
    with torch.inference_mode(False), temporarily_clear_interpreter_stack():
        return torch.tensor(value, dtype=torch.float64, device="cpu")


def sample_weight(op: str, value: Any, rows: int, of: str) -> None:
    """``value`` holds a floating-point weight for each row; its sign is the op's to check."""
    floating(op, "sample_weight", value, 1)
    size(op, "sample_weight", value, -1, rows, of)
