"""A solved head in other people's loops: autograd, mixed precision, compilers, checkpoints, many batches, maps."""

from __future__ import annotations

import copy
import io
import os
import resource
import signal
import time
import warnings

import pytest
import torch
from cfl_ops._core.overlap import beside
from cfl_ops.learn import (
    BatchSizeLam,
    ClosedFormHeads,
    ClosedFormLinear,
    CosineLam,
    RelativeLam,
    closed_form_gain,
    feature_alignment,
    train_step,
)
from cfl_ops.learn.distributed import row_bytes
from sklearn.linear_model import Ridge
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

OPTIONS = [
    {},
    {"bias": False},
    {"method": "ridge"},
    {"method": "ema_ridge", "decay": 0.5},
    {"kappa": 3.0, "target_scale": 2.0},
    {"fit_bias": "free"},
    {"relative": True},
    {"reduction": "sum"},
    {"ignore_index": 2},
    {"lam_diag": torch.rand(16)},
    {"check": "next"},
    {"check": "skip"},
]
NAMES = [",".join(options) or "plain" for options in OPTIONS]


def twins(**options):
    backbone, head = nn.Sequential(nn.Linear(6, 16), nn.GELU()), ClosedFormLinear(16, 3, 0.5, **options)
    return backbone, head, copy.deepcopy(backbone), copy.deepcopy(head)


def data(rows=32):
    return torch.randn(rows, 6), torch.randint(3, (rows,))


def same(one: nn.Module, other: nn.Module, **tolerance) -> None:
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, **tolerance)
        if a.requires_grad:
            torch.testing.assert_close(a.grad, b.grad, **tolerance)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_loss_is_step_for_autograd(options) -> None:
    backbone, head, other, rival = twins(**options)
    for _ in range(3):
        x, y = data()
        loss = head.loss(backbone(x), y)
        loss.backward()
        assert torch.equal(loss.detach(), rival.step(other(x), y))
    same(backbone, other, rtol=0, atol=0)
    same(head, rival, rtol=0, atol=0)


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_the_gradient_is_that_of_the_loss_at_the_new_head(options) -> None:
    options = {**options, "dtype": torch.float64}
    head = ClosedFormLinear(16, 3, 0.5, init="lecun", **options)
    features, y = torch.randn(20, 16, dtype=torch.float64, requires_grad=True), torch.randint(3, (20,))
    loss = head.loss(features, y)
    loss.backward()
    leaf = features.detach().clone().requires_grad_()
    target = head.target_scale * F.one_hot(y, 3)
    square = 1 + (head.kappa - 1) * F.one_hot(y, 3)
    keep = torch.ones(20).double() if head.ignore_index is None else (y != head.ignore_index).double()
    count = keep.sum() if head.reduction == "mean" else 1.0
    want = (keep.unsqueeze(1) * square * (head(leaf) - target).square()).sum() / count
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(features.grad, leaf.grad)
    present = head.loss(features, y, solve=False)  # the same head, the other way to the same loss
    torch.testing.assert_close(present, want)


def test_loss_scales_and_adds() -> None:
    backbone, head, other, rival = twins()
    x, y = data()
    (3 * head.loss(backbone(x), y) + 0.1 * backbone[0].weight.square().sum()).backward()
    (0.1 * other[0].weight.square().sum()).backward()
    features = other(x)
    features.backward(3 * rival.update(features, y)[1])
    same(backbone, other)


