"""Backends: which serves what, how one is forced, and what happens when it cannot."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import cfl_ops
import pytest
import torch
from cfl_ops._core import dispatch
from cfl_ops._core.op import OPS
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).parents[2]
SETTINGS = ("CFL_OPS_BACKEND", "CFL_OPS_ISA", "TRITON_INTERPRET")


def run(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in SETTINGS}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True, check=False
    )


def test_version_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert cfl_ops.__version__ == project["project"]["version"]


def test_show_names_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    cfl_ops.config.show()
    text = capsys.readouterr().out
    for name in OPS:
        assert name in text
    assert torch.__version__ in text


def test_use_backend_switches_and_restores() -> None:
    before = cfl_ops.config.get_backend()
    with cfl_ops.config.use_backend("python"):
        assert cfl_ops.config.backend_of("gram", "cpu") == "python"
    assert cfl_ops.config.get_backend() == before


def test_environment_forces_a_backend() -> None:
    code = "import cfl_ops; print(cfl_ops.config.backend_of('gram', 'cpu'))"
    assert run(code, CFL_OPS_BACKEND="python").stdout.strip() == "python"
    assert run(code, CFL_OPS_BACKEND="triton", TRITON_INTERPRET="1").stdout.strip() == "triton"


def test_a_backend_that_cannot_serve_raises_when_called() -> None:
    code = "import torch, cfl_ops; cfl_ops.gram(torch.ones(2, 2))"
    error = run(code, CFL_OPS_BACKEND="triton").stderr
    assert "cfl_ops.gram: the backend 'triton' was asked for, but it cannot serve cpu tensors" in error
    assert "TRITON_INTERPRET=1" in error


def test_every_kernel_runs_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which need not be the current one, on which Triton would launch it."""
    current, seen, put = [0], [], {}

    @contextlib.contextmanager
    def device(index: int):
        before, current[0] = current[0], index
        yield
        current[0] = before

    class Spy:
        def impl(self, name, kernel, key, **_) -> None:
            put[name, key] = kernel

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(
        dispatch, "_choose", lambda op, *_: ("triton", lambda *args: seen.append((op.name, current[0])))
    )
    overrides = dispatch._Overrides()
    overrides._put_kernels(Spy(), None)
    with FakeTensorMode():
        on_cpu, first, second = (
            torch.empty(2),
            torch.empty(2, device="cuda:0"),
            torch.empty(2, device="cuda:1"),
        )
    for name in OPS:
        seen.clear()
        for args in ((None, first, 3), (on_cpu, second), (second, 1.0)):
            put[name, "CUDA"](*args)
            assert current == [0]
        assert seen == [(name, 0), (name, 1), (name, 1)]


def test_an_unknown_backend_raises_at_import() -> None:
    error = run("import cfl_ops", CFL_OPS_BACKEND="cuda").stderr
    assert "backend must be one of python, triton, native, nvrtc, but got 'cuda'" in error


FAKE = """
import importlib.util, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, {file!r}) if name == "cfl_ops._C" else None
sys.meta_path.insert(0, Finder())
"""


def broken_extension(folder: Path, kind: str) -> str:
    """Code that puts a broken extension in the place of ours."""
    file = folder / "_C.so"
    if kind == "no library":
        file.write_bytes(b"\x7fELF, built with torch 2.99.0+cu999\0 and cut off")
    else:
        compiler = shutil.which("cc") or pytest.skip("no C compiler")
        source = folder / "module.c"
        source.write_text(
            "extern int gone_in_this_torch(void); int value(void) { return gone_in_this_torch(); }\n"
            "void *PyInit__C(void) { return (void *)(long)value(); }\n"
        )
        subprocess.run([compiler, "-shared", "-fPIC", "-Wl,-z,now", "-o", file, source], check=True)
    return FAKE.format(file=str(file))


