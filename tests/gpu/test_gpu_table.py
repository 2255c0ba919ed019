"""benches/gpu_table.py and t1_gpu.py without a GPU: every row runs, and whatever goes wrong leaves the others."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

BENCHES = Path(__file__).parents[2] / "benches"


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", autouse=True)
def benches():
    """The scripts import what lies beside them by its name."""
    names = {
        "gpu_cases": BENCHES / "gpu_cases.py",
        "gpu_table": BENCHES / "gpu_table.py",
        "resnet": BENCHES / "paper" / "resnet.py",
        "t1_gpu": BENCHES / "paper" / "t1_gpu.py",
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny calls, and other tests beside them
    yield SimpleNamespace(**{name: load(name, path) for name, path in names.items()})
    torch.set_num_threads(threads)
    for name in names:
        del sys.modules[name]


@pytest.fixture
def table(benches) -> ModuleType:
    return benches.gpu_table


def run(table: ModuleType, folder: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    """The exit status, the JSON and the page."""
    status = table.main(
        ["--device", "cpu", "--small", "--out", str(folder), "--row-seconds", "0.02", *options]
    )
    report = json.loads((folder / "gpu_table.json").read_text())
    return status, report, (folder / "gpu_table.md").read_text()


# The table


def test_every_row_of_every_family(table, tmp_path) -> None:
    status, report, page = run(table, tmp_path)
    wrong = {row["case"]: row.get("failures", row) for row in report["rows"] if "device ms" not in row}
    assert (status, wrong) == (0, {}), page
    for family, cases in table.FAMILIES.items():
        names = [case.name for case in cases("cpu", True)]
        assert [row["case"] for row in report["rows"] if row["family"] == family] == names
        assert f"## {family}" in page
    assert "What failed" not in page
    assert page.count("\n| ") > len(report["rows"])
    for row in report["rows"]:
        assert row["host ms"] == row["device ms"] > 0, row
        assert row.get("off by", 0) < 1e-4, row  # whatever the dtype: references are of the same inputs
        assert row["ratio"] > 0 if row["peers"] else "ratio" not in row


def works(table: ModuleType, **more: Any) -> Any:
    return table.Work(lambda: torch.ones(8).sum(), **more)


def fails(message: str) -> Any:
    raise RuntimeError(message)


def cases_of(table: ModuleType, **makes: Any) -> dict[str, Any]:
    """A family of cases by their ops' names."""
    cases = [table.Case(op, "float32", f"7 x {i}", make) for i, (op, make) in enumerate(makes.items())]
    return {"some": lambda device, small: cases}


def test_a_failing_case_says_what_and_stops_no_other(table, tmp_path, monkeypatch) -> None:
    families = cases_of(
        table,
        first=lambda: works(table, peers={"good": lambda: None, "bad": lambda: fails("no such peer")}),
        unmade=lambda: fails("no memory"),
        broken=lambda: table.Work(lambda: fails("illegal | instruction")),
        wrong=lambda: works(
            table, check=lambda: fails("cannot compare"), libraries=(lambda: fails("no lib"),)
        ),
        far=lambda: works(table, check=lambda: float("nan")),
        last=lambda: works(table),
    )
    monkeypatch.setattr(table, "FAMILIES", families)
    status, report, page = run(table, tmp_path)
    rows = {row["op"]: row for row in report["rows"]}
    assert status == 1
    assert "failures" not in rows["last"]
    assert list(rows["first"]["peers"]) == ["good"]
    assert rows["wrong"]["device ms"] > 0
    where = {op: [failure["where"] for failure in row.get("failures", ())] for op, row in rows.items()}
    assert where == {
        "first": ["bad"], "unmade": ["making it"], "broken": ["ours"], "wrong": ["check", "preparing peers"],
        "far": ["check"], "last": [],
    }  # fmt: skip
    unmade = rows["unmade"]
    assert (unmade["op"], unmade["size"], unmade["dtype"]) == ("unmade", "7 x 1", "float32")
    assert "in fails\n    raise RuntimeError(message)" in unmade["failures"][0]["traceback"]
    assert "| **FAILED** (making it): RuntimeError: no memory |" in page
    for text in (
        "in: unmade float32 7 x 1",
        "in: broken float32 7 x 2",
        "no such peer",
        "no lib",
        "in fails",
    ):
        assert text in page.split("## What failed")[1]


