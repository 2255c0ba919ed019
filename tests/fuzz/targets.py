"""What the fuzzer calls: every raw op with the contract's samples, and public functions with samples of their own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import cfl_ops
import torch
from cfl_ops._core.op import OPS
from cfl_ops.ops.codec import host
from torch import Tensor

from tests import contract
from tests.solve.data import randn

MOST_BYTES = 1 << 20
"""Of one sample's arguments: a longer one would take the time of a hundred others."""


@dataclass(frozen=True)
class Target:
    name: str
    """Of an op as it is, of a public function behind ``public.``."""
    arguments: tuple[str, ...]
    kinds: tuple[str, ...]
    """Tensor, Tensor?, Tensor[], int, int[], float, bool, str, dtype or any."""
    samples: tuple[tuple[str, Callable[[], list[Any]]], ...]
    function: Callable[..., Any]
    """Takes the backend, then the arguments."""
    writes: tuple[int, ...] = ()
    differentiable: tuple[int, ...] = ()

    @property
    def public(self) -> bool:
        return self.name.startswith("public.")


KINDS = {
    "Tensor": "Tensor",
    "Optional[Tensor]": "Tensor?",
    "List[Tensor]": "Tensor[]",
    "int": "int",
    "List[int]": "int[]",
    "float": "float",
    "bool": "bool",
    "str": "str",
    "Optional[int]": "int",
}


def _kind(argument: Any) -> str:
    # The stub says int of a ScalarType; its real type tells.
    return "dtype" if str(argument.real_type) == "ScalarType" else KINDS[str(argument.type)]


@functools.cache
def targets(backend: str, public: bool = True, only: str | None = None) -> tuple[Target, ...]:
    """What a backend serves, or those of one name (``gram``, ``public.gram``)."""
    found = _ops(backend)
    if backend != "triton":  # which has no kernel for some ops that the others are made of
        found += [_raise_if(), *_host(), *(_public() if public or only else ())]
    chosen = tuple(target for target in found if only in (None, target.name))
    if not chosen and backend != "triton":
        raise SystemExit(f"no such op: {only}; there are {' '.join(target.name for target in found)}")
    return chosen


def _sample(case: contract.Case, dtype: torch.dtype) -> Callable[[], list[Any]]:
    @functools.cache
    def make() -> list[Any]:
        return list(case.make(dtype))

    return make


def _bytes(args: Sequence[Any]) -> int:
    return sum(arg.numel() * arg.element_size() for arg in args if isinstance(arg, Tensor))


def _ops(backend: str) -> list[Target]:
    found = []
    for spec in contract.load():
        if backend == "triton" and not spec.op.kernel("triton"):
            continue
        served = spec.triton_dtypes if backend == "triton" else contract.FLOATS
        samples = [
            (f"{case.name}, {str(dtype)[6:]}", _sample(case, dtype))
            for case in spec.cases
            for dtype in case.dtypes
            if dtype in served
        ]
        samples = [sample for sample in samples if _bytes(sample[1]()) <= MOST_BYTES]
        if samples:
            schema = spec.op.overload._schema
            names = tuple(argument.name for argument in schema.arguments)
            kinds = tuple(_kind(argument) for argument in schema.arguments)
            call = functools.partial(_call_op, spec.op.overload)
            found.append(
                Target(spec.op.name, names, kinds, tuple(samples), call, spec.mutates, spec.differentiable)
            )
    assert backend == "triton" or {target.name for target in found} == set(OPS)
    return found


def _call_op(overload: Any, backend: str, *args: Any) -> Any:
    return overload(*args)


def _raise_if() -> Target:
    def make() -> list[Any]:
        return ["gram", [torch.zeros(2, 2)], torch.zeros(3, dtype=torch.int32), [torch.zeros(3, 4, 2)]]

    function = functools.partial(_call_op, torch.ops.cfl_ops.raise_if_.default)
    kinds = ("str", "Tensor[]", "Tensor", "Tensor[]")
    return Target("raise_if_", ("op", "results", "info", "context"), kinds, (("gram", make),), function)


