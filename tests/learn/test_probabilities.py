"""Class probabilities, and their calibration against SciPy's minimum of the likelihood."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from cfl_ops.learn import Calibration, class_probabilities, expected_calibration_error
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("method", ["clip", "abs"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [(7, 5), (5,), (2, 3, 1), (0, 4), (3, 0)], ids=str)
def test_against_the_formula(method: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    scores = torch.randn(shape, dtype=torch.float64).to(dtype)
    got = class_probabilities(scores, method)
    assert got.dtype == dtype
    assert got.shape == scores.shape
    f = scores.double().numpy()
    g = np.maximum(f, 0) if method == "clip" else np.abs(f)
    total = g.sum(-1, keepdims=True)
    want = np.divide(g, total, out=np.full_like(g, 1 / max(1, shape[-1])), where=total > 0)
    eps = max(torch.finfo(dtype).eps, 1e-15)
    torch.testing.assert_close(
        got.double(), torch.from_numpy(want), rtol=2 * eps, atol=torch.finfo(dtype).tiny
    )
    if shape[-1]:
        ones = torch.ones(shape[:-1], dtype=torch.float64)
        torch.testing.assert_close(got.double().sum(-1), ones, rtol=4 * eps, atol=0)


def test_rows_without_a_sign_of_any_class_are_uniform() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [-1.0, -2.0, -0.0, -3.0], [-math.inf, 0.5, -1.0, 0.5]])
    want = torch.tensor([[0.25] * 4, [0.25] * 4, [0.0, 0.5, 0.0, 0.5]])
    assert torch.equal(class_probabilities(scores), want)
    assert torch.equal(class_probabilities(scores, "abs")[0], want[0])


@pytest.mark.parametrize("scale", [1e-310, 1e-300, 1e300])
def test_scale_does_not_matter(scale: float) -> None:
    scores = torch.tensor([[1.0, 2.0, 5.0], [3.0, -1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(class_probabilities(scores * scale), class_probabilities(scores))
    large = torch.full((2, 100), 6e4, dtype=torch.float16)
    assert torch.equal(class_probabilities(large), torch.full((2, 100), 0.01, dtype=torch.float16))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_rows_are_nan_and_others_are_not(bad: float) -> None:
    scores = torch.tensor([[0.5, 0.5], [bad, 1.0], [1.0, bad]])
    for method in ("clip", "abs"):
        got = class_probabilities(scores, method)
        assert torch.equal(got[0], torch.tensor([0.5, 0.5]))
        assert bool(got[1:].isnan().all())
    assert bool(Calibration()(scores)[1:].isnan().all())


@pytest.mark.parametrize("method", ["clip", "abs"])
def test_gradient(method: str) -> None:
    scores = torch.tensor([[0.5, -0.3, 0.2], [0.1, 0.7, -0.9]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: class_probabilities(s, method), scores)
    zero = torch.zeros(1, 3, requires_grad=True)
    class_probabilities(zero, method)[0, 0].backward()
    assert torch.equal(zero.grad, torch.zeros(1, 3))


def test_compiles_as_one_graph() -> None:
    scores, model = torch.randn(6, 3), Calibration().fit(*problem(50))
    for function in (class_probabilities, model, lambda s: model.nll(s, s.argmax(-1))):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (6, 4):
            torch.testing.assert_close(compiled(scores[:rows]), function(scores[:rows]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1.0],), TypeError, "scores must be a tensor"),
        ((torch.ones(2, 2, dtype=torch.int64),), TypeError, "scores must be float16"),
        ((torch.tensor(1.0),), ValueError, "scores must have at least 1 dimension"),
        ((torch.ones(2, 2), "softmax"), ValueError, "method must be one of clip, abs"),
    ],
)
def test_errors(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"cfl_ops.learn.class_probabilities: {message}"):
        class_probabilities(*arguments)


def problem(rows: int, classes: int = 5, beta: float = 8.0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scores, and labels drawn from softmax(beta scores)."""
    scores = torch.randn(rows, classes, dtype=torch.float64) * 0.3
    return scores * scale, torch.multinomial((beta * scores).softmax(1), 1).squeeze(1)


def likelihood(beta: float, scores: Tensor, labels: Tensor) -> float:
    logits = beta * scores.double().numpy()
    return float((scipy.special.logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]).mean())


