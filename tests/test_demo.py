from __future__ import annotations

import dataclasses
import json
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cfl_ops import demo

for _module in demo.EXTRAS:
    pytest.importorskip(_module, reason='the demo needs pip install "cfl-ops[demo]"')

# ruff: noqa: E402
import typer
from cfl_ops.demo import cli, data, defaults, display, heads, report, summary, training, tune
from typer.testing import CliRunner

SECTIONS = {"findings", "curves", "metric", "speed", "split", "samples", "run"}
# What `python -m cfl_ops demo` costs before it starts is seconds: most tests call the app in this process.
PYTHON = [sys.executable, "-m", "cfl_ops"]


@pytest.fixture(autouse=True, scope="module")
def _keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def invoke(*arguments: str):
    """Run the app; its output comes back as one line, without the frames of rich."""
    result = CliRunner().invoke(cli.app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def read(folder: Path) -> tuple[str, dict]:
    return (folder / "index.html").read_text(), json.loads((folder / "results.json").read_text())


def sections(page: str) -> set[str]:
    return set(re.findall(r'<section id="(\w+)"', page))


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "made" / "by the demo"
    code, output = invoke("--quick", "--out", str(folder))
    assert code == 0
    return output, *read(folder), folder


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def setting(**changes) -> training.Setting:
    base = training.Setting(
        "proximal", batch_size=32, seed=0, steps=20, lr=0.01, penalty=10.0, width=32, depth=2
    )
    return dataclasses.replace(base, **changes)


# A whole run


def test_quick_run_writes_the_report_and_says_where(quick):
    output, page, results, folder = quick
    assert str(folder / "index.html") in output
    assert sections(page) == SECTIONS
    assert not results["interrupted"]
    assert "was interrupted" not in page
    assert results["facts"]["command"].startswith("python -m cfl_ops demo --quick --out ")
    for fact in ("torch " + torch.__version__, "CPU threads", "cpu, "):
        assert fact in page


def test_report_shows_the_numbers_of_the_run(quick):
    _, page, results, _ = quick
    assert {(cell["head"], cell["batch_size"]) for cell in results["summary"]} == {
        (name, 32) for name in heads.DEFAULT
    }
    for cell in results["summary"]:
        runs = [run for run in results["runs"] if run["head"] == cell["head"]]
        values = torch.tensor([run["online"] for run in runs], dtype=torch.float64)
        assert cell["online"]["mean"] == pytest.approx(values.mean().item())
        # Student's t at 97.5 %, one degree of freedom; no less than one of 450 images.
        half = max(12.7062 * values.std().item() / 2**0.5, 100 / 450)
        assert cell["online"]["half"] == pytest.approx(half, rel=1e-5)
        shown = dict(re.findall(rf'data-cell="(\w+):{cell["head"]}:32">([^<]*)<', page))
        assert shown["online"] == f"{cell['online']['mean']:.2f} ± {cell['online']['half']:.2f}"
        if training.HEADS[cell["head"]].closed_form:
            assert shown["refit"] == f"{cell['refit']['mean']:.2f} ± {cell['refit']['half']:.2f}"
        else:
            assert shown["refit"] == "\N{EN DASH}"
        assert shown["sps"] == f"{cell['steps_per_second']:,.0f}"
        assert shown["ratio"] == f"{cell['ratio']:.2f}"
    for sentence in results["sentences"]:
        assert sentence in page


def test_every_head_learns(quick):
    _, _, results, _ = quick
    for cell in results["summary"]:
        assert cell["online"]["mean"] < 45, cell["head"]  # chance is 90 %
        if cell["refit"] is not None:
            assert cell["refit"]["mean"] < 10, cell["head"]


def test_curves_and_times_are_of_all_steps(quick):
    _, _, results, _ = quick
    for run in results["runs"]:
        assert run["finished"]
        assert run["steps_done"] == run["steps"] == run["curve"][-1][0]
        assert run["online"] == run["curve"][-1][2]
        seconds = [second for _, second, _ in run["curve"]]
        assert seconds == sorted(seconds)
        low, middle, high = run["step_seconds_quartiles"]
        assert 0 < low <= middle <= high


def test_report_is_self_contained(quick):
    _, page, _, _ = quick
    assert "<script" not in page
    assert "<link" not in page
    assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    assert re.findall(r"url\(|@import", page) == []
    assert page.count('src="data:image/svg+xml;base64,') == 5
    assert page.count('src="data:image/png;base64,') == report.SAMPLES


def test_samples_are_the_test_images_with_what_the_heads_say(digits):
    runs = training.train_side_by_side([setting(), setting(head="cross-entropy", penalty=0.0)], digits)
    samples = report._samples(runs, digits)
    assert len(samples["images"]) == report.SAMPLES
    for image in samples["images"]:
        assert [answer["head"] for answer in image["answers"]] == ["proximal", "cross-entropy"]
        for answer in image["answers"]:
            assert answer["right"] == (answer["value"] == image["truth"])
    hard = samples["images"][: samples["hard"]]
    assert all(not all(answer["right"] for answer in image["answers"]) for image in hard)


def test_regression_leaves_cross_entropy_out_and_says_so(tmp_path):
    code, output = invoke("--data", "diabetes", "--quick", "--out", str(tmp_path))
    assert code == 0
    assert "cross-entropy is left out: diabetes is a regression" in output
    page, results = read(tmp_path)
    assert "cross-entropy is left out" in page
    assert sections(page) == SECTIONS - {"samples"}
    assert [cell["head"] for cell in results["summary"]] == ["proximal", "ridge", "squared"]
    assert results["reference"] == "squared"
    assert all(cell["online"]["mean"] < 1.0 for cell in results["summary"])  # the mean as prediction costs 1


def test_options_reach_the_runs(tmp_path):
    code, _ = invoke(
        *("--heads", "squared,proximal", "--batch-sizes", "128,16", "--seeds", "1", "--steps", "6"),
        *("--lr", "proximal=0.02,squared=0.004", "--lam", "7", "--l2", "0.25", "--optimizer", "adam"),
        *("--width", "24", "--depth", "1", "--threads", "1", "--device", "cpu", "--out", str(tmp_path)),
    )
    assert code == 0
    page, results = read(tmp_path)
    assert [(run["head"], run["batch_size"], run["lr"], run["penalty"]) for run in results["runs"]] == [
        ("proximal", 16, 0.02, 7),
        ("squared", 16, 0.004, 0.25),
        ("proximal", 128, 0.02, 7),
        ("squared", 128, 0.004, 0.25),
    ]
    for run in results["runs"]:
        assert (run["steps_done"], run["optimizer"], run["width"], run["depth"]) == (6, "adam", 24, 1)
    # One seed gives no interval, and the report does not pretend.
    assert results["summary"][0]["online"]["half"] is None
    assert "one seed gives no interval" in page


def test_mnist5k_trains(tmp_path):
    code, _ = invoke(
        "--data", "mnist5k", "--seeds", "1", "--steps", "60", "--batch-sizes", "32", "--out", str(tmp_path)
    )
    assert code == 0
    page, results = read(tmp_path)
    assert "MNIST, 5,000 images" in page
    for cell in results["summary"]:
        # After so few steps the online ridge head knows little but its last 32 images.
        assert (cell["refit"] if cell["head"] == "ridge" else cell["online"])["mean"] < 60, cell["head"]


# How it ends otherwise


def test_interrupt_writes_what_is_done(tmp_path):
    command = [
        *PYTHON,
        "demo",
        "--steps",
        "100000",
        "--batch-sizes",
        "8,32",
        "--seeds",
        "2",
        "--out",
        str(tmp_path),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            assert "Ctrl-C" in process.stdout.readline()
            assert process.stdout.readline() == "batch size 8, seed 0\n"
            time.sleep(2)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, output
    assert "Interrupted. The report of what is done:" in output
    assert "Traceback" not in output
    page, results = read(tmp_path)
    assert "This run was interrupted." in page
    assert results["interrupted"]
    assert sections(page) == SECTIONS - {"split"}
    # All heads of the batch size that was in progress were stopped at the same step, and evaluated there.
    assert {run["head"] for run in results["runs"]} == set(heads.DEFAULT)
    assert len({run["steps_done"] for run in results["runs"]}) == 1
    for run in results["runs"]:
        assert 0 < run["steps_done"] < 100000
        assert not run["finished"]
        assert run["curve"][-1][0] == run["steps_done"]
        assert run["curve"][-1][2] == run["online"]
    assert re.search(r'data-cell="online:proximal:8">[^<]*†<', page)


def test_report_of_a_run_that_never_started(digits, tmp_path):
    runs = training.train_side_by_side([setting()], digits, stop=lambda: True)
    path = report.write(tmp_path, display.Outcome(runs, interrupted=True), digits, {"seeds": "0"})
    assert sections(path.read_text()) == {"findings", "run"}
    assert "Nothing was finished" in path.read_text()


def test_divergence_is_reported_and_the_others_go_on(digits, tmp_path):
    settings = [
        setting(lr=1e5, penalty=1e-3),
        setting(head="squared", penalty=0.0, lr=1e9),
        setting(head="ridge"),
    ]
    runs = training.train_side_by_side(settings, digits)
    assert [run.failure is not None for run in runs] == [True, True, False]
    assert runs[2].steps_done == 20
    path = report.write(tmp_path, display.Outcome(runs), digits, {})
    page, results = read(tmp_path)
    assert path.name == "index.html"
    assert "c.f. proximal diverged at batch size 32 in 1 of 1 seeds" in page
    assert results["runs"][0]["online"] is None


def test_a_mistake_in_the_code_is_no_divergence(digits):
    learner = training.Learner(setting(), digits)
    x, y, dense = next(training.batches(digits, 32, seed=0))
    with pytest.raises(ValueError, match="target"):
        training._take_turn(learner, training.Run(setting()), [(x, y[:5], dense)])


# Where typer itself refuses a value, its words change with its version: the option's name is enough.
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "cifar"), "'cifar' is none of digits, mnist5k, diabetes, and there is no such file"),
        (
            ("--heads", "proximal,newton"),
            "'newton' is none of proximal, ridge, rescaled, ema-ridge, recursive",
        ),
        (("--batch-sizes", "8,many"), "'8,many' is not a list of whole numbers"),
        (("--batch-sizes", "0,8"), "a batch has at least one row, but got 0"),
        (("--batch-sizes", "5000"), "5000 is more than the 1,347 training rows"),
        (("--seeds", "0"), "--seeds"),
        (("--epochs", "-1"), "--epochs"),
        (("--steps", "10", "--epochs", "1"), "give either --epochs or --steps, not both"),
        (("--lr", "fast"), "'fast' is not a number"),
        (("--lr", "0"), "must be finite and positive, but got 0"),
        (("--lam", "-1"), "must be finite and not negative, but got -1"),
        (("--lam", "nan"), "must be finite and not negative, but got nan"),
        (("--lam", "squared=1"), "'squared' is none of proximal, ridge, rescaled"),
        (("--l2", "ridge=1"), "'ridge' is none of squared, cross-entropy"),
        (("--data", "diabetes", "--heads", "cross-entropy"), "cross-entropy is left out"),
        (("--optimizer", "lbfgs"), "lbfgs"),
        (("--width", "0"), "--width"),
        (("--device", "cuda", "--distributed", "2"), "--distributed trains on the CPU"),
        (("--distributed", "0"), "--distributed"),
        (("--distributed", "9", "--batch-sizes", "8"), "a batch of 8 cannot be split over 9 processes"),
        (("--compile", "--compile-backend", "gcc"), "'gcc' is none that torch knows"),
        (("--out", __file__), "cannot be made a folder"),
        (("--speed", "1"), "--speed"),
    ],
)
def test_bad_values_are_named_and_exit_with_2(arguments, message):
    code, output = invoke(*arguments)
    assert code == 2
    assert message in output
    assert "Traceback" not in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_device_that_is_not_there():
    code, output = invoke("--device", "cuda")
    assert code == 2
    assert "torch sees no CUDA device" in output


