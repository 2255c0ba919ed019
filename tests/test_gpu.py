"""On a CUDA device: every sample of the contract table, CUDA-graph capture, and CPU against GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import cfl_ops
import contract

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, and there is none", allow_module_level=True)
TYPED = [
    pytest.param(spec, case, dtype, id=f"{spec.op.name}-{case.name.replace(' ', '_')}-{str(dtype)[6:]}")
    for spec in contract.load()
    for case in spec.cases
    for dtype in case.dtypes
]


def on_gpu(args):
    return [a.cuda() if isinstance(a, torch.Tensor) and a.ndim else a for a in args]


@pytest.fixture(params=["automatic", "native", "triton", "python"])
def gpu_backend(request: pytest.FixtureRequest):
    name = None if request.param == "automatic" else request.param
    if name == "native" and not cfl_ops._library.extension_available():
        pytest.skip("the extension is not installed")
    with cfl_ops.config.use_backend(name):
        yield name


@pytest.mark.parametrize(("spec", "case", "dtype"), TYPED)
def test_oracle(spec, case, dtype, gpu_backend) -> None:
    if gpu_backend and cfl_ops.config.backend_of(spec.op.name, "cuda") != gpu_backend:
        pytest.skip(f"{spec.op.name} has no {gpu_backend} kernel for CUDA")
    args = case.make(dtype)
    got = contract.results(spec, on_gpu(args))
    contract.assert_within([g.cpu() for g in got], spec.oracle(*args), spec.bound(*args))


@pytest.mark.parametrize("rows", [8, 40])
def test_ex_form_is_captured_in_a_cuda_graph(rows: int) -> None:
    features, labels = torch.randn(rows, 20).cuda(), torch.randint(3, (rows,)).cuda()
    weight, bias = torch.zeros(3, 20).cuda(), torch.zeros(3).cuda()
    lam = torch.tensor(0.5, device="cuda", dtype=torch.float64)

    def step():
        return cfl_ops.proximal_step_ex(features, labels, weight, bias, lam=lam)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, info = step()
    features.normal_()
    graph.replay()
    want, _ = step()
    assert int(info) == 0
    torch.testing.assert_close(captured.weight, want.weight)
