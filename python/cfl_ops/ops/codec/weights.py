"""weights: what readers of files have in common: names to blobs of a file in memory, decoded one by one."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import functools
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
from cfl_ops.ops.codec.huffman import corrupt

__all__: list[str] = []

DELTA_MAGIC = b"CFLD"
_HUGE = 1 << 22
_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python has its name from 3.13 on


class UnknownNameError(KeyError):
    """A KeyError whose message is a sentence."""

    def __str__(self) -> str:
        return str(self.args[0])


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
            if not stat.S_ISREG(found.st_mode) or found.st_size == 0:
                data = bytearray(file.readall() or b"")
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
    def _soon(self, name: str) -> None:
        """It will be read."""

    @abstractmethod
    def _done(self, name: str) -> None:
        """It has been read."""

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
            found = describe(self._blob(name), "load_file")
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
            if bytes(blob[:4].tolist()) == DELTA_MAGIC:
                raise ValueError(
                    f"cfl_ops.load_file: {self.path} must hold weights, but got a delta: apply it to its base"
                )
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
        place = torch.device("cpu" if device is None else device)
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
        asked = list(dict.fromkeys(asked))
        for name in asked:
            self.stored_name(name, op)
        return asked

    def decoded(self, sources: list[str], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Stored tensors in turn; the file is read ahead of them."""
        for i, source in enumerate(sources):
            if i == 0:
                self._soon(source)
            if i + 1 < len(sources):
                self._soon(sources[i + 1])
            yield source, self._decode(source, None, None, None, device)
            self._done(source)


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
