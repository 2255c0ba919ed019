"""What of a state dict stays exact, which options a tensor gets, and the thesis' allocation by gradients."""

from __future__ import annotations

import math
import warnings
from typing import Any

import cfl_ops
import numpy as np
import pytest
import torch
from cfl_ops.ops.codec.policy import OP, OPTIONS, SETS_BITS, gradient_bits
from cfl_ops.ops.codec.state_dict import named_blobs
from torch import Tensor

from tests.codec.helpers import same


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def decided(state: dict[str, Tensor], **options: Any) -> dict[str, int | None]:
    """The bits of each tensor, None where it comes back bit for bit, which is looked at."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*too few for it")
        blobs = cfl_ops.compress_state_dict(state, **options)
    back = cfl_ops.decompress_state_dict(blobs)
    found = {}
    for row in cfl_ops.compression_report(state, blobs):
        assert (row.bits is None) == same(back[row.name], state[row.name])
        found[row.name] = row.bits
    assert [*found] == [*state]
    return found


MODEL = {
    "embed.weight": normal(40, 30),
    "block.norm.weight": normal(300),
    "block.norm.bias": normal(300),
    "block.attn.in_proj_bias": normal(900),
    "block.attn.weight": normal(30, 30),
    "bn.running_var": normal(256) ** 2,
    "gamma": normal(512),
    "flat": normal(2000),
    "small.weight": normal(5, 5),
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 3),
    "steps": torch.arange(1000),
    "mask": torch.ones(300) > 0,
    "rotary": torch.randn(400, dtype=torch.complex64),
    "fp8": torch.ones(400).to(torch.float8_e4m3fn),
}
LARGE = ("embed.weight", "block.attn.weight", "flat")
VECTORS = ("block.norm.weight", "block.norm.bias", "block.attn.in_proj_bias", "bn.running_var", "gamma")


def test_what_stays_exact_by_default() -> None:
    found = decided(MODEL, bits=8)
    assert {name for name, bits in found.items() if bits} == set(LARGE)
    assert set(found.values()) == {None, 8}


def test_norms_and_biases_and_small_tensors_are_quantised_when_asked() -> None:
    found = decided(MODEL, bits=8, norms_and_biases="quantise")
    assert {name for name, bits in found.items() if bits} == {*LARGE, *VECTORS}
    found = decided(MODEL, bits=4, norms_and_biases="quantise", min_numel=0)
    # One weight is a constant, and no weights are none.
    assert {name for name, bits in found.items() if bits} == {*LARGE, *VECTORS, "small.weight"}


def test_exact_names_and_dtypes() -> None:
    state = {"a.weight": normal(20, 20), "b.weight": normal(20, 20).double(), "lm_head": normal(20, 20)}
    assert [*decided(state, bits=6, exact="lm_*").values()] == [6, 6, None]
    assert [*decided(state, bits=6, exact=torch.float64).values()] == [6, None, 6]
    assert [*decided(state, bits=6, exact=("a.*", torch.float64, "?m_head")).values()] == [None] * 3
    assert [*decided(state, bits=6, exact=["*"]).values()] == [None] * 3
    assert [*decided(state, bits=6, min_numel=401).values()] == [None] * 3


@pytest.mark.parametrize(
    "kind", [tuple, set, frozenset, dict.fromkeys, iter, lambda x: dict.fromkeys(x).keys()]
)
def test_exact_is_any_collection(kind: Any) -> None:
    state = {"a": normal(20, 20), "b": normal(20, 20), "c": normal(20, 20).double()}
    found = decided(state, bits=4, exact=kind(["a", torch.float64]))
    assert found == {"a": None, "b": 4, "c": None}


def test_the_first_override_that_matches_counts() -> None:
    state = {
        "a.weight": normal(20, 20),
        "b.weight": normal(20, 20),
        "b.bias": normal(300),
        "n": torch.arange(300),
    }
    overrides: dict[str, Any] = {
        "a.*": {"bits": 3},
        "*.weight": {"bits": 9},
        "b.*": {"bits": 5},
        "n": {"bits": 2},
    }
    assert decided(state, bits=6, overrides=overrides) == {
        "a.weight": 3,
        "b.weight": 9,
        "b.bias": 5,
        "n": None,
    }
    # An override goes before what is exact, and exact by override before bits.
    assert decided(state, bits=6, exact="*", overrides={"b.*": {"bits": 7}}) == {
        "a.weight": None, "b.weight": 7, "b.bias": 7, "n": None,
    }  # fmt: skip
    assert decided(state, bits=6, overrides={"b.weight": "exact"}) == {
        "a.weight": 6, "b.weight": None, "b.bias": None, "n": None,
    }  # fmt: skip
    # Bits of its own go before the bits of all, whichever way they are said.
    wide = decided(state, floor=8, overrides={"a.*": {"bits": 3, "per": "row"}})
    assert wide["a.weight"] == 3
    assert wide["b.weight"] is not None
    assert wide["b.weight"] > 9
    assert decided(state, error=0.5, overrides={"a.*": {"bits": 8}})["a.weight"] == 8
    for one in ({"floor": 9}, {"probe_bits": 6}, {"fraction": 0.5}):  # as compress does without bits
        large = normal(60, 80)
        blobs = cfl_ops.compress_state_dict({"a": large}, bits=3, max_error=9.0, overrides={"a": one})
        assert same(blobs["a"], cfl_ops.compress(large, max_error=9.0, **one))  # type: ignore[arg-type]
    assert 3 <= decided(state, bits=12, overrides={"a.*": {"error": 0.2}})["a.weight"] <= 5  # type: ignore[operator]


def test_overrides_give_what_compress_gives(backend: str) -> None:
    w = normal(30, 40)
    blobs = cfl_ops.compress_state_dict(
        {"w": w, "v": w}, per="row", overrides={"v": {"bits": 9, "zero": "exact"}}
    )
    assert same(blobs["w"], cfl_ops.compress(w, per="row"))
    assert same(blobs["v"], cfl_ops.compress(w, per="row", bits=9, zero="exact"))


def test_patterns_that_match_nothing_warn_and_point_here() -> None:
    w = normal(20, 20)
    for options in (
        {"exact": "layers.*"},
        {"overrides": {"layers.*": {"bits": 3}}},
        {"importance": {"layers.*": 2.0}, "max_bytes": 10**6},
    ):
        with pytest.warns(UserWarning, match=r"has the pattern 'layers.\*', which no name") as caught:
            cfl_ops.compress_state_dict({"w": w}, **options)  # type: ignore[arg-type]
        assert [item.filename for item in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # hidden behind another is not unmatched; of nothing nothing is asked
        cfl_ops.compress_state_dict({"w": w}, exact="*", overrides={"w": "exact", "?": "exact"})
        cfl_ops.compress_state_dict({}, exact="layers.*")


def test_too_few_bits_of_an_override_warn_and_point_here() -> None:
    for options in ({}, {"max_bytes": 10**6}):
        with pytest.warns(UserWarning, match=r"state_dict\['w'\] comes back with an rms error") as caught:
            cfl_ops.compress_state_dict({"w": normal(50, 50)}, overrides={"w": {"bits": 2}}, **options)  # type: ignore[arg-type]
        assert [item.filename for item in caught] == [__file__]


def test_lossless_keeps_every_bit_and_refuses_what_quantises() -> None:
    odd = torch.tensor([math.nan, -0.0, math.inf, 1e-45] * 100)
    assert set(decided({**MODEL, "odd": odd.view(20, 20)}, lossless=True).values()) == {None}
    for name, value in {
        "bits": 8, "floor": 5, "per": "row", "nonfinite": "keep", "max_error": 0.1, "max_bytes": 100, "error": 0.1,
        "overrides": {"w": {"bits": 3}}, "allocation": "gradient", "gradients": {}, "c0": 2.0, "c1": 7.0,
        "importance": {"w": 2.0}, "error_kind": "max", "error_unit": "absolute",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=rf"lossless=True keeps every bit: leave out {name}$"):
            cfl_ops.compress_state_dict({}, lossless=True, **{name: value})


@pytest.mark.parametrize(
    ("kind", "message", "options"),
    [
        (ValueError, "max_bytes decides how many bits each tensor gets: leave out bits, error",
         {"bits": 3, "error": 1.0, "max_bytes": 9}),
        (ValueError, "max_bytes decides .*: leave out allocation",
         {"allocation": "gradient", "gradients": {}, "max_bytes": 9}),
        (ValueError, "error decides how many bits each tensor gets: leave out max_error",
         {"max_error": 0.1, "error": 0.1}),
        (ValueError, "the gradients decide .*: leave out floor",
         {"floor": 3, "allocation": "gradient", "gradients": {}}),
        (ValueError, "gradients must be given with allocation='gradient'", {"allocation": "gradient"}),
        (ValueError, "gradients is a matter of allocation='gradient'", {"gradients": {}}),
        (ValueError, "c1 is a matter of allocation='gradient'", {"c1": 3}),
        (ValueError, "importance is a matter of max_bytes", {"importance": {"w": 2}}),
        (ValueError, "norms_and_biases must be one of exact, quantise, but got 'yes'",
         {"norms_and_biases": "yes"}),
        (ValueError, "allocation must be one of entropy, gradient", {"allocation": "hessian"}),
        (ValueError, "error_kind must be one of rms, max", {"error_kind": "l2"}),
        (ValueError, "error_unit must be one of deviation, absolute", {"error_unit": "range"}),
        (ValueError, "error must be finite and positive, but got 0", {"error": 0}),
        (ValueError, "error must be finite and positive, but got nan", {"error": math.nan}),
        (ValueError, "max_bytes must be at least 0, but got -1", {"max_bytes": -1}),
        (ValueError, r"overrides\['w'\] must be one of exact, but got 'raw'", {"overrides": {"w": "raw"}}),
        (ValueError, r"error of overrides\['w'\] decides .*: leave out bits",
         {"overrides": {"w": {"bits": 3, "error": 0.1}}}),
        (ValueError, r"overrides\['w'\] error must be finite and positive",
         {"overrides": {"w": {"error": -1}}}),
        (ValueError, r"importance\['w'\] must be finite and positive",
         {"importance": {"w": 0}, "max_bytes": 9}),
        (TypeError, r"overrides\['w'\] has unknown options bit", {"overrides": {"w": {"bit": 3}}}),
        (TypeError, r'overrides\[\'w\'\] must be "exact" or a mapping, but got int',
         {"overrides": {"w": 8}}),
        (TypeError, "overrides must be a mapping, but got list", {"overrides": [("w", "exact")]}),
        (TypeError, "overrides must have patterns as keys, but got int", {"overrides": {3: "exact"}}),
        (TypeError, "exact must be patterns of names or dtypes, but got int", {"exact": 3}),
        (TypeError, "exact must be patterns of names or dtypes, but got int", {"exact": ["w", 3]}),
        (TypeError, "lossless must be True or False", {"lossless": 1}),
        (TypeError, "report must be a function, such as the append of a list, but got list", {"report": []}),
        (ValueError, "bits must be an integer from 1 to 16, but got 99", {"bits": 99, "exact": "w"}),
        (ValueError, "per must be one of tensor, row, block", {"per": "nonsense", "exact": "w"}),
        (ValueError, "nonfinite must be one of refuse, keep", {"nonfinite": "skip", "exact": "w"}),
        (ValueError, "block_size must be given with per='block'", {"per": "block", "exact": "w"}),
        (ValueError, r"bits must be .* but got 99 \(in overrides\['zzz'\]\)",
         {"exact": "w", "overrides": {"zzz": {"bits": 99}}}),
        (ValueError, "error_kind is a matter of error, which is not given", {"error_kind": "max"}),
        (ValueError, "error_unit is a matter of error or of max_bytes, which", {"error_unit": "absolute"}),
        (ValueError, r"error_unit of overrides\['w'\] is a matter of error, which is not given",
         {"overrides": {"w": {"error_unit": "absolute"}}}),
        (TypeError, "floor must be a number", {"lossless": True, "floor": torch.ones(2)}),
        (TypeError, "unknown options bit, folor", {"bit": 3, "folor": 5}),
    ],
)  # fmt: skip
def test_contradictions_are_named_before_anything_is_done(
    kind: type[Exception], message: str, options: dict[str, Any]
) -> None:
    with pytest.raises(kind, match=rf"^cfl_ops\.compress_state_dict: {message}"):
        cfl_ops.compress_state_dict({"w": torch.full((20, 20), math.nan)}, **options)


@pytest.mark.parametrize("given", [{"bits": None}, {"floor": 6.0, "per": "tensor"}, {"error_kind": "rms"}])
@pytest.mark.parametrize("kind", [{"lossless": True}, {"error": 0.1}, {"max_bytes": 2000}])
def test_defaults_may_be_given(kind: dict[str, Any], given: dict[str, Any]) -> None:
    state = {"w": normal(40, 40)}
    assert same(
        cfl_ops.compress_state_dict(state, **kind, **given)["w"],
        cfl_ops.compress_state_dict(state, **kind)["w"],
    )


def test_an_override_may_give_defaults_and_words_of_the_error_of_all() -> None:
    state = {"w": normal(40, 40)}
    own = {"error": 0.1, "bits": None, "floor": 6}
    want = cfl_ops.compress_state_dict(state, error=0.1, error_kind="max")["w"]
    assert same(cfl_ops.compress_state_dict(state, error_kind="max", overrides={"w": own})["w"], want)
    own = {"error_kind": "max"}
    assert same(cfl_ops.compress_state_dict(state, error=0.1, overrides={"w": own})["w"], want)


@pytest.mark.parametrize("state", [None, [torch.ones(2)], torch.ones(2)])
def test_what_is_no_state_dict_is_refused(state: Any) -> None:
    with pytest.raises(TypeError, match=r"^cfl_ops\.compress_state_dict: state_dict must be a mapping"):
        cfl_ops.compress_state_dict(state)
    with pytest.raises(TypeError, match=r"^cfl_ops\.decompress_state_dict: blobs must be a mapping"):
        cfl_ops.decompress_state_dict(state)


def test_the_options_of_compress_are_known_here() -> None:
    import inspect

    assert set(OPTIONS) == set(inspect.signature(cfl_ops.compress).parameters) - {"w", "lossless"}
    assert set(SETS_BITS) < set(OPTIONS)
    own = set(inspect.signature(cfl_ops.compress_state_dict).parameters) - {
        "state_dict",
        "options",
        "min_numel",
    }
    from cfl_ops.ops.codec.policy import Settings

    assert own == set(Settings._fields)
    assert cfl_ops.compress_state_dict.__name__ == OP


def test_gradients_allocate_bits() -> None:
    # N = log2(G + c0) + c1, rounded half up, from 1 to 16
    for rms, c0, c1, bits in (
        (0.0, 1.0, 8.0, 8), (1.0, 1.0, 8.0, 9), (2**0.5 - 1, 1.0, 8.0, 9), (0.4, 1.0, 8.0, 8), (7.0, 1.0, 5, 8),
        (1e9, 1.0, 8, 16), (0.25, 0.0, 8, 6), (0.0, 0.0, 8, 1), (0.0, 1.0, -3, 1),
    ):  # fmt: skip
        assert gradient_bits(rms, c0, c1) == bits, (rms, c0, c1)
        state = {"w": normal(60, 60)}
        if 1 < bits < 16:
            found = decided(
                state, allocation="gradient", gradients={"w": rms}, c0=c0, c1=c1, max_error=math.inf
            )
            assert found["w"] == bits
    state = {"a.weight": normal(60, 60), "b.weight": normal(60, 60), "b.bias": normal(60)}
    gradients: dict[str, Any] = {
        "a.weight": normal(60, 60, seed=1) * 30,
        "b.weight": torch.tensor(1.0),
        "c": 3,
    }
    options = {"allocation": "gradient", "gradients": gradients, "max_error": math.inf}
    rms = float(gradients["a.weight"].double().square().mean().sqrt())
    want = {"a.weight": math.floor(math.log2(rms + 1) + 8.5), "b.weight": 9, "b.bias": None}
    assert decided(state, **options) == want
    assert decided(state, **options, overrides={"b.weight": {"bits": 4}})["b.weight"] == 4
    # N is where max_error starts from.
    coarse = decided(state, allocation="gradient", gradients=gradients, c1=1)
    assert coarse["b.weight"] is not None
    assert coarse["b.weight"] > 2
    del gradients["b.weight"]
    with pytest.raises(ValueError, match=r"there is none for state_dict\['b.weight'\]; exact= keeps it"):
        cfl_ops.compress_state_dict(state, **options)  # type: ignore[arg-type]
    for bad, kind, message in (
        (
            torch.tensor([[math.nan, 1.0]]),
            ValueError,
            r"gradients\['b.weight'\] must be finite and not negative",
        ),
        (-1.0, ValueError, r"gradients\['b.weight'\] must be finite and not negative"),
        (torch.arange(3), TypeError, r"gradients\['b.weight'\] must be float16"),
        ("1", TypeError, r"gradients\['b.weight'\] must be a number"),
    ):
        with pytest.raises(kind, match=message):
            cfl_ops.compress_state_dict(
                state, allocation="gradient", gradients={**gradients, "b.weight": bad}
            )  # type: ignore[dict-item]


def test_blobs_come_one_by_one_with_all_options() -> None:
    made = []
    options = {"bits": 6, "max_error": 1, "exact": "b", "report": made.append}
    blobs = named_blobs({"a": normal(20, 20), "b": normal(20, 20)}, 256, options, 4)
    assert made == []
    assert next(blobs)[0] == "a"
    assert [(row.name, row.bits) for row in made] == [("a", 6)]
    assert next(blobs)[0] == "b"
    assert [(row.name, row.kind) for row in made] == [("a", "quantised"), ("b", "exact")]


def test_the_report_is_what_the_blobs_say(backend: str) -> None:
    mask = torch.where(normal(40, 50) > 0, 0, torch.finfo(torch.float32).min)
    state = {"w": normal(60, 50).bfloat16(), "mask": mask, "n": torch.arange(7), "none": torch.empty(0)}
    rows: list[cfl_ops.TensorReport] = []
    blobs = cfl_ops.compress_state_dict(state, bits=6, max_error=0.2, report=rows.append)
    assert rows == cfl_ops.compression_report(state, blobs)
    back = cfl_ops.decompress_state_dict(blobs)
    assert [row.kind for row in rows] == ["quantised", "palette", "exact", "exact"]
    for row in rows:
        value = state[row.name]
        off = (back[row.name].double() - value.double()).abs()
        assert (row.dtype, row.shape) == (value.dtype, tuple(value.shape))
        assert (row.raw_bytes, row.nbytes) == (value.nbytes, len(blobs[row.name]))
        assert row.ratio == row.raw_bytes / row.nbytes
        largest = float(off.max()) if off.numel() else 0.0
        assert largest <= row.max_error <= largest * (1 + 1e-6)
        rms = float(off.square().mean().sqrt()) if off.numel() else 0.0
        assert rms <= row.rms_error <= rms + largest * 2e-5
    assert rows[0].bits_per_element == 8 * rows[0].nbytes / 3000
    assert rows[3].bits_per_element == 0
    with pytest.raises(KeyError):
        cfl_ops.compression_report({}, blobs)
    with pytest.raises(TypeError, match=r"compression_report: blobs\['w'\] must be a tensor"):
        cfl_ops.compression_report(state, {"w": b""})  # type: ignore[dict-item]


def test_arrays_have_reports_too() -> None:
    rows: list[Any] = []
    w = np.random.default_rng(0).normal(size=(30, 40))
    blobs = cfl_ops.arrays.compress_state_dict(
        {"w": w}, overrides={"w": {"bits": 5}}, max_error=1, report=rows.append
    )
    assert [(row.name, row.bits) for row in rows] == [("w", 5)]
    assert cfl_ops.arrays.compression_report({"w": w}, blobs) == rows
