"""The CUDA kernels and their launchers without a GPU: compiled for the CPU, where a block's threads run in turn.

tests/gpu/cuda_on_host.h holds the dialect. Everything but the hardware takes part: the torch binding, the Python
around it, launchers, kernels, barriers, warp collectives. The results must be those of the CPU kernels, bit by bit.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cfl_ops._core.op import UNSERVED
from cfl_ops._gpu import native, sources
from cfl_ops._gpu import nvrtc as launchers

from tests import contract

ROOT = Path(__file__).parents[2]


@functools.cache  # once for all test modules
def emulated_kernels() -> Any:
    """The kernels of csrc/cuda for CPU tensors, registered."""
    library = Path(tempfile.mkdtemp(prefix="cfl_on_host")) / "libcfl_on_host.so"
    torch_root = Path(torch.__file__).parent
    files = [
        str(ROOT / "csrc" / "cuda" / f"{name}.{kind}")
        for name in ("codec", "gram", "solve", "cholesky")
        for kind in ("cu", "cpp")
    ]
    compile_on_host(
        *("-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(torch_root / "include"), "-x", "c++"),
        *(*files, "-o", str(library), f"-L{torch_root / 'lib'}", "-ltorch_cpu"),
    )
    torch.ops.load_library(str(library))
    return native.kernels("native")


def compile_on_host(*arguments: str) -> None:
    command = ["g++", "-std=c++20", "-O2", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-ffp-contract=off"]
    command += ["-DCFL_CUDA_ON_HOST", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'gpu'}", *arguments]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs g++")
    except subprocess.CalledProcessError as error:
        if "_Float16" in error.stderr:
            pytest.skip("needs a g++ that knows _Float16")
        raise AssertionError(error.stderr) from None


GLUE = """
#include "cuda/codec_kernel.cuh"
#include "cuda/gram_kernel.cuh"
#include "cuda/solve_kernel.cuh"
#include "cuda/cholesky_kernel.cuh"
#include <utility>
using namespace cfl::cuda;
template <class... P, size_t... I>
int call(void (*kernel)(P...), std::index_sequence<I...>, int64_t blocks, int threads, size_t shared, void** args,
         const size_t* sizes, int count) {
  constexpr size_t want[] = {sizeof(P)...};
  if (count != sizeof...(P)) return 1;
  for (int i = 0; i < count; ++i) if (sizes[i] != want[i]) return 2 + i;
  on_host::launch(blocks, threads, shared, [=] { kernel(*static_cast<P*>(args[I])...); });
  return 0;
}
template <class... P>
int call(void (*kernel)(P...), int64_t blocks, int threads, size_t shared, void** args, const size_t* sizes,
         int count) {
  return call(kernel, std::index_sequence_for<P...>(), blocks, threads, shared, args, sizes, count);
}
"""


@functools.cache
def emulated_nvrtc() -> Any:
    """The launcher for CuPy with a CuPy whose kernels are those of this machine's C++ compiler."""
    np = pytest.importorskip("numpy")
    names = [name for family in sources.HEADERS for name in launchers.names(family)]
    text = GLUE
    for i, name in enumerate(names):
        plain = name.replace("cfl::cuda::uint", "uint")
        text += f"""extern "C" int call_{i}(int64_t blocks, int threads, size_t shared, void** args,
                        const size_t* sizes, int count) {{
  return call(&{plain}, blocks, threads, shared, args, sizes, count);
}}
"""
    folder = Path(tempfile.mkdtemp(prefix="cfl_nvrtc"))
    (folder / "glue.cpp").write_text(text)
    compile_on_host(str(folder / "glue.cpp"), "-o", str(folder / "libglue.so"))
    glue = ctypes.CDLL(str(folder / "libglue.so"))

    class Function:
        def __init__(self, name: str) -> None:
            self.call = getattr(glue, f"call_{names.index(name)}")
            self.max_dynamic_shared_size_bytes = 48 << 10

        def __call__(self, grid, block, args, *, shared_mem: int) -> None:
            assert block[0] <= 256
            assert 0 <= shared_mem <= self.max_dynamic_shared_size_bytes
            assert all(isinstance(a, np.generic) for a in args)
            held = [np.array(a) for a in args]
            pointers = (ctypes.c_void_p * len(held))(*(a.ctypes.data for a in held))
            sizes = (ctypes.c_size_t * len(held))(*(a.nbytes for a in held))
            code = self.call(
                ctypes.c_int64(grid[0]),
                ctypes.c_int(block[0]),
                ctypes.c_size_t(shared_mem),
                pointers,
                sizes,
                len(held),
            )
            assert code == 0, f"{code}: wrong number of arguments (1) or size of argument {code - 2}"

    nothing = contextlib.nullcontext
    cuda = types.SimpleNamespace(
        Device=lambda index: nothing(), Stream=types.SimpleNamespace(from_external=lambda stream: nothing())
    )
    kernels = launchers.Nvrtc.__new__(launchers.Nvrtc)
    kernels.cupy, kernels.numpy = types.SimpleNamespace(cuda=cuda), np
    kernels.module = lambda family: types.SimpleNamespace(get_function=Function)
    return kernels


def samples(*ops: str) -> list[Any]:
    """The samples of the contract table, in each dtype."""
    return [
        pytest.param(spec, case, dtype, id=f"{spec.op.name}-{case.name.replace(' ', '_')}-{str(dtype)[6:]}")
        for spec in contract.load()
        if spec.op.name in ops
        for case in spec.cases
        for dtype in case.dtypes
    ]


def check_sample(
    kernels: Any, spec: contract.OpSpec, case: contract.Case | None, args: Sequence[Any]
) -> None:
    """As test_contract.py's test_oracle; without a case of the table the kernels are to serve."""
    args = contract.clone_args(args)
    want, bounds = spec.oracle(*args), spec.bound(*args)
    out = spec.op.launcher("native").func(kernels, *args)
    assert (out is UNSERVED) == (case is not None and spec.leaves(case, "native"))
    out = contract.as_tuple(spec.op.python(*args) if out is UNSERVED else out)
    contract.assert_within(tuple(args[i] for i in spec.mutates) + out, want, bounds)


def check_samples(
    kernels: Any, spec: contract.OpSpec, case: contract.Case, dtype: torch.dtype, order: str
) -> None:
    """With threads in order, then in the reverse order with column-major arguments and with some not dense."""
    args = case.make(dtype)
    check_sample(kernels, spec, case, args)
    if order == "reverse":
        for change in (lambda t: t.mT.contiguous().mT, lambda t: t.repeat_interleave(2, -1)[..., ::2]):
            changed = [change(a) if torch.is_tensor(a) and a.ndim > 1 else a for a in args]
            check_sample(kernels, spec, case, changed)
