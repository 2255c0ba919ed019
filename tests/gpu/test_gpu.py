"""On a CUDA device: every sample of the contract table, CUDA-graph capture, and CPU against GPU.

With ``CFL_GPU_TESTS=rehearse`` the same tests run without a device, on CPU tensors, the C++ kernels and Triton's
interpreter: they show what is wrong with the tests, before a card's minutes are spent on it. With
``CFL_GPU_TESTS=required`` it is an error that there is no device.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cfl_ops
import pytest
import torch

from tests import contract

pytestmark = pytest.mark.gpu
REHEARSAL = os.environ.get("CFL_GPU_TESTS") == "rehearse"
DEVICE = "cpu" if REHEARSAL else "cuda"
if not REHEARSAL and not torch.cuda.is_available():
    if os.environ.get("CFL_GPU_TESTS") == "required":
        raise RuntimeError("there is no CUDA device, which CFL_GPU_TESTS=required asks for")
    pytest.skip("needs a CUDA device, and there is none", allow_module_level=True)
CASES = [
    pytest.param(spec, case, id=f"{spec.op.name}-{case.name.replace(' ', '_')}")
    for spec in contract.load()
    for case in spec.cases
]
TYPED = [
    pytest.param(spec, case, dtype, id=f"{spec.op.name}-{case.name.replace(' ', '_')}-{str(dtype)[6:]}")
    for spec in contract.load()
    for case in spec.cases
    for dtype in case.dtypes
]


def on_device(args: Sequence[Any]) -> list[Any]:
    return [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in args]


@contextlib.contextmanager
def naming(op: str, *args: Any) -> Iterator[None]:
    """A failure says the op, and the shape, dtype and strides of each argument."""
    try:
        yield
    except Exception as error:
        shown = ", ".join(
            f"{tuple(a.shape)} {str(a.dtype)[6:]} strides {a.stride()} {a.device}"
            if isinstance(a, torch.Tensor)
            else repr(a)
            for a in args
        )
        backend = cfl_ops.config.get_backend() or "automatic"
        raise AssertionError(f"{op}({shown}), {backend}: {type(error).__name__}: {error}") from error


@pytest.fixture(params=["automatic", "native", "triton", "nvrtc", "python"])
def gpu_backend(request: pytest.FixtureRequest):
    name = None if request.param == "automatic" else request.param
    if name == "native" and not cfl_ops._core.dispatch.extension_available():
        pytest.skip("the extension is not installed")
    if name == "nvrtc" and not cfl_ops._core.dispatch.nvrtc_available():
        pytest.skip("cupy is not installed")
    with cfl_ops.config.use_backend(name):
        yield name


def small(backend: str | None, size: int, most: int) -> int:
    """A size for a rehearsal: Triton's interpreter takes a millisecond for an operation."""
    return min(size, 20 if backend == "triton" else most)


def served(op: str, backend: str | None) -> None:
    """Skips unless the backend has the op; without a name, where one of the named ones does the same."""
    serving = cfl_ops.config.backend_of(op, DEVICE)
    if backend and serving != backend:
        pytest.skip(f"{op} has no {backend} kernel for {DEVICE}")
    if backend is None and serving != "composite":
        pytest.skip(f"the same as {serving}")


@pytest.mark.parametrize(("spec", "case", "dtype"), TYPED)
def test_oracle(spec, case, dtype, gpu_backend) -> None:
    served(spec.op.name, gpu_backend)
    if REHEARSAL and gpu_backend == "triton" and dtype not in spec.triton_dtypes:
        pytest.skip(f"the Triton interpreter cannot do {dtype} dots")
    args = case.make(dtype)
    with naming(spec.op.name, *args):
        got = contract.results(spec, on_device(args))
        contract.assert_within([g.cpu() for g in got], spec.oracle(*args), spec.bound(*args))


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_strides(spec, case) -> None:
    """Column-major and spread arguments, on the backend that serves: copy engines and kernels read them as they are."""
    args = case.make(torch.float32 if torch.float32 in case.dtypes else case.dtypes[0])
    want, bounds = spec.oracle(*args), spec.bound(*args)
    for change in (lambda t: t.mT.contiguous().mT, lambda t: t.repeat_interleave(2, -1)[..., ::2]):
        changed = [
            change(a) if isinstance(a, torch.Tensor) and a.ndim >= 2 and i not in spec.mutates else a
            for i, a in enumerate(on_device(args))
        ]
        with naming(spec.op.name, *changed):
            got = contract.results(spec, changed)
            contract.assert_within([g.cpu() for g in got], want, bounds)


