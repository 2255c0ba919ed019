"""The torch library ``cfl_ops``, and the one way to define an op.

An op is defined in Python, so that it exists without the compiled extension: a schema, a readable
fallback that works on any device, a fake for the compiler, a vmap rule and (where the mathematics has
one) a derivative. Faster kernels then take over per device:

* ``native``: C++ on the CPU (registered by ``cfl_ops._C``), CUDA C++ on a GPU where it is compiled in;
* ``triton``: a launcher in ``cfl_ops.triton_kernels``, imported when it is first needed;
* ``nvrtc``: the same CUDA C++ compiled at run time, where it is not compiled in and CuPy is installed;
* ``python``: the fallback.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "cfl_ops"
BACKENDS = ("python", "triton", "native", "nvrtc")
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}

CoreDims = Sequence[int | None] | Callable[[Sequence[Any]], Sequence[int | None]]

_LIB = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class Derivative:
    """The two statics that torch.autograd.Function and register_autograd share."""

    setup_context: Callable[..., None]
    backward: Callable[..., Any]


@dataclass
class Op:
    """One defined op, callable with the positional arguments of its schema."""

    name: str
    python: Callable[..., Any]
    triton: str | None
    """``module:function`` below ``cfl_ops.triton_kernels``, or None."""
    cuda: str | None = None
    """``module:function`` below ``cfl_ops``, which drives kernels of csrc/cuda: their backend (see _cuda.py),
    then the op's arguments."""
    cuda_first: bool = False
    """Its CUDA C++ goes before its Triton kernel, where both could serve."""
    composite: bool = False
    """Made of other ops, which obey the choice of backend; it runs under every one of them itself."""
    helper: bool = False
    """A step of composite ops: where a forced backend has no kernel for it, its fallback serves."""
    overload: Any = field(init=False)
    function: type[torch.autograd.Function] | None = None

    def __post_init__(self) -> None:
        self.overload = getattr(getattr(torch.ops, NAMESPACE), self.name).default

    def __call__(self, *args: Any) -> Any:
        # register_autograd serves plain autograd and the compiler at no cost to the call. Under functorch
        # transforms it raises, and forward-mode AD would silently see a zero tangent: there the Function
        # takes over, which serves the first and refuses the second.
        if self.function is not None and not torch.compiler.is_compiling():
            if _transforming():
                return self.function.apply(*args)
            if not (torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)):
                with (
                    torch._C._AutoDispatchBelowAutograd()
                ):  # its Python wrapper would cost as much as a small call
                    return self.overload(*args)
        return self.overload(*args)

    def load_triton(self) -> Callable[..., Any]:
        """The Triton launcher; imports triton."""
        if self.triton is None:
            raise RuntimeError(f"cfl_ops.{self.name}: has no Triton kernel")
        module, function = self.triton.split(":")
        launcher: Callable[..., Any] = getattr(
            importlib.import_module(f"cfl_ops.triton_kernels.{module}"), function
        )
        return launcher

    def load_cuda(self, backend: str) -> Callable[..., Any]:
        """The launcher of CUDA C++ kernels, compiled in (``"native"``) or by CuPy (``"nvrtc"``)."""
        assert self.cuda is not None
        module, function = self.cuda.split(":")
        launcher = getattr(importlib.import_module(f"{__package__}.{module}"), function)
        kernels = importlib.import_module(f"{__package__}._cuda").kernels(backend)
        return functools.partial(launcher, kernels)

    def has_kernel(self, device_type: str) -> bool:
        """Whether the extension registered a kernel for this device type."""
        return (self.name, device_type) in _native


OPS: dict[str, Op] = {}
_native: set[tuple[str, str]] = set()


def _transforming() -> bool:
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def define_op(
    schema: str,
    *,
    python: Callable[..., Any],
    fake: Callable[..., Any],
    core_dims: CoreDims,
    derivative: Derivative | None = None,
    triton: str | None = None,
    cuda: str | None = None,
    cuda_first: bool = False,
    composite: bool = False,
    helper: bool = False,
    tags: Sequence[torch.Tag] = (),
) -> Op:
    """Define an op and everything that the compiler and the transforms need to know of it.

    ``core_dims`` gives, for each argument of the schema, how many trailing dimensions the op itself
    works on (None for what is not a tensor); or it is a function of the arguments that does. All
    dimensions before them are batch dimensions, equal for all arguments when the op is called (see
    expand_batch); so one vmap rule serves every op: move the mapped dimension to the front of the batch
    dimensions and expand.
    """
    name = schema.split("(", 1)[0]
    python = _contiguous_results(python)
    _LIB.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIB.impl(name, python, "CompositeExplicitAutograd")
    qualified = f"{NAMESPACE}::{name}"
    torch.library.register_fake(qualified, fake, lib=_LIB)
    op = Op(name, python, triton, cuda, cuda_first, composite, helper)
    torch.library.register_vmap(qualified, _vmap_rule(op.overload, core_dims), lib=_LIB)
    if derivative is not None:
        torch.library.register_autograd(
            qualified, derivative.backward, setup_context=derivative.setup_context, lib=_LIB
        )
        op.function = _make_function(op, derivative)
    OPS[name] = op
    return op


