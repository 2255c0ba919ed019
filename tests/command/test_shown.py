"""Lossy compression, and what is told of it: tables, JSON, pictures; help; the page."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

for _module in ("typer", "rich", "safetensors"):
    pytest.importorskip(_module, reason='the command needs pip install "cfl-ops[cli]"')

# ruff: noqa: E402
import torch
from cfl_ops import command
from cfl_ops.command.cli import app
from safetensors.torch import load_file

from tests.command.shell import (
    PAGE,
    Done,
    assert_one_line,
    bits,
    cfl,
    ok,
    state,
)

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
