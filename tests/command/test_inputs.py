"""Hard inputs: files that look like others, odd tensors, damage, names that a terminal would obey, closed streams."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

for _module in ("typer", "rich", "safetensors"):
    pytest.importorskip(_module, reason='the command needs pip install "cfl-ops[cli]"')

# ruff: noqa: E402
import torch
from cfl_ops import __main__, command
from cfl_ops.command import pickled, sources
from cfl_ops.command.failures import UsageError, printable, say
from cfl_ops.errors import CorruptDataError
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.command.shell import Terminal, assert_equal, assert_one_line, cfl, listed, ok

# Which kind a file is of


def _padded(name: str, header: int) -> None:
    """Metadata so long that the file's header has just this size."""
    weights = {"w": torch.arange(3000.0)}
    for more in range(header):
        save_file(weights, name, metadata={"who": "x" * more + "7"})
        size = int.from_bytes(Path(name).read_bytes()[:8], "little")
        if size == header:
            return
        if header - size > 64:  # not one by one
            save_file(weights, name, metadata={"who": "x" * (header - size + more) + "7"})
            assert int.from_bytes(Path(name).read_bytes()[:8], "little") == header
            return
    raise AssertionError


@pytest.mark.parametrize("header", [640, 896, 1152, 1408, 65536 + 640])
def test_headers_that_begin_as_pickles(here: Path, header: int) -> None:
    _padded("p.safetensors", header)
    assert Path("p.safetensors").read_bytes()[:1] == b"\x80"
    ok("compress", "p.safetensors", "p.cflz")
    ok("decompress", "p.cflz", "q.safetensors")
    assert Path("p.safetensors").read_bytes() == Path("q.safetensors").read_bytes()


@pytest.mark.parametrize("header", [640, 896, 1152, 1408])
def test_compressed_ones_are_decompressed(here: Path, header: int) -> None:
    for more in range(1200):
        save_file({"w": torch.arange(3000.0)}, "p.safetensors", metadata={"who": "x" * more})
        ok("compress", "p.safetensors", "c.safetensors", "--force", "-q")
        size = int.from_bytes(Path("c.safetensors").read_bytes()[:8], "little")
        if size == header:
            break
        if header - size > 64:
            save_file(
                {"w": torch.arange(3000.0)}, "p.safetensors", metadata={"who": "x" * (header - size + more)}
            )
            ok("compress", "p.safetensors", "c.safetensors", "--force", "-q")
            break
    assert Path("c.safetensors").read_bytes()[:2] == header.to_bytes(2, "little")
    ok("decompress", "c.safetensors", "d.safetensors")
    assert_equal(load_file("d.safetensors"), load_file("p.safetensors"))
    with safe_open("d.safetensors", "pt") as file, safe_open("p.safetensors", "pt") as first:
        assert file.metadata() == first.metadata()


# Tensors of .pt files


def test_views_of_torch(here: Path) -> None:
    """Conjugates, negatives, single elements with a stride, gaps and transposes; tied only where the values are."""
    z = torch.randn(6, dtype=torch.complex64)
    tensors = {
        "z": z,
        "conj": z.conj(),
        "neg": z.clone().conj().imag,
        "one": torch.arange(6.0)[::5][:1],
        "strided": torch.as_strided(torch.arange(9.0), (1, 1), (7, 5), 2),
        "gaps": torch.arange(10, dtype=torch.int16)[::2],
        "t": torch.arange(12.0).view(3, 4).t(),
        "f8": torch.arange(12.0).to(torch.float8_e4m3fn).view(3, 4).t(),
        "u16": torch.arange(12).to(torch.uint16).view(3, 4).t(),
        "none": torch.empty(3, 0).t(),
    }
    torch.save(tensors, "v.pt")
    ok("compress", "v.pt", "v.cflz")
    ok("verify", "v.cflz", "v.pt")
    ok("verify", "v.pt", "v.cflz")
    ok("decompress", "v.pt", "w.pt")
    ok("decompress", "v.cflz", "x.pt")
    for name in ("w.pt", "x.pt"):
        ok("verify", name, "v.pt")
        back = torch.load(name)
        assert list(back) == list(tensors)
        assert torch.equal(back["conj"], tensors["conj"].resolve_conj())
        assert torch.equal(back["neg"], tensors["neg"].resolve_neg())
    del tensors["f8"]
    torch.save(tensors, "v.pt")
    ok("decompress", "v.pt", "w.safetensors")
    ok("verify", "w.safetensors", "v.pt")
    ok("diff", "v.pt", "w.pt", "d.cflz")


