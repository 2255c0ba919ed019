"""Compressed tensors in .safetensors: what other tools see, what is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import cfl_ops
import pytest
import torch
from cfl_ops import CorruptDataError
from cfl_ops.ops.codec import safetensors_writer
from cfl_ops.ops.codec.archive import write_archive
from cfl_ops.ops.codec.files import open_weights
from cfl_ops.ops.codec.safetensors_file import SafetensorsFile, notes_text

from tests.codec.file_helpers import (
    blob_bytes,
    damaged,
    equal_states,
    hard_state,
    of_bits,
    opened,
    overwrite,
    safetensors_bytes,
)
from tests.codec.helpers import same

safetensors_torch = pytest.importorskip("safetensors.torch")

PLAIN = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8),
    *(torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.safetensors"
    w = torch.zeros(300)
    cfl_ops.save_safetensors({"w": w, "b": torch.tensor([1, 3]), "tied": w}, path)
    return path


@pytest.mark.parametrize("shard", [None, "2KB", 1])
def test_every_dtype_shape_stride_and_name(backend: str, tmp_path: Path, shard: Any) -> None:
    state, path = hard_state(), tmp_path / "model.safetensors"
    size = cfl_ops.save_safetensors(state, path, max_shard_size=shard)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert size == sum(file.stat().st_size for file in files)
    assert equal_states(cfl_ops.load_file(tmp_path), state)
    assert not list(tmp_path.glob(".cfl*"))
    for file in files:
        seen, _ = opened(file)
        for name, value in seen.items():
            want = state[name].detach().resolve_conj()
            if value.dtype == want.dtype and value.shape == want.shape:  # native: any tool reads it
                assert same(value, want)
                assert value.data_ptr() % value.element_size() == 0
            else:
                back = cfl_ops.decompress(value[: blob_bytes(value)])
                assert equal_states({"": back}, {"": want})


def test_what_gains_nothing_is_native(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    state = {
        "weights": (torch.randn(400, 30) * 0.02).bfloat16(),
        "tied": torch.empty(0),
        "random": of_bits(torch.int32, 5000),
        "step": torch.tensor(3),
        "flags": torch.tensor([True, False, True]),
        "odd": torch.tensor([1.5], dtype=torch.float16),
        "complex": of_bits(torch.complex128, 5),
    }
    state["tied"] = state["weights"]
    cfl_ops.save_safetensors(state, path, metadata={"format": "pt"})
    seen, metadata = opened(path)
    assert metadata["format"] == "pt"
    assert seen.keys() == state.keys() - {"tied"}
    assert seen["weights"].dtype == torch.uint8
    assert len(seen["weights"]) < 0.75 * state["weights"].nbytes
    assert same(cfl_ops.decompress(seen["weights"]), state["weights"])
    for name in ("random", "step", "flags", "odd"):
        assert same(seen[name], state[name])
    assert seen["complex"].dtype == torch.uint8  # safetensors has no complex128
    with open_weights(path) as weights:
        assert isinstance(weights, SafetensorsFile)
        assert weights.metadata == {"format": "pt"}
        assert weights.aliases == {"tied": "weights"}
        assert {name for name in weights.names if weights.native(name)} == {"random", "step", "flags", "odd"}
        assert weights.header("tied") == (torch.bfloat16, (400, 30))
        assert weights.stored_bytes("random") == 20_000
        assert weights.stored_bytes("tied") == 0
        for name in weights.names:
            assert same(cfl_ops.decompress(weights.blob(name)), state[name])
            flat = state[name].reshape(-1)
            out = torch.empty_like(state[name])
            assert same(weights.tensor(name, out=out), state[name])
            if flat.numel() > 2:
                assert same(weights.tensor(name, 1, 3), flat[1:3])
        with pytest.raises(IndexError):
            weights.tensor("random", 5001)
        with pytest.raises(ValueError, match="out must be contiguous, of 5000 elements of torch.int32"):
            weights.tensor("random", out=torch.empty(5000))
        blob = weights.blob("weights")
    assert same(cfl_ops.decompress(blob), state["weights"])
    with pytest.raises(ValueError, match="must be open"):
        weights.tensor("random")
    # An archive of the same.
    with open_weights(path) as weights:
        write_archive(tmp_path / "a.cflz", ((n, weights.blob(n)) for n in weights.names if n != "tied"))
    assert cfl_ops.load_file(tmp_path / "a.cflz").keys() == seen.keys()


def test_lossy_and_loading_by_name(tmp_path: Path) -> None:
    path, w = tmp_path / "a.safetensors", torch.randn(300, 40)
    cfl_ops.save_safetensors({"w": w, "n": torch.arange(9)}, path, lossless=False, bits=8)
    assert list(cfl_ops.load_file(path, "n")) == ["n"]
    assert same(cfl_ops.load_file(path)["w"], cfl_ops.dequantize(cfl_ops.quantize(w, 8)))
    with pytest.raises(KeyError, match="near it are 'w'"):
        cfl_ops.load_file(path, ["ww"])


def test_plain_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "plain.safetensors"
    state = {f"all.{dtype}": of_bits(dtype, 30) for dtype in PLAIN}
    state |= {"0-d": torch.tensor(2.0), "empty": torch.empty(3, 0), "a\nb": torch.ones(2)}
    safetensors_torch.save_file(state, path, metadata={"k": "v"})
    back = cfl_ops.load_file(path)
    assert equal_states(back, state)
    back["0-d"].zero_()  # it is a copy
    assert cfl_ops.load_file(path, "0-d")["0-d"] == 2
    with open_weights(path) as weights:
        assert weights.metadata == {"k": "v"}
        assert all(map(weights.native, weights.names))
    # Odd sizes before wide elements, as other writers leave them.
    header = {
        "a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        "c": {"dtype": "F4", "shape": [2, 4], "data_offsets": [11, 15]},
        "d": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [15, 16]},
        "e": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [16, 19]},
    }
    path.write_bytes(safetensors_bytes(header, b"abc" + struct.pack("<2f", 1, 2) + b"12345678"))
    back = cfl_ops.load_file(path, ["a", "b", "c", "d"])
    assert back["b"].tolist() == [1, 2]
    assert back["c"].shape == (2, 2)
    assert back["c"].dtype == torch.float4_e2m1fn_x2
    with pytest.raises(ValueError, match="must have a dtype that torch has, but got F6_E2M3"):
        cfl_ops.load_file(path)


def test_every_flip_cut_and_extension(small: Path) -> None:
    """The metadata of the user alone have no checksum."""
    path = small.with_name("damaged.safetensors")
    want = cfl_ops.load_file(small)
    for data in damaged(small):
        overwrite(path, data)
        try:
            got = cfl_ops.load_file(path)
        except CorruptDataError:
            continue
        assert equal_states(got, want)  # of another spelling, as \u00E9 is
        pytest.fail("nothing in this file can be spelt in two ways")


HEADER = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ([], 0),
        ("text", 0),
        (b"{", 0),
        (b"{}}", 0),
        (b"[" * 200_000, 0),
        (b'{"a":' * 50_000, 0),
        (b"\xff", 0),
        ({"w": HEADER["w"]}, 7),
        ({"w": HEADER["w"]}, 9),
        ({"w": {**HEADER["w"], "shape": [3]}}, 8),
        ({"w": {**HEADER["w"], "shape": [-2]}}, 8),
        ({"w": {**HEADER["w"], "shape": [True, 2]}}, 8),
        ({"w": {**HEADER["w"], "shape": [2.0]}}, 8),
        ({"w": {**HEADER["w"], "shape": [2**63, 0], "data_offsets": [0, 0]}}, 0),
        ({"w": {**HEADER["w"], "shape": [2**62, 2**62, 0], "data_offsets": [0, 0]}}, 0),
        ({"w": {**HEADER["w"], "shape": [1] * 65 + [2]}}, 8),
        ({"w": {**HEADER["w"], "data_offsets": [8, 0]}}, 8),
        ({"w": {**HEADER["w"], "data_offsets": [0, 8, 8]}}, 8),
        ({"w": {**HEADER["w"], "data_offsets": [0, 2**64]}}, 8),
        ({"w": {**HEADER["w"], "dtype": "F33"}}, 8),
        ({"w": {**HEADER["w"], "dtype": 3}}, 8),
        ({"w": {**HEADER["w"], "more": 1}}, 8),
        ({"w": {"dtype": "F32", "shape": [2]}}, 8),
        ({"w": HEADER["w"], "v": HEADER["w"]}, 8),
        ({"w": HEADER["w"], "v": {**HEADER["w"], "data_offsets": [9, 17]}}, 17),
        ({"w": HEADER["w"], "__metadata__": {"a": 1}}, 8),
        ({"w": HEADER["w"], "__metadata__": None}, 8),
        (json.dumps(HEADER)[:-1].encode() + b"," + json.dumps(HEADER)[1:].encode(), 8),
        ({"w": HEADER["w"], "__metadata__": {"cfl_ops": "x"}}, 8),
        ({"w": HEADER["w"], "__metadata__": {"cfl_ops": "{}"}}, 8),
        ({"w": HEADER["w"], "__metadata__": {"cfl_ops": '{"version":1}'}}, 8),
        ({"w": HEADER["w"], "__metadata__": {"cfl_ops": "[" * 200_000}}, 8),
    ],
)
def test_headers_that_nobody_writes(tmp_path: Path, header: Any, body: int) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes(header, bytes(body)))
    with pytest.raises(CorruptDataError, match=r"a\.safetensors"):
        cfl_ops.load_file(path)


def test_lengths_that_nobody_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    good = safetensors_bytes(HEADER, bytes(8))
    path.write_bytes(good)
    assert cfl_ops.load_file(path)["w"].tolist() == [0, 0]
    for size in (0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1, 100_000_001):
        path.write_bytes(size.to_bytes(8, "little") + good[8:])
        with pytest.raises(CorruptDataError):
            cfl_ops.load_file(path)


def rewritten(path: Path, change: Any) -> None:
    """The file with its header, and the part of the metadata that is ours, changed and sealed anew."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    notes = json.loads(header["__metadata__"]["cfl_ops"])
    change(header, notes)
    sealed = json.loads(notes_text(notes["tensors"], notes["aliases"], notes["shard"]))
    sealed["version"] = notes["version"]
    header["__metadata__"]["cfl_ops"] = json.dumps(sealed)
    path.write_bytes(safetensors_bytes(header, data[8 + size :]))


