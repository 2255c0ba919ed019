"""Result types: what a function returns under names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils._pytree import _register_namedtuple

T = TypeVar("T", bound=type)


def public(cls: T, home: str = "cfl_ops") -> T:
    """A class that says that it is of ``home``, where users import it, wherever in the package it is defined."""
    cls.__module__ = home
    return cls


def result_type(module: str, home: str = "cfl_ops") -> Callable[[T], T]:
    """A named tuple that ``torch.load`` reads, wherever in the package it is defined: pickles name ``home``.

    ``module`` is the one whose name stands in files that were written before pickles did.
    """

    def register(cls: T) -> T:
        torch.serialization.add_safe_globals([cls, (cls, f"cfl_ops.{module}.{cls.__name__}")])
        name = f"{home}.{cls.__name__}"
        _register_namedtuple(cls, serialized_type_name=name)  # programs of torch.export are saved with it
        return public(cls, home)

    return register
