"""Fixtures of the codec's tests: the instruction sets and the fallback in turn, on one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from cfl_ops._core import dispatch

from tests.codec.helpers import LEVELS, NATIVE

if NATIVE:
    from cfl_ops import _C


@pytest.fixture(params=[*LEVELS, "python"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test with the native kernels at each instruction set, and with the fallback."""
    if request.param == "python":
        dispatch.overrides.install("python")
        yield "python"
        dispatch.overrides.install(os.environ.get("CFL_OPS_BACKEND") or None)
    else:
        _C.set_isa(int(request.param[3:]))
        yield request.param
        _C.set_isa(_C.best_isa())


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small tensors: threads would only wait for each other. test_threads_... asks for its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