def test_metadata_that_contradict(small: Path) -> None:
    """Sealed with the right checksum, and still refused."""
    data = small.read_bytes()
    rewritten(small, lambda header, notes: None)
    assert cfl_ops.load_file(small).keys() == {"w", "b", "tied"}

    def note(**changes: Any) -> Any:
        return lambda header, notes: notes["tensors"]["w"].update(changes)

    for message, change in {
        "version that this reader does not know": lambda header, notes: notes.update(version=2),
        "another dtype or shape than the metadata say": note(dtype="bfloat16"),
        "another dtype or shape than the": note(shape=[100, 3]),
        "not the one that the metadata name": note(checksum=1),
        "not the one that the metadata": note(padding=1),
        "contradict its header": note(padding=-1),
        "contradict its heade": note(padding=9),
        "contradict its head": note(shape="300"),
        "contradict its hea": note(checksum="1"),
        "contradict its he": note(more=1),
        "contradict its h": lambda header, notes: notes["tensors"].pop("w"),
        "contradict its ": lambda header, notes: notes["tensors"].update(v=notes["tensors"]["w"]),
        "contradict its": lambda header, notes: notes["aliases"].update(x="nobody"),
        "contradict it": lambda header, notes: notes["aliases"].update(b="w"),
        "contradict i": lambda header, notes: notes["tensors"]["b"].update(shape=[1, 2]),
        "contradict ": lambda header, notes: notes["tensors"]["b"].update(dtype="float64"),
        "contradict": lambda header, notes: notes["tensors"]["w"].pop("padding"),
        "data are damaged": lambda header, notes: notes["tensors"]["b"].update(checksum=5),
    }.items():
        small.write_bytes(data)
        rewritten(small, change)
        with pytest.raises(CorruptDataError, match=message):
            cfl_ops.load_file(small)


