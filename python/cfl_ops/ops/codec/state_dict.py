"""state_dict: a state dict as blobs, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from cfl_ops._core import checks
from cfl_ops.errors import CorruptDataError
from cfl_ops.ops.codec.blob import compress_named, decompress, store_raw
from cfl_ops.ops.codec.plan import Options

__all__ = ["compress_state_dict", "decompress_state_dict"]

MIN_NUMEL = 256


def compress_state_dict(
    state_dict: Mapping[str, Tensor], *, min_numel: int = MIN_NUMEL, **options: Any
) -> dict[str, Tensor]:
    """Compress each floating-point tensor of at least ``min_numel`` elements; keep all others bit for bit.

    Args:
        state_dict: names to tensors.
        min_numel: smaller tensors (biases, norms) are kept as they are: their headers would outweigh the gain.
        options: those of :func:`compress`.

    Returns:
        names to blobs, for :func:`decompress_state_dict` or :func:`save_file`.

    Warns:
        UserWarning: as :func:`compress`, with the name of the tensor.

    Not under ``fullgraph=True`` nor ``torch.export``: it compresses.

    Example:
        >>> import torch, cfl_ops
        >>> model = torch.nn.Linear(100, 100)
        >>> blobs = cfl_ops.compress_state_dict(model.state_dict(), bits=8)
        >>> _ = model.load_state_dict(cfl_ops.decompress_state_dict(blobs))

    """
    return dict(named_blobs(state_dict, min_numel, options, 4))


def named_blobs(
    state_dict: Mapping[str, Tensor], min_numel: int, options: dict[str, Any], stacklevel: int
) -> Iterator[tuple[str, Tensor]]:
    """What compress_state_dict returns, one by one; warnings point so many calls up."""
    op = "compress_state_dict"
    if unknown := options.keys() - set(Options._fields):
        raise TypeError(f"cfl_ops.{op}: unknown options {', '.join(sorted(unknown))}")
    asked = Options(**options)
    min_numel = checks.integer(op, "min_numel", min_numel, 0)
    for name, value in state_dict.items():
        where = f"state_dict[{name!r}]"
        checks.tensor(op, where, value, 0)
        try:
            compressible = value.dtype in checks.FLOATS and value.numel() >= min_numel
            if compressible:
                blob = compress_named(op, where, value, asked, stacklevel)
            else:
                blob = store_raw(op, where, value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (in {where})") from None
        yield name, blob


def decompress_state_dict(blobs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that :func:`compress_state_dict` took; raises CorruptDataError as :func:`decompress`.

    Not under ``fullgraph=True`` nor ``torch.export``: it decompresses.

    Example:
        >>> import torch, cfl_ops
        >>> blobs = cfl_ops.compress_state_dict({"w": torch.zeros(3)})
        >>> cfl_ops.decompress_state_dict(blobs)
        {'w': tensor([0., 0., 0.])}
    """
    out = {}
    for name, blob in blobs.items():
        try:
            out[name] = decompress(blob)
        except CorruptDataError as error:
            raise CorruptDataError(f"{error} (in {name!r})") from None
    return out
