"""What a command writes: a file that is there whole or not at all, a pipe, or stdout."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops.ops.codec.archive import encoded_name, write_archive
from cfl_ops.ops.codec.atomic import Sink, Staged, permissions, replacing
from cfl_ops.ops.codec.bits import as_uint8, flat_bits
from cfl_ops.ops.codec.safetensors_file import KEY, NAMES
from cfl_ops.ops.codec.safetensors_writer import index_of, write_safetensors

from . import pickled
from .failures import UsageError
from .sources import Shapes

__all__ = ["STDOUT", "Target", "target_of", "write_coded", "write_plain"]

STDOUT = "-"
METADATA = "__metadata__"
"""What the header of safetensors calls its metadata: no tensor can be called so."""
SUFFIXES = {
    ".cflz": "cflz",
    ".safetensors": "safetensors",
    ".pt": "pt",
    ".pth": "pt",
    ".bin": "pt",
}


class Target(NamedTuple):
    """Where to, and as what."""

    argument: str
    format: str

    @property
    def is_stdout(self) -> bool:
        """Whether the bytes go to stdout, where nothing else may then go."""
        return self.argument == STDOUT

    @property
    def streams(self) -> bool:
        """Whether it is stdout, a pipe or a device: written to as it is, from front to back."""
        path = Path(self.argument)
        return self.is_stdout or (path.exists() and not path.is_file())


def target_of(
    argument: str,
    to: str | None,
    allowed: Mapping[str, str],
    force: bool,
    default: str | None,
    max_shard: str | None = None,
) -> Target:
    """Check OUT before any work.

    Args:
        argument: OUT.
        to: the format, where the name does not tell it.
        allowed: formats that the command writes, with what to say of the others.
        force: replace a file that is there.
        default: the format of stdout and of pipes without --to.
        max_shard: the size to split at.
    """
    path = Path(argument)
    format = to or SUFFIXES.get(path.suffix.lower()) if argument != STDOUT else to or default
    special = argument != STDOUT and path.exists() and not path.is_dir() and not path.is_file()
    if format is None and special:
        format = default
    if path.is_dir() and argument != STDOUT:
        raise UsageError(f"{argument} is a folder: name the file to write in it")
    if format is None:
        raise UsageError(f"{argument}: its ending tells no format ({', '.join(SUFFIXES)}): give --to")
    if format not in allowed or allowed[format]:
        raise UsageError(f"{argument}: {allowed.get(format) or format + ' is not written by this command'}")
    if max_shard is not None and (format != "safetensors" or argument == STDOUT or special):
        raise UsageError("--max-shard splits .safetensors files, no other format and no stream")
    if argument == STDOUT:
        check_stdout()
        if sys.stdout.isatty() and not force:
            raise UsageError("bytes are not written to a terminal: redirect stdout, or give --force")
    elif not force and (there := _there(path, format == "safetensors", max_shard is not None)):
        raise UsageError(f"{there[0]} is there already: --force replaces it")
    elif not path.absolute().parent.is_dir():
        raise FileNotFoundError(2, "there is no such folder", str(path.parent))
    return Target(argument, format)


def check_stdout() -> None:
    """A script that closed it (``>&-``) is told that its bytes go nowhere."""
    if (
        getattr(sys.stdout, "name", None) == os.devnull
    ):  # main put it there; a shell's >/dev/null is "<stdout>"
        raise OSError(errno.EBADF, os.strerror(errno.EBADF), "stdout")


def write_coded(
    target: Target,
    entries: Iterator[tuple[str, Tensor]],
    metadata: Mapping[str, str],
    aliases: Mapping[str, str],
    shapes: Shapes | None,
    max_shard: int | None,
) -> int:
    """Blobs into a file, one after the other; returns its bytes. ``aliases`` is read as the entries come."""
    if target.format == "cflz":
        with _sink(target) as sink:
            return write_archive(sink, entries, metadata, aliases)
    assert shapes is not None
    if not target.streams:
        size = write_safetensors("compress", shapes, entries, target.argument, metadata, max_shard)
        _remove_others(Path(target.argument).resolve())
        return size
    with tempfile.TemporaryDirectory(prefix="cfl-ops-") as folder:  # the header comes last and stands first
        path = Path(folder) / "model.safetensors"
        size = write_safetensors("compress", shapes, entries, path, metadata, None)
        with path.open("rb") as made, _sink(target) as sink:
            shutil.copyfileobj(made, sink, 1 << 20)
        return size


Make = Callable[[str, Tensor | None], Tensor]
"""The tensor of a name, written into the one that is given, if one is."""
Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_plain(
    target: Target,
    specs: Specs,
    names: Sequence[str],
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
    make: Make,
    max_shard: int | None = None,
) -> int:
    """Tensors as they are into a file, one after the other; returns its bytes.

    Args:
        target: where to.
        specs: dtype and shape of each tensor.
        names: theirs and the further ones of tied tensors, in the order of the file.
        aliases: of a further name the one of its tensor.
        metadata: of the file, if it can have some.
        make: called for each tensor, in the order of ``names``.
        max_shard: the most bytes of tensors of a file.
    """
    if target.format == "pt":
        folder = Path(tempfile.gettempdir()) if target.streams else Path(target.argument).absolute().parent
        with _sink(target) as sink:
            counted = sink if isinstance(sink, Sink) else Sink(sink)
            pickled.write_state_dict(
                counted,
                folder,
                [(name, *specs[name]) for name in names if name not in aliases],
                aliases,
                names,
                make,
            )
            return counted.position
    for name, (dtype, _) in specs.items():
        if dtype not in NAMES:
            raise UsageError(f"{name!r} is {dtype}, which .safetensors does not have: write a .pt file")
    for name in names:
        encoded_name("decompress", name)
        if name == METADATA:
            raise UsageError(f"a tensor is called {name!r}, which .safetensors keeps: write a .pt file")
    if KEY in metadata:
        raise UsageError(f"the metadata have the key {KEY!r}, which is this package's: write a .pt file")
    shards = _shards(specs, names, aliases, max_shard)
    if len(shards) == 1:
        with _sink(target) as sink:
            size = _write_safetensors(sink, specs, names, aliases, metadata, make)
        if not target.streams:
            _remove_others(Path(target.argument))
        return size
    return _write_shards(Path(target.argument), shards, specs, aliases, metadata, make)


def _shards(
    specs: Specs, names: Sequence[str], aliases: Mapping[str, str], most: int | None
) -> list[list[str]]:
    """The names of each file."""
    out: list[list[str]] = [[]]
    size = 0
    for name in names:
        own = _size(specs[aliases.get(name, name)])
        if most is not None and out[-1] and size + own > most:
            out.append([])
            size = 0
        out[-1].append(name)
        size += own
    return out


def _write_shards(
    target: Path,
    shards: list[list[str]],
    specs: Specs,
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
    make: Make,
) -> int:
    """All shards and the index are on the disk before the first gets its name; then the index comes last."""
    stem = target.name.removesuffix(".safetensors")
    files = [f"{stem}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    total = size = 0
    staged: list[tuple[Staged, Path]] = []
    mode = permissions(target)
    if mode is None:
        mode = permissions(index_of(target))

    def stage(path: Path) -> Sink:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        path = path.resolve()  # a link stays
        own = permissions(path)
        staged.append((Staged(path.parent, mode if own is None else own), path))
        return staged[-1][0].sink

    try:
        for file, names in zip(files, shards, strict=True):
            size += _write_safetensors(stage(target.with_name(file)), specs, names, aliases, metadata, make)
            staged[-1][0].close()
            total += sum(_size(specs[aliases.get(name, name)]) for name in names)
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        stage(index_of(target)).write((json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
        staged[-1][0].close()
        for each, path in staged:
            each.commit(path)
    finally:
        for each, _ in staged:
            each.discard()
    target.unlink(missing_ok=True)  # readers look for it first
    _remove_others(target)
    return size


def _shards_of(target: Path) -> list[Path]:
    """The files that are called as the shards of this one are."""
    stem = re.escape(target.name.removesuffix(".safetensors"))
    shape = re.compile(stem + r"-\d{5}-of-\d{5}\.safetensors")
    try:
        return sorted(each for each in target.absolute().parent.iterdir() if shape.fullmatch(each.name))
    except OSError:  # no folder: that is told elsewhere
        return []


def _there(target: Path, sharded: bool, shards: bool) -> list[Path]:
    """What writing this file would replace or remove."""
    found = [target, index_of(target)] if sharded else [target]
    if shards and target.resolve() != target.absolute():
        found += _shards_of(target.resolve())
    if shards:
        found += _shards_of(target)
    return [each for each in found if each.is_file()]


def _remove_others(target: Path) -> None:
    """What an index names no more: shards of another count, or of a file that is whole now, with their index."""
    index = index_of(target)
    if not index.is_file():
        return
    keep: set[str] = set()
    if target.is_file():
        index.unlink()
    else:
        keep = set(json.loads(index.read_bytes())["weight_map"].values())
    for each in _shards_of(target):
        if each.name not in keep:
            each.unlink()


def _write_safetensors(
    sink: Any,
    specs: Specs,
    names: Sequence[str],
    aliases: Mapping[str, str],
    metadata: Mapping[str, str],
    make: Make,
) -> int:
    """The bytes that safetensors' own writer makes of tensors in this order."""
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    at = 0
    for name in names:
        dtype, shape = spec = specs[aliases.get(name, name)]
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + _size(spec)]}
        at += _size(spec)
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    out = Sink(sink)
    for name in names:  # of a tied tensor all names, as the format has no tied ones
        out.write(_contents(make(aliases.get(name, name), None)))
    return 8 + len(text) + at


def _contents(tensor: Tensor) -> Tensor:
    return as_uint8(flat_bits(tensor))


def _size(spec: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return math.prod(spec[1]) * spec[0].itemsize


@contextmanager
def _sink(target: Target) -> Iterator[Any]:
    """Something with ``write``, from front to back."""
    if target.is_stdout:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    else:
        with replacing(target.argument) as sink:
            yield sink
