"""closed_form_gain and feature_alignment, against losses measured one by one and NumPy's decompositions."""

from __future__ import annotations

import io
import math
import pickle

import numpy as np
import pytest
import torch
from cfl_ops.learn import ClosedFormGain, ClosedFormLinear, closed_form_gain, feature_alignment
from torch import Tensor, nn

SHAPES = [(40, 5, 3), (5, 40, 3), (7, 7, 1), (1, 4, 2), (300, 2, 10), (6, 1, 1)]


def draw(rows: int, width: int, targets: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Features of several sizes, so that the gain is far from 1."""
    sizes = torch.logspace(0, 1, width, dtype=torch.float64)
    features = torch.randn(rows, width, dtype=torch.float64) * sizes * scale
    weight = torch.randn(targets, width, dtype=torch.float64) / scale
    return features, torch.randn(rows, targets, dtype=torch.float64), weight


def measured(features: Tensor, target: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """The gain by three losses: autograd's gradient, the best step along it by a parabola, and NumPy's lstsq."""
    if bias is not None:
        features = torch.cat((features, torch.ones(len(features), 1, dtype=torch.float64)), 1)
        weight = torch.cat((weight, bias[:, None]), 1)

    def loss(w: Tensor) -> Tensor:
        return (target - features @ w.mT).square().sum() / len(features)

    w = weight.clone().requires_grad_()
    here = loss(w)
    (grad,) = torch.autograd.grad(here, w)
    best = grad.square().sum() * len(features) / (2 * (features @ grad.mT).square().sum())
    solved = np.linalg.lstsq(features.numpy(), target.numpy(), rcond=None)[0].T
    least = loss(torch.from_numpy(np.ascontiguousarray(solved)))
    others = [loss(weight - factor * best * grad) for factor in (0.9, 1.1)]
    stepped = loss(weight - best * grad)
    assert all(float(other) >= float(stepped) for other in others), "not the best step"
    return float(((here - least) / (here - stepped)).detach())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_measured_losses(shape: tuple[int, int, int]) -> None:
    features, target, weight = draw(*shape)
    got = closed_form_gain(features, target, weight)
    want = measured(features, target, weight)
    assert float(got.gain) == pytest.approx(want, rel=1e-9)
    assert float(got.bound) == pytest.approx(want, rel=1e-9)
    assert float(got.gain) >= float(got.bound) * (1 - 1e-12)
    assert got.gain.shape == got.bound.shape == ()
    assert got.gain.dtype == got.bound.dtype == torch.float64
    assert want > 1.05 or min(shape[:2]) < 5


@pytest.mark.parametrize("shape", [(40, 5, 3), (5, 40, 3), (2, 1, 1)], ids=str)
def test_bias_is_a_feature_of_ones(shape: tuple[int, int, int]) -> None:
    features, target, weight = draw(*shape)
    bias = torch.randn(shape[2], dtype=torch.float64)
    got = closed_form_gain(features, target, weight, bias)
    assert float(got.gain) == pytest.approx(measured(features, target, weight, bias), rel=1e-9)
    ones = torch.ones(len(features), 1, dtype=torch.float64)
    want = closed_form_gain(torch.cat((features, ones), 1), target, torch.cat((weight, bias[:, None]), 1))
    torch.testing.assert_close(tuple(got), tuple(want))


def test_the_theorem_for_any_step_size() -> None:
    features, target, weight = draw(30, 6, 2)
    bound = float(closed_form_gain(features, target, weight).bound)
    residual = target - features @ weight.mT
    least = (target - features @ torch.linalg.lstsq(features, target).solution).square().sum()
    for a in torch.logspace(-8, 0, 60, dtype=torch.float64):
        stepped = (residual - 2 * a * features @ (features.mT @ residual)).square().sum()
        here = residual.square().sum()
        assert float(here - stepped) <= float((here - least) / bound) * (1 + 1e-12)


@pytest.mark.parametrize("target_dtype", [torch.float64, torch.float32, torch.int64])
def test_classes_are_one_hot(target_dtype: torch.dtype) -> None:
    features, _, weight = draw(20, 4, 3)
    labels = torch.arange(20) % 3
    one_hot = nn.functional.one_hot(labels, 3)
    target = labels if target_dtype == torch.int64 else one_hot.to(target_dtype)
    got = closed_form_gain(features, target, weight)
    torch.testing.assert_close(float(got.gain), measured(features, one_hot.double(), weight))


def test_leading_dimensions_and_strides() -> None:
    features, target, weight = draw(24, 4, 3)
    want = closed_form_gain(features, target, weight)
    strided = torch.empty(2, 4, 3, 4, dtype=torch.float64).transpose(1, 2)
    strided.copy_(features.reshape(2, 3, 4, 4))
    assert not strided.is_contiguous()
    got = closed_form_gain(strided, target.reshape(2, 3, 4, 3), weight.mT.contiguous().mT)
    torch.testing.assert_close(tuple(got), tuple(want))
    got = closed_form_gain(strided, target, weight)  # a flat target
    torch.testing.assert_close(tuple(got), tuple(want))
    one = closed_form_gain(features[0], target[0], weight)  # one row without a leading dimension
    assert float(one.gain) == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computed_in_float64(dtype: torch.dtype) -> None:
    features, target, weight = (value.to(dtype) for value in draw(30, 5, 2, 10.0))
    got = closed_form_gain(features, target, weight)
    assert float(got.gain) == pytest.approx(
        measured(features.double(), target.double(), weight.double()), rel=1e-9
    )


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e150, 1e300])
@pytest.mark.parametrize("unit", [1e-300, 1.0, 1e300])
def test_scales_do_not_matter(scale: float, unit: float) -> None:
    features, target, weight = draw(20, 5, 3)
    want = closed_form_gain(features, target, weight)
    if not 1e-300 < unit / scale < 1e300:
        weight, want = torch.zeros_like(weight), closed_form_gain(features, target, torch.zeros_like(weight))
    changed = weight * (unit / scale) if weight.any() else weight
    got = closed_form_gain(features * scale, target * unit, changed)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-10, atol=0.0)


def test_a_prediction_that_float64_cannot_hold() -> None:
    features, _, weight = draw(20, 5, 3)
    want = closed_form_gain(features, torch.zeros(20, 3), weight)
    got = closed_form_gain(features * 1e200, torch.ones(20, 3), weight * 1e200)
    torch.testing.assert_close(tuple(got), tuple(want), rtol=1e-10, atol=0.0)


def test_rank_deficient_features() -> None:
    features, target, weight = draw(30, 6, 2)
    features[:, 3] = features[:, 0] - 2 * features[:, 1]
    features[:, 5] = 0
    features[7] = 0
    features[9] = features[8]
    got = closed_form_gain(features, target, weight)
    assert float(got.gain) == pytest.approx(measured(features, target, weight), rel=1e-9)
    assert float(got.bound) == pytest.approx(float(got.gain), rel=1e-9)


def test_ill_conditioned_features_gain_much() -> None:
    q = torch.linalg.qr(torch.randn(40, 4, dtype=torch.float64)).Q
    sigma = torch.tensor([1.0, 1e-1, 1e-3, 1e-5], dtype=torch.float64)
    target = q.sum(1, keepdim=True)
    got = closed_form_gain(q * sigma, target, torch.zeros(1, 4))
    fourth, square = sigma.pow(4).sum(), sigma.square().sum()
    assert float(got.gain) == pytest.approx(float(4 * fourth / square**2), rel=1e-9)  # p is 1/4 each
    assert float(got.bound) == pytest.approx(float(got.gain), rel=1e-9)
    # All of the residual where the features are smallest: the gradient is tiny, and does it in one step.
    got = closed_form_gain(q * sigma, q[:, 3:], torch.zeros(1, 4))
    assert float(got.gain) == pytest.approx(1.0, rel=1e-5)


def test_equal_singular_values_gain_nothing() -> None:
    q = torch.linalg.qr(torch.randn(9, 9, dtype=torch.float64)).Q
    got = closed_form_gain(3 * q, torch.randn(9, 2), torch.randn(2, 9))
    assert float(got.gain) == pytest.approx(1.0, abs=1e-12)
    assert float(got.bound) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("rows", [5, 40, 2000])
@pytest.mark.parametrize("scale", [1e-100, 1.0, 1e100])
def test_nan_at_the_minimum(rows: int, scale: float) -> None:
    features, target, _ = draw(rows, 8, 3)
    features = features * scale
    solved = torch.linalg.lstsq(features / scale, target).solution.mT / scale
    got = closed_form_gain(features, target, solved)
    assert math.isnan(got.gain)
    assert math.isnan(got.bound)


def test_nan_at_critical_points() -> None:
    features = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    for target in (torch.zeros(3, 1), torch.tensor([[1.0], [-1.0], [5.0]])):  # of no size, and orthogonal
        got = closed_form_gain(features, target, torch.zeros(1, 2))
        assert math.isnan(got.gain)
        assert math.isnan(got.bound)
    got = closed_form_gain(torch.zeros(3, 2), torch.ones(3, 1), torch.ones(1, 2))
    assert math.isnan(got.gain)
    assert math.isnan(got.bound)
    for shape in ((3, 0, 2), (3, 2, 0)):
        got = closed_form_gain(
            torch.ones(3, shape[1]), torch.ones(3, shape[2]), torch.ones(shape[2], shape[1])
        )
        assert math.isnan(got.gain)


def test_a_bias_finds_a_gradient_where_features_have_none() -> None:
    got = closed_form_gain(torch.zeros(4, 2), torch.ones(4, 1), torch.zeros(1, 2), torch.zeros(1))
    assert float(got.gain) == pytest.approx(1.0)


def test_a_gradient_head_lags_behind() -> None:
    """What it is for: logged in training."""
    x = torch.randn(64, 10)
    backbone, head = nn.Sequential(nn.Linear(10, 32), nn.ReLU()), ClosedFormLinear(32, 3, lam=0.1)
    target = (x[:, :3]).argmax(1)
    features = backbone(x)  # with a graph
    before = closed_form_gain(features, target, head.weight, head.bias)
    assert float(before.gain) > 2
    assert not before.gain.requires_grad


def test_result_is_saved_and_loaded() -> None:
    want = closed_form_gain(*draw(9, 3, 2))
    file = io.BytesIO()
    torch.save(want, file)
    file.seek(0)
    for got in (torch.load(file, weights_only=True), pickle.loads(pickle.dumps(want))):
        assert type(got) is ClosedFormGain
        assert torch.equal(got.gain, want.gain)
        assert torch.equal(got.bound, want.bound)
    assert ClosedFormGain.__module__ == "cfl_ops.learn"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": torch.randn(5, 4)}, ValueError, "features must have size 3"),
        ({"features": [[1.0]]}, TypeError, "features must be a tensor"),
        ({"features": torch.ones(5, 3, dtype=torch.int32)}, TypeError, "features must be float16"),
        ({"features": torch.full((5, 3), torch.nan)}, ValueError, "features has NaN or Inf in row 0"),
        ({"target": torch.tensor([[0.0, 1]] * 4 + [[torch.inf, 0.0]])}, ValueError, "target has NaN or Inf in row 4"),
        ({"target": torch.randn(5, 3)}, ValueError, "target must have size 2"),
        ({"target": torch.randn(4, 2)}, ValueError, "target must have the 5 rows of features"),
        ({"target": torch.tensor([0, 1, 0, 2, 0])}, IndexError, "from 0 to 1, but has 2 in row 3"),
        ({"target": torch.tensor([0, 1, 0, -1, 0])}, IndexError, "but has -1 in row 3"),
        ({"target": torch.zeros(5, 2, dtype=torch.int32)}, TypeError, "target must be"),
        ({"weight": torch.randn(3)}, ValueError, "weight must have"),
        ({"weight": torch.full((2, 3), torch.nan)}, ValueError, "weight has NaN or Inf"),
        ({"bias": torch.randn(3)}, ValueError, "bias must have shape"),
        ({"bias": torch.tensor([0.0, torch.nan])}, ValueError, "bias has NaN or Inf in row 1"),
        ({"features": torch.ones(0, 3), "target": torch.ones(0, 2)}, ValueError, "at least 1 row"),
    ],
)  # fmt: skip
def test_errors(changes: dict[str, Tensor], error: type[Exception], message: str) -> None:
    given = {"features": torch.randn(5, 3), "target": torch.randn(5, 2), "weight": torch.randn(2, 3)}
    with pytest.raises(error, match=f"cfl_ops.learn.closed_form_gain: .*{message}"):
        closed_form_gain(**{**given, **changes})


def test_alignment_against_its_formula() -> None:
    features, target, _ = draw(20, 5, 3)
    want = torch.linalg.norm(features.mT @ target) / torch.linalg.norm(features) / torch.linalg.norm(target)
    assert float(feature_alignment(features, target)) == pytest.approx(float(want), rel=1e-12)
    for scale in (1e-300, 1e300):
        got = feature_alignment(features * scale, target / scale)
        assert float(got) == pytest.approx(float(want), rel=1e-12)
    labels = torch.arange(20) % 7
    one_hot = nn.functional.one_hot(labels).double()
    got = feature_alignment(features.reshape(4, 5, 5), labels.reshape(4, 5))
    assert float(got) == pytest.approx(float(feature_alignment(features, one_hot)), rel=1e-12)


def test_alignment_with_a_bias_is_of_what_is_not_constant() -> None:
    features, target, _ = draw(20, 5, 3)
    want = feature_alignment(features - features.mean(0), target - target.mean(0))
    got = feature_alignment(features + 100, target - 7, center=True)
    assert float(got) == pytest.approx(float(want), rel=1e-10)
    assert float(feature_alignment(torch.full((20, 5), 0.1), target, center=True)) == 0.0
    assert float(feature_alignment(features, torch.zeros(20, dtype=torch.int64), center=True)) == 0.0


def test_alignment_from_nothing_to_all() -> None:
    column = torch.randn(30, 1, dtype=torch.float64)
    assert float(feature_alignment(column * torch.tensor([[1.0, -2.0]]), 3 * column)) == pytest.approx(1.0)
    assert float(feature_alignment(torch.zeros(30, 2), column)) == 0.0
    assert float(feature_alignment(column, torch.zeros(30, 2))) == 0.0
    assert float(feature_alignment(torch.zeros(0, 2), torch.zeros(0, 1))) == 0.0
    assert float(feature_alignment(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))) == 0.0
    even = torch.tensor([[1.0], [1.0], [2.0], [2.0]])
    odd = torch.tensor([[1.0], [-1.0], [3.0], [-3.0]])
    assert float(feature_alignment(even, odd)) == 0.0


def test_critical_points_of_theorem_5_1() -> None:
    """Where alignment is 0 the solved head gives the backbone no gradient, though the loss is not the least."""
    head = ClosedFormLinear(1, 1, lam=1e-3, method="ridge", bias=False)
    even = torch.tensor([[1.0], [1.0], [2.0], [2.0]])
    odd = torch.tensor([[1.0], [-1.0], [3.0], [-3.0]])
    assert float(feature_alignment(even, odd)) == 0.0
    loss, grad = head.update(even, odd)
    assert not grad.any()
    assert float(head.update(odd, odd)[0]) < 0.01 * float(loss)


@pytest.mark.parametrize(
    ("features", "target", "error", "message"),
    [
        (torch.ones(3, 2), torch.ones(4, 1), ValueError, "target must have the 3 rows of features"),
        (torch.ones(3, 2), torch.tensor([0, -1, 0]), IndexError, "not negative, but has -1 in row 1"),
        (torch.full((3, 2), torch.nan), torch.ones(3, 1), ValueError, "features has NaN or Inf in row 0"),
        (torch.tensor(1.0), torch.ones(3, 1), ValueError, "features must have at least 1 dimension"),
    ],
)
def test_errors_of_alignment(features: Tensor, target: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"cfl_ops.learn.feature_alignment: .*{message}"):
        feature_alignment(features, target)