@pytest.mark.parametrize("new", [True, False])
def test_damaged_torch_files_are_corrupt(here: Path, new: bool) -> None:
    """Whatever torch's reader runs into."""
    weights = {"w": torch.arange(5.0), "x": torch.ones(2, 2, dtype=torch.bfloat16)}
    torch.save(weights, "w.pt", _use_new_zipfile_serialization=new)
    data = Path("w.pt").read_bytes()
    path = Path("broken.pt")
    places = range(0, len(data), 11) if new else range(len(data))
    cases = [data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :] for i in places]
    cases += [data[:i] for i in range(2, len(data), 29)]
    refused = 0
    for case in cases:
        path.write_bytes(case)
        try:
            pickled.read_state_dict(path, "broken.pt")
        except (CorruptDataError, UsageError) as error:
            assert str(error).startswith("broken.pt")  # noqa: PT017
            refused += 1
        except RuntimeError as error:
            assert "allocate memory" in str(error)  # noqa: PT017
    assert refused > len(cases) // 8


@pytest.mark.parametrize(
    "error", [IndexError(), AssertionError("x"), ZeroDivisionError("\n"), RecursionError()]
)
def test_any_error_of_torch_is_corrupt(here: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    torch.save({"w": torch.ones(3)}, "w.pt")

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fails)
    assert_one_line(cfl("verify", "w.pt"), 1, r"w.pt: torch cannot read it \(\w+\)")


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_torch_writes(
    here: Path, monkeypatch: pytest.MonkeyPatch, kind: int, code: int
) -> None:
    Path("x.pt").write_bytes(b"old")
    write, count = pickled._File.write, []

    class Interrupting:
        def __init__(self, file: object) -> None:
            self._file = file

        def write(self, data: object) -> None:
            count.append(1)
            if len(count) == 3:
                os.kill(os.getpid(), kind)
            self._file.write(data)

    made = pickled._File.__init__
    monkeypatch.setattr(pickled._File, "__init__", lambda self, file: made(self, Interrupting(file)))
    assert write is pickled._File.write
    done = cfl("decompress", "a.safetensors", "x.pt", "--force")
    assert (done.code, len(count)) == (code, 3), done.err
    assert Path("x.pt").read_bytes() == b"old"
    assert not [each for each in listed() if each.startswith(".cfl")]


def test_interrupted_while_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "open_streams", interrupt)
    assert __main__.main(["verify", "x"]) == 130


# What a terminal sees

EVIL = "\x1b[31mred\x1b[0m\nforged\r\x9b2J\u202e\x7f"


def test_names_do_not_reach_the_terminal(here: Path) -> None:
    weights = {EVIL: torch.randn(300, 10), "b": torch.ones(3)}
    save_file(weights, "e.safetensors", metadata={EVIL: EVIL})
    other = {EVIL: torch.zeros(300, 10), "b": torch.ones(3), "c" + EVIL: torch.ones(1)}
    save_file(other, "f.safetensors")
    torch.save({**weights, "more" + EVIL: 3}, "e.pt")
    torch.save({EVIL: torch.ones(3).to_sparse()}, "s.pt")
    runs = [
        cfl("compress", "e.safetensors", "e.cflz", terminal=True),
        cfl("compress", "e.safetensors", "l.cflz", "--bits", "3", "--picture", "l.svg"),
        cfl("inspect", "e.cflz"),
        cfl("inspect", "e.cflz", "--json", "-"),
        cfl("verify", "e.cflz", "f.safetensors"),
        cfl("verify", "l.cflz", "e.safetensors"),
        cfl("compress", "e.pt", "g.cflz"),
        cfl("compress", "s.pt", "h.cflz"),
        cfl("compress", "s.pt", "h.cflz", "--debug"),
        cfl("compress", "no" + EVIL, "h.cflz"),
        cfl("compress", "e.pt", "h.cflz", "--bits", "4", "--exact", EVIL + "q"),
        cfl("diff", "e.safetensors", "f.safetensors", "d.cflz"),
        cfl("decompress", "g.cflz", "h.safetensors"),
    ]
    own = re.compile(r"\x1b\[(\?25[lh]|[0-9;]*[mAK])|\r")  # the bar's own, but not what the name has
    for done in runs:
        text = done.out.decode() + done.err
        assert "[31mred\x1b" not in text
        for line in own.sub("", text).split("\n"):
            assert line.isprintable(), (done, line)
            # A long name goes on in the next line of its cell, beside which there is nothing.
            assert not line.startswith("forged") or len(line.split()) == 1
    assert json.loads(runs[3].out)["tensors"][0]["name"] in weights
    assert r"\x1b[31mred" in runs[2].out.decode()


