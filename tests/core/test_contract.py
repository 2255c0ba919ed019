"""The op contract, for every op and every backend. What is tested comes from the samples.py modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import cfl_ops
import pytest
import torch
from cfl_ops._core import dispatch
from cfl_ops._core.arguments import tensor_rule

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


def differentiable_function(
    spec: contract.OpSpec, case: contract.Case
) -> tuple[Any, tuple[torch.Tensor, ...], list[Any], list[int]]:
    """The op as a function of its differentiable float64 arguments alone, these, all arguments, their positions."""
    args = list(case.make(torch.float64))
    positions = [
        i for i in spec.differentiable if isinstance(args[i], torch.Tensor) and args[i].is_floating_point()
    ]

    def function(*varied: torch.Tensor) -> tuple[torch.Tensor, ...]:
        inputs = list(args)
        for i, value in zip(positions, varied, strict=True):
            inputs[i] = value
        return contract.as_tuple(spec.op(*inputs))[: spec.grad_outputs]

    return function, tuple(args[i] for i in positions), args, positions


@pytest.mark.parametrize("spec", BY_OP)
def test_gradients(spec: contract.OpSpec, backend: str) -> None:
    """First and second derivatives in float64 against finite differences."""
    if not spec.differentiable:
        pytest.skip(f"{spec.op.name} takes no part in autograd")
    skip_unless_served(spec, backend, torch.float64)
    cases = [case for case in spec.cases if case.gradcheck]
    assert cases, f"{spec.op.name} is differentiable but lists no sample for gradcheck"
    if backend == "triton":
        # The formulas are Python's on every backend; the interpreter takes minutes over all of them.
        if cfl_ops.config.backend_of(spec.op.name, "cpu") == "composite":
            pytest.skip("slow: run with -m slow (make test-slow)")
        cases = cases[:2]
    check_gradients(spec, cases)


@pytest.mark.slow
@pytest.mark.parametrize("spec", BY_OP)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_gradients_of_ops_made_of_ops(spec: contract.OpSpec, backend: str) -> None:
    if not spec.differentiable or cfl_ops.config.backend_of(spec.op.name, "cpu") != "composite":
        pytest.skip(f"{spec.op.name} is in test_gradients")
    check_gradients(spec, [case for case in spec.cases if case.gradcheck][:2])


def check_gradients(spec: contract.OpSpec, cases: Sequence[contract.Case]) -> None:
    for case in cases:
        function, values, args, positions = differentiable_function(spec, case)
        tensors = [value.detach().clone().requires_grad_() for value in values]
        results = contract.as_tuple(spec.op(*args[: positions[0]], tensors[0], *args[positions[0] + 1 :]))
        passes = spec.grad_outputs if spec.grad_outputs is not None else len(results)
        assert [r.requires_grad for r in results] == [i < passes for i in range(len(results))]
        # fast_mode compares along random directions: of all derivatives at once, and in seconds.
        assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("spec", BY_OP)
def test_forward_mode(spec: contract.OpSpec, backend: str) -> None:
    """jvp against finite differences, and Hessians by every order of forward and reverse mode against each other."""
    if not spec.differentiable:
        pytest.skip(f"{spec.op.name} takes no part in autograd")
    if backend == "triton":
        pytest.skip("the formulas are Python's on every backend")
    skip_unless_served(spec, backend, torch.float64)
    for case in [case for case in spec.cases if case.gradcheck][:2]:
        function, values, *_ = differentiable_function(spec, case)
        leaves = [value.detach().clone().requires_grad_() for value in values]
        assert torch.autograd.gradcheck(
            function, leaves, fast_mode=True, check_forward_ad=True, check_backward_ad=False
        )
        torch.manual_seed(0)
        along = torch.randn_like(values[0])

        def loss(t: torch.Tensor, function=function, values=values, along=along) -> torch.Tensor:
            outputs = function(values[0] + t * along, *values[1:])
            return sum((out.cos() + out.pow(3)).sum() for out in outputs)

        at, grad, forward = torch.zeros((), dtype=torch.float64), torch.func.grad, torch.func.jacfwd
        want = grad(grad(loss))(at)
        scale = max(1.0, float(want.abs()))
        for second in (forward(grad(loss)), grad(forward(loss)), forward(forward(loss))):
            torch.testing.assert_close(second(at), want, rtol=0, atol=1e-9 * scale)
        torch.testing.assert_close(torch.func.hessian(loss)(at), want, rtol=0, atol=1e-9 * scale)


@pytest.mark.parametrize("spec", BY_OP)
def test_autocast(spec: contract.OpSpec, backend: str) -> None:
    """Autocast changes nothing: values and gradients are those without it."""
    if backend == "triton":
        pytest.skip("on a CPU autocast is asked about the CPU's kernels")
    skip_unless_served(spec, backend)
    for case in spec.cases:
        if torch.float32 not in case.dtypes:
            continue
        args = case.make(torch.float32)
        want = contract.results(spec, args)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = contract.results(spec, args)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)
        if not (spec.differentiable and case.gradcheck):
            continue
        gradients = []
        for enabled in (False, True):
            leaves = contract.clone_args(args)
            wanted = [leaves[i] for i in spec.differentiable if isinstance(leaves[i], torch.Tensor)]
            wanted = [leaf.requires_grad_() for leaf in wanted if leaf.is_floating_point()]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                outputs = contract.as_tuple(spec.op(*leaves))[: spec.grad_outputs]
                total = sum(out.sum() for out in outputs)
                gradients.append(torch.autograd.grad(total, wanted, allow_unused=True))
        for g, w in zip(*gradients, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0)


MUTATING = [pytest.param(spec, id=spec.op.name) for spec in SPECS if spec.mutates]


@pytest.mark.parametrize("raw", [False, True], ids=["op", "overload"])
@pytest.mark.parametrize("spec", MUTATING)
def test_written_arguments_are_known_to_autograd(spec: contract.OpSpec, raw: bool, backend: str) -> None:
    """Versions count up, for views and in inference mode too; a derivative that would be lost is refused."""
    skip_unless_served(spec, backend)
    call = spec.op.overload if raw else spec.op
    case = spec.cases[0]
    dtype = torch.float32 if torch.float32 in case.dtypes else case.dtypes[0]
    for inference in (False, True):
        args = contract.clone_args(case.make(dtype))
        bases = {i: torch.stack([args[i], args[i]]) for i in spec.mutates if args[i] is not None}
        for i, base in bases.items():
            args[i] = base[0]
        with torch.inference_mode(inference):
            call(*args)
        assert all(base._version == 1 and args[i]._version == 1 for i, base in bases.items())
    with torch.inference_mode():
        args = contract.clone_args(case.make(dtype))
    call(*args)  # what was made in inference mode may be written to outside of it

    for i, value in enumerate(case.make(dtype)):
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
            continue
        args = contract.clone_args(case.make(dtype))
        before = contract.clone_args(args)
        args[i] = args[i].requires_grad_()
        if i not in spec.op.as_data:
            with pytest.raises(RuntimeError, match=r"requires grad, but an update in place"):
                call(*args)
            for arg, copy in zip(args, before, strict=True):
                if isinstance(arg, torch.Tensor):
                    torch.testing.assert_close(arg.detach(), copy, rtol=0, atol=0, equal_nan=True)
            with pytest.raises(RuntimeError, match=r"has a tangent, but an update in place"):
                torch.func.jvp(
                    lambda v, i=i, args=args: (call(*args[:i], v, *args[i + 1 :]), v)[1],
                    (before[i],),
                    (before[i],),
                )
        with torch.no_grad():
            call(*args)

    for i in [i for i in spec.mutates if args[i] is not None and args[i].is_floating_point()]:
        args = contract.clone_args(case.make(dtype))
        product = (torch.ones_like(args[i], requires_grad=True) * args[i]).sum()
        call(*args)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def wrong_calls(spec: contract.OpSpec, args: Sequence[Any]) -> Iterator[tuple[str, str, list[Any]]]:
    """What is wrong, with which argument, and the arguments: each must be refused by every backend."""
    fields = [argument.name for argument in spec.op.overload._schema.arguments]
    types = [str(argument.type) for argument in spec.op.overload._schema.arguments]
    rules = {field: tensor_rule(text) for field, text in spec.op.rule.shapes(args).items()}
    given = [i for i, value in enumerate(args) if isinstance(value, torch.Tensor)]
    names = [name for i in given for name in rules[fields[i]].sizes or ()]

    def but(i: int, value: Any) -> list[Any]:
        changed = contract.clone_args(args)
        changed[i] = value
        return changed

    for i in given:
        value, field, sizes = args[i], fields[i], rules[fields[i]].sizes
        yield "dtype", field, but(i, torch.ones(value.shape, dtype=torch.complex64))
        yield "bool", field, but(i, torch.ones(value.shape, dtype=torch.bool))
        yield "layout", field, but(i, torch.ones(max(value.shape, default=1)).to_sparse())
        if sizes is None:
            continue
        if sizes:
            yield "dimensions", field, but(i, value.flatten()[0] if value.numel() else value.new_zeros(()))
        shared = [other for other in given if other != i and rules[fields[other]].sizes]
        if sizes and shared:
            yield "batch", field, but(i, value.unsqueeze(0).expand(3, *value.shape).clone())
        for dim, size_name in enumerate(reversed(sizes), 1):
            if names.count(size_name) > 1:
                yield (
                    f"size {size_name}",
                    field,
                    but(i, torch.cat([value, value.narrow(-dim, 0, 1)], -dim))
                    if value.shape[-dim]
                    else but(
                        i, value.new_zeros(*value.shape[:-dim], 1, *value.shape[len(value.shape) - dim + 1 :])
                    ),
                )
    for i in spec.op.written:
        value = args[i]
        if value is None or value.numel() < 2:
            continue
        flat = value.flatten()[:1].clone()
        yield "expanded", fields[i], but(i, flat.expand(value.numel()).view(value.shape))
        for j in given:
            if j != i and args[j].shape == value.shape and args[j].dtype == value.dtype:
                changed = contract.clone_args(args)
                changed[j] = changed[i]
                yield "shared memory", fields[i], changed
    for i, kind in enumerate(types):
        if kind == "float":
            yield "NaN", fields[i], but(i, float("nan"))
        elif kind == "int" and fields[i] not in ("start", "acc_dtype"):
            yield "negative", fields[i], but(i, -1)
        elif kind == "str":
            yield "unknown", fields[i], but(i, "nonsense")


@pytest.mark.parametrize("spec", BY_OP)
def test_wrong_arguments_are_refused(spec: contract.OpSpec, backend: str) -> None:
    """By an exception that names op and argument, before anything is changed; nothing crashes."""
    skip_unless_served(spec, backend)
    seen = set()
    for case in spec.cases[:3]:
        dtype = torch.float32 if torch.float32 in case.dtypes else case.dtypes[0]
        for kind, field, args in wrong_calls(spec, case.make(dtype)):
            before = [copy.clone() if isinstance(copy, torch.Tensor) else copy for copy in args]
            with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
                spec.op(*args)
            seen.add(kind)
            assert f"cfl_ops.{spec.op.name}: " in str(caught.value), (kind, field, str(caught.value))
            if kind in ("dtype", "bool", "layout", "expanded", "NaN", "unknown"):
                assert field in str(caught.value), (kind, field, str(caught.value))
            for arg, copy in zip(args, before, strict=True):
                if isinstance(arg, torch.Tensor) and arg.layout is torch.strided:
                    torch.testing.assert_close(arg, copy, rtol=0, atol=0, equal_nan=True)
    assert seen


@pytest.mark.parametrize(("spec", "case"), CASES)
def test_vmap(spec: contract.OpSpec, case: contract.Case, backend: str) -> None:
    """vmap over each tensor argument alone, and over all at once, equals a loop."""
    if "no vmap" in spec.tags:
        pytest.skip("its output sizes depend on the data; vmap refuses")
    skip_unless_served(spec, backend)
    if backend == "triton" and case not in spec.cases[:3]:
        pytest.skip("slow: run with -m slow (make test-slow)")  # the rule is Python's on every backend
    check_vmap(spec, case, backend)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "case"), CASES)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)
def test_vmap_of_all_samples(spec: contract.OpSpec, case: contract.Case, backend: str) -> None:
    if "no vmap" in spec.tags or case in spec.cases[:3]:
        pytest.skip(f"this sample of {spec.op.name} is in test_vmap")
    skip_unless_served(spec, backend)
    check_vmap(spec, case, backend)


def check_vmap(spec: contract.OpSpec, case: contract.Case, backend: str) -> None:
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
