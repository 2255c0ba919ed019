"""What the kernels of several families share."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _triangle(tile):
    """The row and column of a tile of the lower triangle; the sqrt is corrected for rounding."""
    row = ((tl.sqrt(8.0 * tile.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > tile, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= tile, row + 1, row)
    return row, tile - row * (row + 1) // 2


@triton.jit
def _piece(pieces):
    """A program's matrix and its piece of it. Both are on the grid's first axis: the others end at 65,535."""
    return (tl.program_id(0) // pieces).to(tl.int64), tl.program_id(0) % pieces
