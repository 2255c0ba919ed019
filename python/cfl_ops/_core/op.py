"""The torch library ``cfl_ops``, and the one way to define an op.

An op is defined in Python, so that it exists without the compiled extension: a schema, a readable
fallback that works on any device, a fake for the compiler, a vmap rule and (where the mathematics has
one) a derivative. Faster kernels then take over per device: see dispatch.py.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch._C._functorch import CInterpreter, TransformType
from torch._functorch.pyfunctorch import coerce_cinterpreter
from torch.autograd import forward_ad
from torch.compiler import is_compiling, is_dynamo_compiling

from cfl_ops._core.arguments import Rule, Shapes, core_dims
from cfl_ops._core.autocast import without_autocast
from cfl_ops._core.batching import vmap_rule
from cfl_ops._core.forward_mode import jvp_of, save_for_forward

NAMESPACE = "cfl_ops"
# Looked up once: a call in place asks all of them, in a microsecond.
_transform = torch._C._functorch.peek_interpreter_stack
_grad_enabled = torch.is_grad_enabled
_increment_version = torch._C._increment_version
_autocast_enabled = torch._C._is_any_autocast_enabled
_BelowAutograd = torch._C._AutoDispatchBelowADInplaceOrView
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
    written: tuple[int, ...] = ()
    """The positions of the arguments that it writes to."""
    as_data: tuple[int, ...] = ()
    """The positions of those that an op in place takes as data: they may require a gradient, and get none."""
    rule: Callable[[Sequence[Any]], None] = field(default=lambda args: None, repr=False)
    """Raises for arguments that are not as declared."""
    overload: Any = field(init=False)
    watched: tuple[int, ...] = field(init=False)
    """The positions of the tensors of an op in place that may not require a gradient."""
    derivative: Derivative | None = None
    vmap: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        tensors = [i for i, a in enumerate(self.overload._schema.arguments) if "Tensor" in str(a.type)]
        self.watched = tuple(i for i in tensors if i not in self.as_data)
        given = [str(self.overload._schema.arguments[i].type) == "Tensor" for i in self.written]
        first, last = min(self.written, default=0), max(self.written, default=0)
        # What is written, where that is a run of arguments which are always given: a slice is made in no time.
        self._span = slice(first, last + 1) if all(given) and last - first + 1 == len(given) else None

    def __call__(self, *args: Any) -> Any:
        if self.written:
            return self._write(args)
        # register_autograd serves plain autograd and the compiler at no cost to the call. Under functorch
        # transforms it raises, and forward-mode AD would silently see a zero tangent: there the Function
        # takes over, which serves both.
        if self.derivative is not None:
            compiling = is_compiling()
            if transforming() if compiling else (_transform() is not None or forward_ad._current_level >= 0):
                return self._transformed(args)
            if not compiling and not (_grad_enabled() and _any_requires_grad(args)):
                # Its Python wrapper would cost as much as a small call.
                with torch._C._AutoDispatchBelowAutograd():
                    return self.overload(*args)
        return self.overload(*args)

    def _transformed(self, args: tuple[Any, ...]) -> Any:
        """The call under a transform, which Dynamo can trace neither here nor in the formulas of derivatives."""
        if "torch._dynamo" not in sys.modules:
            return self.function.apply(*args)
        if is_dynamo_compiling():
            torch._dynamo.graph_break(
                msg=f"cfl_ops.{self.name} is differentiated by a transform of torch.func"
            )
        return torch.compiler.disable(self.function.apply)(*args)

    def _write(self, args: tuple[Any, ...]) -> Any:
        """The call of an op in place: what its kernel under autograd's key does, without the way through there."""
        if is_compiling() or _transform() is not None or forward_ad._current_level >= 0:
            return self.overload(*args)
        if _grad_enabled():
            for i in self.watched:
                arg = args[i]
                if arg is not None and arg.requires_grad:
                    self.refuse_gradients(args)
        with _BelowAutograd():
            out = self.overload(*args)
        self.bump_versions(args)
        return out

    def check(self, args: Sequence[Any]) -> None:
        """Raise what a call would raise for these arguments, whatever their data."""
        self.rule(args)
        if self.written:
            self.refuse_gradients(args)

    def bump_versions(self, args: Sequence[Any]) -> None:
        """Tell autograd what was written: a backward pass that needs what was there before then raises."""
        _increment_version(
            args[self._span] if self._span else [args[i] for i in self.written if args[i] is not None]
        )

    def refuse_gradients(self, args: Sequence[Any]) -> None:
        """Raise where a derivative would be lost: an op in place takes no part in autograd."""
        enabled, forward = torch.is_grad_enabled(), forward_ad._current_level >= 0
        for position, arg in enumerate(args):
            if not isinstance(arg, Tensor) or position in self.as_data:
                continue
            if (enabled and arg.requires_grad) or (forward and _has_tangent(arg)):
                name = self.overload._schema.arguments[position].name
                has = "requires grad" if enabled and arg.requires_grad else "has a tangent"
                raise RuntimeError(
                    f"cfl_ops.{self.name}: {name} {has}, but an update in place takes no part in autograd: "
                    "use the form without an underscore, detach(), or torch.no_grad()"
                )

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


