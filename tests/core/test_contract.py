"""The op contract, for every op and every backend. What is tested comes from the samples.py modules."""

from __future__ import annotations

import cfl_ops
import pytest
import torch
from cfl_ops._core import dispatch

from tests import contract

SPECS = contract.load()
CASES = [
    pytest.param(spec, case, id=f"{spec.op.name}-{case.name.replace(' ', '_')}")
    for spec in SPECS
    for case in spec.cases
]
TYPED = [
    pytest.param(spec, case, dtype, id=f"{spec.op.name}-{case.name.replace(' ', '_')}-{str(dtype)[6:]}")
    for spec in SPECS
    for case in spec.cases
    for dtype in case.dtypes
]
BY_OP = [pytest.param(spec, id=spec.op.name) for spec in SPECS]


def skip_unless_served(spec: contract.OpSpec, backend: str, dtype: torch.dtype = torch.float32) -> None:
    if cfl_ops.config.backend_of(spec.op.name, "cpu") not in (backend, "composite"):
        pytest.skip(f"{spec.op.name} has no {backend} kernel")
    if backend == "triton" and dtype not in spec.triton_dtypes:
        pytest.skip(f"the Triton interpreter cannot do {dtype} dots")


def test_every_op_has_samples() -> None:
    """An op that nobody lists here would go untested."""
    from cfl_ops._core.op import OPS

    assert {spec.op.name for spec in SPECS} == set(OPS)


@pytest.mark.parametrize(("spec", "case", "dtype"), TYPED)
def test_oracle(
    spec: contract.OpSpec,
    case: contract.Case,
    dtype: torch.dtype,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within its error bound of float64, on every backend and dtype; by the backend's kernel if it says so."""
    skip_unless_served(spec, backend, dtype)
    args = case.make(dtype)
    before = contract.clone_args(args)
    left: list[str] = []
    fall_back = dispatch.fall_back
    monkeypatch.setattr(dispatch, "fall_back", lambda op, a: (left.append(op.name), fall_back(op, a))[1])
    got = contract.results(spec, args)
    assert (spec.op.name in left) == (backend == "triton" and spec.leaves(case, backend, dtype))
    for arg, copy in zip(args, before, strict=True):
        if isinstance(arg, torch.Tensor):
            assert torch.equal(arg.nan_to_num(7), copy.nan_to_num(7)), "an input was changed"
    contract.assert_within(got, spec.oracle(*args), spec.bound(*args))


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_strides(spec: contract.OpSpec, case: contract.Case, backend: str) -> None:
    """Column-major, strided and expanded inputs give what contiguous ones give (within the bound)."""
    skip_unless_served(spec, backend)
    args = case.make(torch.float32 if torch.float32 in case.dtypes else case.dtypes[0])
    want, bounds = spec.oracle(*args), spec.bound(*args)

    def column_major(t: torch.Tensor) -> torch.Tensor:
        return t.mT.contiguous().mT if t.ndim >= 2 else t

    def every_other(t: torch.Tensor) -> torch.Tensor:
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), 1e6 if t.is_floating_point() else 0)
        wide[..., ::2] = t
        return wide[..., ::2]

    for change in (column_major, every_other):
        changed = [
            change(a) if isinstance(a, torch.Tensor) and a.ndim and i not in spec.mutates else a
            for i, a in enumerate(args)
        ]
        contract.assert_within(contract.results(spec, changed), want, bounds)
    if spec.mutates:
        changed = list(args)
        for i in spec.mutates:
            if args[i] is not None:
                changed[i] = column_major(args[i])
        contract.assert_within(contract.results(spec, changed), want, bounds)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_opcheck(spec: contract.OpSpec, case: contract.Case, backend: str) -> None:
    """torch's own check of schema, fake, autograd registration and AOT dispatch with dynamic shapes."""
    if backend == "triton":
        pytest.skip("opcheck asks about the op's Python life, which both other backends show")
    skip_unless_served(spec, backend)
    if not case.opcheck:
        pytest.skip("opcheck compares outputs, and takes NaN for a difference")
    dtype = torch.float32 if torch.float32 in case.dtypes else case.dtypes[0]
    args = contract.clone_args(case.make(dtype))
    torch.library.opcheck(spec.op.overload, tuple(args))


