"""What the contract table does not say: accuracy at size, failures, append and delete, jitter, Triton."""

from __future__ import annotations

import os
import subprocess
import sys

import cfl_ops
import pytest
import torch
from cfl_ops._core import dispatch
from torch import Tensor

from tests import contract
from tests.cholesky.samples import SPECS, UPDATES, spd

DTYPES = [torch.float32, torch.float64]
LAYOUTS = {"row": lambda t: t.contiguous(), "column": lambda t: t.mT.contiguous().mT}


def factor_and_vectors(order: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(order + rank)
    V = torch.randn(order, rank, generator=generator, dtype=torch.float64)
    return torch.linalg.cholesky(spd(order)).to(dtype), V.to(dtype)


@pytest.fixture(params=["best", "avx2", "generic"])
def instruction_set(request: pytest.FixtureRequest):
    if not dispatch.extension_available():
        pytest.skip("the extension is not installed")
    from cfl_ops import _C

    _C.set_isa({"best": _C.best_isa(), "avx2": 1, "generic": 0}[request.param])
    yield
    _C.set_isa(_C.best_isa())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("order", "rank"), [(5, 1), (48, 2), (129, 1), (200, 17), (256, 64), (96, 200)])
def test_error_of_one_update(order, rank, dtype, layout, instruction_set) -> None:
    """The asked bound, 10 eps sqrt(D) in the factor; in float64 the oracle itself is that far off."""
    L, V = factor_and_vectors(order, rank, dtype)
    L = LAYOUTS[layout](L)
    lower = L.double()
    want = torch.linalg.cholesky(0.9 * lower @ lower.mT + 1.5 * V.double() @ V.double().mT)
    got = cfl_ops.cholesky_update(L, V, 1.5, decay=0.9)
    relative = (got.double() - want).norm() / want.norm()
    assert relative <= 10 * torch.finfo(dtype).eps * order**0.5
    above = torch.full_like(L, torch.nan).triu(1)
    in_place = LAYOUTS[layout](L + above)
    assert cfl_ops.cholesky_update_(in_place, V, 1.5, decay=0.9) is in_place
    assert torch.equal(in_place.tril().nan_to_num(), got), "both forms are one kernel"
    assert torch.equal(in_place.isnan(), above.isnan()), "only the lower triangle is written"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 6])
def test_downdate_takes_back_an_update(rank, dtype, instruction_set) -> None:
    """Backward stable: eps of the larger matrix, seen through the condition of the smaller one."""
    L, V = factor_and_vectors(90, rank, dtype)
    grown = cfl_ops.cholesky_update(L, V)
    back = cfl_ops.cholesky_downdate(grown, V)
    size = torch.linalg.matrix_norm(grown.double(), 2)
    smallest = torch.linalg.svdvals(L.double())[-1]
    bound = 8 * torch.finfo(dtype).eps * 96**0.5 * size * size / smallest
    assert (back - L).double().norm() <= bound


@pytest.mark.parametrize("rank", [1, 3])
def test_semi_definite_factors(rank: int, instruction_set) -> None:
    """A zero factor, and one with zero pivots: L L^T + V V^T is right though the factor is singular."""
    generator = torch.Generator().manual_seed(rank)
    V = torch.randn(40, rank, generator=generator, dtype=torch.float64)
    out = cfl_ops.cholesky_update(torch.zeros(40, 40, dtype=torch.float64), V)
    torch.testing.assert_close(out @ out.mT, V @ V.mT, rtol=0, atol=1e-13 * 40)
    L = torch.linalg.cholesky(spd(40))
    L[:, 7] = 0
    out = cfl_ops.cholesky_update(L, V, 2.0, decay=0.5)
    torch.testing.assert_close(out @ out.mT, 0.5 * L @ L.mT + 2 * V @ V.mT, rtol=0, atol=1e-12)
    assert torch.equal(cfl_ops.cholesky_update(torch.zeros(3, 3), torch.zeros(3, rank)), torch.zeros(3, 3))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [(), (20,)])
