"""What the documentation says runs: docstring examples, and the Python blocks of README.md and docs/*.md."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import cfl_ops
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def modules() -> list[str]:
    names = ["cfl_ops"]
    for info in pkgutil.walk_packages(cfl_ops.__path__, "cfl_ops."):
        if not re.search(r"\.(_C|demo|__main__|triton_kernels|tests|benches|build)\b", info.name):
            names.append(info.name)
    return names


@pytest.mark.parametrize("name", modules())
def test_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


CLASSES = [name for name in cfl_ops.__all__ if getattr(getattr(cfl_ops, name), "__module__", "") == "cfl_ops"]


@pytest.mark.parametrize("name", CLASSES)
def test_docstrings_of_classes(name: str) -> None:
    """They call themselves cfl_ops's, so that doctest does not find them where they are defined."""
    for test in doctest.DocTestFinder().find(getattr(cfl_ops, name), name, module=False, globs={}):
        assert doctest.DocTestRunner().run(test).failed == 0


BLOCKS = [
    pytest.param(match.group(1), id=f"{page.name}:{page.read_text()[: match.start()].count(chr(10)) + 1}")
    for page in PAGES
    for match in re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)
]


@pytest.mark.parametrize("code", BLOCKS)
def test_pages(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block stands alone."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "<page>", "exec"), {"__name__": "__page__"})
