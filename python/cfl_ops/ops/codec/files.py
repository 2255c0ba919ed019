"""files: a state dict as blobs, and as one file of them. docs/format.md describes the bytes."""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops.errors import CorruptDataError
from cfl_ops.ops.codec.blob import compress_named, decompress, store_raw
from cfl_ops.ops.codec.huffman import corrupt
from cfl_ops.ops.codec.plan import Options
from cfl_ops.ops.codec.reference.header import as_bytes, from_bytes

__all__ = ["compress_state_dict", "decompress_state_dict", "load_file", "save_file"]

_FILE_MAGIC, _FILE_VERSION = b"CFLZ", 1
_FILE = struct.Struct("<4sIQII")  # then a checksum: 28 bytes
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
    return _blobs(state_dict, min_numel, options)


def _blobs(state_dict: Mapping[str, Tensor], min_numel: int, options: dict[str, Any]) -> dict[str, Tensor]:
    """What compress_state_dict returns; warnings point at its caller's caller."""
    op, out = "compress_state_dict", {}
    if unknown := options.keys() - set(Options._fields):
        raise TypeError(f"cfl_ops.{op}: unknown options {', '.join(sorted(unknown))}")
    asked = Options(**options)
    min_numel = checks.integer(op, "min_numel", min_numel, 0)
    for name, value in state_dict.items():
        where = f"state_dict[{name!r}]"
        checks.tensor(op, where, value, 0)
        try:
            compressible = value.dtype in checks.FLOATS and value.numel() >= min_numel
            out[name] = (
                compress_named(op, where, value, asked, 4) if compressible else store_raw(op, where, value)
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (in {where})") from None
    return out


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


def save_file(state_dict: Mapping[str, Tensor], path: str | os.PathLike[str], **options: Any) -> int:
    """Compress a state dict into a ``.cflz`` file; returns its size in bytes.

    The file is written under a temporary name beside ``path`` and renamed when it is complete and on disk.

    Args:
        state_dict: names to tensors.
        path: where to write.
        options: those of :func:`compress_state_dict`.

    Not under ``fullgraph=True`` nor ``torch.export``: it writes a file.

    Example:
        >>> import tempfile, torch, cfl_ops
        >>> path = tempfile.mktemp(suffix=".cflz")
        >>> _ = cfl_ops.save_file({"weight": torch.randn(300, 300)}, path, bits=8)
        >>> cfl_ops.load_file(path)["weight"].shape
        torch.Size([300, 300])

    """
    min_numel = options.pop("min_numel", MIN_NUMEL)
    blobs = {name: as_bytes(blob) for name, blob in _blobs(state_dict, min_numel, options).items()}
    index = b""
    for name, blob in blobs.items():
        encoded = name.encode()
        index += struct.pack("<QI", len(blob), len(encoded)) + encoded
    total = _FILE.size + 4 + len(index) + sum(map(len, blobs.values()))
    head = _FILE.pack(_FILE_MAGIC, _FILE_VERSION, total, len(blobs), len(index))
    head += struct.pack("<I", zlib.crc32(index, zlib.crc32(head)))
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(head + index)
            for blob in blobs.values():
                file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return total


def load_file(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a ``.cflz`` file back into a state dict.

    Raises:
        CorruptDataError: the file is not one, or a byte of it is wrong, missing or too many.

    Not under ``fullgraph=True`` nor ``torch.export``: it reads a file.

    Example:
        >>> import os, tempfile, torch, cfl_ops
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.cflz")
        ...     size = cfl_ops.save_file({"w": torch.zeros(3)}, path)
        ...     cfl_ops.load_file(path)
        {'w': tensor([0., 0., 0.])}
    """
    op = "load_file"
    data = Path(path).read_bytes()
    if len(data) < _FILE.size + 4 or data[:4] != _FILE_MAGIC:
        raise corrupt(op, "the file does not start with the codec's mark")
    _, version, total, count, index_bytes = _FILE.unpack_from(data)
    if version != _FILE_VERSION:
        raise corrupt(op, "the file was written in a version that this reader does not know")
    at = _FILE.size + 4
    if total != len(data) or at + index_bytes > total:
        raise corrupt(op, "the file has another length than its header says (truncated or extended)")
    index = data[at : at + index_bytes]
    (checksum,) = struct.unpack_from("<I", data, _FILE.size)
    if zlib.crc32(index, zlib.crc32(data[: _FILE.size])) != checksum:
        raise corrupt(op, "the file has a damaged header (checksum)")
    sizes: dict[str, int] = {}
    position = 0
    try:
        for _ in range(count):
            size, name_bytes = struct.unpack_from("<QI", index, position)
            position += 12 + name_bytes
            if position > len(index):
                raise ValueError
            sizes[index[position - name_bytes : position].decode()] = size
    except (struct.error, ValueError):
        raise corrupt(op, "the file has an index that contradicts itself") from None
    at += index_bytes
    if position != len(index) or len(sizes) != count or at + sum(sizes.values()) != total:
        raise corrupt(op, "the file has an index that contradicts itself")
    blobs, view = {}, memoryview(data)
    for name, size in sizes.items():
        blobs[name] = from_bytes(bytes(view[at : at + size]), torch.device(device))
        at += size
    return decompress_state_dict(blobs)
