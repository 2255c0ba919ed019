"""torch.compile and torch.export of every public function: one graph for any number of rows, with eager's checks."""

from __future__ import annotations

import copy
import inspect
import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cfl_ops
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests import contract
from tests.core.compiled_calls import CALLS, CANNOT, Call, data, factor, labels, step, systems

ROOT = Path(__file__).parents[2]
FIRST, *OTHERS = 9, 16, 21
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
BY_CALL = [
    pytest.param(call, id=call.name.replace(" ", "_"), marks=[pytest.mark.slow] if call.slow else [])
    for call in CALLS
]


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> None:
    torch.compiler.reset()


def leaves(result: Any) -> list[Tensor]:
    """The tensors of a result; parameters as what they hold."""
    found = [value for value in pytree.tree_leaves(result) if isinstance(value, Tensor)]
    return [value.detach() if isinstance(value, torch.nn.Parameter) else value for value in found]


def assert_same(got: Any, want: Any, exact: bool) -> None:
    got, want = leaves(got), leaves(want)
    assert len(got) == len(want)
    for mine, other in zip(got, want, strict=True):
        options = {"rtol": 0, "atol": 0} if exact else {}
        torch.testing.assert_close(mine, other, equal_nan=True, **options)


def test_every_function_is_listed() -> None:
    """A new function is compiled and exported here, or named with what keeps it from that."""
    functions = {name for name in cfl_ops.__all__ if inspect.isfunction(getattr(cfl_ops, name))}
    compiled = {call.name.split(":")[0] for call in CALLS if "." not in call.name}
    cannot = {name for name in CANNOT if name in functions}
    assert compiled | cannot == functions
    assert not compiled & cannot


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("call", BY_CALL)
def test_one_graph_for_any_number_of_rows(call: Call, backend: str) -> None:
    compiled = torch.compile(call.bound(), fullgraph=True, dynamic=True, backend=backend)
    function = call.bound()
    for rows in (FIRST, *OTHERS):
        args = call.make(rows)
        given = contract.clone_args(args)
        with torch.compiler.set_stance("default" if rows == FIRST else "fail_on_recompile"):
            got = compiled(*given)
        mine = contract.clone_args(args)
        assert_same([got, given], [function(*mine), mine], call.exact and backend == "aot_eager")


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("call", BY_CALL)
def test_exported_program(call: Call, strict: bool) -> None:
    """It serves other numbers of rows, also after it was saved and loaded."""

    class Module(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = call.model() if call.model else None

        def forward(self, *args: Tensor) -> Any:
            return call.function(self.model, *args) if self.model else call.function(*args)

    args, others = tuple(call.make(FIRST)), call.make(OTHERS[0])
    rows = [
        {dim: torch.export.Dim.DYNAMIC for dim, size in enumerate(arg.shape) if other.shape[dim] != size}
        for arg, other in zip(args, others, strict=True)
    ]
    exported = torch.export.export(Module(), args, dynamic_shapes={"args": tuple(rows)}, strict=strict)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    for program in (exported, torch.export.load(file)):
        module, function = program.module(), call.bound()
        for number in OTHERS:
            args = call.make(number)
            given, mine = contract.clone_args(args), contract.clone_args(args)
            assert_same([module(*given), given], [function(*mine), mine], call.exact)


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_says_so(name: str) -> None:
    """It does not compile as one graph, its docstring says why, and the README lists it."""
    reason, call = CANNOT[name]
    with pytest.raises(Exception) as caught:
        torch.compile(call, fullgraph=True, backend="aot_eager")()
    assert type(caught.value).__module__.startswith(("torch._dynamo", "torch.fx")), caught.value
    function: Any = cfl_ops
    for part in name.split()[0].split("."):
        function = getattr(function, part)
    assert "Not under ``fullgraph=True`` nor ``torch.export``" in (function.__doc__ or "")
    assert (
        f"| `{name.split()[0]}`{name[len(name.split()[0]) :]} | {reason} |"
        in (ROOT / "README.md").read_text()
    )


# What eager refuses: the function of one number or tensor, the bad value, and the error.
Refused = tuple[str, Callable[[Any], Any], Any, type[Exception], str]
x, y = data(9)
classes, (matrix, right), (L, V), rows_of_step = labels(9), systems(1), factor(1), step(9)
ones, not_a_number = torch.ones(9), torch.tensor(math.nan)
NUMBERS = (-1.0, math.nan, math.inf)
COEFFICIENTS: dict[str, Callable[[Any], Any]] = {
    "ridge: lam": lambda v: cfl_ops.ridge(x, y, v),
    "ridge_solve: lam": lambda v: cfl_ops.ridge_solve(matrix, right, v),
    "ridge_solve_ex: lam": lambda v: cfl_ops.ridge_solve_ex(matrix, right, v),
    "lstsq: rtol": lambda v: cfl_ops.lstsq(x, y, rtol=v),
    "lstsq_ex: rtol": lambda v: cfl_ops.lstsq_ex(x, y, rtol=v),
    "pinv: atol": lambda v: cfl_ops.pinv(x, atol=v),
    "pinv_ex: rtol": lambda v: cfl_ops.pinv_ex(x, rtol=v),
    "factorize: rtol": lambda v: cfl_ops.factorize(x, rtol=v).solve(y),
    "class_ridge: lam": lambda v: cfl_ops.class_ridge(x, classes, v, num_classes=3),
    "class_ridge: prox": lambda v: cfl_ops.class_ridge(
        x, classes, 1.0, num_classes=3, prox=v, weight=randn43
    ),
    "proximal_step: lam": lambda v: cfl_ops.proximal_step(*rows_of_step, lam=v),
    "proximal_step_ex: ridge": lambda v: cfl_ops.proximal_step_ex(*rows_of_step, lam=1.0, ridge=v),
    "proximal_update: lam": lambda v: cfl_ops.proximal_update(*rows_of_step, lam=v),
    "ridge_step: lam": lambda v: cfl_ops.ridge_step(*rows_of_step[:2], 3, lam=v),
    "rescaled_proximal_step: lam": lambda v: cfl_ops.rescaled_proximal_step(*rows_of_step, lam=v),
    "GramMoments.decay: rho": lambda v: cfl_ops.gram(x).decay(v),
}
randn43 = torch.randn(4, 3)
FACTORS: dict[str, Callable[[Any], Any]] = {
    "class_ridge: scale": lambda v: cfl_ops.class_ridge(x, classes, 1.0, num_classes=3, scale=v),
    "rescaled_proximal_step: target_scale": lambda v: cfl_ops.rescaled_proximal_step(
        *rows_of_step, lam=1.0, target_scale=v
    ),
}
LAMS: dict[str, Callable[[Any], Any]] = {
    "ridge_path": lambda v: cfl_ops.ridge_path(x, y, v),
    "ridge_cv": lambda v: cfl_ops.ridge_cv(x, y, v),
}
# Numbers that the op itself takes as such.
OF_OPS: dict[str, Callable[[Any], Any]] = {
    "rescaled_proximal_step: kappa": lambda v: cfl_ops.rescaled_proximal_step(
        *rows_of_step, lam=1.0, kappa=v
    ),
    "class_ridge: kappa": lambda v: cfl_ops.class_ridge(x, classes, 1.0, num_classes=3, kappa=v),
    "gram_: decay": lambda v: cfl_ops.gram_(cfl_ops.gram(x), x, decay=v),
    "cholesky_update: decay": lambda v: cfl_ops.cholesky_update(L, V, decay=v),
    "cholesky_update_ex: decay": lambda v: cfl_ops.cholesky_update_ex(L, V, decay=v),
    "safe_cholesky: max_jitter": lambda v: cfl_ops.safe_cholesky(matrix, max_jitter=v),
}


def numbers_for(name: str) -> tuple[float, ...]:
    """What is refused: all of it for one function, as one check serves them all."""
    return NUMBERS if name in ("lstsq: rtol", "ridge_path") else NUMBERS[:1]


def bad_row(values: Tensor, value: float) -> Tensor:
    changed = values.clone()
    changed[4] = value
    return changed


models = {"update": cfl_ops.RecursiveRidge(4, 2), "remove": cfl_ops.RecursiveRidge(4, 2)}
models["remove"].update(x, y)


def recursive(method: str, *args: Tensor) -> tuple[Any, ...]:
    model = models[method]
    return getattr(model, method)(*args), model.factor, model.wide_weight


REFUSED: list[Refused] = [
    *((name, call, v, ValueError, "must be finite and not negative, but got") for name, call in COEFFICIENTS.items()
      for v in numbers_for(name)),
    *((name, call, v, ValueError, "must be finite and positive, but got") for name, call in FACTORS.items()
      for v in (0.0, -1.0)),
    *((name, call, [v, 1.0], ValueError, "lams must be finite and not negative, but got") for name, call in LAMS.items()
      for v in numbers_for(name)),
    *((name, call, torch.tensor([-1.0, 1.0]), ValueError, "lams must be finite and not negative, but got [-1.0, 1.0]")
      for name, call in LAMS.items()),
    *((name, call, torch.tensor(v), ValueError, "must be finite and not negative")
      for name, call in COEFFICIENTS.items() if "_ex" not in name and not name.startswith("GramMoments")
      for v in numbers_for(name)),
    ("gram: sample_weight", lambda v: cfl_ops.gram(x, sample_weight=v), bad_row(ones, -1), ValueError,
     "sample_weight must not be negative or NaN, but got -1.0 in row 4"),
    ("gram: y", lambda v: cfl_ops.gram(x, v, num_classes=3), bad_row(classes, 3), IndexError,
     "class indices from 0 to 2, but got 3 in row 4"),
    ("gram: x", lambda v: cfl_ops.gram(v, acc_dtype=torch.float64), bad_row(x, math.nan), ValueError,
     "x has 4 NaN or Inf values"),
    ("linear_gram: y", lambda v: cfl_ops.linear_gram(x, randn43.mT, None, "relu", v, num_classes=3),
     bad_row(classes, -1), IndexError, "class indices from 0 to 2, but got -1 in row 4"),
    ("gram_: y", lambda v: cfl_ops.gram_(cfl_ops.gram(x, classes, num_classes=3), x, v), bad_row(classes, 3),
     IndexError, "class indices from 0 to 2, but got 3 in row 4"),
    ("class_ridge: y", lambda v: cfl_ops.class_ridge(x, v, 1.0, num_classes=3), bad_row(classes, 3), IndexError,
     "class indices from 0 to 2, but got 3 in row 4"),
    ("proximal_step: target", lambda v: cfl_ops.proximal_step(rows_of_step[0], v, *rows_of_step[2:], lam=1.0),
     bad_row(classes, 3), IndexError, "but got 3 in row 4"),
    ("proximal_step_: target", lambda v: (
        weight := rows_of_step[2].clone(), cfl_ops.proximal_step_(rows_of_step[0], v, weight, lam=1.0)
     )[0], bad_row(classes, 3), IndexError, "but got 3 in row 4"),
    ("proximal_step: sample_weight", lambda v: cfl_ops.proximal_step(*rows_of_step, lam=1.0, sample_weight=v),
     bad_row(ones, -1), ValueError, "sample_weight must be finite and not negative"),
    ("rescaled_proximal_step: labels", lambda v: cfl_ops.rescaled_proximal_step(
        rows_of_step[0], v, *rows_of_step[2:], lam=1.0, kappa=2.0
     ), bad_row(classes, 3), IndexError, "but got 3 in row 4"),
    ("rescaled_proximal_step: features", lambda v: cfl_ops.rescaled_proximal_step(
        v, *rows_of_step[1:], lam=1.0, kappa=2.0
     ), bad_row(rows_of_step[0], math.inf), ValueError, "features has NaN or Inf in row 4"),
    *((name, call, bad_row(x, math.nan), torch.linalg.LinAlgError, "NaN or Inf") for name, call in {
        "ridge: x": lambda v: cfl_ops.ridge(v, y, 1.0), "lstsq: a": lambda v: cfl_ops.lstsq(v, y),
        "pinv: a": cfl_ops.pinv, "ridge_path: x": lambda v: cfl_ops.ridge_path(v, y, [1.0]),
        "ridge_cv: x": lambda v: cfl_ops.ridge_cv(v, y, [1.0]),
        "factorize: a": lambda v: cfl_ops.factorize(v).solve(y),
        "factorize.rank: a": lambda v: cfl_ops.factorize(v).rank,
        "factorize.pinv: a": lambda v: cfl_ops.factorize(v.double()).pinv(),
    }.items()),
    *((name, call, bad_row(x, math.nan), ValueError, "4 NaN or Inf values") for name, call in {
        "quantize: w": cfl_ops.quantize, "estimate_entropy: w": cfl_ops.estimate_entropy,
    }.items()),
    ("ridge_solve: gram", lambda v: cfl_ops.ridge_solve(v, right, 0.0), -matrix, torch.linalg.LinAlgError,
     "not positive definite"),
    ("cholesky_update: V", lambda v: cfl_ops.cholesky_update(L, v), V * math.nan, ValueError, "V has NaN or Inf"),
    ("cholesky_downdate: V", lambda v: cfl_ops.cholesky_downdate(L, v), 9 * V, torch.linalg.LinAlgError,
     "not positive definite to working precision"),
    ("safe_cholesky: a", cfl_ops.safe_cholesky, -matrix, torch.linalg.LinAlgError, "not positive semi-definite"),
    ("spd_inverse: a", cfl_ops.spd_inverse, matrix * math.nan, ValueError, "a has NaN or Inf"),
    ("RecursiveRidge.update: x", lambda v: recursive("update", v, y), bad_row(x, math.inf), ValueError,
     "x has NaN or Inf in row 4"),
    ("RecursiveRidge.update: y", lambda v: recursive("update", x, v), bad_row(y, math.nan), ValueError,
     "y has NaN or Inf in row 4"),
    ("RecursiveRidge.update: sample_weight", lambda v: recursive("update", x, y, v), bad_row(ones, -1), ValueError,
     "sample_weight must be finite and not negative"),
    ("RecursiveRidge.remove: x", lambda v: recursive("remove", v, y), 99 * x, torch.linalg.LinAlgError,
     "x holds more than the state does"),
]  # fmt: skip


def refusals(table: Sequence[Refused]) -> list[Any]:
    return [
        pytest.param(
            *row, id=f"{row[0]}_{row[2] if not isinstance(row[2], Tensor) or row[2].ndim == 0 else ''}"
        )
        for row in table
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "call", "value", "error", "text"), refusals(REFUSED))
def test_a_graph_refuses_what_eager_refuses(
    name: str, call: Callable[[Any], Any], value: Any, error: type[Exception], text: str, backend: str
) -> None:
    """With the same error, whether a number is a constant of the graph or an input; from each result alone."""
    with pytest.raises(error, match=re.escape(text)) as eager:
        call(value)
    number = isinstance(value, float | list) or value.ndim == 0
    results = 1 if number or backend == "inductor" else len(leaves(call(good(value))))
    assert results
    # One number stands for all of them as a constant; a tensor is the same in either.
    for dynamic in (False, True) if number and name in ("lstsq: rtol", "ridge: lam") else (True,):
        for index in {0, results - 1}:
            torch.compiler.reset()
            alone = torch.compile(
                lambda v, index=index: leaves(call(v))[index],
                fullgraph=True,
                dynamic=dynamic,
                backend=backend,
            )
            with pytest.raises(error) as caught:
                alone(value)
            assert str(caught.value) == str(eager.value)


