"""Tangents beside the contract's (test_contract.py): of the public functions, and through every way torch asks."""

from __future__ import annotations

from typing import Any

import cfl_ops
import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.core.public_calls import CALLS, HEAD, LABELS, SPD, K, X, Y, randn

DIFFERENTIABLE = (
    "gram", "linear_gram", "cholesky_update", "cholesky_downdate", "cholesky_append", "safe_cholesky", "spd_inverse",
    "proximal_step", "proximal_update", "ridge_step", "rescaled_proximal_step", "ridge", "ridge_path", "ridge_solve",
    "class_ridge", "lstsq", "pinv",
)  # fmt: skip
PENALTIES = ("lam", "ridge", "prox")
ARGUMENTS = [
    (name, row, argument)
    for name in DIFFERENTIABLE
    for row, call in enumerate(CALLS[name])
    for argument, value in call.arguments.items()
    if argument in PENALTIES or (isinstance(value, Tensor) and value.is_floating_point())
]


def tensors(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out]
    return [value for item in out or () for value in tensors(item)]


@pytest.mark.parametrize(("name", "row", "argument"), ARGUMENTS)
def test_public_functions_push_tangents(name: str, row: int, argument: str) -> None:
    call = CALLS[name][row]
    at = torch.as_tensor(call.arguments[argument], dtype=torch.float64)
    tangent = torch.randn(at.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if at.ndim == 2 and torch.equal(at, at.mT):  # stays so
        tangent = tangent + tangent.mT
    if argument == "L":
        tangent = tangent.tril()

    def function(value: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors(call(**{argument: value})[0]))

    _, pushed = torch.func.jvp(function, (at,), (tangent,))
    step = 1e-5
    for got, above, below in zip(
        pushed, function(at + step * tangent), function(at - step * tangent), strict=True
    ):
        torch.testing.assert_close(got, (above - below) / (2 * step), rtol=1e-6, atol=1e-6)


def test_rescaled_step_of_few_rows_pushes_tangents() -> None:
    """The dual side, which goes through an inverse."""
    features, weight, labels = randn(3, 5), randn(2, 5), LABELS[:3]

    def loss(value: Tensor) -> Tensor:
        return cfl_ops.rescaled_proximal_step(value, labels, weight, lam=0.5, kappa=3.0).loss

    jacobians = torch.func.jacfwd(loss)(features), torch.func.jacrev(loss)(features)
    torch.testing.assert_close(*jacobians)


def loss(weight: Tensor) -> Tensor:
    return cfl_ops.proximal_step(X, Y, weight, lam=0.5).grad_features.pow(3).sum()


def test_numbers_do_not_belong_to_the_transform_that_saw_them_first() -> None:
    number = 0.123456  # of this test alone: they are kept

    def of_number(gram: Tensor) -> Tensor:
        return cfl_ops.ridge_solve(gram, gram, number).sum()

    torch.func.hessian(of_number)(SPD)
    under = torch.func.grad(of_number)(SPD)
    leaf = SPD.clone().requires_grad_()
    of_number(leaf).backward()
    torch.testing.assert_close(under, leaf.grad)


def test_forward_ad_inside_a_transform() -> None:
    """A tangent that depends on what torch.func differentiates."""

    def pushed(weight: Tensor) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(weight, torch.ones_like(weight))
            tangent = forward_ad.unpack_dual(loss(dual)).tangent
            assert tangent is not None
            return tangent

    want = torch.func.hessian(loss)(HEAD).sum((-1, -2))
    torch.testing.assert_close(torch.func.grad(pushed)(HEAD), want)


def test_vectorized_forward_mode() -> None:
    """Of torch.autograd.functional: batches of tangents, where torch.vmap sees no batch in the values."""
    functional = torch.autograd.functional
    want = torch.func.hessian(loss)(HEAD)
    forward = functional.hessian(loss, HEAD, vectorize=True, outer_jacobian_strategy="forward-mode")
    torch.testing.assert_close(forward, want)


def test_calls_through_the_dispatcher_lose_no_derivative() -> None:
    """torch.ops.cfl_ops has no forward mode, and says so; it can be mapped."""

    def raw(x: Tensor) -> Tensor:
        return torch.ops.cfl_ops.gram(x, None, None, False, 0, torch.float64)[0]

    torch.testing.assert_close(torch.vmap(raw)(X.unsqueeze(0))[0], raw(X))
    for transformed in (
        lambda: torch.func.grad(lambda x: raw(x).sum())(X),
        lambda: torch.func.jvp(raw, (X,), (X,)),
        lambda: pushed_forward(raw),
    ):
        with pytest.raises(
            RuntimeError, match="cfl_ops.gram: torch.ops.cfl_ops.gram takes part in plain autograd"
        ):
            transformed()


def pushed_forward(function: Any) -> None:
    with forward_ad.dual_level():
        function(forward_ad.make_dual(X, X))


TRANSFORMS = {
    "grad": lambda function: torch.func.grad(function),
    "jvp": lambda function: lambda x: torch.func.jvp(function, (x,), (torch.ones_like(x),))[1],
    "vmap of grad": lambda function: lambda x: torch.vmap(torch.func.grad(function))(x.unsqueeze(0)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize(
    "function",
    [
        loss,
        lambda weight: cfl_ops.lstsq(weight, SPD[:K]).sum(),
        lambda weight: cfl_ops.ridge_solve(SPD, weight.mT, 0.5).pow(2).sum(),
    ],
    ids=["proximal_step", "lstsq", "ridge_solve"],
)
def test_transforms_that_are_compiled(name: str, function: Any) -> None:
    """Dynamo traces none of them. It leaves jvp to eager (of others its own graph breaks are an error, torch 2.13)."""
    transformed = TRANSFORMS[name](function)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="is differentiated by a transform of torch.func"):
        torch.compile(transformed, backend="eager", fullgraph=True)(HEAD)
    torch._dynamo.reset()  # which remembers what it could not trace
    if name == "jvp":
        torch.testing.assert_close(torch.compile(transformed, backend="eager")(HEAD), transformed(HEAD))


def test_autocast_leaves_tangents_alone() -> None:
    def pushed() -> Tensor:
        return torch.func.jvp(lambda weight: cfl_ops.proximal_step(X.float(), Y.float(), weight, lam=0.5).loss,
                              (HEAD.float(),), (HEAD.float(),))[1]  # fmt: skip

    want = pushed()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pushed(), want)


def test_compiled_proximal_step_has_a_gradient() -> None:
    """Its backward formula is itself a pullback."""
    leaves = HEAD.clone().requires_grad_(), HEAD.clone().requires_grad_()
    loss(leaves[0]).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(leaves[1]).backward()
    torch.testing.assert_close(leaves[1].grad, leaves[0].grad)


@pytest.mark.parametrize("batch", [(), (2,)])
def test_steps_in_place_take_features_as_data(batch: tuple[int, ...]) -> None:
    """A tangent of theirs comes no further, whether there is a batch of heads or one."""
    weight = HEAD.expand(*batch, *HEAD.shape).clone()
    with forward_ad.dual_level():
        features = forward_ad.make_dual(
            X.expand(*batch, *X.shape).clone(), X.expand(*batch, *X.shape).clone()
        )
        step = cfl_ops.proximal_step_(features, Y.expand(*batch, *Y.shape), weight, lam=0.5)
        assert all(forward_ad.unpack_dual(value).tangent is None for value in (*step, weight))
