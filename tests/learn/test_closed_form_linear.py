"""ClosedFormLinear: the training step, and what a module must survive."""

from __future__ import annotations

import copy
import io

import cfl_ops
import pytest
import torch
from cfl_ops.learn import ClosedFormLinear
from torch import nn


def data(rows=64):
    x = torch.randn(rows, 6)
    return x, (x[:, :3] + 0.1 * torch.randn(rows, 3)).argmax(1)


def test_one_forward_and_one_backward_per_step() -> None:
    calls = {"forward": 0, "backward": 0}
    backbone = nn.Sequential(nn.Linear(6, 16), nn.GELU())
    backbone.register_forward_hook(lambda *_: calls.__setitem__("forward", calls["forward"] + 1))
    backbone.register_full_backward_hook(lambda *_: calls.__setitem__("backward", calls["backward"] + 1))
    head = ClosedFormLinear(16, 3)
    head.step(backbone(data()[0].requires_grad_()), data()[1])
    assert calls == {"forward": 1, "backward": 1}


@pytest.mark.parametrize("method", ["proximal", "ridge"])
def test_trains_a_backbone(method: str) -> None:
    backbone, head = nn.Sequential(nn.Linear(6, 32), nn.GELU()), ClosedFormLinear(32, 3, 0.1, method=method)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(150):
        x, y = data()
        losses.append(float(head.step(backbone(x), y)))
        optimizer.step()
        optimizer.zero_grad()
    x, y = data(2000)
    assert (head(backbone(x)).argmax(1) == y).double().mean() > 0.9
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])


def test_backbone_gradient_equals_autograd_of_the_loss_at_the_new_head() -> None:
    backbone, head = nn.Linear(6, 8).double(), ClosedFormLinear(8, 3, dtype=torch.float64)
    x, y = data()
    loss = head.step(backbone(x.double()), y)
    got = backbone.weight.grad.clone()
    backbone.zero_grad()
    residual = nn.functional.one_hot(y, 3) - head(backbone(x.double()))
    want_loss = residual.square().sum() / len(x)
    want_loss.backward()
    torch.testing.assert_close(loss, want_loss.detach())
    torch.testing.assert_close(got, backbone.weight.grad)


def test_state_dict_is_that_of_nn_linear() -> None:
    head, linear = ClosedFormLinear(5, 2, init="he"), nn.Linear(5, 2)
    linear.load_state_dict(head.state_dict())
    assert torch.equal(linear.weight, head.weight)
    head.load_state_dict(nn.Linear(5, 2).state_dict())


def test_resume_continues_bit_for_bit() -> None:
    def train(head, backbone, optimizer, batches):
        for x, y in batches:
            head.step(backbone(x), y)
            optimizer.step()
            optimizer.zero_grad()

    def fresh():
        torch.manual_seed(1)
        backbone = nn.Linear(6, 8)
        return ClosedFormLinear(8, 3), backbone, torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)

    batches = [data() for _ in range(8)]
    straight = fresh()
    train(*straight, batches)
    first = fresh()
    train(*first, batches[:4])
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in first], buffer)
    buffer.seek(0)
    second = fresh()
    for part, state in zip(second, torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(state)
    train(*second, batches[4:])
    assert torch.equal(second[0].weight, straight[0].weight)
    assert torch.equal(second[1].weight, straight[1].weight)


def test_optimizer_passes_over_the_head() -> None:
    model = nn.Sequential(nn.Linear(6, 8), ClosedFormLinear(8, 3, init="lecun"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5)
    old = model[1].weight.clone()
    model(data()[0]).sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, old)


def test_rows_may_have_more_dimensions() -> None:
    head, flat = ClosedFormLinear(4, 3), ClosedFormLinear(4, 3)
    features, target = torch.randn(5, 7, 4), torch.randint(3, (5, 7))
    loss, grad = head.update(features, target)
    want, want_grad = flat.update(features.reshape(-1, 4), target.reshape(-1))
    assert torch.equal(loss, want)
    assert torch.equal(grad, want_grad.reshape(5, 7, 4))


def test_relative_lambda_does_not_depend_on_the_scale_of_the_features() -> None:
    features, target = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    small = ClosedFormLinear(4, 2, 0.5, relative=True, bias=False, dtype=torch.float64)
    large = ClosedFormLinear(4, 2, 0.5, relative=True, bias=False, dtype=torch.float64)
    small.update(features, target)
    large.update(1000 * features, target)
    torch.testing.assert_close(small.weight, 1000 * large.weight)


def test_under_autocast() -> None:
    backbone, head = nn.Linear(6, 16), ClosedFormLinear(16, 3)
    x, y = data()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = backbone(x)
        loss = head.step(features, y)
    assert features.dtype == torch.bfloat16
    assert head.weight.dtype == torch.float32
    assert loss.isfinite()
    assert backbone.weight.grad is not None


def test_frozen_features_need_no_backward() -> None:
    head = ClosedFormLinear(6, 3)
    x, y = data()
    assert head.step(x, y).isfinite()


def test_dtype_and_device_moves() -> None:
    head = ClosedFormLinear(6, 3).double()
    x, y = data()
    head.step(x.double(), y)
    assert head.weight.dtype == torch.float64
    assert head.to("meta").weight.device.type == "meta"


@pytest.mark.parametrize("init", ["zeros", "lecun", "xavier", "he"])
def test_initialisations_have_their_standard_deviation(init: str) -> None:
    head = ClosedFormLinear(400, 200, init=init)
    want = {"zeros": 0.0, "lecun": 400**-0.5, "xavier": (2 / 600) ** 0.5, "he": (2 / 400) ** 0.5}[init]
    assert float(head.weight.std()) == pytest.approx(want, rel=0.02)
    assert not head.bias.any()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="method must be one of proximal, ridge, ema_ridge, but got 'sgd'"):
        ClosedFormLinear(4, 2, method="sgd")
    with pytest.raises(ValueError, match="init must be one of"):
        ClosedFormLinear(4, 2, init="ones")
    head = ClosedFormLinear(4, 2)
    with pytest.raises(ValueError, match="features must have size 4"):
        head.step(torch.randn(3, 5), torch.zeros(3, dtype=torch.int64))
    old = head.weight.clone()
    with pytest.raises(IndexError, match="but got 2 in row 1"):
        head.step(torch.randn(2, 4), torch.tensor([0, 2]))
    assert torch.equal(head.weight, old)