def test_eval_mode_does_not_solve() -> None:
    backbone, head, *_ = twins()
    x, y = data()
    head.step(backbone(x), y)
    before = head.weight.clone()
    head.eval()
    loss = head.loss(backbone(x), y)
    want = (head(backbone(x)) - F.one_hot(y, 3)).square().sum(1).mean()
    torch.testing.assert_close(loss, want.detach(), check_stride=False)
    assert loss.requires_grad  # adversarial examples, say
    assert torch.equal(head.weight, before)
    with torch.inference_mode():
        assert not head.loss(backbone(x), y).requires_grad
    head.train()
    with torch.no_grad():
        head.loss(backbone(x), y)
    assert not torch.equal(head.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision_with_a_scaler(dtype: torch.dtype) -> None:
    """At the solution gradients are so small that float16 flushes them: they are scaled before they are rounded."""
    backbone, head, _, rival = twins()
    x, y = torch.randn(4096, 6), torch.zeros(4096, dtype=torch.int64)
    head.lam = rival.lam = 1e-3
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with torch.autocast("cpu", dtype=dtype):
        features = backbone(x)
        features.retain_grad()
        loss = head.loss(features, y)
    assert features.dtype == dtype
    assert loss.dtype == head.weight.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    want = rival.update(features.detach().double(), y)[1]
    assert want.abs().median() < 6e-8  # less than float16 has
    assert (features.grad.double() / 2**16 - want).norm() < 2 * torch.finfo(dtype).eps * want.norm()
    assert backbone[0].weight.grad.any()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_compiles_whole_and_once(options) -> None:
    """Neither another lambda nor a smaller last batch compiles again."""
    torch._dynamo.reset()
    backbone, head, other, rival = twins(**options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, y: head.loss(backbone(x), y), fullgraph=True, dynamic=True, backend=counter
    )
    seen = []
    for i, rows in enumerate((32, 32, 32, 32, 7)):
        head.lam = rival.lam = 0.5 / (i + 1)
        x, y = data(rows)
        loss = compiled(x, y)
        loss.backward()
        torch.testing.assert_close(loss.detach(), rival.step(other(x), y))
        seen.append(counter.frame_count)
    assert seen == [seen[0]] * 5
    same(backbone, other)
    same(head, rival)


@pytest.mark.parametrize("make", [
    lambda: CosineLam(2.0, T_max=10), lambda: BatchSizeLam(2.0, reference=64), lambda: RelativeLam(0.5),
])  # fmt: skip
def test_schedules_compile_once(make) -> None:
    torch._dynamo.reset()
    schedule, eager = make(), make()
    backbone, head, other, rival = twins()
    head.lam, rival.lam = schedule, eager
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x, y: head.loss(backbone(x), y), fullgraph=True, dynamic=True, backend=counter
    )
    seen = []
    for rows in (32, 32, 32, 7):
        x, y = data(rows)
        compiled(x, y).backward()
        rival.step(other(x), y)
        schedule.step()
        eager.step()
        seen.append(counter.frame_count)
    assert seen == [seen[0]] * 4
    same(head, rival)
    same(backbone, other)


@pytest.mark.slow
def test_a_whole_compiled_step_with_the_inductor() -> None:
    """Forward, solve, backward and update in one graph, where Dynamo traces backward passes."""
    torch._dynamo.reset()
    backbone, head, other, rival = twins()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (backbone, other)]

    def step(x, y):
        return head.loss(backbone(x), y)

    compiled = torch.compile(step, fullgraph=True)
    for _ in range(3):
        x, y = data()
        compiled(x, y).backward()
        rival.step(other(x), y)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(backbone.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    same(head, rival)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    backbone, head, other, rival = twins()
    x, y = data()
    head.loss(checkpoint(backbone, x.clone().requires_grad_(), use_reentrant=reentrant), y).backward()
    rival.step(other(x), y)
    same(backbone, other)
    loss = checkpoint(lambda x: head.loss(backbone(x), y), x.requires_grad_(), use_reentrant=reentrant)
    if reentrant:  # the part is run again, to its end
        with pytest.raises(RuntimeError, match="keep the head out of the checkpointed part"):
            loss.backward()
    else:  # it is run again no further than to what the backbone's backward pass needs
        for part in (backbone, other):
            part.zero_grad()
        loss.backward()
        rival.step(other(x), y)
        same(backbone, other)
        same(head, rival)


def test_weight_averages() -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.GELU(), ClosedFormLinear(16, 3))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    want = torch.zeros(3, 16)
    for i in range(4):
        x, y = data()
        model[2].step(model[:2](x), y)
        average.update_parameters(model)
        want = model[2].weight if i == 0 else 0.5 * want + 0.5 * model[2].weight
        want = want.clone()
    torch.testing.assert_close(average.module[2].weight.detach(), want)
    refitted = average.module[2].refit([data() for _ in range(3)], average.module[:2])
    assert not torch.equal(refitted.weight, average.module[2].weight)


