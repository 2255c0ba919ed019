"""ridge_solve, pinv, lstsq and ridge_cv against torch, numpy, scikit-learn and himalaya."""

from __future__ import annotations

import cfl_ops
import numpy as np
import pytest
import torch
from _ratio import compare, record, time_interleaved

BATCH = {129: 512, 256: 128, 512: 32}


def systems(order: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    batch = BATCH.get(order, 4096)
    gram = torch.empty(batch, order, order, dtype=dtype)
    for part in gram.split(256):
        x = torch.randn(len(part), order, order, dtype=dtype)
        part.copy_(x @ x.mT / order)
    gram.diagonal(dim1=-2, dim2=-1).add_(1.0)
    return gram, torch.randn(batch, order, 4, dtype=dtype)


def torch_cholesky(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    return torch.cholesky_solve(cross, torch.linalg.cholesky_ex(gram)[0])


def asked_of(order: int, dtype: torch.dtype) -> float:
    if order > 128:
        return 1.0
    if dtype == torch.float32:
        return 12.0 if order <= 16 else 10.0
    return 5.0 if order in (4, 32, 64) else 3.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("order", [4, 8, 16, 32, 64, 128, 129, 256, 512])
@pytest.mark.benchmark(group="ridge_solve, 4096 systems (fewer above 128), 4 sides, against torch Cholesky")
def bench_ridge_solve(benchmark, order: int, dtype: torch.dtype) -> None:
    gram, cross = systems(order, dtype)
    compare(
        benchmark,
        f"n={order} {str(dtype)[6:]}",
        lambda: cfl_ops.ridge_solve(gram, cross),
        {"torch": lambda: torch_cholesky(gram, cross)},
        flops=len(gram) * (order**3 / 3 + 8 * order**2) * 2,
        bytes_moved=gram.nbytes / 2 + 2 * cross.nbytes,
        asked=asked_of(order, dtype),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("order", [8, 32, 64, 128])
@pytest.mark.benchmark(group="ridge_solve_ex of one system, and of four: the call itself counts")
def bench_ridge_solve_few(benchmark, order: int, batch: int, dtype: torch.dtype) -> None:
    x = torch.randn(batch, order, order + 4, dtype=dtype)
    gram, cross = x @ x.mT / order + torch.eye(order, dtype=dtype), torch.randn(batch, order, 1, dtype=dtype)
    if batch == 1:
        gram, cross = gram[0], cross[0]
    compare(
        benchmark,
        f"{batch} x n={order} {str(dtype)[6:]}",
        lambda: cfl_ops.ridge_solve_ex(gram, cross),
        {"torch": lambda: torch_cholesky(gram, cross)},
        flops=batch * (order**3 / 3 + 2 * order**2) * 2,
        bytes_moved=gram.nbytes / 2 + 2 * cross.nbytes,
        asked=1.0,
    )


@pytest.mark.parametrize("shape", [(16, 8), (64, 8), (256, 16), (1000, 32)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("op", ["lstsq", "pinv"])
@pytest.mark.benchmark(
    group="lstsq and pinv of one small float32 matrix against torch's, which see a lost rank too"
)
def bench_small_matrix(benchmark, op: str, shape: tuple[int, int]) -> None:
    a, b = torch.randn(shape), torch.randn(shape[0], 1)
    ours, peers = {
        "lstsq": (
            lambda: cfl_ops.lstsq(a, b),
            {f"torch {driver}": lambda driver=driver: torch.linalg.lstsq(a, b, driver=driver)
             for driver in ("gelsy", "gelsd")},
        ),
        "pinv": (lambda: cfl_ops.pinv(a), {"torch": lambda: torch.linalg.pinv(a)}),
    }[op]  # fmt: skip
    compare(
        benchmark, f"{op} {shape[0]} x {shape[1]}", ours, peers, flops=4 * shape[0] * shape[1] ** 2, asked=1.0
    )


@pytest.mark.parametrize("order", [4, 8, 16, 32])
@pytest.mark.benchmark(
    group="ridge_solve, 4096 systems, float32, 8 calls in a row (above each call follows the peer's, whose "
    "temporaries have pushed the systems out of the caches)"
)
def bench_ridge_solve_warm(benchmark, order: int) -> None:
    gram, cross = systems(order, torch.float32)

    def in_a_row(solve, calls: int = 8):
        def run() -> None:
            for _ in range(calls):
                solve(gram, cross)

        return run

    contenders = {"ours": in_a_row(cfl_ops.ridge_solve), "torch": in_a_row(torch_cholesky)}
    seconds = {name: value / 8 for name, value in time_interleaved(contenders).seconds.items()}
    record(
        benchmark,
        f"n={order}",
        seconds,
        flops=len(gram) * (order**3 / 3 + 8 * order**2) * 2,
        asked=asked_of(order, torch.float32),
    )


def numba_cholesky_solve():
    """Loops over the systems, compiled: factor and both substitutions, as one writes them by hand."""
    numba = pytest.importorskip("numba")

    @numba.njit(fastmath=True)
    def solve(a, b, out):  # pragma: no cover  (compiled)
        batch, n, sides = b.shape
        factor = np.empty((n, n), a.dtype)
        for s in range(batch):
            for i in range(n):
                for j in range(i + 1):
                    total = a[s, i, j]
                    for k in range(j):
                        total -= factor[i, k] * factor[j, k]
                    factor[i, j] = np.sqrt(total) if i == j else total / factor[j, j]
            for i in range(n):
                for c in range(sides):
                    total = b[s, i, c]
                    for k in range(i):
                        total -= factor[i, k] * out[s, k, c]
                    out[s, i, c] = total / factor[i, i]
            for i in range(n - 1, -1, -1):
                for c in range(sides):
                    total = out[s, i, c]
                    for k in range(i + 1, n):
                        total -= factor[k, i] * out[s, k, c]
                    out[s, i, c] = total / factor[i, i]

    return solve


@pytest.mark.parametrize("order", [4, 8, 16, 32, 64, 128])
@pytest.mark.benchmark(
    group="ridge_solve, 4096 systems, float32, against the best of torch.solve, numpy, jax and numba"
)
def bench_ridge_solve_best(benchmark, order: int) -> None:
    gram, cross = systems(order, torch.float32)
    a, b = gram.numpy(), cross.numpy()
    peers = {"torch.solve": lambda: torch.linalg.solve(gram, cross), "numpy": lambda: np.linalg.solve(a, b)}
    try:
        import jax
    except ImportError:
        pass
    else:
        device_a, device_b = jax.numpy.asarray(a), jax.numpy.asarray(b)
        by_cholesky = jax.jit(
            jax.vmap(lambda g, c: jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(g), c))
        )
        peers["jax"] = lambda: by_cholesky(device_a, device_b).block_until_ready()
    try:
        solve = numba_cholesky_solve()
    except pytest.skip.Exception:
        pass
    else:
        out = np.empty_like(b)
        peers["numba"] = lambda: solve(a, b, out)
    compare(
        benchmark,
        f"n={order}",
        lambda: cfl_ops.ridge_solve(gram, cross),
        peers,
        flops=len(gram) * (order**3 / 3 + 8 * order**2) * 2,
        asked=6.0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("order", [8, 16, 32, 64])
@pytest.mark.benchmark(group="pinv of 1024 square matrices against torch.linalg.pinv")
def bench_pinv(benchmark, order: int, dtype: torch.dtype) -> None:
    a = torch.randn(1024, order, order, dtype=dtype)
    compare(
        benchmark,
        f"n={order} {str(dtype)[6:]}",
        lambda: cfl_ops.pinv(a),
        {"torch": lambda: torch.linalg.pinv(a)},
        flops=1024 * 3.7 * order**3,
        bytes_moved=2 * a.nbytes,
        asked=5.0,
    )


@pytest.fixture(scope="module")
def layers() -> list[torch.Tensor]:
    """The matrices that lstsq meets in T2."""
    from benches.paper import t2

    kept: list[torch.Tensor] = []
    for seed in range(5):
        t2.accuracy(cfl_ops.lstsq, seed, 0.1, 10.0, torch.float32, True, kept)
    return [z for z in kept if z.shape[1] == 33]


@pytest.mark.parametrize(("peer", "asked"), [("float32", 1.8), ("float64", 3.3)])
@pytest.mark.benchmark(
    group="lstsq on the layers of T2 (5000 x 33 float32, one side) against torch.linalg.pinv"
)
def bench_lstsq(benchmark, layers: list[torch.Tensor], peer: str, asked: float) -> None:
    side = torch.randn(5000, 1)
    theirs = layers if peer == "float32" else [z.double() for z in layers]
    compare(
        benchmark,
        f"against {peer} pinv",
        lambda: [cfl_ops.lstsq(z, side) for z in layers],
        {"torch": lambda: [torch.linalg.pinv(z) for z in theirs]},
        flops=len(layers) * 5000 * 33 * 33 * 3,
        asked=asked,
        budget=3.0,
    )


@pytest.fixture(scope="module")
def regression() -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5000, 500, generator=generator)
    weight = torch.randn(500, 1000, generator=generator) * 0.1
    noise = torch.randn(5000, 1000, generator=generator) * torch.logspace(-1, 1, 1000)
    return x, x @ weight + noise, np.logspace(-1, 4, 10)


@pytest.mark.benchmark(group="ridge_cv, 5000 x 500 x 1000 targets x 10 lambdas, float32")
def bench_leave_one_out(benchmark, regression) -> None:
    sklearn = pytest.importorskip("sklearn.linear_model")
    x, y, lams = regression
    peer = sklearn.RidgeCV(alphas=lams, fit_intercept=False, alpha_per_target=True)
    same = np.array_equal(peer.fit(x.numpy(), y.numpy()).alpha_, cfl_ops.ridge_cv(x, y, lams).lam.numpy())
    compare(
        benchmark,
        "leave-one-out",
        lambda: cfl_ops.ridge_cv(x, y, lams),
        {"scikit-learn": lambda: peer.fit(x.numpy(), y.numpy())},
        flops=2 * 5000 * 500 * (1000 * 11 + 750),
        asked=2.5,
        note=f"same lambdas: {same}",
    )


@pytest.mark.parametrize(("peer", "asked"), [("scikit-learn", 9.0), ("himalaya", 15.0)])
@pytest.mark.benchmark(group="ridge_cv, 5000 x 500 x 1000 targets x 10 lambdas, float32")
def bench_folds(benchmark, regression, peer: str, asked: float) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    x, y, lams = regression
    if peer == "scikit-learn":
        model = pytest.importorskip("sklearn.linear_model").RidgeCV(alphas=lams, fit_intercept=False, cv=5)
        theirs = model.fit(x.numpy(), y.numpy()).alpha_
    else:  # its float32 scores choose differently for a target in a thousand
        pytest.importorskip("himalaya.backend").set_backend("numpy")
        ridge = pytest.importorskip("himalaya.ridge")
        model = ridge.RidgeCV(alphas=lams, fit_intercept=False, cv=selection.KFold(5))
        theirs = model.fit(x.double().numpy(), y.double().numpy()).best_alphas_
    per_target = peer == "himalaya"
    ours = cfl_ops.ridge_cv(x, y, lams, cv=5, per_target=per_target).lam.numpy()
    compare(
        benchmark,
        "5 folds",
        lambda: cfl_ops.ridge_cv(x, y, lams, cv=5, per_target=per_target),
        {peer: lambda: model.fit(x.numpy(), y.numpy())},
        flops=2 * 5000 * 500 * (1000 * 11 + 250),
        asked=asked,
        note=f"same lambdas: {np.allclose(theirs, ours, rtol=1e-4)}",
    )
