"""What a run uses unless told otherwise; the learning rates and penalties come from tune.py."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

from .heads import HEADS

__all__ = ["BATCH_SIZES", "EPOCHS", "TABLE", "epochs_of", "tuned", "tuned_sizes", "untuned"]

TABLE = Path(__file__).with_name("defaults.json")
BATCH_SIZES = (8, 32, 128)
# Such that a default run takes about a minute on two cores.
EPOCHS = {"digits": 15, "mnist5k": 5, "diabetes": 40}
# The rows that a run of a user's own data trains on, epochs times rows; such that it takes about as long.
ROWS, MOST_EPOCHS = 20_000, 40


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text())
    return table


def epochs_of(name: str, rows: int) -> int:
    """Passes over so many training rows of a data set."""
    return EPOCHS.get(name) or min(max(1, round(ROWS / rows)), MOST_EPOCHS)


def tuned(data: str, optimizer: str, head: str, batch_size: int) -> tuple[float, float]:
    """Learning rate and penalty that were best for the nearest batch size that was tried.

    A head that was not tuned for this data set and optimiser takes those of its kin.
    """
    heads = _table()[data][optimizer]
    entries = heads[head] if head in heads else heads[HEADS[head].kin]
    nearest = min(entries, key=lambda size: abs(math.log(int(size) / batch_size)))
    return float(entries[nearest]["lr"]), float(entries[nearest]["penalty"])


def untuned() -> dict[str, str]:
    """The heads that take another's values wherever they run, and that other head."""
    tried = {head for optimizers in _table().values() for heads in optimizers.values() for head in heads}
    return {name: head.kin for name, head in HEADS.items() if name not in tried and head.kin is not None}


def tuned_sizes() -> str:
    """The batch sizes that were tried, in words, by data set and optimiser."""
    parts = []
    for data, optimizers in _table().items():
        for optimizer, heads in optimizers.items():
            sizes = sorted({int(size) for entries in heads.values() for size in entries})
            parts.append(f"{data} with {optimizer} at {', '.join(map(str, sizes))}")
    return "; ".join(parts)
