"""cfl-ops compress, decompress, inspect, verify, diff, patch: in this process, as a shell would call them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cfl_ops import __main__, command

for _module in (*command.EXTRAS, "safetensors"):
    pytest.importorskip(_module, reason='the command needs pip install "cfl-ops[cli]"')

# ruff: noqa: E402
from cfl_ops.command import sources, work
from cfl_ops.command.cli import app
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

PAGE = Path(__file__).parents[1] / "docs" / "command.md"


class Done(NamedTuple):
    code: int
    out: bytes
    err: str


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def cfl(*arguments: object, stdin: bytes | Terminal = b"", terminal: bool = False) -> Done:
    """Run the command; its stdout is bytes."""
    out, err = io.BytesIO(), io.BytesIO()
    kind = Terminal if terminal else io.TextIOWrapper
    read = stdin if isinstance(stdin, Terminal) else io.TextIOWrapper(io.BytesIO(stdin))
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "stdin", sys.stdin)
        sys.stdin = read
        stack.enter_context(contextlib.redirect_stdout(io.TextIOWrapper(out, write_through=True)))
        stack.enter_context(contextlib.redirect_stderr(kind(err, write_through=True)))
        try:
            code = __main__.main([str(each) for each in arguments])
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
        return Done(code, out.getvalue(), err.getvalue().decode())


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"layers.{i}.weight": (0.02 * torch.randn(64, 80, generator=generator)).to(dtype)
        for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32, torch.float64))
    }
    odd = torch.tensor([0.0, -0.0, torch.inf, torch.nan, 1e-42])
    return {
        **weights,
        "norm.weight": torch.ones(80),
        "odd": odd,
        "ids": torch.arange(77),
        "mask": torch.arange(9) % 2 == 0,
        "step": torch.tensor(3),
        "none": torch.empty(0, 4),
        "unicode é": torch.ones(3),
    }


def bits(tensor: Tensor) -> bytes:
    return b"" if tensor.numel() == 0 else bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(got[name]) == bits(tensor), name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a.safetensors and b.safetensors, a step later."""
    monkeypatch.chdir(tmp_path)
    old, new = state(), state()
    new["layers.0.weight"][3] += 0.01
    del new["mask"]
    new["ids"] = new["ids"].to(torch.int32)
    new["joined"] = torch.ones(300)
    save_file(old, "a.safetensors", metadata={"format": "pt", "who": "é"})
    save_file(new, "b.safetensors")
    return tmp_path


def listed() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def ok(*arguments: object, **more: object) -> Done:
    done = cfl(*arguments, **more)
    assert done.code == 0, done.err
    return done


def assert_one_line(done: Done, code: int, words: str) -> None:
    assert done.code == code, done.err
    assert re.search(words, done.err), done.err
    assert done.err.count("\n") == 1
    assert done.err.startswith("cfl-ops ")
    assert "Traceback" not in done.err


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
    assert b"good" in ok("verify", "-", stdin=packed).out


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


# Lossy


def test_bits(here: Path) -> None:
    torch.save({"w": torch.randn(300, 100), "x": torch.randn(300, 100), "bias": torch.randn(300)}, "w.pt")
    done = ok("compress", "w.pt", "w.cflz", "--bits", "7", "--exact", "x", "--json", "w.json")
    rows = {row["name"]: row for row in json.loads(Path("w.json").read_text())["tensors"]}
    assert rows["w"]["kind"] == "quantised"
    assert rows["w"]["bits"] == 7
    assert 0 < rows["w"]["rms_error"] < rows["w"]["max_error"] < 0.1
    assert rows["x"]["kind"] != "quantised"
    assert rows["x"]["max_error"] is None
    assert "max error" in done.err
    shown = ok("verify", "w.cflz", "w.pt").out.decode()
    assert "lossy" in shown
    assert f"{rows['w']['max_error']:.3g}" in shown
    back = ok("decompress", "w.cflz", "v.pt")
    assert "ratio" in back.err
    got, want = torch.load("v.pt"), torch.load("w.pt")
    assert float((got["w"] - want["w"]).abs().max()) == pytest.approx(rows["w"]["max_error"])
    assert bits(got["x"]) == bits(want["x"])


