"""What holds state survives what modules go through: inference mode, moves, copies, files, loads that do not fit."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import cfl_ops
import pytest
import torch
from cfl_ops.learn import ClosedFormLinear
from torch import Tensor, nn
from torch.utils import _pytree as pytree

X, Y = torch.randn(5, 3), torch.randn(5, 2)


def recursive_ridge() -> cfl_ops.RecursiveRidge:
    model = cfl_ops.RecursiveRidge(3, 2, window=7)
    model.update(X, Y)
    return model


def head() -> ClosedFormLinear:
    model = ClosedFormLinear(3, 2, 0.5)
    model.update(X, Y)
    return model


def accumulator(**options: Any) -> cfl_ops.GramAccumulator:
    out = cfl_ops.GramAccumulator(bias_column=True, **options)
    out.update(X, Y)
    return out


def state(thing: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(thing.state_dict()) if isinstance(leaf, Tensor)]


def same(a: Any, b: Any) -> bool:
    return all(p.dtype == q.dtype and torch.equal(p, q) for p, q in zip(state(a), state(b), strict=True))


def through_file(value: Any, **options: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


MAKERS = [recursive_ridge, head, accumulator]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("inside", ["make", "update", "copy", "load", "assign"])
def test_inference_mode(make: Callable[[], Any], inside: str) -> None:
    want = make()
    if inside == "update":
        got = make()
        with torch.inference_mode():
            got.update(X.clone(), Y.clone())
        want.update(X, Y)
    else:
        with torch.inference_mode():
            if inside == "make":
                got = make()
            elif inside == "copy":
                got = copy.deepcopy(want)
            else:
                got = make()
                assign = {"assign": True} if inside == "assign" and isinstance(got, nn.Module) else {}
                got.load_state_dict({**copy.deepcopy(want.state_dict())}, **assign)
    for _ in range(2):
        got.update(X, Y)
        want.update(X, Y)
    assert same(got, want)
    assert not any(value.is_inference() for value in state(got))


@pytest.mark.parametrize("shape", [(4, 2), (2, 4), (3, 3), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_factorization_outlives_files_and_inference_mode(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    a = torch.ones(shape, dtype=dtype) if shape == (3, 3) else torch.randn(shape, dtype=dtype)
    want = cfl_ops.factorize(a)
    with torch.inference_mode():
        made_there = cfl_ops.factorize(a.clone())
        _ = made_there.singular_values
    b = torch.randn(shape[0], 2, dtype=dtype, requires_grad=True)
    for got in (
        made_there,
        through_file(want, weights_only=True),
        pickle.loads(pickle.dumps(want)),
        copy.deepcopy(want),
    ):
        solution = got.solve(b)
        assert torch.equal(solution, want.solve(b))
        assert torch.equal(got.singular_values, want.singular_values)
        assert solution.requires_grad == (0 not in shape)
        if solution.requires_grad:
            solution.sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        lambda parent: parent.to(torch.bfloat16),
        nn.Module.half,
        nn.Module.double,
        nn.Module.float,
        lambda parent: parent.to("cpu", torch.float16),
        nn.Module.share_memory,
    ],
)
def test_a_recursive_ridge_keeps_its_precision(change: Callable[[nn.Module], nn.Module]) -> None:
    model = recursive_ridge()
    want = copy.deepcopy(model)
    parent = change(nn.Sequential(nn.Linear(3, 3), model))
    assert torch.equal(model.predict(X), want.predict(X))
    model.update(X, Y)
    want.update(X, Y)
    assert same(model, want)
    features = parent[0].weight.new_ones(2, 3)
    assert parent(features).dtype == features.dtype


def test_a_recursive_ridge_goes_to_meta_and_back() -> None:
    parent = nn.Sequential(recursive_ridge())
    want = copy.deepcopy(parent[0])
    parent.to("meta")
    assert all(value.is_meta for value in parent.buffers())
    parent.to_empty(device="cpu")
    parent[0].load_state_dict(want.state_dict())
    assert same(parent[0], want)
    assert all(value.is_meta for value in cfl_ops.RecursiveRidge(3, device="meta").buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_head_follows_its_parent(dtype: torch.dtype) -> None:
    parent = nn.Sequential(nn.Linear(3, 3), head()).to(dtype)
    loss = parent[1].step(parent[0](X.to(dtype)), Y.to(dtype))
    assert parent[1].weight.dtype == dtype
    assert loss.isfinite()


@pytest.mark.parametrize("make", MAKERS)
def test_copies_and_files(make: Callable[[], Any]) -> None:
    thing = make()
    for got in (
        copy.deepcopy(thing),
        pickle.loads(pickle.dumps(thing)),
        through_file(thing, weights_only=False),
    ):
        assert same(got, thing)
    got = make()
    got.update(X, Y)
    got.load_state_dict(through_file(thing.state_dict(), weights_only=True))
    assert same(got, thing)
    got.update(X, Y)
    assert not same(got, thing), "they share memory"


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_another_dtype_is_converted(assign: bool) -> None:
    other = {k: v.float() if v.is_floating_point() else v for k, v in recursive_ridge().state_dict().items()}
    model = recursive_ridge()
    model.load_state_dict(other, assign=assign)
    assert model.factor.dtype == model.wide_weight.dtype == torch.float64
    torch.testing.assert_close(model.factor, other["factor"].double())
    model.update(X, Y)


BAD_FOR_MODULES = {
    "a shape": lambda s: s.update({list(s)[-1 if len(s) == 2 else 2]: torch.zeros(4, 4)}),
    "integers": lambda s: s.update({next(iter(s)): next(iter(s.values())).long()}),
    "missing": lambda s: s.pop(list(s)[1]),
    "unexpected": lambda s: s.update(other=torch.zeros(2)),
    "no tensor": lambda s: s.update({next(iter(s)): 3}),
}


@pytest.mark.parametrize("make", [recursive_ridge, head])
@pytest.mark.parametrize("change", BAD_FOR_MODULES.values(), ids=BAD_FOR_MODULES)
@pytest.mark.parametrize("assign", [False, True])
def test_a_module_loads_whole_or_not_at_all(make: Any, change: Callable[..., Any], assign: bool) -> None:
    model = make()
    given = copy.deepcopy(model.state_dict())
    change(given)
    model.update(2 * X, Y)
    before, tensors = copy.deepcopy(model), state(model)
    with pytest.raises(RuntimeError, match="Error"):
        model.load_state_dict(given, assign=assign)
    assert same(model, before)
    assert all(a is b or a.data_ptr() == b.data_ptr() for a, b in zip(state(model), tensors, strict=True))


BAD_FOR_SUMS = [
    (
        0,
        Tensor.half,
        TypeError,
        r"recent\[0\] \(gram\) must be torch.float32 or torch.float64, but got torch.float16",
    ),
    (1, Tensor.half, TypeError, r"recent\[1\] \(cross\) must be torch.float32, but got torch.float16"),
    (4, Tensor.long, TypeError, r"recent\[4\] \(count\) must be torch.float64, but got torch.int64"),
    (4, Tensor.float, TypeError, r"recent\[4\] \(count\) must be torch.float64, but got torch.float32"),
    (0, lambda v: v[:3, :3], ValueError, r"recent\[1\] \(cross\) must have shape \(3, 2\), but got \(4, 2\)"),
    (1, lambda v: v[:2], ValueError, r"recent\[1\] \(cross\) must have shape"),
    (2, lambda v: v[:1], ValueError, r"recent\[2\] \(target_sum\) must have shape"),
    (3, lambda v: None, TypeError, r"recent\[3\] \(target_sq\) must be a tensor, but got NoneType"),
    (4, lambda v: 5.0, TypeError, r"recent\[4\] \(count\) must be a tensor, but got float"),
    (0, lambda v: v.to("meta"), ValueError, r"recent\[1\] \(cross\) must be on the device of"),
]


@pytest.mark.parametrize(("position", "change", "error", "message"), BAD_FOR_SUMS)
def test_sums_that_do_not_fit(position: int, change: Any, error: type[Exception], message: str) -> None:
    given = copy.deepcopy(accumulator().state_dict())
    given["recent"][position] = change(given["recent"][position])
    for target in (accumulator(), cfl_ops.GramAccumulator(bias_column=True)):
        before = copy.deepcopy(target.state_dict())
        with pytest.raises(error, match=f"cfl_ops.GramAccumulator.load_state_dict: {message}"):
            target.load_state_dict(given)
        after = target.state_dict()
        assert before["batches"] == after["batches"]
        torch.testing.assert_close(after["recent"], before["recent"], rtol=0, atol=0)


def test_states_of_other_sizes_and_kinds() -> None:
    mine = accumulator()
    other = cfl_ops.GramAccumulator(bias_column=True)
    other.update(torch.randn(3, 5))
    with pytest.raises(ValueError, match="recent must have the shapes"):
        mine.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="the state must be a dict of options, batches"):
        mine.load_state_dict({"recent": None})
    with pytest.raises(TypeError, match="batches must be an integer, but got str"):
        mine.load_state_dict({**mine.state_dict(), "batches": "1"})
    with pytest.raises(ValueError, match="total and carry"):
        mine.load_state_dict({**mine.state_dict(), "total": mine.state_dict()["recent"]})


def test_the_sums_take_no_part_in_autograd() -> None:
    out = cfl_ops.GramAccumulator()
    for _ in range(2):
        out.update(X.clone().requires_grad_())
    assert not out.moments.gram.requires_grad


def test_a_computed_weight_is_refused() -> None:
    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    model = head()
    nn.utils.parametrize.register_parametrization(model, "weight", Twice())
    assert model(X).shape == (5, 2)
    with pytest.raises(RuntimeError, match="weight must be a parameter of the head"):
        model.update(X, Y)


def test_functional_call_and_a_compiled_parent() -> None:
    model = head()
    out = torch.func.functional_call(model, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, (X,))
    torch.testing.assert_close(out, X.sum(1, keepdim=True).expand(5, 2))
    for last in (model, recursive_ridge()):
        parent = nn.Sequential(nn.Linear(3, 3), last)
        compiled = torch.compile(parent, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(X), parent(X))


def test_moments_decay_by_batch_element() -> None:
    x, y = torch.randn(3, 5, 3), torch.randn(3, 5, 2)
    moments, rho = cfl_ops.gram(x, y), torch.tensor([0.5, 1.0, 0.25], dtype=torch.float64)
    for i, got in enumerate(zip(*moments.decay(rho), strict=True)):
        want = cfl_ops.gram(x[i], y[i]).decay(float(rho[i]))
        torch.testing.assert_close(list(got), list(want))
    with pytest.raises(ValueError, match=r"rho must be 0-d or have the batch shape \(3,\)"):
        moments.decay(torch.ones(2))