def test_a_lost_context_keeps_the_rows_before_it(table, tmp_path, monkeypatch) -> None:
    families = cases_of(
        table,
        first=lambda: works(table),
        lost=lambda: table.Work(lambda: fails("an illegal memory access was encountered")),
        last=lambda: works(table),
    )
    monkeypatch.setattr(table, "FAMILIES", families)
    monkeypatch.setattr(table.Clock, "lost", lambda self: True)
    status, report, page = run(table, tmp_path)
    assert status == table.LOST == 70
    first, lost, rest = report["rows"]
    assert first["device ms"] > 0
    assert lost["failures"][0]["where"] == "ours"
    assert rest["not run"] == ["last float32 7 x 2"]
    assert "context was lost (ours)" in page


def test_without_time_the_rows_are_named(table, tmp_path) -> None:
    status, report, page = run(table, tmp_path, "--seconds", "0", "--family", "codec")
    (row,) = report["rows"]
    assert status == 1
    assert row["not run"] == [case.name for case in table.FAMILIES["codec"]("cpu", True)]
    assert f"limit reached (time), not run: {row['not run'][0]}; " in page
    again, other, _ = run(
        table, tmp_path / "again", "--seconds", "0", "--ceilings", str(tmp_path / "gpu_table.json")
    )
    assert (again, other["ceilings"]) == (1, report["ceilings"])


def test_a_peer_much_slower_than_ours_is_left_out_later(table, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(table, "FAMILIES", cases_of(
        table, **{op: lambda: works(table, peers={"slow": lambda: time.sleep(0.06)}) for op in ("one", "two")}
    ))  # fmt: skip
    status, report, page = run(table, tmp_path)
    one, two = report["rows"]
    assert status == 0
    assert one["peer"] == "slow"
    assert one["ratio"] > 20
    assert two["left out"] == ["slow"]
    assert "- two float32 7 x 1: slow" in page


def test_an_interrupt_leaves_the_table(tmp_path) -> None:
    command = [
        sys.executable,
        str(BENCHES / "gpu_table.py"),
        "--device",
        "cpu",
        "--small",
        "--out",
        str(tmp_path),
    ]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path
        )
        try:
            deadline = time.monotonic() + 60
            while log.read_text().count("device ") < 3:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGINT)  # as GNU timeout does
            assert process.wait(30) == 130, log.read_text()
        finally:
            process.kill()
            process.wait()
    rows = json.loads((tmp_path / "gpu_table.json").read_text())["rows"]
    page = (tmp_path / "gpu_table.md").read_text()
    assert len([row for row in rows if "device ms" in row]) >= 3
    assert "not run" in rows[-1]
    assert "Interrupted" in page
    assert "limit reached (interrupted)" in page
    assert page in log.read_text()


# The clock


class MadeUpGpu:
    """A host and a GPU with one queue, in made-up seconds."""

    def __init__(self) -> None:
        self.now = self.free = 0.0

    def launch(self, seconds: float) -> None:
        self.free = max(self.free, self.now) + seconds

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)

    def event(self, enable_timing: bool) -> Any:
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", max(self.now, self.free))
        event.query = lambda: event.at <= self.now
        event.synchronize = lambda: setattr(self, "now", max(self.now, event.at))
        event.elapsed_time = lambda end: (end.at - event.at) * 1e3
        return event

    def call(self, host: float, device: float, waits: bool = False) -> Any:
        """Half of the host's time before the launch, half after it."""

        def run() -> None:
            self.now += host / 2
            self.launch(device / 2)
            if waits:
                self.synchronize()
            self.now += host / 2
            self.launch(device / 2)

        return run


@pytest.fixture
def gpu(table, monkeypatch) -> MadeUpGpu:
    gpu = MadeUpGpu()
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: gpu.launch(cycles / 1.7e9))
    monkeypatch.setattr(torch.cuda, "synchronize", gpu.synchronize)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(table.time, "perf_counter", lambda: gpu.now)
    return gpu


