"""The .cflz container: both versions, read where it lies, written in a stream, replaced whole; what is refused."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import stat
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cfl_ops
import pytest
import torch
from cfl_ops import CorruptDataError
from cfl_ops.ops.codec import archive, atomic
from cfl_ops.ops.codec.archive import Archive, write_archive
from cfl_ops.ops.codec.files import open_weights
from torch import Tensor

from tests.codec.file_helpers import (
    damaged,
    equal_states,
    first_version,
    hard_state,
    overwrite,
    parts,
    second_version,
)
from tests.codec.helpers import same

ROOT = Path(__file__).parents[2]


def blobs_of(**tensors: Tensor) -> dict[str, Tensor]:
    return cfl_ops.compress_state_dict(tensors)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.cflz"
    tied = torch.tensor([1.0, 2.0])
    cfl_ops.save_file({"a": tied, "b": torch.arange(3), "tied": tied}, path, metadata={"k": "v"})
    return path


@pytest.mark.parametrize("lossless", [True, False])
def test_every_dtype_shape_stride_and_name(backend: str, tmp_path: Path, lossless: bool) -> None:
    state = hard_state()
    path = tmp_path / "hard.cflz"
    if lossless:
        size = cfl_ops.save_file(state, path, lossless=True)
        assert equal_states(cfl_ops.load_file(path), state)
    else:
        state = {name: value for name, value in state.items() if not value.is_floating_point()}
        size = cfl_ops.save_file(state, path)
        assert equal_states(cfl_ops.load_file(path), state)
    assert size == path.stat().st_size
    assert list(cfl_ops.load_file(path)) == list(state)
    assert [item.name for item in tmp_path.iterdir()] == ["hard.cflz"]


def test_every_flip_cut_and_extension_raises(small: Path) -> None:
    path = small.with_name("damaged.cflz")
    for data in damaged(small):
        overwrite(path, data)
        with pytest.raises(CorruptDataError, match="damaged.cflz"):
            cfl_ops.load_file(path)


def test_the_first_version_is_read_and_every_flip_raises(tmp_path: Path) -> None:
    path = tmp_path / "first.cflz"
    state = {"a": torch.tensor([1.0, 2.0]), "ü": torch.arange(3)}
    path.write_bytes(first_version(blobs_of(**state)))
    assert equal_states(cfl_ops.load_file(path), state)
    with Archive(path) as opened:
        assert opened.names == ("a", "ü")
        assert opened.metadata == opened.aliases == {}
    copy = tmp_path / "damaged.cflz"
    for data in damaged(path):
        overwrite(copy, data)
        with pytest.raises(CorruptDataError):
            cfl_ops.load_file(copy)


def entry(size: int, checksum: int, of: int, name: bytes) -> bytes:
    return struct.pack("<QIII", size, checksum, of, len(name)) + name


def test_what_no_writer_writes_is_refused(tmp_path: Path) -> None:
    blob = cfl_ops.compress(torch.zeros(3))
    body, checksum, own = bytes(blob.tolist()), archive.first_checksum(blob), 0xFFFFFFFF
    one = entry(len(body), checksum, own, b"a")
    path = tmp_path / "forged.cflz"

    def read(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        path.write_bytes(second_version(*arguments, **options))
        return cfl_ops.load_file(path)

    assert read(body, one + b"{}", 1).keys() == {"a"}
    assert read(body, one + entry(0, 0, 0, b"b") + b"{}", 2).keys() == {"a", "b"}
    assert read(b"", b"{}", 0) == {}
    for _, arguments in {
        "the same name twice": (body * 2, one + one + b"{}", 2),
        "an alias of the same name": (body, one + entry(0, 0, 0, b"a") + b"{}", 2),
        "an alias of an alias": (body, one + entry(0, 0, 2, b"b") + entry(0, 0, 1, b"c") + b"{}", 3),
        "an alias of nothing": (body, one + entry(0, 0, 7, b"b") + b"{}", 2),
        "an alias with bytes": (body, entry(len(body), checksum, 0, b"a") + b"{}", 1),
        "a name that is no UTF-8": (body, entry(len(body), checksum, own, b"\xff") + b"{}", 1),
        "a blob beyond the end": (body, entry(2**64 - 1, checksum, own, b"a") + b"{}", 1),
        "a blob that is too short": (body, entry(len(body) - 1, checksum, own, b"a") + b"{}", 1),
        "a name beyond the index": (body, struct.pack("<QIII", len(body), checksum, own, 2**32 - 1), 1),
        "more entries": (body, one + b"{}", 2),
        "fewer entries": (body, one + b"{}", 0),
        "2^32 entries": (body, one + b"{}", 2**32 - 1),
        "no metadata": (body, one, 1),
        "metadata that are no object": (body, one + b"[]", 1),
        "metadata that are no strings": (body, one + b'{"a": 1}', 1),
        "metadata of great depth": (body, one + b'{"a":' + b"[" * 100_000, 1),
    }.items():
        with pytest.raises(CorruptDataError, match="contradicts itself"):
            read(*arguments)
    with pytest.raises(CorruptDataError, match="not the one that the index names"):
        read(body, entry(len(body), checksum ^ 1, own, b"a") + b"{}", 1)
    for version in (0, 3, 2**32 - 1):
        with pytest.raises(CorruptDataError, match="version that this reader does not know"):
            read(body, one + b"{}", 1, version=version)
    with pytest.raises(CorruptDataError, match="version that this reader does not know"):
        read(body, one + b"{}", 1, reserved=1)
    with pytest.raises(CorruptDataError, match="another length"):
        read(body, one + b"{}", 1, total=2**64 - 1)


def test_blobs_that_changed_places_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.cflz"
    cfl_ops.save_file({"a": torch.zeros(4), "b": torch.ones(4)}, path)
    body, index, count = parts(path.read_bytes())
    half = len(body) // 2
    path.write_bytes(second_version(body[half:] + body[:half], index, count))
    with pytest.raises(CorruptDataError, match="not the one that the index names"):
        cfl_ops.load_file(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign"
    for data in (b"", b"C", b"CFLZ", b"PK\3\4" * 20, b"\x80\2ctorch", b"\0" * 100, b"CFLC" * 20):
        path.write_bytes(data)
        with pytest.raises(CorruptDataError, match="foreign"):
            cfl_ops.load_file(path)
    with pytest.raises(FileNotFoundError):
        cfl_ops.load_file(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="must hold one checkpoint, but there is none"):
        cfl_ops.load_file(tmp_path / "..")


def test_names(small: Path) -> None:
    whole = cfl_ops.load_file(small)
    assert list(whole) == ["a", "b", "tied"]
    assert whole["tied"] is whole["a"]
    assert list(cfl_ops.load_file(small, "b")) == ["b"]
    assert list(cfl_ops.load_file(small, iter(["tied", "b", "tied"]))) == ["tied", "b"]
    assert same(cfl_ops.load_file(small, names=["tied"])["tied"], whole["a"])
    assert cfl_ops.load_file(small, []) == {}
    assert list(cfl_ops.load_file(small, names=None, device="cpu")) == list(whole)
    with pytest.raises(
        KeyError, match=r"load_file: names must be in .*, but got 'tier'; near it are 'tied'"
    ) as raised:
        cfl_ops.load_file(small, ["a", "tier"])
    assert not str(raised.value).startswith("'")
    with pytest.raises(TypeError, match="names must be strings, but got int"):
        cfl_ops.load_file(small, [3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="names must be a name or several, but got int"):
        cfl_ops.load_file(small, 3)  # type: ignore[arg-type]


def test_blobs_are_the_bytes_of_the_file(small: Path) -> None:
    before = small.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = Archive(small)
        with opened as weights:
            assert weights.names == ("a", "b", "tied")
            assert weights.aliases == {"tied": "a"}
            assert weights.metadata == {"k": "v"}
            assert len(weights) == 3
            assert "b" in weights
            assert "c" not in weights
            blob = weights.blob("a")
            assert blob.dtype == torch.uint8
            assert blob.untyped_storage().nbytes() == len(before)
            assert blob.data_ptr() == weights.blob("tied").data_ptr()
            assert weights.stored_bytes("a") == len(blob)
            assert weights.stored_bytes("tied") == 0
            assert weights.header("b") == (torch.int64, (3,))
            assert not weights.native("a")
            assert same(weights.tensor("b"), torch.arange(3))
            assert same(weights.tensor("b", 1), torch.arange(1, 3))
            assert same(weights.tensor("tied", 1, 2), torch.tensor([2.0]))
            out = torch.empty(2)
            assert weights.tensor("a", out=out) is out
            with pytest.raises(IndexError):
                weights.tensor("a", 5)
            with pytest.raises(KeyError):
                weights.blob("c")
    assert cfl_ops.decompress(blob).tolist() == [1.0, 2.0]  # it outlives the archive
    blob.zero_()  # and is nobody's but ours
    assert small.read_bytes() == before
    with pytest.raises(ValueError, match="must be open, but it was closed"):
        opened.blob("a")


def test_a_file_may_be_replaced_while_it_is_read(small: Path) -> None:
    with Archive(small) as weights:
        cfl_ops.save_file({"a": torch.zeros(1000)}, small)
        assert weights.tensor("a").tolist() == [1.0, 2.0]
        assert cfl_ops.load_file(small)["a"].shape == (1000,)
    # Into itself, as a tool that converts in place does.
    with open_weights(small) as weights:
        write_archive(small, ((name, weights.blob(name)) for name in weights.names), {"again": "yes"})
    with open_weights(small) as weights:
        assert weights.metadata == {"again": "yes"}
        assert weights.tensor("a").shape == (1000,)


class Recorder:
    """Takes bytes, and says when."""

    def __init__(self, events: list[str]) -> None:
        self.events, self.data = events, bytearray()

    def write(self, data: Any) -> int:
        taken = bytes(data[:1000])  # fewer than it was given, as a raw file may
        self.events.append("write")
        self.data += taken
        return len(taken)


def test_entries_are_written_as_they_are_made(tmp_path: Path) -> None:
    events: list[str] = []
    state = {"a": torch.randn(800), "b": torch.randn(3)}

    def entries() -> Iterator[tuple[str, Tensor]]:
        for name, value in state.items():
            events.append(name)
            yield name, cfl_ops.compress(value, lossless=True)

    target = Recorder(events)
    size = write_archive(target, entries(), aliases={"c": "b"})
    assert size == len(target.data)
    assert [event for event, _ in itertools.groupby(events)] == ["write", "a", "write", "b", "write"]
    (tmp_path / "x").write_bytes(target.data)
    assert equal_states(cfl_ops.load_file(tmp_path / "x"), state | {"c": state["b"]})
    stream = io.BytesIO()
    assert write_archive(stream, ()) == len(stream.getvalue())


def test_pipes_and_devices_are_written_and_read(tmp_path: Path) -> None:
    state, fifo = {"a": torch.randn(60_000)}, tmp_path / "fifo"
    os.mkfifo(fifo)
    writer = threading.Thread(target=lambda: cfl_ops.save_file(state, fifo, lossless=True))
    writer.start()
    assert equal_states(cfl_ops.load_file(fifo), state)
    writer.join()
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    cfl_ops.save_file(state, "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)  # noqa: PTH116
    with pytest.raises(OSError, match="No space left"):
        cfl_ops.save_file(state, "/dev/full")
    with pytest.raises(IsADirectoryError):
        cfl_ops.save_file(state, tmp_path)
    code = "import sys, torch; from cfl_ops.ops.codec.archive import write_archive; import cfl_ops; "
    code += "write_archive(sys.stdout.buffer, [('a', cfl_ops.compress(torch.ones(3)))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment())
    (tmp_path / "out").write_bytes(done.stdout)
    assert cfl_ops.load_file(tmp_path / "out")["a"].tolist() == [1, 1, 1]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_umask_and_the_mode_of_an_old_file(tmp_path: Path, umask: int) -> None:
    path = tmp_path / "a"
    for save in (cfl_ops.save_file, cfl_ops.save_safetensors):
        path.unlink(missing_ok=True)
        save({"a": torch.ones(2)}, path)  # type: ignore[operator]
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
        for mode in (0o600, 0o664, 0o444):
            path.chmod(mode)
            save({"a": torch.ones(2)}, path)  # type: ignore[operator]
            assert stat.S_IMODE(path.stat().st_mode) == mode


def test_links_and_long_names(tmp_path: Path) -> None:
    state = {"a": torch.ones(2)}
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    real, link, chain = folder / "real.cflz", tmp_path / "link.cflz", tmp_path / "chain.cflz"
    link.symlink_to("elsewhere/real.cflz")
    chain.symlink_to("link.cflz")
    for target in (link, chain):  # the first time it dangles
        cfl_ops.save_file(state, target)
        assert link.is_symlink()
        assert chain.is_symlink()
        assert equal_states(cfl_ops.load_file(real), state)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["chain.cflz", "elsewhere", "link.cflz"]
    assert [item.name for item in folder.iterdir()] == ["real.cflz"]
    long = tmp_path / ("x" * 250 + ".cflz")
    for _ in range(2):
        cfl_ops.save_file(state, long)
    assert equal_states(cfl_ops.load_file(long), state)
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    for save in (cfl_ops.save_file, cfl_ops.save_safetensors):
        with pytest.raises(OSError, match="Too many levels of symbolic links"):
            save(state, loop)  # type: ignore[operator]
    with pytest.raises(FileNotFoundError, match="absent"):
        cfl_ops.save_file(state, tmp_path / "absent" / "a.cflz")


SAVERS = {
    "archive": lambda state, path: cfl_ops.save_file(state, path, bits=8),
    "safetensors": lambda state, path: cfl_ops.save_safetensors(state, path, lossless=False, bits=8),
    "shards": lambda state, path: cfl_ops.save_safetensors(
        state, path, lossless=False, bits=8, max_shard_size=3000
    ),
}


@pytest.mark.parametrize("kind", SAVERS)
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, error: BaseException
) -> None:
    """At each call of the system in turn; once a file got its name, the old checkpoint or the new one is whole."""
    path, save = tmp_path / ("model.cflz" if kind == "archive" else "model.safetensors"), SAVERS[kind]
    old = {f"w{i}": torch.randn(1000) for i in range(4)}
    new = {f"w{i}": torch.randn(1000) for i in range(4)}
    save(old, path)
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    want = cfl_ops.load_file(tmp_path)
    other = tmp_path.with_name(tmp_path.name + "_new")
    other.mkdir()
    save(new, other / path.name)
    wants = [want, cfl_ops.load_file(other)]
    monkeypatch.setattr(atomic, "PIECE", 1 << 10)
    for number in range(1, 200):
        left = number
        with monkeypatch.context() as patch:

            def counted(function: Any) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left == 0:
                        raise error
                    return function(*args, **kwargs)

                return call

            for name in ("write", "pwrite", "lseek", "fsync"):
                patch.setattr(os, name, counted(getattr(os, name)))
            patch.setattr(Path, "replace", counted(Path.replace))
            renamed: list[Path] = []

            def replace(self: Path, to: Path, f: Any = Path.replace, renamed: list[Path] = renamed) -> None:
                f(self, to)
                renamed.append(to)

            patch.setattr(Path, "replace", replace)
            try:
                save(new, path)
            except (OSError, KeyboardInterrupt):
                if not renamed:
                    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before
                else:
                    got = cfl_ops.load_file(tmp_path)
                    assert any(equal_states(got, each) for each in wants)
                assert not list(tmp_path.glob(".cfl*"))
                count = len([*tmp_path.iterdir()])
                assert renamed or count == len(before)
            else:
                break
    else:
        pytest.fail("it never wrote")
    assert number > 10
    assert not list(tmp_path.glob(".cfl*"))


def test_a_file_that_grows_beyond_the_limit(tmp_path: Path) -> None:
    """A real refusal of the system in the middle of a write."""
    code = (
        "import resource, signal, sys, torch, cfl_ops; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "cfl_ops.save_file({'a': torch.randn(20_000), 'b': torch.randn(90_000)}, sys.argv[1])"
    )
    path = tmp_path / "a.cflz"
    cfl_ops.save_file({"a": torch.ones(3)}, path)
    before = path.read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, text=True, env=environment()
    )
    assert "File too large" in done.stderr
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["a.cflz"]


def killed(kills: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.codec.killed", "--kills", str(kills)],
        capture_output=True, text=True, env=environment(), cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    out: dict[str, Any] = json.loads(done.stdout)
    return out


def test_a_writer_that_is_killed_leaves_the_old_file_or_the_new_one() -> None:
    for every, _ in killed(4).values():
        assert every.keys() == {"old", "new"}
        assert every["old"] > 10


@pytest.mark.slow
def test_200_kills() -> None:
    for _, at_random in killed(200).values():
        assert sum(at_random.values()) == 200
        assert set(at_random) <= {"old", "new"}


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    w = torch.randn(50, 50)
    nn = torch.nn
    state = {
        "a": w,
        "same object": w,
        "view": w.view(50, 50),
        "detached": nn.Parameter(w).detach(),
        "other shape": w.view(2500),
        "transposed": w.t(),
        "part": w[:25],
        "bits": w.view(torch.int32),
        "equal": w.clone(),
        "negated": torch.complex(w, w).conj().imag,
        "nothing": torch.empty(0),
        "nothing too": torch.empty(0),
    }
    path = tmp_path / "a"
    cfl_ops.save_file(state, path, lossless=True)
    with open_weights(path) as weights:
        assert weights.aliases == dict.fromkeys(("same object", "view", "detached"), "a")
    back = cfl_ops.load_file(path)
    assert equal_states(back, state)
    assert back["view"] is back["a"]
    assert back["equal"] is not back["a"]

    class Lazy(dict[str, Tensor]):
        """Makes its values when they are asked for: their memory is used again."""

        def items(self) -> Any:
            return ((name, torch.full((3000,), float(len(name)))) for name in self)

        def __getitem__(self, name: str) -> Tensor:
            return torch.full((3000,), float(len(name)))

    for save in (cfl_ops.save_file, cfl_ops.save_safetensors):
        save(Lazy.fromkeys(("a", "bb", "ccc")), path, lossless=True)  # type: ignore[operator]
        assert {name: float(value[0]) for name, value in cfl_ops.load_file(path).items()} == {
            "a": 1, "bb": 2, "ccc": 3
        }  # fmt: skip


@pytest.mark.parametrize("save", [cfl_ops.save_file, cfl_ops.save_safetensors])
def test_bad_arguments_name_the_argument(save: Any, tmp_path: Path) -> None:
    path, op = tmp_path / "a", f"cfl_ops.{save.__name__}: "
    one = torch.ones(1)
    for error, message, state, options in (
        (TypeError, "state_dict must map names to tensors, but got list", [one], {}),
        (TypeError, "state_dict must have strings as keys, but got 3", {3: one}, {}),
        (TypeError, r"state_dict\['a'\] must be a tensor, but got int", {"a": 1}, {}),
        (TypeError, r"state_dict\['a'\] must be a strided tensor", {"a": torch.ones(2).to_sparse()}, {}),
        (ValueError, r"state_dict\['a'\] must hold data, but it is on the meta", {"a": one.to("meta")}, {}),
        (ValueError, r"names must be Unicode text, but got '\\ud800'", {"\ud800": one}, {}),
        (
            ValueError,
            r"metadata must be Unicode text, but got '\\ud800'",
            {"a": one},
            {"metadata": {"k": "\ud800"}},
        ),
        (TypeError, "lossless must be True or False, but got str 'no'", {"a": one}, {"lossless": "no"}),
        (TypeError, "lossless must be True or False, but got NoneType", {"a": one}, {"lossless": None}),
        (TypeError, "min_numel must be an integer", {"a": one}, {"min_numel": 1.5}),
        (TypeError, "unknown options bitz", {"a": one}, {"lossless": False, "bitz": 3}),
        (ValueError, "path must name a file, but got ''", {"a": one}, {"path": ""}),
        (ValueError, r"path must name a file, but got 'a\\x00b'", {"a": one}, {"path": "a\0b"}),
        (TypeError, "path must be a path, but got NoneType", {"a": one}, {"path": None}),
        (TypeError, "metadata must be a mapping, but got list", {"a": one}, {"metadata": [1]}),
        (
            TypeError,
            "metadata must map strings to strings, but got 'k': 3",
            {"a": one},
            {"metadata": {"k": 3}},
        ),
    ):
        with pytest.raises(error, match=op + message):
            save(state, **{"path": path, **options})
    assert not path.exists()
    assert not list(tmp_path.iterdir())


def test_write_archive_refuses_what_is_no_blob(tmp_path: Path) -> None:
    path, blob = tmp_path / "a", cfl_ops.compress(torch.ones(2))
    for error, message, entries, aliases in (
        (ValueError, "names must differ, but got 'a' twice", [("a", blob), ("a", blob)], {}),
        (ValueError, "names must differ, but got 'a' twice", [("a", blob)], {"a": "a"}),
        (ValueError, "'b' must be tied to a stored name, but got 'c'", [("a", blob)], {"b": "c"}),
        (TypeError, "names must be strings, but got 3", [(3, blob)], {}),
        (TypeError, "the blob of 'a' must be a tensor", [("a", b"123")], {}),
        (TypeError, "the blob of 'a' must be 1-d uint8", [("a", torch.ones(3))], {}),
        (TypeError, "the blob of 'a' must be 1-d uint8", [("a", blob.view(1, -1))], {}),
    ):
        with pytest.raises(error, match=f"cfl_ops.write_archive: {message}"):
            write_archive(path, entries, aliases=aliases)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_warning_points_here(tmp_path: Path) -> None:
    for save in (cfl_ops.save_file, cfl_ops.save_safetensors):
        with pytest.warns(UserWarning, match=rf"cfl_ops.{save.__name__}: .*state_dict\['w'\]") as caught:  # type: ignore[attr-defined]
            save({"w": torch.randn(999)}, tmp_path / "a", lossless=False, bits=2)  # type: ignore[operator]
        assert caught[0].filename == __file__


def memory(megabytes: int, lossless: bool) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.codec.memory", str(megabytes), str(int(lossless))],
        capture_output=True, text=True, env=environment(), cwd=ROOT, check=True,
    )  # fmt: skip
    out: dict[str, float] = json.loads(done.stdout)
    return out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("megabytes", "lossless"), [(48, False), pytest.param(200, True, marks=pytest.mark.slow)]
)
def test_memory_is_one_tensor_above_the_weights(megabytes: int, lossless: bool) -> None:
    """Peaks in tensors, of which there are eight: what save takes above the state dict, load above its result."""
    found = memory(megabytes, lossless)
    assert found.pop("ratio") < 1
    assert all(peak < 2 for peak in found.values()), found


def test_loading_is_not_slowed_by_names(tmp_path: Path) -> None:
    """Ten thousand entries are opened and read in a time that grows with their number."""
    path = tmp_path / "a.cflz"
    blob = cfl_ops.compress(torch.ones(1))
    write_archive(path, ((f"layers.{i}.weight", blob) for i in range(10_000)))
    start = time.perf_counter()
    with Archive(path) as weights:
        assert len(weights) == 10_000
        weights.tensor("layers.9999.weight")
    assert time.perf_counter() - start < 2
