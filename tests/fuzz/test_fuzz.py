"""A sample of fuzzed calls, and that the fuzzer notices what it is there for."""

from __future__ import annotations

import re
import sys

import pytest

from tests.fuzz.mutate import describe, make_call
from tests.fuzz.run import Run, main, parse
from tests.fuzz.sabotage import SABOTAGE
from tests.fuzz.targets import targets

if not sys.platform.startswith("linux"):
    pytest.skip("guard pages are made with Linux's mmap", allow_module_level=True)

# Of torch, about the dtypes and layouts that are asked for.
pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf", "ignore:Sparse", "ignore:Casting complex")


def test_a_sample(capsys: pytest.CaptureFixture[str]) -> None:
    """make fuzz has 10^5."""
    failed = main(["--calls", "400", "--seed", "1", "--workers", "1", "--quiet"])
    report = capsys.readouterr().out
    assert not failed, report
    assert re.match(r"\d+ calls \(\d+ returned\)", report)


def test_it_notices() -> None:
    """Reads and writes out of bounds, hangs, changed arguments and internal errors; and not an honest error."""
    run = Run(parse(["--workers", "1", "--quiet", "--limit", "0.5"]), sabotage=True)
    run.enqueue("native", 0, len(SABOTAGE))
    report = run.go()
    assert report.calls == len(SABOTAGE)
    assert {list(SABOTAGE)[failure.index]: failure.kind for failure in report.failures} == {
        "read_beyond": "crash (SIGSEGV)",
        "write_beyond_own": "crash (SIGABRT)",
        "write_far_beyond_own": "crash (SIGSEGV)",
        "spin": "hang (SIGPROF)",
        "sleep": "hang (no answer)",
        "write_and_raise": "t was changed, and the call raised",
        "wrong_type": "an exception of an unexpected type",
    }
    texts = {list(SABOTAGE)[failure.index]: failure.text for failure in report.failures}
    assert "_read_beyond" in texts["read_beyond"]  # where it was
    assert "written outside of an allocation" in texts["write_beyond_own"]
    assert "in _sleep" in texts["sleep"]


def test_a_number_names_a_call() -> None:
    """The same seed and number are the same call, whatever was made before; a step can be left out."""
    chosen = targets("native")
    texts = [list(describe(make_call(chosen, 3, index))) for index in range(60)]
    assert texts == [list(describe(make_call(chosen, 3, index))) for index in reversed(range(60))][::-1]
    index = next(i for i in range(60) if make_call(chosen, 3, i).count == 2)
    both = make_call(chosen, 3, index).steps
    assert make_call(chosen, 3, index, [0]).steps == both[:1]
    assert len({tuple(text) for text in texts}) > 50
