"""archive: a ``.cflz`` file: blobs under names, written in one stream and read where they lie.

docs/format.md describes the bytes, and those of version 1, which is read.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from cfl_ops._core import checks
from cfl_ops.errors import CorruptDataError
from cfl_ops.ops.codec.atomic import Sink, checked_path, replacing
from cfl_ops.ops.codec.huffman import corrupt
from cfl_ops.ops.codec.reference.header import as_bytes
from cfl_ops.ops.codec.weights import Mapped, Weights

__all__: list[str] = []

MAGIC, END_MAGIC, VERSION = b"CFLZ", b"CFLE", 2
_FIRST = struct.Struct("<4sIQII")  # version 1; then a checksum: 28 bytes
_HEAD = struct.Struct("<4sIQ")
_ENTRY = struct.Struct("<QIII")
_FOOTER = struct.Struct("<QQII4s")
_OWN = 0xFFFFFFFF
"""In the place of the entry that a further name stands for: none, it has a blob."""
CHECKED = 4096
"""Of so many first bytes of a blob the index has a checksum, lest two blobs change places."""


def first_checksum(blob: Tensor) -> int:
    """The checksum of a blob's first bytes, in which it has those of the others."""
    return zlib.crc32(as_bytes(blob[:CHECKED]))


class Writer:
    """Writes an archive, blob by blob, then its index."""

    def __init__(self, op: str, sink: Sink) -> None:
        self._op, self._sink = op, sink
        self._index: list[bytes] = []
        self._places: dict[str, int] = {}
        self._stored: set[str] = set()
        self._head = _HEAD.pack(MAGIC, VERSION, 0)
        sink.write(self._head)

    def _add(self, name: str, size: int, checksum: int, of: int) -> None:
        if not isinstance(name, str):
            raise TypeError(f"cfl_ops.{self._op}: names must be strings, but got {name!r}")
        if name in self._places:
            raise ValueError(f"cfl_ops.{self._op}: names must differ, but got {name!r} twice")
        encoded = encoded_name(self._op, name)
        self._places[name] = len(self._index)
        self._index.append(_ENTRY.pack(size, checksum, of, len(encoded)) + encoded)

    def add(self, name: str, blob: Tensor) -> None:
        """Write a blob."""
        self._add(name, blob.numel(), first_checksum(blob), _OWN)
        self._stored.add(name)
        self._sink.write(blob)

    def alias(self, name: str, of: str) -> None:
        """A further name of a blob that was written."""
        if of not in self._stored:
            raise ValueError(f"cfl_ops.{self._op}: {name!r} must be tied to a stored name, but got {of!r}")
        self._add(name, 0, 0, self._places[of])

    def finish(self, metadata: Mapping[str, str] | None) -> int:
        """Write the index; returns the bytes of the archive."""
        text = json.dumps(checked_metadata(self._op, metadata), ensure_ascii=False).encode()
        index = b"".join(self._index) + text
        total = self._sink.position + len(index) + _FOOTER.size
        fields = _FOOTER.pack(len(index), total, len(self._index), 0, END_MAGIC)
        checksum = zlib.crc32(fields[:20], zlib.crc32(index, zlib.crc32(self._head)))
        self._sink.write(index + _FOOTER.pack(len(index), total, len(self._index), checksum, END_MAGIC))
        return total


def encoded_name(op: str, name: str, what: str = "names") -> bytes:
    """In UTF-8."""
    try:
        return name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"cfl_ops.{op}: {what} must be Unicode text, but got {name!r}") from None


def checked_metadata(op: str, metadata: Any) -> dict[str, str]:
    """A dict of strings."""
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise TypeError(f"cfl_ops.{op}: metadata must be a mapping, but got {type(metadata).__name__}")
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"cfl_ops.{op}: metadata must map strings to strings, but got {key!r}: {value!r}")
        for text in (key, value):
            encoded_name(op, text, "metadata")
    return dict(metadata)


def write_archive(
    target: Any,
    entries: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
    *,
    op: str = "write_archive",
) -> int:
    """Write blobs as they come; nothing is held but one of them. Returns the bytes.

    ``target`` is a path, which is replaced when all is written, or a binary file object (which is written to from front
    to back). ``aliases`` maps further names to those of entries, and is read after the last of them.
    """
    if hasattr(target, "write"):
        return _write(op, Sink(target), entries, metadata, aliases)
    with replacing(checked_path(op, target)) as sink:
        return _write(op, sink, entries, metadata, aliases)


def _write(
    op: str,
    sink: Sink,
    entries: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None,
    aliases: Mapping[str, str] | None,
) -> int:
    metadata = checked_metadata(op, metadata)
    writer = Writer(op, sink)
    for name, blob in entries:
        writer.add(name, check_blob(op, name, blob))
        del blob  # before the next one is made
    for name, of in (aliases or {}).items():
        writer.alias(name, of)
    return writer.finish(metadata)


def check_blob(op: str, name: str, blob: Any) -> Tensor:
    """It is 1-d uint8."""
    where = f"the blob of {name!r}"
    checks.tensor(op, where, blob, 1)
    if str(blob.dtype) != "torch.uint8" or blob.ndim != 1:
        raise TypeError(
            f"cfl_ops.{op}: {where} must be 1-d uint8, but got {blob.dtype} of {blob.ndim} dimensions"
        )
    out: Tensor = blob
    return out


