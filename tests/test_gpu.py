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


@pytest.fixture(params=["automatic", "native", "triton", "nvrtc", "python"])
def gpu_backend(request: pytest.FixtureRequest):
    name = None if request.param == "automatic" else request.param
    if name == "native" and not cfl_ops._library.extension_available():
        pytest.skip("the extension is not installed")
    if name == "nvrtc" and not cfl_ops._cuda.nvrtc_available():
        pytest.skip("cupy is not installed")
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


def served(op: str, backend: str | None) -> None:
    if backend and cfl_ops.config.backend_of(op, "cuda") != backend:
        pytest.skip(f"{op} has no {backend} kernel for CUDA")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("order", "sides", "batch"),
    [(8, 1, 5000), (24, 3, 700), (64, 1, 1000), (64, 200, 3), (65, 1, 1), (300, 7, 9), (1024, 1, 1), (2048, 130, 1),
     (3000, 2, 1)],
)  # fmt: skip
def test_ridge_solve_at_every_size(order: int, sides: int, batch: int, dtype, gpu_backend) -> None:
    """Each run gives the same bits: what blocks hand to each other in one launch must not depend on their timing."""
    served("ridge_solve", gpu_backend)
    x = torch.randn(batch, order, order + 8, dtype=torch.float64)
    gram, cross = (x @ x.mT / order).to(dtype), torch.randn(batch, order, sides).to(dtype)
    on = gram.cuda(), cross.cuda()
    first, info = cfl_ops.ridge_solve_ex(*on, 0.5)
    assert not info.any()
    for _ in range(5):
        assert torch.equal(cfl_ops.ridge_solve_ex(*on, 0.5)[0], first)
    wide = gram.double() + 0.5 * torch.eye(order, dtype=torch.float64)
    want = torch.linalg.solve(wide, cross.double())
    bound = 4 * order * torch.finfo(dtype).eps * 10 * torch.linalg.matrix_norm(want)[:, None, None]
    assert ((first.cpu().double() - want).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("order", "rank", "batch"), [(32, 1, 3000), (100, 5, 40), (1000, 33, 2), (2048, 1, 1), (4096, 16, 1)]
)
def test_cholesky_update_at_every_size(order: int, rank: int, batch: int, dtype, gpu_backend) -> None:
    served("cholesky_update", gpu_backend)
    if gpu_backend == "python" and order > 1000:
        pytest.skip("the fallback goes column by column: seconds")
    L = torch.randn(batch, order, order, dtype=torch.float64).tril_() / order**0.5
    L.diagonal(dim1=-2, dim2=-1).abs_().add_(1)
    L, V = L.to(dtype).cuda(), torch.randn(batch, order, rank, device="cuda").to(dtype) / order**0.5
    new, info = cfl_ops.cholesky_update_ex(L, V)
    assert not info.any()
    for _ in range(5):
        assert torch.equal(cfl_ops.cholesky_update_ex(L, V)[0], new)
    again = L.clone()
    assert not cfl_ops.cholesky_update_ex_(again, V).any()
    assert torch.equal(again, new)
    wide, added = L.double(), V.double()
    want = wide @ wide.mT + added @ added.mT
    error = torch.linalg.matrix_norm(new.double() @ new.double().mT - want) / torch.linalg.matrix_norm(want)
    assert (error <= 10 * torch.finfo(dtype).eps * order**0.5).all()


@pytest.mark.parametrize("width", [130, 700, 2100])
@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [
        (torch.bfloat16, "highest", 1e-4),  # one accumulator: docs/gram.md
        (torch.float32, "high", 2.0**-10),
        (torch.float32, "highest", 5e-6),
        (torch.float64, "highest", 1e-12),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_gram_by_the_rules_of_this_card(
    width: int, dtype, precision: str, bound: float, weighted: bool
) -> None:
    """As large as the registry's rules ask for, with signs alike, where truncated sums would show."""
    x = torch.rand(20001, width, device="cuda").to(dtype)
    s = torch.rand(20001, device="cuda") if weighted else None
    torch.set_float32_matmul_precision(precision)
    try:
        with cfl_ops.config.use_backend("triton"):
            got = cfl_ops.gram(x, sample_weight=None if s is None else s.to(dtype)).gram
    finally:
        torch.set_float32_matmul_precision("highest")
    wide = x.double()
    want = wide.mT @ (wide if s is None else wide * s.to(dtype).double().unsqueeze(-1))
    assert torch.equal(got, got.mT)
    assert float(((got.double() - want).abs() / want).max()) <= bound


def symbols_of(kind: str) -> torch.Tensor:
    if kind == "one symbol":
        return torch.full((70000,), 3, dtype=torch.uint8)
    if kind == "uint16":
        return (torch.randn(3, 50001) * 80 + 512).clamp(0, 1023).to(torch.uint16)
    if kind == "all 65,536":
        return torch.randint(65536, (200000,), dtype=torch.int32).to(torch.uint16)
    return (torch.randn(1000003) * 20 + 128).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "one symbol", "all 65,536"])
