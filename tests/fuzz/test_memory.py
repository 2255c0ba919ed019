"""No op keeps memory of its calls."""

from __future__ import annotations

import pytest

from tests.fuzz import memory
from tests.fuzz.targets import targets

if not memory.malloc_tells():
    pytest.skip("this C library has no mallinfo2", allow_module_level=True)


def leaks(calls: int, seconds: float) -> list[str]:
    rows = list(memory.run(calls, seconds))
    assert {row["op"] for row in rows} == {target.name for target in targets("native")}
    return [
        f"{row['op']} keeps {row['bytes']:.1f} bytes a call"
        for row in rows
        if row["bytes"] > memory.MOST_BYTES
    ]


def test_no_op_leaks() -> None:
    assert leaks(10_000, 0.2) == []


@pytest.mark.slow
def test_no_op_leaks_over_many_calls() -> None:
    assert leaks(100_000, 600.0) == []


@pytest.mark.parametrize("op", ["gram", "lstsq"])
def test_a_leak_of_a_few_bytes_shows(op: str) -> None:
    """A Python object of 10 bytes and its place in a list, at each call."""
    (row,) = memory.run(3_000, 5.0, [op], leak=10)
    assert 40 < row["bytes"] < 100
