"""safetensors_file: tensors of .safetensors files, as they are or compressed, in one file or in shards.

The format is read without the library of that name, so that a damaged file is always CorruptDataError.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops.errors import CorruptDataError
from cfl_ops.ops.codec import codes
from cfl_ops.ops.codec.archive import first_checksum
from cfl_ops.ops.codec.blob import store_raw
from cfl_ops.ops.codec.blob_reader import describe
from cfl_ops.ops.codec.huffman import corrupt, span
from cfl_ops.ops.codec.layout import BLOB_BYTES, MAGIC
from cfl_ops.ops.codec.reference.header import as_bytes, memory_of
from cfl_ops.ops.codec.weights import Mapped, Weights

__all__: list[str] = []

KEY, VERSION = "cfl_ops", 1
MARK = f'{{"format":"{KEY}"'
"""How our part of the metadata begins, lest a damaged key makes compressed tensors look like plain ones."""
MOST_HEADER = 100_000_000
"""The most bytes of a header that safetensors' own readers take."""
DTYPES: dict[str, torch.dtype] = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool},
    **{"C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
    **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
}
"""What every reader of safetensors for torch knows: other dtypes are never stored natively."""
PACKED = "F4"
"""Two elements a byte, whose shape counts them singly."""
_MORE = {"F8_E8M0": torch.float8_e8m0fnu, PACKED: torch.float4_e2m1fn_x2}
_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8},
    **{name: 8 * dtype.itemsize for name, dtype in DTYPES.items()},
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Note(NamedTuple):
    """What the metadata say of a tensor: compressed with this dtype and shape, or native (None)."""

    checksum: int
    dtype: str | None
    shape: tuple[int, ...]
    padding: int


class Notes(NamedTuple):
    """The metadata's part of ours."""

    tensors: dict[str, Note]
    aliases: dict[str, str]
    shard: bool


