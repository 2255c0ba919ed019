"""What a run uses unless told otherwise; the learning rates and penalties come from tune.py."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["BATCH_SIZES", "EPOCHS", "TABLE", "tuned", "tuned_sizes"]

TABLE = Path(__file__).with_name("defaults.json")
BATCH_SIZES = (8, 32, 128)
# Such that a default run takes about a minute on two cores.
EPOCHS = {"digits": 15, "mnist5k": 5, "diabetes": 40}


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


def tuned(data: str, optimizer: str, head: str, batch_size: int) -> tuple[float, float]:
    """Learning rate and penalty that were best for the nearest batch size that was tried."""
    entries = _table()[data][optimizer][head]
    nearest = min(entries, key=lambda size: abs(math.log(int(size) / batch_size)))
    return float(entries[nearest]["lr"]), float(entries[nearest]["penalty"])


def tuned_sizes() -> str:
    """The batch sizes that were tried, in words, by data set and optimiser."""
    parts = []
    for data, optimizers in _table().items():
        for optimizer, heads in optimizers.items():
            sizes = sorted({int(size) for entries in heads.values() for size in entries})
            parts.append(f"{data} with {optimizer} at {', '.join(map(str, sizes))}")
    return "; ".join(parts)