def test_failed_downdate_changes_nothing(batch, layout, instruction_set) -> None:
    L = LAYOUTS[layout](torch.linalg.cholesky(spd(33 if not batch else 9, batch)).float())
    before = L.clone()
    V = torch.zeros(*L.shape[:-1], 2)
    V[..., 5, 1] = 100.0
    with pytest.raises(torch.linalg.LinAlgError, match=r"pivot 6"):
        cfl_ops.cholesky_downdate_(L, V)
    assert torch.equal(L, before)
    out, info = cfl_ops.cholesky_downdate_ex(L, V)
    assert torch.equal(out, before.tril())
    assert (info == 6).all()
    if batch:
        V[0] = 0
    with pytest.raises(torch.linalg.LinAlgError, match=r"Batch element 1" if batch else r"pivot"):
        cfl_ops.cholesky_downdate(L, V)


def test_overflow_and_nan_change_nothing(instruction_set) -> None:
    L = torch.linalg.cholesky(spd(40)).float()
    before = L.clone()
    for bad, error, text in (
        (torch.nan, ValueError, "V has NaN"),
        (3e38, torch.linalg.LinAlgError, "finite"),
    ):
        V = torch.zeros(40, 1)
        V[39] = bad
        with pytest.raises(error, match=text):
            cfl_ops.cholesky_update_(L, V, 4.0)
        assert torch.equal(L, before)
    L[20, 3] = torch.inf
    before = L.clone()
    with pytest.raises(ValueError, match="L has NaN or Inf"):
        cfl_ops.cholesky_update_(L, torch.ones(40, 1))
    assert torch.equal(L, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_vectors_of_an_ill_conditioned_factor(dtype) -> None:
    """Past the break-even the new matrix is formed and factored, but only where that is as accurate."""
    L = torch.diag(torch.logspace(0, -5, 64, dtype=torch.float64)).to(dtype)
    V = torch.zeros(64, 200, dtype=dtype)
    V[0] = 1.0
    got = cfl_ops.cholesky_update(L, V)
    want = L.double().clone()
    want[0, 0] = 201**0.5
    torch.testing.assert_close(got.double(), want, rtol=1e-5 if dtype == torch.float32 else 1e-13, atol=0)


def test_strided_and_shared_arguments() -> None:
    L = torch.linalg.cholesky(spd(12, (4,)))
    V = torch.randn(12, 2, dtype=torch.float64)
    want = torch.stack([cfl_ops.cholesky_update(one, V) for one in L])
    torch.testing.assert_close(cfl_ops.cholesky_update(L, V), want, rtol=0, atol=1e-14)
    torch.testing.assert_close(
        cfl_ops.cholesky_update(L[0].expand(4, 12, 12), V), want[:1].expand(4, -1, -1), rtol=0, atol=1e-14
    )
    wide = torch.full((4, 12, 24), 9.0, dtype=torch.float64)
    wide[..., ::2] = L
    cfl_ops.cholesky_update_(wide[..., ::2], V)
    torch.testing.assert_close(wide[..., ::2].tril(), want, rtol=0, atol=1e-14)
    assert (wide[..., 1::2] == 9).all()
    window = torch.full((4, 20, 30), 9.0, dtype=torch.float64)
    window[:, 3:15, 5:17] = L
    cfl_ops.cholesky_update_(window[:, 3:15, 5:17], V)
    torch.testing.assert_close(window[:, 3:15, 5:17].tril(), want, rtol=0, atol=1e-14)
    window[:, 3:15, 5:17] = 9
    assert (window == 9).all()


def test_bad_arguments() -> None:
    L, V = torch.eye(3), torch.ones(3, 1)
    with pytest.raises(ValueError, match=r"V must have size 3 in dimension -2"):
        cfl_ops.cholesky_update(L, torch.ones(4, 1))
    with pytest.raises(ValueError, match="square"):
        cfl_ops.cholesky_update(torch.ones(3, 2), V)
    with pytest.raises(TypeError, match="float32 or float64"):
        cfl_ops.cholesky_update(L.half(), V.half())
    with pytest.raises(TypeError, match="wider"):
        cfl_ops.cholesky_update(L, V.double())
    with pytest.raises(ValueError, match="decay must be finite and not negative"):
        cfl_ops.cholesky_update(L, V, decay=-1.0)
    with pytest.raises(ValueError, match="alpha must be finite"):
        cfl_ops.cholesky_update(L, V, float("nan"))
    with pytest.raises(ValueError, match="to be updated in place"):
        cfl_ops.cholesky_update_(L, torch.ones(2, 3, 1))
    with pytest.raises(RuntimeError, match="share memory"):
        cfl_ops.cholesky_update_(L.expand(2, 3, 3), torch.ones(2, 3, 1))
    with pytest.raises(RuntimeError, match="autograd"):
        cfl_ops.cholesky_update_(L.clone().requires_grad_(), V)
    assert torch.equal(L, torch.eye(3))
    half = cfl_ops.cholesky_update(L, V.half())
    assert half.dtype == torch.float32


def test_compiled_public_functions() -> None:
    L, V = torch.linalg.cholesky(spd(6)).float(), torch.randn(6, 2)

    def both(L: Tensor, V: Tensor) -> Tensor:
        grown = cfl_ops.cholesky_update(L, V, 0.5, decay=0.9)
        return cfl_ops.safe_cholesky(grown @ grown.mT).L

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(L, V), both(L, V))
    with pytest.raises(torch.linalg.LinAlgError):
        torch.compile(cfl_ops.cholesky_downdate, fullgraph=True, backend="aot_eager")(L, 100 * V)