# Several batches for one solve


@pytest.mark.parametrize("options", [o for o in OPTIONS if o.get("check") != "next"])
@pytest.mark.parametrize("rows", [8, 400])  # 8 are kept as rows, 400 as moments
def test_accumulated_batches_are_one_large_batch(options, rows: int) -> None:
    options = {"init": "lecun", **options, "dtype": torch.float64}
    head = ClosedFormLinear(16, 3, 0.5, **options)
    large = copy.deepcopy(head)
    features, y = torch.randn(rows, 16, dtype=torch.float64), torch.randint(3, (rows,))
    for part, labels in zip(features.split(rows // 4), y.split(rows // 4), strict=True):
        head.accumulate(part, labels)
    assert (head._moments is not None) == (rows == 400 and not head.rescaled)
    loss, (want, _) = head.solve(), large.update(features, y)
    torch.testing.assert_close(loss, want, check_dtype=False)
    same(head, large)
    before = head.weight.clone()
    assert float(head.solve()) == 0  # nothing is left of them
    assert torch.equal(head.weight, before)


def test_accumulation_is_algorithm_2_on_the_large_batch() -> None:
    backbone, head, other, rival = twins(init="lecun")
    optimizer = torch.optim.SGD(other.parameters(), lr=0.0)
    x, y = data(32)
    for i in range(0, 32, 8):
        features = backbone(x[i : i + 8])
        (head.loss(features, y[i : i + 8], solve=False) / 4).backward()
        head.accumulate(features, y[i : i + 8])
    loss = head.solve()
    want = train_step(other, rival, optimizer, x, y, order="backbone-first-cached")
    torch.testing.assert_close(loss, want)
    same(backbone, other)
    same(head, rival)


def test_batches_of_several_kinds_accumulate() -> None:
    head, large = (ClosedFormLinear(16, 3, 0.5, dtype=torch.float64) for _ in range(2))
    features, y = torch.randn(20, 16, dtype=torch.float64), torch.randint(3, (20,))
    head.accumulate(features[:5], y[:5])
    head.accumulate(features[5:10], F.one_hot(y[5:10], 3).double())
    head.accumulate(features[10:], y[10:], sample_weight=torch.ones(10))
    head.solve()
    large.update(features, y)
    same(head, large)


@pytest.mark.parametrize("overlap", [False, True, "auto"])
def test_the_cached_solve_beside_the_backward_pass_changes_nothing(overlap) -> None:
    backbone, head, other, rival = twins(init="lecun")
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (backbone, other)]
    for _ in range(5):
        x, y = data(300)
        got = train_step(backbone, head, optimizers[0], x, y, order="backbone-first-cached", overlap=overlap)
        features = other(x)
        rival.loss(features, y, solve=False).backward()
        want, _ = rival.update(features, y)
        optimizers[1].step()
        optimizers[1].zero_grad()
        assert torch.equal(got, want)
    assert torch.equal(backbone[0].weight, other[0].weight)
    bad = torch.full((30, 6), torch.nan)
    with pytest.raises(ValueError, match="features has NaN"):
        train_step(
            backbone, head, optimizers[0], bad, data(30)[1], order="backbone-first-cached", overlap=overlap
        )


# Evaluation


@pytest.mark.parametrize("classes", [True, False])
@pytest.mark.parametrize("fit_bias", ["penalized", "free"])
def test_refit_is_ridge_on_all_rows(classes: bool, fit_bias: str) -> None:
    backbone = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5))
    head = ClosedFormLinear(16, 3, 0.5, fit_bias=fit_bias)
    x, y = torch.randn(300, 6), torch.randint(3, (300,)) if classes else torch.randn(300, 3)
    weight = torch.rand(300)
    parts = [slice(i, i + 70) for i in range(0, 300, 70)]
    new = head.refit([(x[i], y[i], weight[i]) for i in parts], backbone, lam=0.01, relative=False)
    assert backbone[1].training
    assert not head.weight.any()
    features = backbone.eval()(x).detach().double()
    target = F.one_hot(y, 3).double() if classes else y.double()
    model = Ridge(alpha=0.01 * float(weight.sum()), fit_intercept=fit_bias == "free")
    if fit_bias == "penalized":
        features = torch.cat([features, torch.ones(300, 1)], 1)
    model.fit(features.numpy(), target.numpy(), sample_weight=weight.numpy())
    want = torch.from_numpy(model.coef_)
    bias = torch.from_numpy(model.intercept_) if fit_bias == "free" else want[:, 16]
    torch.testing.assert_close(new.weight.double(), want[:, :16], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(new.bias.double(), bias, rtol=1e-4, atol=1e-6)


def test_refit_says_what_is_wrong() -> None:
    head = ClosedFormLinear(16, 3)
    with pytest.raises(ValueError, match="loader must yield batches, but there was none"):
        head.refit([])
    with pytest.raises(TypeError, match=r"loader must yield \(features, target\).*but got Tensor"):
        head.refit([torch.randn(3, 16)])
    with pytest.raises(ValueError, match="features must have size 16"):
        head.refit([(torch.randn(3, 15), torch.zeros(3, 3))])
    with pytest.raises(ValueError, match="a system for each class"):
        ClosedFormLinear(16, 3, kappa=2.0).refit([(torch.randn(3, 16), torch.zeros(3, dtype=torch.int64))])


# Maps, several heads


def test_maps_are_their_points() -> None:
    head, flat = ClosedFormLinear(16, 3, feature_dim=1), ClosedFormLinear(16, 3)
    features = torch.randn(2, 16, 5, 7, requires_grad=True)
    y = torch.randint(3, (2, 5, 7))
    loss = head.loss(features, y)
    loss.backward()
    points = features.detach().movedim(1, -1).reshape(-1, 16)
    want, grad = flat.update(points, y.reshape(-1))
    assert torch.equal(loss.detach(), want)
    assert torch.equal(features.grad.movedim(1, -1).reshape(-1, 16), grad)
    assert head(features).shape == (2, 3, 5, 7)
    torch.testing.assert_close(head(features).movedim(1, -1).reshape(-1, 3), flat(points))
    dense = F.one_hot(y, 3).float().movedim(-1, 1)
    again, grad = ClosedFormLinear(16, 3, feature_dim=1).update(features, dense)
    assert torch.equal(again, want)
    assert grad.shape == features.shape
    with pytest.raises(ValueError, match=r"target must lie in the rows of features, \(2, 5, 7\) or flat"):
        head.update(features, y.movedim(1, 2))


def test_ignored_rows_take_no_part() -> None:
    head, other = ClosedFormLinear(16, 3, ignore_index=-100), ClosedFormLinear(16, 3)
    features, y = torch.randn(30, 16), torch.randint(3, (30,))
    y[::3] = -100
    loss, grad = head.update(features, y)
    want, rest = other.update(features[y >= 0], y[y >= 0])
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(grad[y >= 0], rest)
    assert not grad[::3].any()
    same(head, other)
    with pytest.raises(IndexError, match="but got 7"):
        head.update(features, torch.full((30,), 7))


def test_several_heads_share_a_backbone() -> None:
    backbone = nn.Linear(6, 16)
    heads = ClosedFormHeads(
        {"class": ClosedFormLinear(16, 3), "size": ClosedFormLinear(16, 2, 0.1)}, {"size": 0.5}
    )
    single = copy.deepcopy(heads)
    x, y, z = torch.randn(30, 6), torch.randint(3, (30,)), torch.randn(30, 2)
    features = backbone(x)
    loss = heads.loss(features, {"class": y, "size": z})
    loss.backward()
    leaf = features.detach().requires_grad_()
    one, other = single["class"].step(leaf, y), single["size"].update(leaf, z)
    torch.testing.assert_close(loss.detach(), one + 0.5 * other[0])
    grad = leaf.grad + 0.5 * other[1]
    torch.testing.assert_close(backbone.weight.grad, grad.mT @ x)
    same(heads, single)
    assert {name: tuple(out.shape) for name, out in heads(x @ torch.randn(6, 16)).items()} == {
        "class": (30, 3),
        "size": (30, 2),
    }
    heads.load_state_dict(single.state_dict())
    with pytest.raises(
        ValueError, match=r"target must name the heads \['class', 'size'\], but got \['class'\]"
    ):
        heads.loss(features, {"class": y})
    with pytest.raises(ValueError, match="weights names"):
        ClosedFormHeads({"a": ClosedFormLinear(2, 2)}, {"b": 1.0})
    with pytest.raises(TypeError, match="must be a head, but got Linear"):
        ClosedFormHeads({"a": nn.Linear(2, 2)})


# Long runs, bad data


def test_ten_thousand_steps_keep_no_memory() -> None:
    backbone, head, *_ = twins(check="next")
    optimizer = torch.optim.SGD(backbone.parameters(), lr=1e-3)
    x, y = data(8)

    def steps(count: int) -> int:
        for i in range(count):
            head.lam = 1.0 + 1e-6 * i
            head.loss(backbone(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = steps(2000)
    assert steps(8000) - before < 2000  # KiB


def test_a_bad_batch_can_be_skipped() -> None:
    """Its zero gradient would be NaN among the NaN activations of the backbone."""
    backbone, head, *_ = twins(check="skip")
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    x, y = data()
    head.step(backbone(x), y)
    optimizer.zero_grad()
    before = copy.deepcopy([backbone.state_dict(), head.state_dict()])
    bad = x.clone()
    bad[3, 1] = torch.nan
    for call in ("loss", "step"):
        loss = getattr(head, call)(backbone(bad), y)
        if call == "loss":
            loss.backward()
        assert loss.isnan()
        optimizer.step()
    assert int(head.skipped) == 2
    for part, state in zip((backbone, head), before, strict=True):
        for name, value in part.state_dict().items():
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("options", [{"kappa": 2.0}, {"method": "ema_ridge"}])
def test_skipping_where_the_step_is_not_in_place(options) -> None:
    head = ClosedFormLinear(16, 3, check="skip", **options)
    assert head.update(torch.full((4, 16), torch.nan), torch.zeros(4, dtype=torch.int64))[0].isnan()
    assert int(head.skipped) == 1
    assert not head.weight.any()


def test_options_that_do_not_go_together() -> None:
    for options, message in [
        ({"kappa": 2.0, "lam_diag": torch.ones(4)}, "kappa and target_scale take no lam_diag"),
        ({"kappa": 2.0, "fit_bias": "free"}, "take no free bias"),
        ({"kappa": 2.0, "check": "next"}, 'check="next" is for the squared loss'),
        ({"method": "ridge", "lam_diag": torch.ones(4)}, 'lam_diag is for method="proximal"'),
        ({"lam_diag": torch.ones(5)}, "lam_diag must have size 4"),
        ({"decay": 1.0}, "decay must be below 1"),
        ({"process_group": "all"}, "process_group must be one of auto"),
        ({"lam": -1.0}, "lam must be finite and not negative, but got -1"),
    ]:
        with pytest.raises(ValueError, match=message):
            ClosedFormLinear(4, 2, **options)
    with pytest.raises(ValueError, match="take no sample_weight"):
        ClosedFormLinear(4, 2, kappa=2.0).update(
            torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), sample_weight=torch.ones(3)
        )


def test_a_schedule_resumes_with_the_head() -> None:
    def fresh():
        torch.manual_seed(0)
        schedule = CosineLam(3.0, T_max=8, lam_min=0.1)
        return nn.Linear(6, 16), ClosedFormLinear(16, 3, schedule), schedule

    def run(parts, batches) -> None:
        backbone, head, schedule = parts
        for x, y in batches:
            head.step(backbone(x), y)
            schedule.step()

    batches = [data() for _ in range(6)]
    straight, first, second = fresh(), fresh(), fresh()
    run(straight, batches)
    run(first, batches[:3])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first], file)
    file.seek(0)
    for part, state in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    run(second, batches[3:])
    assert torch.equal(second[1].weight, straight[1].weight)
    assert second[2].get_last_lam() == straight[2].get_last_lam()


