"""What a card's first minutes are spent on, rehearsed without one: the script, the GPU tests, what they leave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device: no rehearsal")


def outside(**env: str) -> dict[str, str]:
    """The environment without what this run of pytest, and its workers, put there."""
    return {**{k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}, **env}


def run(
    *command: str, timeout: float = 300, cwd: Path = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=outside(**env), capture_output=True, text=True, check=False, timeout=timeout, cwd=cwd
    )


def test_gpu_tests_pass_in_a_rehearsal() -> None:
    """Those that the contract table does not hold, without Triton's interpreter, which is slow."""
    done = run(
        sys.executable, "-m", "pytest", "tests/gpu/test_gpu.py", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-k",
        "not oracle and not strides and not triton and not by_the_rules and not nvrtc",
        CFL_GPU_TESTS="rehearse", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


FAILING = """
import pytest, torch

@pytest.mark.parametrize("i", range(6))
def test_something(i):
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
    # Its worker's replacement did the rest.
    assert "5 passed" in done.stdout or "4 passed" in done.stdout, done.stdout
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


SCRIPT = str(ROOT / "benches" / "gpu_first.sh")
# A python whose tests hang, ignore SIGINT and start what outlives them; and whose builds fail.
STUB = """#!/bin/bash
case "$*" in
  *json*) exec {python} "$@" ;;
  *is_available*) exit {available} ;;
  *"-m pip list"*) echo "torch 0.0" ;;
  *EXTENSION=OFF*) echo "without a compiler" ;;
  *"-m pip install"*) echo "no compiler"; exit 1 ;;
  *pytest*"not captured"*) trap '' INT; (exec sleep {seconds}) & sleep {seconds} ;;
  *pytest*) exit 5 ;;
  *gpu_table*) head -c 3000000 /dev/zero | tr '\\0' x ;;
esac
"""


def stub(folder: Path, device: bool) -> dict[str, str]:
    """What a run of the script takes with a python that misbehaves."""
    path = folder / "python"
    seconds = f"500.{tmp_path_number(folder)}"
    path.write_text(STUB.format(python=sys.executable, available=0 if device else 1, seconds=seconds))
    path.chmod(0o755)
    return {"PYTHON": str(path), "OUT": str(folder / "out")}


def tmp_path_number(folder: Path) -> int:
    """Of this test alone: others run beside it."""
    return zlib.crc32(str(folder).encode())


def sleepers(folder: Path) -> str:
    """What a stub has started and is still there."""
    command = ["pgrep", "-f", f"sleep 500.{tmp_path_number(folder)}"]
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout


def files_of(out: Path) -> dict[str, str]:
    found = {str(path.relative_to(out)): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert len(found) <= 8
    assert json.loads(found["tables.json"])["tables"] is not None
    return found


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_script_that_is_ended_leaves_its_files_and_nothing_else(how: int, tmp_path: Path) -> None:
    env = {**os.environ, **stub(tmp_path, device=False), "BUILD": "no"}
    script = subprocess.Popen(
        ["bash", SCRIPT, "100"], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 30
    while not sleepers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert sleepers(tmp_path)
    script.send_signal(how)
    script.wait(timeout=20)
    deadline = time.monotonic() + 20
    while (
        sleepers(tmp_path) or not (tmp_path / "out" / "logs.txt").exists()
    ) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not sleepers(tmp_path)
    time.sleep(1)
    files = files_of(tmp_path / "out")
    assert "config: ok" in files["summary.txt"]
    assert "##### tests.log" in files["logs.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("device", [False, True])
def test_a_failing_build_a_hang_and_large_logs(device: bool, tmp_path: Path) -> None:
    """The steps behind them run; where there is a device, tests that find none have failed."""
    start = time.monotonic()
    done = run("bash", SCRIPT, "70", timeout=150, **stub(tmp_path, device))
    assert time.monotonic() - start < 85
    assert done.returncode == 1
    assert not sleepers(tmp_path)
    files = files_of(tmp_path / "out")
    summary = files["summary.txt"]
    assert "build: FAILED (1)" in summary
    assert "going on without" in summary
    assert "config: ok" in summary
    assert "tests: CUT" in summary
    assert ("capture: FAILED (5)" if device else "capture: nothing to run") in summary
    assert "table-proximal: ok" in summary
    assert len(files["logs.txt"]) < 12_000_000
    assert "[cut]" in files["logs.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["first", "second"])
def test_the_script_ends_in_time_with_few_whole_files(which: str, tmp_path: Path) -> None:
    """It uses what is installed here; steps that are too long for the limit are cut, not lost."""
    out, limit = tmp_path / "out", 120
    start = time.monotonic()
    done = run(
        "bash", SCRIPT, str(limit), which, timeout=limit + 60, PYTHON=sys.executable, BUILD="no", OUT=str(out),
    )  # fmt: skip
    assert time.monotonic() - start < limit + 15
    files = files_of(out)
    for step in (
        "machine: ok",
        "config: ok",
        "tests:",
        "table-gram:",
        "table-proximal:",
        "t1:",
        "tests-python:",
    ):
        assert step in files["summary.txt"], files["summary.txt"]
    assert len(json.loads(files["tables.json"])["tables"]) == (5 if which == "first" else 2), done.stdout
    for name in ("config", "tests", "9failures"):
        assert f"##### {name}.log" in files["logs.txt"]


def test_a_test_that_hangs_is_named(tmp_path: Path) -> None:
    """Its worker is killed from outside, and no report of it comes."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_hanging.py").write_text("import time\n\ndef test_that_hangs():\n    time.sleep(60)\n")
    log = tmp_path / "9failures.log"
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-q", "-n", "1", "-p", "no:cacheprovider"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=outside(CFL_FAILURES=str(log)), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    running, deadline = tmp_path / "9running-gw0.log", time.monotonic() + 60
    while (
        not (running.exists() and "in test_that_hangs" in running.read_text()) and time.monotonic() < deadline
    ):
        time.sleep(0.5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    text = running.read_text()
    assert text.startswith("test_hanging.py::test_that_hangs")
    assert "in test_that_hangs" in text  # where it is
