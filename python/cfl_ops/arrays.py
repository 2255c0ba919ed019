"""The public functions for arrays of other libraries: CuPy on a GPU, NumPy on the CPU, without a copy.

``cfl_ops.arrays.f`` is ``cfl_ops.f`` for every public function f: arrays go in through DLPack, and results come
out as arrays of the library that the first array came from, inside the same named tuples; an object, such as that of
``factorize``, comes out as one whose methods take and return arrays. Streams are ordered by the exchange itself
(CuPy's current stream waits for torch's, and the other way round).

In-place functions write to the arrays that they are given, and no other function writes to any. An array that a tensor
cannot stand for (negative strides, a foreign byte order) is copied where it is read, and refused where it would be
written to; a read-only one (a memory map, a broadcast) is read where it is, and never written to.

    >>> import numpy, cfl_ops
    >>> moments = cfl_ops.arrays.gram(numpy.ones((3, 2)))
    >>> moments.gram
    array([[3., 3.],
           [3., 3.]])
    >>> f = cfl_ops.arrays.factorize(numpy.eye(2)[::-1])
    >>> f.solve(numpy.array([[1.0], [2.0]]))
    array([[2.],
           [1.]])
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch.utils.dlpack
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["from_tensors", "to_tensors"]

WRITTEN = {
    "apply_delta_": ("old",),
    "cholesky_downdate_": ("L",),
    "cholesky_downdate_ex_": ("L",),
    "cholesky_update_": ("L",),
    "cholesky_update_ex_": ("L",),
    "decompress": ("out",),
    "gram_": ("m",),
    "huffman_decode": ("out",),
    "proximal_step_": ("weight", "bias"),
    "proximal_step_ex_": ("weight", "bias"),
}
"""The arguments that functions write to; tests/core/test_arrays.py looks whether every function does just this."""


def _is_array(value: Any) -> bool:
    return not isinstance(value, Tensor) and hasattr(value, "__dlpack__") and hasattr(value, "ndim")


def _odd_layout(array: Any) -> str | None:
    """What a tensor cannot have of an array (torch aborts the process for the first, and refuses others)."""
    dtype, strides = getattr(array, "dtype", None), getattr(array, "strides", None) or ()
    itemsize = getattr(dtype, "itemsize", 1) or 1
    if any(stride < 0 for stride in strides):
        return "negative strides"
    if any(stride % itemsize for stride in strides):
        return "strides that are no multiples of its elements"
    if not getattr(dtype, "isnative", True):
        return "another byte order than this machine"
    if not getattr(getattr(array, "flags", None), "aligned", True):
        return "elements at odd addresses"
    return None


def _read_only(array: Any) -> bool:
    """Whether nobody may write to it."""
    immutable = type(array).__module__.split(".")[0] in ("jax", "jaxlib")
    return immutable or not getattr(getattr(array, "flags", None), "writeable", True)


def _to_tensor(array: Any, where: str, written: bool) -> Tensor:
    """``where`` says whose argument it is, "gram: x"."""
    if hasattr(array, "mask") and hasattr(array, "filled"):
        raise TypeError(f"cfl_ops.arrays.{where} must not be a masked array: fill it first")
    odd = _odd_layout(array)
    if written and (odd or _read_only(array)):
        why = f"has {odd}" if odd else "is read-only"
        raise ValueError(f"cfl_ops.arrays.{where} is written to, but the array {why}: give a writable copy")
    try:
        if odd:
            array = array.astype(array.dtype.newbyteorder("="), order="C")
        return torch.utils.dlpack.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(
            f"cfl_ops.arrays.{where} must be an array that torch can read, but got dtype {array.dtype}: {error}"
        ) from error


def _library(array: Any) -> str:
    """The module that makes such arrays: of a subclass in the user's own, that of its base."""
    if hasattr(array, "__array_namespace__"):
        return str(array.__array_namespace__().__name__)
    modules = [kind.__module__.split(".")[0] for kind in type(array).__mro__[:-1]]
    return next((m for m in modules if hasattr(importlib.import_module(m), "from_dlpack")), modules[0])