def test_a_single_target_may_be_flat() -> None:
    head, other = ClosedFormLinear(16, 1), ClosedFormLinear(16, 1)
    features, y = torch.randn(30, 16), torch.randn(30)
    loss, grad = head.update(features, y)
    want, rest = other.update(features, y.unsqueeze(1))
    assert torch.equal(loss, want)
    assert torch.equal(grad, rest)
    for target, message in [
        (
            F.one_hot(torch.randint(3, (30,)), 3),
            r"shape \(30,\) \(class indices; one-hot targets must be floating point\)",
        ),
        (torch.randn(30), r"shape \(30, 3\) \(or be int64 class indices\), but got \(30,\)"),
        (torch.randn(30, 2), r"but got \(30, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            ClosedFormLinear(16, 3).update(features, target)


def test_losses_at_the_present_head_are_not_in_half_precision() -> None:
    backbone, head, *_ = twins(method="ema_ridge")
    x, y = data()
    features = 1e3 * backbone(x)
    plain = [head.loss(features, y), head.loss(features, y, solve=False)]
    head.reset_parameters()
    with torch.autocast("cpu", dtype=torch.float16):
        mixed = [head.loss(features, y), head.loss(features, y, solve=False)]
    assert plain == mixed


def test_accumulated_rows_are_copies() -> None:
    head, large = ClosedFormLinear(16, 3), ClosedFormLinear(16, 3)
    features, y = torch.randn(12, 16), torch.randint(3, (12,))
    buffer, labels = torch.empty(4, 16), torch.empty(4, dtype=torch.int64)
    for i in range(0, 12, 4):
        buffer.copy_(features[i : i + 4])
        labels.copy_(y[i : i + 4])
        head.accumulate(buffer, labels)
    head.solve()
    large.update(features, y)
    same(head, large)


def test_batch_size_is_the_sum_of_the_weights_both_ways() -> None:
    heads = [
        ClosedFormLinear(16, 3, BatchSizeLam(0.5, reference=64), ignore_index=9, dtype=torch.float64)
        for _ in range(2)
    ]
    features, y = torch.randn(300, 16, dtype=torch.float64), torch.randint(3, (300,))
    y[:200] = 9
    heads[0].accumulate(features, y)
    assert heads[0]._moments is not None
    heads[0].solve()
    heads[1].update(features, y)
    same(*heads)
    assert heads[1].lam.get_last_lam() == pytest.approx(0.32)


def test_a_failed_solve_keeps_what_was_accumulated() -> None:
    head = ClosedFormLinear(16, 3, 0.0, bias=False)
    features, y = torch.zeros(4, 16), torch.randint(3, (4,))
    head.accumulate(features, y)
    with pytest.raises(torch.linalg.LinAlgError):
        head.solve()
    head.lam = 1.0
    assert head.solve() > 0


def test_moments_say_where_they_lose_digits() -> None:
    head = ClosedFormLinear(4, 1, fit_bias="free", dtype=torch.float64)
    features, y = torch.randn(200, 4, dtype=torch.float64), torch.randn(200)
    features[:, 3] = 1.0  # constant: nothing is lost
    head.accumulate(features + 100, y.double())
    head.solve()
    head.accumulate(features + 1e6, y.double())
    with pytest.warns(UserWarning, match="lose digits in the moments"):
        head.solve()


def test_a_bad_batch_does_not_enter_what_is_accumulated() -> None:
    for rows in (4, 60):  # kept as rows, and as moments
        heads = [ClosedFormLinear(16, 3), ClosedFormLinear(16, 3, check="skip"), ClosedFormLinear(16, 3)]
        for _ in range(4):
            features, y = torch.randn(rows, 16), torch.randint(3, (rows,))
            heads[2].accumulate(features, y)
            for head in heads[:2]:
                head.accumulate(features, y)
            bad, labels = features.clone(), y.clone()
            bad[1, 2] = torch.nan
            labels[2] = 3
            with pytest.raises(ValueError, match="features has NaN or Inf in row 1"):
                heads[0].accumulate(bad, y)
            with pytest.raises(IndexError, match="but got 3 in row 2"):
                heads[0].accumulate(features, labels)
            heads[1].accumulate(bad, y)
        for head in heads:
            head.solve()
        assert int(heads[1].skipped) == 4
        same(heads[0], heads[2], rtol=0, atol=0)
        same(heads[1], heads[2], rtol=0, atol=0)


def test_what_is_accumulated_can_be_discarded() -> None:
    head = ClosedFormLinear(16, 3)
    head.accumulate(torch.randn(60, 16), torch.randint(3, (60,)))
    head.discard()
    assert float(head.solve()) == 0
    assert not head.weight.any()


def test_options_are_checked_when_they_are_set() -> None:
    head = ClosedFormLinear(4, 2)
    with pytest.raises(ValueError, match="method must be one of"):
        head.method = "Proximal"
    with pytest.raises(AttributeError, match="head.check_when"):
        head.check = "skip"
    with pytest.raises(TypeError, match="lam must not require grad"):
        head.lam = nn.Parameter(torch.ones(()))
    head.lam = torch.tensor(2.0)
    assert list(head.state_dict()) == ["weight", "bias"]
    head.check_when = "skip"
    assert head.update(torch.full((1, 4), torch.nan), torch.tensor([0]))[0].isnan()
    head.kappa = 2.0
    with pytest.raises(ValueError, match="take no free bias"):
        head.fit_bias = "free"


def test_the_diagonal_penalty_is_state() -> None:
    diagonal = torch.rand(4)
    head, linear = ClosedFormLinear(4, 2, lam_diag=diagonal), nn.Linear(4, 2)
    other = ClosedFormLinear(4, 2, lam_diag=torch.zeros(4))
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.lam_diag, diagonal)
    other.load_state_dict(linear.state_dict())
    assert torch.equal(other.weight, linear.weight)
    assert torch.equal(other.lam_diag, diagonal)
    assert head.double().lam_diag.dtype == torch.float64


@pytest.mark.parametrize("solve", [True, False])
def test_a_second_derivative_is_refused(solve: bool) -> None:
    """A gradient penalty would lose the part through the gradient itself, in silence."""
    backbone, head, *_ = twins()
    x, y = data()
    loss = head.loss(backbone(x), y, solve=solve)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(loss, backbone[0].weight, create_graph=True)


def test_a_frozen_backbone_needs_no_other_loop() -> None:
    backbone, head, *_ = twins()
    backbone.requires_grad_(False)
    x, y = data()
    loss = head.loss(backbone(x), y)
    loss.backward()
    assert backbone[0].weight.grad is None
    assert head.weight.any()


def test_dead_features_give_the_mean_and_no_gradient() -> None:
    """A critical point (Theorem 5.1): the head is zero, and so is the gradient, whatever lambda is relative to."""
    for options in ({"relative": True}, {"lam": 1.0}, {"relative": True, "method": "ridge"}):
        head = ClosedFormLinear(16, 3, fit_bias="free", **options)
        features, y = torch.zeros(30, 16, requires_grad=True), torch.randint(3, (30,))
        head.step(features, y)
        assert not head.weight.any()
        assert not features.grad.any()
        torch.testing.assert_close(head.bias.detach(), F.one_hot(y, 3).float().mean(0))
    new = ClosedFormLinear(16, 3, fit_bias="free").refit([(features, y)])
    torch.testing.assert_close(new.bias.detach(), F.one_hot(y, 3).float().mean(0))
    assert not new.weight.any()


def test_features_orthogonal_to_the_targets_are_a_critical_point() -> None:
    """Theorem 5.1: the solved weight is zero, so the backbone gets no gradient, though better features exist."""
    features = torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], requires_grad=True)
    target = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])
    loss = ClosedFormLinear(1, 1).step(features, target)
    assert float(loss) == 1
    assert not features.grad.any()
    assert float(feature_alignment(features, target)) == 0
    assert closed_form_gain(features, target, torch.zeros(1, 1)).gain.isnan()


