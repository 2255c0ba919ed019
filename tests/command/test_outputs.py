"""What may be written where: nothing that is read or was there is lost; sharded checkpoints are old or new."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

for _module in ("typer", "rich", "safetensors"):
    pytest.importorskip(_module, reason='the command needs pip install "cfl-ops[cli]"')

# ruff: noqa: E402
import cfl_ops
import torch
from safetensors.torch import load_file, save_file

from tests.command.shell import assert_equal, assert_one_line, cfl, listed, ok, state


def _all() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}


# --json and --picture


@pytest.fixture
def there(here: Path) -> Path:
    ok("compress", "a.safetensors", "a.cflz", "-q")
    ok("diff", "a.safetensors", "b.safetensors", "d.cflz", "-q")
    torch.save(state(), "a.pt")
    shutil.copy("a.pt", "weights.json")
    os.link("weights.json", "other.json")
    Path("link.json").symlink_to("weights.json")
    Path("old.json").write_text("old")
    Path("old.svg").write_text("old")
    Path("folder").mkdir()
    return here


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("option", ["--json", "--picture"])
@pytest.mark.parametrize(
    "line",
    [
        "verify a.cflz FILE:a.pt",
        "verify a.cflz weights.json FILE:weights.json",
        "verify a.cflz weights.json FILE:other.json",
        "verify a.cflz weights.json FILE:link.json",
        "verify a.cflz weights.json FILE:./folder/../weights.json",
        "inspect weights.json FILE:weights.json",
        "inspect a.pt FILE:a.pt",
        "compress a.safetensors x.cflz FILE:x.cflz",
        "compress weights.json x.cflz FILE:weights.json",
        "decompress a.cflz x.pt FILE:x.pt",
        "decompress a.cflz x.json --to safetensors FILE:x.json",
        "decompress a.cflz x.safetensors FILE:x.safetensors.index.json",
        "diff a.safetensors weights.json x.cflz FILE:weights.json",
        "patch weights.json d.cflz x.cflz FILE:weights.json",
        "patch a.safetensors d.cflz x.cflz FILE:d.cflz",
        "inspect a.cflz FILE:no/x.json",
        "inspect a.cflz FILE:folder",
        "inspect a.cflz FILE:b.safetensors",
    ],
)
def test_no_other_file_is_replaced(there: Path, line: str, option: str, force: bool) -> None:
    before = _all()
    arguments = line.replace("FILE:", f"{option} ").split() + ["--force"] * force
    assert_one_line(cfl(*arguments), 2, f"{option} .*(otherwise|weights|no folder|is a folder)")
    assert _all() == before


@pytest.mark.parametrize(
    "line",
    [
        "inspect a.cflz",
        "verify a.cflz",
        "compress a.pt x.cflz",
        "decompress a.cflz x.pt",
        "diff a.safetensors b.safetensors x.cflz",
        "patch a.safetensors d.cflz x.cflz",
    ],
)
def test_what_is_there_is_replaced_by_force_alone(there: Path, line: str) -> None:
    before = _all()
    for option, name in (("--json", "old.json"), ("--picture", "old.svg")):
        assert_one_line(cfl(*line.split(), option, name), 2, f"{option} {name}: is there already: --force")
        assert _all() == before
    ok(*line.split(), "--json", "old.json", "--force")
    assert json.loads(Path("old.json").read_text())["command"] == line.split()[0]
    assert_one_line(cfl(*line.split(), "--json", "y.svg", "--picture", "y.svg", "--force"), 2, "otherwise")


def test_a_report_is_there_whole_or_not_at_all(there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    def fails(self: Figure, file: object, **_: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fails)
    assert_one_line(cfl("inspect", "a.cflz", "--picture", "old.svg", "--force", "--no-table"), 4, "No space")
    assert Path("old.svg").read_text() == "old"


def test_reports_go_to_pipes_and_devices(there: Path) -> None:
    ok("inspect", "a.cflz", "--json", "/dev/null")


# Shards


def _sharded(source: str, *more: object, name: str = "s.safetensors") -> list[str]:
    ok("decompress", source, name, "-q", *more)
    files = sorted(set(json.loads(Path(name + ".index.json").read_text())["weight_map"].values()))
    assert files == sorted(each for each in listed() if each.startswith("s-"))
    return files


def test_sharded_checkpoints_are_old_or_new(here: Path) -> None:
    """A damaged tensor at the end leaves every shard as it was."""
    ok("compress", "b.safetensors", "b.cflz", "-q")
    with cfl_ops.ops.codec.files.open_weights("b.cflz") as weights:
        blob = bytes(weights.blob(weights.names[-1]).tolist())
    data = Path("b.cflz").read_bytes()
    place = data.index(blob) + len(blob) - 3
    Path("broken.cflz").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    assert len(_sharded("a.safetensors", "--max-shard", "20kB")) > 2
    before = _all()
    assert_one_line(
        cfl("decompress", "broken.cflz", "s.safetensors", "--max-shard", "20kB", "--force", "-q"), 1, "."
    )
    assert _all() == before
    _sharded("b.cflz", "--max-shard", "20kB", "--force")
    assert_equal(cfl_ops.load_file("s.safetensors.index.json"), load_file("b.safetensors"))


@pytest.mark.parametrize("command", ["decompress", "compress"])
def test_shards_are_replaced_by_force_alone(here: Path, command: str) -> None:
    Path("s-00001-of-00009.safetensors").write_bytes(b"precious")
    Path("s-1-of-9.safetensors").write_bytes(b"another's")
    before = _all()
    line = (command, "a.safetensors", "s.safetensors", "--max-shard", "20kB", "-q")
    assert_one_line(cfl(*line), 2, "s-00001-of-00009.safetensors is there already")
    assert _all() == before
    ok(*line, "--force")
    assert "s-00001-of-00009.safetensors" not in listed()
    assert "s-1-of-9.safetensors" in listed()
    assert_equal(cfl_ops.load_file("s.safetensors.index.json"), state())
    files = [each for each in listed() if each.startswith("s-0")]
    ok(*line[:4], "40kB", "-q", "--force")
    fewer = [each for each in listed() if each.startswith("s-0")]
    assert len(fewer) < len(files)
    assert not set(files) & set(fewer)
    assert_equal(cfl_ops.load_file("s.safetensors.index.json"), state())
    ok(command, "s.safetensors.index.json", "s.safetensors", "-q", "--force")  # of itself, in one file
    assert not [each for each in listed() if each.startswith(("s-0", "s.safetensors.index"))]
    assert_equal(cfl_ops.load_file("s.safetensors"), state())


def test_a_shard_that_cannot_be_replaced(here: Path) -> None:
    files = _sharded("a.safetensors", "--max-shard", "40kB")
    Path(files[1]).unlink()
    Path(files[1]).mkdir()
    before = _all()
    line = ("decompress", "b.safetensors", "s.safetensors", "--max-shard", "40kB", "-q", "--force")
    assert_one_line(cfl(*line), 4, "s-00002-of-0000.*: Is a directory")
    assert _all() == before


def test_modes_and_links_of_shards(here: Path) -> None:
    first = _sharded("a.safetensors", "--max-shard", "40kB")[0]
    (here / "store").mkdir()
    Path(first).rename("store/real")
    Path(first).symlink_to("store/real")
    Path("store/real").chmod(0o640)
    _sharded("b.safetensors", "--max-shard", "40kB", "--force")
    assert Path(first).is_symlink()
    assert Path("store/real").stat().st_mode & 0o777 == 0o640
    assert_equal(cfl_ops.load_file("s.safetensors.index.json"), load_file("b.safetensors"))


@pytest.mark.parametrize(
    "line",
    [
        "compress a.safetensors x.cflz",
        "compress a.safetensors -",
        "compress a.safetensors - --to safetensors",
        "decompress a.safetensors x.pt",
        "decompress a.safetensors -",
        "decompress a.safetensors /dev/null --to safetensors",
    ],
)
def test_max_shard_is_of_safetensors_files(here: Path, line: str) -> None:
    before = listed()
    assert_one_line(cfl(*line.split(), "--max-shard", "1GB"), 2, "--max-shard splits .safetensors files")
    assert listed() == before


# Names and endings


def test_what_safetensors_cannot_name(here: Path) -> None:
    torch.save({"__metadata__": torch.ones(3)}, "m.pt")
    torch.save({"\udc80": torch.ones(3)}, "u.pt")
    ok("compress", "m.pt", "m.cflz")
    cfl_ops.save_file({"w": torch.ones(3)}, "k.cflz", metadata={"cfl_ops": "{}"})
    before = listed()
    for name, words in (("m.pt", "__metadata__"), ("m.cflz", "__metadata__"), ("k.cflz", "'cfl_ops'")):
        assert_one_line(cfl("decompress", name, "x.safetensors"), 2, words)
    assert_one_line(cfl("compress", "m.pt", "x.safetensors"), 2, "__metadata__")
    for command in ("compress", "decompress"):
        assert_one_line(cfl(command, "u.pt", "x.safetensors"), 2, "names must be Unicode")
    assert listed() == before
    ok("decompress", "m.cflz", "y.pt")
    ok("decompress", "k.cflz", "k.pt")


@pytest.mark.parametrize("name", ["d.safetensors", "d.pt", "d.PTH", "d.bin"])
def test_diff_writes_cflz(here: Path, name: str) -> None:
    assert_one_line(cfl("diff", "a.safetensors", "b.safetensors", name), 2, "diff writes a .cflz file")
    assert name not in listed()


def test_diff_to_other_endings(here: Path) -> None:
    ok("diff", "a.safetensors", "b.safetensors", "d.delta")
    ok("patch", "a.safetensors", "d.delta", "x.pt")


def test_deltas_of_empty_checkpoints(here: Path) -> None:
    save_file({}, "e.safetensors", metadata={"who": "me"})
    ok("diff", "e.safetensors", "e.safetensors", "d.cflz")
    assert b"a delta" in ok("inspect", "d.cflz").out
    ok("verify", "d.cflz")
    ok("patch", "e.safetensors", "d.cflz", "f.safetensors")
    assert Path("f.safetensors").read_bytes() == Path("e.safetensors").read_bytes()
    assert_one_line(cfl("decompress", "d.cflz", "g.safetensors"), 2, "is a delta")
    assert_one_line(
        cfl("patch", "a.safetensors", "d.cflz", "g.safetensors"), 3, "which the delta's base had not"
    )
    ok("compress", "e.safetensors", "e.cflz")
    assert_one_line(cfl("patch", "e.safetensors", "e.cflz", "g.safetensors"), 2, "is no delta")


def test_the_mark_of_deltas_is_not_passed_on(here: Path) -> None:
    ok("diff", "a.safetensors", "b.safetensors", "d.cflz")
    assert b"cfl_ops.delta" not in ok("inspect", "d.cflz").out
    ok("patch", "a.safetensors", "d.cflz", "x.safetensors")
    assert Path("x.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
