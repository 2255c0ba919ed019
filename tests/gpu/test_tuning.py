"""The registry of tuning rules and the autotuner, with cards and times that are made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cfl_ops
import pytest
import torch
from cfl_ops._core import dispatch
from cfl_ops._gpu import autotune, tuning
from cfl_ops._gpu.device import Device, pretend

from tests import contract

CARD = Device("NVIDIA Test 9000", "sm_90", 132, 227 << 10)
SMALL = Device("NVIDIA GeForce RTX 4090", "sm_89", 128, 99 << 10)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CFL_OPS_CACHE", str(tmp_path))
    tuning.forget()
    yield
    monkeypatch.undo()
    tuning.forget()


def test_every_file_of_the_package_is_one() -> None:
    folder = Path(tuning.__file__).parent / "rules"
    files = sorted(folder.glob("*.json"))
    assert {file.stem for file in files} >= {"default", "sm_90"}
    for file in files:
        assert tuning.read(file)
        assert "note" in json.loads(file.read_text())
    default = tuning.read(folder / "default.json")
    assert set(default) == set(autotune.TUNABLE)
    for rules in default.values():  # there is a rule for every problem
        assert rules[-1]["if"] == {}


def test_the_users_file_comes_before_the_architectures_and_the_default() -> None:
    problem = {"kind": "half", "order": 2048, "rows": 65536, "planes": True}
    with pretend(SMALL):
        default = tuning.choose("gram", CPU, **problem)
    with pretend(CARD):
        deeper = tuning.choose("gram", CPU, **problem)
        assert deeper != default
        mine = {"how": "pointers", "TILE": 16, "num_warps": 1, "num_stages": 1}
        rules = {"gram": [{"if": {"kind": "half", "min_order": 2000}, "use": mine}]}
        tuning.write(tuning.user_file(CARD), CARD, rules, "test")
        tuning.forget()
        assert tuning.choose("gram", CPU, **problem) == mine
        assert tuning.choose("gram", CPU, **(problem | {"order": 1024})) == deeper


def test_rules_match_by_equality_bounds_and_the_card() -> None:
    for slow, card in ((True, SMALL), (False, CARD)):
        assert tuning.matches({"if": {"slow_float64": slow}}, {}, card)
        assert not tuning.matches({"if": {"slow_float64": not slow}}, {}, card)
    rule = {"if": {"kind": "a", "max_order": 10, "min_rows": 5, "min_shared": 128 << 10}}
    good = {"kind": "a", "order": 10, "rows": 5}
    assert tuning.matches(rule, good, CARD)
    assert not tuning.matches(rule, good, SMALL)
    for other in ({"kind": "b"}, {"order": 11}, {"rows": 4}):
        assert not tuning.matches(rule, good | other, CARD)


def test_cards_with_slow_float64_are_known() -> None:
    assert SMALL.slow_float64
    assert not CARD.slow_float64
    assert SMALL.slug == "nvidia-geforce-rtx-4090"


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": 2, "rules": {}}', '{"format": 1, "rules": {"gram": [1]}}']
)
def test_a_broken_file_is_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not a tuning file"):
        tuning.read(file)


def test_the_autotuner_keeps_the_fastest_that_runs() -> None:
    seen = []

    def call() -> None:
        use = tuning.choose("toy", CPU)
        if use["tile"] == 64:
            raise RuntimeError("out of shared memory")
        seen.append(use)

    tunable = autotune.Tunable(
        lambda: autotune._grid(tile=(16, 32, 64)),
        lambda device: iter([autotune.Problem({"max_n": 5}, call)]),
    )
    lines: list[str] = []
    rules = autotune.tune("toy", tunable, CPU, lambda call: 1.0 / tuning._forced["toy"]["tile"], lines.append)
    assert rules == [{"if": {"max_n": 5}, "use": {"tile": 32}, "ms": 0.03125}]
    assert any("RuntimeError" in line for line in lines)
    assert "toy" not in tuning._forced


@pytest.mark.parametrize("op", autotune.TUNABLE)
def test_rules_of_the_autotuner_fit_the_problems_of_the_launchers(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each problem, run in place of a GPU with a launcher that only asks for its rule."""
    asked: list[dict[str, object]] = []

    class Asked(Exception):
        pass

    def choose(name: str, device: torch.device, **problem: object) -> dict[str, object]:
        if name == op:
            asked.append(problem)
            raise Asked
        return tuning.choose_cached(name, SMALL, tuple(problem.items()))

    if not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    module = {
        "gram": "gram",
        "gram_cross": "gram",
        "cholesky_update": "cholesky",
        "ridge_solve": "solve",
    }.get(op, "proximal")
    launchers = __import__(f"cfl_ops.triton_kernels.{module}", fromlist=["x"])
    monkeypatch.setattr(dispatch, "native_available", lambda: True)
    monkeypatch.setattr(tuning, "choose", choose)
    if op == "gram_cross":
        monkeypatch.setattr(launchers, "_launch_gram", lambda *_: None)
    monkeypatch.setattr(launchers, "INTERPRETED", False, raising=False)
    for make in ("randn", "eye", "randint"):  # no memory: only shapes and strides matter
        real = getattr(torch, make)
        monkeypatch.setattr(torch, make, lambda *a, real=real, **k: real(*a, **(k | {"device": "meta"})))
    keys = None
    for problem in autotune.TUNABLE[op].problems(torch.device("meta")):
        with pytest.raises(Asked):
            problem.call()
        assert tuning.matches({"if": problem.rule}, asked[-1], SMALL), (problem.rule, asked[-1])
        keys = set(next(autotune.TUNABLE[op].candidates()))
    package = tuning.read(Path(tuning.__file__).parent / "rules" / "default.json")
    assert keys is not None
    for rule in package[op]:
        assert set(rule["use"]) == keys