def _has_tangent(value: Tensor) -> bool:
    return forward_ad.unpack_dual(value).tangent is not None


def _any_requires_grad(args: Sequence[Any]) -> bool:
    for arg in args:  # noqa: SIM110  # any() of a generator costs 0.5 us more
        if isinstance(arg, Tensor) and arg.requires_grad:
            return True
    return False


def _lost(args: Sequence[Any]) -> bool:
    """Whether plain autograd would lose a derivative that a transform, or forward-mode AD, asks for."""
    if _transform() is not None and torch.is_grad_enabled() and _any_requires_grad(args):
        return True
    forward = torch._C._is_fwd_grad_enabled()
    return forward and any(isinstance(arg, Tensor) and _has_tangent(arg) for arg in args)


OPS: dict[str, Op] = {}


def transforming() -> bool:
    """Whether a functorch transform or forward-mode AD is at work.

    In what is compiled, one that differentiates: under vmap alone it is the op that is traced.
    """
    if is_compiling():
        return forward_ad._current_level >= 0 or _differentiating()
    return _transform() is not None or forward_ad._current_level >= 0


def _differentiating() -> bool:
    """Whether a functorch transform differentiates, asked as Dynamo can trace it."""
    interpreter = _transform()
    if not isinstance(interpreter, CInterpreter):
        return False
    transform = coerce_cinterpreter(interpreter)
    if transform.key() != TransformType.Vmap:
        return True
    with transform.lower():
        return _differentiating()