def test_budget(here: Path) -> None:
    torch.save({name: torch.randn(200, 300) for name in "abc"}, "w.pt")
    raw = 3 * 200 * 300 * 4
    for budget, most in (("20%", 0.2 * raw), ("200kB", 200e3), ("100KiB", 102400)):
        ok("compress", "w.pt", "w.cflz", "--budget", budget, "--force")
        assert Path("w.cflz").stat().st_size <= most + 1000
    assert_one_line(
        cfl("compress", "w.pt", "x.cflz", "--budget", "3Q"), 2, "--budget 3Q: must be a size such as"
    )
    assert_one_line(cfl("compress", "w.pt", "x.cflz", "--budget", "10B"), 2, "max_bytes|budget")
    assert not Path("x.cflz").exists()


@pytest.mark.parametrize("kind", ["rms", "max"])
def test_error(here: Path, kind: str) -> None:
    torch.save({"w": torch.randn(200, 300), "v": 5 * torch.randn(200, 300)}, "w.pt")
    ok("compress", "w.pt", "w.cflz", "--error", "0.01", "--error-kind", kind, "--json", "w.json")
    for row in json.loads(Path("w.json").read_text())["tensors"]:
        scale = {"w": 1, "v": 5}[row["name"]]
        assert row[f"{kind}_error"] <= 0.0102 * scale


def test_nan_weights_are_refused_or_kept(here: Path) -> None:
    torch.save({"w": torch.full((300,), torch.nan)}, "w.pt")
    assert_one_line(cfl("compress", "w.pt", "w.cflz", "--bits", "4"), 2, "NaN")
    ok("compress", "w.pt", "w.cflz", "--bits", "4", "--nonfinite", "keep")


# What is told


def test_inspect_decodes_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ok("compress", "a.safetensors", "a.cflz")
    ok("compress", "a.safetensors", "c.safetensors")
    ok("diff", "a.safetensors", "b.safetensors", "d.cflz")
    monkeypatch.setattr("cfl_ops.ops.codec.blob.decompress", None)
    for file, words in (
        ("a.cflz", ("lossless", "cflz version 2", "who: é")),
        ("c.safetensors", ("lossless", "plain", "who: é")),
        ("a.safetensors", ("plain", "layers.3.weight", "64x80", "float64")),
        ("d.cflz", ("a delta", "joined", "left")),
    ):
        text = ok("inspect", file).out.decode()
        assert all(word in text for word in words), text
        data = json.loads(ok("inspect", file, "--json", "-").out)
        assert data["totals"]["tensors"] == len(data["tensors"]) >= len(state())
    assert data["delta"]


def test_json_has_what_the_table_has(here: Path) -> None:
    done = ok("compress", "a.safetensors", "a.cflz", "--json", "a.json")
    data = json.loads(Path("a.json").read_text())
    assert data["output_bytes"] == Path("a.cflz").stat().st_size
    assert [row["name"] for row in data["tensors"]] == list(load_file("a.safetensors"))
    for row in data["tensors"]:
        assert row["name"] in done.err
        if row["parameters"]:
            assert row["bits_per_parameter"] == 8 * row["bytes"] / row["parameters"]
    assert data["totals"]["raw_bytes"] == sum(t.nbytes for t in state().values())
    piped = cfl("compress", "a.safetensors", "-", "--json", "-")
    assert_one_line(piped, 2, "stdout takes the output already")


def test_what_is_shown_can_be_less(here: Path) -> None:
    full = ok("compress", "a.safetensors", "1.cflz").err
    assert "layers.0.weight" in full
    totals = ok("compress", "a.safetensors", "2.cflz", "--no-table").err
    assert totals.count("\n") == 1
    assert totals.startswith("2.cflz: 11 tensors, ")
    assert ok("compress", "a.safetensors", "3.cflz", "--quiet").err == ""
    assert ok("verify", "3.cflz", "--quiet") == Done(0, b"", "")