@pytest.mark.parametrize(
    ("kind", "cause"),
    [("no library", "ELF|too short"), ("another torch's", "undefined symbol: gone_in_this_torch")],
)
def test_a_broken_extension_says_what_to_do(tmp_path: Path, kind: str, cause: str) -> None:
    fake = broken_extension(tmp_path, kind)
    error = run(fake + "import cfl_ops").stderr
    assert re.search(cause, error)
    assert "The above exception was the direct cause of" in error
    assert "ImportError: cfl_ops: the compiled extension cfl_ops._C cannot be loaded" in error
    assert "--force-reinstall" in error
    assert "CFL_OPS_BACKEND=python" in error
    built = "torch 2.99.0+cu999" if kind == "no library" else "a torch of unknown version"
    assert f"built with {built}, and this is torch {torch.__version__}" in error
    # The way round it works, and a choice that needs the extension leaves things as they are.
    code = """
import torch, cfl_ops
before = cfl_ops.gram(torch.ones(3, 2)).gram
cfl_ops.config.show()
for backend in (None, "native"):
    try:
        cfl_ops.config.set_backend(backend)
    except ImportError as error:
        print("refused:", type(error.__cause__).__name__)
print(cfl_ops.config.get_backend(), bool((cfl_ops.gram(torch.ones(3, 2)).gram == before).all()))
"""
    done = run(fake + code, CFL_OPS_BACKEND="python")
    assert done.stdout.splitlines()[-3:] == ["refused: ImportError", "refused: ImportError", "python True"], (
        done.stderr
    )
    assert "not loaded: the backend python was asked for" in done.stdout


def test_the_extension_is_loaded_when_it_is_first_wanted() -> None:
    if not dispatch.extension_available():
        pytest.skip("the extension is not installed")
    code = """
import sys, cfl_ops
def say(): print("cfl_ops._C" in sys.modules, cfl_ops.config.backend_of("gram", "cpu"))
say()
with cfl_ops.config.use_backend(None): say()
say()
cfl_ops.config.set_backend("native"); say()
"""
    assert run(code, CFL_OPS_BACKEND="python").stdout.splitlines() == [
        "False python",
        "True native",
        "True python",
        "True native",
    ]


def test_the_build_says_its_torch_where_a_broken_one_is_asked() -> None:
    """The words that the hint above is read from stand in the real extension's file too."""
    if not dispatch.extension_available():
        pytest.skip("the extension is not installed")
    from cfl_ops import _C

    assert dispatch._built_with() == f"torch {_C.build_info()['built with torch']}"


def test_an_unknown_instruction_set_raises_at_import() -> None:
    for backend in ("", "python"):
        error = run("import cfl_ops", CFL_OPS_ISA="avx-512", CFL_OPS_BACKEND=backend).stderr
        assert (
            "ValueError: cfl_ops: CFL_OPS_ISA must be one of generic, avx2, avx512, amx, but got 'avx-512'"
            in error
        )


def test_instruction_sets_are_those_of_the_source_and_a_better_one_than_there_is_gives_the_best() -> None:
    header = (ROOT / "csrc" / "cpu" / "gram_kernel.h").read_text()
    (names,) = re.findall(r"kIsaNames\[\] = \{(.*?)\};", header)
    assert tuple(re.findall(r'"(\w+)"', names)) == dispatch.INSTRUCTION_SETS
    if not dispatch.extension_available():
        pytest.skip("the extension is not installed")
    from cfl_ops import _C

    for asked, name in enumerate(dispatch.INSTRUCTION_SETS):
        code = "from cfl_ops import _C; print(_C.build_info()['ISA'])"
        used = dispatch.INSTRUCTION_SETS[min(asked, _C.best_isa())]
        assert run(code, CFL_OPS_ISA=name).stdout.strip() == used


def test_import_needs_torch_alone() -> None:
    code = (
        "import sys, cfl_ops; "
        "bad = {'triton', 'sklearn', 'matplotlib', 'rich', 'typer', 'mlxtend', 'scipy'} & set(sys.modules); "
        "print(sorted(m for m in bad if m not in sys.modules.get('torch').__dict__))"
    )
    out = run(code)
    assert out.stdout.strip() == "[]", out.stderr


def test_every_instruction_set_gives_the_same_gram() -> None:
    """The SIMD source is compiled for several targets; each must agree within float32 rounding."""
    if not dispatch.extension_available():
        pytest.skip("the extension is not installed")
    from cfl_ops import _C

    x, y = torch.randn(301, 67), torch.randn(301, 5)
    want = x.double().mT @ x.double()
    bound = 303 * torch.finfo(torch.float32).eps * (x.double().abs().mT @ x.double().abs())
    try:
        for isa in range(_C.best_isa() + 1):
            _C.set_isa(isa)
            assert ((cfl_ops.gram(x, y).gram - want).abs() <= bound).all()
    finally:
        _C.set_isa(_C.best_isa())


def test_public_names_are_documented() -> None:
    """Docstrings with arguments and an example for every public function."""
    for name in cfl_ops.__all__:
        item = getattr(cfl_ops, name)
        if callable(item):
            assert item.__doc__, name
        if callable(item) and not isinstance(item, type):
            assert "Example:" in item.__doc__, name