@pytest.mark.parametrize("spec", BY_OP)
def test_gradients(spec: contract.OpSpec, backend: str) -> None:
    """First and second derivatives in float64 against finite differences."""
    if not spec.differentiable:
        pytest.skip(f"{spec.op.name} takes no part in autograd")
    skip_unless_served(spec, backend, torch.float64)
    cases = [case for case in spec.cases if case.gradcheck]
    assert cases, f"{spec.op.name} is differentiable but lists no sample for gradcheck"
    for case in cases:
        args = list(case.make(torch.float64))
        positions = [
            i
            for i in spec.differentiable
            if isinstance(args[i], torch.Tensor) and args[i].is_floating_point()
        ]
        tensors = [args[i].detach().clone().requires_grad_() for i in positions]

        def function(*varied: torch.Tensor, args=args, positions=positions) -> tuple[torch.Tensor, ...]:
            inputs = list(args)
            for i, value in zip(positions, varied, strict=True):
                inputs[i] = value
            return contract.as_tuple(spec.op(*inputs))[: spec.grad_outputs]

        results = contract.as_tuple(spec.op(*args[: positions[0]], tensors[0], *args[positions[0] + 1 :]))
        passes = spec.grad_outputs if spec.grad_outputs is not None else len(results)
        assert [r.requires_grad for r in results] == [i < passes for i in range(len(results))]
        # fast_mode compares along random directions: of all derivatives at once, and in seconds.
        assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_vmap(spec: contract.OpSpec, case: contract.Case, backend: str) -> None:
    """vmap over each tensor argument alone, and over all at once, equals a loop."""
    if "no vmap" in spec.tags:
        pytest.skip("its output sizes depend on the data; vmap refuses")
    skip_unless_served(spec, backend)
    dtype = torch.float32 if torch.float32 in case.dtypes else case.dtypes[0]
    args = case.make(dtype)
    tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]
    groups = [tensors] if spec.mutates else [[i] for i in tensors] + [tensors]
    if backend == "triton":
        groups = groups[-1:]  # the interpreter is slow, and the vmap rule is Python's
    for mapped in groups:
        stacked = contract.clone_args(args)
        dims: list[int | None] = [None] * len(args)
        for i in mapped:
            dims[i] = -1 if args[i].ndim and i not in spec.mutates else 0
            pair = (args[i], args[i].flip(-1) if args[i].ndim else args[i])
            stacked[i] = torch.stack(pair, dim=dims[i])
        singles = [
            [s.select(d, n) if d is not None else s for s, d in zip(stacked, dims, strict=True)]
            for n in range(2)
        ]
        want = [contract.results(spec, single) for single in singles]
        bounds = [spec.bound(*single) for single in singles]  # before vmap writes to what these view
        out = contract.as_tuple(torch.vmap(spec.op, in_dims=tuple(dims))(*stacked))
        got = tuple(stacked[i] for i in spec.mutates if args[i] is not None) + out
        for n in range(2):
            twice = [2 * torch.as_tensor(b) for b in bounds[n]]
            contract.assert_within([g[n] for g in got], want[n], twice)


@pytest.mark.parametrize("spec", BY_OP)
def test_compile_fullgraph(spec: contract.OpSpec, backend: str) -> None:
    """One graph without a break, with dynamic shapes, and equal to eager."""
    skip_unless_served(spec, backend)
    for case in spec.cases[:2]:
        args = case.make(torch.float32)
        want = contract.results(spec, args)
        compiled = torch.compile(lambda *a: spec.op(*a), fullgraph=True, backend="aot_eager", dynamic=True)
        inputs = contract.clone_args(args)
        out = contract.as_tuple(compiled(*inputs))
        got = tuple(inputs[i] for i in spec.mutates if inputs[i] is not None) + out
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spec", BY_OP)
def test_export(spec: contract.OpSpec, backend: str) -> None:
    """torch.export with a dynamic number of rows; the program runs on another number of them."""
    if spec.export_dynamic is None:
        pytest.skip(f"{spec.op.name} lists no sample for export")
    skip_unless_served(spec, backend)

    args, dynamic_shapes, others = spec.export_dynamic()
    tensors = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor)]

    class Module(torch.nn.Module):
        def forward(self, *given):
            full = list(args)
            for i, value in zip(tensors, given, strict=True):
                full[i] = value
            return spec.op(*full)

    def chosen(values):
        return tuple(contract.clone_args([values[i] for i in tensors]))

    program = torch.export.export(Module(), chosen(args), dynamic_shapes={"given": dynamic_shapes})
    got = contract.as_tuple(program.module()(*chosen(others)))
    want = contract.as_tuple(spec.op(*contract.clone_args(others)))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)
