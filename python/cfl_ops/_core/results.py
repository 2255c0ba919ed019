"""Result types: what a function returns under names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils._pytree import _register_namedtuple

T = TypeVar("T", bound=type)


def public(cls: T) -> T:
    """A class that says that it is ``cfl_ops``'s own, wherever in the package it is defined."""
    cls.__module__ = "cfl_ops"
    return cls


def result_type(module: str) -> Callable[[T], T]:
    """A named tuple that ``torch.load`` reads, wherever in the package it is defined: pickles name ``cfl_ops``.

    ``module`` is the one whose name stands in files that were written before pickles did.
    """

    def register(cls: T) -> T:
        torch.serialization.add_safe_globals([cls, (cls, f"cfl_ops.{module}.{cls.__name__}")])
        name = f"cfl_ops.{cls.__name__}"
        _register_namedtuple(cls, serialized_type_name=name)  # programs of torch.export are saved with it
        return public(cls)

    return register
