"""The op contract as a table: an op joins the tests of test_contract.py by listing sample inputs.

A module ``tests/<family>/samples.py`` fills SPECS with one ``OpSpec`` for each op: sample inputs (positional
arguments of the op's schema), an oracle in float64 and the error bound that the arithmetic promises.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cfl_ops._core.op import Op
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    """Named sample inputs: ``make(dtype)`` returns the positional arguments of the op."""

    name: str
    make: Callable[[torch.dtype], Sequence[Any]]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    gradcheck: bool = False
    """Small enough, and differentiable at this point."""
    opcheck: bool = True
    """False where the outputs have NaN, which opcheck takes for a difference."""


@dataclass(frozen=True)
class OpSpec:
    op: Op
    cases: Sequence[Case]
    oracle: Callable[..., Sequence[Tensor | None]]
    """The outputs in float64, from the same arguments; None where the bound function says all."""
    bound: Callable[..., Sequence[Tensor | float]]
    """For each output, how far it may be from the oracle (elementwise, or one number)."""
    mutates: tuple[int, ...] = ()
    """Positions of the arguments that the op writes to: the oracle returns them before the outputs."""
    differentiable: tuple[int, ...] = ()
    """Positions of the tensor arguments to differentiate in gradcheck."""
    grad_outputs: int | None = None
    """How many of the outputs, counted from the first, are differentiable; None for all."""
    triton_dtypes: tuple[torch.dtype, ...] = FLOATS
    export_dynamic: Callable[[], tuple[Sequence[Any], Any, Sequence[Any]]] | None = None
    """Sample arguments, their dynamic_shapes, and other arguments to run the exported program on."""
    tags: frozenset[str] = field(default_factory=frozenset)
    unserved: Mapping[str, Sequence[str | torch.dtype]] = field(default_factory=dict)
    """The cases, by their names, and the dtypes that a GPU backend leaves to the fallback: the rest it serves."""

    def leaves(self, case: Case, backend: str, dtype: torch.dtype | None = None) -> bool:
        """Whether a GPU backend leaves the case to the fallback."""
        left = self.unserved.get(backend, ())
        return case.name in left or dtype in left


SPECS: list[OpSpec] = []


def load() -> list[OpSpec]:
    """All specs, from all samples modules."""
    if not SPECS:
        for path in sorted(Path(__file__).parent.glob("*/samples.py")):
            module = importlib.import_module(f"tests.{path.parent.name}.samples")
            SPECS.extend(module.SPECS)
    return SPECS


def clone_args(args: Sequence[Any]) -> list[Any]:
    """Fresh copies of all tensors, keeping their strides."""
    return [_clone(arg) if isinstance(arg, Tensor) else arg for arg in args]


def _clone(tensor: Tensor) -> Tensor:
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor) if 0 not in tensor.stride() or tensor.numel() == 0 else tensor.clone()


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    if out is None:
        return ()
    return (out,) if isinstance(out, Tensor) else tuple(out)


def results(spec: OpSpec, args: Sequence[Any]) -> tuple[Tensor, ...]:
    """What the op wrote and returned, from copies of the arguments."""
    args = clone_args(args)
    out = as_tuple(spec.op(*args))
    return tuple(args[i] for i in spec.mutates if args[i] is not None) + out


def assert_within(got: Sequence[Tensor], want: Sequence[Tensor | None], bounds: Sequence[Any]) -> None:
    """Every element within its bound; NaN only where the oracle has NaN."""
    assert len(got) == len(want) == len(bounds)
    for position, (value, expected, bound) in enumerate(zip(got, want, bounds, strict=True)):
        if expected is None:
            continue
        assert value.shape == expected.shape, f"output {position}: {value.shape} != {expected.shape}"
        value64, expected64 = value.double(), expected.double()
        assert torch.equal(value64.isnan(), expected64.isnan()), f"output {position}: NaN pattern differs"
        finite = ~expected64.isnan()
        error = torch.where(finite & (value64 != expected64), (value64 - expected64).abs(), 0.0)
        excess = error - torch.as_tensor(bound, dtype=torch.float64)
        worst = float(excess.max()) if excess.numel() else 0.0
        assert worst <= 0, (
            f"output {position}: error {float(error.max()):.3e} exceeds its bound by {worst:.3e}"
        )
