"""Budgets of bytes and of errors are kept, on hard inputs too, and no more is spent than they need."""

from __future__ import annotations

import itertools
import math
import warnings
from fractions import Fraction
from typing import Any

import cfl_ops
import pytest
import torch
from cfl_ops.ops.codec.blob import store_planned
from cfl_ops.ops.codec.measure import deviation_of, errors_of, rms_of
from cfl_ops.ops.codec.plan import Grid, Options, find_grid, stretched
from cfl_ops.ops.codec.quantize import to_bins
from cfl_ops.ops.codec.state_dict import named_blobs
from torch import Tensor

from tests.codec.helpers import EXHAUSTIVE, FLOATS, same


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def compressed(state: dict[str, Tensor], **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Blobs, and what they give back; nothing warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blobs = cfl_ops.compress_state_dict(state, **options)
    back = cfl_ops.decompress_state_dict(blobs)
    for name, value in state.items():
        assert (back[name].shape, back[name].dtype) == (value.shape, value.dtype)
    return blobs, back


def size(blobs: dict[str, Tensor]) -> int:
    return sum(len(blob) for blob in blobs.values())


def off(w: Tensor, back: Tensor) -> tuple[float, float, float]:
    """The rms and the largest error, and the standard deviation, of the finite weights in float64."""
    kept = w.isfinite()
    assert same(w[~kept], back[~kept])
    x, y = w[kept].double(), back[kept].double()
    if x.numel() == 0:
        return 0.0, 0.0, 0.0
    unit = float(x.abs().max()) or 1.0
    error = (x / unit - y / unit).abs()
    return (
        float(error.square().mean().sqrt()) * unit,
        float(error.max()) * unit,
        float((x / unit).std(correction=0)) * unit,
    )


def spiked(*places: float) -> Tensor:
    w = normal(60, 70)
    w.view(-1)[100 : 100 + len(places)] = torch.tensor(places)
    return w


HARD = {
    "normal": normal(80, 70),
    "constant": torch.full((300,), 0.1),
    "zeros": torch.zeros(40, 40),
    "two values": torch.where(normal(50, 50) > 0, 1.0, -1.0),
    "a hundred values": (normal(80, 60) * 15).round() / 7,
    "half zeros": torch.where(normal(80, 70) > 0, normal(80, 70, seed=1), 0.0),
    "outlier": spiked(1e6),
    "outliers": spiked(30.0, -50.0, 1e4, 1e30),
    "far apart": torch.cat([normal(2000) * 1e-3 - 1e3, normal(2000) * 1e-3 + 1e3]),
    "heavy tails": normal(80, 70) / normal(80, 70, seed=1),
    "offset": normal(70, 60) * 1e-4 + 1,
    "tiny": normal(70, 60) * 1e-42,
    "huge": normal(70, 60) * 5e37,
    "mask": torch.where(normal(70, 60) > 0, 0, torch.finfo(torch.float32).min),
    "bfloat16": normal(80, 70).bfloat16(),
    "float16": (normal(80, 70) * 1e4).half(),
    "float64": normal(80, 70).double() * 1e200,
    "column": normal(90, 100)[:, 3::2].T,
    "small": normal(3, 5),
    "one": torch.tensor([[2.5]]),
    "scalar": torch.tensor(2.5),
    "nothing": torch.empty(0, 4),
}
NONFINITE = {
    "all NaN": torch.full((40, 40), math.nan),
    "NaN and Inf": spiked(math.nan, math.inf, -math.inf, math.nan),
    "some finite": torch.where(normal(50, 50) > 2, normal(50, 50), math.nan),
}


@pytest.mark.parametrize("kind", ["rms", "max"])
@pytest.mark.parametrize("unit", ["deviation", "absolute"])
def test_an_error_budget_is_kept(kind: str, unit: str) -> None:
    state = {**HARD, **NONFINITE}
    for error in (2.0, 0.1, 3e-3, 1e-5):
        _, back = compressed(
            state, error=error, error_kind=kind, error_unit=unit, nonfinite="keep", min_numel=0,
            norms_and_biases="quantise",
        )  # fmt: skip
        for name, w in state.items():
            rms, largest, deviation = off(w, back[name])
            limit = error * (deviation if unit == "deviation" else 1)
            assert (rms if kind == "rms" else largest) <= limit, (name, error)


@pytest.mark.parametrize("kind", ["rms", "max"])
@pytest.mark.parametrize("unit", ["absolute", "deviation"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-36),
        (torch.float32, 1e-41),
        (torch.bfloat16, 1.2e-38),
        (torch.float64, 2.3e-308),
        (torch.float64, 1e-306),
        (torch.float16, 1e-6),
    ],
)
def test_an_error_budget_is_kept_at_tiny_scales(
    kind: str, unit: str, dtype: torch.dtype, scale: float
) -> None:
    """Down to denormals; fractions, for squares of these are nothing in float64."""
    w = (normal(3000).to(torch.float64) * scale).to(dtype)
    error = scale / 100 if unit == "absolute" else 0.01
    blobs = cfl_ops.compress_state_dict({"w": w}, error=error, error_kind=kind, error_unit=unit)
    back = cfl_ops.decompress(blobs["w"])
    given = [Fraction(x) for x in w.tolist()]
    off = [(Fraction(x) - y) ** 2 for x, y in zip(back.tolist(), given, strict=True)]
    found = sum(off) / len(off) if kind == "rms" else max(off)
    mean = sum(given) / len(given)
    unit_squared = sum((x - mean) ** 2 for x in given) / len(given) if unit == "deviation" else 1
    assert found <= Fraction(error) ** 2 * unit_squared