@pytest.mark.parametrize("op", ["ridge_solve", "proximal_step"])
def test_a_penalty_may_stay_on_the_host(op: str, gpu_backend) -> None:
    """A 0-d penalty is a kernel's argument; it is not copied to the device, which would wait."""
    served(op, gpu_backend)
    lam = torch.tensor(0.5, dtype=torch.float64)
    x, y = torch.randn(20, 30), torch.randn(20, 3)
    with naming(op, x, y, lam):
        if op == "ridge_solve":
            args = x @ x.mT, y
            got = cfl_ops.ridge_solve_ex(*on_device(args), lam)[0]
            want = torch.linalg.solve(args[0].double() + 0.5 * torch.eye(20), y.double())
        else:
            weight = torch.zeros(3, 30)
            got = cfl_ops.proximal_step_ex(*on_device((x, y, weight)), lam=lam)[0].weight
            with cfl_ops.config.use_backend(None):
                want = cfl_ops.proximal_step(x.double(), y.double(), weight.double(), lam=0.5).weight
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["gram", "proximal_step", "ridge_solve", "cholesky_update", "quantize"])
def test_more_matrices_than_a_grid_has_places(op: str, gpu_backend) -> None:
    """Beyond 65,535 on its second and third axis."""
    served(op, gpu_backend)
    many = 60 if REHEARSAL and gpu_backend == "triton" else 70_001
    x, labels = torch.randn(many, 3, 4), torch.randint(2, (many, 3))
    a = x.mT @ x + torch.eye(4)
    weight, bias = torch.randn(many, 2, 4), torch.randn(many, 2)
    some = slice(many - 50, many)

    def call(pick: slice, where: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        xs, ys, matrices, w, b = (t[pick].to(where) for t in (x, labels, a, weight, bias))
        xs, matrices, w, b = (t.to(dtype) for t in (xs, matrices, w, b))
        if op == "gram":
            return cfl_ops.gram(xs, ys, num_classes=2, bias_column=True, sample_weight=xs[..., 0].abs())[:2]
        if op == "proximal_step":
            return cfl_ops.proximal_step_ex(xs, ys, w, b, lam=0.5)[0][:3]
        if op == "ridge_solve":
            return (cfl_ops.ridge_solve_ex(matrices, w.mT, 0.1)[0],)
        if op == "cholesky_update":
            return (cfl_ops.cholesky_update_ex(torch.linalg.cholesky_ex(matrices)[0], w.mT)[0],)
        q = cfl_ops.quantize_ex(w, 5, per="row")[0]
        return q.minimum, q.maximum

    with naming(op, x, labels, a, weight):
        got = call(slice(None), DEVICE, torch.float32)
        with cfl_ops.config.use_backend(None):
            want = call(some, "cpu", torch.float64)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g[some].cpu().double(), w, rtol=1e-3, atol=1e-4)


def test_rows_far_apart(gpu_backend) -> None:
    """Row strides whose multiples outgrow 32 bits."""
    served("gram", gpu_backend)
    x = torch.empty(70, 1 << 25, dtype=torch.float16, device=DEVICE)[:, :3]
    x.copy_(torch.randn(70, 3))
    with naming("gram", x):
        got = cfl_ops.gram(x).gram
        torch.testing.assert_close(got, (x.float().mT @ x.float()), rtol=1e-3, atol=1e-3)


