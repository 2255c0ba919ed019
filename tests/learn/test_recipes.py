"""The scripts of docs/recipes do what they say."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "docs" / "recipes"

pytest.importorskip("sklearn", reason="the recipes train on scikit-learn's digits")


def recipe(name: str) -> ModuleType:
    """A recipe as a module; they import each other from their folder."""
    if str(RECIPES) not in sys.path:
        sys.path.append(str(RECIPES))
    return importlib.import_module(name)


def needs(*modules: str) -> None:
    for module in modules:
        pytest.importorskip(module, reason=f"the recipe needs {module}", exc_type=ImportError)


def test_plain_loop() -> None:
    errors = recipe("plain_loop").main(epochs=3)
    assert errors["online"] < 0.2
    assert errors["refitted"] < 0.08


# Mixed precision and accumulation


def test_accumulation_is_the_large_batch() -> None:
    main = recipe("amp_accumulation").main
    (backbone, head, error), (other, other_head, _) = (
        main(way, epochs=1, amp=False) for way in ("none", "algorithm-1")
    )
    assert error < 0.3
    torch.testing.assert_close(other_head.weight, head.weight, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(other[0].weight, backbone[0].weight, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["none", "algorithm-1", "algorithm-2"])
def test_amp(way: str) -> None:
    _, head, error = recipe("amp_accumulation").main(way, epochs=2)
    assert error < 0.15
    assert head.weight.dtype == torch.float32


# Other people's loops


@pytest.mark.parametrize("kind", ["Manual", "Automatic"])
def test_lightning(kind: str, tmp_path: Path) -> None:
    needs("lightning")
    module = recipe("lightning_manual")
    model, error = module.main(getattr(module, kind), epochs=3, folder=str(tmp_path))
    assert error < 0.12
    assert model.head.weight.abs().max() > 0.01  # it began at zero, and the optimizer never had it
    mine = {id(p) for group in model.optimizers().param_groups for p in group["params"]}
    assert mine.isdisjoint(id(p) for p in model.head.parameters())


def test_hugging_face(tmp_path: Path) -> None:
    needs("transformers", "accelerate")
    trainer, error = recipe("hugging_face").main(folder=str(tmp_path))
    assert error < 0.02
    head = trainer.model.head
    assert head.weight.abs().max() > 0.01
    mine = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert mine
    assert mine.isdisjoint(id(p) for p in head.parameters())


# Several processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of four processes under torchrun came to."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4",
        str(Path(__file__).parent / "ddp_driver.py"), str(folder),
    ]  # fmt: skip
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traffic(kind='features'" in done.stdout
    return [torch.load(folder / f"rank {rank}.pt", weights_only=True) for rank in range(4)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """The same recipes in one process."""
    recipe("plain_loop")
    sys.path.append(str(Path(__file__).parent))
    driver = importlib.import_module("ddp_driver")
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    try:
        return driver.alike()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("what", ["ddp float32", "ddp float64", "fsdp", "inside"])
def test_four_processes_are_one(what: str, ranks: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    tolerance = 1e-5 if what == "ddp float32" else 1e-10
    assert alone[what].keys() == ranks[0][what].keys()
    for name, expected in alone[what].items():
        torch.testing.assert_close(ranks[0][what][name], expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("what", ["ddp float32", "ddp float64", "fsdp", "inside"])
def test_ranks_hold_the_same_bits(what: str, ranks: list[dict[str, Any]]) -> None:
    """Although they started from other seeds (but for fsdp); of fsdp's backbone only rank 0 has the whole."""
    for other in ranks[1:]:
        for name, value in other[what].items():
            assert torch.equal(value, ranks[0][what][name]), name


def test_resumes_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["epochs before"] == 1
        for name, value in rank["resumed"].items():
            assert torch.equal(value, rank["ddp float32"][name]), name


def test_ranks_cannot_differ_in_silence(ranks: list[dict[str, Any]]) -> None:
    first = [rank["first step"] for rank in ranks]
    assert not torch.equal(first[0]["before"], first[1]["before"])
    for index, mine in enumerate(first):
        assert torch.equal(mine["once"], first[0]["once"])  # equal after the first step
        assert torch.equal(mine["again"], first[0]["again"])  # and again, with a warning
        assert len(mine["said"]) == 1, (index, mine["said"])
