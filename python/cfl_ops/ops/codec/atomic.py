"""atomic: files that are there whole or not at all, written from front to back.

The bytes go to a temporary file beside the target, and reach the disk before it gets the target's name. A process that
is killed leaves the old file or the new one, and at worst a temporary one (``.cfl-....tmp``) that nothing reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from cfl_ops.ops.codec.reference.header import memory_of

__all__: list[str] = []

PIECE = 1 << 25
"""Bytes of a write; the disk is told to begin with each, so that little is left when the file is complete."""


def checked_path(op: str, path: Any, not_ending: str | None = None, but_by: str = "") -> Path:
    """A path that names something: the empty one would be the folder where the process happens to be.

    An ending that is another function's is refused: files would not be what they are called.
    """
    if not isinstance(path, str | bytes | os.PathLike):
        raise TypeError(f"cfl_ops.{op}: path must be a path, but got {type(path).__name__}")
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise ValueError(f"cfl_ops.{op}: path must name a file, but got {text!r}")
    if not_ending is not None and text.endswith(not_ending):
        raise ValueError(
            f"cfl_ops.{op}: path must not end in {not_ending}, which {but_by} writes, but got {text!r}"
        )
    return Path(text)


class Sink:
    """Where bytes go, one after the other: a file descriptor, or an object with ``write``."""

    def __init__(self, target: Any) -> None:
        self.position = 0
        self._file: int | None = target if isinstance(target, int) else None
        if self._file is None:
            self._write: Callable[[memoryview], int | None] = target.write
        else:
            self._write = functools.partial(os.write, self._file)

    def write(self, data: bytes | Tensor) -> None:
        """All of ``data``: bytes or 1-d uint8, of any device."""
        left = memory_of(data) if isinstance(data, Tensor) else memoryview(data)
        while len(left):
            done = self._write(left[:PIECE])
            done = min(len(left), PIECE) if done is None else done
            if done <= 0:
                raise BlockingIOError(errno.EAGAIN, "the target takes no more bytes")
            if self._file is not None:
                _begin_to_store(self._file, self.position, done)
            self.position += done
            left = left[done:]

    def write_at(self, place: int, data: bytes) -> None:
        """Bytes of a regular file that were left out."""
        assert self._file is not None
        while data:
            done = os.pwrite(self._file, data, place)
            place, data = place + done, data[done:]

    def skip(self, size: int) -> None:
        """Leave out so many bytes of a regular file, for :meth:`write_at`."""
        assert self._file is not None
        self.position = os.lseek(self._file, size, os.SEEK_CUR)


@functools.cache
def _sync_file_range() -> Any:
    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError, TypeError):
        return None  # Linux only
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function


def _begin_to_store(file: int, start: int, size: int) -> None:
    """A hint, without waiting: it fails for pipes and some file systems, which does no harm."""
    if size >= PIECE >> 3 and (function := _sync_file_range()) is not None:
        function(file, start, size, 2)  # SYNC_FILE_RANGE_WRITE


class Staged:
    """A temporary file in a folder, until it gets a name or is discarded."""

    def __init__(self, folder: Path, mode: int | None = None) -> None:
        self._folder = folder
        self._file: int | None = None
        # Without a mode the system applies the umask; with one nobody else reads the file before it is set.
        flags, given = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666 if mode is None else 0o600
        self._temporary = folder / f".cfl-{secrets.token_hex(8)}.tmp"
        try:
            self._file = os.open(self._temporary, flags, given)
            if mode is not None:
                os.fchmod(self._file, mode)
        except BaseException as error:
            self.discard()
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(folder)) from None
            raise
        self.sink = Sink(self._file)

    def close(self) -> None:
        """The bytes are on the disk when this returns."""
        if self._file is not None:
            os.fsync(self._file)
            file, self._file = self._file, None
            os.close(file)

    def commit(self, path: Path) -> None:
        """Give the file its name."""
        self.close()
        try:
            self._temporary.replace(path)
        except OSError as error:
            if error.errno != errno.EXDEV or path.parent == self._folder:
                raise
            self._copy(path)
        sync_folder(path.parent)

    def _copy(self, path: Path) -> None:
        """To another file system, by way of a temporary file there."""
        there = Staged(path.parent, stat.S_IMODE(self._temporary.stat().st_mode))
        try:
            with self._temporary.open("rb") as file:
                while piece := file.read(PIECE):
                    there.sink.write(piece)
            there.commit(path)
        except BaseException:
            there.discard()
            raise
        self.discard()

    def discard(self) -> None:
        """Leave nothing; a file that was committed stays."""
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)
        with contextlib.suppress(OSError):
            self._temporary.unlink()


def sync_folder(folder: Path) -> None:
    """That the disk knows the names in it; file systems that cannot be told so need not be."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def mode_of(path: Path) -> int | None:
    """Of what is there, a link's target; None where there is nothing. Raises OSError for a loop of links."""
    try:
        return path.stat().st_mode
    except FileNotFoundError:
        return None


def permissions(path: Path) -> int | None:
    """Those of a regular file; None where there is none."""
    mode = mode_of(path)
    return None if mode is None or not stat.S_ISREG(mode) else stat.S_IMODE(mode) & 0o777


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Sink]:
    """What is written in the block is the file when the block ends; if it raises, the old one is as it was.

    A link stays, and what it points to is replaced. The mode of a file that is there is kept. A device, a pipe or a
    socket is written to as it is.
    """
    mode = mode_of(Path(path))
    if mode is not None and not stat.S_ISREG(mode):
        handle = os.open(path, os.O_WRONLY | os.O_CLOEXEC)  # of a folder: IsADirectoryError
        try:
            yield Sink(handle)
        finally:
            os.close(handle)
        return
    target = Path(path).resolve()
    staged = Staged(target.parent, permissions(target))
    try:
        yield staged.sink
        staged.commit(target)
    except BaseException:
        staged.discard()
        raise