def test_a_kernel_runs_on_the_device_of_its_tensors(gpu_backend) -> None:
    """Which need not be the current one."""
    if REHEARSAL or torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    x, y = torch.randn(50, 20, device="cuda:1"), torch.randn(50, 3, device="cuda:1")
    with torch.cuda.device(0):
        for op, call in {
            "gram": lambda: cfl_ops.gram(x, y).cross,
            "proximal_step": lambda: cfl_ops.proximal_step_ex(x, y, y[:3, :1] * x[:3], lam=1.0)[0].weight,
            "ridge_solve": lambda: cfl_ops.ridge_solve_ex(x.mT @ x, x.mT @ y, 1.0)[0],
        }.items():
            if gpu_backend and cfl_ops.config.backend_of(op, "cuda") != gpu_backend:
                continue
            with naming(op, x, y):
                got = call()
                with cfl_ops.config.use_backend("python"):
                    torch.testing.assert_close(got, call(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rows", [8, 40])
def test_ex_form_is_captured_in_a_cuda_graph(rows: int) -> None:
    features, labels = on_device((torch.randn(rows, 20), torch.randint(3, (rows,))))
    weight, bias = on_device((torch.zeros(3, 20), torch.zeros(3)))
    lam = torch.tensor(0.5, device=DEVICE, dtype=torch.float64)

    def step():
        return cfl_ops.proximal_step_ex(features, labels, weight, bias, lam=lam)

    with naming("proximal_step_ex", features, labels, weight, bias, lam):
        replay, (got, info) = captured(step)
        features.normal_()
        replay()
        want, _ = step()
        assert int(info) == 0
        torch.testing.assert_close(got.weight, want.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("order", "sides", "batch"),
    [(8, 1, 5000), (24, 3, 700), (64, 1, 1000), (64, 200, 3), (65, 1, 1), (300, 7, 9), (1024, 1, 1), (2048, 130, 1),
     (3000, 2, 1)],
)  # fmt: skip
def test_ridge_solve_at_every_size(order: int, sides: int, batch: int, dtype, gpu_backend) -> None:
    """Each run gives the same bits: what blocks hand to each other in one launch must not depend on their timing."""
    served("ridge_solve", gpu_backend)
    if REHEARSAL:
        order, sides, batch = small(gpu_backend, order, 300), small(gpu_backend, sides, 200), min(batch, 3)
    x = torch.randn(batch, order, order + 8, dtype=torch.float64)
    gram, cross = (x @ x.mT / order).to(dtype), torch.randn(batch, order, sides).to(dtype)
    with naming("ridge_solve", gram, cross):
        on = on_device((gram, cross))
        first, info = cfl_ops.ridge_solve_ex(*on, 0.5)
        assert not info.any(), f"info {info.unique().tolist()}"
        for _ in range(1 if REHEARSAL else 5):
            assert torch.equal(cfl_ops.ridge_solve_ex(*on, 0.5)[0], first), "other bits in another run"
        wide = gram.double() + 0.5 * torch.eye(order, dtype=torch.float64)
        want = torch.linalg.solve(wide, cross.double())
        bound = 4 * order * torch.finfo(dtype).eps * 10 * torch.linalg.matrix_norm(want)[:, None, None]
        within(first.cpu().double() - want, bound)


def within(error: torch.Tensor, bound: torch.Tensor | float) -> None:
    worst = float((error.abs() / bound).max())
    assert worst <= 1, f"the error is {worst:.3g} times its bound"  # and not NaN


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("order", "rank", "batch"), [(32, 1, 3000), (100, 5, 40), (1000, 33, 2), (2048, 1, 1), (4096, 16, 1)]
)
def test_cholesky_update_at_every_size(order: int, rank: int, batch: int, dtype, gpu_backend) -> None:
    served("cholesky_update", gpu_backend)
    if gpu_backend == "python" and order > 1000:
        pytest.skip("the fallback goes column by column: seconds")
    if REHEARSAL:
        order, batch = small(gpu_backend, order, 100), min(batch, 3)
    L = torch.randn(batch, order, order, dtype=torch.float64).tril_() / order**0.5
    L.diagonal(dim1=-2, dim2=-1).abs_().add_(1)
    L, V = on_device((L.to(dtype), torch.randn(batch, order, rank).to(dtype) / order**0.5))
    with naming("cholesky_update", L, V):
        new, info = cfl_ops.cholesky_update_ex(L, V)
        assert not info.any(), f"info {info.unique().tolist()}"
        for _ in range(1 if REHEARSAL else 5):
            assert torch.equal(cfl_ops.cholesky_update_ex(L, V)[0], new), "other bits in another run"
        again = L.clone()
        assert not cfl_ops.cholesky_update_ex_(again, V).any()
        assert torch.equal(again, new), "the form in place differs"
        wide, added = L.double(), V.double()
        want = wide @ wide.mT + added @ added.mT
        error = torch.linalg.matrix_norm(new.double() @ new.double().mT - want)
        within(error / torch.linalg.matrix_norm(want), 10 * torch.finfo(dtype).eps * order**0.5)


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
    rows = 70 if REHEARSAL else 20001
    x = torch.rand(rows, min(width, 300) if REHEARSAL else width, device=DEVICE).to(dtype)
    s = torch.rand(rows, device=DEVICE).to(dtype) if weighted else None
    torch.set_float32_matmul_precision(precision)
    try:
        with cfl_ops.config.use_backend("triton"), naming(f"gram, precision {precision}", x, s):
            got = cfl_ops.gram(x, sample_weight=s).gram
    finally:
        torch.set_float32_matmul_precision("highest")
    wide = x.double()
    want = wide.mT @ (wide if s is None else wide * s.double().unsqueeze(-1))
    with naming(f"gram, precision {precision}", x, s):
        assert torch.equal(got, got.mT), "not symmetric"
        within((got.double() - want) / want, bound)


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
    served("huffman_encode", gpu_backend)
    symbols = symbols_of(kind)
    with cfl_ops.config.use_backend(None):
        want = cfl_ops.huffman_encode(symbols)
    with naming("huffman_encode", symbols):
        payload = cfl_ops.huffman_encode(symbols.to(DEVICE))
        assert torch.equal(payload.cpu(), want), "other bytes than the CPU's"
    with naming("huffman_decode", want):
        assert torch.equal(cfl_ops.huffman_decode(want.to(DEVICE)).cpu(), symbols), "other symbols"
        n = symbols.numel()
        part = cfl_ops.huffman_decode(payload, start=n // 3, stop=n - 5)
        assert torch.equal(part.cpu(), symbols.flatten()[n // 3 : n - 5]), "other symbols in a slice"
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
    served("quantize", gpu_backend)
    w = (torch.randn(300, 1001) * 0.05).to(dtype)
    with cfl_ops.config.use_backend(None):
        blob = cfl_ops.compress(w, **options)
        want = cfl_ops.decompress(blob)
    with naming(f"compress {options}", w):
        assert torch.equal(cfl_ops.compress(w.to(DEVICE), **options).cpu(), blob), (
            "other bytes than the CPU's"
        )
        assert torch.equal(cfl_ops.decompress(blob.to(DEVICE)).cpu(), want), "other weights than the CPU's"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int16])
def test_cpu_and_gpu_read_each_others_lossless_blobs(dtype, gpu_backend) -> None:
    served("huffman_encode", gpu_backend)
    w = (torch.randn(300, 1001) * 50).to(dtype)
    with cfl_ops.config.use_backend(None):
        blob = cfl_ops.compress(w, lossless=True)
    with naming("compress lossless", w):
        assert torch.equal(cfl_ops.compress(w.to(DEVICE), lossless=True).cpu(), blob), (
            "other bytes than the CPU's"
        )
        got = cfl_ops.decompress(blob.to(DEVICE), start=1001, stop=200_000)
        assert torch.equal(got.cpu(), w.flatten()[1001:200_000]), "other weights"
        damaged = blob.to(DEVICE)
        damaged[len(damaged) // 2] ^= 1
        with pytest.raises(cfl_ops.CorruptDataError):
            cfl_ops.decompress(damaged)


def test_quantize_is_captured_in_a_cuda_graph() -> None:
    w = torch.randn(7, 5000).to(DEVICE)
    with naming("quantize_ex", w):
        replay, (got, info) = captured(lambda: cfl_ops.quantize_ex(w, 8, per="row", histogram=True))
        w.normal_()
        replay()
        want = cfl_ops.quantize(w.cpu(), 8, per="row", histogram=True)
        assert torch.equal(got.symbols.cpu(), want.symbols)
        assert torch.equal(got.histogram.cpu(), want.histogram)
        assert not info.any()


def captured(call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A replay of the call's CUDA graph, and what it writes to. In a rehearsal the call itself stands for it."""
    if REHEARSAL:
        out = call()

        def again() -> None:
            for old, new in zip(leaves(out), leaves(call()), strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

        return again, out
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph.replay, out


leaves = torch.utils._pytree.tree_leaves


def spd(*batch: int, n: int = 12) -> torch.Tensor:
    a = torch.randn(*batch, n, n)
    return (a @ a.mT + torch.eye(n)).to(DEVICE)


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
    a, x = spd(*batch), torch.randn(*batch, 40, 6).to(DEVICE)
    with naming(name, a, x):
        replay, out = captured(lambda: EX[name](a, x))
        a.copy_(spd(*batch))
        x.normal_()
        replay()
        for got, value in zip(leaves(out), leaves(EX[name](a, x)), strict=True):
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
        x, y = on_device((torch.randn(rows, 24), torch.randn(rows, 3)))
        with naming(f"{op}, compiled", x, y):
            torch.testing.assert_close(compiled(x, y), call(x, y))


@pytest.mark.parametrize("check", ["now", "next"])
def test_a_head_is_trained(check: str) -> None:
    """A bad batch raises, with "next" in the step that follows, and changes nothing."""
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(torch.nn.Linear(20, 64), torch.nn.GELU()).to(DEVICE)
    head = cfl_ops.learn.ClosedFormLinear(64, 3, lam=1.0, check=check).to(DEVICE)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.01, momentum=0.9)
    losses = []
    for _ in range(20):
        x = torch.randn(32, 20, device=DEVICE)
        loss = head.step(backbone(x), x[:, :3].argmax(-1))
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-5:]) < sum(losses[:5])
    before = head.weight.detach().clone()
    bad = torch.full((32, 64), torch.nan, device=DEVICE, requires_grad=True)
    labels = torch.zeros(32, dtype=torch.int64, device=DEVICE)
    if check == "next":
        head.step(bad, labels)
        bad = torch.randn(32, 64, device=DEVICE, requires_grad=True)
    with pytest.raises(ValueError):
        head.step(bad, labels)
    assert torch.equal(head.weight, before)
