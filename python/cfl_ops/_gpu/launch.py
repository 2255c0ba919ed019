"""The kernels of an op on a GPU, in the order in which they are preferred: ``cuda=(*cuda_cpp(f), triton(g))``.

A launcher of CUDA C++ takes its kernels first, compiled into the extension or by CuPy, then the op's arguments. A
Triton launcher takes the op's arguments; it is named by a string, since importing triton takes a second.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from cfl_ops._core.op import Kernel
from cfl_ops._gpu.native import kernels

Launcher = Callable[..., Any]


def triton(target: str) -> Kernel:
    """A Triton kernel's launcher, ``"module:function"``."""

    def load() -> Launcher:
        module, function = target.split(":")
        launcher: Launcher = getattr(importlib.import_module(module), function)
        return launcher

    return Kernel("triton", load)


def cuda_cpp(launcher: Launcher) -> tuple[Kernel, Kernel]:
    """The launcher with the kernels of the extension, and where it has none with those that CuPy compiles."""

    def load(backend: str) -> Launcher:
        return functools.partial(launcher, kernels(backend))

    return tuple(Kernel(backend, functools.partial(load, backend)) for backend in ("native", "nvrtc"))  # type: ignore[return-value]