def test_the_bar_shows_on_terminals(here: Path) -> None:
    assert "left" in ok("compress", "a.safetensors", "1.cflz", terminal=True).err
    assert "\x1b[" not in ok("compress", "a.safetensors", "2.cflz", "--quiet", terminal=True).err


def test_very_many_tensors(here: Path) -> None:
    torch.save({f"t{i}": torch.randn(5000 if i % 10 else 9000) for i in range(200)}, "m.pt")
    done = ok("compress", "m.pt", "m.cflz", "--bits", "5", "--json", "m.json")
    assert "of 200 tensors are shown" in done.err
    assert done.err.count("\n") < 80
    assert len(json.loads(Path("m.json").read_text())["tensors"]) == 200


@pytest.mark.parametrize("count", [5, 200])
@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture(here: Path, count: int, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    torch.save({f"$t_{i}$": torch.randn(300) for i in range(count)}, "m.pt")
    ok("compress", "m.pt", "m.cflz", "--picture", f"m.{suffix}", "--quiet")
    start = Path(f"m.{suffix}").read_bytes()[:300]
    assert b"PNG" in start if suffix == "png" else b"<svg" in start or b"<?xml" in start
    assert_one_line(cfl("inspect", "m.cflz", "--picture", "m.gif"), 2, "must end in .png or .svg")
    assert_one_line(cfl("inspect", "m.cflz", "--picture", "no/m.svg"), 2, "there is no folder no")


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
        assert_one_line(cfl("patch", base, "d.cflz", "n.pt", "--force"), 3, "base|delta")
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


# Errors and exit codes


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("compress", 2, r"Missing argument 'IN'.*\(cfl-ops compress --help\)"),
        ("compress --frob a b", 2, "No such option: --frob"),
        ("compress nosuch x.cflz", 4, "nosuch: No such file"),
        ("compress text x.cflz", 1, "text is neither a .cflz file nor safetensors"),
        ("compress empty x.cflz", 1, "empty is empty"),
        ("compress folder x.cflz", 4, "folder must hold one checkpoint"),
        ("compress a.safetensors folder", 2, "folder is a folder"),
        ("compress a.safetensors no/x.cflz", 4, "no: there is no such folder"),
        ("compress a.safetensors text", 2, "text: its ending tells no format"),
        ("compress a.safetensors b.safetensors", 2, "b.safetensors is there already: --force replaces it"),
        ("compress a.safetensors x.pt", 2, "compress writes .cflz or .safetensors"),
        ("decompress a.safetensors x.cflz", 2, "decompress writes .safetensors or .pt"),
        ("compress a.safetensors x.cflz --bits 17", 2, "--bits"),
        ("compress a.safetensors x.cflz --bits 4 --lossless", 2, "give one of --lossless, --bits"),
        ("compress a.safetensors x.cflz --exact x", 2, "--exact is a matter of --bits"),
        ("compress a.safetensors x.cflz --bits 4 --exact x", 2, "--exact x: no tensor has such a name"),
        ("compress a.safetensors x.cflz --error-kind max", 2, "a matter of --error"),
        ("compress object.pt x.cflz", 2, "not a state dict"),
        ("compress python.pt x.cflz", 2, "Python objects besides tensors"),
        ("compress keys.pt x.cflz", 2, "names must be str"),
        ("compress sparse.pt x.cflz", 2, "is sparse"),
        ("decompress complex.pt x.safetensors", 2, "write a .pt file"),
    ],
)
def test_errors(here: Path, arguments: str, code: int, words: str) -> None:
    Path("text").write_text("not weights")
    Path("empty").write_bytes(b"")
    Path("folder").mkdir()
    torch.save([1, 2], "object.pt")
    torch.save({"w": torch.ones(1), "o": sources.Facts}, "python.pt")
    torch.save({0: torch.ones(3)}, "keys.pt")
    torch.save({"s": torch.ones(3).to_sparse()}, "sparse.pt")
    torch.save({"c": torch.ones(3, dtype=torch.complex128)}, "complex.pt")
    before = listed()
    assert_one_line(cfl(*arguments.split()), code, words)
    assert listed() == before