@pytest.mark.parametrize("rows", [3, 20, 5000])
@pytest.mark.parametrize("beta", [0.1, 1.0, 8.0, 60.0])
@pytest.mark.parametrize("scale", [1.0, 1e-150, 1e150])
def test_fit_against_scipy(rows: int, beta: float, scale: float) -> None:
    scores, labels = problem(rows, beta=beta, scale=scale)
    labels[0], labels[1] = scores[0].argmin(), scores[1].argmax()  # neither hopeless nor separable
    model = Calibration().fit(scores, labels)
    assert model(scores).argmax(1).equal(scores.argmax(1)) or float(model.beta) == 0
    want = scipy.optimize.minimize_scalar(
        lambda b: likelihood(b, scores / scale, labels),
        bounds=(0, 200),
        method="bounded",
        options={"xatol": 1e-10},
    )
    got = float(model.beta) * scale
    assert float(model.nll(scores, labels)) == pytest.approx(want.fun, rel=1e-9)
    assert float(model.nll(scores, labels)) <= want.fun * (1 + 1e-13)
    assert got == pytest.approx(want.x, rel=1e-4, abs=1e-5)
    if got:  # the derivative vanishes, which tells beta to more digits than its minimum does
        p = scipy.special.softmax(got * (scores / scale).numpy(), axis=1)
        own = (scores / scale).numpy()[np.arange(rows), labels]
        assert ((p * (scores / scale).numpy()).sum(1) - own).mean() == pytest.approx(0, abs=1e-13)


def test_fit_finds_what_it_was_drawn_from() -> None:
    assert float(Calibration().fit(*problem(40_000)).beta) == pytest.approx(8.0, rel=0.03)


def test_fit_does_not_depend_on_what_is_added_to_a_row() -> None:
    scores, labels = problem(300)
    want = Calibration().fit(scores, labels)
    got = Calibration().fit(scores + 1024 * torch.randn(300, 1).round(), labels)
    assert float(got.beta) == pytest.approx(float(want.beta), rel=1e-9)


def test_separable_data_are_at_the_cap() -> None:
    scores, _ = problem(50)
    labels = scores.argmax(1)
    spread = float((scores.amax(1) - scores.amin(1)).mean())
    model = Calibration().fit(scores, labels)
    assert float(model.beta) == pytest.approx(1e3 / spread)
    assert float(model.nll(scores, labels)) < 1e-2
    assert float(Calibration(cap=10).fit(scores, labels).beta) == pytest.approx(10 / spread)
    assert bool(model(scores.half()).isfinite().all())
    # One mistake, and there is an end to it.
    labels[0] = scores[0].argmin()
    assert float(Calibration().fit(scores, labels).beta) < 100


def test_scores_against_the_labels_give_uniform_probabilities() -> None:
    scores, _ = problem(50)
    model = Calibration().fit(scores, scores.argmin(1))
    assert float(model.beta) == 0.0
    assert torch.equal(model(scores), torch.full_like(scores, 0.2))
    assert float(model.nll(scores, scores.argmin(1))) == pytest.approx(math.log(5))


def test_scores_that_tell_nothing() -> None:
    scores = torch.randn(6, 1).expand(6, 3)
    model = Calibration().fit(scores, torch.zeros(6, dtype=torch.int64))
    assert float(model.beta) == 1.0
    one = Calibration().fit(torch.randn(4, 1), torch.zeros(4, dtype=torch.int64))  # one class
    assert float(one.nll(torch.randn(4, 1), torch.zeros(4, dtype=torch.int64))) == 0.0
    tied = Calibration().fit(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([1]))
    assert float(tied.beta) == pytest.approx(1e3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF], ids=str)
def test_forward_is_a_softmax(dtype: torch.dtype) -> None:
    scores, labels = problem(40)
    scores = scores.to(dtype).reshape(4, 10, 5).transpose(0, 1)
    model = Calibration().fit(*problem(200))
    got = model(scores)
    assert got.dtype == dtype
    want = (float(model.beta) * scores.double()).softmax(-1)
    torch.testing.assert_close(got.double(), want, rtol=8 * torch.finfo(dtype).eps, atol=1e-7)
    labels = labels.reshape(4, 10).mT
    assert float(model.nll(scores, labels)) == pytest.approx(
        likelihood(float(model.beta), scores.reshape(-1, 5), labels.reshape(-1))
    )


def test_large_logits_overflow_nothing() -> None:
    model = Calibration()
    model.beta.fill_(1e30)
    got = model(torch.tensor([[3e38, -3e38], [-3e38, -3e38]]))
    assert torch.equal(got, torch.tensor([[1.0, 0.0], [0.5, 0.5]]))
    model.beta.fill_(1e300)  # more than float32 holds
    assert torch.equal(model(torch.tensor([[1.0, 0.0]])), torch.tensor([[1.0, 0.0]]))


def test_gradient_of_calibrated_scores() -> None:
    model = Calibration().fit(*problem(100))
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model, scores)


