"""Schedules of lambda: their values, their state, and that no value makes a graph compile again."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
from collections.abc import Callable

import cfl_ops
import pytest
import torch
from cfl_ops.learn import BatchSizeLam, ClosedFormLinear, ConstantLam, CosineLam, LamSchedule, RelativeLam
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend

ROWS = torch.ones(8, 4)
MAKERS: list[Callable[[], LamSchedule]] = [
    lambda: ConstantLam(0.5),
    lambda: CosineLam(10.0, 7),
    lambda: CosineLam(10.0, 7, 1e-3, log=True),
    lambda: BatchSizeLam(2.0, 32),
    lambda: BatchSizeLam(CosineLam(10.0, 7), 32, 0.5),
    lambda: RelativeLam(0.3, decay=0.0),
    lambda: RelativeLam(0.3),
    lambda: RelativeLam(BatchSizeLam(CosineLam(10.0, 7), 32), decay=0.7),
    lambda: BatchSizeLam(RelativeLam(CosineLam(10.0, 7)), 32),
]
IDS = [f"{i}-{type(make()).__name__}" for i, make in enumerate(MAKERS)]


class Counted:
    """A backend that counts its graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list) -> Callable:
        self.graphs += 1
        return lookup_backend("aot_eager")(graph, inputs)


def mean_square(features: Tensor) -> Tensor:
    return features.detach().double().square().mean()


def value(schedule: LamSchedule, features: Tensor) -> Tensor:
    """As a head asks for it."""
    return schedule.value(features.shape[0], lambda: mean_square(features))


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5 + i % 3, 4, generator=generator) * (1 + i) for i in range(count)]


def run(schedule: LamSchedule, rows: list[Tensor]) -> list[float]:
    out = []
    for features in rows:
        out.append(float(value(schedule, features)))
        assert schedule.get_last_lam() == out[-1]
        schedule.step()
    return out


def test_constant() -> None:
    assert run(ConstantLam(0.3), [ROWS] * 5) == [0.3] * 5


@pytest.mark.parametrize(("lam", "lam_min"), [(10.0, 0.0), (3.0, 0.5), (0.1, 1000.0), (1.0, 1.0)])
def test_cosine_is_that_of_torch_and_then_stays(lam: float, lam_min: float) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lam)
    annealed = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=lam_min)
    want = []
    for _ in range(21):
        want += annealed.get_last_lr()
        optimizer.step()
        annealed.step()
    got = run(CosineLam(lam, 20, lam_min), [ROWS] * 40)
    assert got[:21] == pytest.approx(want, rel=1e-12, abs=1e-15)
    assert got[0] == lam
    assert got[20:] == [lam_min] * 20


def test_cosine_of_the_logarithm() -> None:
    got = run(CosineLam(100.0, 10, 0.01, log=True), [ROWS] * 12)
    shape = run(CosineLam(2.0, 10, -0.0), [ROWS] * 12)
    assert got == pytest.approx([10 ** (2 * s - 2) for s in shape])
    assert got[5] == pytest.approx(1.0)
    assert got[0] == 100.0
    assert got[10:] == [0.01] * 2
    with pytest.raises(ValueError, match=r"cfl_ops.learn.CosineLam: lam_min must be finite and positive"):
        CosineLam(1.0, 5, log=True)


def test_batch_size() -> None:
    for rows, power, want in (
        (32, 1.0, 12.0),
        (128, 1.0, 3.0),
        (32, 0.5, 6.0),
        (512, 0.0, 3.0),
        (512, -1.0, 12.0),
    ):
        assert float(value(BatchSizeLam(3.0, 128, power), torch.ones(rows, 2))) == pytest.approx(want)
    schedule = BatchSizeLam(CosineLam(8.0, 2), 16)
    assert run(schedule, [torch.ones(16, 1), torch.ones(8, 1), torch.ones(4, 1)]) == pytest.approx(
        [8.0, 8.0, 0.0]
    )
    assert math.isfinite(value(schedule, torch.ones(0, 1)))


def test_relative_to_this_batch_alone() -> None:
    schedule = RelativeLam(0.5, decay=0.0)
    for features in batches(5):
        want = 0.5 * float(torch.trace(features.double().mT @ features.double())) / features.numel()
        assert float(value(schedule, features)) == pytest.approx(want, rel=1e-12)
    huge = torch.full((2, 2), 6e4, dtype=torch.float16)
    assert float(value(schedule, huge)) == pytest.approx(0.5 * float(huge[0, 0]) ** 2)