def test_unreadable_and_unwritable(here: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may do all")
    Path("a.safetensors").chmod(0)
    assert_one_line(cfl("verify", "a.safetensors"), 4, "Permission denied")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "arguments", ["compress --to cflz", "compress --to safetensors", "decompress", "decompress --to pt"]
)
def test_a_full_disk(here: Path, arguments: str) -> None:
    """To a device, to stdout, and where a file may not grow; the old file stays."""
    name, *flags = arguments.split()
    assert_one_line(cfl(name, "a.safetensors", "/dev/full", *flags, "-q"), 4, "No space left on device")
    with Path("/dev/full").open("wb") as full, contextlib.redirect_stdout(io.TextIOWrapper(full)):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            assert __main__.main([name, "a.safetensors", "-", *flags, "-q"]) == 4
        assert "No space left on device" in err.getvalue()
        with contextlib.suppress(OSError):
            sys.stdout.close()
    out = Path("x.pt" if "pt" in flags else "x.safetensors" if "cflz" not in flags else "x.cflz")
    out.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        done = cfl(name, "a.safetensors", out, *flags, "-q", "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(done, 4, "too large|No space")
    assert out.read_bytes() == b"old"
    assert not [name for name in listed() if name.endswith(".tmp")]


def test_nobody_reads(here: Path) -> None:
    """As with `head`: quietly."""
    reader, writer = os.pipe()
    os.close(reader)
    err = io.StringIO()
    with os.fdopen(writer, "wb") as gone, contextlib.redirect_stdout(io.TextIOWrapper(gone)):
        with contextlib.redirect_stderr(err):
            assert __main__.main(["compress", "a.safetensors", "-", "-q"]) == 141
        sys.stdout.close()  # would raise if the pipe were still there
    assert err.getvalue() == ""


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", ["x.cflz", "x.safetensors"])
def test_interrupted(here: Path, monkeypatch: pytest.MonkeyPatch, kind: int, code: int, name: str) -> None:
    """The old file stays, and nothing beside it."""
    Path(name).write_bytes(b"old")
    before = listed()
    store, count = work.store_lossless, []

    def interrupt(*arguments: object) -> Tensor:
        count.append(1)
        if len(count) == 4:
            os.kill(os.getpid(), kind)
        return store(*arguments)

    monkeypatch.setattr(work, "store_lossless", interrupt)
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    done = cfl("compress", "a.safetensors", name, "--force")
    assert done.code == code
    assert len(count) == 4
    assert Path(name).read_bytes() == b"old"
    assert listed() == before
    if kind == signal.SIGINT:
        assert_one_line(done, 130, "interrupted")
    assert handlers == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]


def test_faults_are_told_from_bad_data(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*_: object) -> Tensor:
        raise RuntimeError("two\nlines")

    monkeypatch.setattr(work, "store_lossless", fault)
    assert_one_line(cfl("compress", "a.safetensors", "x.cflz"), 5, r"RuntimeError: two lines \(--debug")
    debug = cfl("compress", "a.safetensors", "x.cflz", "--debug")
    assert debug.code == 5
    assert "Traceback" in debug.err

    def full(*_: object) -> Tensor:
        raise MemoryError

    monkeypatch.setattr(work, "store_lossless", full)
    assert_one_line(cfl("compress", "a.safetensors", "x.cflz"), 5, "not enough memory")


def test_terminals_get_no_bytes(here: Path) -> None:
    out = Terminal(io.BytesIO())
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert __main__.main(["compress", "a.safetensors", "-"]) == 2
    assert "not written to a terminal" in err.getvalue()
    assert_one_line(cfl("verify", "-", stdin=Terminal(io.BytesIO())), 2, "stdin, which is a terminal")


