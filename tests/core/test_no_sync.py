"""No op with an ``_ex`` form waits for a GPU, so that CUDA graphs can capture it: looked for on meta tensors.

A meta tensor has no data to look at, and every torch op that an op's fallback or launcher calls passes by. Those
that wait on CUDA (a number read back, indexing with a mask, a copy between devices, factorisations that check their
own info) are errors.
"""

from __future__ import annotations

from typing import Any

import cfl_ops
import pytest
import torch
from cfl_ops._core import dispatch
from cfl_ops._core.op import UNSERVED
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests import contract

WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "linalg_cholesky", "cholesky", "linalg_inv"),
    *("linalg_eigh", "_linalg_eigh", "linalg_eigvalsh", "_linalg_svd", "linalg_svd", "linalg_solve"),
    *("linalg_lu_factor", "linalg_eig", "bincount", "histc", "equal", "is_nonzero", "_unique2", "unique_dim"),
    *("linalg_lstsq", "repeat_interleave"),
    # Batches of these may be MAGMA's, which waits.
    *("cholesky_solve", "_cholesky_solve_helper", "cholesky_inverse"),
}
# Ops whose _ex form is public, and the helpers that they are made of.
OPS = (
    *("cholesky_update", "cholesky_update_", "safe_cholesky", "gram", "gram_", "linear_gram", "quantize"),
    *("dequantize", "proximal_step", "proximal_step_", "ridge_solve", "lstsq", "pinv", "small_pinv"),
    *("tall_gram", "tall_factor", "exact_gram", "recursive_ridge_"),
)


class NoSync(TorchDispatchMode):
    """Raises where CUDA would wait; meta tensors play those on the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = any(t.is_meta for t in given)
        assert not (on_gpu and name in WAITING), f"{name} waits for the GPU"
        if on_gpu and name.startswith("index") and isinstance(args[1], list | tuple):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{name} with a mask waits for the GPU"
            assert all(i is None or i.is_meta for i in args[1]), f"{name} copies its indices to the GPU"
        if on_gpu and name == "where":
            assert args[0].is_meta, "where copies its condition to the GPU"
        out = func(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
            assert source.device == target.device, f"{name} from {source.device} to {target.device}"
        return out


def on_meta(args: Any, penalties_on_cpu: bool) -> list[Any]:
    """The arguments as tensors without data; a 0-d float64 penalty may stay on the CPU, as a number does."""

    def move(a: Any) -> Any:
        if not isinstance(a, torch.Tensor):
            return a
        stays = penalties_on_cpu and a.ndim == 0 and a.dtype == torch.float64
        return a if stays else torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")

    return [move(a) for a in args]


CASES = [
    pytest.param(spec, case, id=f"{spec.op.name}-{case.name.replace(' ', '_')}")
    for spec in contract.load()
    if spec.op.name in OPS
    for case in spec.cases
]


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_fallback(spec, case) -> None:
    dtype = torch.float32 if torch.float32 in case.dtypes else case.dtypes[0]
    args = case.make(dtype)
    if spec.op.name in ("lstsq", "pinv") and any(a is not None for a in args[2 - (spec.op.name == "pinv") :]):
        pytest.skip("a given tolerance needs singular values, which torch waits for")
    for penalties_on_cpu in (False, spec.op.name in ("proximal_step", "proximal_step_", "ridge_solve")):
        given = on_meta(args, penalties_on_cpu)
        with NoSync():
            spec.op.python(*given)


class NoLaunch:
    """A kernel that is not launched."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@pytest.mark.parametrize(("spec", "case"), [p for p in CASES if p.values[0].op.kernel("triton")])
def test_triton_launcher(spec, case, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    dtype = torch.float32 if torch.float32 in case.dtypes else case.dtypes[0]
    args = case.make(dtype)
    launcher = spec.op.launcher("triton")
    module = __import__(launcher.__module__, fromlist=["x"])
    for name in [n for n in vars(module) if n.endswith("_kernel") and n.startswith("_")]:
        monkeypatch.setattr(module, name, NoLaunch())
    given = on_meta(args, spec.op.name == "ridge_solve")
    with NoSync():
        out = launcher(*given)
    assert (out is UNSERVED) == spec.leaves(case, "triton")


class Recorded:
    """CUDA kernels that are not launched."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


@pytest.mark.parametrize(("spec", "case"), [p for p in CASES if p.values[0].op.kernel("native")])
def test_cuda_launcher(spec, case) -> None:
    dtype = torch.float32 if torch.float32 in case.dtypes else case.dtypes[0]
    args = on_meta(case.make(dtype), False)
    launcher = spec.op.launcher("native").func
    with NoSync():
        out = launcher(Recorded(), *args)
    assert (out is UNSERVED) == spec.leaves(case, "native")


def test_public_ex_forms_add_nothing_that_waits() -> None:
    a, b = torch.eye(5, device="meta"), torch.ones(5, 2, device="meta")
    x, y = torch.empty(9, 5, device="meta"), torch.empty(9, 2, device="meta")
    weight = torch.empty(2, 5, device="meta")
    labels = torch.empty(9, dtype=torch.int64, device="meta")
    with NoSync():
        cfl_ops.ridge_solve_ex(a, b, 0.1)
        cfl_ops.cholesky_update_ex(a, b)
        cfl_ops.cholesky_update_ex_(a, b)
        cfl_ops.cholesky_downdate_ex(a, b)
        cfl_ops.cholesky_downdate_ex_(a, b)
        cfl_ops.cholesky_append_ex(a, b.mT, torch.eye(2, device="meta"))
        cfl_ops.safe_cholesky_ex(a)
        cfl_ops.spd_inverse_ex(a)
        cfl_ops.lstsq_ex(x, y)
        cfl_ops.pinv_ex(x)
        cfl_ops.proximal_step_ex(x, y, weight, lam=0.1)
        cfl_ops.proximal_step_ex(x, labels, weight, torch.empty(2, device="meta"), lam=0.1, ridge=0.2)
        cfl_ops.proximal_step_ex_(x, labels, weight, lam=0.1, sample_weight=torch.empty(9, device="meta"))
        cfl_ops.quantize_ex(x, 4, per="row", histogram=True)
        cfl_ops.quantize_ex(x, 4, per="block", block_size=4)
