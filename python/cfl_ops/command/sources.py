"""What a command reads: tensors by name, one at a time, of whatever kind of file they are in."""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from cfl_ops.errors import CorruptDataError
from cfl_ops.ops.codec import blob as blobs
from cfl_ops.ops.codec import files
from cfl_ops.ops.codec.delta import describe_delta
from cfl_ops.ops.codec.delta_format import CODED, is_delta, parse_delta, unpack_symbols
from cfl_ops.ops.codec.huffman import read_header
from cfl_ops.ops.codec.tied import Distinct

from . import pickled
from .failures import UsageError

__all__ = ["DELTA_NOTE", "STDIN", "Facts", "Lazy", "Shapes", "Source", "facts_of_blob", "open_source"]

STDIN = "-"
LEFT = "left"
"""A delta's kind of a tensor that the new checkpoint has not."""
DELTA_NOTE = "cfl_ops.delta"
"""What a delta file has in its metadata, lest one of empty checkpoints is taken for weights."""


class Facts(NamedTuple):
    """Of one tensor, as its header says."""

    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    numel: int
    nbytes: int
    """As stored."""
    bits: int | None = None
    changed: float | None = None
    """Of a delta the part of the elements that are others."""

    @property
    def raw_bytes(self) -> int:
        """Of its elements as they are in memory."""
        return self.numel * self.dtype.itemsize

    @property
    def lossy(self) -> bool:
        """Whether what comes back may differ from what it was."""
        return self.kind == "quantised"


def facts_of_blob(blob: Tensor) -> Facts:
    """Of a coded tensor, or of a delta."""
    if is_delta(blob):
        found = describe_delta(blob)
        numel = math.prod(found.shape)
        numbers = numel * (2 if found.dtype.is_complex else 1)
        changed = None if found.kind in ("joined", "replaced", LEFT) else found.changed / max(1, numbers)
        return Facts(found.kind, found.dtype, found.shape, numel, blob.numel(), changed=changed)
    header = blobs.describe(blob)
    return Facts(header.kind, header.dtype, tuple(header.shape), header.numel, blob.numel(), header.bits)


def _check_delta(delta: Tensor) -> None:
    op = "verify"
    parsed = parse_delta(op, delta)
    if parsed.blob is not None:
        blobs.decompress(parsed.blob)
    for part in parsed.parts:
        for numbers in (part.gaps, part.values):
            if numbers is not None and numbers.coding == CODED:
                unpack_symbols(op, numbers, read_header(op, numbers.symbols).numel)


