"""quantize, dequantize and the choice of bits against independent oracles, on hard inputs.

"native" runs at each instruction set below the machine's best; "python" is the fallback called directly.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import cfl_ops
import numpy as np
import pytest
import torch
from cfl_ops.ops.codec.quantize import DEQUANTIZE, QUANTIZE
from torch import Tensor

from tests.codec.helpers import FLOATS, NATIVE, normal_symbols, same, sample_places

if NATIVE:
    from cfl_ops import _C


def hard_weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(70_001, generator=generator, dtype=torch.float64)
    return {
        "normal": x,
        "tiny scale": x * 1e-30,
        "huge scale": x * 1e30,
        "offset": 1e4 + x,
        "constant": torch.full((5,), -0.75, dtype=torch.float64),
        "two values": torch.tensor([3.0, -1.0, 3.0, -1.0], dtype=torch.float64),
        "one": torch.tensor([2.5], dtype=torch.float64),
        "zeros": torch.zeros(17, dtype=torch.float64),
        "zeros of both signs": torch.tensor([-0.0, 0.0, -0.0], dtype=torch.float64),
        "outlier": torch.cat([x[:100] * 1e-3, torch.tensor([1e3], dtype=torch.float64)]),
    }


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits", [1, 4, 8, 9, 16])
def test_quantize_matches_exact_arithmetic(backend: str, dtype: torch.dtype, bits: int) -> None:
    for name, w64 in hard_weights().items():
        if dtype == torch.float16 and "scale" in name:
            continue
        w = w64.to(dtype)
        q = cfl_ops.quantize(w, bits, histogram=True)
        exact = w.to(torch.float64).numpy().astype(np.longdouble)
        low, high, levels = exact.min(), exact.max(), 2**bits
        assert float(q.minimum) == float(low)
        assert float(q.maximum) == float(high)
        symbols = q.symbols.to(torch.int64).numpy()
        assert q.histogram is not None
        np.testing.assert_array_equal(q.histogram.numpy(), np.bincount(symbols, minlength=levels))
        back = cfl_ops.dequantize(q)
        assert back.dtype == dtype
        if low == high:
            assert (symbols == 0).all()
            assert torch.equal(back, w)
            continue
        # (w - low) * scale in arithmetic of eps: three roundings of a number up to 2^bits.
        ideal = (exact - low) / (high - low) * levels
        eps = 2.0**-53 if dtype == torch.float64 else 2.0**-24
        slack = 4 * eps * levels
        index = np.minimum(np.floor(ideal), levels - 1)
        near_edge = np.abs(ideal - np.round(ideal)) <= slack
        assert (np.abs(symbols - index) <= near_edge).all(), name
        assert symbols[exact.argmax()] == levels - 1
        assert symbols[exact.argmin()] == 0
        # Half a bin, the roundings above, and the last rounding to the dtype.
        centre = low + (symbols + np.longdouble(0.5)) * (high - low) / levels
        unit = max(abs(float(low)), abs(float(high)))
        bound = 4 * eps * unit + (torch.finfo(dtype).eps * unit if dtype.itemsize == 2 else 0)
        assert np.abs(back.to(torch.float64).numpy() - centre).max() <= bound, name


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        (torch.float32, [-3.4e38, 3.4e38, 0.0, 1e38]),
        (torch.float32, [0.0, 1e-45, 3e-45, 1.4e-44]),
        (torch.float64, [-1.7e308, 1.7e308, 0.0, 1e308]),
        (torch.float64, [0.0, 5e-324, 1e-323, 4e-323]),
        (torch.float16, [-65504.0, 65504.0, 0.0, 6e-8]),
        (torch.bfloat16, [-3.3e38, 3.3e38, 0.0, 1e-40]),
    ],
)
def test_ranges_at_the_ends_of_the_dtype(backend: str, dtype: torch.dtype, values: list[float]) -> None:
    w = torch.tensor(values, dtype=dtype)
    q = cfl_ops.quantize(w, 8)
    back = cfl_ops.dequantize(q)
    assert back.isfinite().all()
    exact, got = w.double().numpy().astype(np.longdouble), back.double().numpy().astype(np.longdouble)
    bin_size = (exact.max() - exact.min()) / 256
    smallest = np.longdouble(torch.finfo(dtype).smallest_normal) * np.longdouble(torch.finfo(dtype).eps)
    ulp = np.longdouble(torch.finfo(dtype).eps) * np.abs(exact).max()
    assert (np.abs(got - exact) <= bin_size / 2 + ulp + smallest).all()


def test_order_is_kept_not_mirrored(backend: str) -> None:
    w = torch.linspace(-1, 3, 500)
    symbols = cfl_ops.quantize(w, 5).symbols.to(torch.int64)
    assert (symbols.diff() >= 0).all()
    assert symbols[0] == 0
    assert symbols[-1] == 31
    assert (cfl_ops.dequantize(cfl_ops.quantize(w, 5)).diff() >= 0).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_rows_and_blocks(backend: str, dtype: torch.dtype) -> None:
    w = (torch.randn(7, 3, 45, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    rows = cfl_ops.quantize(w, 6, per="row", histogram=True)
    assert rows.minimum.shape == (7, 3)
    assert torch.equal(rows.minimum, w.amin(-1) + 0.0)
    for i, j in itertools.product(range(7), range(3)):
        alone = cfl_ops.quantize(w[i, j], 6, histogram=True)
        assert same(rows.symbols[i, j], alone.symbols)
        assert rows.histogram is not None
        assert alone.histogram is not None
        assert torch.equal(rows.histogram[i, j], alone.histogram)
        assert torch.equal(cfl_ops.dequantize(rows)[i, j], cfl_ops.dequantize(alone))
    for size in (1, 10, 45, 945, 4000):
        blocks = cfl_ops.quantize(w, 6, per="block", block_size=size)
        pieces = [cfl_ops.dequantize(cfl_ops.quantize(piece, 6)) for piece in w.flatten().split(size)]
        assert torch.equal(cfl_ops.dequantize(blocks).flatten(), torch.cat(pieces))


def test_strides_and_empty_shapes(backend: str) -> None:
    base = torch.randn(40, 60, generator=torch.Generator().manual_seed(3))
    for view in (base.T, base[::3, 5::7], base[0].expand(9, 60), base[:, :0]):
        q = cfl_ops.quantize(view, 8)
        assert same(q.symbols, cfl_ops.quantize(view.contiguous(), 8).symbols)
        assert cfl_ops.dequantize(q).shape == view.shape
    for shape in ((0,), (3, 0), (0, 4)):
        q = cfl_ops.quantize(torch.empty(shape), 8, per="row", histogram=True)
        assert q.symbols.shape == shape
        assert q.minimum.shape == shape[:-1]
        assert q.histogram is not None
        assert q.histogram.shape == (*shape[:-1], 256)
        assert (q.histogram == 0).all()
        assert cfl_ops.dequantize(q).shape == shape
    scalar = cfl_ops.quantize(torch.tensor(1.5), 8)
    assert scalar.symbols.shape == ()
    assert float(cfl_ops.dequantize(scalar)) == 1.5


@pytest.mark.parametrize("dtype", FLOATS)
def test_nonfinite_weights_are_refused_with_their_count(backend: str, dtype: torch.dtype) -> None:
    w = torch.randn(200_000, generator=torch.Generator().manual_seed(4)).to(dtype)
    w[[0, 77_777, 199_999]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    with pytest.raises(
        ValueError, match=r"cfl_ops.quantize: w must be finite, but it has 3 NaN or Inf values"
    ):
        cfl_ops.quantize(w)
    with pytest.raises(ValueError, match=r"cfl_ops.estimate_entropy.*3 NaN or Inf values"):
        cfl_ops.estimate_entropy(w)
    q, info = cfl_ops.quantize_ex(w)
    assert int(info) == 3
    finite = w[w.isfinite()]
    assert float(q.minimum) == float(finite.min())
    assert float(q.maximum) == float(finite.max())
    assert (q.symbols == 0).all()
    q, info = cfl_ops.quantize_ex(torch.tensor([[math.nan, math.inf], [1.0, 2.0]], dtype=dtype), per="row")
    assert info.tolist() == [2, 0]
    assert q.symbols[1].tolist() == [0, 255]


def test_backends_agree_bit_for_bit() -> None:
    if not NATIVE:
        pytest.skip("needs the extension")
    generator = torch.Generator().manual_seed(5)
    for dtype, bits in itertools.product(FLOATS, (1, 3, 8, 11, 16)):
        w = (torch.randn(3, 5000, generator=generator) * torch.tensor([[1.0], [1e-3], [50.0]])).to(dtype)
        for level in range(min(_C.best_isa(), 2) + 1):
            _C.set_isa(level)
            try:
                native = QUANTIZE(w, bits, True)
                for mine, theirs in zip(native, QUANTIZE.python(w, bits, True), strict=True):
                    assert same(mine, theirs)
                back = DEQUANTIZE(*native[:3], bits)
                assert same(back, DEQUANTIZE.python(*native[:3], bits))
            finally:
                _C.set_isa(_C.best_isa())


def test_argument_errors_name_the_argument() -> None:
    w = torch.randn(4)
    cases = [
        (lambda: cfl_ops.quantize(w.int()), TypeError, "quantize: w must be float16"),
        (lambda: cfl_ops.quantize(w, 0), ValueError, "bits must be an integer from 1 to 16, but got 0"),
        (lambda: cfl_ops.quantize(w, 17), ValueError, "but got 17"),
        (lambda: cfl_ops.quantize(w, 8.0), TypeError, "but got float 8.0"),  # type: ignore[arg-type]
        (lambda: cfl_ops.quantize(w, per="column"), ValueError, "per must be one of"),
        (lambda: cfl_ops.quantize(w, block_size=3), ValueError, "block_size must be given with"),
        (
            lambda: cfl_ops.quantize(w, per="block", block_size=0),
            ValueError,
            "block_size must be at least 1, but got 0",
        ),
        (lambda: cfl_ops.quantize(w.sum(), per="row"), ValueError, "at least 1 dimension"),
        (lambda: cfl_ops.estimate_entropy(w, fraction=0.0), ValueError, r"fraction must be in \(0, 1\]"),
        (lambda: cfl_ops.dequantize(w), TypeError, "q must be a QuantizedTensor"),  # type: ignore[arg-type]
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("bits", "fraction"), [(4, 0.03), (4, 1.0), (8, 0.5)])
def test_entropy_is_that_of_the_sampled_histogram(
    backend: str, dtype: torch.dtype, bits: int, fraction: float
) -> None:
    w = torch.randn(200, 1000, generator=torch.Generator().manual_seed(6)).to(dtype)
    exact = w.double().numpy().ravel()
    index = np.minimum((exact - exact.min()) / (exact.max() - exact.min()) * 2**bits, 2**bits - 1).astype(int)
    every = max(1, min(round(1 / fraction), w.numel() // 4096))
    counts = np.bincount(index[sample_places(w.numel(), every)])
    p = counts[counts > 0] / counts.sum()
    # Two roundings of the bin index may move a weight to the next bin: allow for a few of them.
    assert (
        abs(float(cfl_ops.estimate_entropy(w, bits=bits, fraction=fraction)) + (p * np.log2(p)).sum()) < 2e-3
    )


@pytest.mark.parametrize("width", [7, 32, 33, 66, 512, 4096])
def test_entropy_does_not_depend_on_where_columns_lie(backend: str, width: int) -> None:
    # A column is dead (H was 0 where it was the one that the sample met), or is the only one alive.
    rows = 300_000 // width
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(8))
    for column in (0, 1, width - 1):
        dead = w.clone()
        dead[:, column] = 0
        one = torch.zeros_like(w)
        one[:, column] = w[:, column]
        for case in (dead, one):
            # Of the 16 bins each count is off by the square root of a binomial's variance, and a little more.
            found = float(cfl_ops.estimate_entropy(case))
            assert abs(found - float(cfl_ops.estimate_entropy(case, fraction=1.0))) < 0.06
    few = w.flatten()[:33]
    assert float(cfl_ops.estimate_entropy(few)) == float(cfl_ops.estimate_entropy(few, fraction=1.0)) > 2


def test_entropy_of_degenerate_tensors_and_allocation(backend: str) -> None:
    for w in (torch.empty(0), torch.tensor(3.0), torch.full((100,), 2.0)):
        assert float(cfl_ops.estimate_entropy(w)) == 0.0
    w = torch.randn(9999, generator=torch.Generator().manual_seed(7))
    assert torch.equal(cfl_ops.estimate_entropy(w), cfl_ops.estimate_entropy(w))
    # N = H + c rounded half up, within 1 and 16.
    assert cfl_ops.allocate_bits(2.5, floor=6) == 9
    assert cfl_ops.allocate_bits(2.49, floor=6) == 8
    assert cfl_ops.allocate_bits(0.0, floor=0) == 1
    assert cfl_ops.allocate_bits(14.0, floor=6) == 16


def test_opcheck() -> None:
    w = torch.randn(3, 40)
    symbols, minimum, maximum, _, _ = QUANTIZE(w, 5, False)
    check = torch.library.opcheck
    check(QUANTIZE.overload, (w, 5, True))
    check(QUANTIZE.overload, (w.double().T, 12, False))
    check(DEQUANTIZE.overload, (symbols, minimum, maximum, 5))
    check(
        DEQUANTIZE.overload,
        (symbols, minimum.clone().requires_grad_(), maximum.clone().requires_grad_(), 5),
    )


def test_dequantize_derivatives() -> None:
    symbols = normal_symbols(60, 6).view(3, 20)
    low = torch.tensor([-1.0, 0.2, 3.0], dtype=torch.float64, requires_grad=True)
    high = torch.tensor([2.0, 0.9, 3.5], dtype=torch.float64, requires_grad=True)

    def weights(a: Tensor, b: Tensor) -> Tensor:
        return DEQUANTIZE(symbols, a, b, 6)

    assert torch.autograd.gradcheck(weights, (low, high))
    assert torch.autograd.gradgradcheck(weights, (low, high))


def test_vmap() -> None:
    w = torch.randn(4, 3, 50)
    together = torch.vmap(lambda x: cfl_ops.quantize_ex(x, 8, per="row")[0][:3], in_dims=1)(w)
    for i in range(3):
        alone = cfl_ops.quantize(w[:, i], 8, per="row")
        assert same(together[0][i], alone.symbols)
        assert same(together[1][i], alone.minimum)
    back = torch.vmap(lambda s, a, b: DEQUANTIZE(s, a, b, 8))(*together)
    assert same(back[1], cfl_ops.dequantize(cfl_ops.quantize(w[:, 1], 8, per="row")))


def test_result_survives_pickle_and_pytree(tmp_path: Path) -> None:
    q = cfl_ops.quantize(torch.randn(10), 4)
    torch.save(q, tmp_path / "q.pt")
    back = torch.load(tmp_path / "q.pt", weights_only=True)
    assert isinstance(back, cfl_ops.QuantizedTensor)
    assert same(back.symbols, q.symbols)
    leaves, spec = torch.utils._pytree.tree_flatten(q)
    assert isinstance(torch.utils._pytree.tree_unflatten(leaves, spec), cfl_ops.QuantizedTensor)