def test_reset_parameters_and_repr() -> None:
    head = ClosedFormLinear(6, 3, lam=2.0)
    head.step(*data())
    head.reset_parameters()
    assert not head.weight.any()
    assert "lam=2.0" in repr(head)
    assert isinstance(cfl_ops.learn.ClosedFormLinear, type)


@pytest.mark.parametrize(
    ("order", "forwards"), [("head-first", 1), ("backbone-first", 2), ("backbone-first-cached", 1)]
)
def test_orders_of_the_training_step(order: str, forwards: int) -> None:
    backbone, head = nn.Sequential(nn.Linear(6, 16), nn.GELU()), ClosedFormLinear(16, 3, init="lecun")
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.05, momentum=0.9)
    calls = []
    backbone.register_forward_hook(lambda *_: calls.append(1))
    losses = [
        float(cfl_ops.learn.train_step(backbone, head, optimizer, *data(), order=order)) for _ in range(60)
    ]
    assert len(calls) == 60 * forwards
    assert sum(losses[-10:]) < 0.75 * sum(losses[:10])
    with pytest.raises(ValueError, match="order must be one of head-first"):
        cfl_ops.learn.train_step(backbone, head, optimizer, *data(), order="both")


def test_backbone_first_takes_the_gradient_at_the_old_head() -> None:
    backbone, head = (
        nn.Linear(6, 8, dtype=torch.float64),
        ClosedFormLinear(8, 3, init="he", dtype=torch.float64),
    )
    x, y = data()
    old = head.weight.clone()
    loss = (nn.functional.one_hot(y, 3) - backbone(x.double()) @ old.mT).square().sum() / len(x)
    (want,) = torch.autograd.grad(loss, backbone.weight)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1.0)
    before = backbone.weight.detach().clone()
    cfl_ops.learn.train_step(backbone, head, optimizer, x.double(), y, order="backbone-first")
    torch.testing.assert_close(before - backbone.weight.detach(), want)


def test_errors_can_wait_for_the_next_step() -> None:
    """A bad batch changes nothing and raises one step later, once, with the message of that step."""
    backbone, head = nn.Linear(6, 8), ClosedFormLinear(8, 3, check="next")
    x, y = data()
    head.step(backbone(x), y)
    before = head.weight.clone()
    backbone.zero_grad()
    bad = x.clone()
    bad[5, 2] = torch.nan
    head.step(backbone(bad), y)  # says nothing yet
    assert torch.equal(head.weight, before)
    assert backbone.bias.grad is None  # a gradient of zero would be NaN behind NaN activations
    with pytest.raises(ValueError, match="features has NaN or Inf in row 5") as caught:
        head.step(backbone(x), y)
    assert "the step before" in caught.value.__notes__[0]
    assert torch.equal(head.weight, before)
    head.step(backbone(x), y)
    head.check()
    y[3] = 3
    head.update(backbone(x), y)
    with pytest.raises(IndexError, match=r"from 0 to 2 .* but got 3 in row 3"):
        head.check()
    head.check()  # told once