def test_printable() -> None:
    assert printable("é ok 中 🙂") == "é ok 中 🙂"
    assert printable("a\x1b\n\x9b\udc80") == r"a\x1b\n\x9b\udc80"


def test_the_bar_shows_no_control_characters(here: Path) -> None:
    from cfl_ops.command.report import progress

    err = Terminal(io.BytesIO(), write_through=True)
    before, sys.stderr = sys.stderr, err
    try:
        with progress(10, quiet=False) as bar:
            bar.at(EVIL)
            time.sleep(0.15)
            bar.advance(5)
        say("x", "two\nlines")
    finally:
        sys.stderr = before
    shown = err.buffer.getvalue().decode()
    assert "\x1b[31mred\x1b" not in shown
    assert "x: two lines" in shown


# Streams


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("compress a.safetensors x.cflz >&-", 0),
        ("compress a.safetensors x.cflz 2>&-", 0),
        ("compress a.safetensors x.cflz <&- >&- 2>&-", 0),
        ("inspect a.safetensors >&-", 0),
        ("verify nosuch 2>&-", 4),
        ("compress a.safetensors - >&-", 4),
        ("verify - <&-", 1),
    ],
)
def test_closed_streams(here: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: int) -> None:
    """As the interpreter sets them: None."""
    name, *arguments = [each for each in line.split() if "&" not in each]
    with monkeypatch.context() as patched:
        for stream, mark in (("stdin", "<&-"), ("stdout", " >&-"), ("stderr", "2>&-")):
            if mark in line:
                patched.setattr(sys, stream, None)
        assert __main__.main([name, *arguments]) == code
    if "x.cflz" in line:
        ok("verify", "x.cflz", "a.safetensors")


def test_streams_that_a_shell_closed() -> None:
    """No file gets the number of a stream, lest what is printed goes into it."""
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1])['open_streams']();"
        "print('lost'); print('lost', file=sys.stderr); sys.exit(7 if open(sys.argv[1]).fileno() > 2 else 1)"
    )
    line = 'exec "$0" -c "$1" "$2" <&- >&- 2>&-'
    words = ["sh", "-c", line, sys.executable, code, command.__file__]
    assert subprocess.run(words, check=False).returncode == 7
    words[2] = 'exec "$0" -c "$1" "$2" <&- >&-'
    done = subprocess.run(words, check=False, stderr=subprocess.PIPE)
    assert done.stderr == b"lost\n"


# Many tensors


class _Counting(sources.Source):
    shown, format, metadata = "n", "pt", {}

    def __init__(self, names: tuple[str, ...], aliases: dict[str, str]) -> None:
        self.names, self.aliases = names, aliases


def test_names_are_looked_up_once() -> None:
    """20,000 names, a third of them tied: nothing that is quadratic in them."""
    from cfl_ops.command.work import _names_apart, tied_in_place

    names = tuple(f"layers.{i}.weight" for i in range(20_000))
    aliases = dict.fromkeys(names[1::3], names[0])
    one, other = _Counting(names, aliases), _Counting(names[::-1], aliases)
    begin = time.process_time()
    assert len(_names_apart(one, other)) == len(aliases)
    found: dict[str, str] = {}
    for _ in tied_in_place(one, found, ((name, torch.empty(0)) for name in one.stored())):
        pass
    assert found == aliases
    assert time.process_time() - begin < 2