def test_half_precision_rows_are_not_widened_for_the_journey() -> None:
    batch = ClosedFormLinear(16, 3)._rows(torch.randn(4, 16).bfloat16(), torch.randint(3, (4,)), None, False)
    assert row_bytes(batch._replace(wide=True)) == 16 * 2 + 4
    assert batch._replace(wide=True).widened().features.dtype == torch.float32


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_overlaps_too() -> None:
    assert beside(lambda: 1, torch.device("cpu"))() == 1
    child = os.fork()
    if child == 0:
        os._exit(0 if beside(lambda: 2, torch.device("cpu"))() == 2 else 1)
    deadline = time.monotonic() + 30
    while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(done[1]) == 0


def test_a_loop_that_trains_nothing_is_told() -> None:
    backbone, head, *_ = twins()
    x, y = data()
    head.eval()
    with pytest.warns(UserWarning, match="a loss in eval mode does not solve the head"):
        head.loss(backbone(x), y)
    backbone, head, *_ = twins()
    with pytest.warns(UserWarning, match="trains nothing; use head.loss"):
        F.cross_entropy(head(backbone(x)), y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head(backbone(x))  # told once
        for kind in ("lecun", "solved"):
            backbone, head, *_ = twins(init="lecun" if kind == "lecun" else "zeros")
            if kind == "solved":
                head.loss(backbone(x), y)
            head(backbone(x))
            head.eval().loss(backbone(x), y)


@pytest.mark.parametrize("check", ["next", "skip"])
def test_a_bad_batch_does_not_reach_the_backbone(check: str) -> None:
    backbone, head, *_ = twins(check=check)
    optimizer = torch.optim.Adam(backbone.parameters(), lr=0.1)
    x, y = data()
    head.loss(backbone(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    before = [p.detach().clone() for p in backbone.parameters()]
    bad = x.clone()
    bad[0, 0] = torch.inf
    head.loss(backbone(bad), y).backward()
    optimizer.step()
    for p, old in zip(backbone.parameters(), before, strict=True):
        assert torch.equal(p, old)
    if check == "next":
        with pytest.raises(ValueError, match="features has NaN or Inf in row 0"):
            head.check()


def test_a_skipped_batch_under_a_scaler() -> None:
    """GradScaler must see gradients, and leaves a step out itself where they are NaN."""
    backbone, head, *_ = twins(check="skip")
    optimizer, scaler = torch.optim.SGD(backbone.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    x, y = data()
    before = [p.detach().clone() for p in backbone.parameters()]
    x[0, 0] = torch.nan
    with torch.autocast("cpu", dtype=torch.float16):
        loss = head.loss(backbone(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert int(head.skipped) == 1
    assert all(torch.equal(p, old) for p, old in zip(backbone.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_features_that_a_solve_takes_are_predicted_for(dtype: torch.dtype) -> None:
    head = ClosedFormLinear(16, 3, feature_dim=1)
    features, y = torch.randn(4, 16, 5).to(dtype), torch.randint(3, (4, 5))
    head.update(features, y)
    out = head(features)
    assert out.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(out.float(), head(features.float()), rtol=1e-2, atol=1e-2)


def test_two_scalings_of_lambda_are_refused() -> None:
    for make in (lambda: RelativeLam(1.0), lambda: BatchSizeLam(RelativeLam(1.0), reference=8)):
        with pytest.raises(ValueError, match="use one of them"):
            ClosedFormLinear(4, 2, make(), relative=True)
        head = ClosedFormLinear(4, 2, relative=True)
        with pytest.raises(ValueError, match="use one of them"):
            head.lam = make()


def test_targets_of_other_integers_are_named() -> None:
    for shape in ((4,), (4, 5)):
        with pytest.raises(
            TypeError, match="must be floating point, or int64 class indices, but got torch.uint8"
        ):
            ClosedFormLinear(16, 3).update(torch.randn(*shape, 16), torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(IndexError) as caught:
        ClosedFormLinear(16, 1).update(torch.randn(4, 16), torch.full((4,), 52))
    assert "those of a regression must be floating point" in caught.value.__notes__[0]