class _Place(NamedTuple):
    """Where a blob is, and the checksum of its first bytes."""

    start: int
    size: int
    checksum: int | None


class Archive(Weights):
    """A ``.cflz`` file, opened: its index is checked at once, a blob when it is decoded.

    The file is mapped into memory. It may be replaced meanwhile (a rename leaves the opened one as it is); one that is
    written to in place is found out by the checksums, or, where it gets shorter, ends the process (SIGBUS).
    """

    def __init__(self, path: str | os.PathLike[str] | Mapped) -> None:
        self._mapped = path if isinstance(path, Mapped) else Mapped(path)
        self.path = self._mapped.path
        self.aliases, self.metadata = {}, {}
        self._places: dict[str, _Place] = {}
        try:
            self._read()
        except CorruptDataError as error:
            raise CorruptDataError(f"{error} ({self.path})") from None

    def close(self) -> None:
        """Blobs that were given out stay good."""
        self._mapped.close()

    def stored_bytes(self, name: str) -> int:
        """What it takes in the file; of a further name of a tied tensor 0."""
        self.stored_name(name)
        return 0 if name in self.aliases else self._places[name].size

    def _blob(self, name: str) -> Tensor:
        place = self._places[name]
        blob = self._mapped.data[place.start : place.start + place.size]
        if blob.numel() != place.size:
            raise ValueError(f"cfl_ops.load_file: {self.path} must be open, but it was closed")
        if place.checksum is not None and first_checksum(blob) != place.checksum:
            raise corrupt("load_file", "the blob is not the one that the index names (checksum)")
        return blob

    def soon(self, name: str) -> None:
        self._mapped.soon(*self._places[name][:2])

    def done(self, name: str) -> None:
        self._mapped.done(*self._places[name][:2])

    def _read(self) -> None:
        data = self._mapped.data
        size = data.numel()
        if size < _HEAD.size or as_bytes(data[:4]) != MAGIC:
            raise corrupt("load_file", "the file does not start with the codec's mark")
        head = as_bytes(data[: _HEAD.size])
        _, version, reserved = _HEAD.unpack(head)
        if version == 1:
            return self._read_first()
        if version != VERSION or reserved:
            raise corrupt("load_file", "the file was written in a version that this reader does not know")
        if size < _HEAD.size + _FOOTER.size:
            raise _length()
        end = as_bytes(data[size - _FOOTER.size :])
        index_bytes, total, count, checksum, mark = _FOOTER.unpack(end)
        start = size - _FOOTER.size - index_bytes
        if mark != END_MAGIC or total != size or start < _HEAD.size:
            raise _length()
        index = as_bytes(data[start : size - _FOOTER.size])
        if zlib.crc32(end[:20], zlib.crc32(index, zlib.crc32(head))) != checksum:
            raise corrupt("load_file", "the file has a damaged index (checksum)")
        self._read_index(index, count, start)

    def _read_index(self, index: bytes, count: int, stop: int) -> None:
        at, place = 0, _HEAD.size
        names: list[str] = []
        tied: list[tuple[str, int]] = []
        try:
            for _ in range(count):
                size, checksum, of, name_bytes = _ENTRY.unpack_from(index, at)
                at += _ENTRY.size + name_bytes
                if at > len(index):
                    raise ValueError
                name = index[at - name_bytes : at].decode()
                names.append(name)
                if of == _OWN:
                    self._places[name] = _Place(place, size, checksum)
                    place += size
                elif size or checksum:
                    raise ValueError
                else:
                    tied.append((name, of))
            for name, of in tied:
                if names[of] not in self._places:
                    raise ValueError
                self.aliases[name] = names[of]
            self.metadata = _metadata(index[at:])
        except (struct.error, ValueError, IndexError, RecursionError):
            raise _contradiction() from None
        self.names = tuple(names)
        if place != stop or len(set(names)) != count or self.aliases.keys() & self._places.keys():
            raise _contradiction()

    def _read_first(self) -> None:
        """Version 1: the index stands before the blobs."""
        data = self._mapped.data
        fixed = as_bytes(data[: _FIRST.size + 4])
        if len(fixed) < _FIRST.size + 4:
            raise _length()
        _, _, total, count, index_bytes = _FIRST.unpack_from(fixed)
        (checksum,) = struct.unpack_from("<I", fixed, _FIRST.size)
        place = len(fixed) + index_bytes
        if total != data.numel() or place > total:
            raise _length()
        index = as_bytes(data[len(fixed) : place])
        if zlib.crc32(index, zlib.crc32(fixed[: _FIRST.size])) != checksum:
            raise corrupt("load_file", "the file has a damaged header (checksum)")
        at = 0
        try:
            for _ in range(count):
                size, name_bytes = struct.unpack_from("<QI", index, at)
                at += 12 + name_bytes
                if at > len(index):
                    raise ValueError
                self._places[index[at - name_bytes : at].decode()] = _Place(place, size, None)
                place += size
        except (struct.error, ValueError):
            raise _contradiction() from None
        self.names = tuple(self._places)
        if at != len(index) or len(self.names) != count or place != total:
            raise _contradiction()


def _metadata(text: bytes) -> dict[str, str]:
    found = json.loads(text.decode())
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise ValueError
    return found


def _length() -> CorruptDataError:
    return corrupt("load_file", "the file has another length than it says (truncated or extended)")


def _contradiction() -> CorruptDataError:
    return corrupt("load_file", "the file has an index that contradicts itself")
