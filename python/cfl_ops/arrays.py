"""The public functions for arrays of other libraries: CuPy on a GPU, NumPy on the CPU, without a copy.

``cfl_ops.arrays.f`` is ``cfl_ops.f`` for every public function f: arrays go in through DLPack, and results come
out as arrays of the library that the first array came from, inside the same named tuples. Streams are ordered
by the exchange itself (CuPy's current stream waits for torch's, and the other way round). In-place functions
write to the arrays that they are given.

    >>> import numpy, cfl_ops
    >>> moments = cfl_ops.arrays.gram(numpy.ones((3, 2)))
    >>> moments.gram
    array([[3., 3.],
           [3., 3.]])
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch.utils.dlpack
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["from_tensors", "to_tensors"]


def _is_array(value: Any) -> bool:
    return not isinstance(value, Tensor) and hasattr(value, "__dlpack__") and hasattr(value, "ndim")


def to_tensors(tree: Any) -> Any:
    """A nest of tuples, lists and dicts with each array as a tensor of the same memory.

    Example:
        >>> import numpy, cfl_ops
        >>> cfl_ops.arrays.to_tensors([numpy.zeros(2), 1])
        [tensor([0., 0.], dtype=torch.float64), 1]
    """
    return pytree.tree_map(
        lambda leaf: torch.utils.dlpack.from_dlpack(leaf) if _is_array(leaf) else leaf, tree
    )


def from_tensors(tree: Any, library: str) -> Any:
    """The way back, to the arrays of ``library`` (``"cupy"``, ``"numpy"``, whatever has ``from_dlpack``).

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.arrays.from_tensors(torch.zeros(2), "numpy")
        array([0., 0.], dtype=float32)
    """
    from_dlpack = importlib.import_module(library).from_dlpack
    return pytree.tree_map_only(Tensor, lambda leaf: from_dlpack(leaf.detach()), tree)


def _wrap(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        library = next((type(leaf).__module__.split(".")[0] for leaf in leaves if _is_array(leaf)), None)
        args, kwargs = to_tensors((args, kwargs))
        out = function(*args, **kwargs)
        return out if library is None else from_tensors(out, library)

    return call


def __getattr__(name: str) -> Any:
    import cfl_ops

    item = getattr(cfl_ops, name, None)
    if name not in cfl_ops.__all__ or not callable(item) or isinstance(item, type):
        raise AttributeError(f"module 'cfl_ops.arrays' has no attribute {name!r}")
    return _wrap(item)


def __dir__() -> list[str]:
    import cfl_ops

    functions = [
        n
        for n in cfl_ops.__all__
        if callable(getattr(cfl_ops, n)) and not isinstance(getattr(cfl_ops, n), type)
    ]
    return sorted([*__all__, *functions])