def _contiguous_results(python: Callable[..., Any]) -> Callable[..., Any]:
    """A fallback whose results have the strides that fakes promise, whatever torch ops left behind."""

    @functools.wraps(python)
    def dense(*args: Any) -> Any:
        out = python(*args)
        if isinstance(out, Tensor):
            return out.contiguous()
        return out if out is None else tuple(value.contiguous() for value in out)

    return dense


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


def _vmap_rule(overload: Any, declared: CoreDims) -> Callable[..., tuple[Any, Any]]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        core_dims = declared(args) if callable(declared) else declared
        batch_ndim = max(
            arg.ndim - core - (dim is not None)
            for arg, core, dim in zip(args, core_dims, in_dims, strict=True)
            if core is not None and arg is not None
        )

        def front(arg: Any, core: int | None, dim: int | None) -> Any:
            if core is None or arg is None or dim is None:
                return arg
            arg = arg.movedim(dim, 0)
            missing = batch_ndim - (arg.ndim - core - 1)
            return arg.reshape(arg.shape[:1] + (1,) * missing + arg.shape[1:]) if missing else arg

        moved = [front(*item) for item in zip(args, core_dims, in_dims, strict=True)]
        expanded = expand_batch(moved, core_dims)
        for argument, before, after in zip(overload._schema.arguments, moved, expanded, strict=True):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and before is not None and before.shape != after.shape:
                raise RuntimeError(
                    f"{overload._schema.name.replace('::', '.')}: vmap cannot update {argument.name} in "
                    "place, which is shared by the mapped calls"
                )
        out = overload(*expanded)
        if out is None:
            return None, None
        return (out, 0) if isinstance(out, Tensor) else (out, tuple(0 for _ in out))

    return rule


# --- backends ---------------------------------------------------------------------------------------------


def extension_available() -> bool:
    """Whether the compiled extension is installed (a broken one is loud when it is imported)."""
    return importlib.util.find_spec(f"{__package__}._C") is not None


def triton_available() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, hence on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class _Overrides:
    """The kernels that Python puts over (or instead of) those the extension registered."""

    def __init__(self) -> None:
        self.library: torch.library.Library | None = None
        self.forced: str | None = None
        self.serving: dict[tuple[str, str], str] = {}

    def install(self, forced: str | None) -> None:
        if forced is not None and forced not in BACKENDS:
            raise ValueError(f"cfl_ops: backend must be one of {', '.join(BACKENDS)}, but got {forced!r}")
        if forced == "triton" and not triton_available():
            raise RuntimeError("cfl_ops: the backend 'triton' was asked for, but triton is not installed")
        if forced == "native" and not extension_available():
            raise RuntimeError(
                "cfl_ops: the backend 'native' was asked for, but the extension cfl_ops._C is not installed"
            )
        if forced == "nvrtc" and not _cuda().nvrtc_available():
            raise RuntimeError("cfl_ops: the backend 'nvrtc' was asked for, but cupy is not installed")
        if self.library is not None:
            self.library._destroy()
        self.library = torch.library.Library(NAMESPACE, "IMPL")
        with (
            warnings.catch_warnings()
        ):  # torch says that a kernel is overridden, which is what we are here for
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            self._put_kernels(self.library, forced)

    def _put_kernels(self, library: torch.library.Library, forced: str | None) -> None:
        self.forced = forced
        for op in OPS.values():
            for device_type, key in DISPATCH_KEYS.items():
                backend, kernel = _choose(op, device_type, forced)
                self.serving[op.name, device_type] = backend
                if kernel is not None:
                    guarded = _on_its_device(kernel) if device_type == "cuda" else kernel
                    library.impl(op.name, guarded, key, allow_override=True)


_overrides = _Overrides()


def _choose(op: Op, device_type: str, forced: str | None) -> tuple[str, Callable[..., Any] | None]:
    """The backend that serves an op on a device, and the kernel to put over the registered one."""
    if op.composite:
        return "composite", None
    native = op.has_kernel(device_type)
    triton = op.triton is not None and (device_type == "cuda" or triton_interpreted())
    cuda = op.cuda is not None and device_type == "cuda"
    compiled = cuda and _cuda().native_available()
    if forced is None:
        # On a GPU Triton comes first, but for the ops that say otherwise.
        if device_type == "cuda" and op.triton is not None and triton_available():
            triton_first = not op.cuda_first or not (compiled or (cuda and _cuda().nvrtc_available()))
            if triton_first:
                return "triton", _lazy(op.load_triton)
        if native or compiled:
            return "native", None if native else _lazy(functools.partial(op.load_cuda, "native"))
        if cuda and _cuda().nvrtc_available():
            return "nvrtc", _lazy(functools.partial(op.load_cuda, "nvrtc"))
        return "python", None
    if forced == "python":
        return "python", op.python if native else None
    if forced == "native" and (native or compiled):
        return "native", None if native else _lazy(functools.partial(op.load_cuda, "native"))
    if forced == "nvrtc" and cuda:
        return "nvrtc", _lazy(functools.partial(op.load_cuda, "nvrtc"))
    if forced == "triton" and triton:
        return "triton", _lazy(op.load_triton)
    if op.helper:
        return "python", op.python if native else None
    return "none", _refuse(op, device_type, forced)