def test_without_a_gpu_the_command_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "-m", "cfl_ops", "autotune", "--op", "gram"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "there is no CUDA device" in done.stderr


@pytest.mark.parametrize("multiprocessors", [2, 132])
def test_results_do_not_depend_on_the_rule(multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles that are split and others that are not, and bf16 splits a stretch of rows at a time."""
    if not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    kernels = __import__("cfl_ops.triton_kernels.gram", fromlist=["x"])
    monkeypatch.setattr(kernels, "ELEMENTS_AT_ONCE", 200 * 70)
    card = Device("test", "none", multiprocessors, 99 << 10)
    x, labels = torch.randn(300, 70), torch.randint(3, (300,))
    want = x.double().mT @ x.double()
    s = torch.rand(300)
    want_weighted = (x.double() * s.double().unsqueeze(-1)).mT @ x.double()
    for use in autotune._grid(
        how=("pointers", "planes", "library"), TILE=(16, 32), TILE_N=(32,), DEPTH=(16,), num_warps=(4,),
        num_stages=(2,), resident=(1,),
    ):  # fmt: skip
        with cfl_ops.config.use_backend("triton"), pretend(card), tuning.force("gram", use):
            got = cfl_ops.gram(x, labels, bias_column=True, num_classes=3)
            weighted = cfl_ops.gram(x, sample_weight=s)
        torch.testing.assert_close(got.gram[:70, :70].double(), want, rtol=1e-5, atol=1e-4)
        assert torch.equal(got.gram, got.gram.mT)
        torch.testing.assert_close(weighted.gram.double(), want_weighted, rtol=1e-5, atol=1e-4)


SPLITS = {
    "how": "planes", "TILE": 32, "TILE_N": 32, "DEPTH": 16, "num_warps": 4, "num_stages": 2, "resident": 1,
}  # fmt: skip


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e13])
def test_the_float16_plane_of_tf32_products_has_their_digits_at_any_scale(scale: float) -> None:
    if not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    x = torch.randn(200, 40) * torch.logspace(-4, 4, 40) * scale
    x[:, 7] = 0
    torch.set_float32_matmul_precision("high")
    try:
        with cfl_ops.config.use_backend("triton"), tuning.force("gram", SPLITS):
            got = cfl_ops.gram(x).gram
    finally:
        torch.set_float32_matmul_precision("highest")
    want, size = x.double().mT @ x.double(), x.double().abs().mT @ x.double().abs()
    least = torch.finfo(torch.float32).smallest_normal
    assert ((got.double() - want).abs() <= 2.0**-10 * size + least).all()
    assert ((got.double() - want).abs() > 2.0**-20 * size)[:6, :6].any()  # it is not float32's accuracy


def test_planes_propagate_infinities_and_nans_to_their_own_columns() -> None:
    if not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    x = torch.rand(100, 20) + 0.5
    x[3, 4], x[5, 6] = torch.inf, torch.nan
    with cfl_ops.config.use_backend("triton"), tuning.force("gram", SPLITS):
        got = cfl_ops.gram(x).gram
    want = x.mT @ x
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("single", [False, True])
def test_the_head_is_as_accurate_with_a_float32_factor(single: bool) -> None:
    """Every sample of the contract, with the rule of cards with fast float64 and that of the others."""
    if not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    use = {"TILE_K": 16, "TILE_D": 16, "num_warps": 4, "factor_warps": 4, "single": single}
    spec = next(spec for spec in contract.load() if spec.op.name == "proximal_step")
    with cfl_ops.config.use_backend("triton"), tuning.force("proximal_step", use):
        for case in spec.cases:
            args = case.make(torch.float32)
            contract.assert_within(contract.results(spec, args), spec.oracle(*args), spec.bound(*args))


def test_a_float32_factor_gives_a_head_with_all_digits() -> None:
    if not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    use = {"TILE_K": 16, "TILE_D": 16, "num_warps": 4, "factor_warps": 4, "single": True}
    features, labels = 1 + 0.3 * torch.randn(40, 100), torch.randint(3, (40,))
    weight = torch.zeros(3, 100)
    want = cfl_ops.proximal_step(features.double(), labels, weight.double(), lam=1e-4)
    with cfl_ops.config.use_backend("triton"), tuning.force("proximal_step", use):
        got = cfl_ops.proximal_step(features, labels, weight, lam=1e-4)
    assert (got.weight - want.weight).norm() < 1e-6 * want.weight.norm()


@pytest.mark.parametrize("single", [False, True])
def test_small_systems_are_solved_as_accurately_in_float32_first(single: bool) -> None:
    """Every sample of the contract by Triton's kernel, and systems whose last pivot float32 cannot resolve."""
    if not (dispatch.triton_available() and dispatch.triton_interpreted()):
        pytest.skip("triton runs on the CPU under TRITON_INTERPRET=1 only")
    use = {"columns": 32, "num_warps": 4, "single": single}
    spec = next(spec for spec in contract.load() if spec.op.name == "ridge_solve")
    with cfl_ops.config.use_backend("triton"), tuning.force("ridge_solve", use):
        for case in spec.cases:
            args = case.make(torch.float32)
            contract.assert_within(contract.results(spec, args), spec.oracle(*args), spec.bound(*args))
        order = 6
        factor = torch.eye(order, dtype=torch.float64).repeat(4, 1, 1)
        factor[:, -1] = torch.randn(4, order) / order**0.5
        factor[::2, -1, -1] = 6e-4  # a last pivot of 4e-7; float32's rounding errors are of 1e-7
        factor[1, -1, -1], factor[3, 2, 2] = 1.0, 0.0
        gram, cross = (factor @ factor.mT).float(), torch.randn(4, order, 33)
        got, info = cfl_ops.ridge_solve_ex(gram, cross)
    assert info.tolist() == [0, 0, 0, 3]
    assert got[3].isnan().all()
    want = torch.linalg.solve(gram[:3].double(), cross[:3].double())
    error = (got[:3].double() - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)
    assert (error <= 3 * torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize("architecture", ["sm_75", "sm_86", "sm_89", "sm_120"])
def test_no_rule_takes_float64_where_that_is_slow(architecture: str) -> None:
    """What float32 can do is done in float32 on consumer cards, and fits their 99 KB of shared memory.

    What is left in float64 there is written in benches/results/STATUS.md.
    """
    card = Device("NVIDIA GeForce", architecture, 82, 99 << 10)
    assert card.slow_float64
    with pretend(card):
        for kind in ("half", "tf32", "tf32x3"):
            for order in (8, 64, 65, 256, 513, 1024, 4096):
                for rows in (16, 1024, 65536):
                    for planes in (False, True):
                        use = tuning.choose("gram", CPU, kind=kind, order=order, rows=rows, planes=planes)
                        assert use["how"] in ("pointers", "library")  # not exact, nor the copy engine's
        for rows in (1, 16, 32, 33, 128):
            for width in (128, 4096):
                use = tuning.choose("proximal_step", CPU, rows=rows, width=width, targets=100)
                assert use["single"]
        for order in (1, 16, 17, 33, 64):
            assert tuning.choose("ridge_solve", CPU, order=order, columns=1)["single"]
        # Sums of float64 that the caller asks for: the kernel whose products are not made one at a time.
        for order in (513, 2048):
            use = tuning.choose("gram", CPU, kind="float64", order=order, rows=4096, planes=False)
            assert use["how"] == "exact"
    with pretend(CARD):
        assert not tuning.choose("proximal_step", CPU, rows=64, width=512, targets=100)["single"]
        assert not tuning.choose("ridge_solve", CPU, order=16, columns=1)["single"]


@pytest.mark.parametrize("rows", [1, 63, 1000, 65536])
@pytest.mark.parametrize("width", [1, 100, 1024, 4096])
@pytest.mark.parametrize("matrices", [1, 7])
def test_tiles_are_shared_out_whole_while_they_fill_the_card(rows: int, width: int, matrices: int) -> None:
    if not dispatch.triton_available():
        pytest.skip("triton is not installed")
    kernels = __import__("cfl_ops.triton_kernels.gram", fromlist=["x"])
    x = torch.empty(1, rows, width, device="meta")
    use = {"TILE": 128, "TILE_N": 256, "DEPTH": 64, "resident": 1}
    with pretend(CARD):
        triangle, whole, rest, splits, per_split = kernels._share(x, matrices, 2, use)
    blocks = -(-width // 256)
    assert triangle == blocks * (blocks + 1)
    assert whole + rest == triangle * matrices
    assert per_split % 64 == 0
    if rest:
        assert rest < CARD.multiprocessors
        assert whole % CARD.multiprocessors == 0
        assert (splits - 1) * per_split < rows <= splits * per_split  # no split is empty
        assert splits > 1
    else:
        assert splits == 1