def good(value: Any) -> Any:
    """Something of the same kind that is not refused."""
    if isinstance(value, list):
        return [1.0] * len(value)
    if value.ndim == 0 or not value.is_floating_point() or value.shape == (2,):
        return torch.ones_like(value)
    if value.ndim == 3:
        return 0.1 * V if value.shape == V.shape else matrix
    return 1e-3 * x if value.shape == x.shape else torch.rand(value.shape)


@pytest.mark.parametrize("value", [-1.0, math.nan])
@pytest.mark.parametrize("name", OF_OPS)
def test_numbers_of_ops(name: str, value: float) -> None:
    """A constant of the graph is refused when it is traced; an input by the op."""
    call = OF_OPS[name]
    with pytest.raises(ValueError, match=name.split(": ")[1]) as eager:
        call(value)
    with pytest.raises(Exception, match="cfl_ops") as caught:
        torch.compile(lambda: call(value), fullgraph=True, backend="aot_eager")()
    assert str(eager.value) in str(caught.value)


@pytest.mark.parametrize("name", OF_OPS)
def test_numbers_of_ops_that_are_inputs(name: str) -> None:
    compiled = torch.compile(OF_OPS[name], fullgraph=True, dynamic=True, backend="aot_eager")
    compiled(0.5)
    with pytest.raises(Exception, match=name.split(": ")[1]):
        compiled(-1.0)


