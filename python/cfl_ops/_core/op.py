"""The torch library ``cfl_ops``, and the one way to define an op.

An op is defined in Python, so that it exists without the compiled extension: a schema, a readable
fallback that works on any device, a fake for the compiler, a vmap rule and (where the mathematics has
one) a derivative. Faster kernels then take over per device: see dispatch.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from cfl_ops._core.batching import CoreDims, vmap_rule

NAMESPACE = "cfl_ops"
LIB = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Derivative:
    """The two statics that torch.autograd.Function and register_autograd share."""

    setup_context: Callable[..., None]
    backward: Callable[..., Any]
    non_differentiable: tuple[str, ...] = ("info",)
    """Results, by their names in the schema, that no gradient passes."""


class Unserved:
    """What a kernel's launcher returns to leave a call to the op's fallback."""


UNSERVED = Unserved()


class Kernel(NamedTuple):
    """A way to run an op on a GPU: a launcher that takes the op's arguments as they are in its schema."""

    backend: str
    load: Callable[[], Callable[..., Any]]
    """Imports the launcher, when it is first called."""


@dataclass
class Op:
    """One defined op, callable with the positional arguments of its schema."""

    name: str
    python: Callable[..., Any]
    cuda: tuple[Kernel, ...] = ()
    """The first that is available serves."""
    composite: bool = False
    """Made of other ops, which obey the choice of backend; it runs under every one of them itself."""
    helper: bool = False
    """A step of composite ops: where a forced backend has no kernel for it, its fallback serves."""
    overload: Any = field(init=False)
    derivative: Derivative | None = None

    def __post_init__(self) -> None:
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def __call__(self, *args: Any) -> Any:
        # register_autograd serves plain autograd and the compiler at no cost to the call. Under functorch
        # transforms it raises, and forward-mode AD would silently see a zero tangent: there the Function
        # takes over, which serves the first and refuses the second.
        if self.derivative is not None and is_compiling():
            if (
                not is_dynamo_compiling() and transforming()
            ):  # a derivative made with torch.func, while it is traced
                return self.function.apply(*args)
        elif self.derivative is not None:
            if transforming():
                return self.function.apply(*args)
            if not (torch.is_grad_enabled() and _any_requires_grad(args)):
                # Its Python wrapper would cost as much as a small call.
                with torch._C._AutoDispatchBelowAutograd():
                    return self.overload(*args)
        return self.overload(*args)

    @functools.cached_property
    def function(self) -> type[torch.autograd.Function]:
        """The op under transforms."""
        assert self.derivative is not None
        return _make_function(self, self.derivative)

    def kernel(self, backend: str) -> Kernel | None:
        """Its GPU kernel of a backend."""
        return next((kernel for kernel in self.cuda if kernel.backend == backend), None)

    def launcher(self, backend: str) -> Callable[..., Any]:
        """That kernel's launcher, imported."""
        kernel = self.kernel(backend)
        if kernel is None:
            raise RuntimeError(f"cfl_ops.{self.name}: has no {backend} kernel for a GPU")
        return kernel.load()


def _any_requires_grad(args: Sequence[Any]) -> bool:
    for arg in args:  # noqa: SIM110  # any() of a generator costs 0.5 us more
        if isinstance(arg, Tensor) and arg.requires_grad:
            return True
    return False


OPS: dict[str, Op] = {}


_transform = torch._C._functorch.peek_interpreter_stack


def transforming() -> bool:
    """Whether a functorch transform or forward-mode AD is at work."""
    return _transform() is not None or forward_ad._current_level >= 0