def test_state() -> None:
    model = Calibration().fit(*problem(100))
    assert list(model.state_dict()) == ["beta"]
    assert not list(model.parameters())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = Calibration()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.beta, model.beta)
    want = float(model.beta)
    nn.Sequential(model).half()
    assert float(model.beta) == want
    assert float(copy.deepcopy(model).beta) == want
    assert f"beta={want:.6g}" in repr(model)
    with torch.inference_mode():
        there = Calibration().fit(*problem(100))
    assert there.fit(*problem(30)) is there


@pytest.mark.parametrize(
    ("scores", "labels", "error", "message"),
    [
        (torch.ones(3, 2), torch.zeros(3), TypeError, "labels must be int64"),
        (torch.ones(3, 2), [0, 1, 0], TypeError, "labels must be a tensor"),
        (torch.ones(3, 2), torch.zeros(2, dtype=torch.int64), ValueError, r"labels must have shape \(3,\)"),
        (torch.ones(3, 2), torch.tensor([0, 2, 0]), IndexError, "from 0 to 1, but got 2 in row 1"),
        (torch.ones(3, 2), torch.tensor([0, 0, -1]), IndexError, "but got -1 in row 2"),
        (torch.ones(0, 2), torch.zeros(0, dtype=torch.int64), ValueError, "at least 1 row"),
        (torch.ones(3, 0), torch.zeros(3, dtype=torch.int64), ValueError, "1 class"),
        (torch.tensor([[1.0, 2.0], [1.0, torch.nan]]), torch.tensor([0, 0]), ValueError, "NaN or Inf in row 1"),
    ],
)  # fmt: skip
def test_errors_of_fit_leave_beta(
    scores: Tensor, labels: Tensor, error: type[Exception], message: str
) -> None:
    model = Calibration().fit(*problem(100))
    want = float(model.beta)
    with pytest.raises(error, match=f"cfl_ops.learn.Calibration.fit: .*{message}"):
        model.fit(scores, labels)
    assert float(model.beta) == want


@pytest.mark.parametrize("cap", [0.0, -1.0, math.inf, "1"])
def test_errors_of_the_cap(cap: object) -> None:
    with pytest.raises((ValueError, TypeError), match="cfl_ops.learn.Calibration: cap must be"):
        Calibration(cap)


def naive_calibration_error(p: np.ndarray, labels: np.ndarray, bins: int) -> float:
    confidence, likeliest = p.max(1), p.argmax(1)
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            gap = (likeliest[inside] == labels[inside]).mean() - confidence[inside].mean()
            total += inside.mean() * abs(gap)
    return total


@pytest.mark.parametrize("bins", [1, 15, 100])
@pytest.mark.parametrize("rows", [1, 500])
def test_calibration_error_bin_by_bin(bins: int, rows: int) -> None:
    scores, labels = problem(rows)
    p = (3 * scores).softmax(1)
    got = expected_calibration_error(p, labels, bins)
    assert float(got) == pytest.approx(naive_calibration_error(p.numpy(), labels.numpy(), bins), abs=1e-12)
    assert float(expected_calibration_error(p.reshape(rows, 1, 5), labels.reshape(rows, 1), bins)) == float(
        got
    )


def test_calibration_makes_the_error_small() -> None:
    (scores, labels), (others, theirs) = problem(4000), problem(4000)
    model = Calibration().fit(others, theirs)
    plain = float(expected_calibration_error(scores.softmax(1), labels))
    assert float(expected_calibration_error(model(scores), labels)) < 0.03 < 0.2 < plain


def test_errors_of_calibration_error() -> None:
    labels = torch.tensor([0, 1])
    for bad in (torch.tensor([[0.5, 0.5], [1.5, -0.5]]), torch.full((2, 2), torch.nan)):
        with pytest.raises(ValueError, match=r"probabilities must be in \[0, 1\]"):
            expected_calibration_error(bad, labels)
    with pytest.raises(ValueError, match="bins must be at least 1"):
        expected_calibration_error(torch.ones(2, 2), labels, 0)
    with pytest.raises(ValueError, match="at least 1 row"):
        expected_calibration_error(torch.ones(0, 2), labels[:0])


def test_probabilities_of_maps() -> None:
    scores = torch.rand(2, 3, 4, 5)
    got = class_probabilities(scores, dim=1)
    torch.testing.assert_close(got.sum(1), torch.ones(2, 4, 5))
    torch.testing.assert_close(got, class_probabilities(scores.movedim(1, -1)).movedim(-1, 1))
    with pytest.raises(ValueError, match="dim must be an integer from -4 to 3, but got 4"):
        class_probabilities(scores, dim=4)
