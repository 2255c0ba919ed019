"""State dicts and files of them, whole and damaged."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
from pathlib import Path
from typing import Any

import cfl_ops
import pytest
import torch
from cfl_ops import CorruptDataError
from cfl_ops.ops.codec.archive import write_archive
from cfl_ops.ops.codec.reference.header import as_bytes
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tests.codec.file_helpers import equal_states, first_version, overwrite
from tests.codec.helpers import DATA, FLOATS, cuts_and_extensions, flips, golden_weights, same


def test_state_dict_and_file(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(13)
    model = torch.nn.Sequential(torch.nn.Linear(60, 50), torch.nn.BatchNorm1d(50), torch.nn.Linear(50, 3))
    state: dict[str, Tensor] = dict(model.state_dict())
    state |= {
        "flags": torch.tensor([True, False]),
        "complex": torch.randn(3, dtype=torch.complex64),
        "half": torch.randn(999).half(),
        "nothing": torch.empty(0, 5),
        "ünïcode/名": torch.arange(5),
    }
    path = tmp_path / "model.cflz"
    size = cfl_ops.save_file(state, path, bits=8)
    assert size == path.stat().st_size
    back = cfl_ops.load_file(path)
    assert list(back) == list(state)
    for name, value in state.items():
        if value.dtype in FLOATS and value.numel() >= 256:
            assert same(back[name], cfl_ops.dequantize(cfl_ops.quantize(value, 8)))
        else:
            assert same(back[name], value)
    model.load_state_dict({name: back[name] for name in model.state_dict()})
    # A failing write leaves the old file and no temporary one.
    with pytest.raises(ValueError, match=r"NaN or Inf.*state_dict\['bad'\]"):
        cfl_ops.save_file({"bad": torch.full((300,), math.nan)}, path)
    assert path.stat().st_size == size
    assert [item.name for item in tmp_path.iterdir()] == ["model.cflz"]


def test_argument_errors_name_the_argument() -> None:
    with pytest.raises(TypeError, match=r"state_dict\['a'\] must be a tensor"):
        cfl_ops.compress_state_dict({"a": 3})  # type: ignore[dict-item]


def test_every_flip_cut_and_extension_of_a_file_raises(tmp_path: Path) -> None:
    path = tmp_path / "a.cflz"
    cfl_ops.save_file({"a": torch.randn(20), "b": torch.randn(40)}, path, bits=3, min_numel=30)
    data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    for damaged in itertools.chain(flips(data), cuts_and_extensions(data)):
        overwrite(path, as_bytes(damaged))
        with pytest.raises(CorruptDataError):
            cfl_ops.load_file(path)


@pytest.mark.parametrize("name", ["state.cflz", "state_2.cflz", "state.safetensors"])
def test_golden_files(backend: str, name: str, tmp_path: Path) -> None:
    """The first version, and what is written now, byte for byte."""
    back = cfl_ops.load_file(DATA / name)
    assert torch.equal(back["steps"], torch.tensor(7))
    w = golden_weights(torch.float32)
    assert same(back["weight"], cfl_ops.dequantize(cfl_ops.quantize(w, 7)))
    state, path = {"weight": w, "steps": torch.tensor(7), "again": w}, tmp_path / name
    if name == "state.cflz":
        assert back.keys() == {"weight", "steps"}
        path.write_bytes(first_version(cfl_ops.compress_state_dict({k: state[k] for k in back}, bits=7)))
    else:
        assert back["again"] is back["weight"]
        save = cfl_ops.save_file if name == "state_2.cflz" else cfl_ops.save_safetensors
        save(state, path, lossless=False, bits=7, metadata={"of": "a test"})  # type: ignore[operator]
    assert path.read_bytes() == (DATA / name).read_bytes()


class Wrapper(Tensor):
    """A tensor whose data are another's."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapper:
        made: Wrapper = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise NotImplementedError(func)


@pytest.mark.parametrize("save", [cfl_ops.save_file, cfl_ops.save_safetensors])
def test_tensors_without_data_of_their_own_are_refused(save: Any, tmp_path: Path) -> None:
    with FakeTensorMode():
        fake = torch.ones(3)
    for value in (Wrapper(torch.ones(3)), Wrapper(torch.ones(0)), fake):
        message = rf"cfl_ops.{save.__name__}: state_dict\['w'\] must be a plain tensor, but got {type(value).__name__}"
        with pytest.raises(TypeError, match=message):
            save({"a": torch.ones(1), "w": value}, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_reading_refuses_bad_arguments(tmp_path: Path) -> None:
    small = tmp_path / "small.cflz"
    cfl_ops.save_file({"a": torch.ones(2)}, small)
    for error, message, path, options in (
        (ValueError, "path must name a file, but got ''", "", {}),
        (TypeError, "path must be a path, but got int", 3, {}),
        (ValueError, "path must name a file", "a\0b", {}),
        (TypeError, "names must be strings, but got list", small, {"names": [["a"]]}),
        (TypeError, "names must be strings, but got int", small, {"names": [3]}),
        (TypeError, "names must be a name or several, but got int", small, {"names": 3}),
        (ValueError, "device must be one that holds data, but got 'meta'", small, {"device": "meta"}),
        (ValueError, "device must be there, but got 'foo': Expected one of", small, {"device": "foo"}),
        (TypeError, "device must be a device or its name, but got float", small, {"device": 3.5}),
        (TypeError, "device must be a device or its name, but got bool", small, {"device": True}),
    ):
        with pytest.raises(error, match=f"cfl_ops.load_file: {message}"):
            cfl_ops.load_file(path, **options)  # type: ignore[arg-type]
        if "names" not in options:
            with pytest.raises(error, match=f"cfl_ops.load_model: {message}"):
                cfl_ops.load_model(torch.nn.Linear(1, 1), path, **options)  # type: ignore[arg-type]
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device must be there, but got 'cuda'"):
            cfl_ops.load_file(small, device="cuda")
    with pytest.raises(ValueError, match="write_archive: path must name a file"):
        write_archive("", [])
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        cfl_ops.load_file(loop)
    with pytest.raises(FileNotFoundError):
        cfl_ops.load_file(tmp_path / ("x" * 250))


def test_what_has_no_end_is_not_read(tmp_path: Path) -> None:
    for device in ("/dev/zero", "/dev/urandom", "/dev/null"):
        with pytest.raises(ValueError, match=f"path must be a file or a pipe, but {device} is a device"):
            cfl_ops.load_file(device)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    ended = []

    def endless() -> None:
        with contextlib.suppress(BrokenPipeError), fifo.open("wb", buffering=0) as file:
            while True:
                file.write(b"zz")
        ended.append(True)

    writer = threading.Thread(target=endless)
    writer.start()
    with pytest.raises(CorruptDataError, match="fifo is neither a .cflz nor"):
        cfl_ops.load_file(fifo)
    writer.join(10)
    assert ended


def test_deltas_are_kept_and_come_back(tmp_path: Path) -> None:
    """Those of the command, which are entries of their own, and those that were saved as tensors are."""
    old = {"w": torch.randn(300, 40).bfloat16(), "tied": torch.zeros(300)}
    old["again"] = old["tied"]
    new = {name: value + 0.001 for name, value in old.items()}
    new["again"] = new["tied"]
    deltas = cfl_ops.compress_delta(new, old)
    path, other = tmp_path / "d.cflz", tmp_path / "e.cflz"
    write_archive(path, [("w", deltas["w"]), ("tied", deltas["tied"])], aliases={"again": "tied"})
    cfl_ops.save_file(deltas, other)
    for file in (path, other):
        back = cfl_ops.load_file(file)
        assert equal_states(back, deltas)
        assert equal_states(cfl_ops.apply_delta(old, back), new)
    with cfl_ops.open_file(path) as weights:
        assert same(weights.blob("w"), deltas["w"])
        assert same(weights.tensor("w", 3, 20), deltas["w"][3:20])
        assert weights.header("w") == (torch.uint8, (len(deltas["w"]),))
    with pytest.raises(cfl_ops.WrongBaseError) as caught:
        cfl_ops.apply_delta_(new, cfl_ops.load_file(path))
    assert caught.value.already_applied
    with pytest.raises(cfl_ops.WrongBaseError) as caught:
        cfl_ops.apply_delta_({name: value + 1 for name, value in old.items()}, deltas)
    assert not caught.value.already_applied