def dtype_name(dtype: torch.dtype) -> str:
    """As the metadata have it: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def notes_text(tensors: dict[str, Any], aliases: dict[str, str], shard: bool) -> str:
    """What goes into the metadata: JSON with a checksum of what else is in it."""
    content = {"tensors": tensors, "aliases": aliases, "shard": shard}
    return json.dumps(
        {"format": KEY, "version": VERSION, "checksum": notes_checksum(content), **content},
        ensure_ascii=False,
        separators=(",", ":"),
    )


def notes_checksum(content: Any) -> int:
    """Of the canonical form."""
    return zlib.crc32(json.dumps(content, separators=(",", ":"), sort_keys=True).encode())


class SafetensorsFile(Weights):
    """One file, opened: header and metadata are checked at once, a tensor when it is decoded."""

    def __init__(self, path: str | os.PathLike[str] | Mapped) -> None:
        self._mapped = path if isinstance(path, Mapped) else Mapped(path)
        self.path = self._mapped.path
        try:
            self._read()
        except CorruptDataError as error:
            raise CorruptDataError(f"{error} ({self.path})") from None

    def _read(self) -> None:
        self._entries, self.metadata, self._body, self.header_checksum = read_header(self._mapped.data)
        ours = self.metadata.pop(KEY, None)
        if any(value.startswith(MARK) for value in self.metadata.values()):
            raise corrupt("load_file", "the file has metadata of cfl_ops under another name")
        self.notes = None if ours is None else read_notes(ours, self._entries)
        self.aliases = {} if self.notes is None else self.notes.aliases
        self.names = (*self._entries, *self.aliases)

    def close(self) -> None:
        """Blobs that were given out stay good."""
        self._mapped.close()

    def stored_bytes(self, name: str) -> int:
        """What it takes in the file; of a further name of a tied tensor 0."""
        self.stored_name(name)
        return 0 if name in self.aliases else self._entries[name].stop - self._entries[name].start

    def native(self, name: str) -> bool:
        """Whether it stands in the file as it is, without a blob around it."""
        note = self._note(self.stored_name(name))
        return note is None or note.dtype is None

    def _note(self, name: str) -> Note | None:
        return None if self.notes is None else self.notes.tensors[name]

    def nameless_blobs(self, names: Iterable[str]) -> list[str]:
        """Those that are compressed but of which no metadata say so: they are read as the bytes that they are."""
        return [] if self.notes is not None else [name for name in names if self._is_blob(name)]

    def _is_blob(self, name: str) -> bool:
        entry = self._entries[name]
        if entry.dtype != "U8" or len(entry.shape) != 1 or entry.shape[0] < BLOB_BYTES:
            return False
        start = as_bytes(self._bytes(name)[:16])
        return start[:4] == MAGIC and 0 <= entry.shape[0] - int.from_bytes(start[8:], "little") < 8

    def _bytes(self, name: str) -> Tensor:
        entry = self._entries[name]
        data = self._mapped.data[self._body + entry.start : self._body + entry.stop]
        if data.numel() != entry.stop - entry.start:
            raise ValueError(f"cfl_ops.load_file: {self.path} must be open, but it was closed")
        return data

    def soon(self, name: str) -> None:
        entry = self._entries[name]
        self._mapped.soon(self._body + entry.start, entry.stop - entry.start)

    def done(self, name: str) -> None:
        entry = self._entries[name]
        self._mapped.done(self._body + entry.start, entry.stop - entry.start)

    def _blob(self, name: str) -> Tensor:
        note = self._note(name)
        if note is None or note.dtype is None:
            return store_raw("load_file", name, self._native(name))
        data = self._bytes(name)
        blob = data[: data.numel() - note.padding]
        if first_checksum(blob) != note.checksum or bool(data[blob.numel() :].any()):
            raise corrupt("load_file", "the blob is not the one that the metadata name (checksum)")
        found = describe(blob, "load_file")
        if dtype_name(found.dtype) != note.dtype or found.shape != note.shape:
            raise corrupt("load_file", "the blob has another dtype or shape than the metadata say")
        return blob

    def header(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape, from the first bytes."""
        if not self.native(name):
            return super().header(name)
        entry = self._entries[self.stored_name(name)]
        dtype = (DTYPES | _MORE).get(entry.dtype)
        if dtype is None:
            raise ValueError(
                f"cfl_ops.load_file: {name!r} must have a dtype that torch has, but got {entry.dtype}"
            )
        if entry.dtype != PACKED:
            return dtype, entry.shape
        if not entry.shape or entry.shape[-1] % 2:
            raise ValueError(f"cfl_ops.load_file: {name!r} must have an even number of {PACKED} in a row")
        return dtype, (*entry.shape[:-1], entry.shape[-1] // 2)

    def _native(self, name: str) -> Tensor:
        """In the file's own bytes, if they are aligned."""
        dtype, shape = self.header(name)
        data, note = self._bytes(name), self._note(name)
        if note is not None and zlib.crc32(memory_of(data)) != note.checksum:
            raise corrupt("load_file", "the data are damaged (checksum)")
        if dtype == torch.bool and bool((data > 1).any()):
            raise corrupt("load_file", "the data are neither true nor false")
        if not data.numel():
            return torch.empty(shape, dtype=dtype)
        if data.storage_offset() % dtype.itemsize:
            data = data.clone()
        return data.view(dtype).view(shape)

    def mapped(self, name: str) -> Tensor | None:
        """The tensor where it lies in the file, not to be written to; None where it is coded or is to be checked."""
        name = self.stored_name(name)
        if self.notes is not None:
            return None
        dtype, shape = self.header(name)
        data = self._bytes(name)
        if dtype == torch.bool or not data.numel() or data.storage_offset() % dtype.itemsize:
            return None
        return data.view(dtype).view(shape)

    def _decode(
        self, name: str, start: int | None, stop: int | None, out: Tensor | None, device: torch.device | None
    ) -> Tensor:
        if not self.native(name):
            return super()._decode(name, start, stop, out, device)
        with self._naming(name):
            value = self._native(name)
        if start is not None or stop is not None:
            first, count = span("decompress", start, stop, value.numel())
            value = value.view(-1)[first : first + count]
        if out is None:
            return value.to(device, copy=True)
        if out.dtype != value.dtype or out.numel() != value.numel() or not out.is_contiguous():
            raise ValueError(
                f"cfl_ops.load_file: out must be contiguous, of {value.numel()} elements of {value.dtype}, "
                f"but got {out.dtype} of shape {tuple(out.shape)}"
            )
        out.detach().view(-1).view(torch.uint8).copy_(value.reshape(-1).view(torch.uint8))
        return out


def read_header(data: Tensor) -> tuple[dict[str, Entry], dict[str, str], int, int]:
    """The tensors, the metadata, where the tensors' bytes begin, and the checksum of the header."""
    size = data.numel()
    header_bytes = int.from_bytes(as_bytes(data[:8]), "little")
    if size < 8 or header_bytes > min(MOST_HEADER, size - 8):
        raise corrupt("load_file", "the file has a header that is longer than it")
    raw = as_bytes(data[8 : 8 + header_bytes])
    try:
        if raw[:1] != b"{":
            raise ValueError
        header = json.loads(raw.decode(), object_pairs_hook=_once, parse_constant=_refuse)
        metadata = header.pop("__metadata__", {})
        if not _strings(metadata):
            raise ValueError
        entries = {name: _entry(value) for name, value in header.items()}
    except (ValueError, RecursionError):
        raise corrupt("load_file", "the file has a header that is no header of safetensors") from None
    at = 0
    for entry in sorted(entries.values(), key=lambda entry: (entry.start, entry.stop)):
        bits = math.prod(entry.shape) * _BITS[entry.dtype]
        if entry.start != at or entry.stop < at or bits != 8 * (entry.stop - at):
            raise corrupt("load_file", "the file has tensors that overlap, or bytes that are none's")
        at = entry.stop
    if at != size - 8 - header_bytes:
        raise corrupt("load_file", "the file has another length than its header says (truncated or extended)")
    return entries, metadata, 8 + header_bytes, zlib.crc32(raw)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError
    return out


def _refuse(_: str) -> None:
    raise ValueError


def _strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def _naturals(value: Any, most: int = 2**64) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < most for item in value)


