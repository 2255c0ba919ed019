"""What an op's arguments must be, asked before its fallback, its fake or a GPU launcher sees them.

An op declares for each of its tensors the dtypes and the names of the trailing sizes, ``{"x": "B D", "y": "int64
B"}``. From that follow the checks here and, since all other dimensions are batch dimensions, the vmap rule. The
bindings in C++ ask the same of the kernels' arguments (csrc/checked.h).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core.checks import FLOATS

_STRIDED = torch.strided

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "float": FLOATS,
    "full": (torch.float32, torch.float64),
    "float64": (torch.float64,),
    "int64": (torch.int64,),
    "uint8": (torch.uint8,),
    "symbols": (torch.uint8, torch.uint16),
    "units": (torch.uint8, torch.int16, torch.int32, torch.int64),
}

Shapes = Mapping[str, str] | Callable[..., Mapping[str, str]]


class TensorRule(NamedTuple):
    """What one tensor must be."""

    dtypes: tuple[torch.dtype, ...]
    sizes: tuple[str, ...] | None
    """The names of its trailing sizes; None where it may have any shape."""


@functools.cache
def tensor_rule(text: str) -> TensorRule:
    """From ``"float64 B D"``: dtypes by a word of DTYPES (else any of FLOATS), then the sizes, or ``...``."""
    words = text.split()
    dtypes = DTYPES.get(words[0]) if words else None
    sizes = words if dtypes is None else words[1:]
    return TensorRule(dtypes or FLOATS, None if sizes == ["..."] else tuple(sizes))


def trailing(shapes: Mapping[str, str]) -> dict[str, int]:
    """How many trailing dimensions of each declared tensor the op itself works on."""
    rules = {field: tensor_rule(text) for field, text in shapes.items()}
    return {field: len(rule.sizes) for field, rule in rules.items() if rule.sizes is not None}


def core_dims(fields: Sequence[str], shapes: Mapping[str, str]) -> list[int | None]:
    """The same for every argument of a schema, None for those that are no such tensors."""
    return list(map(trailing(shapes).get, fields))


class Rule:
    """The declared rule of an op; called with its arguments, it raises for what does not obey."""

    def __init__(
        self,
        name: str,
        fields: Sequence[str],
        shapes: Callable[[Sequence[Any]], Mapping[str, str]],
        required: Sequence[int],
        written: Sequence[int],
        check: Callable[..., Any] | None,
    ) -> None:
        """``required`` are the positions of the tensors that the schema does not call optional."""
        self.name, self.fields, self.shapes, self.written, self.check = name, fields, shapes, written, check
        self.required = required
        self._plans: dict[int, tuple[Mapping[str, str], list[Any]]] = {}

    def __call__(self, args: Sequence[Any], *, symbolic: bool = False) -> None:
        """Raise TypeError or ValueError for the first argument that is not as declared.

        Most calls are right, and told to be with few questions; not where sizes may be symbols of a compiler.
        """
        self._check_given(args)
        shapes = self.shapes(args)
        if symbolic or not self._obeyed(args, shapes):
            self._refuse_tensors(args, shapes)
        if self.check is not None:
            self.check(*args)
        if self.written:
            self._check_writable(args)

    def _check_given(self, args: Sequence[Any]) -> None:
        """Raise for a None, which the dispatcher takes for any tensor."""
        for position in self.required:
            if args[position] is None:
                raise TypeError(
                    f"cfl_ops.{self.name}: {self.fields[position]} must be a tensor, but got None"
                )

    def _obeyed(self, args: Sequence[Any], shapes: Mapping[str, str]) -> bool:
        """Whether the tensors are as declared, of sizes that are numbers."""
        plan = self._plans.get(id(shapes))
        if plan is None:
            places = [(self.fields.index(field), *tensor_rule(text)) for field, text in shapes.items()]
            plan = self._plans[id(shapes)] = shapes, sorted(places, key=lambda place: place[0])
        device = batch = None
        sizes: dict[str, int] = {}
        for position, dtypes, names in plan[1]:
            value = args[position]
            if value is None:
                continue
            if value.dtype not in dtypes or value.layout is not _STRIDED:
                return False
            if device is None:
                device = value.device
            elif value.device != device:
                return False
            if names is None:
                continue
            shape: tuple[int, ...] = value.shape
            head: tuple[int, ...] = ()
            dims = len(shape) - len(names)
            if dims:
                if dims < 0:
                    return False
                head, shape = shape[:dims], shape[dims:]
            elif not names and position not in self.written:
                continue  # a number serves every batch
            if batch is None:
                batch = head
            elif batch != head:
                return False
            for name, size in zip(names, shape):  # noqa: B905  # as many, by dims
                if sizes.setdefault(name, size) != size:
                    return False
        return True

    def _refuse_tensors(self, args: Sequence[Any], shapes: Mapping[str, str]) -> None:
        """Raise for the first tensor that is not as declared."""
        sizes: dict[str, tuple[Any, str]] = {}
        first: tuple[str, Tensor] | None = None
        batch: tuple[str, torch.Size] | None = None
        for position, (field, value) in enumerate(zip(self.fields, args, strict=True)):
            if not isinstance(value, Tensor):
                continue
            dtypes, names = tensor_rule(shapes[field])
            if value.layout is not torch.strided or value.dtype not in dtypes:
                self._refuse_dtype(field, value, dtypes)
            shape = value.shape
            # A number serves every batch, from the CPU too.
            penalty = names == () and not shape and position not in self.written
            if first is None:
                first = field, value
            elif value.device != first[1].device and not (penalty and value.is_cpu):
                raise ValueError(
                    f"cfl_ops.{self.name}: {field} must be on the device of {first[0]} ({first[1].device}), "
                    f"but it is on {value.device}"
                )
            if names is None or penalty:
                continue
            dims = len(shape) - len(names)
            if dims < 0:
                self._refuse_shape(field, value, names, sizes)
            for size, size_name in zip(shape[dims:], names, strict=True):
                known = sizes.setdefault(size_name, (size, field))
                if known[0] is not size and _differ(known[0], size):
                    self._refuse_shape(field, value, names, sizes)
            if batch is None:
                batch = field, shape[:dims]
            elif len(batch[1]) != dims or any(map(_differ, batch[1], shape[:dims])):
                raise ValueError(
                    f"cfl_ops.{self.name}: {field} must have the batch shape {tuple(batch[1])} of {batch[0]}, "
                    f"but got shape {tuple(shape)}"
                )

    def _refuse_dtype(self, field: str, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
        got = value.dtype if value.layout is torch.strided else f"layout {value.layout}"
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"cfl_ops.{self.name}: {field} must be a strided tensor of {wanted}, but got {got}")

    def _refuse_shape(
        self, field: str, value: Tensor, names: tuple[str, ...], sizes: dict[str, tuple[Any, str]]
    ) -> None:
        wanted = ", ".join(
            f"{n} = {sizes[n][0]}" if n in sizes and sizes[n][1] != field else n for n in names
        )
        raise ValueError(
            f"cfl_ops.{self.name}: {field} must have shape (..., {wanted}), but got {tuple(value.shape)}"
        )

    def _check_writable(self, args: Sequence[Any]) -> None:
        """RuntimeError, as torch raises it, where what is written to shares memory."""
        spans = [extent(value) if isinstance(value, Tensor) else None for value in args]
        for position in self.written:
            span = spans[position]
            if span is None:
                continue
            if not args[position].is_contiguous() and shares_within(args[position]):
                raise RuntimeError(
                    f"cfl_ops.{self.name}: {self.fields[position]} must not share memory between its elements to "
                    f"be updated in place, but got shape {tuple(args[position].shape)} with strides "
                    f"{args[position].stride()}"
                )
            for place, other in enumerate(spans):
                if other is None or place == position or span[1] <= other[0] or other[1] <= span[0]:
                    continue
                if shares_memory(args[position], args[place]):
                    raise RuntimeError(
                        f"cfl_ops.{self.name}: {self.fields[position]}, which is updated in place, must not share "
                        f"memory with {self.fields[place]}"
                    )


def _differ(a: Any, b: Any) -> bool:
    """Whether two sizes differ, as far as a compiler can say now; the op asks again when it is called."""
    if type(a) is int and type(b) is int:
        return a != b
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # a second, which only compilers pay

    return bool(guard_or_false(a != b))


def within(op: str, name: str, value: Any, least: int, most: int | None = None) -> None:
    """``value`` is an integer from ``least`` to ``most``; what a compiler does not know yet is asked later."""
    if isinstance(value, torch.SymInt):
        return
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"cfl_ops.{op}: {name} must be {wanted}, but got {value}")


def same_dtype(op: str, name: str, value: Tensor | None, of: str, dtype: torch.dtype) -> None:
    """``value``, where it is given, has the dtype of what ``of`` names."""
    if value is not None and value.dtype != dtype:
        raise TypeError(f"cfl_ops.{op}: {name} must be {dtype} as {of} is, but got {value.dtype}")


# --- which tensors share memory


def extent(value: Tensor) -> tuple[int, int] | None:
    """Its addresses, first and past the last; None where a compiler or a transform stands in for a tensor."""
    if type(value) not in _WITH_MEMORY or value.is_meta or not value.numel():
        return None
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return None
    begin = value.data_ptr()
    if value.is_contiguous():
        return begin, begin + value.numel() * value.element_size()
    sizes, strides = _dense_dims(value)
    last = sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    return begin, begin + (1 + last) * value.element_size()


_WITH_MEMORY = (Tensor, torch.nn.Parameter)


def shares_within(value: Tensor) -> bool:
    """Whether two elements of a tensor are one."""
    sizes, strides = _dense_dims(value)
    return _self_overlap(sizes, strides)


def _dense_dims(value: Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides of the dimensions that have more than one element, by falling stride."""
    dims = sorted(
        ((stride, size) for size, stride in zip(value.shape, value.stride(), strict=True) if size > 1),
        reverse=True,
    )
    return [size for _, size in dims], [stride for stride, _ in dims]