# Append, delete


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("order", "new"), [(0, 3), (4, 1), (20, 7), (5, 0)])
def test_append(order, new, dtype) -> None:
    whole = spd(order + new, (2,))
    L = torch.linalg.cholesky(whole[:, :order, :order])
    want = torch.linalg.cholesky(whole)
    noise = torch.full_like(L, 5.0).triu(1)  # not to be read
    got = cfl_ops.cholesky_append(
        (L + noise).to(dtype), whole[:, order:, :order].to(dtype), whole[:, order:, order:].to(dtype)
    )
    torch.testing.assert_close(got.double(), want, rtol=0, atol=300 * torch.finfo(dtype).eps)


def test_append_failures() -> None:
    L = torch.eye(2).expand(3, 2, 2)
    rows = torch.zeros(3, 2, 2)
    corner = torch.eye(2).repeat(3, 1, 1)
    corner[1, 1, 1] = -1
    with pytest.raises(torch.linalg.LinAlgError, match=r"Batch element 1.*order 4"):
        cfl_ops.cholesky_append(L, rows, corner)
    assert cfl_ops.cholesky_append_ex(L, rows, corner)[1].tolist() == [0, 4, 0]
    with pytest.raises(ValueError, match="rows must have size 2 in dimension -1"):
        cfl_ops.cholesky_append(torch.eye(2), torch.ones(1, 3), torch.eye(1))


@pytest.mark.parametrize("index", [0, 3, -1, [1, 2], [0, 8, 4], [5, 4, 3, 0], [], list(range(9))])
def test_delete(index) -> None:
    whole = spd(9, (2,))
    gone = [i % 9 for i in ([index] if isinstance(index, int) else index)]
    keep = [i for i in range(9) if i not in gone]
    want = torch.linalg.cholesky(whole[:, keep][:, :, keep])
    got = cfl_ops.cholesky_delete(torch.linalg.cholesky(whole), index)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_delete_is_differentiable_and_checks_its_index() -> None:
    L = torch.linalg.cholesky(spd(5)).requires_grad_()
    assert torch.autograd.gradcheck(lambda L: cfl_ops.cholesky_delete(L, [1, 3]), L, fast_mode=True)
    for bad, error in ((5, IndexError), ([1, 1], ValueError), ([1, -4], ValueError), (1.5, TypeError)):
        with pytest.raises(error):
            cfl_ops.cholesky_delete(L, bad)