@pytest.mark.parametrize("scale", [1e-160, 1e-300, 1e150])
def test_a_byte_budget_of_absolute_errors_is_shared_at_every_scale(scale: float) -> None:
    def errors(scale: float) -> list[float]:
        state = {"a": normal(100, 100).double() * scale, "b": normal(100, 100, seed=1).double() * scale * 100}
        blobs = cfl_ops.compress_state_dict(state, max_bytes=14000, error_unit="absolute")
        assert size(blobs) <= 14000
        return [float(((cfl_ops.decompress(blobs[k]) - w) / scale).square().mean()) for k, w in state.items()]

    for one, usual in zip(errors(scale), errors(1.0), strict=True):
        assert one == pytest.approx(usual, rel=0.5)


def test_an_error_budget_is_used_up(backend: str) -> None:
    """A shorter step than is needed would be up to one bit for each weight."""
    w = normal(300, 200)
    for error, kind in itertools.product((0.2, 0.01), ("rms", "max")):
        blobs, back = compressed({"w": w}, error=error, error_kind=kind)
        rms, largest, deviation = off(w, back["w"])
        assert 0.93 * error * deviation < (rms if kind == "rms" else largest) <= error * deviation
        # The entropy of a normal with steps of that length, and what code and checksums take.
        step = error * deviation * (math.sqrt(12) if kind == "rms" else 2)
        ideal = math.log2(deviation * math.sqrt(2 * math.pi * math.e) / step)
        assert 8 * size(blobs) / w.numel() < ideal + 0.2
        _, back = compressed({"w": w}, error=error * deviation, error_kind=kind, error_unit="absolute")
        rms, largest, _ = off(w, back["w"])
        assert 0.98 * error * deviation < (rms if kind == "rms" else largest) <= error * deviation


@pytest.mark.parametrize("options", [{"per": "row"}, {"per": "block", "block_size": 64}, {"zero": "exact"}])
def test_error_budgets_with_rows_blocks_and_zeros(options: dict[str, Any]) -> None:
    scales = torch.logspace(-2, 2, 40).unsqueeze(1)
    state = {"w": normal(40, 100) * scales, "v": torch.where(normal(40, 90) > 0, normal(40, 90, seed=2), 0.0)}
    for kind, error in itertools.product(("rms", "max"), (0.3, 0.01)):
        _, back = compressed(state, error=error, error_kind=kind, **options)
        for name, w in state.items():
            rms, largest, deviation = off(w, back[name])
            assert (rms if kind == "rms" else largest) <= error * deviation
        if options.get("zero") == "exact":
            assert not back["v"][state["v"] == 0].any()


