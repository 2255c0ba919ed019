"""Every op against an oracle, over a sample of the cells of benches/accuracy.py (all of them: test-slow)."""

from __future__ import annotations

import cfl_ops
import pytest
from accuracy import PROBES, sweep

# A prime number, so that no axis of the grid is always met at the same place.
EVERY = 53
SLOW = {("RecursiveRidge", "python"): 211}


@pytest.mark.parametrize("backend", ["native", "python"])
@pytest.mark.parametrize("name", PROBES)
def test_no_cell_is_beyond_its_bound(name: str, backend: str) -> None:
    with cfl_ops.config.use_backend(backend):
        rows = sweep(name, SLOW.get((name, backend), EVERY))
    assert rows
    assert all(row.cells for row in rows)
    assert [row for row in rows if row.wrong] == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["native", "python"])
@pytest.mark.parametrize("name", PROBES)
def test_all_cells(name: str, backend: str) -> None:
    with cfl_ops.config.use_backend(backend):
        assert [row for row in sweep(name) if row.wrong] == []
