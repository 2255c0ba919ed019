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
        if not re.search(r"\.(_C|demo|command|__main__|triton_kernels|tests|benches|build)\b", info.name):
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


# A page that begins with this is a tutorial: its blocks run one after the other, in one namespace.
ONE_PROGRAM = "<!-- one program -->"


def blocks(page: Path) -> list[tuple[int, str]]:
    """The Python blocks of a page, each with the number of its first line."""
    text = page.read_text()
    return [
        (text[: match.start(1)].count("\n"), match.group(1))
        for match in re.finditer(r"^```python\n(.*?)^```", text, re.S | re.M)
    ]


def is_one_program(page: Path) -> bool:
    return page.read_text().startswith(ONE_PROGRAM)


def run(page: Path, parts: list[tuple[int, str]]) -> None:
    """Run blocks in one namespace; a traceback names the page and its line."""
    namespace = {"__name__": "__page__"}
    for line, code in parts:
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


BLOCKS = [
    pytest.param(page, part, id=f"{page.name}:{part[0]}")
    for page in PAGES
    if not is_one_program(page)
    for part in blocks(page)
]
PROGRAMS = [page for page in PAGES if is_one_program(page)]


@pytest.mark.parametrize(("page", "part"), BLOCKS)
def test_pages(page: Path, part: tuple[int, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block stands alone."""
    monkeypatch.chdir(tmp_path)
    run(page, [part])


@pytest.mark.parametrize("page", PROGRAMS, ids=lambda page: page.name)
def test_tutorials(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks are one program, from top to bottom."""
    pytest.importorskip("sklearn", reason="the tutorials train on scikit-learn's digits")
    monkeypatch.chdir(tmp_path)
    run(page, blocks(page))


LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links(page: Path) -> None:
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing
