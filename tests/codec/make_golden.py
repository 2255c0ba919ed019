"""Writes tests/data anew (``python -m tests.codec.make_golden``).

Only for a new version of the format: old readers must read old files.
"""

from pathlib import Path

import cfl_ops
import torch
from cfl_ops.ops.codec.reference.header import as_bytes

from tests.codec.helpers import DATA, FLOATS, golden_blobs, golden_lossless, golden_weights
from tests.codec.test_huffman import GOLDEN

if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    for name, symbols in GOLDEN.items():
        Path(DATA / name).write_bytes(as_bytes(cfl_ops.huffman_encode(symbols())))
    for dtype in FLOATS:
        blob = cfl_ops.compress(golden_weights(dtype), bits=7, per="row")
        Path(DATA / f"weights_{str(dtype).split('.')[1]}.bin").write_bytes(as_bytes(blob))
    state = {"weight": golden_weights(torch.float32), "steps": torch.tensor(7)}
    cfl_ops.save_file(state, DATA / "state.cflz", bits=7)
    for name, (w, options) in golden_blobs().items():
        Path(DATA / name).write_bytes(as_bytes(cfl_ops.compress(w, **options)))
    for name, w in golden_lossless().items():
        Path(DATA / name).write_bytes(as_bytes(cfl_ops.compress(w, lossless=True)))