def _self_overlap(sizes: list[int], strides: list[int]) -> bool:
    reach = 0  # from the first to the last element of the dimensions of smaller strides
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        if stride <= reach:
            places = _places(sizes, strides)
            return int(places.unique().numel()) < int(places.numel())
        reach += (size - 1) * stride
    return False


def _places(sizes: list[int], strides: list[int]) -> Tensor:
    """The place of every element, counted from the first."""
    places = torch.zeros((), dtype=torch.int64)
    for size, stride in zip(sizes, strides, strict=True):
        places = places.unsqueeze(-1) + torch.arange(size) * stride
        places = places.flatten()
    return places


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Whether an element of one is an element of the other, of two tensors whose extents overlap."""
    begin_a, begin_b = a.data_ptr(), b.data_ptr()
    bytes_a, bytes_b = a.element_size(), b.element_size()
    (sizes_a, strides_a), (sizes_b, strides_b) = _dense_dims(a), _dense_dims(b)
    if bytes_a != bytes_b or (begin_a - begin_b) % bytes_a:
        return True
    # Two parts of the rows of one matrix, as a head and its bias in [W b].
    period = max(strides_a[:1] + strides_b[:1], default=0)
    if period and _fits(sizes_a, strides_a, period) and _fits(sizes_b, strides_b, period):
        offset = (begin_b - begin_a) // bytes_a % period
        if (
            _reach(sizes_a, strides_a, period) < offset
            and offset + _reach(sizes_b, strides_b, period) < period
        ):
            return False
    apart = (begin_b - begin_a) // bytes_a
    return bool(torch.isin(_places(sizes_a, strides_a), _places(sizes_b, strides_b) + apart).any())


def _fits(sizes: list[int], strides: list[int], period: int) -> bool:
    """Whether the tensor is a run of elements, repeated at each period or not at all."""
    return not strides or strides[0] == period or _reach(sizes, strides, period) < period


def _reach(sizes: list[int], strides: list[int], period: int) -> int:
    """How far the last element of a run is from its first."""
    return sum((n - 1) * s for n, s in zip(sizes, strides, strict=True) if s < period)