# Safe_cholesky


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_jitter", [0.0, 1e-3, 0.5])
def test_kernel_and_fallback_agree_on_jitter_and_info(dtype: torch.dtype, max_jitter: float) -> None:
    """Definite, barely so, singular, dead, stray entries in a dead row, indefinite, and not finite."""
    x = torch.randn(9, 20, 30, dtype=torch.float64)
    x[1, :, 1:] = x[1, :, :1]
    x[2] = x[2] @ torch.diag(torch.logspace(0, -9, 30, dtype=torch.float64))
    a = x @ x.mT
    a[3, 4], a[3, :, 4] = 0.0, 0.0
    a[4, 4, 4], a[5] = -1e-9, a[5] - 20 * torch.eye(20)
    a[6, 7, 2], a[7, 3, 3] = torch.inf, torch.nan
    a[8, 2], a[8, :, 2] = 1e-9, 1e-9
    a[8, 2, 2] = 0.0
    a = a.to(dtype)
    want = cfl_ops.ops.cholesky.safe._safe_python(a, max_jitter)
    got = cfl_ops.ops.cholesky.safe.SAFE(a, max_jitter)
    settled = torch.ones(9, dtype=torch.bool)
    settled[1:3] = max_jitter > 0  # without a jitter, the sign of a rounding error decides
    assert torch.equal(got[2][settled], want[2][settled])
    usable = settled & (got[2] == 0)
    # A jitter depends on the rounding of pivots that are rounding themselves: a step up or down.
    ratio = (got[1] / want[1])[usable & (want[1] > 0)]
    assert ((ratio > 0.12) & (ratio < 8.1)).all()
    assert torch.equal((got[1] > 0)[settled], (want[1] > 0)[settled])
    same = usable & (got[1] == want[1])
    assert bool(same[0])
    assert bool(same[3])
    back = got[0] @ got[0].mT
    torch.testing.assert_close(back[same], (want[0] @ want[0].mT)[same], rtol=1e-3, atol=1e-3)


def rank_deficient(kind: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(50, 120, generator=generator, dtype=torch.float64)
    if kind == "duplicates":
        x = torch.randn(400, 60, generator=generator, dtype=torch.float64).repeat(1, 2)
    if kind == "scales":
        x = x * torch.logspace(-9, 9, 120, dtype=torch.float64)
    if kind == "dead":
        x[:, ::7] = 0
    x = x.to(dtype)
    if kind == "constant":
        return torch.ones(40, 40, dtype=dtype)
    return x.mT @ x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["few rows", "duplicates", "scales", "dead", "constant"])
def test_semi_definite_matrices_never_raise(kind: str, dtype: torch.dtype) -> None:
    a = rank_deficient(kind, dtype)
    L, jitter = cfl_ops.safe_cholesky(a)
    eps, order = torch.finfo(dtype).eps, a.shape[-1]
    assert 0 < jitter <= 100 * eps * order, "of the size of the rounding, and reported"
    dead = a.diagonal() == 0
    wide = a.double()
    want = wide + torch.diag(float(jitter) * wide.diagonal() + dead.double())
    root = want.diagonal().sqrt()
    residual = (L.double() @ L.double().mT - want) / root / root.unsqueeze(-1)
    assert residual.abs().max() <= 4 * order * eps, "L L^T is what the report says"
    assert torch.equal(L[dead], torch.eye(order, dtype=dtype)[dead])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_jitter_where_none_is_needed(dtype: torch.dtype) -> None:
    """Up to condition numbers near 1 / eps, and each matrix of a batch on its own."""
    basis = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64)).Q
    worst = 1e4 if dtype == torch.float32 else 1e12
    hard = (
        basis
        @ torch.diag(torch.logspace(0, -torch.tensor(worst).log10(), 30, dtype=torch.float64))
        @ basis.mT
    )
    singular = torch.ones(30, 30, dtype=torch.float64)
    L, jitter = cfl_ops.safe_cholesky(torch.stack((hard, singular, torch.eye(30).double())).to(dtype))
    assert jitter[0] == 0
    assert jitter[1] > 0
    assert jitter[2] == 0
    assert torch.equal(L[2], torch.eye(30, dtype=dtype))


