"""What a card's first minutes are spent on, rehearsed without one: the script, the GPU tests, what they leave."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: no rehearsal")


def run(
    *command: str, timeout: float = 300, cwd: Path = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        command,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        cwd=cwd,
    )


def test_gpu_tests_pass_in_a_rehearsal() -> None:
    """Those that the contract table does not hold, without Triton's interpreter, which is slow."""
    done = run(
        sys.executable, "-m", "pytest", "tests/test_gpu.py", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-k",
        "not oracle and not strides and not triton and not by_the_rules and not nvrtc",
        CFL_GPU_TESTS="rehearse", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


FAILING = """
import pytest, torch

LOST = []

@pytest.mark.parametrize("i", range(6))
def test_something(i, monkeypatch):
    if i == 1:
        assert i == 0, "an ordinary failure"
    if i == 3:  # what an illegal access leaves
        def synchronize():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        torch.cuda.is_available = torch.cuda.is_initialized = lambda: True
        torch.cuda.synchronize = synchronize
"""


def test_a_lost_context_ends_its_worker_only_and_failures_are_logged_as_they_come(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_failing.py").write_text(FAILING)
    log = tmp_path / "failures.log"
    done = run(
        sys.executable, "-m", "pytest", str(tmp_path), "-q", "-n", "1", "--max-worker-restart", "4",
        "-p", "no:cacheprovider", cwd=tmp_path, CFL_FAILURES=str(log),
    )  # fmt: skip
    text = log.read_text()
    assert "test_something[1] (call)" in text
    assert "an ordinary failure" in text
    assert "test_something[3] (the CUDA context is lost)" in text
    assert "illegal memory access" in text
    assert "5 passed" in done.stdout or "4 passed" in done.stdout, (
        done.stdout
    )  # its worker's replacement did the rest
    assert "test_something[4]" not in text
    assert "test_something[5]" not in text


def test_small_run_goes_on_after_a_failure() -> None:
    """Every piece passes here; one that fails is named, and those behind it still run."""
    script = str(ROOT / "benches" / "gpu_small_run.py")
    done = run(sys.executable, script, "--device", "cpu")
    assert done.returncode == 0, done.stdout
    assert "1100 x 264" in done.stdout  # large enough for the copy engine's kernel
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("small", {script!r})
small = importlib.util.module_from_spec(spec); spec.loader.exec_module(small)
small.PIECES = {{"codec": lambda: [("first", lambda: 1 / 0), ("second", lambda: None)]}}
sys.argv = ["small", "--device", "cpu"]
sys.exit(small.main())
"""
    done = run(sys.executable, "-c", code)
    assert done.returncode == 1
    assert "first: FAILED" in done.stdout
    assert "ZeroDivisionError" in done.stdout
    assert "second: ok" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("which", ["first", "second"])
def test_the_script_ends_in_time_with_few_whole_files(which: str, tmp_path: Path) -> None:
    """It uses what is installed here, as if built before; steps that are too long for the limit are cut, not lost."""
    out, site, limit = tmp_path / "out", tmp_path / "site", 100
    site.mkdir()
    start = time.monotonic()
    done = run(
        "bash", str(ROOT / "benches" / "gpu_first.sh"), str(limit), which, timeout=limit + 60, PYTHON=sys.executable,
        SITE=str(site), OUT=str(out), OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert time.monotonic() - start < limit + 10
    files = {path.name for path in out.rglob("*") if path.is_file()}
    assert {"summary.txt", "logs.txt", "tables.md", "tables.json"} <= files
    assert len(files) <= 8
    summary = (out / "summary.txt").read_text()
    for step in (
        "machine: ok",
        "config: ok",
        "tests:",
        "table-gram:",
        "table-proximal:",
        "t1:",
        "tests-python:",
    ):
        assert step in summary, summary
    tables = json.loads((out / "tables.json").read_text())["tables"]
    assert len(tables) == (5 if which == "first" else 2), done.stdout
    logs = (out / "logs.txt").read_text()
    for name in ("config", "tests", "9failures"):
        assert f"##### {name}.log" in logs
    assert (
        subprocess.run(["pgrep", "-f", str(out)], check=False, capture_output=True).stdout == b""
    )  # nothing is left