def test_cpu_and_gpu_read_each_others_payloads(kind: str, gpu_backend) -> None:
    if gpu_backend and cfl_ops.config.backend_of("huffman_encode", "cuda") != gpu_backend:
        pytest.skip(f"huffman_encode has no {gpu_backend} kernel for CUDA")
    symbols = symbols_of(kind)
    with cfl_ops.config.use_backend(None):
        want = cfl_ops.huffman_encode(symbols)
    payload = cfl_ops.huffman_encode(symbols.cuda())
    assert torch.equal(payload.cpu(), want)
    assert torch.equal(cfl_ops.huffman_decode(want.cuda()).cpu(), symbols)
    n = symbols.numel()
    part = cfl_ops.huffman_decode(payload, start=n // 3, stop=n - 5)
    assert torch.equal(part.cpu(), symbols.flatten()[n // 3 : n - 5])
    for at in (0, 30, 45, want.numel() // 2, want.numel() - 1):
        damaged = payload.clone()
        damaged[at] ^= 4
        with pytest.raises(cfl_ops.CorruptDataError):
            cfl_ops.huffman_decode(damaged)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"bits": 10, "per": "row"}, {"bits": 6, "per": "block", "block_size": 64}]
)
def test_cpu_and_gpu_read_each_others_blobs(dtype, options, gpu_backend) -> None:
    if gpu_backend and cfl_ops.config.backend_of("quantize", "cuda") != gpu_backend:
        pytest.skip(f"quantize has no {gpu_backend} kernel for CUDA")
    w = (torch.randn(300, 1001) * 0.05).to(dtype)
    with cfl_ops.config.use_backend(None):
        blob = cfl_ops.compress(w, **options)
        want = cfl_ops.decompress(blob)
    assert torch.equal(cfl_ops.compress(w.cuda(), **options).cpu(), blob)
    assert torch.equal(cfl_ops.decompress(blob.cuda()).cpu(), want)


def test_quantize_is_captured_in_a_cuda_graph() -> None:
    w = torch.randn(7, 5000).cuda()
    cfl_ops.quantize_ex(w, 8, per="row", histogram=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, info = cfl_ops.quantize_ex(w, 8, per="row", histogram=True)
    w.normal_()
    graph.replay()
    want = cfl_ops.quantize(w.cpu(), 8, per="row", histogram=True)
    assert torch.equal(captured.symbols.cpu(), want.symbols)
    assert torch.equal(captured.histogram.cpu(), want.histogram)
    assert not info.any()


def captured(call):
    """The result of a replay of the call's graph, into which ``fresh`` data may be copied before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


def spd(*batch: int, n: int = 12) -> torch.Tensor:
    a = torch.randn(*batch, n, n)
    return (a @ a.mT + torch.eye(n)).cuda()


# Each public _ex form, of one matrix and of a batch.
EX = {
    "ridge_solve_ex": lambda a, x: cfl_ops.ridge_solve_ex(a, x[..., :12, :], 0.1),
    "cholesky_update_ex": lambda a, x: cfl_ops.cholesky_update_ex(
        torch.linalg.cholesky_ex(a)[0], x[..., :12, :]
    ),
    "safe_cholesky_ex": lambda a, x: cfl_ops.safe_cholesky_ex(a),
    "spd_inverse_ex": lambda a, x: cfl_ops.spd_inverse_ex(a),
    "lstsq_ex": lambda a, x: cfl_ops.lstsq_ex(x, x[..., :1]),
    "pinv_ex": lambda a, x: cfl_ops.pinv_ex(x),
    "quantize_ex": lambda a, x: cfl_ops.quantize_ex(x, 8, per="row"),
    "proximal_step_ex": lambda a, x: cfl_ops.proximal_step_ex(x, x[..., :2], x[..., :2, :] * 0, lam=0.3),
}


@pytest.mark.parametrize("batch", [(), (5,)])
@pytest.mark.parametrize("name", EX)
def test_every_ex_form_is_captured_in_a_cuda_graph(name: str, batch: tuple[int, ...]) -> None:
    a, x = spd(*batch), torch.randn(*batch, 40, 6).cuda()
    graph, out = captured(lambda: EX[name](a, x))
    a.copy_(spd(*batch))
    x.normal_()
    graph.replay()
    want = EX[name](a, x)
    leaves, expected = torch.utils._pytree.tree_leaves(out), torch.utils._pytree.tree_leaves(want)
    for got, value in zip(leaves, expected, strict=True):
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(got, value, equal_nan=True)


@pytest.mark.parametrize("op", ["gram", "proximal", "ridge_solve"])
def test_compiled_with_dynamic_shapes(op: str) -> None:
    def call(x: torch.Tensor, y: torch.Tensor) -> object:
        if op == "gram":
            return cfl_ops.gram(x, y, bias_column=True).gram
        if op == "proximal":
            return cfl_ops.proximal_step_ex(x, y, y.new_zeros(3, 24), lam=0.5)[0].weight
        m = cfl_ops.gram(x, y)
        return cfl_ops.ridge_solve_ex(m.gram, m.cross, 0.1)[0]

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for rows in (9, 16, 21):
        x, y = torch.randn(rows, 24).cuda(), torch.randn(rows, 3).cuda()
        torch.testing.assert_close(compiled(x, y), call(x, y))