def test_relative_to_an_average() -> None:
    schedule, squares = RelativeLam(0.5, decay=0.8), []
    for features in batches(12):
        squares.append(float(features.double().square().mean()))
        weights = [0.8 ** (len(squares) - 1 - i) for i in range(len(squares))]
        want = 0.5 * sum(w * s for w, s in zip(weights, squares, strict=True)) / sum(weights)
        assert float(value(schedule, features)) == pytest.approx(want, rel=1e-12)


def test_the_average_of_tensors_and_of_numbers_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's and a graph's, and that of the CPU, which reads the numbers."""
    want = run(RelativeLam(0.5, decay=0.8), [*batches(9), 0 * ROWS / 0, ROWS[:0], ROWS])
    monkeypatch.setattr("cfl_ops.learn.schedules.is_compiling", lambda: True)
    assert run(RelativeLam(0.5, decay=0.8), [*batches(9), 0 * ROWS / 0, ROWS[:0], ROWS]) == want


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_nothing_and_bad_features_leave_the_average(decay: float) -> None:
    schedule = RelativeLam(0.5, decay)
    for features in (torch.ones(0, 4), torch.full((2, 4), torch.nan), torch.full((2, 4), torch.inf)):
        assert float(value(schedule, features)) == 0.5
    want = float(value(schedule, 3 * ROWS))
    assert want == pytest.approx(4.5)
    state = schedule.state_dict()
    for features in (torch.ones(0, 4), torch.full((2, 4), torch.nan), torch.full((2, 4), torch.inf)):
        assert float(value(schedule, features)) == want
    assert schedule.state_dict() == state
    assert float(value(RelativeLam(0.5, decay), torch.zeros(3, 2))) == 0.0


def test_a_batch_spread_over_processes() -> None:
    """Of moments, whose count is a tensor, it is what it is of the rows."""
    for rows in (0, 8):
        features = torch.randn(rows, 4)
        schedule, other = (RelativeLam(BatchSizeLam(2.0, 32), decay=0.5) for _ in range(2))
        got = schedule.value(torch.tensor(float(rows)), lambda f=features: mean_square(f))
        assert torch.equal(got, value(other, features))
        assert schedule.state_dict() == other.state_dict()
    assert float(BatchSizeLam(2.0, 32).value(8, lambda: pytest.fail("not asked for"))) == 8.0


@pytest.mark.parametrize("make", MAKERS, ids=IDS)
def test_resume_bit_for_bit(make: Callable[[], LamSchedule]) -> None:
    straight = run(make(), batches(12))
    first = make()
    got = run(first, batches(12)[:5])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make()
    run(second, batches(2))
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.last_step == 5
    assert second.get_last_lam() == first.get_last_lam()
    assert second.state_dict() == first.state_dict() == json.loads(json.dumps(first.state_dict()))
    for again in (second, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert got + run(again, batches(12)[5:]) == straight
    assert first.last_step == 5, "they share memory"


@pytest.mark.parametrize("make", MAKERS, ids=IDS)
def test_a_state_that_does_not_fit_changes_nothing(make: Callable[[], LamSchedule]) -> None:
    schedule = make()
    run(schedule, batches(3))
    want = schedule.state_dict()
    other = make()
    run(other, batches(6))
    bad: list[dict] = [{}, {**other.state_dict(), "more": 1}, {**other.state_dict(), "last_step": -1}]
    if "lam" in want:
        bad += [{**other.state_dict(), "lam": {}}, {**other.state_dict(), "lam": 3.0}]
        bad += [{**other.state_dict(), "lam": {**want["lam"], "last_step": "x"}}]
    for state in bad:
        with pytest.raises((ValueError, TypeError), match=r"cfl_ops.learn.\w+.load_state_dict: "):
            schedule.load_state_dict(state)
        assert schedule.state_dict() == want


@pytest.mark.parametrize("make", MAKERS, ids=IDS)
def test_value_is_a_tensor_without_a_graph(make: Callable[[], LamSchedule]) -> None:
    schedule = make()
    got = value(schedule, torch.randn(6, 3, requires_grad=True))
    assert got.dtype == torch.float64
    assert got.shape == ()
    assert got.device.type == "cpu"
    assert not got.requires_grad
    assert type(schedule).__name__ in repr(schedule)
    with torch.inference_mode():
        there = make()
        value(there, ROWS)
        value(schedule, ROWS)
        schedule.step()
    for each in (there, schedule):
        each.step()
        value(each, ROWS)


def test_the_value_of_an_earlier_batch_is_not_written_to() -> None:
    for schedule in (BatchSizeLam(1.0, 8), RelativeLam(1.0)):
        first = value(schedule, torch.ones(4, 2))
        want = float(first)
        value(schedule, torch.full((8, 2), 5.0))
        assert float(first) == want


@pytest.mark.parametrize("make", MAKERS, ids=IDS)
@pytest.mark.parametrize("mark", [True, False])
def test_no_value_compiles_again(make: Callable[[], LamSchedule], mark: bool) -> None:
    """50 steps in which lambda changes, over several batch sizes: one graph; two where torch has to find out itself
    that sizes change.
    """
    schedule, want = make(), make()
    counter = Counted()

    def step(features: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        lam = value(schedule, features)
        return lam * 1, *cfl_ops.proximal_step(features, target, weight, lam=lam)[:1]

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    generator, weight = torch.Generator().manual_seed(2), torch.zeros(2, 4)
    for i in range(50):
        features = torch.randn(7 if i % 5 == 4 else 16, 4, generator=generator) * (1 + i)
        target = torch.randn(len(features), 2, generator=generator)
        if mark:
            torch._dynamo.mark_dynamic(features, 0)
            torch._dynamo.mark_dynamic(target, 0)
        lam, new = compiled(features, target, weight)
        expected = value(want, features)
        torch.testing.assert_close(lam, expected, rtol=1e-14, atol=0.0)
        torch.testing.assert_close(
            new, cfl_ops.proximal_step(features, target, weight, lam=expected).weight, rtol=1e-3, atol=1e-4
        )
        assert schedule.get_last_lam() == pytest.approx(want.get_last_lam(), rel=1e-14)
        schedule.step()
        want.step()
    assert counter.graphs <= (1 if mark else 2)


def test_a_number_would_compile_again() -> None:
    """So that the test above can fail: a lambda in a plain attribute, which changes."""
    counter = Counted()

    class Plain:
        lam = 1.0

    holder = Plain()
    compiled = torch.compile(lambda x: x * torch.tensor(holder.lam), fullgraph=True, backend=counter)
    for i in range(4):
        holder.lam = 1.0 + i
        compiled(ROWS)
    assert counter.graphs > 1


def test_a_schedule_of_ones_own() -> None:
    class Halved(LamSchedule):
        def _at(self, step: int) -> float:
            return 0.5**step

    assert run(BatchSizeLam(Halved(), 8), [ROWS] * 3) == [1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantLam(-1.0), "ConstantLam: lam must be finite and not negative, but got -1"),
        (lambda: ConstantLam(math.nan), "ConstantLam: lam must be finite"),
        (lambda: ConstantLam("1"), "ConstantLam: lam must be a number"),
        (lambda: CosineLam(1.0, 0), "CosineLam: T_max must be at least 1"),
        (lambda: CosineLam(1.0, 5, -1.0), "CosineLam: lam_min must be"),
        (lambda: CosineLam(1.0, 5, log=1), "CosineLam: log must be True or False"),
        (lambda: BatchSizeLam(-1.0, 8), "BatchSizeLam: lam must be"),
        (lambda: BatchSizeLam(1.0, 0), "BatchSizeLam: reference must be at least 1"),
        (lambda: BatchSizeLam(1.0, 8, math.inf), "BatchSizeLam: power must be finite"),
        (lambda: RelativeLam(1.0, 1.0), r"RelativeLam: decay must be in \[0, 1\)"),
        (lambda: RelativeLam(None), "RelativeLam: lam must be a number"),
    ],
)
def test_errors(make: Callable[[], LamSchedule], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=rf"cfl_ops.learn.{message}"):
        make()


@pytest.mark.parametrize("make", MAKERS, ids=IDS)
def test_a_head_asks_its_schedule(make: Callable[[], LamSchedule]) -> None:
    """It steps as with the number, in eager and in one graph for all numbers; bad features are the error's."""
    schedule, other, compiled_one = make(), make(), make()
    heads = [ClosedFormLinear(4, 2, lam=lam) for lam in (schedule, 1.0, compiled_one)]
    compiled = torch.compile(
        lambda x, y: heads[2].update(x, y), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for i, features in enumerate(batches(12)):
        target = torch.randn(len(features), 2)
        for bad in (torch.nan, torch.inf):
            with pytest.raises(ValueError, match="features"):
                ClosedFormLinear(4, 2, lam=make()).update(features * bad, target)
        heads[1].lam = float(value(other, features))
        got, want = heads[0].update(features, target), heads[1].update(features, target)
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            in_graph = compiled(features, target)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(in_graph, want, rtol=1e-4, atol=1e-5)
        assert schedule.get_last_lam() == pytest.approx(other.get_last_lam(), rel=1e-14)
        for each in (schedule, other, compiled_one):
            each.step()
    assert copy.deepcopy(heads[0]).lam.state_dict() == schedule.state_dict()