def define_op(
    schema: str,
    *,
    arguments: type[tuple[Any, ...]] | None = None,
    python: Callable[..., Any],
    fake: Callable[..., Any],
    shapes: Shapes,
    check: Callable[..., Any] | None = None,
    derivative: Derivative | None = None,
    cuda: Sequence[Kernel] = (),
    composite: bool = False,
    helper: bool = False,
    as_data: Sequence[str] = (),
    no_vmap: str | None = None,
    tags: Sequence[torch.Tag] = (),
) -> Op:
    """Define an op and everything that the compiler and the transforms need to know of it.

    ``shapes`` gives, for each tensor of the schema, its dtypes and the names of the trailing sizes that the
    op itself works on, ``{"x": "B D", "y": "int64 B"}`` (see arguments.py); or it is a function of the
    arguments that does. All dimensions before them are batch dimensions, equal for all arguments when the op
    is called (see expand_batch). ``check`` raises for all else that is wrong: numbers out of their range,
    dtypes that do not go together. Both are asked wherever Python serves the op; the bindings of the
    extension ask the same in C++ (csrc/checked.h). One vmap rule serves every op: move the mapped dimension
    to the front of the batch dimensions and expand; ``no_vmap`` says why it cannot. ``cuda`` lists its GPU
    kernels, the one to prefer first (see _gpu/launch.py).

    An op whose schema marks arguments as written takes no part in autograd: it raises where an argument
    requires grad (but those of ``as_data``), and counts up the versions of what it writes.

    ``arguments`` is a named tuple whose fields are the schema's arguments. With it ``python``, ``fake``,
    ``shapes``, ``check`` and the launchers take one such tuple, and ``setup_context`` takes one as its
    inputs: a new option is a field, and what reads it.
    """
    name = schema.split("(", 1)[0]
    assert not (composite and cuda), f"{name}: the kernels of a composite op would never be called"
    if arguments is not None:
        python, fake = packed(arguments, python), packed(arguments, fake)
        shapes = packed(arguments, shapes) if callable(shapes) else shapes
        check = None if check is None else packed(arguments, check)
        cuda = [kernel._replace(load=functools.partial(_load_packed, arguments, kernel)) for kernel in cuda]
        if derivative is not None:
            derivative = _packed_derivative(arguments, derivative)
    LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    declared = getattr(getattr(torch.ops, NAMESPACE), name).default._schema.arguments
    fields = [argument.name for argument in declared]
    if arguments is not None:
        assert [*arguments._fields] == fields, f"{name}: {arguments.__name__} is not {fields}"  # type: ignore[attr-defined]
    written = [i for i, a in enumerate(declared) if a.alias_info is not None and a.alias_info.is_write]

    def shapes_of(args: Sequence[Any]) -> Mapping[str, str]:
        return shapes(*args) if callable(shapes) else shapes

    required = [i for i, argument in enumerate(declared) if str(argument.type) == "Tensor"]
    rule = Rule(name, fields, shapes_of, required, written, check)
    python = _guarded(rule, python)
    op = Op(
        name, python, tuple(cuda), composite, helper, tuple(written), tuple(map(fields.index, as_data)), rule
    )
    LIB.impl(name, python, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, _checked_fake(rule, fake), lib=LIB)
    dims = _refusing(name, no_vmap) if no_vmap else lambda args: core_dims(fields, shapes_of(args))
    op.vmap = vmap_rule(op, op.overload._schema, dims)
    # A call that came through the dispatcher goes on there.
    torch.library.register_vmap(qualified, vmap_rule(op.overload, op.overload._schema, dims), lib=LIB)
    if derivative is not None:
        derivative = _marking(op, derivative)
        _register_autograd(op, derivative)
        op.derivative = derivative
    if written:
        _register_writing(op)
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