def _entry(value: Any) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS or not _naturals(shape) or not _naturals(offsets):
        raise ValueError
    if not codes.shape_fits(tuple(shape)):
        raise ValueError  # torch could not lay it out
    start, stop = offsets
    return Entry(dtype, tuple(shape), start, stop)


def read_notes(text: str, entries: dict[str, Entry]) -> Notes:
    """Our part of the metadata, held against the header."""
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
        version = found.pop("version")
        if found.pop("format") != KEY or type(version) is not int:
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise corrupt("load_file", "the file has metadata of cfl_ops that nobody wrote") from None
    if version != VERSION:
        raise corrupt("load_file", "the file was written in a version that this reader does not know")
    try:
        checksum = found.pop("checksum")
        if found.keys() != {"tensors", "aliases", "shard"} or type(found["shard"]) is not bool:
            raise ValueError
        if type(checksum) is not int or notes_checksum(found) != checksum or not _strings(found["aliases"]):
            raise ValueError
        tensors = {name: _note(value, entries[name]) for name, value in found["tensors"].items()}
        aliases: dict[str, str] = found["aliases"]
        if tensors.keys() != entries.keys() or any(
            name in tensors or of not in tensors for name, of in aliases.items()
        ):
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise corrupt("load_file", "the file has metadata of cfl_ops that contradict its header") from None
    return Notes({name: tensors[name] for name in entries}, aliases, found["shard"])


def _note(value: Any, entry: Entry) -> Note:
    checksum, dtype, shape = value.pop("checksum"), value.pop("dtype"), value.pop("shape")
    padding = value.pop("padding", None)
    if value or type(checksum) is not int or not isinstance(dtype, str) or not _naturals(shape):
        raise ValueError
    if padding is None:
        if DTYPES.get(entry.dtype) is None or dtype_name(DTYPES[entry.dtype]) != dtype:
            raise ValueError
        if tuple(shape) != entry.shape:
            raise ValueError
        return Note(checksum, None, entry.shape, 0)
    if type(padding) is not int or not 0 <= padding < 8 or entry.dtype != "U8" or len(entry.shape) != 1:
        raise ValueError
    if entry.shape[0] <= padding:
        raise ValueError
    return Note(checksum, dtype, tuple(shape), padding)