class _Exchange:
    """What crosses in a call, and later in the methods of its result: arrays in, tensors out."""

    def __init__(self, library: str | None = None) -> None:
        self.library = library
        self.arrays: dict[int, tuple[Tensor, Any]] = {}
        """By the id of its tensor, each array: a result that is an argument comes out as that very array."""

    def enter(self, tree: Any, where: str, written: bool = False) -> Any:
        """The tree with tensors for arrays; ``where`` names it in messages."""

        def leaf(path: Any, value: Any) -> Any:
            if isinstance(value, ArrayResult):
                return value._target
            if not _is_array(value):
                return value
            self.library = self.library or _library(value)
            tensor = _to_tensor(value, where + pytree.keystr(path), written)
            self.arrays[id(tensor)] = tensor, value
            return tensor

        return pytree.tree_map_with_path(leaf, tree)

    def leave(self, tree: Any, where: str) -> Any:
        """The way back."""
        if self.library is None:
            return tree
        return pytree.tree_map(lambda value: self._array(value, where), tree)

    def _array(self, value: Any, where: str) -> Any:
        if not isinstance(value, Tensor):
            return self._object(value) if type(value).__module__.split(".")[0] == "cfl_ops" else value
        if id(value) in self.arrays:
            return self.arrays[id(value)][1]
        assert self.library is not None
        try:
            out = _from_dlpack(self.library)(value.detach())
        except (BufferError, RuntimeError, TypeError) as error:
            raise TypeError(
                f"cfl_ops.arrays.{where}: {self.library} has no array for a tensor of {value.dtype}: {error}"
            ) from error
        if any(
            _read_only(array) and tensor.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
            for tensor, array in self.arrays.values()
        ):
            out.setflags(write=False)  # a view of an array that nobody may write to
        return out

    def _object(self, value: Any) -> ArrayResult:
        """It may hold views of arrays that nobody may write to, so these are remembered."""
        later = _Exchange(self.library)
        later.arrays = {
            key: (tensor, array) for key, (tensor, array) in self.arrays.items() if _read_only(array)
        }
        return ArrayResult(value, later)


def _from_dlpack(library: str) -> Callable[[Tensor], Any]:
    if library == "numpy":
        return Tensor.numpy  # older ones' from_dlpack gives read-only arrays
    function: Callable[[Tensor], Any] = importlib.import_module(library).from_dlpack
    return function


class ArrayResult:
    """A result that is an object: its attributes are arrays, and its methods take and return them."""

    __slots__ = ("_exchange", "_target")

    def __init__(self, target: Any, exchange: _Exchange) -> None:
        self._target, self._exchange = target, exchange

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        where = f"{type(self._target).__name__}.{name}"
        item = getattr(self._target, name)
        return _wrap(item, where, self._exchange) if callable(item) else self._exchange.leave(item, where)

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayResult, (
            self._target,
            _Exchange(self._exchange.library),
        )  # of a copy nothing is read-only

    def __dir__(self) -> list[str]:
        return [name for name in dir(self._target) if not name.startswith("_")]

    def __repr__(self) -> str:
        kind = type(self._target)
        members = (f"{n}()" if callable(getattr(kind, n, None)) else n for n in dir(self))
        return f"<cfl_ops.{kind.__name__} with arrays of {self._exchange.library}: {', '.join(members)}>"


def to_tensors(tree: Any) -> Any:
    """A nest of tuples, lists and dicts with each array as a tensor of the same memory.

    An array that a tensor cannot stand for (negative strides, a foreign byte order) is copied. A tensor cannot say
    that it is read-only: do not write to that of a read-only array.

    Raises:
        TypeError: torch has no such dtype.

    Example:
        >>> import numpy, cfl_ops
        >>> cfl_ops.arrays.to_tensors([numpy.zeros(2), 1])
        [tensor([0., 0.], dtype=torch.float64), 1]
    """
    return _Exchange().enter(tree, "to_tensors: tree")


def from_tensors(tree: Any, library: str) -> Any:
    """The way back, to the arrays of ``library`` (``"cupy"``, ``"numpy"``, whatever has ``from_dlpack``).

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.arrays.from_tensors(torch.zeros(2), "numpy")
        array([0., 0.], dtype=float32)
    """
    return _Exchange(library).leave(tree, "from_tensors")


def _wrap(function: Callable[..., Any], name: str, within: _Exchange | None = None) -> Callable[..., Any]:
    """The function for arrays; ``within`` the exchange that its object came from."""
    parameters, written = [*inspect.signature(function).parameters], WRITTEN.get(name, ())

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        exchange = _Exchange(within.library if within else None)
        exchange.arrays |= within.arrays if within else {}

        def enter(argument: str, value: Any) -> Any:
            return exchange.enter(value, f"{name}: {argument}", argument in written)

        # More arguments than there are parameters are the function's to refuse.
        names = parameters + ["an argument"] * (len(args) - len(parameters))
        tensors = [enter(argument, value) for argument, value in zip(names, args, strict=False)]
        named = {argument: enter(argument, value) for argument, value in kwargs.items()}
        return exchange.leave(function(*tensors, **named), name)

    return call


def __getattr__(name: str) -> Any:
    import cfl_ops

    item = getattr(cfl_ops, name, None)
    if name not in cfl_ops.__all__ or not callable(item) or isinstance(item, type):
        raise AttributeError(f"module 'cfl_ops.arrays' has no attribute {name!r}")
    return _wrap(item, name)


def __dir__() -> list[str]:
    import cfl_ops

    functions = [
        n
        for n in cfl_ops.__all__
        if callable(getattr(cfl_ops, n)) and not isinstance(getattr(cfl_ops, n), type)
    ]
    return sorted([*__all__, *functions])
