"""files: a state dict as a file of blobs, and back. docs/checkpoints.md shows how; docs/format.md has the bytes."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops.ops.codec.archive import Archive, Writer, checked_metadata
from cfl_ops.ops.codec.atomic import checked_path, replacing
from cfl_ops.ops.codec.reference.header import as_bytes
from cfl_ops.ops.codec.safetensors_file import SafetensorsFile, ShardedSafetensors
from cfl_ops.ops.codec.safetensors_writer import INDEX_SUFFIX, index_of, write_safetensors
from cfl_ops.ops.codec.state_dict import MIN_NUMEL, named_blobs
from cfl_ops.ops.codec.tied import Distinct
from cfl_ops.ops.codec.weights import Mapped, Weights

__all__ = ["load_file", "open_file", "save_file", "save_safetensors"]


def save_file(
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    lossless: bool = False,
    metadata: Mapping[str, str] | None = None,
    **options: Any,
) -> int:
    """Compress a state dict into a ``.cflz`` file; returns its size in bytes. **Lossy unless** ``lossless=True``.

    Tensors are compressed and written one by one, so that besides the state dict one of them is in memory. The bytes go
    to a temporary file beside ``path``, which is renamed when it is complete and on disk: whatever happens, the old
    file is there whole or the new one is. The mode of an old file is kept; of a symbolic link what it points to is
    replaced. Names that stand for the same tensor (tied weights) are stored once.

    Args:
        state_dict: names to tensors; or to deltas, as :func:`compress_delta` makes them of state dicts: the file then
            serves ``cfl-ops patch``, and :func:`load_file` gives them back.
        path: where to write.
        lossless: every bit comes back; else floating-point weights are quantised.
        metadata: strings to keep beside.
        options: those of :func:`compress_state_dict`.

    Raises:
        TypeError, ValueError: bad arguments, a value that is no tensor, a name that is no string.
        OSError: the file cannot be written; the old one is as it was.

    Warns:
        UserWarning: as :func:`compress`, with the name of the tensor.

    Not under ``fullgraph=True`` nor ``torch.export``: it writes a file.

    Example:
        >>> import tempfile, torch, cfl_ops
        >>> path = tempfile.mktemp(suffix=".cflz")
        >>> _ = cfl_ops.save_file({"weight": torch.randn(300, 300)}, path, bits=8)
        >>> cfl_ops.load_file(path)["weight"].shape
        torch.Size([300, 300])

    """
    op = "save_file"
    lossless = checks.flag(op, "lossless", lossless)
    target = checked_path(op, path, ".safetensors", "save_safetensors")
    distinct, metadata = Distinct(op, state_dict), checked_metadata(op, metadata)
    order = {name: i for i, name in enumerate(state_dict)}
    with replacing(target) as sink:
        writer, told = Writer(op, sink), 0
        for name, blob in blobs_of(op, distinct, lossless, options, 4):
            told = _tell(writer, distinct, told, order, order[name])
            writer.add(name, blob)
            del blob  # before the next one is made
        _tell(writer, distinct, told, order, len(order))
        return writer.finish(metadata)


def _tell(writer: Writer, distinct: Distinct, told: int, order: dict[str, int], before: int) -> int:
    """Further names where they come in the state dict, for names to keep their order; how many were told so far."""
    for name in list(distinct.aliases)[told:]:
        if order[name] > before:
            break
        writer.alias(name, distinct.aliases[name])
        told += 1
    return told


def save_safetensors(
    state_dict: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    lossless: bool = True,
    max_shard_size: int | str | None = None,
    metadata: Mapping[str, str] | None = None,
    **options: Any,
) -> int:
    """Compress a state dict into ``.safetensors``, which every hub and tool carries; returns the bytes written.

    A compressed tensor is a 1-d uint8 tensor of its own name; what it stands for is in the file's metadata, under
    ``cfl_ops``. What gains nothing is stored as it is, for any reader; tied tensors are stored once. Files are replaced
    as by :func:`save_file`, and no more than one tensor is in memory besides the state dict.

    Args:
        state_dict: names to tensors.
        path: where to write; of a folder, its ``model.safetensors``.
        lossless: every bit comes back; else floating-point weights are quantised.
        max_shard_size: the most bytes of tensors in a file, or ``"5GB"``. What takes more goes to files like
            ``model-00001-of-00002.safetensors`` with an index, ``model.safetensors.index.json``, as Hugging Face's
            does; these replace what has their names in the folder of ``path``, links too. Over an old set of the same
            names the new one gets longer ones (``model-00001-of-00002-1b2c3d4e.safetensors``), the index comes last,
            and then the old set goes: whatever happens, the old checkpoint is there whole or the new one is.
        metadata: strings to keep beside, as ``{"format": "pt"}``.
        options: those of :func:`compress_state_dict`.

    Raises:
        TypeError, ValueError: bad arguments, a value that is no tensor, a name that is no string.
        OSError: a file cannot be written.

    Warns:
        UserWarning: as :func:`compress`, with the name of the tensor.

    Not under ``fullgraph=True`` nor ``torch.export``: it writes files.

    Example:
        >>> import os, tempfile, torch, cfl_ops
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.safetensors")
        ...     size = cfl_ops.save_safetensors({"w": torch.zeros(300)}, path, metadata={"format": "pt"})
        ...     bool((cfl_ops.load_file(path)["w"] == 0).all())
        True

    """
    op = "save_safetensors"
    lossless = checks.flag(op, "lossless", lossless)
    checked_path(op, path, ".cflz", "save_file")
    distinct = Distinct(op, state_dict)
    made = blobs_of(op, distinct, lossless, options, 5)
    return write_safetensors(op, distinct, made, path, metadata, max_shard_size)


def blobs_of(
    op: str, state_dict: Mapping[str, Tensor], lossless: bool, options: dict[str, Any], stacklevel: int
) -> Iterator[tuple[str, Tensor]]:
    """The blobs one by one; warnings point so many calls up from what asks for them."""
    options = dict(options)
    min_numel = options.pop("min_numel", MIN_NUMEL)
    if lossless:
        options["lossless"] = True
    theirs = "cfl_ops.compress_state_dict: "
    try:
        # One call more: this generator's own.
        yield from named_blobs(state_dict, min_numel, options, stacklevel + 1, op)
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError) or not str(error).startswith(theirs):
            raise
        raise type(error)(f"cfl_ops.{op}: {str(error).removeprefix(theirs)}") from None


def load_file(
    path: str | os.PathLike[str],
    names: str | Iterable[str] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Read tensors back: of a ``.cflz`` file, of ``.safetensors`` (compressed or not, in shards or not).

    The file is mapped into memory and decoded tensor by tensor: besides the result about one tensor is in memory, and
    of a large file only what ``names`` asks for is read.

    Args:
        path: a file; an index of shards (``model.safetensors.index.json``), which need not be named where
            ``model.safetensors`` is not there; or the folder of one of these.
        names: which tensors to read, a name or several; all if it is None. Tied ones are the same tensor.
        device: where they come; a CPU if it is None.

    Returns:
        names to tensors, in the order of ``names`` or of the file.

    Raises:
        TypeError, ValueError: bad arguments.
        CorruptDataError: the file is none of these, or a byte of it is wrong, missing or too many.
        KeyError: the file has no such name; the message shows near ones.
        OSError: the file cannot be read, or a shard is not there.

    Warns:
        UserWarning: compressed tensors of a safetensors file without the metadata that say so come back as uint8.

    Not under ``fullgraph=True`` nor ``torch.export``: it reads a file.

    Example:
        >>> import os, tempfile, torch, cfl_ops
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.cflz")
        ...     size = cfl_ops.save_file({"w": torch.zeros(3), "b": torch.ones(1)}, path)
        ...     cfl_ops.load_file(path, "w")
        {'w': tensor([0., 0., 0.])}
    """
    with open_weights(path) as weights:
        made = weights.load("load_file", names, device)
        if nameless := weights.nameless_blobs(made):
            shown = ", ".join(map(repr, nameless[:8])) + (", ..." if len(nameless) > 8 else "")
            warnings.warn(
                f"cfl_ops.load_file: {weights.path} has compressed tensors without the metadata that say so, which "
                f"come back as uint8: {shown} (another tool wrote it anew? cfl_ops.decompress takes them, without up "
                "to 7 bytes of zero at the end)",
                UserWarning,
                stacklevel=2,
            )
        return made


