"""The demo's further heads, compiled steps, several processes, and where the time of a step goes."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from cfl_ops import demo

for _module in demo.EXTRAS:
    pytest.importorskip(_module, reason='the demo needs pip install "cfl-ops[demo]"')

# ruff: noqa: E402
from cfl_ops.demo import cli, data, distributed, heads, report, split, team, training
from typer.testing import CliRunner


@pytest.fixture(autouse=True, scope="module")
def _keep_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def setting(head: str = "proximal", **changes) -> training.Setting:
    base = training.Setting(head, batch_size=32, seed=0, steps=12, lr=0.01, penalty=1.0, width=32, depth=2)
    return dataclasses.replace(base, **changes)


def invoke(folder, *arguments: str) -> tuple[str, dict]:
    """Run the app; its page and its results."""
    result = CliRunner().invoke(cli.app, [*arguments, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    return (folder / "index.html").read_text(), json.loads((folder / "results.json").read_text())


# Heads


def test_all_heads_train_and_are_reported(tmp_path):
    page, results = invoke(
        tmp_path, "--head", "all", "--seeds", "1", "--steps", "100", "--batch-sizes", "32", "--width", "64"
    )
    assert [cell["head"] for cell in results["summary"]] == list(heads.HEADS)
    for cell in results["summary"]:
        # Heads that forget know little but the last batches; on all data they know more.
        best = min(cell[key]["mean"] for key in ("online", "refit") if cell[key])
        assert best < 25, cell["head"]  # chance is 90 %
    for name, head in heads.HEADS.items():
        assert f"<strong>{head.label}</strong>: {html.escape(head.explanation)}" in page.replace(
            "&#39;", "&#x27;"
        )
        assert report.GLYPHS[report.MARKERS[name]] in page


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_small_batches_need_the_last_head(tmp_path, optimizer):
    """The command of docs/demo.md."""
    _, results = invoke(
        tmp_path,
        *("--head", "proximal,ridge", "--batch-sizes", "8", "--seeds", "5", "--lam", "proximal=10"),
        *("--optimizer", optimizer),
    )
    proximal, ridge = (cell["online"] for cell in results["summary"])
    assert proximal["count"] == ridge["count"] == 5
    assert proximal["mean"] <= 7
    assert ridge["mean"] >= 30


def test_every_head_has_a_colour_and_a_marker_of_its_own():
    assert set(report.COLORS) == set(report.MARKERS) == set(heads.HEADS)
    assert len(set(report.COLORS.values())) == len(set(report.MARKERS.values())) == len(heads.HEADS)


def test_heads_for_classes_are_left_out_of_a_regression(tmp_path):
    page, results = invoke(
        tmp_path,
        "--data",
        "diabetes",
        "--head",
        "rescaled,algorithm-2,squared",
        "--steps",
        "9",
        "--seeds",
        "1",
    )
    assert {cell["head"] for cell in results["summary"]} == {"algorithm-2", "squared"}
    assert "rescaled is left out: diabetes is a regression" in page


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("head", ["algorithm-2", "algorithm-2-cached"])
def test_the_first_step_of_algorithm_2_moves_the_backbone(digits, head, optimizer):
    learner = training.Learner(setting(head, optimizer=optimizer), digits)
    before = learner.network[0].weight.clone()
    learner.step(*next(training.batches(digits, 32, seed=0)))
    assert not torch.equal(learner.network[0].weight, before)


# Where the time goes


@pytest.mark.parametrize("head", heads.HEADS)
def test_a_step_in_parts_is_the_step(digits, head):
    whole, parts = (training.Learner(setting(head), digits) for _ in range(2))
    for batch in itertools.islice(training.batches(digits, 32, seed=0), 4):
        whole.step(*batch)
        seconds = split._cut_step(parts, batch)
        assert set(seconds) == {"backbone", "solve", "overhead"}
        assert min(seconds.values()) > 0
    for ours, theirs in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole.predict(), parts.predict(), rtol=1e-3, atol=1e-4)


def test_the_parts_are_reported(tmp_path):
    page, results = invoke(
        tmp_path, "--head", "proximal,squared", "--seeds", "2", "--steps", "5", "--batch-sizes", "8,32"
    )
    parts = results["split_seconds"]
    assert [(each["head"], each["batch_size"]) for each in parts] == [
        (head, size) for size in (8, 32) for head in ("proximal", "squared")
    ]
    for each in parts:
        assert each["total"] == pytest.approx(each["backbone"] + each["solve"] + each["overhead"])
        shown = dict(re.findall(rf'data-cell="(\w+):{each["head"]}:{each["batch_size"]}">([^<]*)<', page))
        for cell, name in (("backbone", "backbone"), ("head", "solve"), ("overhead", "overhead")):
            assert shown[cell] == f"{1000 * each[name]:.3f}"
    assert "Milliseconds of a step in backbone, head and overhead" in page
    assert any("the head takes" in sentence for sentence in results["sentences"])


def test_a_head_that_diverges_has_no_parts(digits):
    found = split.measure([setting(lr=1e9, penalty=1e-3), setting("squared", penalty=0.0)], digits)
    assert [each.head for each in found] == ["squared"]


# Compiled


def test_compiled_steps_are_reported(tmp_path):
    page, results = invoke(
        tmp_path,
        *("--head", "proximal,algorithm-2,cross-entropy", "--compile", "--compile-backend", "aot_eager"),
        *("--steps", "8", "--seeds", "1", "--batch-sizes", "8", "--width", "32"),
    )
    whole = "backbone, head and loss in one graph"
    assert [run["compiled"] for run in results["runs"]] == [whole, "the backbone", whole]
    fact = f"{whole}: c.f. proximal, cross-entropy; the backbone: Algorithm 2"
    assert results["facts"]["compiled (aot_eager)"] == fact
    assert fact in page
    assert "Nothing is compiled here" in page


@pytest.mark.parametrize("head", ["proximal", "ema-ridge", "recursive", "algorithm-2-cached", "squared"])
def test_compiling_changes_the_speed_only_and_is_in_no_step(digits, head, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    take_turn = training._take_turn

    def watched(*arguments):
        before = len(graphs)
        take_turn(*arguments)
        assert before == len(graphs) > 0

    monkeypatch.setattr(training, "_take_turn", watched)
    (compiled,) = training.train_side_by_side([setting(head, compile=backend)], digits)
    assert compiled.compiled.startswith(("backbone, head", "the backbone"))
    assert len(graphs) == 1
    (plain,) = training.train_side_by_side([setting(head)], digits)
    assert compiled.online == pytest.approx(plain.online, abs=100 / len(digits.test_x))
    assert compiled.loss == pytest.approx(plain.loss, rel=1e-3)


def test_what_cannot_be_compiled_trains_as_it_is(digits):
    def broken(graph, inputs):
        raise NotImplementedError("this machine has no compiler")

    (tried,) = training.train_side_by_side([setting(compile=broken)], digits)
    (plain,) = training.train_side_by_side([setting()], digits)
    assert tried.compiled.startswith("nothing (")
    assert "this machine has no compiler" in tried.compiled
    assert [point.metric for point in tried.points] == [point.metric for point in plain.points]


# Several processes


def test_two_processes_are_one(tmp_path):
    arguments = (
        "--head",
        "proximal,recursive,squared",
        "--steps",
        "20",
        "--seeds",
        "1",
        "--batch-sizes",
        "9",
        "--width",
        "32",
    )
    _, alone = invoke(tmp_path / "1", *arguments)
    page, both = invoke(tmp_path / "2", *arguments, "--distributed", "2")
    expected = {run["head"]: run for run in alone["runs"]}
    assert [run["head"] for run in both["runs"]] == ["proximal", "recursive", "squared"]
    for run in both["runs"]:
        assert run["steps_done"] == 20
        # A batch of 9 is 5 rows and 4, and yet the gradients are those of the 9.
        assert run["online"] == pytest.approx(expected[run["head"]]["online"], abs=0.5)
    proximal, recursive, squared = (run["moved"] for run in both["runs"])
    features = 9 / 2 * (32 * 4 + 4)
    assert proximal["kind"] in ("features", "moments")
    assert 0 < proximal["bytes"] <= features
    assert recursive == {"kind": "features", "bytes": features}
    assert squared == {"kind": "gradients", "bytes": (32 * 10 + 10) * 4}
    assert both["facts"]["processes"].startswith("2, gloo")
    assert f"c.f. proximal {proximal['bytes']:,} ({proximal['kind']}) at batch size 9" in page
    assert {each["head"] for each in both["split_seconds"]} == {"proximal", "recursive", "squared"}


def test_a_process_that_fails_ends_the_others():
    with pytest.raises(
        distributed.DistributedError, match=r"process \d of 2 failed: .*Expecting value: line 1"
    ):
        distributed.launch(json.loads, ("no JSON",), 2)


def test_a_failure_is_told(monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise distributed.DistributedError("process 1 of 2 failed: it ended with exit code 3")

    monkeypatch.setattr(distributed, "train_distributed", fail)
    result = CliRunner().invoke(cli.app, ["--distributed", "2", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "The run has ended: process 1 of 2 failed: it ended with exit code 3" in result.output


def test_shares_are_the_batch():
    batch = tuple(torch.arange(9.0) for _ in range(3))
    shares = [team.Team(rank, 4).share(batch)[0] for rank in range(4)]
    assert [len(share) for share in shares] == [3, 2, 2, 2]
    torch.testing.assert_close(torch.cat(shares), batch[0], rtol=0, atol=0)


@pytest.mark.slow
def test_interrupt_of_several_processes_writes_what_is_done(tmp_path):
    command = [sys.executable, "-m", "cfl_ops", "demo", "--distributed", "2", "--steps", "100000"]
    command += ["--head", "proximal", "--batch-sizes", "8", "--seeds", "1", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert any(line == "batch size 8, seed 0\n" for line in process.stdout)
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, output
    assert "Interrupted. The report of what is done:" in output
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert 0 < run["steps_done"] < 100000
    assert run["moved"]["bytes"] > 0
