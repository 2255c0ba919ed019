"""safetensors_writer: compressed tensors in ordinary .safetensors files, which every hub and tool carries."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import zlib
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops.ops.codec.archive import checked_metadata, encoded_name, first_checksum
from cfl_ops.ops.codec.atomic import Staged, checked_path, mode_of, permissions
from cfl_ops.ops.codec.blob import _raw_bytes as raw_bytes
from cfl_ops.ops.codec.reference.header import memory_of
from cfl_ops.ops.codec.safetensors_file import (
    KEY,
    MARK,
    MOST_HEADER,
    NAMES,
    VERSION,
    dtype_name,
    notes_text,
    plain_name,
)
from cfl_ops.ops.codec.tied import Distinct

__all__: list[str] = []

INDEX_SUFFIX = ".index.json"
_UNITS = {"": 1, **{f"{prefix}B": 1000**i for i, prefix in enumerate(("", "K", "M", "G", "T"))}}
_UNITS |= {f"{prefix}IB": 1024**i for i, prefix in enumerate(("K", "M", "G", "T"), 1)}
_MOST_NUMBER = 10**19


def bytes_of(op: str, name: str, value: Any) -> int:
    """A size: an integer, or "5GB" as Hugging Face writes it."""
    if not isinstance(value, str):
        return checks.integer(op, name, value, 1)
    match = re.fullmatch(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)\s*", value)
    if match is None or match[2].upper() not in _UNITS or Fraction(match[1]) == 0:
        value = value if len(value) <= 40 else value[:40] + "..."
        raise ValueError(f"cfl_ops.{op}: {name} must be a number of bytes, or like '5GB', but got {value!r}")
    return max(1, int(Fraction(match[1]) * _UNITS[match[2].upper()]))


class _Shard:
    """A file that is being written: room for the header, blobs as they come, then what is stored natively."""

    def __init__(self, staged: Staged, room: int) -> None:
        self.staged, self.body = staged, 8 + room
        self.staged.sink.skip(self.body)
        self.size = 0
        """Bytes of tensors, with those that are still to be written."""
        self._stop = 0
        self._wide = False
        """Whether an element of more than a byte is stored natively, so that padding goes before it."""
        self.blobs: dict[str, tuple[torch.dtype, tuple[int, ...], int, int, int]] = {}
        """By name what it stands for, where it is, and its checksum."""
        self.native: dict[str, int] = {}
        self.padding = 0
        self.checksum = 0

    def add(self, name: str, value: Tensor, blob: Tensor) -> None:
        start, self._stop = self._stop, self._stop + blob.numel()
        self.blobs[name] = value.dtype, tuple(value.shape), start, self._stop, first_checksum(blob)
        self.staged.sink.write(blob)
        self.size += blob.numel()

    def add_native(self, name: str, value: Tensor) -> None:
        self.native[name] = value.nbytes
        self.size += value.nbytes
        self._wide |= value.element_size() > 1

    def size_with(self, size: int, value: Tensor, native: bool) -> int:
        """Bytes of tensors, padding among them, if this one of so many bytes is added."""
        blobs = self._stop + (0 if native else size)
        padded = self._wide or (native and value.element_size() > 1)
        return self.size + size + (-blobs % 8 if padded else 0)

    def finish(
        self,
        order: list[str],
        values: Distinct,
        metadata: dict[str, str],
        aliases: dict[str, str],
        shard: bool,
    ) -> None:
        """Write the rest, the widest elements first so that each is aligned, and the header."""
        sink = self.staged.sink
        found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        notes: dict[str, dict[str, Any]] = {}
        waiting = {name: values[name].element_size() for name in self.native}
        if self.blobs and any(size > 1 for size in waiting.values()):
            self.padding = -self._stop % 8
            sink.write(bytes(self.padding))
            self.size += self.padding
        last = next(reversed(self.blobs), None)
        for name, (dtype, shape, start, stop, checksum) in self.blobs.items():
            padding = self.padding if name == last else 0
            found[name] = "U8", (stop + padding - start,), start, stop + padding
            notes[name] = _note(dtype, shape, checksum, padding)
        for name in sorted(waiting, key=lambda name: -waiting[name]):
            value = values[name]
            data = raw_bytes(value).cpu()
            start = sink.position - self.body
            sink.write(data)
            found[name] = NAMES[value.dtype], tuple(value.shape), start, start + data.numel()
            notes[name] = _note(value.dtype, tuple(value.shape), zlib.crc32(memory_of(data)), None)
            del value, data
        order = [name for name in order if name in found]
        notes = {name: notes[name] for name in order}
        ours = {**metadata, KEY: notes_text(notes, aliases, shard)}
        text = header_text(ours, {name: found[name] for name in order}).encode()
        assert len(text) <= self.body - 8
        text += b" " * (self.body - 8 - len(text))
        self.checksum = zlib.crc32(text)
        sink.write_at(0, (self.body - 8).to_bytes(8, "little") + text)
        self.staged.close()


def _note(dtype: torch.dtype, shape: tuple[int, ...], checksum: int, padding: int | None) -> dict[str, Any]:
    out = {"dtype": dtype_name(dtype), "shape": list(shape), "checksum": checksum}
    return out if padding is None else {**out, "padding": padding}


def header_text(metadata: dict[str, str], found: dict[str, tuple[str, tuple[int, ...], int, int]]) -> str:
    """The JSON of a header."""
    header: dict[str, Any] = {"__metadata__": metadata}
    for name, (dtype, shape, start, stop) in found.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
    return json.dumps(header, ensure_ascii=False, separators=(",", ":"))


def _room(op: str, values: Distinct, metadata: dict[str, str]) -> int:
    """Bytes that no header of these tensors passes, a multiple of 8. Finds which are tied."""
    notes: dict[str, Any] = {}
    found: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
    for name, value in values.items():
        encoded_name(op, name)
        if name == "__metadata__":
            raise ValueError(
                f"cfl_ops.{op}: state_dict must not have the key {name!r}, which the format keeps"
            )
        notes[name] = _note(value.dtype, tuple(value.shape), _MOST_NUMBER, 7)
        found[name] = "F8_E4M3FNUZ", (_MOST_NUMBER, *value.shape), _MOST_NUMBER, _MOST_NUMBER
    ours = {**metadata, KEY: notes_text(notes, values.aliases, False)}
    room = -(-(len(header_text(ours, found).encode()) + 32) // 8) * 8
    if room > MOST_HEADER:
        raise ValueError(
            f"cfl_ops.{op}: state_dict must have a header of at most {MOST_HEADER} bytes, but it needs {room}"
        )
    return room


def write_safetensors(
    op: str,
    state_dict: Distinct,
    made: Iterator[tuple[str, Tensor]],
    path: str | os.PathLike[str],
    metadata: Mapping[str, str] | None,
    max_shard_size: Any,
) -> int:
    """Write the blobs that ``made`` makes of the state dict, or the tensors themselves; returns the bytes."""
    user = checked_metadata(op, metadata)
    if any(text.startswith(MARK) for text in user.values()):
        raise ValueError(
            f"cfl_ops.{op}: metadata must not look like this package's own, which begin with {MARK!r}: readers take "
            "such for damage"
        )
    if KEY in user:
        raise ValueError(f"cfl_ops.{op}: metadata must not have the key {KEY!r}, which is this package's")
    most = None if max_shard_size is None else bytes_of(op, "max_shard_size", max_shard_size)
    named = checked_path(op, path)
    if named.is_dir():
        named = named / "model.safetensors"
    if (old := mode_of(named)) is not None and not stat.S_ISREG(old):
        raise ValueError(f"cfl_ops.{op}: path must be that of a regular file, but got {named}")
    target = named.resolve()  # of a link; shards and their index lie beside the link itself
    room = _room(op, state_dict, user)
    mode = permissions(target)
    if mode is None:
        mode = permissions(index_of(named))
    staged: list[Staged] = []
    shards: list[_Shard] = []

    def begin() -> None:
        staged.append(Staged((target if most is None else named).parent, mode))
        shards.append(_Shard(staged[-1], room))

    try:
        begin()
        order: list[str] = []
        for name, blob in made:
            value = state_dict[name]
            order.append(name)
            native = blob.numel() >= value.nbytes and value.dtype in NAMES
            stored = value.nbytes if native else blob.numel()
            if most is not None and shards[-1].size and shards[-1].size_with(stored, value, native) > most:
                _finish(shards[-1], order, state_dict, user, True)
                begin()
            if native:
                shards[-1].add_native(name, value)
            else:
                shards[-1].add(name, value, blob)
            del value, blob
        _finish(shards[-1], order, state_dict, user, len(shards) > 1)
        if len(shards) == 1:
            staged[0].commit(target)
            _remove_shards(named)
        else:
            _commit(named, shards, order, mode)
    except BaseException:
        for file in staged:
            file.discard()
        raise
    return sum(shard.body + shard.size for shard in shards)


def _finish(shard: _Shard, order: list[str], values: Distinct, metadata: dict[str, str], many: bool) -> None:
    here = shard.blobs.keys() | shard.native.keys()
    aliases = {name: of for name, of in values.aliases.items() if of in here}
    shard.finish(order, values, metadata, aliases, many)


def _commit(target: Path, shards: list[_Shard], order: list[str], mode: int | None) -> None:
    """All shards are on the disk: name them, then the index, then remove what it replaces.

    No file that the old index names is touched before the new index is there, so that either set is whole at any time.
    """
    files = _names_of_shards(target, len(shards))
    place = {
        name: file
        for file, shard in zip(files, shards, strict=True)
        for name in (*shard.blobs, *shard.native)
    }
    checksums = {file: shard.checksum for file, shard in zip(files, shards, strict=True)}
    content = {
        "metadata": {
            "total_size": sum(shard.size for shard in shards),
            KEY: json.dumps({"version": VERSION, "shards": checksums}),
        },
        "weight_map": {name: place[name] for name in order},
    }
    old = _old_shards(target)
    index = Staged(target.parent, mode)
    try:
        index.sink.write((json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())
        for file, shard in zip(files, shards, strict=True):
            shard.staged.commit(target.parent / file)
        index.commit(index_of(target))
    except BaseException:
        index.discard()
        _remove(target.parent, set(files) - _named_by(index_of(target)))
        raise
    target.unlink(missing_ok=True)  # readers look for it first; of a link, what it points to stays
    _remove(target.parent, old - set(files))


def _remove(folder: Path, files: set[str]) -> None:
    for file in files:
        (folder / file).unlink(missing_ok=True)


def _names_of_shards(target: Path, count: int) -> list[str]:
    """As Hugging Face's, with eight more digits where the old index names files of those names."""
    stem, kept = target.name.removesuffix(".safetensors"), _named_by(index_of(target))
    tail = ""
    while True:
        files = [f"{stem}-{i:05}-of-{count:05}{tail}.safetensors" for i in range(1, count + 1)]
        if kept.isdisjoint(files) and not (tail and any((target.parent / file).exists() for file in files)):
            return files
        tail = f"-{secrets.token_hex(4)}"


def index_of(target: Path) -> Path:
    """Of shards that are called as this file is."""
    return target.with_name(target.name + INDEX_SUFFIX)


def _named_by(index: Path) -> set[str]:
    """The files that an index that is there names, beside it."""
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return set()
    return {file for file in files if isinstance(file, str) and plain_name(file)}


def _old_shards(target: Path) -> set[str]:
    """Those that an index that is there names, if they are called as this one's shards are."""
    shape = (
        re.escape(target.name.removesuffix(".safetensors")) + r"-\d{5}-of-\d{5}(-[0-9a-f]{8})?\.safetensors"
    )
    return {file for file in _named_by(index_of(target)) if re.fullmatch(shape, file)}


def _remove_shards(target: Path) -> None:
    """An index and its shards that a single file replaces: readers look for that first."""
    old = _old_shards(target)
    if old:
        index_of(target).unlink(missing_ok=True)
    _remove(target.parent, old)
