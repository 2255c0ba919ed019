"""A sample of mutated files, and the corpus."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.codec.file_helpers import equal_states
from tests.fuzz import files

if not sys.platform.startswith("linux"):
    pytest.skip("memory is bounded with Linux's limits", allow_module_level=True)


def test_the_corpus_is_read() -> None:
    state = files.states()
    state["tied"] = state["quantised"]
    exact = {name: value for name, value in state.items() if name not in ("quantised", "tied")}
    for seed in files.seeds():
        if seed.name == "plain.safetensors":
            assert equal_states(seed.want, files.plain())
        elif seed.name == "first.cflz":
            assert equal_states({name: seed.want[name] for name in exact}, exact)
        else:
            assert seed.want.keys() == state.keys()
            assert equal_states({name: seed.want[name] for name in exact}, exact)
            assert seed.want["tied"] is seed.want["quantised"]
            if seed.name not in ("second.cflz", "lossy.safetensors"):
                assert equal_states(seed.want, state)


def test_a_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """make fuzz has 10^6."""
    failed = files.main(["--runs", "1500", "--keep", str(tmp_path)])
    report = capsys.readouterr().out
    assert not failed, report
    assert ", 0 failed" in report


def test_a_number_names_a_run() -> None:
    chosen = files.seeds()
    made = [files.make(chosen, 4, index)[1] for index in range(300)]
    assert made == [files.make(chosen, 4, index)[1] for index in reversed(range(300))][::-1]
    assert len(set(made)) > 250


def test_it_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that lets a wrong weight through, or raises what it should not."""
    lines: list[str] = []
    good = files.seeds()[0].want
    monkeypatch.setattr(files.cfl_ops, "load_file", lambda path: {**good, "odd": good["odd"].logical_not()})
    monkeypatch.setattr(files, "seeds", lambda: [files.Seed("first.cflz", b"x" * 100, good)])
    counts = files.runs(0, range(60), tmp_path / "kept", lines.append)
    assert counts["failed"] > 5
    assert counts["read"] > 5  # those whose checksums were repaired may be anything
    assert "tensors that nobody wrote" in lines[0]
    assert len(list((tmp_path / "kept").iterdir())) == counts["failed"]

    def index_error(path: Path) -> None:
        raise IndexError

    monkeypatch.setattr(files.cfl_ops, "load_file", index_error)
    assert files.runs(0, range(5), tmp_path / "kept", lines.append)["failed"] == 5
