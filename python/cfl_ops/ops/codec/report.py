"""report: what became of each tensor of a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.results import public
from cfl_ops.ops.codec.blob import quantised_bits
from cfl_ops.ops.codec.measure import errors_of

__all__ = ["TensorReport", "compression_report"]

_PALETTE = 2


@public
class TensorReport(NamedTuple):
    """What became of one tensor; of :func:`compression_report` and of ``compress_state_dict(report=)``."""

    name: str
    kind: str
    """``"exact"`` (bit for bit), ``"palette"`` (bit for bit as well, of few different values) or ``"quantised"``."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    bits: int | None
    """N, before the bins are coded; None where every bit is kept."""
    raw_bytes: int
    nbytes: int
    """Of the blob."""
    rms_error: float
    """Of the finite weights, as measured on the blob; not too small."""
    max_error: float

    @property
    def ratio(self) -> float:
        """The tensor's own bytes over those of the blob."""
        return self.raw_bytes / self.nbytes

    @property
    def bits_per_element(self) -> float:
        """Of the blob; 0 for a tensor without elements."""
        elements = self.raw_bytes // self.dtype.itemsize
        return 8 * self.nbytes / elements if elements else 0.0


def report_of(name: str, value: Tensor, blob: Tensor) -> TensorReport:
    """Of one tensor and its blob."""
    bits = quantised_bits(blob)
    kind = "quantised" if bits else "palette" if int(blob[5]) == _PALETTE else "exact"
    rms, largest = errors_of(value, blob) if bits else (0.0, 0.0)
    raw = value.numel() * value.element_size()
    return TensorReport(
        *(name, kind, value.dtype, tuple(value.shape), bits or None, raw, blob.numel(), rms, largest)
    )


def compression_report(state_dict: Mapping[str, Tensor], blobs: Mapping[str, Tensor]) -> list[TensorReport]:
    """What :func:`compress_state_dict` made of each tensor: kind, bits, bytes, and its error as measured.

    Decodes what is quantised, piece by piece. ``compress_state_dict(report=rows.append)`` tells the same of each
    tensor as it is made, which also serves :func:`save_file`.

    Args:
        state_dict: the tensors.
        blobs: their blobs, by the same names; those of a part of the tensors will do.

    Returns:
        a :class:`TensorReport` for each blob.

    Raises:
        KeyError: a blob whose tensor is missing.
        CorruptDataError: as :func:`decompress`.

    Not under ``fullgraph=True`` nor ``torch.export``: it decompresses.

    Example:
        >>> import torch, cfl_ops
        >>> state = {"w": torch.randn(100, 100), "steps": torch.tensor(7)}
        >>> blobs = cfl_ops.compress_state_dict(state, bits=8)
        >>> [(row.name, row.kind, row.bits) for row in cfl_ops.compression_report(state, blobs)]
        [('w', 'quantised', 8), ('steps', 'exact', None)]

    """
    for name, blob in blobs.items():
        checks.tensor("compression_report", f"blobs[{name!r}]", blob, 1)
        checks.tensor("compression_report", f"state_dict[{name!r}]", state_dict[name], 0)
    return [report_of(name, state_dict[name], blob) for name, blob in blobs.items()]