class Source:
    """Names, and tensors one at a time."""

    shown: str
    """What messages call it."""
    format: str
    names: tuple[str, ...]
    aliases: Mapping[str, str]
    metadata: Mapping[str, str]
    version: int | None = None
    left_out: tuple[str, ...] = ()
    """What the file holds besides tensors."""
    is_delta = False

    @cached_property
    def known(self) -> frozenset[str]:
        """The names, to be looked up."""
        return frozenset(self.names)

    def stored(self) -> list[str]:
        """The names without the further ones of tied tensors."""
        return [name for name in self.names if name not in self.aliases]

    def facts(self, name: str) -> Facts:
        """What the header says; nothing is decoded."""
        raise NotImplementedError

    def tensor(
        self, name: str, start: int | None = None, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """A tensor, or elements of the flattened one, as :func:`cfl_ops.decompress`."""
        raise NotImplementedError

    def blob(self, name: str) -> Tensor:
        """The coded bytes; of a delta file only these."""
        raise NotImplementedError

    def coded(self, name: str) -> Tensor | None:
        """The blob of a tensor that was made smaller: what was quantised would only grow, coded anew without a loss."""
        return None

    def check_delta(self, name: str) -> None:
        """Look at every byte of a delta, as far as that can be done without its base."""
        raise NotImplementedError

    @property
    def compressed(self) -> bool:
        """Whether any tensor is stored as a blob."""
        return False


class Coded(Source):
    """A .cflz file or safetensors, whose tensors may be plain or coded."""

    def __init__(self, path: Path, shown: str, stack: ExitStack, format: str) -> None:
        self._weights = stack.enter_context(files.open_weights(path))
        self.shown, self.format = shown, format
        self._last: str | None = None
        self.names, self.aliases = tuple(self._weights.names), self._weights.aliases
        self.metadata = dict(self._weights.metadata or {})
        self.version = _version(path)
        # All blobs of a file are deltas or none is; one that is damaged is found when it is looked at.
        # Where none can be looked at, since the file is empty or damaged, what diff noted tells.
        coded = (name for name in self.stored() if not self._weights.native(name))
        first = next(coded, None)
        self.is_delta = DELTA_NOTE in self.metadata
        with suppress(CorruptDataError):
            if first is not None:
                self.is_delta = is_delta(self._weights.blob(first))
        if self.is_delta:
            self.metadata.pop(DELTA_NOTE, None)

    def facts(self, name: str) -> Facts:
        stored = self._weights.stored_bytes(name)
        if self._weights.native(name):
            dtype, shape = self._weights.header(name)
            return Facts("plain", dtype, shape, torch.Size(shape).numel(), stored)
        try:
            return facts_of_blob(self._weights.blob(name))
        except CorruptDataError as error:
            raise CorruptDataError(f"{error} (in {name!r} of {self.shown})") from None

    def tensor(
        self, name: str, start: int | None = None, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        name = self.aliases.get(name, name)
        if self._last not in (None, name):
            self._weights.done(self._last)  # its pages need not stay in memory
        self._last = name
        mapped = self._weights.mapped(name) if out is None and start is None and stop is None else None
        return self._weights.tensor(name, start, stop, out) if mapped is None else mapped

    def blob(self, name: str) -> Tensor:
        return self._weights.blob(name)

    def coded(self, name: str) -> Tensor | None:
        name = self.aliases.get(name, name)
        if self._weights.native(name):
            return None
        blob = self._weights.blob(name)
        return None if facts_of_blob(blob).kind == "raw" else blob

    def check_delta(self, name: str) -> None:
        _check_delta(self._weights.blob(name))

    @property
    def compressed(self) -> bool:
        return not all(self._weights.native(name) for name in self.stored())


class Pickled(Source):
    """A file of torch's."""

    format = "pt"

    def __init__(self, path: Path, shown: str) -> None:
        self._tensors, left_out = pickled.read_state_dict(path, shown)
        self.shown, self.left_out = shown, tuple(left_out)
        self.names, self.aliases, self.metadata = tuple(self._tensors), pickled.tied(self._tensors), {}

    def facts(self, name: str) -> Facts:
        tensor = self._tensors[name]
        return Facts("plain", tensor.dtype, tuple(tensor.shape), tensor.numel(), tensor.nbytes)

    def tensor(
        self, name: str, start: int | None = None, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        tensor = self._tensors[name]
        if start is not None or stop is not None:
            tensor = tensor.reshape(-1)[start:stop]
        return tensor if out is None else out.copy_(tensor)


def open_source(argument: str, stack: ExitStack) -> Source:
    """Open what a command line names: a file, a folder of shards, or ``-`` for stdin.

    Its kind is told by its first bytes, whatever its name.
    """
    shown, path = argument, Path(argument)
    if argument == STDIN:
        if sys.stdin.isatty():
            raise UsageError("'-' reads stdin, which is a terminal: redirect a file or a pipe to it")
        shown, path = "stdin", _spooled(sys.stdin.buffer, stack)
    elif path.exists() and not path.is_dir() and not path.is_file():
        with path.open("rb") as pipe:
            path = _spooled(pipe, stack)
    if path.is_dir() or path.name.endswith(".index.json"):
        return Coded(path, shown, stack, "safetensors")
    with path.open("rb") as file:
        start = file.read(16)
    kind = _kind(start, path.stat().st_size)
    if kind is None:
        what = "is empty" if not start else "is neither a .cflz file nor safetensors nor a file of torch.save"
        raise CorruptDataError(f"{shown} {what}")
    return Pickled(path, shown) if kind == "pt" else Coded(path, shown, stack, kind)


def _version(path: Path) -> int | None:
    """Of the format of a .cflz file."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        start = file.read(8)
    return int.from_bytes(start[4:], "little") if start[:4] == b"CFLZ" else None


def _kind(start: bytes, size: int) -> str | None:
    if start[:4] == b"CFLZ":
        return "cflz"
    # Before the pickles: a header of 640 bytes has a length that begins as they do.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "safetensors"
    if start[:4] == b"PK\3\4" or (start[:1] == b"\x80" and start[1:2] in b"\2\3\4\5"):
        return "pt"
    if len(start) > 8 and start[8:9] == b"{":
        return "safetensors"
    return None


def _spooled(stream: BinaryIO, stack: ExitStack) -> Path:
    """A pipe's bytes as a temporary file: the readers need to go back and forth."""
    path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cfl-ops-"))) / "piped"
    with path.open("wb") as file:
        shutil.copyfileobj(stream, file, 1 << 20)
    return path


class Lazy(Mapping[str, Tensor]):
    """The stored tensors of a source as a state dict that decodes each when it is asked for, and keeps the last."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._names = source.stored()
        self._last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            self._last = None  # before the next one is made
            self._last = name, self._source.tensor(name)
        return self._last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Shapes(Distinct):
    """A lazy state dict for a writer that looks at all shapes first, which are told without decoding anything."""

    def __init__(self, source: Source, lazy: Lazy) -> None:
        super().__init__("compress", lazy)
        self._source = source
        self.aliases = dict(source.aliases)

    def __len__(self) -> int:
        return len(self._state_dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state_dict)

    def items(self) -> Any:
        """Names, and tensors of that dtype and shape that take no memory."""
        for name in self._state_dict:
            facts = self._source.facts(name)
            yield name, torch.empty((), dtype=facts.dtype).expand(facts.shape)
