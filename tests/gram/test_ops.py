"""gram: what the contract table does not say."""

from __future__ import annotations

import io

import cfl_ops
import pytest
import torch
from cfl_ops._core import dispatch
from cfl_ops._gpu import tuning

OPS = ("gram",)


def test_moments_without_targets_are_none() -> None:
    m = cfl_ops.gram(torch.randn(4, 3))
    assert m.cross is None
    assert m.target_sum is None
    assert m.target_sq is None
    assert m.count.dtype == torch.float64


def test_exactly_symmetric(backend: str) -> None:
    x, s = torch.randn(50, 37), torch.rand(50)
    for m in (cfl_ops.gram(x, sample_weight=s, bias_column=True), cfl_ops.gram(x)):
        assert torch.equal(m.gram, m.gram.mT)


def test_add_and_decay_follow_the_rows() -> None:
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randn(10, 2, dtype=torch.float64)
    whole = cfl_ops.gram(x, y, bias_column=True)
    parts = cfl_ops.gram(x[:3], y[:3], bias_column=True) + cfl_ops.gram(x[3:], y[3:], bias_column=True)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)
    halved = whole.decay(0.5)
    torch.testing.assert_close(halved.cross, whole.cross / 2)
    assert halved.count == 5
    with pytest.raises(ValueError, match=r"with and without targets"):
        whole + cfl_ops.gram(x, bias_column=True)
    with pytest.raises(ValueError, match=r"rho must be finite and not negative, but got -1"):
        whole.decay(-1)