def test_warnings_are_lines(here: Path) -> None:
    torch.save({f"w{i}": torch.randn(300, 10) for i in range(6)}, "w.pt")
    done = ok("compress", "w.pt", "w.cflz", "--bits", "2", "--quiet")
    lines = done.err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("cfl-ops compress: warning: ") for line in lines)
    assert "3 more" in lines[-1]


def test_threads(here: Path) -> None:
    before = torch.get_num_threads()
    for threads in (1, 2):
        ok("compress", "a.safetensors", f"{threads}.cflz", "--threads", threads)
    assert Path("1.cflz").read_bytes() == Path("2.cflz").read_bytes()
    assert torch.get_num_threads() == before


def test_links_stay(here: Path) -> None:
    (here / "store").mkdir()
    Path("store/real.cflz").write_bytes(b"old")
    Path("link.cflz").symlink_to("store/real.cflz")
    ok("compress", "a.safetensors", "link.cflz", "--force")
    assert Path("link.cflz").is_symlink()
    ok("verify", "store/real.cflz", "a.safetensors")


# Help


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help(name: str) -> None:
    done = ok(name, "--help")
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.out.decode()).split())
    assert "Exit codes" in text
    import typer

    for parameter in typer.main.get_command(app).commands[name].params:
        if parameter.param_type_name == "option":
            assert all(option in text for option in parameter.opts)
            assert getattr(parameter, "help", None), parameter.name
    page = ok("--help").out.decode()
    assert f"  {name} " in page
    assert f"`cfl-ops {name} " in PAGE.read_text()


def test_codes_are_documented() -> None:
    from cfl_ops.command.failures import Code

    page = PAGE.read_text()
    for code in Code:
        assert f"| {int(code)} |" in page


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert_one_line(cfl("inspect", "x"), 2, "pip install rich")


def test_importing_the_package_imports_no_extra() -> None:
    script = (
        "import sys, cfl_ops, cfl_ops.__main__\n"
        f"loaded = [name for name in ['cfl_ops.command.cli', *{list(command.EXTRAS)}] if name in sys.modules]\n"
        "sys.exit(f'imported: {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# The page


def _lines(block: str) -> list[str]:
    """The commands of a block; one in quotes may go over several lines."""
    out, open_quote = [], ""
    for line in block.splitlines():
        open_quote = f"{open_quote}\n{line}" if open_quote else line
        if open_quote.count('"') % 2 == 0:
            out.append(open_quote)
            open_quote = ""
    return [line for line in out if line.strip()]


def _stage(words: list[str], data: bytes) -> Done:
    """One command of a pipe."""
    if words[0] == "cfl-ops":
        return cfl(*words[1:], stdin=data)
    if words[:2] == ["python", "-c"]:
        exec(words[2], {"__name__": "__page__"})
        return Done(0, b"", "")
    done = subprocess.run(words, input=data, capture_output=True, check=True)
    return Done(0, done.stdout, "")


def test_the_page_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ```bash blocks of docs/command.md, one after the other; a comment says another exit code than 0."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    assert len(blocks) >= 6
    for line in (line for block in blocks for line in _lines(block)):
        expected = re.search(r"# exit code (\d+)$", line)
        words = shlex.split(line, comments=not line.startswith("python"))
        target = None
        if ">" in words:
            target = words[words.index(">") + 1]
            words = words[: words.index(">")]
        data, codes = b"", []
        while words:
            end = words.index("|") if "|" in words else len(words)
            done = _stage(words[:end], data)
            data, words = done.out, words[end + 1 :]
            codes.append(done.code)
        assert codes[-1] == (int(expected[1]) if expected else 0), (line, done.err)
        assert not any(codes[:-1])
        if target is not None:
            Path(target).write_bytes(data)
    assert Path("small.svg").exists()