def define_op(
    schema: str,
    *,
    arguments: type[tuple[Any, ...]] | None = None,
    python: Callable[..., Any],
    fake: Callable[..., Any],
    core_dims: CoreDims | Mapping[str, int] | Callable[[Any], Any],
    derivative: Derivative | None = None,
    cuda: Sequence[Kernel] = (),
    composite: bool = False,
    helper: bool = False,
    tags: Sequence[torch.Tag] = (),
) -> Op:
    """Define an op and everything that the compiler and the transforms need to know of it.

    ``core_dims`` gives, for each argument of the schema, how many trailing dimensions the op itself
    works on (None for what is not a tensor); or it is a function of the arguments that does. All
    dimensions before them are batch dimensions, equal for all arguments when the op is called (see
    expand_batch); so one vmap rule serves every op: move the mapped dimension to the front of the batch
    dimensions and expand. ``cuda`` lists its GPU kernels, the one to prefer first (see _gpu/launch.py).

    ``arguments`` is a named tuple whose fields are the schema's arguments. With it ``python``, ``fake``,
    ``core_dims`` and the launchers take one such tuple, ``setup_context`` takes one as its inputs, and
    ``core_dims`` may name the tensors alone, ``{"x": 2}``: a new option is a field, and what reads it.
    """
    name = schema.split("(", 1)[0]
    assert not (composite and cuda), f"{name}: the kernels of a composite op would never be called"
    if arguments is not None:
        python, fake, core_dims = (
            packed(arguments, python),
            packed(arguments, fake),
            _named(arguments, core_dims),
        )
        cuda = [kernel._replace(load=functools.partial(_load_packed, arguments, kernel)) for kernel in cuda]
        if derivative is not None:
            derivative = _packed_derivative(arguments, derivative)
    python = _contiguous_results(python)
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    LIB.impl(name, python, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=LIB)
    op = Op(name, python, tuple(cuda), composite, helper)
    if arguments is not None:
        named = [argument.name for argument in op.overload._schema.arguments]
        assert [*arguments._fields] == named, f"{name}: {arguments.__name__} is not {named}"  # type: ignore[attr-defined]
    torch.library.register_vmap(qualified, vmap_rule(op.overload, cast("CoreDims", core_dims)), lib=LIB)
    if derivative is not None:
        derivative = _marking(op, derivative)
        _register_autograd(op, derivative)
        op.derivative = derivative
    OPS[name] = op
    return op


def packed(arguments: type[tuple[Any, ...]], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of one named tuple as a function of its fields."""

    @functools.wraps(function)
    def unpacked(*args: Any) -> Any:
        return function(arguments(*args))

    return unpacked


def _load_packed(arguments: type[tuple[Any, ...]], kernel: Kernel) -> Callable[..., Any]:
    return packed(arguments, kernel.load())


def _packed_derivative(arguments: type[tuple[Any, ...]], derivative: Derivative) -> Derivative:
    """The derivative, whose inputs come as one named tuple."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        derivative.setup_context(ctx, arguments(*inputs), output)

    return replace(derivative, setup_context=setup_context)


def _named(arguments: type[tuple[Any, ...]], core_dims: Any) -> CoreDims:
    """Core dimensions by name, or a function of the named tuple, as a function of the fields."""
    fields: tuple[str, ...] = arguments._fields  # type: ignore[attr-defined]

    def of(args: Sequence[Any]) -> Sequence[int | None]:
        declared = core_dims(arguments(*args)) if callable(core_dims) else core_dims
        return [declared.get(field) for field in fields] if isinstance(declared, Mapping) else declared

    return of


def gradients(arguments: type[tuple[Any, ...]], **named: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a derivative returns: the gradients of some arguments, and None for the others."""
    fields: tuple[str, ...] = arguments._fields  # type: ignore[attr-defined]
    assert named.keys() <= set(fields), f"{arguments.__name__} has no {sorted(named.keys() - set(fields))}"
    return tuple(named.get(field) for field in fields)


def _contiguous_results(python: Callable[..., Any]) -> Callable[..., Any]:
    """A fallback whose results have the strides that fakes promise, whatever torch ops left behind."""

    @functools.wraps(python)
    def dense(*args: Any) -> Any:
        out = python(*args)
        if isinstance(out, Tensor):
            return out.contiguous()
        return out if out is None else tuple(value.contiguous() for value in out)

    return dense


def _marking(op: Op, derivative: Derivative) -> Derivative:
    """The derivative, which says which results no gradient passes, in plain autograd and under transforms."""
    returns = [value.name for value in op.overload._schema.returns]
    marked = [i for i, name in enumerate(returns) if name in derivative.non_differentiable]
    if not marked:
        return derivative

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        derivative.setup_context(ctx, inputs, output)
        if isinstance(ctx, torch.autograd.function.FunctionCtx):
            ctx.mark_non_differentiable(*(output[i] for i in marked))

    return replace(derivative, setup_context=setup_context)


def _register_autograd(op: Op, derivative: Derivative) -> None:
    """As torch.library.register_autograd, which takes a millisecond an op: here the first call pays it."""
    kernel: Callable[..., Any] | None = None

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal kernel
        if kernel is None:
            info = torch._library.autograd.Info(derivative.backward, derivative.setup_context)
            kernel = torch._library.autograd.make_autograd_impl(op.overload, info)
        return kernel(keyset, *args, **kwargs)

    LIB.impl(op.name, autograd, "Autograd", with_keyset=True)


def _make_function(op: Op, derivative: Derivative) -> type[torch.autograd.Function]:
    def forward(*args: Any) -> Any:
        return op.overload(*args)

    members = {
        "generate_vmap_rule": True,
        "forward": staticmethod(forward),
        "setup_context": staticmethod(derivative.setup_context),
        "backward": staticmethod(derivative.backward),
    }
    return type(f"{op.name}_function", (torch.autograd.Function,), members)