@functools.cache
def _host() -> list[Target]:
    """The codec's steps on the host between its kernels on a GPU."""
    counts = torch.randint(50, (40,), generator=torch.Generator().manual_seed(0))
    symbols = (torch.rand(3000, generator=torch.Generator().manual_seed(1)) ** 3 * 40).to(torch.uint8)
    payload = torch.ops.cfl_ops.huffman_encode(symbols, [30, 100], 10, 0)
    table = torch.randint(256, (9,), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    entries = torch.randint(2**20, (17, 2), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    samples: dict[str, tuple[Callable[..., Any], list[list[Any]]]] = {
        "host_code": (host.code, [[counts, 1], [counts, 5], [torch.tensor([0, 7]), 1]]),
        "host_head": (host.head, [[entries, table, [17, 1 << 15], 2, 15, 17 << 15, 300, 11]]),
        "host_parse": (
            host.parse,
            [[payload, payload.numel(), 0, 3000], [payload[:40], payload.numel(), 5, 9]],
        ),
    }
    found = []
    for name, (python, lists) in samples.items():
        overload = getattr(torch.ops.cfl_ops, name).default
        schema = overload._schema
        # Where the extension serves them, their Python is behind the dispatcher's checks nowhere else.
        _FALLBACKS.define(str(schema).removeprefix("cfl_ops::"))
        _FALLBACKS.impl(name, python, "CompositeExplicitAutograd")
        call = functools.partial(_call_host, overload, getattr(torch.ops.cfl_ops_fuzz, name).default)
        makes = tuple((f"sample {i}", functools.partial(list, args)) for i, args in enumerate(lists))
        kinds = tuple(_kind(argument) for argument in schema.arguments)
        found.append(Target(name, tuple(a.name for a in schema.arguments), kinds, makes, call))
    return found


_FALLBACKS = torch.library.Library("cfl_ops_fuzz", "DEF")


def _call_host(overload: Any, fallback: Any, backend: str, *args: Any) -> Any:
    return (fallback if backend == "python" else overload)(*args)


def _public() -> list[Target]:
    f32 = torch.float32
    x, y, weight = randn(12, 4, seed=1).to(f32), randn(12, 2, seed=2).to(f32), randn(2, 4, seed=3).to(f32)
    labels = torch.arange(12) % 3
    class_weight = randn(3, 4, seed=4).to(f32)  # class_ridge has it the other way round
    square = (randn(6, 8, seed=5) @ randn(6, 8, seed=5).mT).to(f32) / 8 + torch.eye(6)
    lower, columns = torch.linalg.cholesky(square), randn(6, 2, seed=6).to(f32) / 8
    bias, sample_weight = torch.zeros(2), torch.rand(12, generator=torch.Generator().manual_seed(0)) + 0.1
    values = randn(3, 400, seed=7).to(f32)
    symbols = (torch.rand(2000, generator=torch.Generator().manual_seed(1)) ** 3 * 40).to(torch.uint8)
    payload, blob = cfl_ops.huffman_encode(symbols), cfl_ops.compress(values)
    stepped = torch.where(values > 1, values * 1.001, values)
    delta = cfl_ops.compress_delta(stepped, values, effort="small")
    moments = cfl_ops.gram(x, y)
    step: dict[str, Any] = {
        "lam": 0.5,
        "ridge": 0.1,
        "lam_diag": None,
        "reduction": "mean",
        "sample_weight": None,
    }
    step |= {"fit_bias": "penalized", "method": "auto"}

    def gram_(gram: Any, cross: Any, target_sum: Any, target_sq: Any, count: Any, **rest: Any) -> Any:
        return cfl_ops.gram_(cfl_ops.GramMoments(gram, cross, target_sum, target_sq, count), **rest)

    def solve(a: Any, b: Any, rtol: Any) -> Any:
        return cfl_ops.factorize(a, rtol=rtol).solve(b)

    def dequantize(symbols: Any, minimum: Any, maximum: Any, bits: Any, group_size: Any) -> Any:
        return cfl_ops.dequantize(cfl_ops.QuantizedTensor(symbols, minimum, maximum, bits, group_size))

    def recursive(
        features: Any, targets: Any, alpha: Any, forgetting: Any, window: Any, x: Any, y: Any
    ) -> Any:
        model = cfl_ops.RecursiveRidge(features, targets, alpha=alpha, forgetting=forgetting, window=window)
        model.update(x, y)
        return model.predict(x)

    quantized = cfl_ops.quantize(values)
    found: list[tuple[str, Callable[..., Any], dict[str, Any], tuple[str, ...]]] = [
        ("ridge", cfl_ops.ridge, {"x": x, "y": y, "lam": 0.5, "bias": True}, ()),
        ("ridge_path", cfl_ops.ridge_path, {"x": x, "y": y, "lams": [0.1, 2.0], "bias": True}, ()),
        ("ridge_cv", cfl_ops.ridge_cv, {"x": x, "y": y, "lams": [0.1, 2.0], "cv": "loo", "per_target": True,
                                        "bias": True}, ()),
        ("ridge_cv", cfl_ops.ridge_cv, {"x": x, "y": y, "lams": torch.ones(2), "cv": 4, "per_target": False,
                                        "bias": False}, ()),
        ("class_ridge", cfl_ops.class_ridge, {"x": x, "y": labels, "lam": 0.5, "num_classes": 3, "kappa": 2.0,
                                              "scale": 1.0, "prox": 0.0, "weight": None}, ()),
        ("class_ridge", cfl_ops.class_ridge, {"x": x, "y": labels, "lam": torch.tensor(0.5), "num_classes": 3,
                                              "kappa": 2.0, "scale": 1.0, "prox": torch.tensor(0.2),
                                              "weight": class_weight.mT}, ()),
        ("ridge_solve", cfl_ops.ridge_solve, {"gram": square, "cross": columns, "lam": 0.5, "lam_diag": None}, ()),
        ("lstsq", cfl_ops.lstsq, {"a": x, "b": y, "rtol": None}, ()),
        ("pinv", cfl_ops.pinv, {"a": x, "rtol": None, "atol": None}, ()),
        ("factorize.solve", solve, {"a": x, "b": y, "rtol": None}, ()),
        ("spd_inverse", cfl_ops.spd_inverse, {"a": square}, ()),
        ("safe_cholesky", cfl_ops.safe_cholesky, {"a": square, "max_jitter": 0.5}, ()),
        ("cholesky_update", cfl_ops.cholesky_update, {"L": lower, "V": columns, "alpha": 1.0, "decay": 1.0}, ()),
        ("cholesky_update_", cfl_ops.cholesky_update_, {"L": lower, "V": columns, "alpha": 1.0, "decay": 0.9}, ("L",)),
        ("cholesky_downdate_", cfl_ops.cholesky_downdate_, {"L": lower, "V": columns}, ("L",)),
        ("cholesky_append", cfl_ops.cholesky_append, {"L": lower, "rows": columns.mT, "corner": torch.eye(2) * 9}, ()),
        ("cholesky_delete", cfl_ops.cholesky_delete, {"L": lower, "index": [1, 3]}, ()),
        ("gram", cfl_ops.gram, {"x": x, "y": y, "bias_column": True, "sample_weight": sample_weight,
                                "num_classes": None, "acc_dtype": None}, ()),
        ("gram", cfl_ops.gram, {"x": x, "y": labels, "bias_column": False, "sample_weight": None, "num_classes": 3,
                                "acc_dtype": torch.float64}, ()),
        ("gram_", gram_, {**moments._asdict(), "x": x, "y": y, "bias_column": False,
                             "sample_weight": None, "decay": 0.9}, moments._fields),
        ("linear_gram", cfl_ops.linear_gram, {"x": x, "weight": weight, "bias": bias, "activation": "relu", "y": labels,
                                              "bias_column": True, "sample_weight": None, "num_classes": 3,
                                              "acc_dtype": None}, ()),
        ("proximal_step", cfl_ops.proximal_step, {"features": x, "target": y, "weight": weight, "bias": bias, **step},
         ()),
        ("proximal_step_", cfl_ops.proximal_step_, {"features": x, "target": labels, "weight": class_weight,
                                                    "bias": torch.zeros(3), **step}, ("weight", "bias")),
        ("proximal_step_ex_", cfl_ops.proximal_step_ex_, {"features": x, "target": y, "weight": weight, "bias": None,
                                                          **step}, ("weight", "bias")),
        ("rescaled_proximal_step", cfl_ops.rescaled_proximal_step,
         {"features": x, "labels": labels, "weight": class_weight, "bias": None, "lam": 0.5, "ridge": 0.1, "kappa": 2.0,
          "target_scale": 1.0, "reduction": "mean"}, ()),
        ("ridge_step", cfl_ops.ridge_step, {"features": x, "target": labels, "num_classes": 3, "lam": 0.5, "bias": True,
                                            "reduction": "mean", "sample_weight": None, "fit_bias": "penalized",
                                            "method": "auto"}, ()),
        ("quantize", cfl_ops.quantize, {"w": values, "bits": 6, "per": "tensor", "block_size": None,
                                        "histogram": True}, ()),
        ("dequantize", dequantize, {**quantized._asdict(), "histogram": 0}, ()),
        ("compress", cfl_ops.compress, {"w": values, "floor": 6.0, "probe_bits": 4, "bits": None, "fraction": 0.03,
                                        "per": "tensor", "block_size": None, "nonfinite": "refuse", "max_error": 0.02,
                                        "zero": "centre", "lossless": False}, ()),
        ("decompress", cfl_ops.decompress, {"blob": blob, "out": None, "start": None, "stop": None}, ("out",)),
        ("decompress", cfl_ops.decompress, {"blob": blob, "out": torch.zeros(3, 400), "start": None, "stop": None},
         ("out",)),
        ("compress_delta", cfl_ops.compress_delta, {"new": values, "old": stepped, "effort": "fast"}, ()),
        ("compress_delta", cfl_ops.compress_delta, {"new": stepped, "old": values, "effort": "small"}, ()),
        ("apply_delta", cfl_ops.apply_delta, {"old": values, "delta": delta}, ()),
        ("apply_delta_", cfl_ops.apply_delta_, {"old": values, "delta": delta}, ("old",)),
        ("huffman_encode", cfl_ops.huffman_encode, {"symbols": symbols}, ()),
        ("huffman_decode", cfl_ops.huffman_decode, {"payload": payload, "out": None, "start": 100, "stop": 900},
         ("out",)),
        ("estimate_entropy", cfl_ops.estimate_entropy, {"w": values, "bits": 4, "fraction": 0.5}, ()),
        ("RecursiveRidge.update", recursive, {"features": 4, "targets": 2, "alpha": 1.0, "forgetting": 0.9,
                                              "window": None, "x": x.double(), "y": y.double()}, ()),
        ("RecursiveRidge.update", recursive, {"features": 4, "targets": 2, "alpha": 1.0, "forgetting": 1.0,
                                              "window": 5, "x": x, "y": y}, ()),
    ]  # fmt: skip
    return [_public_target(*row) for row in found]


def _public_target(
    name: str, function: Callable[..., Any], sample: dict[str, Any], writes: tuple[str, ...]
) -> Target:
    known = inspect.signature(function).parameters
    takes_rest = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    names = tuple(key for key in sample if key in known or takes_rest)

    def call(backend: str, *args: Any) -> Any:
        return function(**dict(zip(names, args, strict=True)))

    kinds = tuple("Tensor?" if isinstance(sample[key], Tensor) else "any" for key in names)
    make = functools.partial(list, [sample[key] for key in names])
    positions = tuple(i for i, key in enumerate(names) if key in writes)
    return Target(f"public.{name}", names, kinds, (("sample", make),), call, positions)
