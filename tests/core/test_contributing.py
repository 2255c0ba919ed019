"""The op of docs/contributing.md, end to end: its blocks as files in a temporary folder, and the contract on it."""

from __future__ import annotations

import doctest
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import cfl_ops.ops
import pytest
import torch
from cfl_ops._core import dispatch, failures, op

import tests
from tests import contract
from tests.core import test_contract as table

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```py\n# (\S+)\n(.*?)^```", re.S | re.M)
PACKAGES = {"python/cfl_ops/ops": cfl_ops.ops, "tests": tests}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's files, importable as if they lay in the repository; the process forgets the op afterwards."""
    root = tmp_path_factory.mktemp("page")
    for name, text in BLOCK.findall((ROOT / "docs" / "contributing.md").read_text()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    library = torch.library.Library(op.NAMESPACE, "FRAGMENT")  # in the place of LIB, since that cannot forget
    with pytest.MonkeyPatch.context() as patch:
        for folder, package in PACKAGES.items():
            patch.setattr(package, "__path__", [*package.__path__, str(root / folder)])
        patch.setattr(op, "LIB", library)
        importlib.import_module("cfl_ops.ops.toy.scaled_sum")
        dispatch.overrides.install(dispatch.overrides.forced)
        yield root
    op.OPS.pop("scaled_sum")
    failures._EXPLAIN.pop("scaled_sum")
    for device_type in dispatch.DISPATCH_KEYS:
        dispatch.overrides.serving.pop(("scaled_sum", device_type))
    dispatch.overrides.install(dispatch.overrides.forced)
    library._destroy()
    for name in [name for name in sys.modules if re.match(r"(cfl_ops\.ops|tests)\.toy\b", name)]:
        del sys.modules[name]
    for package in PACKAGES.values():
        if hasattr(package, "toy"):
            del package.toy


@pytest.fixture
def spec(page: Path) -> contract.OpSpec:
    (spec,) = importlib.import_module("tests.toy.samples").SPECS
    return spec


def test_every_block_names_its_file(page: Path) -> None:
    text = (ROOT / "docs" / "contributing.md").read_text()
    assert len(BLOCK.findall(text)) == text.count("```py\n") == len(list(page.rglob("*.py")))


@pytest.mark.parametrize("forced", [None, "python"])
def test_the_contract(spec: contract.OpSpec, forced: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What test_contract.py asks of every op, of this one."""
    backend = "python"  # which serves, asked for or not
    with cfl_ops.config.use_backend(forced):
        assert cfl_ops.config.backend_of("scaled_sum", "cpu") == backend
        for case in spec.cases:
            for dtype in case.dtypes:
                table.test_oracle(spec, case, dtype, backend, monkeypatch)
            table.test_strides(spec, case, backend)
            table.test_opcheck(spec, case, backend)
            table.test_vmap(spec, case, backend)
        table.test_gradients(spec, backend)
        table.test_compile_fullgraph(spec, backend)


def test_a_wrong_op_would_fail(spec: contract.OpSpec) -> None:
    """The samples tell a sum from another one."""
    case = spec.cases[0]
    args = case.make(torch.float32)
    got = contract.results(spec, [args[0], 1.001 * args[1]])
    with pytest.raises(AssertionError, match="exceeds its bound"):
        contract.assert_within(got, spec.oracle(*args), spec.bound(*args))


def test_its_own_tests(page: Path) -> None:
    """And the example in its docstring."""
    own = importlib.import_module("tests.toy.test_ops")
    checks = [getattr(own, name) for name in dir(own) if name.startswith("test_")]
    assert len(checks) == 2
    for check in checks:
        check()
    result = doctest.testmod(importlib.import_module("cfl_ops.ops.toy.scaled_sum"))
    assert result.attempted
    assert not result.failed


def test_its_bench(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benches")
    module = _import(page / "benches" / "bench_toy.py")
    ratio = sys.modules["_ratio"]
    monkeypatch.setattr(ratio, "ROWS", [])
    module.compare = functools.partial(ratio.compare, budget=0.0)  # type: ignore[attr-defined]
    benchmark: Any = SimpleNamespace(group="toy", extra_info={}, pedantic=lambda function, **_: function())
    module.bench_scaled_sum(benchmark, 30, 7)
    (row,) = ratio.ROWS
    assert row["speedup"] > 0
    assert row["peer"] in ("sum", "float64 sum")


def _import(path: Path) -> ModuleType:
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