def test_the_device_time_of_a_small_call_has_nothing_of_the_host(table, gpu) -> None:
    clock = table.Clock("cuda")
    calls = {"small": gpu.call(400e-6, 50e-6), "large": gpu.call(40e-6, 3e-3)}
    small, large = clock.times(calls, 0.1).values()
    assert (small.host, small.device, small.waits) == pytest.approx((400e-6, 50e-6, False))
    assert small.loop == pytest.approx(400e-6, rel=0.1)  # the launcher bounds a loop of them
    assert (large.host, large.device, large.waits) == pytest.approx((40e-6, 3e-3, False))
    assert large.loop is None
    assert small.cost == pytest.approx(400e-6)
    assert large.cost == pytest.approx(3e-3)


def test_a_call_that_waits_is_known(table, gpu) -> None:
    timing = table.Clock("cuda").times({"it": gpu.call(400e-6, 50e-6, waits=True)}, 0.1)["it"]
    assert timing.waits
    assert timing.host == pytest.approx(425e-6)
    assert 50e-6 < timing.device < 425e-6  # with the host's gap
    # A host that takes longer than the GPU is ever kept busy cannot be told from that.
    assert table.Clock("cuda").times({"it": gpu.call(20e-3, 50e-6)}, 0.1)["it"].waits


def test_a_host_that_stumbles_is_waited_for_longer(table, gpu) -> None:
    clock, usual, slower = table.Clock("cuda"), gpu.call(100e-6, 50e-6), gpu.call(2e-3, 50e-6)
    hosts = iter([usual, slower])  # quick when it is timed, slow behind the wait
    timing = clock.times({"it": lambda: next(hosts, slower)()}, 0.05)["it"]
    assert (timing.device, timing.waits) == pytest.approx((50e-6, False))


# T1


@pytest.mark.parametrize(("network", "status"), [("resnet18,none", 1), ("resnet50", 0)])
def test_t1_goes_on_after_a_cell_that_fails(benches, tmp_path, monkeypatch, capsys, network, status) -> None:
    monkeypatch.setattr(benches.t1_gpu, "steps", lambda *args: (lambda: None, lambda: time.sleep(1e-4)))
    options = ["--device", "cpu", "--out", str(tmp_path), "--cells", "4x8,8x8", "--networks", network]
    assert benches.t1_gpu.main([*options, "--eager", "--repeats", "3"]) == status
    table = json.loads((tmp_path / "t1_gpu.json").read_text())
    assert len(table) == 2 * (network.count(",") + 1)
    for row in table:
        assert ("rSPS" in row) == (row["network"] in benches.t1_gpu.NETWORKS), row
        assert ("KeyError" in row.get("traceback", "")) == ("error" in row)
    assert ("Traceback" in capsys.readouterr().out) == (status == 1)


def test_t1_writes_what_it_has(benches, tmp_path, monkeypatch) -> None:
    t1, made = benches.t1_gpu, []

    def steps(*args: Any) -> Any:
        made.append(args)
        step = (lambda: None) if len(made) == 1 else lambda: fails("unspecified launch failure")
        return step, step

    monkeypatch.setattr(t1, "steps", steps)
    monkeypatch.setattr(t1, "lost", lambda device: True)
    options = ["--device", "cpu", "--out", str(tmp_path), "--cells", "4x8,8x8,9x8", "--networks", "resnet18"]
    assert t1.main(options) == t1.LOST == 70
    first, second = json.loads((tmp_path / "t1_gpu.json").read_text())
    assert "rSPS" in first
    assert "unspecified launch failure (the GPU's context is lost" in second["error"]

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(t1, "steps", interrupted)
    assert t1.main(options) == 130
    (row,) = json.loads((tmp_path / "t1_gpu.json").read_text())
    assert row["error"] == "cut off"
    assert t1.main([*options, "--seconds", "-1"]) == 1
    assert len(json.loads((tmp_path / "t1_gpu.json").read_text())) == 3
