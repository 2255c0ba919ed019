"""Round trips through every format, in files and pipes; deltas; verify."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import subprocess
from pathlib import Path

import cfl_ops
import pytest

for _module in ("typer", "rich", "safetensors"):
    pytest.importorskip(_module, reason='the command needs pip install "cfl-ops[cli]"')

# ruff: noqa: E402
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.command.shell import (
    assert_equal,
    assert_one_line,
    cfl,
    listed,
    ok,
    state,
)

# Round trips


@pytest.mark.parametrize("middle", ["m.cflz", "m.safetensors"])
@pytest.mark.parametrize("last", ["z.safetensors", "z.pt"])
def test_round_trips(here: Path, middle: str, last: str) -> None:
    """Of odd values, dtypes and shapes, to each format and back, bit for bit."""
    ok("compress", "a.safetensors", middle)
    ok("decompress", middle, last)
    assert_equal(load_file(last) if last.endswith("s") else torch.load(last), state())
    assert b"bit for bit" in ok("verify", middle, "a.safetensors").out
    assert b"bit for bit" in ok("verify", last, "a.safetensors").out
    if last.endswith("s"):
        with safe_open(last, "pt") as file:
            assert file.metadata() == {"format": "pt", "who": "é"}


def test_safetensors_come_back_as_the_same_bytes(here: Path) -> None:
    """From a .cflz file, which keeps the order: a checksum of the file agrees."""
    for metadata in ({}, {"format": "pt"}):
        save_file(state(), "c.safetensors", metadata=metadata or None)
        ok("compress", "c.safetensors", "c.cflz", "--force")
        ok("decompress", "c.cflz", "d.safetensors", "--force")
        digests = [hashlib.sha256(Path(f"{x}.safetensors").read_bytes()).digest() for x in "cd"]
        assert digests[0] == digests[1]


def test_tied_tensors_stay_tied(here: Path) -> None:
    tied = state()
    tied["head"] = tied["layers.0.weight"]
    torch.save(tied, "t.pt")
    for middle in ("t.cflz", "t.safetensors"):
        ok("compress", "t.pt", middle)
        ok("decompress", middle, "u.pt", "--force")
        back = torch.load("u.pt")
        assert_equal(back, tied)
        assert back["head"].data_ptr() == back["layers.0.weight"].data_ptr()
    ok("decompress", "t.cflz", "order.pt")
    assert list(torch.load("order.pt")) == list(tied)
    plain = ok("decompress", "t.cflz", "u.safetensors")
    assert "head are written out in full" in plain.err
    assert_equal(load_file("u.safetensors"), tied)
    assert b"equal" in ok("verify", "t.cflz", "t.pt").out


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_nested_state_dicts(here: Path, key: str) -> None:
    """What else is there is left out, and said."""
    torch.save({key: state(), "epoch": 3, "optimizer": {"state": {}}}, "n.pth")
    done = ok("compress", "n.pth", "n.cflz", "--quiet")
    assert "left out: epoch, optimizer" in done.err
    assert "equal" in ok("verify", "n.cflz", "a.safetensors").out.decode()


def test_old_files_of_torch(here: Path) -> None:
    torch.save(state(), "o.bin", _use_new_zipfile_serialization=False)
    ok("compress", "o.bin", "o.cflz")
    ok("verify", "o.cflz", "a.safetensors")


def test_files_of_torch_where_memory_is_short(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tensors are made in a temporary file, which is gone afterwards."""
    monkeypatch.setattr("cfl_ops.command.pickled._free_memory", lambda: 0)
    before = listed()
    ok("decompress", "a.safetensors", "s.pt")
    assert_equal(torch.load("s.pt"), state())
    assert listed() == sorted([*before, "s.pt"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        done = cfl("decompress", "a.safetensors", "t.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(done, 4, "too large|No space")
    assert listed() == sorted([*before, "s.pt"])


def test_inputs_are_not_changed(here: Path) -> None:
    """Plain tensors are read where they lie in the file."""
    torch.save(state(), "a.pt")
    before = {name: Path(name).read_bytes() for name in ("a.safetensors", "b.safetensors", "a.pt")}
    for source in ("a.safetensors", "a.pt"):
        ok("compress", source, "x.cflz", "--force", "--bits", "6", "--nonfinite", "keep")
        ok("diff", source, "b.safetensors", "d.cflz", "--force")
        ok("patch", source, "d.cflz", "y.pt", "--force")
    assert before == {name: Path(name).read_bytes() for name in before}


def test_shards(here: Path) -> None:
    (here / "s").mkdir()
    ok("compress", "a.safetensors", "s/model.safetensors", "--max-shard", "20kB")
    assert len(list((here / "s").glob("*-of-*.safetensors"))) > 1
    for source in ("s", "s/model.safetensors.index.json"):
        ok("verify", source, "a.safetensors")
    (here / "p").mkdir()
    ok("decompress", "s", "p/model.safetensors", "--max-shard", "30kB")
    index = json.loads(Path("p/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state())
    ok("verify", "p", "a.safetensors")
    again = cfl("decompress", "s", "p/model.safetensors")
    assert_one_line(again, 2, "index.json is there already: --force")


def test_pipes(here: Path) -> None:
    source = Path("a.safetensors").read_bytes()
    for form in ("cflz", "safetensors"):
        packed = ok("compress", "-", "-", "--to", form, stdin=source).out
        back = ok("decompress", "-", "-", stdin=packed).out
        assert_equal(_loaded(here, back), state())
        if form == "cflz":
            assert back == source
    assert (
        torch.load(io.BytesIO(ok("decompress", "-", "-", "--to", "pt", stdin=packed).out)).keys()
        == state().keys()
    )
    delta = ok("diff", "-", "b.safetensors", "-", stdin=source).out
    Path("d").write_bytes(delta)
    patched = ok("patch", "-", "d", "-", stdin=source).out
    assert_equal(_loaded(here, patched), load_file("b.safetensors"))
    assert b"parameters" in ok("inspect", "-", stdin=packed).out
    assert b"readable, " in ok("verify", "-", stdin=packed).out


def _loaded(folder: Path, data: bytes) -> dict[str, Tensor]:
    (folder / "loaded.safetensors").write_bytes(data)
    return load_file(folder / "loaded.safetensors")


def test_fifos_and_devices(here: Path) -> None:
    """A pipe with a name is read like stdin; a device is written to, never replaced."""
    os.mkfifo("fifo")
    child = subprocess.Popen(["cp", "a.safetensors", "fifo"])
    ok("compress", "fifo", "f.cflz")
    child.wait()
    ok("verify", "f.cflz", "a.safetensors")
    assert "ratio" in ok("compress", "a.safetensors", "/dev/null").err
    assert Path("/dev/null").is_char_device()


# Verify


def test_verify_names_each_bad_tensor(here: Path) -> None:
    ok("compress", "a.safetensors", "a.cflz")
    data = bytearray(Path("a.cflz").read_bytes())
    rows = json.loads(ok("inspect", "a.cflz", "--json", "-").out)["tensors"]
    at, bad = 16, []
    for row in rows:
        if row["name"] in ("layers.0.weight", "ids"):
            data[at + row["bytes"] - 1] ^= 1
            bad.append(row["name"])
        at += row["bytes"]
    Path("x.cflz").write_bytes(data)
    done = cfl("verify", "x.cflz", "--json", "x.json")
    assert done.code == 1
    for name in bad:
        assert re.search(rf"x.cflz: '{name}': .*(damaged|checksum)", done.err), done.err
    assert done.err.count("\n") == 3
    told = json.loads(Path("x.json").read_text())
    assert not told["good"]
    assert [row["name"] for row in told["tensors"] if row["state"] != "good"] == bad
    assert_one_line(cfl("decompress", "x.cflz", "x.pt"), 1, "damaged|checksum")
    assert not Path("x.pt").exists()


def test_verify_compares(here: Path) -> None:
    ok("compress", "a.safetensors", "a.cflz")
    done = cfl("verify", "a.cflz", "b.safetensors")
    assert done.code == 1
    for words in (
        "'layers.0.weight': differs from the original (max 0.0",
        "'ids': is torch.int64",
        "'joined': is not in the file",
        "'mask': is not in the original",
        "4 of 12 tensors are bad",
    ):
        assert words in done.err


def test_a_cut_file(here: Path) -> None:
    ok("compress", "a.safetensors", "a.cflz")
    torch.save(state(), "a.pt")
    for name in ("a.cflz", "a.safetensors", "a.pt"):
        Path("cut").write_bytes(Path(name).read_bytes()[:-20])
        assert_one_line(cfl("verify", "cut"), 1, "cut|truncated|length")


# Deltas


@pytest.mark.parametrize("flags", [(), ("--small",)])
@pytest.mark.parametrize("out", ["n.pt", "n.safetensors", "n.cflz"])
def test_deltas(here: Path, flags: tuple[str, ...], out: str) -> None:
    """Tensors that changed, stayed, joined, left, changed their dtype; of a base that may be compressed."""
    ok("compress", "a.safetensors", "a.cflz")
    done = ok("diff", "a.cflz", "b.safetensors", "d.cflz", *flags, "--json", "d.json")
    rows = {row["name"]: row for row in json.loads(Path("d.json").read_text())["tensors"]}
    assert rows["layers.0.weight"]["changed"] == pytest.approx(80 / 5120, rel=0.2)
    assert rows["odd"]["changed"] == 0
    assert "changed" in done.err
    assert b"good" in ok("verify", "d.cflz").out
    ok("patch", "a.cflz", "d.cflz", out)
    assert b"bit for bit" in ok("verify", out, "b.safetensors").out


def test_a_wrong_base_is_refused(here: Path) -> None:
    ok("diff", "a.safetensors", "b.safetensors", "d.cflz")
    Path("n.pt").write_bytes(b"old")
    for base in ("b.safetensors", "other.pt"):
        other = state()
        other["layers.1.weight"][0, 0] += 1
        torch.save(other, "other.pt")
        assert_one_line(
            cfl("patch", base, "d.cflz", "n.pt", "--force"), 3, f"{base} is not the base of d.cflz"
        )
        assert Path("n.pt").read_bytes() == b"old"
    more = state()
    more["more"] = torch.ones(3)
    torch.save(more, "more.pt")
    assert_one_line(cfl("patch", "more.pt", "d.cflz", "m.pt"), 3, "'more'")
    fewer = state()
    del fewer["odd"]
    torch.save(fewer, "fewer.pt")
    assert_one_line(cfl("patch", "fewer.pt", "d.cflz", "m.pt"), 3, "'odd'")
    assert not Path("m.pt").exists()


def test_patch_in_place(here: Path) -> None:
    ok("diff", "a.safetensors", "b.safetensors", "d.cflz")
    Path("a.safetensors").chmod(0o640)
    ok("patch", "a.safetensors", "d.cflz", "a.safetensors", "--force")
    assert_equal(load_file("a.safetensors"), load_file("b.safetensors"))
    assert Path("a.safetensors").stat().st_mode & 0o777 == 0o640


def test_patched_safetensors_are_compressed_where_the_base_is(here: Path) -> None:
    ok("compress", "a.safetensors", "c.safetensors")
    ok("diff", "a.safetensors", "b.safetensors", "d.cflz")
    ok("patch", "c.safetensors", "d.cflz", "n.safetensors")
    assert b"lossless" in ok("inspect", "n.safetensors").out
    ok("verify", "n.safetensors", "b.safetensors")


def test_another_file_keeps_what_was_quantised(here: Path) -> None:
    """It does not grow on the way, and decodes to the same."""
    ok("compress", "a.safetensors", "q.cflz", "--bits", "5")
    ok("compress", "q.cflz", "again.safetensors")
    ok("compress", "again.safetensors", "third.cflz")
    sizes = [Path(name).stat().st_size for name in ("q.cflz", "again.safetensors", "third.cflz")]
    assert sizes[2] == sizes[0]
    assert sizes[1] < sizes[0] + 3000  # its header of JSON
    ok("verify", "third.cflz", "q.cflz")
    assert b"bit for bit" in ok("verify", "again.safetensors", "q.cflz").out
    assert b"without checksums" in ok("verify", "a.safetensors").out


@pytest.mark.parametrize("kept", ["k.cflz", "k.safetensors", "k.pt"])
def test_deltas_of_a_python_program(here: Path, kept: str) -> None:
    deltas = cfl_ops.compress_delta(load_file("b.safetensors"), load_file("a.safetensors"))
    if kept.endswith("pt"):
        torch.save(deltas, kept)
    else:
        (cfl_ops.save_file if kept.endswith("cflz") else cfl_ops.save_safetensors)(deltas, kept)
    ok("patch", "a.safetensors", kept, "made.safetensors")
    assert_equal(load_file("made.safetensors"), load_file("b.safetensors"))
    assert_one_line(cfl("patch", "b.safetensors", kept, "m.safetensors"), 3, "is not the base of")


def test_deltas_of_tied_tensors(here: Path) -> None:
    old, new = state(), state()
    old["head"] = old["layers.0.weight"].clone()
    new["head"] = new["layers.0.weight"]
    torch.save(old, "old.pt")
    torch.save(new, "new.pt")
    ok("diff", "old.pt", "new.pt", "d.cflz")
    ok("patch", "old.pt", "d.cflz", "made.pt")
    made = torch.load("made.pt")
    assert_equal(made, new)
    assert made["head"].data_ptr() == made["layers.0.weight"].data_ptr()


def test_deltas_and_weights_are_not_mixed_up(here: Path) -> None:
    ok("diff", "a.safetensors", "b.safetensors", "d.cflz")
    for arguments in (["compress", "d.cflz", "x.cflz"], ["decompress", "d.cflz", "x.pt"]):
        assert_one_line(cfl(*arguments), 2, "d.cflz is a delta: `cfl-ops patch")
    assert_one_line(cfl("patch", "a.safetensors", "b.safetensors", "x.pt"), 2, "b.safetensors is no delta")
    assert_one_line(cfl("verify", "d.cflz", "a.safetensors"), 2, "is a delta: `patch` it")
    assert_one_line(cfl("diff", "-", "-", "x.cflz"), 2, "only one argument may be -")
