"""Checkpoints into models: ties, dtypes, meta devices, what does not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cfl_ops
import pytest
import torch
from torch import Tensor, nn

from tests.codec.helpers import same


class Small(nn.Module):
    """Tied weights, a norm, buffers that are saved and not, a transposed parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(30, 20)
        self.norm = nn.BatchNorm1d(20)
        self.outside = nn.Linear(30, 20)
        self.outside.weight = self.inside.weight
        self.turned = nn.Parameter(torch.randn(9, 40).t())
        self.register_buffer("table", torch.randn(11))
        self.register_buffer("scratch", torch.randn(5), persistent=False)
        self.empty = nn.Parameter(torch.empty(0, 3))


WRITERS: dict[str, Callable[[Any, Path], Any]] = {
    "cflz": lambda state, folder: cfl_ops.save_file(state, folder / "model.cflz", lossless=True),
    "safetensors": cfl_ops.save_safetensors,
    "shards": lambda state, folder: cfl_ops.save_safetensors(state, folder, max_shard_size=900),
}


def changed(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(same(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", WRITERS)
def test_into_a_model(backend: str, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    source, target = Small(), Small()
    WRITERS[kind](source.state_dict(), tmp_path)
    places = {name: value.data_ptr() for name, value in target.state_dict().items()}
    parameters = list(target.parameters())
    scratch = target.scratch.clone()
    assert cfl_ops.load_model(target, tmp_path) == ([], [])
    assert equal(source, target)
    assert {name: value.data_ptr() for name, value in target.state_dict().items()} == places
    assert all(a is b for a, b in zip(parameters, target.parameters(), strict=True))
    assert all(value.requires_grad for value in parameters)
    assert same(target.scratch, scratch)


@pytest.mark.parametrize("kind", WRITERS)
def test_into_a_model_without_data(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    source = Small()
    source.norm.weight.requires_grad_(False)
    WRITERS[kind](source.state_dict(), tmp_path)
    with torch.device("meta"):
        target = Small()
        target.norm.weight.requires_grad_(False)
    assert cfl_ops.load_model(target, tmp_path, device="cpu") == ([], [])
    assert equal(source, target)
    assert target.outside.weight is target.inside.weight
    assert isinstance(target.turned, nn.Parameter)
    assert target.turned.requires_grad
    assert not target.norm.weight.requires_grad
    assert target.scratch.is_meta


def test_other_dtypes_are_converted(tmp_path: Path) -> None:
    source, path = Small(), tmp_path / "a.cflz"
    cfl_ops.save_file(source.state_dict(), path, lossless=True)
    half = Small().to(torch.bfloat16)
    cfl_ops.load_model(half, path)
    for name, value in half.state_dict().items():
        assert same(value, source.state_dict()[name].to(value.dtype))
    with torch.device("meta"):
        half = Small().to(torch.bfloat16)
    cfl_ops.load_model(half, path)
    assert half.turned.dtype == torch.bfloat16


def test_what_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    source, path = Small(), tmp_path / "a.safetensors"
    state = dict(source.state_dict())
    for message, change in {
        r"other shapes: 'table' of \(11,\) \(the file: \(12,\)\)": lambda s: s.update(table=torch.ones(12)),
        r"other shapes: 'turned' of \(40, 9\) \(the file: \(9, 40\)\)": lambda s: s.update(
            turned=torch.ones(9, 40)
        ),
        "names that the file lacks: 'table'": lambda s: s.pop("table"),
        "names that the model lacks: 'more'": lambda s: s.update(more=torch.ones(1)),
        "lacks: 'turned'; names that the model lacks: '../turned'": lambda s: s.update(
            {"../turned": s.pop("turned")}
        ),
        "names that the model lacks: 'scratch'": lambda s: s.update(scratch=torch.ones(5)),
    }.items():
        bad = dict(state)
        change(bad)
        cfl_ops.save_safetensors(bad, path)
        target = Small()
        before = changed(target)
        with pytest.raises(ValueError, match=f"load_model: model must have the tensors of .*{message}"):
            cfl_ops.load_model(target, path)
        assert all(same(before[name], value) for name, value in target.state_dict().items())
        if "shapes" in message:
            with pytest.raises(ValueError, match="other shapes"):
                cfl_ops.load_model(target, path, strict=False)
    bad = {name: value for name, value in state.items() if name != "table"} | {"more": torch.ones(1)}
    cfl_ops.save_file(bad, path, lossless=True)
    table = target.table.clone()
    assert cfl_ops.load_model(target, path, strict=False) == (["table"], ["more"])
    assert same(target.table, table)
    assert same(target.turned, source.turned)
    with pytest.raises(TypeError, match="model must be a module, but got dict"):
        cfl_ops.load_model({}, path)  # type: ignore[arg-type]
    many = nn.Module()
    for i in range(12):
        many.register_buffer(f"b{i}", torch.ones(1))
    with pytest.raises(ValueError, match="'b7' and 4 more"):
        cfl_ops.load_model(many, path)


def test_ties_on_one_side(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source, path = Small(), tmp_path / "a.safetensors"
    state = dict(source.state_dict())
    del state["outside.weight"]  # as transformers writes it
    cfl_ops.save_safetensors(state, path)
    target = Small()
    assert cfl_ops.load_model(target, path) == ([], [])
    assert equal(source, target)
    loose = Small()
    loose.outside.weight = nn.Parameter(torch.randn(20, 30))
    with pytest.raises(ValueError, match=r"names that the file lacks: 'outside\.weight'"):
        cfl_ops.load_model(loose, path)
    cfl_ops.save_safetensors(source.state_dict(), path)
    cfl_ops.load_model(loose, path)
    assert equal(source, loose)
    assert loose.outside.weight is not loose.inside.weight


def test_modules_that_load_in_their_own_way(tmp_path: Path) -> None:
    torch.manual_seed(0)

    def make() -> nn.Module:
        return nn.ModuleDict({"head": cfl_ops.learn.ClosedFormLinear(6, 3), "body": nn.Linear(6, 6)})

    source, target, path = make(), make(), tmp_path / "a.cflz"
    source["head"].update(torch.randn(20, 6), torch.randn(20, 3))  # type: ignore[index,operator]
    cfl_ops.save_file(source.state_dict(), path, lossless=True)
    assert cfl_ops.load_model(target, path) == ([], [])
    assert equal(source, target)
    bad = dict(source.state_dict())
    name = next(name for name in bad if name.startswith("head."))
    bad[name] = torch.ones(77)
    cfl_ops.save_file(bad, path, lossless=True)
    with pytest.raises(ValueError, match="load_model: model's head refuses"):
        cfl_ops.load_model(target, path)
    assert equal(source, target)


def test_a_transformer_with_tied_embeddings(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=120,
        n_positions=32,
        n_embd=48,
        n_layer=2,
        n_head=4,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    tokens = torch.randint(0, 120, (2, 20))
    want = model(tokens).logits
    model.save_pretrained(tmp_path / "plain", max_shard_size="60KB")
    cfl_ops.save_safetensors(model.state_dict(), tmp_path, max_shard_size="60KB", metadata={"format": "pt"})
    cfl_ops.save_file(model.state_dict(), tmp_path / "model.cflz", lossless=True)
    for path in (tmp_path / "plain", tmp_path, tmp_path / "model.cflz"):
        other = transformers.GPT2LMHeadModel(config).eval()
        assert not torch.equal(other(tokens).logits, want)
        assert cfl_ops.load_model(other, path) == ([], [])
        assert torch.equal(other(tokens).logits, want)
        assert other.lm_head.weight is other.transformer.wte.weight
    # transformers' own way, of a state dict that is decoded first
    state = cfl_ops.load_file(tmp_path)
    again = transformers.GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=state).eval()
    assert torch.equal(again(tokens).logits, want)
