"""The package installs as a wheel, and without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.install


def build_wheel(into: Path, build_dir: Path, **env: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", str(into),
         f"-Cbuild-dir={build_dir}", "."],
        cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = into.glob("*.whl")
    return wheel


def test_without_the_extension_everything_works_on_the_fallback(tmp_path: Path) -> None:
    """No compiler on the PATH, the extension turned off: installed, and the same tests' ops run."""
    wheel = build_wheel(
        tmp_path,
        tmp_path / "build",
        CFL_OPS_EXTENSION="OFF",
        CC="/bin/false",
        CXX="/bin/false",
        CUDACXX="/bin/false",
    )
    names = zipfile.ZipFile(wheel).namelist()
    assert not [n for n in names if n.endswith(".so")]
    assert "cfl_ops/py.typed" in names
    assert "cfl_ops/triton_kernels/gram.py" in names
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = """
import sys
sys.meta_path = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]
sys.path.insert(0, sys.argv[1])
import torch, cfl_ops
assert cfl_ops.__file__.startswith(sys.argv[1]), cfl_ops.__file__
assert cfl_ops.config.info()["extension"] is None
assert set(cfl_ops.config.info()["ops"]["gram"].values()) <= {"python", "triton"}
x, y = torch.randn(20, 5), torch.randint(3, (20,))
m = cfl_ops.gram(x, y, num_classes=3, bias_column=True)
torch.testing.assert_close(m.gram[:5, :5], x.mT @ x)
backbone, head = torch.nn.Linear(5, 8), cfl_ops.learn.ClosedFormLinear(8, 3)
assert head.step(backbone(x), y).isfinite() and backbone.weight.grad.abs().sum() > 0
try:
    cfl_ops.config.set_backend("native")
except RuntimeError as error:
    assert "cfl_ops._C is not installed" in str(error)
else:
    raise AssertionError("a missing extension was not noticed")
print("fallback works")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(site)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "fallback works", done.stderr


def test_wheel_has_the_extension(tmp_path: Path) -> None:
    build_dir = ROOT / os.environ.get("CFL_OPS_BUILD_DIR", "build/dev")  # reuses the objects that make built
    names = zipfile.ZipFile(build_wheel(tmp_path, build_dir)).namelist()
    assert [n for n in names if n.startswith("cfl_ops/_C") and n.endswith(".so")]
    assert "cfl_ops/triton_kernels/gram.py" in names