def test_a_copy_leaves_the_outcome_behind() -> None:
    head = ClosedFormLinear(6, 3, check="next")
    x, y = data()
    x[0] = torch.nan
    head.update(x, y)
    buffer = io.BytesIO()
    torch.save(head, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(head), torch.load(buffer, weights_only=False)):
        other.check()
        assert torch.equal(other.weight, head.weight)
    with pytest.raises(ValueError, match="features has NaN"):
        head.check()


@pytest.mark.parametrize("check", ["now", "next"])
def test_update_leaves_the_grad_mode_as_it_was(check: str) -> None:
    head = ClosedFormLinear(6, 3, check=check).requires_grad_()  # a leaf, which no_grad alone may write to
    x, y = data()
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            loss, grad = head.update(x.clone().requires_grad_(), y)
            assert torch.is_grad_enabled() == enabled
            assert not loss.requires_grad
            assert not grad.requires_grad
            with pytest.raises(ValueError, match="features must have size 6"):
                head.update(x[:, :5], y)
            assert torch.is_grad_enabled() == enabled


def test_update_compiles_in_one_graph() -> None:
    head, eager = ClosedFormLinear(6, 3), ClosedFormLinear(6, 3)
    x, y = data()
    compiled = torch.compile(head.update, fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(x, y), eager.update(x, y), strict=True):
        torch.testing.assert_close(got, want)
    torch.testing.assert_close(head.weight, eager.weight)
    assert torch.is_grad_enabled()


def test_check_must_be_known() -> None:
    with pytest.raises(ValueError, match="check must be one of"):
        ClosedFormLinear(6, 3, check="never")


ORDERS = ("head-first", "backbone-first", "backbone-first-cached")
BAD_TARGETS = [
    (torch.full((6,), 7), IndexError, "must hold class indices from 0 to 2.* but got 7"),
    (torch.full((6,), -1), IndexError, "but got -1"),
    (torch.zeros(6, dtype=torch.int32), TypeError, "target must be .*but got torch.int32"),
    (torch.randn(6, 2), ValueError, "target must"),
    (torch.randn(3, 6), ValueError, "target must"),  # of the right number of values
    (torch.randn(6), ValueError, "target must"),
    (torch.full((6, 3), torch.nan), ValueError, "target (has|or the prediction has) NaN or Inf"),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("target", "error", "message"), BAD_TARGETS)
def test_a_bad_target_changes_neither_backbone_nor_head(order: str, target, error, message) -> None:
    """The backbone had made its step on them, with a gradient of NaN or of targets in another order."""
    backbone, closed_form = torch.nn.Linear(4, 8), ClosedFormLinear(8, 3, init="lecun")
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    before = [p.detach().clone() for p in (*backbone.parameters(), *closed_form.parameters())]
    with pytest.raises(error, match=message):
        cfl_ops.learn.train_step(backbone, closed_form, optimizer, torch.randn(6, 4), target, order=order)
    after = [*backbone.parameters(), *closed_form.parameters()]
    assert all(torch.equal(p, q) for p, q in zip(after, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_predictions_past_256_under_autocast(dtype: torch.dtype) -> None:
    """Their squares overflow in float16: the loss, which must be finite, is float32."""
    x, y = torch.randn(64, 4), torch.randint(3, (64,))
    moved = {}
    for name in (dtype, None):
        torch.manual_seed(0)
        backbone, closed_form = torch.nn.Linear(4, 8), ClosedFormLinear(8, 3)
        with torch.no_grad():
            closed_form.weight.normal_()
            closed_form.bias.fill_(400)
        optimizer = torch.optim.SGD(backbone.parameters(), lr=1e-6)
        with torch.autocast("cpu", dtype=name or torch.bfloat16, enabled=name is not None):
            cfl_ops.learn.train_step(backbone, closed_form, optimizer, x, y, order="backbone-first-cached")
        moved[name] = backbone.weight.grad.clone()
    assert moved[dtype].isfinite().all()
    assert (moved[dtype] - moved[None]).norm() < 0.02 * moved[None].norm()


def test_rows_in_another_order_are_refused() -> None:
    """Labels (5, 4) for features (4, 5, D) were flattened, each to another row."""
    x, labels = torch.randn(4, 5, 6), torch.randint(3, (4, 5))
    model = ClosedFormLinear(6, 3, lam=0.1)
    before = model.weight.clone()
    for target, weight in ((labels.T, None), (torch.randn(5, 4, 3), None), (labels, torch.rand(5, 4))):
        with pytest.raises(ValueError, match=r"must lie in the rows of features, \(4, 5\) or flat"):
            model.update(x, target, sample_weight=weight)
    assert torch.equal(model.weight, before)
    loss, _ = model.update(x, labels.reshape(-1), sample_weight=torch.ones(20))
    again = ClosedFormLinear(6, 3, lam=0.1)
    assert torch.equal(again.update(x.reshape(20, 6), labels, sample_weight=torch.ones(4, 5))[0], loss)