def _cuda() -> Any:
    return importlib.import_module(f"{__package__}._cuda")


def _lazy(load: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
    """A kernel that is imported when it is first called."""
    launcher: Callable[..., Any] | None = None

    def launch(*args: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = load()
        return launcher(*args)

    return launch


def _on_its_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel with the device of its tensors as the current one: Triton launches there and nowhere else."""

    def launch(*args: Any) -> Any:
        index = next((a.get_device() for a in args if isinstance(a, Tensor) and a.is_cuda), None)
        if index is None or index == torch.cuda.current_device():
            return kernel(*args)
        with torch.cuda.device(index):
            return kernel(*args)

    return launch


def _refuse(op: Op, device_type: str, forced: str) -> Callable[..., Any]:
    hint = ""
    if forced == "triton" and op.triton is not None and device_type == "cpu":
        hint = "; on a CPU its kernels run under TRITON_INTERPRET=1 only"

    def refuse(*args: Any) -> Any:
        raise RuntimeError(
            f"cfl_ops.{op.name}: the backend {forced!r} was asked for, but it cannot serve "
            f"{device_type} tensors{hint}"
        )

    return refuse


def load_backends() -> None:
    """Load the extension and put the chosen kernels in place. Called once, after all ops are defined."""
    if extension_available():
        importlib.import_module(f"{__package__}._C")
        for name in OPS:
            for device_type, key in DISPATCH_KEYS.items():
                if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key):
                    _native.add((name, device_type))
    _overrides.install(os.environ.get("CFL_OPS_BACKEND") or None)


# --- batches and failures -----------------------------------------------------------------------------------


def expand_batch(
    args: Sequence[Any], core_dims: Sequence[int | None], batch: Sequence[int] | None = None
) -> list[Any]:
    """Expand (as views) the batch dimensions of all tensors to the common batch shape.

    A 0-d tensor where the op works on 0 dimensions (a penalty) stays as it is: it serves every batch.
    """
    if batch is None:
        batch = torch.broadcast_shapes(
            *(
                arg.shape[: arg.ndim - core]
                for arg, core in zip(args, core_dims, strict=True)
                if core is not None and arg is not None
            )
        )

    def expand(arg: Any, core: int | None) -> Any:
        if core is None or arg is None or arg.ndim == 0 or arg.shape[: arg.ndim - core] == tuple(batch):
            return arg
        return arg.expand(*batch, *arg.shape[arg.ndim - core :])

    return [expand(arg, core) for arg, core in zip(args, core_dims, strict=True)]


Explain = Callable[[Tensor, Sequence[Tensor]], Exception]
_EXPLAIN: dict[str, Explain] = {}


def explains(name: str) -> Callable[[Explain], Explain]:
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
    if torch.compiler.is_compiling() or _transforming():
        torch.ops.cfl_ops.raise_if_.default(name, list(results), info, list(context))
    else:
        _raise_if(name, results, info, context)


def _raise_if(name: str, results: Sequence[Tensor], info: Tensor, context: Sequence[Tensor]) -> None:
    if info.is_cuda and torch.cuda.is_current_stream_capturing():
        return  # a captured graph cannot synchronise: use the _ex form there
    failed = info.item() != 0 if info.ndim == 0 else bool(info.count_nonzero())  # faster than any()
    if failed:
        raise _EXPLAIN[name](info, context)


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


_LIB.define(
    "raise_if_(str op, Tensor(a!)[] results, Tensor info, Tensor[] context) -> ()",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe),
)
_LIB.impl("raise_if_", _raise_if, "CompositeExplicitAutograd")
torch.library.register_fake("cfl_ops::raise_if_", lambda op, results, info, context: None, lib=_LIB)
torch.library.register_vmap("cfl_ops::raise_if_", _raise_if_vmap, lib=_LIB)


def first_failure(info: Tensor) -> tuple[tuple[int, ...], int, str]:
    """The index of the first failed batch element, its info, and how to name it in a message."""
    index = tuple(int(i) for i in info.nonzero()[0]) if info.ndim else ()
    where = "" if not index else f"(Batch element {index[0] if len(index) == 1 else index}): "
    return index, int(info[index]), where