class ShardedSafetensors(Weights):
    """The shards that an index names, opened; they lie beside it."""

    def __init__(self, path: str | os.PathLike[str] | Mapped) -> None:
        mapped = path if isinstance(path, Mapped) else Mapped(path)
        self.path = mapped.path
        self._shards: dict[str, SafetensorsFile] = {}
        try:
            self._read(as_bytes(mapped.data))
        except CorruptDataError as error:
            raise CorruptDataError(f"{error} ({self.path})") from None

    def _read(self, raw: bytes) -> None:
        try:
            index = json.loads(raw.decode(), object_pairs_hook=_once)
            weight_map, metadata = index["weight_map"], index.get("metadata") or {}
            if not _strings(weight_map) or not isinstance(metadata, dict):
                raise ValueError
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise corrupt("load_file", "the file is no index of shards") from None
        for file in dict.fromkeys(weight_map.values()):
            if not plain_name(file):
                raise corrupt(
                    "load_file", f"the index must name files beside it, without a folder, but it has {file!r}"
                )
        sums = _shard_checksums(metadata.get(KEY))
        folder = Path(self.path).parent
        for file in dict.fromkeys(weight_map.values()):
            try:
                shard = self._shards[file] = SafetensorsFile(folder / file)
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"cfl_ops.load_file: {self.path} must have its shards beside it, but there is no {file}"
                ) from None
            of_a_set = shard.notes is not None and shard.notes.shard
            if of_a_set if sums is None else sums.get(file) != shard.header_checksum:
                raise corrupt("load_file", f"the index and the shard {file} are of different checkpoints")
        self._place: dict[str, str] = {}
        for name, file in weight_map.items():
            if name not in self._shards[file] or name in self._shards[file].aliases:
                raise corrupt(
                    "load_file", f"the shard {file} has no tensor {name!r}, which the index has in it"
                )
            self._place[name] = file
        self.aliases = {}
        for file, shard in self._shards.items():
            if sums is not None and any(self._place.get(name) != file for name in shard._entries):
                raise corrupt("load_file", f"the shard {file} has tensors that the index has not")
            self.aliases |= {a: of for a, of in shard.aliases.items() if self._place.get(of) == file}
        if self.aliases.keys() & self._place.keys() or (
            sums is not None and sums.keys() != self._shards.keys()
        ):
            raise corrupt("load_file", "the index contradicts its shards")
        self.names = (*self._place, *self.aliases)
        self.metadata = {}
        for shard in self._shards.values():
            self.metadata |= shard.metadata

    def close(self) -> None:
        """Blobs that were given out stay good."""
        for shard in self._shards.values():
            shard.close()

    def _of(self, name: str) -> SafetensorsFile:
        return self._shards[self._place[self.stored_name(name)]]

    def stored_bytes(self, name: str) -> int:
        """What it takes in its shard; of a further name of a tied tensor 0."""
        return 0 if name in self.aliases else self._of(name).stored_bytes(name)

    def native(self, name: str) -> bool:
        """Whether it stands in its shard as it is, without a blob around it."""
        return self._of(name).native(name)

    def header(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape, from the first bytes."""
        return self._of(name).header(name)

    def mapped(self, name: str) -> Tensor | None:
        """The tensor where it lies in its shard, not to be written to; None where it is coded or is to be checked."""
        return self._of(name).mapped(self.stored_name(name))

    def nameless_blobs(self, names: Iterable[str]) -> list[str]:
        """Those that are compressed but of which no metadata say so: they are read as the bytes that they are."""
        return [name for name in names if self._of(name).nameless_blobs([self.stored_name(name)])]

    def _blob(self, name: str) -> Tensor:
        return self._of(name)._blob(name)

    def soon(self, name: str) -> None:
        self._of(name).soon(name)

    def done(self, name: str) -> None:
        self._of(name).done(name)

    def _decode(
        self, name: str, start: int | None, stop: int | None, out: Tensor | None, device: torch.device | None
    ) -> Tensor:
        return self._of(name)._decode(name, start, stop, out, device)


def plain_name(file: str) -> bool:
    """A file's name, without a folder."""
    try:
        size = len(file.encode())
    except UnicodeEncodeError:
        return False
    return 0 < size <= 255 and file not in (".", "..") and not set(file) & {"/", "\\", "\0"}


def _shard_checksums(text: Any) -> dict[str, int] | None:
    """Of the headers of the shards, by file, where the index is ours."""
    if text is None:
        return None
    try:
        found = json.loads(text, object_pairs_hook=_once)
        version, shards = found["version"], found.get("shards")
        if version == VERSION and not all(type(value) is int for value in shards.values()):
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise corrupt("load_file", "the index has metadata of cfl_ops that nobody wrote") from None
    if version != VERSION:
        raise corrupt("load_file", "the index was written in a version that this reader does not know")
    return dict(shards)
