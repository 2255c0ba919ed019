"""Which backend serves which op, and what this installation can do."""

from __future__ import annotations

import contextlib
import importlib
import platform
from collections.abc import Iterator
from typing import Any

import torch

from cfl_ops._core import checks, dispatch
from cfl_ops._core.op import OPS

__all__ = ["backend_of", "get_backend", "info", "plan_proximal", "set_backend", "show", "use_backend"]


def get_backend() -> str | None:
    """The forced backend (``"python"``, ``"triton"``, ``"native"``, ``"nvrtc"``), or None: automatic choice."""
    return dispatch.overrides.forced


def set_backend(backend: str | None) -> None:
    """Force one backend for every op of this process, or None to choose automatically.

    The environment variable ``CFL_OPS_BACKEND`` does the same at import. With ``python`` there, the compiled
    extension is not even loaded, until another backend (or None) is set: a broken one is no obstacle.

    Args:
        backend: ``"python"``, ``"triton"``, ``"native"``, ``"nvrtc"`` (the CUDA C++ kernels compiled at run
            time by CuPy) or None. An op that the backend cannot serve on
            the device of its arguments raises ``RuntimeError`` when it is called.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is not installed.
        ImportError: the compiled extension cannot be loaded.

    """
    dispatch.overrides.install(backend)


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Force a backend inside a ``with`` block (process-wide, so not for threads that differ).

    Example:
        >>> import cfl_ops
        >>> with cfl_ops.config.use_backend("python"):
        ...     cfl_ops.config.backend_of("gram", "cpu")
        'python'

    """
    previous = get_backend()
    set_backend(backend)
    try:
        yield
    finally:
        set_backend(previous)


def backend_of(op: str, device_type: str) -> str:
    """The backend that serves ``op`` on ``"cpu"`` or ``"cuda"``; ``"none"`` if the forced one cannot."""
    if (op, device_type) not in dispatch.overrides.serving:
        raise KeyError(
            f"cfl_ops.config.backend_of: there is no op {op!r} for {device_type!r} (see config.info())"
        )
    return dispatch.overrides.serving[op, device_type]


def info() -> dict[str, Any]:
    """All that :func:`show` prints, as a dictionary."""
    import cfl_ops

    report: dict[str, Any] = {
        "cfl_ops": cfl_ops.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "backend": get_backend() or "automatic",
    }
    if dispatch.extension_loaded():
        report["extension"] = dict(importlib.import_module(dispatch.EXTENSION).build_info())
    elif dispatch.extension_available():
        report["extension"] = {"not loaded:": "the backend python was asked for"}
    else:
        report["extension"] = None
    if dispatch.triton_available():
        from importlib.metadata import version

        report["triton"] = version("triton") + (" (interpreter)" if dispatch.triton_interpreted() else "")
    else:
        report["triton"] = None
    report["CUDA C++"] = _cuda_source()
    report["ops"] = {
        name: {device: backend_of(name, device) for device in dispatch.DISPATCH_KEYS} for name in OPS
    }
    return report


def _cuda_source() -> str:
    """Where the CUDA C++ kernels come from."""
    if dispatch.native_available():
        return "compiled with the extension"
    if dispatch.extension_available() and not dispatch.extension_loaded():
        return "not loaded"
    if dispatch.nvrtc_available():
        return "compiled at run time by CuPy's NVRTC"
    return "none: the extension has none, and cupy is not installed"


def show() -> None:
    """Print versions, instruction set and, for each op, which backend serves it on which device."""
    report = info()
    for key in ("cfl_ops", "python", "torch", "cuda", "device", "threads", "triton", "CUDA C++", "backend"):
        print(f"{key:<12}{report[key] if report[key] is not None else '-'}")
    extension = report["extension"]
    if extension is None:
        print(f"{'extension':<12}not installed: the Python fallback serves the CPU")
    else:
        text = ", ".join(f"{key} {value}" for key, value in extension.items())
        print(f"{'extension':<12}{text}")
    print(f"{'op':<24}{'cpu':<10}{'cuda':<10}")
    for name, backends in report["ops"].items():
        print(f"{name:<24}{backends['cpu']:<10}{backends['cuda']:<10}")


def plan_proximal(rows: int, width: int, targets: int) -> dict[str, Any]:
    """What ``method="auto"`` of :func:`cfl_ops.proximal_step` does on the CPU at this size, and what it costs.

    Returns:
        ``side`` (``"dual"``: the B x B system, or ``"primal"``: the D x D one; where B is D, what serves
        float32 up to 2,048 at a penalty that it resolves, else the dual one does), the multiply-adds of the
        ``direct`` solve, of one conjugate-gradient ``iteration`` and of the ``head`` around them (forward,
        weight update, gradient), and ``cg_iterations``, how many iterations are tried first (0: none).

    Example:
        >>> import cfl_ops
        >>> plan = cfl_ops.config.plan_proximal(32, 4096, 100)
        >>> plan["side"], plan["cg_iterations"]
        ('dual', 0)
    """
    rows, width, targets = (
        checks.integer("config.plan_proximal", name, value, 0)
        for name, value in (("rows", rows), ("width", width), ("targets", targets))
    )
    small, large = min(rows, width), max(rows, width)
    direct = small * small * large / 2 + small**3 / 6 + small * small * targets
    iteration = 2.0 * rows * width * max(targets, 32)  # fewer right sides are bound by reading the features
    budget = int(direct / iteration / 4) if iteration else 0
    return {
        "side": "dual" if rows < width else "primal",
        "direct": direct,
        "iteration": iteration,
        "head": (3.0 if rows < width else 2.0) * rows * width * targets,
        "cg_iterations": budget if budget >= 24 else 0,
    }