def test_indefinite_and_nan_matrices_raise() -> None:
    a = torch.eye(3).repeat(2, 1, 1)
    a[1, 2, 0] = 5.0
    with pytest.raises(torch.linalg.LinAlgError, match="Batch element 1"):
        cfl_ops.safe_cholesky(a)
    a[1, 2, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        cfl_ops.spd_inverse(a)
    assert cfl_ops.spd_inverse_ex(a)[2].tolist() == [0, -1]
    negative = torch.diag(torch.tensor([1.0, -1.0]))
    assert int(cfl_ops.safe_cholesky_ex(negative)[1]) == 1


def test_spd_inverse_of_a_gptq_hessian_with_dead_columns() -> None:
    x = torch.randn(300, 64).relu() * torch.logspace(-3, 3, 64)
    x[:, [5, 17]] = 0
    hessian = 2 * x.mT @ x
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(hessian)
    inverse, jitter, info = cfl_ops.spd_inverse_ex(hessian)
    assert int(info) == 0
    assert float(jitter) == 0, "dead columns are no reason to change the others"
    live = [i for i in range(64) if i not in (5, 17)]
    want = torch.linalg.inv(hessian.double()[live][:, live])
    unit = hessian.double().diagonal()[live].sqrt()
    error = (inverse[live][:, live].double() - want) * unit * unit.unsqueeze(-1)
    scaled = (want * unit * unit.unsqueeze(-1)).norm()
    assert error.norm() <= 64 * torch.finfo(torch.float32).eps * scaled * scaled
    assert torch.equal(inverse[5], torch.eye(64)[5])


# Triton

TRITON = [
    "rank one", "batch decay", "downdate", "more vectors than rows", "no vectors", "negative diagonal group",
    "nan in V", "huge group", "too much", "order zero batch",
]  # fmt: skip


@pytest.mark.parametrize(
    "case", [c for c in UPDATES if c.name in TRITON], ids=lambda c: c.name.replace(" ", "_")
)
@pytest.mark.parametrize("spec", SPECS[:2], ids=lambda s: s.op.name)
def test_triton_interpreted(spec, case) -> None:
    if not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    with cfl_ops.config.use_backend("triton"):
        for dtype in case.dtypes if spec is SPECS[0] else case.dtypes[:1]:
            args = case.make(dtype)
            contract.assert_within(contract.results(spec, args), spec.oracle(*args), spec.bound(*args))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from cfl_ops.triton_kernels.cholesky import _update_kernel

names = {"l_ptr": "*fp64", "v_ptr": "*fp64", "info_ptr": "*i32", "order": "i32", "rank": "i32", "breakdown": "fp32"}
options = {"DOWN": True, "BLOCK": 128, "RANK": 4}
source = ASTSource(fn=_update_kernel, signature=names | dict.fromkeys(options, "constexpr"), constexprs=options)
for capability in (80, 90):
    assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
"""


def test_triton_compiles_without_a_gpu() -> None:
    if not dispatch.triton_available():
        pytest.skip("triton is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("rank", [1, 3])
def test_small_changes_do_not_drift(backend: str, rank: int) -> None:
    """The roundings of n updates by small vectors are as good as random: they all went one way, n / 2 eps."""
    if backend == "triton":
        pytest.skip("a thousand launches in the interpreter")
    updates, generator = 1000, torch.Generator().manual_seed(0)
    V = 1e-6 * torch.randn(updates, 2, rank, generator=generator, dtype=torch.float64)
    L = torch.eye(2, dtype=torch.float64)
    for v in V:
        cfl_ops.cholesky_update_(L, v)
    eps = torch.finfo(torch.float64).eps
    # Of L L^T - I, which is small enough to be exact.
    added = torch.einsum("nik,njk->ij", V, V)
    change = L @ L.mT - torch.eye(2, dtype=torch.float64)
    assert (change - added).abs().max() <= 4 * eps * updates**0.5
