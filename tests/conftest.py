"""Fixtures for all tests. Triton reads TRITON_INTERPRET when its kernels are decorated, so it is set first."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import cfl_ops
import pytest
from cfl_ops._core import dispatch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    rehearsal = os.environ.get("CFL_GPU_TESTS") == "rehearse"  # test_gpu.py without a device
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available() and not rehearsal:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))
        if "slow" in item.keywords and "slow" not in config.getoption("markexpr"):
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow (make test-slow)"))


def log_failure(text: str) -> None:
    """To the file of $CFL_FAILURES, as it happens: a run that is cut off has all failures until then."""
    if path := os.environ.get("CFL_FAILURES"):
        with Path(path).open("a") as file:
            file.write(text + "\n")


_running: TextIO | None = None


def pytest_runtest_logstart(nodeid: str) -> None:
    """A worker's test beside the failures, and after a while where it is: of a test that hangs no report comes."""
    global _running
    path, worker = os.environ.get("CFL_FAILURES"), os.environ.get("PYTEST_XDIST_WORKER")
    if path and worker:
        _running = Path(path).with_name(f"9running-{worker}.log").open("w")
        print(nodeid, file=_running, flush=True)
        # A thread of its own, which needs no lock of Python.
        faulthandler.dump_traceback_later(8, file=_running)


def pytest_runtest_logfinish() -> None:
    global _running
    if _running is not None:
        faulthandler.cancel_dump_traceback_later()
        _running.truncate(0)
        _running.close()
        _running = None


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        log_failure(f"=== {report.nodeid} ({report.when})\n{str(report.longrepr)[-3000:]}")


@pytest.fixture(autouse=True)
def _context_lives(request: pytest.FixtureRequest) -> Iterator[None]:
    """An illegal access ends a process's CUDA context: give up the worker, so that xdist starts a fresh one."""
    yield
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        log_failure(f"=== {request.node.nodeid} (the CUDA context is lost)\n{error}")
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(70)
        pytest.exit(f"the CUDA context is lost after {request.node.nodeid}", returncode=70)


@pytest.fixture(autouse=True)
def _fresh_state() -> None:
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # to import it takes seconds
        torch._dynamo.reset()


@pytest.fixture(autouse=True, scope="session")
def _poison() -> None:
    """Fresh outputs of the extension are full of NaN, so that an element which no kernel wrote shows."""
    if dispatch.extension_available():
        from cfl_ops import _C

        _C.poison_fresh_memory(True)


@pytest.fixture(params=["native", "triton", "python"])
def backend(request: pytest.FixtureRequest):
    """Each backend that can run here and serves the ops that the test module lists as OPS, in turn."""
    name = request.param
    if name == "native" and not dispatch.extension_available():
        pytest.skip("the extension is not installed")
    if name == "triton" and not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    with cfl_ops.config.use_backend(name):
        for op in getattr(request.module, "OPS", ()):
            if cfl_ops.config.backend_of(op, "cpu") not in (name, "composite"):
                pytest.skip(f"{op} has no {name} kernel")
        yield name


@pytest.fixture(params=[0, 1, 2], ids=["generic", "avx2", "avx512"])
def instruction_set(request: pytest.FixtureRequest) -> Any:
    """The native kernels of each instruction set that this machine has, in turn."""
    if not dispatch.extension_available():
        pytest.skip("the extension is not installed")
    from cfl_ops import _C

    if request.param > _C.best_isa():
        pytest.skip("this machine lacks it")
    _C.set_isa(request.param)
    yield
    _C.set_isa(_C.best_isa())


@pytest.fixture
def kernels() -> Any:
    """The kernels of csrc/cuda, emulated on the CPU."""
    from tests.gpu.on_host import emulated_kernels

    return emulated_kernels()


@pytest.fixture
def nvrtc(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The launcher for CuPy, whose kernels are emulated on the CPU."""
    from cfl_ops._gpu import nvrtc

    from tests.gpu.on_host import emulated_nvrtc

    monkeypatch.setattr(nvrtc, "_current_stream", lambda device: None)
    return emulated_nvrtc()
