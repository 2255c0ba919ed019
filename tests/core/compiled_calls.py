"""Every public function as test_compile.py calls it: what it is given for a number of rows, or why it cannot."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cfl_ops
import torch
from torch import Tensor

randn = torch.randn


@dataclass(frozen=True)
class Call:
    """A public function with some options, of tensors alone; ``make(rows)`` gives them."""

    name: str
    """That of the function, then the options."""
    function: Callable[..., Any]
    make: Callable[[int], Sequence[Tensor]]
    exact: bool = True
    """False where the graph may round in another way than eager."""
    slow: bool = False
    """For ``make test-slow``: a variant of another call."""
    model: Callable[[], Any] | None = None
    """Makes what the function takes before the tensors, and updates."""

    def bound(self) -> Callable[..., Any]:
        """The function, with a model of its own."""
        return functools.partial(self.function, self.model()) if self.model else self.function


def labels(rows: int) -> Tensor:
    return torch.arange(rows) % 3


def data(rows: int) -> tuple[Tensor, Tensor]:
    return randn(rows, 4), randn(rows, 2)


def wide_data(rows: int) -> tuple[Tensor, Tensor]:
    return randn(rows, 4, dtype=torch.float64), randn(rows, 2)


def many(rows: int) -> tuple[Tensor, Tensor]:
    return randn(rows, 6, 4), randn(rows, 6, 2)


def mixed(rows: int) -> tuple[Tensor, Tensor]:
    """float64, every other matrix of them of rank 3."""
    a, b = randn(rows, 6, 4, dtype=torch.float64), randn(rows, 6, 2)
    a[::2, :, 3] = a[::2, :, 2]
    return a, b


def systems(rows: int) -> tuple[Tensor, Tensor]:
    return (torch.eye(5) + 0.1 * torch.ones(5, 5)).repeat(rows, 1, 1), randn(rows, 5, 2)


def step(rows: int) -> tuple[Tensor, ...]:
    return randn(rows, 12), labels(rows), randn(3, 12), randn(3)


def factor(rows: int) -> tuple[Tensor, Tensor]:
    return 4 * torch.eye(5).repeat(rows, 1, 1), 0.5 * randn(rows, 5, 2)


def grown(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return factor(rows)[0], 0.1 * randn(rows, 2, 5), 3 * torch.eye(2).repeat(rows, 1, 1)


def add_moments(
    gram: Tensor, cross: Tensor, total: Tensor, square: Tensor, count: Tensor, *new: Tensor
) -> Any:
    return cfl_ops.gram_(cfl_ops.GramMoments(gram, cross, total, square, count), *new, decay=0.5)


def factorized(a: Tensor, b: Tensor, **options: Any) -> tuple[Tensor, ...]:
    f = cfl_ops.factorize(a, **options)
    return f.solve(b), f.pinv(), f.rank, f.singular_values, f.condition, f.logdet


def quantized(w: Tensor, **options: Any) -> tuple[Tensor, ...]:
    q = cfl_ops.quantize(w, 5, **options)
    return q.symbols, q.minimum, q.maximum, cfl_ops.dequantize(q)


def recursive_ridge() -> cfl_ops.RecursiveRidge:
    model = cfl_ops.RecursiveRidge(4, 2, alpha=10.0)
    model.update(10 * torch.eye(4), torch.ones(4, 2))
    return model


def learn(model: cfl_ops.RecursiveRidge, *rows: Tensor) -> tuple[Tensor, ...]:
    return model.update(*rows), model.factor, model.wide_weight, model.seen


def unlearn(model: cfl_ops.RecursiveRidge, x: Tensor, y: Tensor) -> tuple[Any, ...]:
    model.remove(0.1 * x, 0.1 * y)
    return model.factor, model.wide_weight, model.predict(x, return_variance=True)


def closed_form(**options: Any) -> Callable[[], cfl_ops.learn.ClosedFormLinear]:
    return lambda: cfl_ops.learn.ClosedFormLinear(12, 3, **options)


def head(model: cfl_ops.learn.ClosedFormLinear, x: Tensor, y: Tensor) -> tuple[Any, ...]:
    return model.update(x, y), model(x)


def recursive_head(model: cfl_ops.learn.RecursiveHead, x: Tensor, y: Tensor) -> tuple[Any, ...]:
    return model.update(x, y), model(x), model.predict(x, return_variance=True)


def accumulated(x: Tensor, y: Tensor) -> Any:
    accumulator = cfl_ops.GramAccumulator(bias_column=True)
    accumulator.update(x, y)
    accumulator.update(x, y)
    return accumulator.moments


lam, lams = torch.tensor(0.5), torch.tensor([0.5, 1.0])

CALLS = [
    Call("allocate_bits", lambda w: w * cfl_ops.allocate_bits(2.5), lambda rows: data(rows)[:1]),
    Call("cholesky_append", cfl_ops.cholesky_append, grown),
    Call("cholesky_append_ex", cfl_ops.cholesky_append_ex, grown),
    Call("cholesky_delete", lambda L: cfl_ops.cholesky_delete(L, [1, -1]), lambda rows: factor(rows)[:1]),
    Call("cholesky_downdate", cfl_ops.cholesky_downdate, factor),
    Call("cholesky_downdate_", cfl_ops.cholesky_downdate_, factor),
    Call("cholesky_downdate_ex", cfl_ops.cholesky_downdate_ex, factor),
    Call("cholesky_downdate_ex_", cfl_ops.cholesky_downdate_ex_, factor),
    Call("cholesky_update", lambda L, V: cfl_ops.cholesky_update(L, V, 2.0, decay=0.5), factor),
    Call("cholesky_update_", cfl_ops.cholesky_update_, factor),
    Call("cholesky_update_ex", cfl_ops.cholesky_update_ex, factor),
    Call("cholesky_update_ex_", cfl_ops.cholesky_update_ex_, factor),
    Call(
        "class_ridge",
        lambda x, y, w: cfl_ops.class_ridge(x, y, 0.5, num_classes=3, kappa=2.0, prox=0.5, weight=w),
        lambda rows: (randn(rows, 4), labels(rows), randn(4, 3)),
    ),
    Call("dequantize", quantized, lambda rows: data(rows)[:1]),
    Call("estimate_entropy", cfl_ops.estimate_entropy, lambda rows: data(rows)[:1]),
    Call("factorize", factorized, data, exact=False),
    Call("factorize: float64", factorized, wide_data, exact=False, slow=True),
    Call("factorize: batch", factorized, many, exact=False, slow=True),
    Call("factorize: float64 batch of mixed rank", factorized, mixed, exact=False),
    Call("factorize: rtol", lambda a, b: factorized(a, b, rtol=1e-3), data, exact=False, slow=True),
    Call("factorize: many columns", factorized, lambda rows: (randn(70 + rows, 66), randn(70 + rows, 2)), exact=False,
         slow=True),
    Call("gram", lambda x, y: cfl_ops.gram(x, y, bias_column=True), data),
    Call(
        "gram: classes and weights",
        lambda x, y, s: cfl_ops.gram(x, y, num_classes=3, sample_weight=s),
        lambda rows: (randn(rows, 4), labels(rows), torch.rand(rows)), slow=True,
    ),
    Call("gram_", add_moments, lambda rows: (*cfl_ops.gram(*data(6)), *data(rows))),
    Call("huffman_decode", cfl_ops.huffman_decode, lambda rows: (
        cfl_ops.huffman_encode(labels(rows).byte()), torch.zeros(rows, dtype=torch.uint8)
    )),
    Call("huffman_encode", cfl_ops.huffman_encode, lambda rows: (labels(rows).byte(),)),
    Call("linear_gram", lambda x, y, w: cfl_ops.linear_gram(x, w, None, "gelu", y), lambda rows: (
        *data(rows), randn(6, 4)
    )),
    Call("lstsq", cfl_ops.lstsq, data),
    Call("lstsq: rtol", lambda a, b: cfl_ops.lstsq(a, b, rtol=1e-3), data, slow=True),
    Call("lstsq: float64 batch of mixed rank", cfl_ops.lstsq, mixed, slow=True),
    Call("lstsq_ex", cfl_ops.lstsq_ex, data),
    Call("pinv", cfl_ops.pinv, lambda rows: data(rows)[:1]),
    Call("pinv: batch", lambda a: cfl_ops.pinv(a, atol=1e-3), lambda rows: many(rows)[:1]),
    Call("pinv_ex", cfl_ops.pinv_ex, lambda rows: many(rows)[:1]),
    Call("proximal_step", lambda *args: cfl_ops.proximal_step(*args, lam=0.5), step),
    Call("proximal_step_", lambda *args: cfl_ops.proximal_step_(*args, lam=0.5), step),
    Call("proximal_step_ex", lambda *args: cfl_ops.proximal_step_ex(*args, lam=0.5), step),
    Call("proximal_step_ex_", lambda *args: cfl_ops.proximal_step_ex_(*args, lam=0.5), step),
    Call("proximal_update", lambda *args: cfl_ops.proximal_update(*args, lam=0.5), step),
    Call("quantize", lambda w: quantized(w, per="row", histogram=True), lambda rows: data(rows)[:1]),
    # The last block of 40 n + 20 weights is never whole: a graph is made for one of the two cases.
    Call(
        "quantize: blocks",
        lambda w: quantized(w, per="block", block_size=40),
        lambda rows: (randn(2 * rows + 1, 20),),
    ),
    Call("quantize_ex", lambda w: cfl_ops.quantize_ex(w)[0][:3], lambda rows: data(rows)[:1]),
    Call(
        "rescaled_proximal_step",
        lambda *args: cfl_ops.rescaled_proximal_step(*args, lam=0.5, kappa=2.0, target_scale=3.0),
        lambda rows: (randn(rows, 40), labels(rows), randn(3, 40), randn(3)),
        exact=False,
    ),
    Call("ridge", lambda x, y: cfl_ops.ridge(x, y, 0.5, bias=True), data),
    Call("ridge: 0", lambda x, y: cfl_ops.ridge(x, y, 0.0), data, slow=True),
    Call("ridge: tensor", lambda x, y, lam: cfl_ops.ridge(x, y, lam), lambda rows: (*data(rows), lam)),
    Call("ridge_cv", lambda x, y: cfl_ops.ridge_cv(x, y, [0.5, 1.0], bias=True), data),
    Call("ridge_cv: folds", lambda x, y: cfl_ops.ridge_cv(x, y, lams, cv=3, per_target=False)[2:], data),
    Call("ridge_path", lambda x, y: cfl_ops.ridge_path(x, y, [0.5, 1.0], bias=True), data),
    Call("ridge_path: tensor", cfl_ops.ridge_path, lambda rows: (*data(rows), lams)),
    Call("ridge_solve", lambda a, b: cfl_ops.ridge_solve(a, b, 0.5), systems),
    Call("ridge_solve_ex", lambda a, b: cfl_ops.ridge_solve_ex(a, b, 0.5), systems),
    Call("ridge_step", lambda x, y: cfl_ops.ridge_step(x, y, 3, lam=0.5), lambda rows: step(rows)[:2]),
    Call("safe_cholesky", cfl_ops.safe_cholesky, lambda rows: systems(rows)[:1]),
    Call("safe_cholesky_ex", cfl_ops.safe_cholesky_ex, lambda rows: systems(rows)[:1]),
    Call("spd_inverse", cfl_ops.spd_inverse, lambda rows: systems(rows)[:1]),
    Call("spd_inverse_ex", cfl_ops.spd_inverse_ex, lambda rows: systems(rows)[:1]),
    Call("GramAccumulator.update", accumulated, data),
    Call("RecursiveRidge.remove", unlearn, data, exact=False, model=recursive_ridge),
    Call("RecursiveRidge.update", learn, data, exact=False, model=lambda: cfl_ops.RecursiveRidge(
        4, 2, process_noise=0.1
    )),
    Call("RecursiveRidge.update: weights", learn, lambda rows: (*data(rows), torch.rand(rows)), exact=False, slow=True,
         model=recursive_ridge),
    Call("learn.ClosedFormLinear.update", head, lambda rows: step(rows)[:2], model=closed_form(check="next")),
    Call("learn.ClosedFormLinear.update: relative", head, lambda rows: step(rows)[:2], exact=False,
         model=closed_form(method="ridge", relative=True)),
    Call("learn.RecursiveHead.update", recursive_head, data, exact=False, model=lambda: cfl_ops.learn.RecursiveHead(
        4, 2, process_noise=0.1
    )),
    Call("learn.class_probabilities", cfl_ops.learn.class_probabilities, lambda rows: data(rows)[:1]),
]  # fmt: skip

weights, blob = randn(8, 8), cfl_ops.compress(randn(8, 8), bits=4)
delta = cfl_ops.compress_delta(weights, weights)
features, targets = data(8)


def window() -> Tensor:
    return cfl_ops.RecursiveRidge(4, 2, window=4).update(features, targets)


CANNOT: dict[str, tuple[str, Callable[[], Any]]] = {
    "compress": ("the bytes are written on the host", lambda: cfl_ops.compress(weights)),
    "compress_delta": ("the bytes are written on the host", lambda: cfl_ops.compress_delta(weights, weights)),
    "apply_delta": ("the bytes are read on the host", lambda: cfl_ops.apply_delta(weights, delta)),
    "apply_delta_": ("the bytes are read on the host", lambda: cfl_ops.apply_delta_(weights, delta)),
    "decompress": ("the bytes are read on the host", lambda: cfl_ops.decompress(blob)),
    "compress_state_dict": ("it compresses", lambda: cfl_ops.compress_state_dict({"w": weights})),
    "decompress_state_dict": (
        "it decompresses",
        lambda: cfl_ops.decompress_state_dict(cfl_ops.compress_state_dict({"w": weights})),
    ),
    "compression_report": (
        "it decompresses",
        lambda: cfl_ops.compression_report({"w": weights}, {"w": cfl_ops.compress(weights, bits=4)}),
    ),
    "save_file": ("it writes a file", lambda: cfl_ops.save_file({"w": weights}, "/dev/null")),
    "load_file": ("it reads a file", lambda: cfl_ops.load_file("/dev/null")),
    "open_file": ("it reads a file", lambda: cfl_ops.open_file("/dev/null")),
    "save_safetensors": (
        "it writes files",
        lambda: cfl_ops.save_safetensors({"w": weights}, "/dev/null"),
    ),
    "load_model": ("it reads a file", lambda: cfl_ops.load_model(torch.nn.Linear(2, 2), "/dev/null")),
    "huffman_decode without out": (
        "the shape stands in the payload",
        lambda: cfl_ops.huffman_decode(cfl_ops.huffman_encode(features.byte())),
    ),
    "RecursiveRidge.update with a window": ("which rows leave depends on how many came", window),
    "learn.ClosedFormLinear.step": (
        "it calls backward: use update",
        lambda: cfl_ops.learn.ClosedFormLinear(4, 3).step(features.requires_grad_(), labels(8)),
    ),
    "learn.train_step": ("it runs the optimizer", lambda: run_train_step()),
    "learn.closed_form_gain": (
        "it looks at the data",
        lambda: cfl_ops.learn.closed_form_gain(features, targets, torch.zeros(2, 4)),
    ),
    "learn.feature_alignment": (
        "it looks at the data",
        lambda: cfl_ops.learn.feature_alignment(features, targets),
    ),
    "learn.expected_calibration_error": (
        "it looks at the data",
        lambda: cfl_ops.learn.expected_calibration_error(features.softmax(1), labels(8)),
    ),
    "learn.Calibration.fit": (
        "how many steps are needed depends on the data",
        lambda: cfl_ops.learn.Calibration().fit(features, labels(8)).beta,
    ),
    "learn.Ridge": (
        "scikit-learn's checks look at the data",
        lambda: cfl_ops.learn.Ridge().fit(features, targets),
    ),
    "learn.RidgeCV": (
        "scikit-learn's checks look at the data",
        lambda: cfl_ops.learn.RidgeCV().fit(features, targets),
    ),
}


def run_train_step() -> Tensor:
    backbone, closed_form = torch.nn.Linear(4, 8), cfl_ops.learn.ClosedFormLinear(8, 3)
    optimizer = torch.optim.SGD(backbone.parameters())
    return cfl_ops.learn.train_step(backbone, closed_form, optimizer, features.detach(), labels(8))