# The command line


def test_help_explains_every_option():
    code, output = invoke("--help")
    assert code == 0
    parameters = [each for each in typer.main.get_command(cli.app).params if each.name != "help"]
    assert len(parameters) > 12
    for parameter in parameters:
        assert all(option in output for option in parameter.opts)
        assert parameter.help, parameter.name
    for name in (*training.HEADS, *defaults.untuned()):
        assert name in output
    assert "judged on the other 20 %" in output
    assert "digits with sgd at 8, 32, 128;" in output


def test_missing_extras_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.setattr(sys, "argv", ["cfl_ops", "demo", "--quick"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("cfl_ops", run_name="__main__")
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "rich, jinja2" in error
    assert 'pip install "cfl-ops[demo]"' in error


def test_importing_the_package_imports_no_extra():
    script = (
        "import sys, cfl_ops, cfl_ops.__main__\n"
        f"loaded = [name for name in ['cfl_ops.demo', *{list(demo.EXTRAS)}] if name in sys.modules]\n"
        "sys.exit(f'imported: {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["info"], 0, "backend"),
        (["--help"], 0, "usage: cfl-ops COMMAND"),
        ([], 2, "usage: cfl-ops COMMAND"),
        (["dance"], 2, "unknown command: dance"),
    ],
)
def test_subcommands(arguments, code, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cfl_ops", *arguments])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("cfl_ops", run_name="__main__")
    assert stop.value.code == code
    captured = capsys.readouterr()
    assert words in (captured.out if code == 0 else captured.err)


# The parts


def test_heads_of_a_seed_share_backbone_and_batches(digits):
    learners = [training.Learner(setting(head=name, seed=3), digits) for name in training.HEADS]
    for learner in learners[1:]:
        for ours, theirs in zip(
            learner.backbone.parameters(), learners[0].backbone.parameters(), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    first, again = (next(training.batches(digits, 32, seed=3)) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    other = next(training.batches(digits, 32, seed=4))
    assert not torch.equal(first[0], other[0])


def test_training_side_by_side_changes_nothing(digits):
    both = training.train_side_by_side([setting(), setting(head="squared", penalty=0.0)], digits)
    alone = training.train_side_by_side([setting()], digits)
    assert [point.metric for point in both[0].points] == [point.metric for point in alone[0].points]


def test_refit_is_the_ridge_of_the_whole_training_set(digits):
    learner = training.Learner(setting(), digits)
    head = learner.refit()
    with torch.no_grad():
        features = learner.backbone(digits.train_x).double()
    rows = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], 1)
    target = torch.nn.functional.one_hot(digits.train_y).double()
    penalty = training.REFIT_RIDGE * features.square().mean() * len(rows)
    solution = torch.linalg.solve(rows.T @ rows + penalty * torch.eye(rows.shape[1]), rows.T @ target)
    predicted = rows @ solution
    assert (head(features.float()).double() - predicted).abs().max() < 1e-3


def test_interval_is_student_t():
    found = summary.interval([1.0, 2.0, 3.0, float("nan")])
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert summary.interval([1.0]).half is None
    assert summary.interval([2.0, 2.0, 2.0], resolution=0.5).half == 0.5
    assert summary.interval([float("nan")]) is None


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict", "words"),
    [
        ([1.0, 1.2, 1.1], [3.0, 3.1, 3.2], "lower", "which is lower than squared loss (3.10 %)"),
        ([3.0, 3.1, 3.2], [1.0, 1.2, 1.1], "higher", "which is higher than squared loss (1.10 %)"),
        # Each seed differs by the same one image of 450: no interval of no width.
        (
            [1.0, 3.0, 2.0],
            [1.0 + 2 / 9, 3.0 + 2 / 9, 2.0 + 2 / 9],
            "unclear",
            "do not tell apart from squared loss",
        ),
        ([1.0, 3.0, 2.0], [2.0, 1.0, 3.0], "unclear", "do not tell apart from squared loss (2.00 %)"),
    ],
)
def test_sentences_follow_from_the_numbers(digits, ours, theirs, verdict, words):
    runs = [
        training.Run(
            setting(head=head, seed=seed, steps=2), online=value, refit=1.0, step_seconds=[time_, time_]
        )
        for head, values, time_ in (("proximal", ours, 0.002), ("squared", theirs, 0.001))
        for seed, value in enumerate(values)
    ]
    found = summary.summarize(runs, digits)
    assert [item.verdict for item in found.comparisons] == [verdict]
    said = summary.sentences(found, digits)
    assert words in said[0].replace("\N{NO-BREAK SPACE}", " ")
    assert "Steps per second of c.f. proximal over those of squared loss: 0.50 at batch size 32." in said


def test_validation_split_never_sees_the_test_part(digits):
    split = data.validation_split(digits)
    assert len(split.train_x) + len(split.test_x) == len(digits.train_x)
    together = torch.cat([split.train_x, split.test_x])
    assert torch.equal(together.sort(0).values, digits.train_x.sort(0).values)


def test_defaults_cover_every_head():
    for name in data.DATASETS:
        for optimizer in tune.FIRST_RATES:
            for head, kind in training.HEADS.items():
                if name == "diabetes" and kind.classes_only:
                    continue
                for size in defaults.BATCH_SIZES:
                    lr, penalty = defaults.tuned(name, optimizer, head, size)
                    assert lr in tune.LEARNING_RATES
                    assert penalty in tune.PENALTIES[head]
                # An entry that tune.py wrote says how it did: no guess is passed off as tuned.
                entries = defaults._table()[name][optimizer].get(head, {})
                assert entries or kind.kin in defaults._table()[name][optimizer]
                assert all("validation" in entry for entry in entries.values())
    assert defaults.tuned("digits", "sgd", "ridge", 7) == defaults.tuned("digits", "sgd", "ridge", 8)
    assert defaults.tuned("digits", "sgd", "ridge", 4096) == defaults.tuned("digits", "sgd", "ridge", 128)


def test_grid_grows_at_its_edges_only():
    axis = tune.Axis((0.0, 1.0, 2.0, 3.0), (0.0, 2.0))
    assert not axis.grow(0.0)  # nothing is below
    assert not axis.grow(1.0)
    assert axis.grow(2.0)
    assert tuple(axis.values) == (0.0, 1.0, 2.0, 3.0)
    assert not axis.grow(3.0)


def test_tuning_takes_the_best_of_the_grid(digits, monkeypatch):
    monkeypatch.setattr(tune, "LEARNING_RATES", (1e-9, 0.03))
    monkeypatch.setitem(tune.FIRST_RATES, "sgd", (1e-9, 0.03))
    monkeypatch.setitem(tune.PENALTIES, "proximal", (1.0, 10.0))
    monkeypatch.setitem(tune.FIRST_PENALTIES, "proximal", (1.0, 10.0))
    monkeypatch.setattr(tune, "SEEDS", (1, 2))
    monkeypatch.setattr(tune, "FURTHER_SEEDS", (3,))
    found = tune.choose(data.validation_split(digits), "sgd", "proximal", 64, steps=50)
    assert found["lr"] == 0.03
    assert found["penalty"] in (1.0, 10.0)
    assert found["validation"] < 20
    assert found["runs"] == 9  # all four are in the final, with both seeds; then the winner with a third
