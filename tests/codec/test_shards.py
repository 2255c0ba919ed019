"""Checkpoints in several .safetensors files: names, what a new one replaces, links, what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import cfl_ops
import pytest
import torch
from cfl_ops import CorruptDataError
from cfl_ops.ops.codec.files import open_weights
from torch import Tensor

from tests.codec.file_helpers import blob_bytes, equal_states, of_bits, opened
from tests.codec.helpers import same

pytest.importorskip("safetensors.torch")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    g = torch.Generator().manual_seed(0)
    state = {f"w{i}": (torch.randn(600, generator=g) * 0.02).bfloat16() for i in range(4)}
    state["steps"], state["tied"] = torch.tensor(4), state["w0"]
    cfl_ops.save_safetensors(state, tmp_path, max_shard_size=1500, metadata={"format": "pt"})
    return tmp_path / "model.safetensors.index.json"


def test_shards_are_as_hugging_face_names_them(sharded: Path) -> None:
    names = sorted(item.name for item in sharded.parent.iterdir())
    count = len(names) - 1
    assert count > 1
    assert names[:-1] == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    index = json.loads(sharded.read_text())
    assert list(index["weight_map"]) == ["w0", "w1", "w2", "w3", "steps"]
    seen: dict[str, Tensor] = {}
    for file in dict.fromkeys(index["weight_map"].values()):
        found, metadata = opened(sharded.parent / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == found.keys()
        assert metadata["format"] == "pt"
        seen |= found
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in seen.values())
    back = cfl_ops.load_file(sharded)
    assert back.keys() == {"w0", "w1", "w2", "w3", "steps", "tied"}
    assert back["tied"] is back["w0"]
    assert equal_states(cfl_ops.load_file(sharded.parent), back)
    with open_weights(sharded) as weights:
        assert weights.aliases == {"tied": "w0"}
        assert weights.metadata == {"format": "pt"}
        assert same(weights.tensor("tied", 5, 9), back["w0"][5:9])
        assert same(cfl_ops.decompress(weights.blob("w3")), back["w3"])
        assert weights.stored_bytes("tied") == 0 < weights.stored_bytes("w0")
        assert weights.header("w1") == (torch.bfloat16, (600,))
        assert weights.native("steps")
    for file in dict.fromkeys(index["weight_map"].values()):  # each alone
        assert cfl_ops.load_file(sharded.parent / file).keys() <= back.keys()


def test_hugging_face_reads_the_layout(sharded: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    back = cfl_ops.load_file(sharded)

    class Model(torch.nn.Module):
        def __init__(self, like: dict[str, Tensor]) -> None:
            super().__init__()
            for name, value in like.items():
                self.register_buffer(name, torch.zeros_like(value))

    stored: dict[str, Tensor] = {}
    for file in sharded.parent.glob("*.safetensors"):
        stored |= hub.load_state_dict_from_file(file)
    model = Model(stored)
    hub.load_torch_model(model, sharded.parent, strict=True)  # bytes, as they are
    for name, value in model.state_dict().items():
        assert same(value if name == "steps" else cfl_ops.decompress(value[: blob_bytes(value)]), back[name])
    # And we what it writes.
    folder = sharded.parent / "plain"
    folder.mkdir()
    plain = {name: value for name, value in back.items() if name != "tied"}
    hub.save_torch_state_dict(plain, folder, max_shard_size=1500)
    assert (folder / sharded.name).exists()
    assert equal_states(cfl_ops.load_file(folder), plain)


def test_what_a_new_checkpoint_replaces(sharded: Path) -> None:
    folder = sharded.parent
    before = cfl_ops.load_file(folder)
    old = {item.name for item in folder.iterdir()}
    (folder / "model-00001-of-00009.safetensors").write_bytes(b"of somebody else")
    two = {"w0": before["w0"], "w1": before["w1"]}
    cfl_ops.save_safetensors(two, folder, max_shard_size=1500)
    assert equal_states(cfl_ops.load_file(folder), two)
    names = {item.name for item in folder.iterdir()}
    assert "model-00002-of-00002.safetensors" in names
    assert "model-00001-of-00009.safetensors" in names
    assert not names & (
        old - {sharded.name, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    )
    cfl_ops.save_safetensors(two, folder)  # one file
    assert {item.name for item in folder.iterdir()} == {
        "model.safetensors",
        "model-00001-of-00009.safetensors",
    }
    cfl_ops.save_safetensors(two, folder, max_shard_size=1500)
    assert not (folder / "model.safetensors").exists()
    assert equal_states(cfl_ops.load_file(folder), two)


@pytest.mark.parametrize("most", range(400, 2500, 97))
def test_no_shard_is_larger_than_asked_for(tmp_path: Path, most: int) -> None:
    """Padding between blobs and wide elements counts."""
    g = torch.Generator().manual_seed(most)
    state: dict[str, Tensor] = {}
    for i in range(12):
        state[f"z{i}"] = torch.zeros(300 + i)
        state[f"f{i}"] = torch.randn(7 + 5 * i % 60, generator=g)
        state[f"b{i}"] = of_bits(torch.uint8, 3 + i, i)
    cfl_ops.save_safetensors(state, tmp_path, max_shard_size=most)
    assert equal_states(cfl_ops.load_file(tmp_path), state)
    for file in tmp_path.glob("*.safetensors"):
        seen, _ = opened(file)
        assert sum(value.nbytes for value in seen.values()) <= most


def test_a_set_over_a_set_of_the_same_names(sharded: Path) -> None:
    """The old set is not touched before the index of the new one is there."""
    folder = sharded.parent
    state = cfl_ops.load_file(folder)
    names = {item.name for item in folder.iterdir()}
    for turn in range(3):
        for name in ("w0", "w1", "w2", "w3"):
            state[name].copy_(state[name].roll(1))
        cfl_ops.save_safetensors(state, folder, max_shard_size=1500, metadata={"format": "pt"})
        now = {item.name for item in folder.iterdir()}
        assert len(now) == len(names)
        if turn % 2:  # the names are free again
            assert now == names
        else:
            assert now & names == {sharded.name}
            assert all(re.fullmatch(r"model-\d{5}-of-\d{5}-[0-9a-f]{8}\.safetensors", n) for n in now - names)
        assert equal_states(cfl_ops.load_file(folder), state)
    cfl_ops.save_safetensors(state, folder)
    assert [item.name for item in folder.iterdir()] == ["model.safetensors"]


def test_links(tmp_path: Path) -> None:
    """As in the cache of Hugging Face: files are links to a folder of blobs."""
    blobs, snap = tmp_path / "blobs", tmp_path / "snap"
    blobs.mkdir()
    snap.mkdir()
    state = {f"w{i}": torch.randn(500) for i in range(4)}
    link = snap / "model.safetensors"
    for path in (link, snap):
        (blobs / "abc").write_bytes(b"")
        cfl_ops.save_safetensors({"old": torch.ones(3)}, blobs / "abc")
        before = (blobs / "abc").read_bytes()
        link.symlink_to("../blobs/abc")
        cfl_ops.save_safetensors(state, path, max_shard_size=2000)
        assert equal_states(cfl_ops.load_file(snap), state)
        assert [item.name for item in blobs.iterdir()] == ["abc"]
        assert (blobs / "abc").read_bytes() == before
        assert not link.is_symlink()
        names = {item.name for item in snap.iterdir()}
        assert "model.safetensors.index.json" in names
        assert names >= set(
            json.loads((snap / "model.safetensors.index.json").read_text())["weight_map"].values()
        )
    # Shards and index that are links are replaced by files.
    for item in list(snap.iterdir()):
        item.rename(blobs / item.name)
        item.symlink_to(f"../blobs/{item.name}")
    kept = {item.name: item.read_bytes() for item in blobs.iterdir()}
    cfl_ops.save_safetensors(state, snap, max_shard_size=1500)
    assert equal_states(cfl_ops.load_file(snap), state)
    assert {item.name: item.read_bytes() for item in blobs.iterdir()} == kept
    assert not any(item.is_symlink() for item in snap.iterdir())
    # What fits into one file goes to the link's target, and the shards beside the link go.
    link.symlink_to("../blobs/abc")
    cfl_ops.save_safetensors(state, snap, max_shard_size="1GB")
    assert [item.name for item in snap.iterdir()] == ["model.safetensors"]
    assert link.is_symlink()
    assert equal_states(cfl_ops.load_file(blobs / "abc"), state)


def test_a_link_to_another_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    link, real = tmp_path / "model.safetensors", tmp_path / "there" / "real"
    link.symlink_to("there/real")
    replace = Path.replace

    def across(self: Path, to: Path) -> Path:
        if self.parent != Path(to).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", across)
    state = {"w": torch.randn(500)}
    cfl_ops.save_safetensors(state, link, max_shard_size="1GB")
    assert equal_states(cfl_ops.load_file(real), state)
    assert sorted(item.name for item in tmp_path.rglob("*")) == ["model.safetensors", "real", "there"]


def test_the_path_that_was_given_is_read_after_it_was_split(tmp_path: Path) -> None:
    state, path = {f"w{i}": torch.randn(500) for i in range(4)}, tmp_path / "x.safetensors"
    cfl_ops.save_safetensors(state, path, max_shard_size=2000)
    assert not path.exists()
    assert equal_states(cfl_ops.load_file(path), state)
    model = torch.nn.Module()
    for name in state:
        model.register_buffer(name, torch.zeros(500))
    assert cfl_ops.load_model(model, path) == ([], [])
    with pytest.raises(FileNotFoundError):
        cfl_ops.load_file(tmp_path / "y.safetensors")


def test_transformers_reads_shards_of_longer_names(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=120, n_positions=32, n_embd=48, n_layer=2, n_head=4)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for (
            value
        ) in model.parameters():  # of any bits but NaN: nothing is gained, and so each is stored as it is
            value.copy_(of_bits(torch.float32, value.numel()).nan_to_num(1).view_as(value))
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    state = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for _ in range(2):  # the first over transformers' own names
        cfl_ops.save_safetensors(state, tmp_path, max_shard_size="60KB", metadata={"format": "pt"})
        names = {item.name for item in tmp_path.glob("*.safetensors")}
        other = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
        assert all(same(value, state[name]) for name, value in other.state_dict().items() if name in state)
        longer = any(re.fullmatch(r"model-\d{5}-of-\d{5}-[0-9a-f]{8}\.safetensors", name) for name in names)
        if longer:
            return
    pytest.fail("no shard got a longer name")


def test_a_mix_of_checkpoints_is_refused(sharded: Path) -> None:
    folder = sharded.parent
    kept = (folder / json.loads(sharded.read_text())["weight_map"]["w0"]).read_bytes()
    index = sharded.read_text()
    state = cfl_ops.load_file(folder)
    for name in ("w0", "w1", "w2", "w3"):
        state[name].copy_(state[name].flip(0))
    cfl_ops.save_safetensors(state, folder, max_shard_size=1500)
    assert sharded.read_text() != index
    first = folder / json.loads(sharded.read_text())["weight_map"]["w0"]
    first.write_bytes(kept)
    with pytest.raises(CorruptDataError, match=f"the index and the shard {first.name} are of different"):
        cfl_ops.load_file(folder)
    plain = json.loads(sharded.read_text())
    del plain["metadata"]["cfl_ops"]
    sharded.write_text(json.dumps(plain))  # as another writer's
    with pytest.raises(CorruptDataError, match="of different checkpoints"):
        cfl_ops.load_file(folder)


@pytest.mark.parametrize(
    "name", ["../{0}", "/tmp/{0}", "{1}/{0}", "./{0}", "..", ".", "", "a\\{0}", "{0}\0", "sub/{0}"]
)
def test_an_index_names_files_beside_it_only(sharded: Path, name: str) -> None:
    index = json.loads(sharded.read_text())
    file = index["weight_map"]["w1"]
    (sharded.parent / "sub").mkdir()
    (sharded.parent / "sub" / file).write_bytes((sharded.parent / file).read_bytes())
    index["weight_map"]["w1"] = name.format(file, sharded.parent)
    for plain in (False, True):
        if plain:
            del index["metadata"]
        sharded.write_text(json.dumps(index))
        with pytest.raises(CorruptDataError, match="must name files beside it, without a folder"):
            cfl_ops.load_file(sharded)


def test_indices_that_nobody_writes(sharded: Path) -> None:
    good = sharded.read_text()

    def refused(change: Any, message: str) -> None:
        index = json.loads(good)
        index = change(index) or index
        sharded.write_text(json.dumps(index))
        with pytest.raises(CorruptDataError, match=message):
            cfl_ops.load_file(sharded)

    other = next(iter(set(json.loads(good)["weight_map"].values()) - {json.loads(good)["weight_map"]["w1"]}))
    refused(lambda index: index["weight_map"].update(w1=other), "has no tensor 'w1'|that the index has not")
    refused(lambda index: index["weight_map"].update(x=other), "has no tensor 'x'")
    refused(lambda index: index["weight_map"].update(tied=other), "has no tensor 'tied'")
    refused(
        lambda index: index["weight_map"].pop("w1") and None, "tensors that the index has not|contradicts"
    )
    refused(lambda index: index.update(weight_map=[]), "no index of shards")
    refused(lambda index: index.update(weight_map={"a": 1}), "no index of shards")
    refused(lambda index: index.update(metadata=[1]), "no index of shards")
    refused(lambda index: {"metadata": {}}, "no index of shards")
    for text, message in (
        ("x", "nobody wrote"),
        ("{}", "nobody wrote"),
        ('{"version": 2}', "version that this reader does not know"),
        ('{"version": 1, "shards": {"a": "b"}}', "nobody wrote"),
        ('{"version": 1, "shards": {}}', "of different checkpoints"),
        (3, "nobody wrote"),
    ):
        refused(lambda index, text=text: index["metadata"].update(cfl_ops=text), message)  # type: ignore[misc]
    for data in (good[:-3], "{" * 100_000, "{}", '{"weight_map": {}, "weight_map": {}}'):
        sharded.write_text(data)
        with pytest.raises(CorruptDataError):
            cfl_ops.load_file(sharded)
    sharded.write_text(good)
    (sharded.parent / other).unlink()
    with pytest.raises(FileNotFoundError, match=f"must have its shards beside it, but there is no {other}"):
        cfl_ops.load_file(sharded)


def test_folders(tmp_path: Path) -> None:
    state = {"w": torch.ones(3)}
    cfl_ops.save_file(state, tmp_path / "a.cflz")
    assert equal_states(cfl_ops.load_file(tmp_path), state)
    cfl_ops.save_file(state, tmp_path / "b.cflz")
    with pytest.raises(FileNotFoundError, match=r"must hold one checkpoint, but got a\.cflz, b\.cflz"):
        cfl_ops.load_file(tmp_path)
    cfl_ops.save_safetensors({"v": torch.ones(3)}, tmp_path / "c.safetensors")
    assert cfl_ops.load_file(tmp_path).keys() == {"v"}
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="but there is none"):
        cfl_ops.load_file(os.fspath(tmp_path / "empty"))
