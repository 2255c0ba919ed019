"""GramAccumulator: moments of data that come in batches, from loaders, files and several machines."""

from __future__ import annotations

import mmap
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.results import public
from cfl_ops._core.state import from_inference_mode, makes_state
from cfl_ops.ops.gram.gram import gram, gram_
from cfl_ops.ops.gram.moments import GramMoments

__all__ = ["GramAccumulator"]

Batch = Tensor | tuple[Tensor, ...] | list[Tensor]
CHUNK_BYTES = 8 << 20
CHECKSUM_BYTES = 4  # a CRC-32 at the end of a saved state
FOLD_EVERY = 1024
MANY_BATCHES = 1 << 20


@public
class GramAccumulator:
    r"""Streams batches into :class:`GramMoments`.

    The sums take no part in autograd: rows that require a gradient get none. What was made under
    :func:`torch.inference_mode` can be updated outside it, and the other way round.

    Args:
        bias_column: append a feature that is 1.
        num_classes: K where targets are class indices.
        acc_dtype: as in :func:`cfl_ops.gram`. A sum of n batches is off by n eps / 2 of itself at the most; a
            warning says where that is 6 % in float32.
        decay: what older batches are multiplied by at each batch: exponential forgetting below 1.
        compensated: keep the sums in float64 with a carried rounding error (Neumaier). Batches are first
            added to a recent sum, which is folded in every 1,024 of them, so that the error does not grow with
            the number of batches. Not with ``decay``.

    Attributes:
        batches: how many batches went in.
        rows: how many rows.

    Example:
        >>> import torch, cfl_ops
        >>> accumulator = cfl_ops.GramAccumulator(bias_column=True)
        >>> for _ in range(3):
        ...     accumulator.update(torch.ones(10, 2), torch.ones(10, 1))
        >>> accumulator.moments.gram
        tensor([[30., 30., 30.],
                [30., 30., 30.],
                [30., 30., 30.]])

    """

    def __init__(
        self,
        *,
        bias_column: bool = False,
        num_classes: int | None = None,
        acc_dtype: torch.dtype | None = None,
        decay: float = 1.0,
        compensated: bool = False,
    ) -> None:
        op = "GramAccumulator"
        decay = checks.number(op, "decay", decay, checks.NOT_NEGATIVE)
        bias_column = checks.flag(op, "bias_column", bias_column)
        compensated = checks.flag(op, "compensated", compensated)
        if num_classes is not None:
            num_classes = checks.integer(op, "num_classes", num_classes, 1)
        if acc_dtype not in (None, torch.float32, torch.float64):
            raise TypeError(
                f"cfl_ops.{op}: acc_dtype must be torch.float32 or torch.float64, but got {acc_dtype}"
            )
        if compensated and decay != 1.0:
            raise ValueError("cfl_ops.GramAccumulator: compensated sums do not decay; use one or the other")
        if compensated and acc_dtype == torch.float32:
            raise ValueError(
                "cfl_ops.GramAccumulator: compensated sums are float64, but acc_dtype is float32"
            )
        self.bias_column, self.num_classes, self.decay = bias_column, num_classes, decay
        self.compensated = compensated
        self.acc_dtype = torch.float64 if compensated else acc_dtype
        self.batches = 0
        self.rows = 0
        self._recent: GramMoments | None = None
        self._total: list[Tensor | None] | None = None
        self._carry: list[Tensor | None] | None = None

    @makes_state
    def update(self, x: Tensor, y: Tensor | None = None, sample_weight: Tensor | None = None) -> None:
        """Add a batch: ``x (..., B, D)``, ``y`` and ``sample_weight`` as in :func:`cfl_ops.gram`.

        When it raises, the accumulator is as it was.
        """
        if self._recent is not None and from_inference_mode(self._recent.gram):  # a copy that was made there
            self.load_state_dict(self.state_dict())
        if self._recent is None:
            self._recent = gram(
                x, y, bias_column=self.bias_column, sample_weight=sample_weight,
                num_classes=self.num_classes, acc_dtype=self.acc_dtype,
            )  # fmt: skip
        else:
            self._check_fit(x, y)
            gram_(
                self._recent, x, y, bias_column=self.bias_column, sample_weight=sample_weight, decay=self.decay
            )  # fmt: skip
        self.batches += 1
        self.rows += x.shape[-2]
        if self.batches == MANY_BATCHES and self.decay >= 1 and self._recent.gram.dtype == torch.float32:
            warnings.warn(
                f"cfl_ops.GramAccumulator: {self.batches} batches in float32 may be off by "
                f"{self.batches * torch.finfo(torch.float32).eps / 2:.0%} from rounding, and more of them by more: "
                "use acc_dtype=torch.float64 or compensated=True",
                stacklevel=2,
            )
        if self.compensated and self.batches % FOLD_EVERY == 0:
            self._fold()

    def _check_fit(self, x: Tensor, y: Tensor | None) -> None:
        """Raise for rows of another width than the sums, and targets of another kind."""
        assert self._recent is not None
        width = self._recent.gram.shape[-1] - int(self.bias_column)
        if isinstance(x, Tensor) and x.ndim > 1 and x.shape[-1] != width:
            raise ValueError(
                f"cfl_ops.GramAccumulator: x must have width {width} as in the batches before, but got shape "
                f"{tuple(x.shape)}"
            )
        if isinstance(y, Tensor) and (y.dtype == torch.int64) != (self.num_classes is not None):
            wanted = "floating point" if self.num_classes is None else "class indices (int64)"
            raise TypeError(
                f"cfl_ops.GramAccumulator: y must be {wanted} where num_classes is {self.num_classes}, "
                f"but got {y.dtype}"
            )

    def _fold(self) -> None:
        """Total + carry <- total + carry + recent, where carry holds what rounding took from total."""
        if self._recent is None:
            return
        if self._total is None or self._carry is None:
            self._total = [None if field is None else field.clone() for field in self._recent]
            self._carry = [None if field is None else torch.zeros_like(field) for field in self._recent]
        else:
            for total, carry, new in zip(self._total, self._carry, self._recent, strict=True):
                if total is None or carry is None or new is None:
                    continue
                summed = total + new
                larger = total.abs() >= new.abs()
                carry += torch.where(larger, (total - summed) + new, (new - summed) + total)
                total.copy_(summed)
        for field in self._recent:
            if field is not None:
                field.zero_()

    @property
    def moments(self) -> GramMoments:
        """The moments so far (a copy where the sums are compensated, else the running sums themselves).

        Raises:
            RuntimeError: nothing was added yet.

        """
        if self._recent is None:
            raise RuntimeError("cfl_ops.GramAccumulator: no batch was added yet")
        if self._total is None or self._carry is None:
            return self._recent
        return GramMoments._make(
            None if total is None or carry is None or new is None else total + (carry + new)
            for total, carry, new in zip(self._total, self._carry, self._recent, strict=True)
        )

    def fit(
        self,
        batches: Iterable[Batch],
        *,
        progress: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 1000,
    ) -> GramAccumulator:
        """Add all batches of a DataLoader or another iterable.

        Args:
            batches: yields ``x``, ``(x, y)`` or ``(x, y, sample_weight)``.
            progress: show a tqdm bar.
            checkpoint: a file that :meth:`save` writes every ``checkpoint_every`` batches and at the end. If it
                exists, its state is loaded first, in the place of what the accumulator holds, and as many rows are
                skipped as it has seen: run the same command again after a crash, with rows in the same order.
                Batches may have another size then; where one is half seen, its other half is added (not with
                ``decay``, which is by batches). If it does not exist, the accumulator must be empty.
            checkpoint_every: in batches.

        Returns:
            self.

        Raises:
            ValueError: the checkpoint does not fit the options or the batches, or has seen more rows than they have.

        """
        op = "GramAccumulator.fit"
        progress = checks.flag(op, "progress", progress)
        checkpoint_every = checks.integer(op, "checkpoint_every", checkpoint_every, 1)
        seen = 0
        if checkpoint is not None:
            if Path(checkpoint).exists():
                self.load(checkpoint)
                seen = self.rows
            elif self.rows:
                raise ValueError(
                    f"cfl_ops.{op}: the accumulator must be empty to begin a checkpoint, but it holds {self.rows} "
                    "rows, which a second run could not tell from those of batches"
                )
        for number, batch in enumerate(with_bar(batches, progress)):
            rows: Sequence[Tensor] = batch if isinstance(batch, tuple | list) else (batch,)
            if seen:
                seen, rest = self._unseen(seen, rows)
                if rest is None:
                    continue
                rows = rest
            self.update(*rows)
            if checkpoint is not None and (number + 1) % checkpoint_every == 0:
                self.save(checkpoint)
        if seen:
            raise ValueError(
                f"cfl_ops.{op}: the checkpoint has seen {self.rows} rows, but batches have {self.rows - seen}"
            )
        if checkpoint is not None:
            self.save(checkpoint)
        return self

    def _unseen(self, seen: int, batch: Sequence[Tensor]) -> tuple[int, Sequence[Tensor] | None]:
        """How many of the rows that a checkpoint has seen lie behind this batch, and what of it is new."""
        op = "GramAccumulator.fit"
        checks.floating(op, "x", batch[0], 2)
        self._check_fit(batch[0], batch[1] if len(batch) > 1 else None)
        rows = batch[0].shape[-2]
        if rows <= seen:
            return seen - rows, None
        if self.decay != 1.0:
            raise ValueError(
                f"cfl_ops.{op}: with decay, batches must be those of the checkpoint, which has seen {self.rows} rows "
                f"and ends within a batch of {rows}"
            )
        new = list(batch)
        # Behind the rows' dimension come these many.
        for i, (name, dims) in enumerate(
            {"x": 1, "y": 0 if self.num_classes else 1, "sample_weight": 0}.items()
        ):
            if i < len(new) and new[i] is not None:
                checks.tensor(op, name, new[i], 1 + dims)
                checks.size(op, name, new[i], -1 - dims, rows, "the rows of x")
                new[i] = new[i].narrow(-1 - dims, seen, rows - seen)
        return 0, new

    def fit_file(
        self,
        x: str | os.PathLike[str] | Any,
        y: str | os.PathLike[str] | Any = None,
        *,
        x_name: str | None = None,
        y_name: str | None = None,
        batch_rows: int | None = None,
        progress: bool = False,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int = 100,
    ) -> GramAccumulator:
        """Add the rows of files, or arrays, that may be larger than memory.

        Args:
            x: a ``.npy`` file, a ``.safetensors`` file (with ``x_name``), or an array or tensor ``(N, D)``,
                a memory-mapped one for instance. A mapped file is read in place, a chunk at a time.
            y: likewise, or None.
            x_name: the tensor's name in a safetensors file.
            y_name: likewise for ``y``.
            batch_rows: rows in a chunk; by default about 8 MB of ``x``.
            progress, checkpoint, checkpoint_every: as in :meth:`fit`.

        Returns:
            self.

        """
        source = _open("x", x, x_name)
        targets = None if y is None else _open("y", y, y_name)
        if len(source.shape) != 2:
            raise ValueError(
                f"cfl_ops.GramAccumulator.fit_file: x must have 2 dimensions, but got shape {tuple(source.shape)}"
            )
        rows = source.shape[0]
        if targets is not None and targets.shape[0] != rows:
            raise ValueError(
                f"cfl_ops.GramAccumulator.fit_file: y must have {rows} rows as x has, but got {targets.shape[0]}"
            )
        if batch_rows is not None:
            batch_rows = checks.integer("GramAccumulator.fit_file", "batch_rows", batch_rows, 1)
        step = batch_rows or max(256, CHUNK_BYTES // max(1, source.shape[1] * source.itemsize))
        chunks = _Chunks(source, targets, rows, step)
        return self.fit(chunks, progress=progress, checkpoint=checkpoint, checkpoint_every=checkpoint_every)

    def state_dict(self) -> dict[str, Any]:
        """The sums, counters and options."""
        return {
            "options": {
                "bias_column": self.bias_column, "num_classes": self.num_classes, "decay": self.decay,
                "compensated": self.compensated, "acc_dtype": self.acc_dtype,
            },
            "batches": self.batches,
            "rows": self.rows,
            "recent": None if self._recent is None else list(self._recent),
            "total": self._total,
            "carry": self._carry,
        }  # fmt: skip

    @makes_state
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, from an accumulator with the same options.

        The sums are copied. An accumulator that holds sums takes those of the same shapes only. Nothing is
        converted: ``count`` and the sums of a compensated accumulator are float64.

        Raises:
            TypeError, ValueError: the state is not one, or does not fit. The accumulator is then as it was.

        """
        op = "GramAccumulator.load_state_dict"
        mine = self.state_dict()
        if not isinstance(state, dict) or state.keys() != mine.keys():
            raise ValueError(f"cfl_ops.{op}: the state must be a dict of {', '.join(mine)}")
        if state["options"] != mine["options"]:
            raise ValueError(
                f"cfl_ops.{op}: the state has other options, {state['options']}, than this "
                f"accumulator, {mine['options']}"
            )
        batches = checks.integer(op, "batches", state["batches"], 0)
        rows = checks.integer(op, "rows", state["rows"], 0)
        recent = self._checked(op, "recent", state["recent"], self._recent)
        total = self._checked(op, "total", state["total"], recent)
        carry = self._checked(op, "carry", state["carry"], recent)
        if (recent is None) != (batches == 0) or (batches == 0 and rows):
            raise ValueError(
                f"cfl_ops.{op}: recent sums must be there where batches were added, but batches is {batches} "
                f"and rows {rows}"
            )
        if (total is None) != (carry is None) or (
            total is not None and (recent is None or not self.compensated)
        ):
            raise ValueError(
                f"cfl_ops.{op}: total and carry must be there both, or neither, beside recent sums"
            )
        self.batches, self.rows = batches, rows
        self._recent = None if recent is None else GramMoments._make(recent)
        self._total, self._carry = total, carry

    def _checked(
        self, op: str, name: str, fields: Any, like: Sequence[Tensor | None] | None
    ) -> list[Tensor | None] | None:
        """Copies of the five sums of a state, which have the shapes of ``like``; or None, where there are none."""
        if fields is None:
            return None
        if not isinstance(fields, list | tuple) or len(fields) != len(GramMoments._fields):
            raise ValueError(f"cfl_ops.{op}: {name} must be a list of {', '.join(GramMoments._fields)}")
        first = fields[0]
        checks.floating(op, f"{name}[0] (gram)", first, 2)
        if self.acc_dtype not in (None, first.dtype) or first.dtype not in (torch.float32, torch.float64):
            wanted = self.acc_dtype or "torch.float32 or torch.float64"
            raise TypeError(f"cfl_ops.{op}: {name}[0] (gram) must be {wanted}, but got {first.dtype}")
        batch, order = first.shape[:-2], first.shape[-1]
        targets: tuple[int, ...] = ()
        if fields[1] is not None:
            checks.tensor(op, f"{name}[1] (cross)", fields[1], 2)
            targets = (fields[1].shape[-1] if self.num_classes is None else self.num_classes,)
        shapes = ((order, order), (order, *targets), targets, targets, ())
        for i, (field, value, shape) in enumerate(zip(GramMoments._fields, fields, shapes, strict=True)):
            label = f"{name}[{i}] ({field})"
            if value is None and fields[1] is None and field in ("cross", "target_sum", "target_sq"):
                continue
            checks.tensor(op, label, value, 0)
            dtype = torch.float64 if field == "count" else first.dtype
            if value.dtype != dtype:
                raise TypeError(f"cfl_ops.{op}: {label} must be {dtype}, but got {value.dtype}")
            if value.shape != (*batch, *shape):
                raise ValueError(
                    f"cfl_ops.{op}: {label} must have shape {(*batch, *shape)}, but got {tuple(value.shape)}"
                )
            checks.same_device(op, f"{name}[0]", first, **{label: value})
        if like is not None and [_shape(value) for value in fields] != [_shape(value) for value in like]:
            raise ValueError(
                f"cfl_ops.{op}: {name} must have the shapes {[_shape(value) for value in like]}, "
                f"but got {[_shape(value) for value in fields]}"
            )
        return [None if value is None else value.detach().clone() for value in fields]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a file, atomically: to a temporary name first, flushed, then renamed."""
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with temporary.open("w+b") as file:
                torch.save(self.state_dict(), file)
                file.write(_checksum(file, file.seek(0, os.SEEK_END)))
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Restore the state from a file that :meth:`save` wrote.

        Raises:
            ValueError: the file is not whole, or was not written by :meth:`save`.
            TypeError, ValueError: what :meth:`load_state_dict` raises.

        """
        with Path(path).open("rb") as file:
            size = max(0, file.seek(0, os.SEEK_END) - CHECKSUM_BYTES)
            checksum = _checksum(file, size)
            if not size or file.read() != checksum:
                raise ValueError(
                    f"cfl_ops.GramAccumulator.load: {path} is no whole file of an accumulator (by its checksum)"
                )
            file.seek(0)
            state = torch.load(file, weights_only=True, map_location="cpu")
        self.load_state_dict(state)

    def reduce(self, group: Any = None) -> GramMoments:
        """The moments of all ranks together, on every rank; the accumulator keeps its own.

        Args:
            group: a ``torch.distributed`` process group; None for the default one.

        Raises:
            RuntimeError: a rank has added no batch yet; on every rank.
            ValueError: the ranks have other options, shapes or dtypes; on every rank.

        """
        import torch.distributed as dist

        mine: dict[str, Any] = {"options": self.state_dict()["options"], "sums": None}
        if self._recent is not None:
            mine["sums"] = [None if f is None else (f.dtype, tuple(f.shape)) for f in self.moments]
        theirs: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(theirs, mine, group=group)
        for rank, other in enumerate(theirs):
            if other["sums"] is None:
                raise RuntimeError(f"cfl_ops.GramAccumulator.reduce: rank {rank} has added no batch yet")
            if other != theirs[0]:
                raise ValueError(
                    f"cfl_ops.GramAccumulator.reduce: all ranks must have the same options and sums, but rank {rank} "
                    f"has {other}, and rank 0 {theirs[0]}"
                )
        fields = [None if field is None else field.clone() for field in self.moments]
        for field in fields:
            if field is not None:
                dist.all_reduce(field, group=group)
        return GramMoments._make(fields)


def _checksum(file: BinaryIO, size: int) -> bytes:
    """Of the first so many bytes, behind which the file then stands."""
    found = 0
    file.seek(0)
    while size > 0:
        piece = file.read(min(size, CHUNK_BYTES))
        found = zlib.crc32(piece, found)
        size -= len(piece)
    return found.to_bytes(CHECKSUM_BYTES, "little")


def _shape(value: Tensor | None) -> tuple[int, ...] | None:
    return None if value is None else tuple(value.shape)


class _Chunks:
    """Chunks of rows of x (and y), as tensors that view mapped memory where they can."""

    def __init__(self, x: Any, y: Any, rows: int, step: int) -> None:
        self.x, self.y, self.rows, self.step = x, y, rows, step

    def __len__(self) -> int:
        return -(-self.rows // self.step)

    def __iter__(self) -> Iterator[Batch]:
        for begin in range(0, self.rows, self.step):
            chunk = _tensor(self.x[begin : begin + self.step])
            yield chunk if self.y is None else (chunk, _tensor(self.y[begin : begin + self.step]))


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    with warnings.catch_warnings():  # a mapped file is read-only, which is all we do
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(value)


class _Safetensors:
    """A tensor of a safetensors file as a thing with a shape that is sliced by rows."""

    def __init__(self, path: Path, name: str) -> None:
        from safetensors import safe_open

        self.file = safe_open(str(path), framework="pt")
        if name not in self.file.keys():  # noqa: SIM118  (not a dict)
            raise KeyError(
                f"cfl_ops.GramAccumulator.fit_file: {path} has no tensor {name!r}, only {sorted(self.file.keys())}"
            )
        self.slice = self.file.get_slice(name)
        self.shape = tuple(self.slice.get_shape())
        self.itemsize = 8 if self.slice.get_dtype() in ("F64", "I64") else 4

    def __getitem__(self, rows: slice) -> Tensor:
        tensor: Tensor = self.slice[rows]
        return tensor


def _open(argument: str, source: Any, name: str | None) -> Any:
    if not isinstance(source, str | os.PathLike):
        return source
    path = Path(source)
    if path.suffix == ".npy":
        import numpy as np

        array = np.load(path, mmap_mode="r")
        if isinstance(array.base, mmap.mmap) and hasattr(mmap, "MADV_SEQUENTIAL"):
            array.base.madvise(mmap.MADV_SEQUENTIAL)  # read ahead: every row is read once, in order
        return array
    if path.suffix == ".safetensors":
        if name is None:
            raise ValueError(
                f"cfl_ops.GramAccumulator.fit_file: {argument} is a safetensors file, so {argument}_name must "
                "say which of its tensors is meant"
            )
        return _Safetensors(path, name)
    raise ValueError(
        f"cfl_ops.GramAccumulator.fit_file: {argument} must be a .npy or .safetensors file, but got {path.name}"
    )


def with_bar(batches: Iterable[Batch], progress: bool) -> Iterable[Batch]:
    if not progress:
        return batches
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError(
            'cfl_ops.GramAccumulator: progress=True needs tqdm: pip install "cfl-ops[data]"'
        ) from None
    bar: Iterable[Batch] = tqdm(batches, unit="batch")
    return bar
