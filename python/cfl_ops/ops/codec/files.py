"""files: a state dict as one file of blobs. docs/format.md describes the bytes."""

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

from cfl_ops.ops.codec.huffman import corrupt
from cfl_ops.ops.codec.reference.header import as_bytes, from_bytes
from cfl_ops.ops.codec.state_dict import MIN_NUMEL, decompress_state_dict, named_blobs

__all__ = ["load_file", "save_file"]

_FILE_MAGIC, _FILE_VERSION = b"CFLZ", 1
_FILE = struct.Struct("<4sIQII")  # then a checksum: 28 bytes


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
    blobs = {
        name: as_bytes(blob) for name, blob in dict(named_blobs(state_dict, min_numel, options, 4)).items()
    }
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
