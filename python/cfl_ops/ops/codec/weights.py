"""weights: what readers of files have in common: names to blobs of a file in memory, decoded one by one."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import functools
import io
import mmap
import os
import pathlib
import stat
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Self

import torch
from torch import Tensor

from cfl_ops.errors import CorruptDataError
from cfl_ops.ops.codec.blob import decompress
from cfl_ops.ops.codec.blob_reader import describe
from cfl_ops.ops.codec.delta_format import is_delta
from cfl_ops.ops.codec.huffman import corrupt

__all__: list[str] = []

_FIRST = 16
"""Bytes of a file that tell its kind."""
_HUGE = 1 << 22
_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python has its name from 3.13 on


class UnknownNameError(KeyError):
    """A KeyError whose message is a sentence."""

    def __str__(self) -> str:
        return str(self.args[0])


def kind_of(start: bytes) -> str | None:
    """Of a file of weights, by its first bytes."""
    if start[:4] == b"CFLZ":
        return "cflz"
    if start[4:9] == b"\0\0\0\0{":
        return "safetensors"
    return "index" if start[:1] == b"{" else None


class Mapped:
    """The bytes of a file as a 1-d uint8 tensor that no copy was made of.

    The map is private: who writes to the tensor changes the memory, never the file. What cannot be mapped (a pipe, an
    empty file) is read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._map: mmap.mmap | None = None
        with pathlib.Path(path).open("rb", buffering=0) as file:
            found = os.fstat(file.fileno())
            if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
                raise ValueError(
                    f"cfl_ops.load_file: path must be a file or a pipe, but {self.path} is a device"
                )
            if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
                data = self._read(file)
                self.data = torch.frombuffer(data or bytearray(1), dtype=torch.uint8)[: len(data)]
                return
            # Memory for a copy of all of it is not reserved: a file may be larger than the machine's.
            self._map = mmap.mmap(
                file.fileno(),
                found.st_size,
                flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", _NORESERVE),
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
            )
            if os.fstat(file.fileno()).st_size != found.st_size:
                raise corrupt("load_file", f"{self.path} changed its size while it was opened")
        self.data = torch.frombuffer(self._map, dtype=torch.uint8)

    def _read(self, file: io.FileIO) -> bytearray:
        """All of it, if its first bytes are those of a file of weights: a pipe may have no end."""
        data = bytearray()
        while len(data) < _FIRST and (more := file.read(_FIRST - len(data))):
            data += more
        if data:
            self.check_kind(bytes(data))
        return data + (file.readall() or b"")

    def check_kind(self, start: bytes) -> str:
        """What the first bytes say that it is: "cflz", "safetensors" or "index"."""
        kind = kind_of(start)
        if kind is None:
            raise corrupt(
                "load_file", f"{self.path} is neither a .cflz nor a .safetensors file, nor an index of shards"
            )
        return kind

    def soon(self, start: int, size: int) -> None:
        """These bytes will be read."""
        self._advise("MADV_WILLNEED", start // mmap.PAGESIZE * mmap.PAGESIZE, start + size)

    def done(self, start: int, size: int) -> None:
        """These bytes need not stay in memory; they are read again where somebody looks."""
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        self._advise("MADV_DONTNEED", first, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE)

    def _advise(self, what: str, first: int, last: int) -> None:
        if self._map is not None and last > first and hasattr(mmap, what):
            with contextlib.suppress(OSError, ValueError):
                self._map.madvise(getattr(mmap, what), first, last - first)

    def close(self) -> None:
        """The map ends with the last tensor that looks at it."""
        self.data, self._map = torch.empty(0, dtype=torch.uint8), None


class Weights(ABC):
    """A file of named tensors, opened: of a context manager's kind.

    Nothing but its index is read before it is asked for; ``blob`` looks at the file's own bytes.
    """

    path: str
    names: tuple[str, ...]
    """All of them, those of tied tensors too."""
    aliases: dict[str, str]
    """Of a tied tensor the further names, each with the one that it is stored under."""
    metadata: dict[str, str]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __len__(self) -> int:
        return len(self.names)

    @property
    def _known(self) -> frozenset[str]:
        known = self.__dict__.get("_names")
        if known is None:
            known = self.__dict__["_names"] = frozenset(self.names)
        return known

    @abstractmethod
    def close(self) -> None:
        """Blobs that were given out stay good."""

    @abstractmethod
    def stored_bytes(self, name: str) -> int:
        """What it takes in the file; of a further name of a tied tensor 0."""

    @abstractmethod
    def _blob(self, name: str) -> Tensor:
        """Of a name that is stored."""

    @abstractmethod
    def soon(self, name: str) -> None:
        """Of a name that is stored: it will be read."""

    @abstractmethod
    def done(self, name: str) -> None:
        """Of a name that is stored: it has been read, and its bytes need not stay in memory."""

    def mapped(self, name: str) -> Tensor | None:
        """The tensor where it lies in the file, not to be written to; None where it is coded or is to be checked."""
        self.stored_name(name)
        return None

    def nameless_blobs(self, names: Iterable[str]) -> list[str]:
        """Those that are compressed but of which no metadata say so: they are read as the bytes that they are."""
        del names
        return []

    def native(self, name: str) -> bool:
        """Whether it stands in the file as it is, without a blob around it."""
        self.stored_name(name)
        return False

    def stored_name(self, name: str, op: str = "load_file") -> str:
        """The name itself, or that of the tensor that it is tied to; raises KeyError."""
        if name not in self._known:
            near = difflib.get_close_matches(str(name), self.names, 3, 0.6)
            hint = f"; near it are {', '.join(map(repr, near))}" if near else ""
            raise UnknownNameError(f"cfl_ops.{op}: names must be in {self.path}, but got {name!r}{hint}")
        return self.aliases.get(name, name)

    def blob(self, name: str) -> Tensor:
        """The bytes that :func:`cfl_ops.decompress` or :func:`cfl_ops.apply_delta` takes, 1-d uint8.

        They are the file's own (of a native tensor of a safetensors file a copy); writing to them changes no file.
        """
        return self._blob(self.stored_name(name))

    def header(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Dtype and shape, from the first bytes."""
        name = self.stored_name(name)
        with self._naming(name):
            blob = self._blob(name)
            if is_delta(blob):
                return torch.uint8, tuple(blob.shape)
            found = describe(blob, "load_file")
        return found.dtype, found.shape

    def tensor(
        self, name: str, start: int | None = None, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        """The weights, or the elements from start to stop of the flattened ones, as :func:`cfl_ops.decompress`."""
        return self._decode(self.stored_name(name), start, stop, out, None)

    def _decode(
        self, name: str, start: int | None, stop: int | None, out: Tensor | None, device: torch.device | None
    ) -> Tensor:
        with self._naming(name):
            blob = self._blob(name)
            if is_delta(blob):  # weights that are changed by it are not here: its own bytes
                part = blob[start:stop].clone()
                if out is not None:
                    return out.copy_(part)
                return part if device is None else part.to(device)
            if out is not None:
                device = out.device
            elif start is stop is None and (device is None or device.type == "cpu"):
                found = describe(blob, "load_file")
                out = room(found.dtype, found.shape)
            return decompress(blob if device is None else blob.to(device), out, start=start, stop=stop)

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except CorruptDataError as error:
            raise CorruptDataError(f"{error} (in {name!r} of {self.path})") from None

    def load(self, op: str, names: Any, device: torch.device | str | None) -> dict[str, Tensor]:
        """Tensors by name, one after the other; further names of a tied one are the same tensor."""
        wanted = self.wanted(op, names)
        sources = list(dict.fromkeys(self.aliases.get(name, name) for name in wanted))
        made: dict[str, Tensor] = {}
        place = place_of(op, device)
        for source, tensor in self.decoded(sources, place):
            made[source] = tensor
        return {name: made[self.aliases.get(name, name)] for name in wanted}

    def wanted(self, op: str, names: Any) -> list[str]:
        """The names that were asked for, each once."""
        if names is None:
            return list(self.names)
        asked = [names] if isinstance(names, str) else names
        if not isinstance(asked, Iterable):
            raise TypeError(f"cfl_ops.{op}: names must be a name or several, but got {type(names).__name__}")
        asked = list(asked)
        for name in asked:
            if not isinstance(name, str):
                raise TypeError(f"cfl_ops.{op}: names must be strings, but got {type(name).__name__}")
        asked = list(dict.fromkeys(asked))
        for name in asked:
            self.stored_name(name, op)
        return asked

    def decoded(self, sources: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Stored tensors in turn; the file is read ahead of them."""
        for i, source in enumerate(sources):
            if i == 0:
                self.soon(source)
            if i + 1 < len(sources):
                self.soon(sources[i + 1])
            yield source, self._decode(source, None, None, None, device)
            self.done(source)


def place_of(op: str, device: Any) -> torch.device:
    """The device that an argument names, where it can hold tensors; a CPU if it is None."""
    if device is None:
        return torch.device("cpu")
    if isinstance(device, bool) or not isinstance(device, torch.device | str | int):
        raise TypeError(f"cfl_ops.{op}: device must be a device or its name, but got {type(device).__name__}")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise ValueError(f"cfl_ops.{op}: device must be there, but got {device!r}: {why}") from None
    if place.type == "meta":
        raise ValueError(f"cfl_ops.{op}: device must be one that holds data, but got {device!r}")
    return place


def room(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """An empty tensor on the CPU, a large one in huge pages: to get a page at a time takes longer than to decode."""
    out = torch.empty(shape, dtype=dtype)
    if out.nbytes >= _HUGE and (madvise := _madvise()) is not None:
        first = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (out.data_ptr() + out.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(first, last - first, mmap.MADV_HUGEPAGE)
    return out


@functools.cache
def _madvise() -> Any:
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None  # Linux only
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