def gradients(arguments: type[tuple[Any, ...]], **named: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a derivative returns: the gradients of some arguments, and None for the others."""
    fields: tuple[str, ...] = arguments._fields  # type: ignore[attr-defined]
    assert named.keys() <= set(fields), f"{arguments.__name__} has no {sorted(named.keys() - set(fields))}"
    return tuple(named.get(field) for field in fields)


def _checked_fake(rule: Rule, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake, of arguments that are as declared as far as a compiler can tell."""

    @functools.wraps(fake)
    def checked(*args: Any) -> Any:
        rule(args, symbolic=True)
        return fake(*args)

    return checked


def _guarded(rule: Rule, python: Callable[..., Any]) -> Callable[..., Any]:
    """A fallback that is given what the op declares, computes in the dtypes of its arguments, and whose results
    have the strides that fakes promise, whatever torch ops left behind.
    """
    computed = below_autograd(python) if rule.written else python
    without = without_autocast(computed)

    @functools.wraps(python)
    def guarded(*args: Any) -> Any:
        rule(args)
        out = without(*args) if _autocast_enabled() else computed(*args)
        if isinstance(out, Tensor):
            return out.contiguous()
        return out if out is None else tuple([value.contiguous() for value in out])

    return guarded


def below_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Python kernel of an op in place: what it writes with torch ops is the op's to tell autograd."""

    @functools.wraps(function)
    def below(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return function(*args)

    return below


def _refusing(name: str, reason: str) -> Callable[[Any], NoReturn]:
    """The core dimensions of an op that has no vmap rule: an error."""

    def dims(args: Any) -> NoReturn:
        raise RuntimeError(f"cfl_ops.{name.rstrip('_')}: {reason}")

    return dims


def _marking(op: Op, derivative: Derivative) -> Derivative:
    """The derivative, which says which results no gradient passes, in plain autograd and under transforms."""
    marked = [i for i, passes in enumerate(_differentiable(op, derivative)) if not passes]
    backward = without_autocast(derivative.backward)
    if not marked:
        return replace(derivative, backward=backward)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        derivative.setup_context(ctx, inputs, output)
        if isinstance(ctx, torch.autograd.function.FunctionCtx):
            ctx.mark_non_differentiable(*(output[i] for i in marked))

    return replace(derivative, setup_context=setup_context, backward=backward)


def _differentiable(op: Op, derivative: Derivative) -> list[bool]:
    """For each result whether gradients pass it."""
    return [value.name not in derivative.non_differentiable for value in op.overload._schema.returns]


def _register_writing(op: Op) -> None:
    """What torch's own ops in place do above their kernels, for calls that come through the dispatcher."""
    below_views = torch._C._after_ADInplaceOrView_keyset

    def autograd(keyset: Any, *args: Any) -> Any:
        op.refuse_gradients(args)
        return views(keyset, *args)

    def views(keyset: Any, *args: Any) -> Any:
        out = op.overload.redispatch(keyset & below_views, *args)
        op.bump_versions(args)
        return out

    def negative(*args: Any) -> Any:
        # torch's own kernel for the negative bit (z.conj().imag) takes one written argument, which is returned.
        plain = [arg.resolve_neg() if isinstance(arg, Tensor) else arg for arg in args]
        with torch._C._AutoDispatchBelowADInplaceOrView():
            out = op.overload(*plain)
            for i in op.written:
                if plain[i] is not args[i]:
                    args[i].copy_(plain[i])
        return out

    LIB.impl(op.name, autograd, "Autograd", with_keyset=True)
    LIB.impl(op.name, views, "ADInplaceOrView", with_keyset=True)
    LIB.impl(op.name, negative, "Negative")


def _register_autograd(op: Op, derivative: Derivative) -> None:
    """As torch.library.register_autograd, which takes a millisecond an op: here the first call pays it."""
    kernel: Callable[..., Any] | None = None

    def autograd(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal kernel
        if transforming() and _lost(args):
            raise RuntimeError(
                f"cfl_ops.{op.name}: torch.ops.{NAMESPACE}.{op.name} takes part in plain autograd only, but a "
                "transform of torch.func or forward_ad asks for its derivative: call the function of cfl_ops"
            )
        if kernel is None:
            info = torch._library.autograd.Info(derivative.backward, derivative.setup_context)
            kernel = torch._library.autograd.make_autograd_impl(op.overload, info)
        return kernel(keyset, *args, **kwargs)

    LIB.impl(op.name, autograd, "Autograd", with_keyset=True)


def _make_function(op: Op, derivative: Derivative) -> type[torch.autograd.Function]:
    def forward(*args: Any) -> Any:
        return op.overload(*args)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        derivative.setup_context(ctx, inputs, output)
        save_for_forward(ctx, inputs, output)

    passing = _differentiable(op, derivative)
    assert op.vmap is not None, f"{op.name}: no vmap rule"
    members = {
        "vmap": staticmethod(op.vmap),
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(derivative.backward),
        "jvp": staticmethod(jvp_of(derivative.setup_context, derivative.backward, passing)),
    }
    return type(f"{op.name}_function", (torch.autograd.Function,), members)