def test_too_tight_an_error_is_exact() -> None:
    state = {name: w for name, w in HARD.items() if name not in ("tiny", "nothing")}
    _, back = compressed(state, error=1e-12, error_unit="deviation")
    assert all(same(back[name], w) for name, w in state.items())
    with pytest.raises(
        ValueError, match=r"w must be finite, but it has 1600 NaN.*\(in state_dict\['all NaN'\]\)"
    ):
        compressed(NONFINITE, error=0.1)


def test_an_error_budget_of_half_precision_takes_no_more_than_the_weights() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        w = normal(100, 100).to(dtype)
        blobs, _ = compressed({"w": w}, error=1e-4)
        assert len(blobs["w"]) <= w.nbytes + 160


BYTES = {
    **{name: HARD[name] for name in ("normal", "constant", "a hundred values", "half zeros", "outlier", "offset")},
    **{name: HARD[name] for name in ("mask", "bfloat16", "float16", "float64", "column", "scalar", "nothing")},
    "much larger": normal(300, 250) * 100,
    "steps": torch.arange(100),
}  # fmt: skip


def test_a_byte_budget_is_kept_and_used_up() -> None:
    least = _least(BYTES)
    weights = sum(w.numel() for w in BYTES.values())
    before = math.inf
    for budget in (least, least + 1, weights // 4, weights // 2, weights, weights * 3 // 2, weights * 5 // 2):
        blobs, back = compressed(BYTES, max_bytes=budget)
        assert size(blobs) <= budget
        if weights // 4 < budget <= weights * 3 // 2:
            assert size(blobs) > 0.985 * budget
        assert same(back["steps"], BYTES["steps"])
        # The squared error, as a part of each tensor's variance, falls with each byte.
        error = sum(
            w.numel() * (off(w, back[name])[0] / max(off(w, w)[2], 1e-300)) ** 2
            for name, w in BYTES.items()
            if name != "outlier" and w.is_floating_point() and w.numel()
        )
        assert error < before * 1.05
        before = error


def _least(state: dict[str, Tensor], **options: Any) -> int:
    """What the message says; and it is attainable."""
    with pytest.raises(
        ValueError, match=r"compress_state_dict: max_bytes must be at least \d+ \(1 bit"
    ) as caught:
        cfl_ops.compress_state_dict(state, max_bytes=0, **options)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    blobs, _ = compressed(state, max_bytes=least, **options)
    assert size(blobs) <= least
    with pytest.raises(ValueError, match=f"at least {least} "):
        cfl_ops.compress_state_dict(state, max_bytes=least - 1, **options)
    return least


def test_every_byte_budget_of_one_tensor_is_kept() -> None:
    w = normal(40, 50)
    least = _least({"w": w})
    last = -1.0
    for budget in range(least, w.nbytes + 200, 97):
        rows: list[cfl_ops.TensorReport] = []
        blobs, _ = compressed({"w": w}, max_bytes=budget, report=rows.append)
        assert size(blobs) <= budget
        # Above 10 bits the code of 2,000 weights is as large as their bins.
        assert last < 0 or rows[0].rms_error <= last * (1.02 if budget < 2500 else 2)
        last = rows[0].rms_error
    assert last == 0


def test_a_huge_budget_keeps_every_bit_and_none_is_needed_for_nothing() -> None:
    _, back = compressed(BYTES, max_bytes=10**9)
    assert all(same(back[name], w) for name, w in BYTES.items())
    assert compressed({}, max_bytes=0) == ({}, {})
    integers = {"a": torch.arange(50), "b": torch.ones(9) > 0}
    exact = size(cfl_ops.compress_state_dict(integers))
    assert size(compressed(integers, max_bytes=exact)[0]) == exact
    with pytest.raises(ValueError, match=f"max_bytes must be at least {exact} .*, but got {exact - 1}"):
        cfl_ops.compress_state_dict(integers, max_bytes=exact - 1)
    assert _least(integers) == exact
    _, back = compressed({"w": NONFINITE["all NaN"]}, max_bytes=10**5, nonfinite="keep")
    assert back["w"].isnan().all()
    with pytest.raises(ValueError, match=r"1600 NaN or Inf.*\(in state_dict\['all NaN'\]\)"):
        cfl_ops.compress_state_dict(NONFINITE, max_bytes=10**6)


def test_bytes_go_where_they_save_most() -> None:
    """Against every choice of bits for each tensor, by brute force on the blobs themselves."""
    state = {
        "a": normal(50, 60),
        "b": normal(40, 40, seed=1) * 50,
        "c": normal(60, 50, seed=2) * normal(60, 50, seed=3),
    }  # fmt: skip

    def error(w: Tensor, back: Tensor, absolute: bool) -> float:
        rms, _, deviation = off(w, back)
        return w.numel() * (rms / (1 if absolute else deviation)) ** 2

    for unit in ("deviation", "absolute"):
        absolute = unit == "absolute"
        choices = []
        for w in state.values():
            blobs = [cfl_ops.compress(w, bits=bits, max_error=math.inf) for bits in range(1, 11)]
            choices.append([(len(blob), error(w, cfl_ops.decompress(blob), absolute)) for blob in blobs])
        for budget in (2500, 4000, 6000):
            best = min(
                sum(e for _, e in chosen)
                for chosen in itertools.product(*choices)
                if sum(b for b, _ in chosen) <= budget
            )
            blobs, back = compressed(state, max_bytes=budget, error_unit=unit)  # type: ignore[assignment]
            assert size(blobs) <= budget  # type: ignore[arg-type]
            assert sum(error(w, back[name], absolute) for name, w in state.items()) < best * 1.1


def test_importance_and_overrides_with_a_byte_budget() -> None:
    state = {"a": normal(50, 60), "b": normal(50, 60, seed=1), "head": normal(30, 30, seed=2)}
    bits = {}
    for importance in ({}, {"a": 100.0}):
        rows: list[cfl_ops.TensorReport] = []
        compressed(state, max_bytes=8000, importance=importance, exact="head", report=rows.append)
        bits[len(importance)] = {row.name: row.bits_per_element for row in rows}
        assert bits[len(importance)]["head"] > 20  # bit for bit
    assert abs(bits[0]["a"] - bits[0]["b"]) < 0.4
    assert 2.8 < bits[1]["a"] - bits[1]["b"] < 3.9  # log2(100) / 2 = 3.3, in quarters
    rows = []
    blobs, back = compressed(
        state, max_bytes=6000, overrides={"head": {"bits": 8}, "b": {"error": 0.05}}, report=rows.append
    )
    assert size(blobs) <= 6000
    assert rows[2].bits == 8
    rms, _, deviation = off(state["b"], back["b"])
    assert 0.9 * 0.05 * deviation < rms <= 0.05 * deviation


@pytest.mark.parametrize("options", [{"per": "row"}, {"per": "block", "block_size": 70}, {"zero": "exact"}])
def test_byte_budgets_with_rows_blocks_and_zeros(options: dict[str, Any]) -> None:
    state = {"w": normal(40, 100) * torch.logspace(-2, 2, 40).unsqueeze(1), "v": normal(300, 9)}
    least = _least(state, **options)
    for budget in (least, 3 * least, 5 * least):
        blobs, _ = compressed(state, max_bytes=budget, **options)
        assert 0.8 * budget < size(blobs) <= budget


@pytest.mark.parametrize(
    "options", [{"max_bytes": 30_000}, {"error": 0.03}, {"error": 0.03, "error_kind": "max"}]
)
def test_one_by_one_gives_the_same_bytes(options: dict[str, Any]) -> None:
    state = {"a": normal(100, 90), "b.bias": normal(70), "c": HARD["outlier"], "d": HARD["a hundred values"]}
    whole = cfl_ops.compress_state_dict(state, **options)
    for name, blob in named_blobs(state, 256, options, 4):
        assert same(blob, whole[name])


def test_backends_decide_alike(backend: str) -> None:
    """Bytes as from the fallback, for all that is decided by sums."""
    if backend not in EXHAUSTIVE:
        pytest.skip("one of them is enough")
    state = {
        name: HARD[name] for name in ("normal", "half zeros", "outlier", "bfloat16", "float64", "far apart")
    }
    for options in (
        {"max_bytes": 24_000}, {"error": 0.02}, {"error": 0.05, "error_kind": "max"},
        {"error": 0.1, "error_unit": "absolute"}, {"max_bytes": 30_000, "error_unit": "absolute"},
    ):  # fmt: skip
        blobs = cfl_ops.compress_state_dict(state, **options)  # type: ignore[arg-type]
        found = {name: (len(blob), int(blob.to(torch.int64).sum())) for name, blob in blobs.items()}
        assert _FIRST.setdefault(str(options), found) == found


_FIRST: dict[str, Any] = {}


@pytest.mark.parametrize("dtype", FLOATS)
def test_measures_bound_what_float64_finds(dtype: torch.dtype) -> None:
    for n in (1, 7, 65_536, 65_537, 150_000, 1_100_000):
        w = (normal(n) * 3 + 100).to(dtype)
        w[n // 2 : n // 2 + 3] = torch.tensor([math.nan, math.inf, -500.0])[: w[n // 2 : n // 2 + 3].numel()]
        finite = w[w.isfinite()].double()
        deviation = float(finite.std(correction=0)) if finite.numel() else 0.0
        assert deviation * (1 - 2**-10) <= deviation_of(w) <= deviation
        if n < 7:
            continue
        blob = cfl_ops.compress(w, bits=5, nonfinite="keep", max_error=math.inf)
        found = errors_of(w, blob)
        rms, largest, _ = off(w, cfl_ops.decompress(blob))
        kept = w.isfinite().sum() / n
        assert rms <= found.rms <= rms * (1 + 1e-4) / float(kept.sqrt())
        assert largest <= found.largest <= largest * (1 + 1e-6)
        assert errors_of(w, blob, squares=False) == (0.0, found.largest)
        gradient = w.nan_to_num(1, 2, 3)
        assert rms_of(gradient) == pytest.approx(float(gradient.double().square().mean().sqrt()), rel=1e-5)
        assert math.isnan(rms_of(w))
    assert rms_of(torch.zeros(5)) == rms_of(torch.empty(0)) == deviation_of(torch.empty(0)) == 0
    assert deviation_of(torch.full((9,), math.nan)) == 0
    assert rms_of(torch.tensor([1e-300, 0.0], dtype=torch.float64)) == pytest.approx(1e-300 / 2**0.5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_stretched_range_is_written_as_torch_ops_write_it(backend: str, dtype: torch.dtype) -> None:
    """As for a tensor on a GPU, whose kernel finds a range of its own."""
    w = (normal(200, 171) * 7).to(dtype)
    for bits, stretch in ((3, 1.3), (8, 1.999), (11, 1.0001)):
        grid = find_grid(w, Options(bits=bits, max_error=math.inf))
        assert isinstance(grid, Grid)
        end = stretched(grid._replace(stretch=stretch))
        wanted = float(grid.minimum) + (float(grid.maximum) - float(grid.minimum)) * stretch
        assert float(grid.maximum) <= float(end) <= wanted
        blob = store_planned(w, grid._replace(stretch=stretch), Options())
        symbols = to_bins(w.reshape(1, -1), grid.minimum.view(1), end.view(1), bits).view(w.shape)
        payload = cfl_ops.huffman_encode(symbols.to(torch.uint8 if bits <= 8 else torch.uint16))
        assert same(blob[-len(payload) :], payload)
    top = find_grid(
        torch.linspace(-1, torch.finfo(dtype).max, 99, dtype=torch.float64).to(dtype), Options(bits=3)
    )
    assert isinstance(top, Grid)
    assert same(stretched(top._replace(stretch=1.9)), top.maximum)  # there is nothing above it


def test_files_take_all_options(tmp_path: Any) -> None:
    state = {"a": normal(80, 90), "b.bias": normal(300)}
    path = tmp_path / "a.cflz"
    rows: list[cfl_ops.TensorReport] = []
    cfl_ops.save_file(state, path, max_bytes=8000, exact="b.*", report=rows.append)
    assert path.stat().st_size < 8000 + 200
    assert [row.kind for row in rows] == ["quantised", "exact"]
    assert same(cfl_ops.load_file(path)["b.bias"], state["b.bias"])
    cfl_ops.save_file(state, path, lossless=True)
    assert all(same(value, state[name]) for name, value in cfl_ops.load_file(path).items())
