"""Which backend serves which op on which device.

* ``native``: C++ on the CPU (registered by ``cfl_ops._C``), CUDA C++ on a GPU where it is compiled in;
* ``triton``: a launcher in ``cfl_ops.triton_kernels``, imported when it is first called;
* ``nvrtc``: the same CUDA C++ compiled at run time, where it is not compiled in and CuPy is installed;
* ``python``: the fallback.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfl_ops._core.op import NAMESPACE, OPS, UNSERVED, Kernel, Op, below_autograd

BACKENDS = ("python", "triton", "native", "nvrtc")
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}
INSTRUCTION_SETS = ("generic", "avx2", "avx512", "amx")
"""What CFL_OPS_ISA may be: kIsaNames of csrc/cpu/gram_kernel.h, whose reader the Python fallback does without."""

EXTENSION = "cfl_ops._C"


def extension_available() -> bool:
    """Whether the compiled extension is installed (a broken one is loud when it is imported)."""
    return importlib.util.find_spec(EXTENSION) is not None


def extension_loaded() -> bool:
    """Whether it is in the process, which it is not while the Python fallback was all that was asked for."""
    return EXTENSION in sys.modules


def _load_extension() -> None:
    """Import the extension if it is installed: that registers its kernels."""
    if not extension_available():
        return
    try:
        importlib.import_module(EXTENSION)
    except Exception as error:  # of the dynamic linker, or of what the extension does as it is loaded
        raise ImportError(
            f"cfl_ops: the compiled extension {EXTENSION} cannot be loaded: {error}\n"
            f"It was built with {_built_with()}, and this is torch {torch.__version__}. Build it again against "
            "this torch, with pip install --no-build-isolation --force-reinstall --no-deps and the folder or archive "
            "of cfl_ops, or set CFL_OPS_BACKEND=python to go on without it, with the slower Python fallback.",
            name=EXTENSION,
        ) from error


def _built_with() -> str:
    """The torch that the extension was built with, as it stands in its file (csrc/module.cpp)."""
    spec = importlib.util.find_spec(EXTENSION)
    try:
        data = Path(spec.origin).read_bytes() if spec and spec.origin else b""
    except OSError:
        data = b""
    found = re.search(rb"built with (torch [0-9][\w.+-]*)\0", data)
    return found[1].decode() if found else "a torch of unknown version"


def triton_available() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, hence on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def native_available() -> bool:
    """Whether the extension was linked with its CUDA kernels."""
    return torch._C._dispatch_has_kernel_for_dispatch_key("cfl_ops::cuda_encode", "CUDA")


@functools.cache
def nvrtc_available() -> bool:
    """Whether cupy can be imported (it needs a driver only when a kernel is first launched)."""
    return importlib.util.find_spec("cupy") is not None


_GPU_BACKENDS: dict[str, Callable[[], bool]] = {
    "native": native_available,
    "nvrtc": nvrtc_available,
    "triton": triton_available,
}
_NEEDS: dict[str | None, tuple[Callable[[], bool], str]] = {
    "triton": (triton_available, "triton is not installed"),
    "native": (extension_available, "the extension cfl_ops._C is not installed"),
    "nvrtc": (nvrtc_available, "cupy is not installed"),
}


class _Overrides:
    """The kernels that Python puts over (or instead of) those the extension registered."""

    def __init__(self) -> None:
        self.library: torch.library.Library | None = None
        self.forced: str | None = None
        self.serving: dict[tuple[str, str], str] = {}

    def install(self, forced: str | None) -> None:
        if forced is not None and forced not in BACKENDS:
            raise ValueError(f"cfl_ops: backend must be one of {', '.join(BACKENDS)}, but got {forced!r}")
        if forced in _NEEDS:
            available, missing = _NEEDS[forced]
            if not available():
                raise RuntimeError(f"cfl_ops: the backend {forced!r} was asked for, but {missing}")
        if forced != "python":
            _load_extension()  # now, since what it registers is overridden by what is put in place after it
        if self.library is not None:
            self.library._destroy()
        self.library = torch.library.Library(NAMESPACE, "IMPL")
        with warnings.catch_warnings():
            # torch says that a kernel is overridden, which is what we are here for
            warnings.filterwarnings("ignore", "Warning only once for all operators")
            self._put_kernels(self.library, forced)

    def _put_kernels(self, library: torch.library.Library, forced: str | None) -> None:
        self.forced = forced
        available = {backend for backend, is_there in _GPU_BACKENDS.items() if is_there()}
        for op in OPS.values():
            for device_type, key in DISPATCH_KEYS.items():
                backend, kernel = _choose(op, device_type, forced, available)
                self.serving[op.name, device_type] = backend
                if kernel is not None:
                    guarded = _on_its_device(kernel) if device_type == "cuda" else kernel
                    library.impl(op.name, guarded, key, allow_override=True)


overrides = _Overrides()


def _choose(
    op: Op, device_type: str, forced: str | None, available: set[str]
) -> tuple[str, Callable[..., Any] | None]:
    """The backend that serves an op on a device, and the kernel to put over the registered one."""
    if op.composite:
        return "composite", None
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{NAMESPACE}::{op.name}", DISPATCH_KEYS[device_type]
    )  # by the extension: nothing of ours is in place yet
    fallback = ("python", op.python if registered else None)
    if forced == "python":
        return fallback
    for kernel in _kernels(op, device_type, forced):
        if forced in (None, kernel.backend) and kernel.backend in available:
            return kernel.backend, lazy(kernel, op)
    if registered and forced in (None, "native"):
        return "native", None
    if forced is None or op.helper:
        return fallback
    return "none", _refuse(op, device_type, forced)


def _kernels(op: Op, device_type: str, forced: str | None) -> tuple[Kernel, ...]:
    """The op's kernels for a device, the one to prefer first; on a CPU Triton's interpreter if it is asked for."""
    if device_type == "cuda":
        return op.cuda
    triton = op.kernel("triton")
    return (triton,) if triton and forced == "triton" and triton_interpreted() else ()


def fall_back(op: Op, args: tuple[Any, ...]) -> Any:
    """A call that a kernel left to the op's fallback."""
    return op.python(*args)


def lazy(kernel: Kernel, op: Op) -> Callable[..., Any]:
    """A kernel that is imported when it is first called; what it does not do is the fallback's."""
    launcher: Callable[..., Any] | None = None

    def launch(*args: Any) -> Any:
        nonlocal launcher
        if launcher is None:
            launcher = below_autograd(kernel.load()) if op.written else kernel.load()
        op.rule(args)
        out = launcher(*args)
        return fall_back(op, args) if out is UNSERVED else out

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
    if forced == "triton" and op.kernel("triton") and device_type == "cpu":
        hint = "; on a CPU its kernels run under TRITON_INTERPRET=1 only"

    def refuse(*args: Any) -> Any:
        raise RuntimeError(
            f"cfl_ops.{op.name}: the backend {forced!r} was asked for, but it cannot serve "
            f"{device_type} tensors{hint}"
        )

    return refuse


def load_backends() -> None:
    """Put the kernels in place that the environment chooses. Called once, after all ops are defined.

    The extension is loaded first, unless the Python fallback is forced: then a broken one is no obstacle.
    """
    asked = os.environ.get("CFL_OPS_ISA")
    if asked and asked not in INSTRUCTION_SETS:
        raise ValueError(
            f"cfl_ops: CFL_OPS_ISA must be one of {', '.join(INSTRUCTION_SETS)}, but got {asked!r}"
        )
    overrides.install(os.environ.get("CFL_OPS_BACKEND") or None)
