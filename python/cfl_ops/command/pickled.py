"""torch's own files (.pt, .pth, .bin): a state dict read as it lies on the disk, and written."""

from __future__ import annotations

import math
import mmap
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfl_ops.errors import CorruptDataError

from .failures import NO_MEMORY, UsageError

__all__ = ["read_state_dict", "tied", "write_state_dict"]

_NESTED = ("state_dict", "model", "model_state_dict")
_PAGE = 4096


def read_state_dict(path: Path, shown: str) -> tuple[dict[str, Tensor], list[str]]:
    """The state dict that a file holds, mapped into memory, and the names of what else it holds.

    Raises:
        CorruptDataError: torch cannot read the file.
        UsageError: it can, and there is no state dict in it.
    """
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) and "nsupported" in str(error):
            raise UsageError(
                f"{shown} holds Python objects besides tensors, which are not loaded (torch.load, weights_only=True)"
            ) from error
        raise CorruptDataError(f"{shown}: torch cannot read it") from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged files end in whatever error torch's reader runs into
        if NO_MEMORY in str(error):
            raise
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CorruptDataError(f"{shown}: torch cannot read it ({why[:200]})") from error
    return _find(content, shown)


def _find(content: object, shown: str) -> tuple[dict[str, Tensor], list[str]]:
    if not isinstance(content, Mapping):
        raise UsageError(f"{shown} holds a {type(content).__name__}, not a state dict")
    rest: list[str] = []
    for key in _NESTED:
        inner = content.get(key)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            rest = [str(name) for name in content if name != key]
            content = inner
            break
    tensors: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(value, Tensor):
            rest.append(str(name))
        elif not isinstance(name, str):
            raise UsageError(f"{shown} names a tensor {name!r}; names must be str")
        elif value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise UsageError(f"{shown}: {name!r} is sparse, quantised by torch or without data")
        else:
            tensors[name] = value.detach()
    if not tensors and rest:
        raise UsageError(f"{shown} holds no tensors")
    return tensors, rest


def tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The names of tensors that are another's memory, each with the first name of it."""
    first: dict[tuple[object, ...], str] = {}
    out = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            view = (
                *(tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()),
                *(tensor.is_conj(), tensor.is_neg()),
            )
            if (owner := first.setdefault(view, name)) != name:
                out[name] = owner
    return out


class _File:
    """What torch.save asks of a file, for what has ``write``."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: BaseException | None = None
        """Of the first write that failed: torch closes its archive after it, and what that raises says less."""

    def write(self, data: Any) -> int:
        try:
            self._file.write(data)
        except BaseException as error:  # Ctrl-C too
            self.error = self.error or error
            raise
        return len(data)

    def flush(self) -> None:
        pass


def write_state_dict(
    file: Any,
    folder: Path,
    facts: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    aliases: Mapping[str, str],
    names: Iterable[str],
    fill: Callable[[str, Tensor], object],
) -> None:
    """Write a state dict with torch.save.

    torch.save takes a whole state dict. Where memory is short, its tensors are made in a temporary file that is mapped:
    the system may write its pages out and drop them.

    Args:
        file: to write to.
        folder: of the temporary file.
        facts: name, dtype and shape of each tensor that is no other's.
        aliases: further names, each with the name of its tensor.
        names: all of them, in their order.
        fill: writes the tensor of that name into the one that is given.
    """
    made: dict[str, Tensor] = {}
    with _room(list(facts), folder) as places:
        for name, place in places:
            fill(name, place)
            made[name] = place
        sink = _File(file)
        try:
            torch.save({name: made[aliases.get(name, name)] for name in names}, sink)  # type: ignore[arg-type]
        except Exception:
            if sink.error is None:
                raise
        finally:
            made.clear()
        if sink.error is not None:
            raise sink.error


@contextmanager
def _room(
    facts: list[tuple[str, torch.dtype, tuple[int, ...]]], folder: Path
) -> Iterator[Iterator[tuple[str, Tensor]]]:
    """Tensors to write to: in memory if they take at most half of what is free, else in a temporary file."""
    sizes = [-(-math.prod(shape) * dtype.itemsize // _PAGE) * _PAGE for _, dtype, shape in facts]
    total = sum(sizes)
    if total <= _free_memory() // 2:
        yield ((name, torch.empty(shape, dtype=dtype)) for name, dtype, shape in facts)
        return
    with tempfile.TemporaryFile(dir=folder, prefix=".cfl-ops-") as temporary:
        # A full disk is an error here, not a SIGBUS where the memory is written to.
        getattr(os, "posix_fallocate", _truncate)(temporary.fileno(), 0, total)
        mapped = mmap.mmap(temporary.fileno(), total)  # unmapped with the last tensor that looks at it

        def places() -> Iterator[tuple[str, Tensor]]:
            at = 0
            for (name, dtype, shape), size in zip(facts, sizes, strict=True):
                count = math.prod(shape) * dtype.itemsize
                bytes_ = torch.empty(0, dtype=torch.uint8)
                if count:  # a storage of its own: torch.save writes whole storages
                    bytes_ = torch.frombuffer(mapped, dtype=torch.uint8, count=count, offset=at)
                yield name, bytes_.view(dtype).view(shape)
                at += size

        yield places()


def _truncate(file: int, _: int, size: int) -> None:
    os.truncate(file, size)


def _free_memory() -> int:
    """Bytes, as the system tells; none where it does not."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