def open_file(path: str | os.PathLike[str]) -> Weights:
    """Open what :func:`load_file` reads, without reading a tensor: names, metadata, and any slice of any tensor.

    The object has ``names`` and ``metadata``; ``header(name)``, dtype and shape; ``tensor(name, start=None, stop=None,
    out=None)``, a tensor or the elements from start to stop of the flattened one, as a 1-d tensor (only the chunks that
    hold them are read and decoded); ``blob(name)``, the bytes that :func:`decompress` takes; and ``close()``, which
    ``with`` calls.

    Args:
        path: as of :func:`load_file`.

    Raises:
        CorruptDataError: the file is none of those, or its index is damaged; later of a damaged tensor.
        OSError: the file cannot be read, or a shard is not there.

    Not under ``fullgraph=True`` nor ``torch.export``: it reads a file.

    Example:
        >>> import os, tempfile, torch, cfl_ops
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.cflz")
        ...     size = cfl_ops.save_file({"w": torch.arange(6).view(2, 3)}, path, metadata={"step": "7"})
        ...     with cfl_ops.open_file(path) as file:
        ...         file.names, file.metadata["step"], file.header("w"), file.tensor("w", 3, 6)
        (('w',), '7', (torch.int64, (2, 3)), tensor([3, 4, 5]))
    """
    return open_weights(path)


def open_weights(path: str | os.PathLike[str], op: str = "load_file") -> Weights:
    """The reader for what is at ``path``, by its content: an archive, a safetensors file, an index or a folder."""
    where = checked_path(op, path)
    if where.is_dir():
        where = _in_folder(where)
    elif not os.path.lexists(where):  # what was to be saved there may have been split into shards
        index = index_of(where)
        where = index if os.path.lexists(index) else where
    mapped = Mapped(where)
    kind = mapped.check_kind(as_bytes(mapped.data[:16]))
    if kind == "cflz":
        return Archive(mapped)
    return SafetensorsFile(mapped) if kind == "safetensors" else ShardedSafetensors(mapped)


def _in_folder(folder: Path) -> Path:
    """The checkpoint in a folder: by the names that Hugging Face gives them, in its order, or the only one there."""
    for name in ("model.safetensors", f"model.safetensors{INDEX_SUFFIX}"):
        if (folder / name).exists():
            return folder / name
    found: list[Path] = []
    for pattern in (f"*.safetensors{INDEX_SUFFIX}", "*.safetensors", "*.cflz"):
        found = sorted(folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            break
    what = f"got {', '.join(item.name for item in found[:4])}" if found else "there is none"
    raise FileNotFoundError(f"cfl_ops.load_file: {folder} must hold one checkpoint, but {what}")
