"""Bench configuration: one thread by default, and a table of ratios at the end."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy as a peer, on one thread as well

import cfl_ops
import pytest
import torch
from _ratio import ROWS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="torch threads for the benches (default 1)")
    parser.addoption("--ratios", default=None, help="also write the ratio table to this JSON file")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none"))


@pytest.fixture(autouse=True)
def _threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.config.getoption("threads"))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    terminalreporter.section(f"ratios on {device_name()}, {config.getoption('threads')} thread(s)")
    heads = f"{'problem':<58}{'ours ms':>10}{'peer ms':>10}  {'peer':<22}{'speedup':>8}"
    write(heads + f"{'asked':>7}{'GFLOP/s':>9}{'GB/s':>7}")
    group = None
    for row in ROWS:
        if row["group"] != group:
            group = row["group"]
            write(f"[{group}]")
        asked = "" if row["asked"] is None else f"{row['asked']:.2f}"
        missed = "" if row["asked"] is None or row["speedup"] >= row["asked"] else "  below"
        rate = "" if row["gflops"] is None else f"{row['gflops']:.1f}"
        bandwidth = "" if row["gbytes"] is None else f"{row['gbytes']:.1f}"
        peer_ms = row[f"{row['peer']}_ms"]
        write(
            f"{row['title']:<58}{row['ours_ms']:>10.4f}{peer_ms:>10.4f}  {row['peer']:<22}"
            f"{row['speedup']:>8.2f}{asked:>7}{rate:>9}{bandwidth:>7}  {row['note']}{missed}"
        )
    if config.getoption("ratios"):
        report = {
            "device": device_name(),
            "threads": config.getoption("threads"),
            "config": {k: v for k, v in cfl_ops.config.info().items() if k != "ops"},
            "rows": ROWS,
        }
        Path(config.getoption("ratios")).write_text(json.dumps(report, indent=1, default=str) + "\n")
