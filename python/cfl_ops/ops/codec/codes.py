"""What can be wrong with a payload, and the limits of the format (docs/format.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LENGTH, MAX_SYMBOLS, MAX_DIMS = 60, 2**40, 64
MAX_RESERVE = 2**20
"""Bytes before a payload, for a blob's header and tables, beside 32 for each symbol (csrc/cpu/codec_checks.h)."""
MIN_CHUNK_LOG2, MAX_CHUNK_LOG2 = 10, 20

# The numbers are those of csrc/cpu/codec_payload.h.
GOOD, TOO_SHORT, BAD_MAGIC, BAD_VERSION, BAD_HEADER, BAD_LENGTH = range(6)
BAD_HEADER_CHECKSUM, BAD_CODE_TABLE, BAD_CHUNK_SIZES, OUT_OF_RANGE = range(6, 10)
BAD_CHUNK = 1000

WORDS = {
    TOO_SHORT: "is too short to hold a header",
    BAD_MAGIC: "does not start with the codec's mark",
    BAD_VERSION: "was written in a version or layout that this reader does not know",
    BAD_HEADER: "has a header that contradicts itself",
    BAD_LENGTH: "has another length than its header says (truncated or extended)",
    BAD_HEADER_CHECKSUM: "has a damaged header (checksum)",
    BAD_CODE_TABLE: "has a code table that is not a complete prefix code",
    BAD_CHUNK_SIZES: "has chunk sizes that do not add up to its length",
}


def shape_fits(shape: Sequence[int]) -> bool:
    """Whether torch can hold a tensor of this shape: the extents that are not 0 give its strides."""
    return len(shape) <= MAX_DIMS and math.prod(extent or 1 for extent in shape) < 2**63


class Corrupt(Exception):
    """Carries one of the codes above to the op's info."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def info(code: int, device: torch.device) -> Tensor:
    """The info of an op that decodes; made without synchronising."""
    return torch.full((), code, dtype=torch.int64, device=device)