def test_metadata_that_a_tool_dropped(small: Path) -> None:
    """Bytes are given out as bytes, with a warning that says what they are."""
    seen, metadata = opened(small)
    want = cfl_ops.load_file(small)
    safetensors_torch.save_file(seen, small)
    with pytest.warns(UserWarning, match="without the metadata that say so, .* as uint8: 'w' ") as caught:
        got = cfl_ops.load_file(small)
    assert caught[0].filename == __file__
    assert equal_states(got, seen)
    assert same(cfl_ops.decompress(got["w"][: blob_bytes(got["w"])]), want["w"])
    assert cfl_ops.load_file(small, "b")["b"].tolist() == [1, 3]  # it says nothing of what is not asked for
    safetensors_torch.save_file(seen, small, metadata={"ours": metadata["cfl_ops"]})
    with pytest.raises(CorruptDataError, match="metadata of cfl_ops under another name"):
        cfl_ops.load_file(small)
    safetensors_torch.save_file(seen, small, metadata=metadata)  # in another order, and it is read
    assert cfl_ops.load_file(small).keys() == {"w", "b", "tied"}


def test_the_writer_refuses(tmp_path: Path) -> None:
    path, one = tmp_path / "a", {"w": torch.ones(1)}
    for error, message, state, options in (
        (ValueError, "must not have the key '__metadata__'", {"__metadata__": one["w"]}, {}),
        (ValueError, "metadata must not have the key 'cfl_ops'", one, {"metadata": {"cfl_ops": "1"}}),
        (ValueError, "max_shard_size must be at least 1", one, {"max_shard_size": 0}),
        (TypeError, "max_shard_size must be an integer", one, {"max_shard_size": 2.5}),
        (ValueError, "max_shard_size must be a number of bytes, or like '5GB', but got '5XB'", one,
         {"max_shard_size": "5XB"}),
        (ValueError, "max_shard_size must be a number of bytes", one, {"max_shard_size": "0"}),
        (ValueError, r"max_shard_size must be a .*9\.\.\.'$", one, {"max_shard_size": "9" * 400 + "GB"}),
        (ValueError, r"max_shard_size must be a .*9\.\.\.'$", one, {"max_shard_size": "9" * 5000}),
        (ValueError, "metadata must not look like this package's own", one,
         {"metadata": {"copy": '{"format":"cfl_ops","version":1}'}}),
        (ValueError, "path must be that of a regular file", one, {"path": "/dev/null"}),
    ):  # fmt: skip
        with pytest.raises(error, match=f"cfl_ops.save_safetensors: .*{message}"):
            cfl_ops.save_safetensors(state, **{"path": path, **options})
    assert not list(tmp_path.iterdir())
    cfl_ops.save_safetensors(one, path, metadata={"copy": 'a {"format":"cfl_ops"', "cfl_ops2": "{}"})
    assert cfl_ops.load_file(path).keys() == {"w"}
    for text, size in (("5GB", 5 * 10**9), ("1.5 kib", 1536), ("300", 300), ("2MB", 2 * 10**6), (7, 7)):
        assert safetensors_writer.bytes_of("op", "max_shard_size", text) == size


def test_endings_tell_what_a_file_is(tmp_path: Path) -> None:
    state = {"w": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"save_file: path must not end in \.safetensors"):
        cfl_ops.save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(
        ValueError, match=r"save_safetensors: path must not end in \.cflz, which save_file writes"
    ):
        cfl_ops.save_safetensors(state, tmp_path / "x.cflz")
    assert not list(tmp_path.iterdir())