def test_saves_and_loads_with_weights_only() -> None:
    m = cfl_ops.gram(torch.randn(4, 3), torch.randn(4, 2))
    buffer = io.BytesIO()
    torch.save(m, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert isinstance(loaded, cfl_ops.GramMoments)
    assert torch.equal(loaded.gram, m.gram)


def test_to_keeps_the_count_exact() -> None:
    m = cfl_ops.gram(torch.randn(4, 3), torch.randn(4, 2)).to(torch.float16)
    assert m.gram.dtype == torch.float16
    assert m.count.dtype == torch.float64


def test_float64_accumulation_beats_float32_by_its_digits(backend: str) -> None:
    x = torch.randn(3000, 6) + 100
    want = x.double().mT @ x.double()
    got = cfl_ops.gram(x, acc_dtype=torch.float64).gram
    assert got.dtype == torch.float64
    assert ((got - want).abs() / want.abs()).max() < 1e-14


def test_huge_row_stride_is_indexed_in_64_bits() -> None:
    """Rows 2^31 elements apart: the storage is virtual memory that is never touched in between."""
    rows, gap = 3, 2**31 + 7
    storage = torch.empty(gap * (rows - 1) + 4, dtype=torch.float16)
    x = torch.as_strided(storage, (rows, 4), (gap, 1))
    x.copy_(torch.arange(12.0).reshape(3, 4))
    want = x.float().mT @ x.float()
    assert torch.equal(cfl_ops.gram(x).gram, want)


def test_multiples_of_a_row_stride_are_64_bits_in_triton() -> None:
    """A step through 64 rows that are 2^25 elements apart is 2^31 elements."""
    if not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    x, s = torch.empty(70, 1 << 25, dtype=torch.float16)[:, :3], torch.empty(70, 1 << 25)[:, 0]
    x.copy_(torch.randn(70, 3))
    s.copy_(torch.rand(70))
    use = {
        "how": "pointers",
        "TILE": 16,
        "TILE_N": 16,
        "DEPTH": 64,
        "num_warps": 4,
        "num_stages": 2,
        "resident": 1,
    }
    with cfl_ops.config.use_backend("triton"), tuning.force("gram", use):
        got = cfl_ops.gram(x, x.clone(), sample_weight=s)
    wide = x.double()
    want = wide.mT @ (wide * s.double()[:, None])
    torch.testing.assert_close(got.gram.double(), want, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(got.cross.double(), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("acc_dtype", [torch.float32, torch.float64])
def test_weights_of_any_dtype(kind: torch.dtype, acc_dtype: torch.dtype, backend: str) -> None:
    """Narrower than the features, or than the sums."""
    x, y, s = torch.randn(40, 5), torch.randn(40, 2), torch.rand(40).to(kind)
    got = cfl_ops.gram(x, y, sample_weight=s, bias_column=True, acc_dtype=acc_dtype)
    wide = cfl_ops.gram(x.double(), y.double(), sample_weight=s.double(), bias_column=True)
    for g, w in zip(got, wide, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-5)


def test_mixed_dtypes_promote() -> None:
    x, y = torch.randn(5, 3).bfloat16(), torch.randn(5, 2)
    m = cfl_ops.gram(x, y)
    torch.testing.assert_close(m.cross, x.float().mT @ y)


def test_autocast_leaves_the_dtype_alone() -> None:
    x = torch.randn(6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = torch.nn.functional.linear(x, torch.randn(4, 3))
        m = cfl_ops.gram(features, torch.randn(6, 2))
    assert features.dtype == torch.bfloat16
    assert m.gram.dtype == torch.float32


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (([1.0],), {}, TypeError, "x must be a tensor, but got list"),
        ((torch.ones(3),), {}, ValueError, r"x must have at least 2 dimensions, but got shape \(3,\)"),
        ((torch.ones(3, 2, dtype=torch.int32),), {}, TypeError, "x must be float16.*got torch.int32"),
        ((torch.ones(3, 2), torch.ones(4, 1)), {}, ValueError, r"y must have size 3 .*got shape \(4, 1\)"),
        ((torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)), {}, TypeError, "needs num_classes"),
        ((torch.ones(3, 2), torch.zeros(3)), {"num_classes": 2}, TypeError, "must be int64 class indices"),
        ((torch.ones(3, 2), torch.zeros(3, dtype=torch.int64)), {"num_classes": 0}, ValueError, "at least 1"),
        ((torch.ones(3, 2),), {"num_classes": 2}, ValueError, "num_classes is given, but y is not"),
        ((torch.ones(3, 2),), {"acc_dtype": torch.float16}, TypeError, "acc_dtype must be torch.float32 or"),
        ((torch.ones(3, 2).double(),), {"acc_dtype": torch.float32}, TypeError, "float64 for float64 x"),
        ((torch.ones(3, 2),), {"sample_weight": torch.ones(2)}, ValueError, "sample_weight must have size 3"),
        ((torch.ones(2, 3, 2), torch.ones(5, 3, 1)), {}, ValueError, r"do not broadcast: x \(2,\), y \(5,\)"),
        ((torch.ones(3, 2), torch.ones(3, 1, device="meta")), {}, ValueError, "y must be on the device of x"),
        ((torch.ones(3, 2).to_sparse(),), {}, TypeError, "strided tensor"),
    ],
)  # fmt: skip
def test_bad_arguments(args, kwargs, error, message) -> None:
    with pytest.raises(error, match=rf"cfl_ops\.gram: .*{message}"):
        cfl_ops.gram(*args, **kwargs)


def test_bad_data(backend: str) -> None:
    x, y = torch.ones(3, 2), torch.tensor([0, 5, 1])
    with pytest.raises(
        IndexError, match=r"cfl_ops\.gram: y must hold class indices from 0 to 1, but got 5 in row 1"
    ):
        cfl_ops.gram(x, y, num_classes=2)
    with pytest.raises(
        ValueError, match=r"sample_weight must not be negative or NaN, but got -1\.0 in row 2"
    ):
        cfl_ops.gram(x, sample_weight=torch.tensor([1.0, 0.0, -1.0]))
    bad = torch.ones(2, 3, 2)
    bad[1, 0, 1], bad[1, 2, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match=r"\(Batch element 1\): x has 2 NaN or Inf values"):
        cfl_ops.gram(bad, acc_dtype=torch.float64)
    assert cfl_ops.gram(bad).gram[1, 0, 0] == torch.inf


def test_bad_data_raises_in_a_compiled_graph() -> None:
    compiled = torch.compile(lambda x, y: cfl_ops.gram(x, y, num_classes=2).cross, fullgraph=True)
    x = torch.randn(3, 2)
    good = torch.tensor([0, 1, 1])
    torch.testing.assert_close(compiled(x, good), cfl_ops.gram(x, good, num_classes=2).cross)
    with pytest.raises(IndexError, match="but got 7 in row 2"):
        compiled(x, torch.tensor([0, 1, 7]))


def test_two_threads_give_the_same_bits_every_time() -> None:
    """Large enough for a parallel region; the result is a function of the number of threads alone."""
    x, y = torch.randn(20_000, 70), torch.randn(20_000, 3)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        first, second = cfl_ops.gram(x, y), cfl_ops.gram(x, y)
        assert torch.equal(first.gram, second.gram)
        assert torch.equal(first.cross, second.cross)
        want = x.double().mT @ x.double()
        bound = 20_002 * torch.finfo(torch.float32).eps * (x.double().abs().mT @ x.double().abs())
        assert ((first.gram - want).abs() <= bound).all()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_triton_takes_half_precision_as_it_is(
    bias: bool, classes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensor cores' path for float16, which the interpreter can run (bfloat16 it cannot)."""
    if not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    from cfl_ops.triton_kernels import gram as launchers

    monkeypatch.setattr(launchers, "INTERPRETED", False)
    x = torch.randn(2, 300, 70).half()
    y = torch.randint(5, (2, 300)) if classes else torch.randn(2, 300, 5).half()
    options = {"bias_column": bias, "num_classes": 5 if classes else None}
    want = cfl_ops.gram(x.double(), y if classes else y.double(), **options)
    for precision in ("highest", "high"):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda precision=precision: precision)
        with cfl_ops.config.use_backend("triton"):
            got = cfl_ops.gram(x, y, **options)
            single = cfl_ops.gram(x.float(), y if classes else y.float(), **options)
        for moments in (got, single):
            torch.testing.assert_close(moments.gram.double(), want.gram, rtol=1e-5, atol=1e-3)
            torch.testing.assert_close(moments.cross.double(), want.cross, rtol=1e-5, atol=1e-3)
            assert torch.equal(moments.gram, moments.gram.mT)


@pytest.mark.parametrize("decay", [1 - 1e-7, 1 + 1e-7])
def test_a_decay_that_float32_would_round_is_refused(decay: float) -> None:
    """Float32 makes 1 - 1.2e-7 of it: forgetting a fifth faster than was said, and than the count."""
    x = torch.randn(4, 3)
    m = cfl_ops.gram(x)
    before = m.gram.clone()
    for call in (lambda: cfl_ops.gram_(m, x, decay=decay), lambda: m.decay(decay)):
        with pytest.raises(ValueError, match="must be 1, or differ from it by 1e-6, for float32 moments"):
            call()
    assert torch.equal(m.gram, before)
    cfl_ops.gram_(cfl_ops.gram(x, acc_dtype=torch.float64), x, decay=decay)
    accumulator = cfl_ops.GramAccumulator(decay=decay)
    accumulator.update(x)
    with pytest.raises(ValueError, match="use acc_dtype=torch.float64"):
        accumulator.update(x)
    assert accumulator.batches == 1


WORST = [  # rows, mean, scale, dtype, what the weights are: the worst cells of a sweep of 18,000
    (2000, 1e6, 1e-6, torch.float32, None),
    (2000, 1e3, 1.0, torch.float16, "wide"),
    (130, 0.0, 1e-6, torch.bfloat16, None),
    (3, 0.0, 1e18, torch.float32, "tiny"),
    (13, 1.0, 1e6, torch.float64, "wide"),
    (3, 0.0, 1e-16, torch.bfloat16, None),
]


@pytest.mark.parametrize(("rows", "mean", "scale", "dtype", "weights"), WORST)
@pytest.mark.parametrize("how", ["gram", "classes", "gram_", "sum"])
def test_moments_keep_the_bound_of_a_sum(
    rows: int, mean: float, scale: float, dtype: torch.dtype, weights: str | None, how: str, backend: str
) -> None:
    """(n + 3) eps of the sums of magnitudes, whatever the mean, scale and weights."""
    x = (mean + scale * torch.randn(rows, 6, dtype=torch.float64)).to(dtype)
    y, labels = torch.randn(rows, 2).to(dtype), torch.randint(3, (rows,))
    spread = 10.0 ** (16 * torch.rand(rows, dtype=torch.float64) - 8)
    s = {None: None, "wide": spread, "tiny": 1e-8 * torch.rand(rows, dtype=torch.float64)}[weights]
    weight = torch.ones(rows, dtype=torch.float64) if s is None else s
    options = {"bias_column": True, "num_classes": 3 if how == "classes" else None}
    targets = labels if how == "classes" else y
    half = rows // 2
    if how in ("gram", "classes"):
        m = cfl_ops.gram(x, targets, sample_weight=s, **options)
    else:
        first, rest = slice(None, half), slice(half, None)
        m = cfl_ops.gram(x[first], y[first], bias_column=True, sample_weight=None if s is None else s[first])
        more = None if s is None else s[rest]
        if how == "gram_":
            cfl_ops.gram_(m, x[rest], y[rest], bias_column=True, sample_weight=more, decay=0.5)
        else:
            m = m.decay(0.5) + cfl_ops.gram(x[rest], y[rest], bias_column=True, sample_weight=more)
        weight = weight.clone()
        weight[first] *= 0.5
    wide = torch.cat([x.double(), torch.ones(rows, 1, dtype=torch.float64)], 1)
    t = torch.nn.functional.one_hot(labels, 3).double() if how == "classes" else y.double()
    eps = (rows + 3) * torch.finfo(m.gram.dtype).eps + (rows + 3) * torch.finfo(torch.float64).eps
    for got, left, right in ((m.gram, wide, wide), (m.cross, wide, t)):
        weighted = left * weight.unsqueeze(-1)
        assert ((got.double() - weighted.mT @ right).abs() <= eps * (weighted.abs().mT @ right.abs())).all()
    assert abs(float(m.count) / float(weight.sum()) - 1) < rows * torch.finfo(torch.float64).eps
