"""What a batched update in place has changed when it raises: nothing, or what its docstring says."""

from __future__ import annotations

from typing import Any

import cfl_ops
import pytest
import torch
from torch import Tensor

OPS = ("gram_", "proximal_step_", "cholesky_update_")


def moments_and_bad_rows(kind: str) -> tuple[cfl_ops.GramMoments, dict[str, Any]]:
    """Moments of three data sets, and new rows of which those of the second are bad."""
    x, labels = torch.randn(3, 8, 4), torch.randint(3, (3, 8))
    if kind == "class":
        new = torch.randint(3, (3, 8))
        new[1, 5] = 7
        return cfl_ops.gram(x, labels, num_classes=3), {"x": torch.randn(3, 8, 4), "y": new}
    if kind == "weight":
        weight = torch.ones(3, 8)
        weight[1, 2] = -1
        return cfl_ops.gram(x), {"x": torch.randn(3, 8, 4), "sample_weight": weight}
    bad = torch.randn(3, 8, 4)
    bad[1, 0, 0] = torch.nan
    return cfl_ops.gram(x, acc_dtype=torch.float64), {"x": bad}


@pytest.mark.parametrize("kind", ["class", "weight", "NaN"])
def test_gram_adds_all_of_a_batch_or_none(backend: str, kind: str) -> None:
    moments, rows = moments_and_bad_rows(kind)
    before = [None if field is None else field.clone() for field in moments]
    with pytest.raises((IndexError, ValueError), match=r"cfl_ops\.gram: \(Batch element 1\)") as caught:
        cfl_ops.gram_(moments, **rows)
    for field, copy in zip(moments, before, strict=True):
        assert field is copy or torch.equal(field, copy)
    assert [i for i, code in enumerate(caught.value.info.tolist()) if code] == [1]


@pytest.mark.parametrize("kind", ["class", "weight", "NaN"])
def test_an_accumulator_is_as_it_was(backend: str, kind: str) -> None:
    _, rows = moments_and_bad_rows(kind)
    options = {"num_classes": 3} if kind == "class" else {"acc_dtype": torch.float64}
    accumulator = cfl_ops.GramAccumulator(**options)
    good = {name: value[:1].expand(3, *value.shape[1:]) for name, value in rows.items()}
    accumulator.update(**good)
    before = [field.clone() for field in accumulator.moments if field is not None]
    with pytest.raises((IndexError, ValueError)):
        accumulator.update(**rows)
    assert (accumulator.batches, accumulator.rows) == (1, 8)
    for field, copy in zip([f for f in accumulator.moments if f is not None], before, strict=True):
        assert torch.equal(field, copy)


@pytest.mark.parametrize("with_bias", [False, True])
def test_proximal_step_changes_all_heads_of_a_batch_or_none(backend: str, with_bias: bool) -> None:
    features, target, weight = torch.randn(3, 8, 5), torch.randn(3, 8, 2), torch.randn(3, 2, 5)
    bias = torch.randn(3, 2) if with_bias else None
    copies = weight.clone(), None if bias is None else bias.clone()
    features[2, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="Batch element 2") as caught:
        cfl_ops.proximal_step_(features, target, weight, bias, lam=1.0)
    assert torch.equal(weight, copies[0])
    assert bias is None or (copies[1] is not None and torch.equal(bias, copies[1]))
    assert [i for i, code in enumerate(caught.value.info.tolist()) if code] == [2]

    features[2, 0, 0] = 0.0
    want = cfl_ops.proximal_step(features, target, weight, bias, lam=1.0)
    loss, grad = cfl_ops.proximal_step_(features, target, weight, bias, lam=1.0)
    for got, expected in (
        (weight, want.weight),
        (bias, want.bias),
        (loss, want.loss),
        (grad, want.grad_features),
    ):
        assert (got is None and expected is None) or torch.equal(got, expected)


def test_a_batch_of_heads_is_refused_as_one_head_is(backend: str) -> None:
    features, target = torch.randn(3, 8, 5), torch.randn(3, 8, 2)
    expanded = torch.zeros(2, 5).expand(3, 2, 5)
    with pytest.raises(RuntimeError, match="weight.*must not share memory"):
        cfl_ops.proximal_step_(features, target, expanded, lam=1.0)
    leaf = torch.zeros(3, 2, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="weight requires grad"):
        cfl_ops.proximal_step_(features, target, leaf, lam=1.0)
    with torch.no_grad():
        cfl_ops.proximal_step_(features, target, leaf, lam=1.0)
    assert leaf._version == 1
    assert bool(leaf.any())


def test_a_downdate_says_which_factors_it_changed(backend: str) -> None:
    L = 2 * torch.eye(3).repeat(3, 1, 1)
    V = torch.full((3, 3, 1), 0.5)
    V[1] *= 100
    before: Tensor = L.clone()
    with pytest.raises(torch.linalg.LinAlgError, match="Batch element 1") as caught:
        cfl_ops.cholesky_downdate_(L, V)
    good = caught.value.info == 0
    assert good.tolist() == [True, False, True]
    assert torch.equal(L[~good], before[~good])
    want = before - 0
    want[good] = cfl_ops.cholesky_downdate(before[good], V[good])
    torch.testing.assert_close(L, want)
