"""What a script sees of errors: exit codes, one line, the old file as it was."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
from pathlib import Path

import pytest

for _module in ("typer", "rich", "safetensors"):
    pytest.importorskip(_module, reason='the command needs pip install "cfl-ops[cli]"')

# ruff: noqa: E402
import torch
from cfl_ops import __main__
from cfl_ops.command import sources, work
from torch import Tensor

from tests.command.shell import (
    Terminal,
    assert_one_line,
    cfl,
    listed,
    ok,
)


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