SCHEDULES = {**COEFFICIENTS, **FACTORS, **{name: lambda v, f=f: f([v, 1.0]) for name, f in LAMS.items()}}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_does_not_compile_again(name: str) -> None:
    compiled = torch.compile(SCHEDULES[name], fullgraph=True, dynamic=True, backend="aot_eager")
    for value in (0.5, 0.25, 3.0):
        with torch.compiler.set_stance("default" if value == 0.5 else "fail_on_recompile"):
            assert_same(compiled(value), SCHEDULES[name](value), exact=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Callable[[], Any], backend: str) -> None:
    def all_of_it(a: Tensor, b: Tensor) -> Any:
        return (
            cfl_ops.lstsq(a, b),
            cfl_ops.pinv(a),
            cfl_ops.ridge(a, b, 0.5),
            cfl_ops.ridge_path(a, b, [0.0, 1.0]),
        )

    compiled = torch.compile(all_of_it, fullgraph=True, backend=backend)
    with mode():
        a, b = data(9)
        assert_same(compiled(a, b), all_of_it(a, b), exact=False)


DIFFERENTIATED = {
    "ridge": lambda a, b: cfl_ops.ridge(a, b, 0.5, bias=True),
    "ridge_path": lambda a, b: cfl_ops.ridge_path(a, b, [0.5, 1.0]),
    "ridge_solve": lambda a, b: cfl_ops.ridge_solve(a.mT @ a, a.mT @ b, 0.5),
    "lstsq": cfl_ops.lstsq,
    "pinv": lambda a, b: cfl_ops.pinv(a) @ b,
    "factorize": lambda a, b: cfl_ops.factorize(a).solve(b),
    "gram": cfl_ops.gram,
    "proximal_step": lambda a, b: cfl_ops.proximal_step(a, b, 0.1 * a[:2], lam=0.5),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_gradients(name: str, dtype: torch.dtype, backend: str) -> None:
    function = DIFFERENTIATED[name]

    def gradients(run: Callable[..., Any]) -> tuple[Any, ...]:
        a, b = (value.to(dtype).requires_grad_() for value in data_of(name))
        total = sum(value.double().square().sum() for value in leaves(run(a, b)) if value.requires_grad)
        return torch.autograd.grad(total, (a, b), allow_unused=True)

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    assert_same(gradients(compiled), gradients(function), exact=False)


def data_of(name: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(9, 4, generator=generator), torch.randn(9, 2, generator=generator)


def test_state_is_kept_when_a_graph_raises() -> None:
    """A module that is updated by a compiled step is as it was when the step raises."""
    for model, update in (
        (cfl_ops.RecursiveRidge(4, 2), lambda model, x, y: model.update(x, y)),
        (cfl_ops.learn.ClosedFormLinear(4, 2), lambda model, x, y: model.update(x, y)),
    ):
        compiled = torch.compile(
            lambda x, y, m=model, f=update: f(m, x, y), fullgraph=True, backend="aot_eager"
        )
        compiled(x, y)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="NaN or Inf in row 4"):
            compiled(bad_row(x, math.nan), y)
        with pytest.raises(ValueError, match="NaN or Inf in row 4"):
            compiled(x, bad_row(y, math.nan))
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])
