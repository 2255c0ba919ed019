"""The head of a global batch: four gloo processes, started by torchrun, against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.learn.several_processes import COMPARED

SCRIPT = Path(__file__).with_name("several_processes.py")
RANKS = 4


def torchrun(*arguments: str, count: int = RANKS) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=environment,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun(str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def of(results: list[dict[str, Any]], name: str) -> list[Any]:
    mine = [result[name] for result in results]
    assert not any(isinstance(each, dict) and "raised" in each for each in mine), mine
    return mine


@pytest.mark.parametrize("name", COMPARED)
def test_training_is_that_of_one_process(results: list[dict[str, Any]], name: str) -> None:
    """Backbones (DDP), heads and losses; float64, so that nothing but rounding may differ."""
    mine = of(results, name)
    for each in mine:
        assert each["off"] < 1e-11
        assert each["loss"] < 1e-11
        assert each["head"] == mine[0]["head"]  # to the last bit
        traffic = each["traffic"]
        assert traffic["bytes"] == min(traffic["features"], traffic["moments"]) or name == "rescaled"
        assert traffic["bytes"] == traffic[traffic["kind"]]


def test_both_ways_were_taken(results: list[dict[str, Any]]) -> None:
    kinds = {name: of(results, name)[0]["traffic"]["kind"] for name in COMPARED}
    assert kinds["rows"] == kinds["rescaled"] == "features"
    assert kinds["moments"] == kinds["free_bias"] == "moments"


def test_a_sharded_backbone(results: list[dict[str, Any]]) -> None:
    assert all(each["off"] < 1e-6 for each in of(results, "sharded"))
    for result in results:
        assert "keep the head out of fully_shard" in result["sharded_head"]["raised"]


def test_ranks_cannot_differ_in_silence(results: list[dict[str, Any]]) -> None:
    """Without the global solve each rank had its own head: 0.33 apart, and nobody said so."""
    mine = of(results, "other_initial_heads")
    assert all(each["head"] == mine[0]["head"] for each in mine)
    assert not any(each["warnings"] for each in mine)
    mine = of(results, "permuted_and_negated_heads")
    assert all(each == mine[0] for each in mine)
    mine = of(results, "a_head_that_was_changed")
    assert all(each["head"] == mine[0]["head"] for each in mine)
    assert all("all have that of rank 0 again" in each["warnings"][0] for each in mine)


def test_the_group_is_a_choice(results: list[dict[str, Any]]) -> None:
    alone = [tuple(each["head"]) for each in of(results, "local")]
    assert len(set(alone)) == RANKS
    for step in range(2):  # the second is that of a copy
        pairs = [tuple(each[step]) for each in of(results, "a_group_of_two")]
        assert pairs[0] == pairs[1] != pairs[2] == pairs[3]


def test_accumulated_rows_and_moments(results: list[dict[str, Any]]) -> None:
    mine = of(results, "accumulated")
    for each in mine:
        for run, first in zip(each, mine[0], strict=True):
            assert run["off"] < 1e-5
            assert run["head"] == first["head"]


REFUSED = {
    "other_classes": ("ValueError", "the same out_features, but by rank they have 3, 4, 3, 3"),
    "other_width": ("ValueError", "the same in_features, but by rank they have 20, 20, 20, 21"),
    "other_lam": ("ValueError", "the same lam, but by rank they have 1, 2, 3, 4"),
    "other_method": (
        "ValueError",
        "the same method, but by rank they have proximal, ridge, proximal, proximal",
    ),
    "other_dtype": ("ValueError", "the same dtype of the head"),
    "float64_weight_1": (
        "ValueError",
        "the same dtype of sample_weight, but by rank they have torch.float32, torch.float64",
    ),
    "float64_weight_100": ("ValueError", "the same dtype of sample_weight"),
    "nan_rows": ("ValueError", "features has NaN or Inf in row 9"),
    "singular": ("_LinAlgError", "singular"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_refuses(results: list[dict[str, Any]], name: str) -> None:
    error, text = REFUSED[name]
    for each in of(results, name):
        assert each["error"] == error, each
        assert text in each["text"]
        assert each["same"]
    if name == "nan_rows":
        assert "begin at [0, 4, 8, 12]" in of(results, name)[0]["notes"][0]


@pytest.mark.parametrize(
    ("name", "guilty", "own", "others"),
    [
        ("bad_class", 2, ("IndexError", "got 77 in row 1"), ("RuntimeError", "rank 2 refused its batch")),
        (
            "a_batch_of_the_wrong_width",
            1,
            ("ValueError", "size 20"),
            ("RuntimeError", "rank 1 refused its batch"),
        ),
        (
            "nan_moments",
            2,
            ("ValueError", "NaN or Inf"),
            ("ValueError", "the batch of rank 2 has NaN or Inf"),
        ),
    ],
)
def test_a_rank_with_a_bad_batch_is_named(results: list[dict[str, Any]], name, guilty, own, others) -> None:
    for rank, each in enumerate(of(results, name)):
        error, text = own if rank == guilty else others
        assert each["error"] == error, each
        assert text in each["text"]
        assert each["same"]


def test_a_bad_batch_is_skipped_by_all(results: list[dict[str, Any]]) -> None:
    for each in of(results, "skipped"):
        assert each == [[True, 1, True, "features"], [True, 1, True, "moments"]]


def test_evaluation_waits_for_nobody(results: list[dict[str, Any]]) -> None:
    assert of(results, "evaluation_of_one_rank")[0] > 0


def test_refit_is_global(results: list[dict[str, Any]]) -> None:
    mine = of(results, "refit")
    assert all(each["off"] < 1e-6 and each["head"] == mine[0]["head"] for each in mine)
    for rank, text in enumerate(of(results, "refit_of_a_bad_loader")):
        assert ("ValueError" in text and "size 8" in text) if rank == 1 else "rank 1 failed" in text


def test_the_recursive_head_learns_all_rows(results: list[dict[str, Any]]) -> None:
    mine = of(results, "recursive")
    for each in mine:
        assert all(off < 1e-11 for off, _ in each)
        assert each == [[off, head] for (off, _), (_, head) in zip(each, mine[0], strict=True)]


def test_the_recursive_head_refuses_on_every_rank(results: list[dict[str, Any]]) -> None:
    for rank, (rows, classes, options) in enumerate(of(results, "recursive_refused")):
        assert rows == ["ValueError", "cfl_ops.learn.RecursiveHead: features has NaN or Inf in row 9", True]
        assert classes[0] == ("IndexError" if rank == 2 else "RuntimeError")
        assert ("got 77 in row 1" if rank == 2 else "rank 2 refused its batch") in classes[1]
        assert classes[2]
        assert "the same alpha, but by rank they have 1, 2, 3, 4" in options


def test_a_graph_is_refused(results: list[dict[str, Any]]) -> None:
    assert all("cannot be part of a compiled graph" in each for each in of(results, "compiled"))


def test_a_rank_that_dies_ends_the_others() -> None:
    """With an error, within the timeout of the process group."""
    start = time.monotonic()
    done = torchrun("dying", count=2)
    assert done.returncode != 0
    assert time.monotonic() - start < 60
    assert "Error" in done.stderr
