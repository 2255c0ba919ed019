"""A valid call of every public function, with every option that is a tensor, a number or a flag in some row."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cfl_ops
import numpy as np
import torch
from cfl_ops import config, learn
from torch import Tensor

B, D, K = 6, 3, 2
GENERATOR = torch.Generator().manual_seed(0)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


X, Y, S = randn(B, D), randn(B, K), torch.rand(B, generator=GENERATOR, dtype=torch.float64) + 0.5
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])
HEAD, BIAS = randn(K, D), randn(K)
SPD = X.mT @ X + torch.eye(D, dtype=torch.float64)
FACTOR = torch.linalg.cholesky(SPD)
CROSS = X.mT @ Y
WEIGHTS = randn(40, 8).float()
MORE_WEIGHTS = torch.randn(15, 20, generator=torch.Generator().manual_seed(0))
STEPPED = torch.where(WEIGHTS > 0.5, WEIGHTS + 1, WEIGHTS)
DELTA = cfl_ops.compress_delta(STEPPED, WEIGHTS)
BLOB, SYMBOLS = cfl_ops.compress(WEIGHTS, bits=4), cfl_ops.quantize(WEIGHTS, 4).symbols
PAYLOAD = cfl_ops.huffman_encode(SYMBOLS)

_STEP = {"features": X, "target": Y, "weight": HEAD, "bias": BIAS, "lam": 0.5, "ridge": 0.25,
         "lam_diag": torch.ones(D, dtype=torch.float64), "sample_weight": S}  # fmt: skip
_UPDATE: dict[str, Any] = {"L": FACTOR, "V": randn(D, 2), "alpha": 0.5, "decay": 0.75}
_DOWNDATE: dict[str, Any] = {"L": FACTOR, "V": 0.1 * randn(D, 1)}
_GRAM = {"x": X, "y": Y, "bias_column": True, "sample_weight": S}
_QUANTIZE = [{"w": WEIGHTS, "bits": 4, "histogram": True}, {"w": WEIGHTS, "per": "block", "block_size": 16}]


def gram_(**changes: Any) -> Any:
    moments = cfl_ops.gram(X, Y, bias_column=True)
    return cfl_ops.gram_(moments, **changes)


def gram_of_classes_(**changes: Any) -> Any:
    return cfl_ops.gram_(cfl_ops.gram(X, LABELS, num_classes=K), **changes)


def decay_moments(rho: Any) -> Any:
    return cfl_ops.gram(X, Y).decay(rho)


def accumulate(x: Any = X, y: Any = Y, sample_weight: Any = S, **options: Any) -> Any:
    accumulator = cfl_ops.GramAccumulator(**options)
    for _ in range(2):
        accumulator.update(x, y, sample_weight)
    return accumulator.moments


def accumulate_fit(**options: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return (
            cfl_ops.GramAccumulator().fit([(X, Y)] * 3, checkpoint=Path(folder) / "c.pt", **options).moments
        )


def accumulate_fit_file(**options: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return cfl_ops.GramAccumulator().fit_file(X, Y, checkpoint=Path(folder) / "c.pt", **options).moments


def recursive_ridge(x: Any = X, y: Any = Y, sample_weight: Any = S, **options: Any) -> Any:
    model = cfl_ops.RecursiveRidge(**{"features": D, "targets": K, **options})
    out = [model.update(x, y, sample_weight)]
    if model.window is None and model.process_noise == 0:
        model.remove(x, y, sample_weight)
    return [*out, *model.state_dict().values()]


def predict(x: Any = X, **options: Any) -> Any:
    model = cfl_ops.RecursiveRidge(D, K)
    model.update(X, Y)
    return model.predict(x, **options)


def solve_factorized(a: Any = X, b: Any = Y, **options: Any) -> Any:
    factorization = cfl_ops.factorize(a, **options)
    return factorization.solve(b), factorization.pinv(), factorization.condition, factorization.logdet


def closed_form_linear(features: Any = X, target: Any = Y, sample_weight: Any = S, **options: Any) -> Any:
    head = learn.ClosedFormLinear(**{"in_features": D, "out_features": K, "dtype": torch.float64, **options})
    return [*head.update(features, target, sample_weight=sample_weight), *head.state_dict().values()]


def recursive_head(features: Any = X, target: Any = Y, sample_weight: Any = S, **options: Any) -> Any:
    head = learn.RecursiveHead(**{"in_features": D, "out_features": K, **options})
    out = [*head.update(features, target, sample_weight=sample_weight), *head.state_dict().values()]
    return [*out, *head.predict(X, return_variance=True)]


def schedule(kind: type, steps: int = 1) -> Callable[..., Any]:
    def run(**options: Any) -> Any:
        made, out = kind(**options), []
        for _ in range(steps):
            out.append(made.value(B, lambda: X.square().mean()).clone())
            made.value(B, lambda: 2 * X.square().mean())
            made.step()
        return [*out, made.get_last_lam()]

    return run


def calibration(scores: Any = Y, labels: Any = LABELS, **options: Any) -> Any:
    model = learn.Calibration(**options).fit(scores, labels)
    return [model.beta, model(scores), model.nll(scores, labels)]


def estimator(kind: type) -> Callable[..., Any]:
    def fit(**options: Any) -> Any:
        model = kind(**options).fit(X.numpy(), Y.numpy())
        return [torch.from_numpy(np.atleast_1d(value)) for value in (model.coef_, model.intercept_)]

    return fit


def save_file(**options: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return cfl_ops.save_file({"w": WEIGHTS}, Path(folder) / "w", **options)


def save_safetensors(**options: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return cfl_ops.save_safetensors({"w": WEIGHTS}, Path(folder) / "w", **options)


def load_model(**options: Any) -> Any:
    model = torch.nn.Linear(8, 40)
    torch.nn.init.zeros_(model.bias)  # the file lacks it
    with tempfile.TemporaryDirectory() as folder:
        cfl_ops.save_file({"weight": WEIGHTS}, Path(folder) / "w", lossless=True)
        return [*cfl_ops.load_model(model, Path(folder) / "w", **options), *model.state_dict().values()]


class Call:
    """A function, and keyword arguments that it takes."""

    def __init__(self, function: Callable[..., Any], **arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __call__(self, **changes: Any) -> Any:
        """The results, and the tensors that were given, which some functions write to: they are copies."""
        given = {
            name: value.clone() if isinstance(value, Tensor) and name not in changes else value
            for name, value in {**self.arguments, **changes}.items()
        }
        kept = [value for name, value in given.items() if isinstance(value, Tensor) and name not in changes]
        return self.function(**given), kept


CALLS: dict[str, list[Call]] = {
    "gram": [Call(cfl_ops.gram, **_GRAM), Call(cfl_ops.gram, x=X, y=LABELS, num_classes=K)],
    "gram_": [
        Call(gram_, x=X, y=Y, bias_column=True, sample_weight=S, decay=0.5),
        Call(gram_of_classes_, x=X, y=LABELS, decay=0.5),
    ],
    "linear_gram": [
        Call(cfl_ops.linear_gram, x=X, weight=randn(4, D), bias=randn(4), y=Y, bias_column=True, sample_weight=S),
        Call(cfl_ops.linear_gram, x=X, weight=randn(4, D), y=LABELS, num_classes=K),
    ],
    "GramMoments.decay": [Call(decay_moments, rho=0.5)],
    "GramAccumulator": [
        Call(accumulate, x=X, y=Y, sample_weight=S, bias_column=True, decay=0.5),
        Call(accumulate, x=X, y=LABELS, num_classes=K, compensated=True),
    ],
    "GramAccumulator.fit": [Call(accumulate_fit, checkpoint_every=2, progress=False)],
    "GramAccumulator.fit_file": [Call(accumulate_fit_file, batch_rows=2, checkpoint_every=2, progress=False)],
    "cholesky_update": [Call(cfl_ops.cholesky_update, **_UPDATE)],
    "cholesky_update_": [Call(cfl_ops.cholesky_update_, **_UPDATE)],
    "cholesky_update_ex": [Call(cfl_ops.cholesky_update_ex, **_UPDATE)],
    "cholesky_update_ex_": [Call(cfl_ops.cholesky_update_ex_, **_UPDATE)],
    "cholesky_downdate": [Call(cfl_ops.cholesky_downdate, **_DOWNDATE)],
    "cholesky_downdate_": [Call(cfl_ops.cholesky_downdate_, **_DOWNDATE)],
    "cholesky_downdate_ex": [Call(cfl_ops.cholesky_downdate_ex, **_DOWNDATE)],
    "cholesky_downdate_ex_": [Call(cfl_ops.cholesky_downdate_ex_, **_DOWNDATE)],
    "cholesky_append": [Call(cfl_ops.cholesky_append, L=FACTOR, rows=randn(2, D), corner=9 * torch.eye(2).double())],
    "cholesky_append_ex": [
        Call(cfl_ops.cholesky_append_ex, L=FACTOR, rows=randn(2, D), corner=9 * torch.eye(2).double())
    ],
    "cholesky_delete": [Call(cfl_ops.cholesky_delete, L=FACTOR, index=1)],
    "safe_cholesky": [Call(cfl_ops.safe_cholesky, a=SPD, max_jitter=0.5)],
    "safe_cholesky_ex": [Call(cfl_ops.safe_cholesky_ex, a=SPD, max_jitter=0.5)],
    "spd_inverse": [Call(cfl_ops.spd_inverse, a=SPD)],
    "spd_inverse_ex": [Call(cfl_ops.spd_inverse_ex, a=SPD)],
    "RecursiveRidge": [
        Call(
            recursive_ridge, x=X, y=Y, sample_weight=S, features=D, targets=K, alpha=0.5, noise=0.5, forgetting=0.5,
            process_noise=0.25,
        ),
        Call(recursive_ridge, x=X, y=Y, window=4),
        Call(recursive_ridge, x=X, y=Y, sample_weight=S, features=D, targets=K, forgetting=0.5),
    ],
    "RecursiveRidge.predict": [Call(predict, x=X, return_variance=True)],
    "proximal_step": [
        Call(cfl_ops.proximal_step, **_STEP),
        Call(cfl_ops.proximal_step, features=X, target=LABELS, weight=HEAD, lam=0.5),
    ],
    "proximal_step_": [Call(cfl_ops.proximal_step_, **_STEP)],
    "proximal_step_ex": [Call(cfl_ops.proximal_step_ex, **_STEP)],
    "proximal_step_ex_": [Call(cfl_ops.proximal_step_ex_, **_STEP)],
    "proximal_update": [Call(cfl_ops.proximal_update, **_STEP)],
    "ridge_step": [
        Call(cfl_ops.ridge_step, features=X, target=Y, lam=0.5, bias=True, sample_weight=S),
        Call(cfl_ops.ridge_step, features=X, target=LABELS, num_classes=K, lam=0.5),
    ],
    "rescaled_proximal_step": [
        Call(
            cfl_ops.rescaled_proximal_step, features=X, labels=LABELS, weight=HEAD, bias=BIAS, lam=0.5, ridge=0.25,
            kappa=2.0, target_scale=4.0,
        )
    ],
    "ridge": [Call(cfl_ops.ridge, x=X, y=Y, lam=0.5, bias=True)],
    "ridge_path": [Call(cfl_ops.ridge_path, x=X, y=Y, lams=[0.5, 2.0], bias=True)],
    "ridge_cv": [
        Call(cfl_ops.ridge_cv, x=X, y=Y, lams=[0.5, 2.0], cv=3, per_target=False, bias=True),
        Call(cfl_ops.ridge_cv, x=X, y=Y, lams=[0.5, 2.0]),
    ],
    "ridge_solve": [
        Call(cfl_ops.ridge_solve, gram=SPD, cross=CROSS, lam=0.5, lam_diag=torch.ones(D, dtype=torch.float64))
    ],
    "ridge_solve_ex": [
        Call(cfl_ops.ridge_solve_ex, gram=SPD, cross=CROSS, lam=0.5, lam_diag=torch.ones(D, dtype=torch.float64))
    ],
    "class_ridge": [
        Call(
            cfl_ops.class_ridge, x=X, y=LABELS, lam=0.5, num_classes=K, kappa=2.0, scale=0.5, prox=0.25,
            weight=HEAD.mT.contiguous(),
        )
    ],
    "lstsq": [Call(cfl_ops.lstsq, a=X, b=Y, rtol=0.125)],
    "lstsq_ex": [Call(cfl_ops.lstsq_ex, a=X, b=Y, rtol=0.125)],
    "pinv": [Call(cfl_ops.pinv, a=X, rtol=0.125, atol=0.125), Call(cfl_ops.pinv, a=X)],
    "pinv_ex": [Call(cfl_ops.pinv_ex, a=X, rtol=0.125, atol=0.125)],
    "factorize": [Call(solve_factorized, a=X, b=Y, rtol=0.125), Call(solve_factorized, a=X, b=Y)],
    "compress": [
        Call(cfl_ops.compress, w=WEIGHTS, floor=5.0, probe_bits=3, fraction=0.5),
        Call(cfl_ops.compress, w=WEIGHTS, bits=4, per="block", block_size=16),
        Call(cfl_ops.compress, w=WEIGHTS, floor=1.0, max_error=0.01, zero="exact"),
        Call(cfl_ops.compress, w=WEIGHTS, lossless=True),
    ],
    "compress_delta": [Call(cfl_ops.compress_delta, new=STEPPED, old=WEIGHTS)],
    "apply_delta": [Call(cfl_ops.apply_delta, old=WEIGHTS, delta=DELTA)],
    "apply_delta_": [Call(cfl_ops.apply_delta_, old=WEIGHTS, delta=DELTA)],
    "decompress": [
        Call(cfl_ops.decompress, blob=BLOB, out=torch.empty(20), start=2, stop=22),
        Call(cfl_ops.decompress, blob=BLOB),
    ],
    "compress_state_dict": [
        Call(lambda **o: cfl_ops.compress_state_dict({"w": WEIGHTS}, **o), min_numel=4, lossless=False),
        Call(lambda **o: cfl_ops.compress_state_dict({"w": MORE_WEIGHTS}, **o), max_bytes=250),
        Call(
            lambda **o: cfl_ops.compress_state_dict(
                {"w": MORE_WEIGHTS}, allocation="gradient", gradients={"w": 0.5}, max_error=float("inf"), **o
            ),
            c0=0.5,
            c1=5.0,
        ),
    ],
    "compression_report": [
        Call(lambda: [*map(list, cfl_ops.compression_report({"w": WEIGHTS}, {"w": cfl_ops.compress(WEIGHTS)}))])
    ],
    "decompress_state_dict": [Call(lambda: cfl_ops.decompress_state_dict({"w": BLOB}))],
    "save_file": [Call(save_file, lossless=True)],
    "save_safetensors": [Call(save_safetensors, lossless=False, max_shard_size=500)],
    "load_file": [],
    "open_file": [],
    "load_model": [Call(load_model, strict=False)],
    "quantize": [Call(cfl_ops.quantize, **row) for row in _QUANTIZE],
    "quantize_ex": [Call(cfl_ops.quantize_ex, **row) for row in _QUANTIZE],
    "dequantize": [Call(lambda: cfl_ops.dequantize(cfl_ops.quantize(WEIGHTS, 4)))],
    "estimate_entropy": [Call(cfl_ops.estimate_entropy, w=WEIGHTS, bits=4, fraction=0.5)],
    "allocate_bits": [Call(cfl_ops.allocate_bits, entropy=2.5, floor=5.0)],
    "huffman_encode": [Call(cfl_ops.huffman_encode, symbols=SYMBOLS)],
    "huffman_decode": [
        Call(cfl_ops.huffman_decode, payload=PAYLOAD, out=torch.empty(20, dtype=torch.uint8), start=2, stop=22),
        Call(cfl_ops.huffman_decode, payload=PAYLOAD),
    ],
    "config.plan_proximal": [Call(config.plan_proximal, rows=20, width=8, targets=2)],
    "learn.ClosedFormLinear": [
        Call(
            closed_form_linear, features=X, target=Y, sample_weight=S, in_features=D, out_features=K, lam=0.5,
            bias=True, ridge=0.25, relative=True,
        ),
        Call(closed_form_linear, features=X, target=LABELS, method="ridge", lam=0.5, ridge=0.25),
        Call(closed_form_linear, features=X, target=LABELS, sample_weight=None, kappa=2.0, target_scale=0.5),
        Call(closed_form_linear, features=X, target=LABELS, sample_weight=S, feature_dim=1, ignore_index=1),
        Call(closed_form_linear, features=X, target=LABELS, method="ema_ridge", decay=0.5),
    ],
    "learn.RecursiveHead": [
        Call(
            recursive_head, features=X, target=Y, sample_weight=S, in_features=D, out_features=K, bias=True, alpha=0.5,
            noise=0.5, decay=0.5, process_noise=0.25,
        ),
        Call(recursive_head, features=X, target=LABELS, window=4),
    ],
    "learn.ConstantLam": [Call(schedule(learn.ConstantLam), lam=0.5)],
    "learn.CosineLam": [Call(schedule(learn.CosineLam, 4), lam=0.5, T_max=3, lam_min=0.25, log=True)],
    "learn.BatchSizeLam": [Call(schedule(learn.BatchSizeLam), lam=0.5, reference=4, power=0.5)],
    "learn.RelativeLam": [Call(schedule(learn.RelativeLam), lam=0.5, decay=0.75)],
    "learn.Calibration": [Call(calibration, scores=Y, labels=Y.argmax(1), cap=2.0)],
    "learn.closed_form_gain": [
        Call(learn.closed_form_gain, features=X, target=Y, weight=HEAD, bias=BIAS),
        Call(learn.closed_form_gain, features=X, target=LABELS, weight=HEAD),
    ],
    "learn.feature_alignment": [
        Call(learn.feature_alignment, features=X, target=Y, center=True),
        Call(learn.feature_alignment, features=X, target=LABELS),
    ],
    "learn.class_probabilities": [Call(learn.class_probabilities, scores=Y, dim=0)],
    "learn.expected_calibration_error": [
        Call(learn.expected_calibration_error, probabilities=Y.softmax(1), labels=1 - LABELS, bins=8)
    ],
    "learn.Ridge": [Call(estimator(learn.Ridge), alpha=0.5, fit_intercept=False)],
    "learn.RidgeCV": [
        Call(estimator(learn.RidgeCV), alphas=[0.5, 2.0], fit_intercept=False, cv=3, alpha_per_target=False)
    ],
}  # fmt: skip

CODEC = ("compress", "decompress", "quantize", "huffman", "allocate_bits", "estimate_entropy", "dequantize",
         "save_file", "save_safetensors", "load_model", "apply_delta")  # fmt: skip


def documented() -> dict[str, inspect.Signature]:
    """The signatures of all that CALLS must have, as it names them."""
    found: dict[str, inspect.Signature] = {}
    for prefix, module in (("", cfl_ops), ("learn.", learn), ("config.", config)):
        for name in module.__all__:
            item = getattr(module, name)
            if (
                f"{prefix}{name}" in CALLS
                if isinstance(item, type)
                else inspect.isfunction(item) and prefix != "config."
            ):
                found[prefix + name] = inspect.signature(item)
    for name in CALLS:
        if "." in name and name not in found:
            owner, method = name.split(".")
            item = getattr(config, method) if owner == "config" else getattr(getattr(cfl_ops, owner), method)
            found[name] = inspect.signature(item)
    del found["learn.train_step"]  # takes modules
    return found
