"""A batch over several processes: what they tell each other, then rows or moments, whichever are fewer bytes."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_compiling

from .head import Batch

__all__ = ["Ranks", "Traffic", "agree", "fingerprint", "gather_rows", "group_of", "sum_over"]


NO_SAY: Any = object()
"""The word of a rank without rows, in what rows are."""


class Choice(NamedTuple):
    """A word as a fact: its place among those that it could be."""

    word: Any
    words: Sequence[Any]


class Traffic(NamedTuple):
    """What a global solve moved."""

    kind: str
    """``"features"``, ``"moments"``, or ``"none"`` where one process has all."""
    bytes: int
    """Received by this rank for the solve; the table before it, of some 200 bytes a rank, is not counted."""
    features: int
    """What the rows of the other ranks are: bytes."""
    moments: int
    """What a ring's sum of the moments is."""


class Ranks(NamedTuple):
    """What all ranks said of themselves."""

    group: Any
    rank: int
    size: int
    rows: list[int]
    by_moments: bool
    """Whether some rank has moments alone."""
    known: dict[str, Any]
    """The facts, those too that this rank has no say in."""

    @property
    def total(self) -> int:
        """Rows of the global batch."""
        return sum(self.rows)

    @property
    def mine(self) -> slice:
        """The rows of this rank in it."""
        first = sum(self.rows[: self.rank])
        return slice(first, first + self.rows[self.rank])

    def explain_rows(self, error: Exception) -> None:
        """Add to an error which names a row of the global batch whose that is."""
        first = [sum(self.rows[:rank]) for rank in range(self.size)]
        error.add_note(f"Rows are those of the global batch: those of the ranks begin at {first}.")


def group_of(choice: Any) -> Any:
    """The process group of a choice: ``"auto"`` is the default group where there is one of several ranks, else None."""
    if choice is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = dist.group.WORLD if isinstance(choice, str) else choice
    return group if dist.get_world_size(group) > 1 else None


# Its name up to torch 2.12.
_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


def refuse_graph(name: str) -> None:
    """Raise in a graph: which rows come from where is not known when it is compiled."""
    if is_compiling():
        raise RuntimeError(
            f"cfl_ops.{name}: a solve over several processes cannot be part of a compiled graph: compile the backbone, "
            "and call the head outside, or use process_group=None"
        )


BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@functools.lru_cache(maxsize=4)
def _places(count: int, device: torch.device) -> Tensor:
    """An odd number for each place, which differ in all bits."""
    return (torch.arange(1, count + 1, device=device) * 0x1E3779B97F4A7C15) | 1  # wraps


def fingerprint(*tensors: Tensor | None) -> int:
    """A hash of the bits of some tensors and of where they lie, which a float64 can hold."""
    value = 0
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            flat = tensor.detach().reshape(-1)
            bits = flat.view(BITS[flat.element_size()])
            if (
                flat.numel() * flat.element_size() % 8 == 0
                and flat.storage_offset() * flat.element_size() % 8 == 0
            ):
                bits = bits.view(torch.int64)  # fewer, longer ones
            bits = bits.long()
            mixed = (bits ^ (bits >> 21)) * _places(bits.numel(), bits.device)
            value = (value * 1_000_003) ^ int(mixed.sum())
    return (value ^ (value >> 50)) & ((1 << 50) - 1)


def device_for(group: Any, tensor: Tensor) -> torch.device:
    """Where small tables travel: on the CPU, if the group can."""
    backend = str(dist.get_backend(group))
    return torch.device("cpu") if "gloo" in backend or "mpi" in backend else tensor.device


def agree(
    name: str,
    group: Any,
    device: torch.device,
    rows: int,
    by_moments: bool,
    facts: dict[str, float | Choice],
    error: BaseException | None,
    head: Sequence[Tensor | None],
    repair: Callable[[], None],
) -> Ranks:
    """Compare what ranks know of the batch and the head, before anything is changed.

    One table of some numbers is gathered. All ranks then raise, or none does: where a rank has refused its batch
    (``error``), or where they differ in a fact. Heads that differ become rank 0's (``repair``).

    Raises:
        RuntimeError: another rank has refused its batch; the error itself on the rank that has.
        ValueError: ranks differ in a fact, which is named.

    """
    names = ["refused", "rows", "moments", "head", *facts]
    numbers = [
        fact
        if not isinstance(fact, Choice)
        else fact.words.index(fact.word)
        if fact.word is not NO_SAY
        else math.nan
        for fact in facts.values()
    ]
    mine = [float(v) for v in (error is not None, rows, by_moments, fingerprint(*head), *numbers)]
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    table = torch.empty(size * len(mine), dtype=torch.float64, device=device)
    _gather(table, torch.tensor(mine, dtype=torch.float64, device=device), group=group)
    by_name = dict(zip(names, table.view(size, -1).mT.tolist(), strict=True))
    if error is not None:
        raise error
    refused = [r for r, flag in enumerate(by_name.pop("refused")) if flag]
    if refused:
        raise RuntimeError(
            f"cfl_ops.{name}: rank {', '.join(map(str, refused))} refused its batch (its own error says why), so no "
            "rank was changed"
        )
    counts = [int(count) for count in by_name.pop("rows")]
    heads, moments = by_name.pop("head"), by_name.pop("moments")
    known: dict[str, Any] = {}
    for name_, values in by_name.items():
        fact, said = facts[name_], [value for value in values if not math.isnan(value)]

        def word(value: float, fact: float | Choice = fact) -> Any:
            return fact.words[int(value)] if isinstance(fact, Choice) else value

        known[name_] = word(said[0]) if said else None
        if any(value != said[0] for value in said):
            shown = [
                "-" if math.isnan(v) else word(v) if isinstance(fact, Choice) else f"{v:g}" for v in values
            ]
            listing = ", ".join(map(str, shown))
            raise ValueError(
                f"cfl_ops.{name}: all ranks must have the same {name_}, but by rank they have {listing}"
            )
    if any(value != heads[0] for value in heads):
        repair()
    return Ranks(group, rank, size, counts, any(moments), known)


def copy_from_first(name: str, group: Any, head: Sequence[Tensor | None], first: bool) -> None:
    """Give all ranks the head of the group's rank 0."""
    if not first:
        warnings.warn(
            f"cfl_ops.{name}: the heads of the ranks had come to differ (something else has changed one, or the ranks' "
            "machines round differently); all have that of rank 0 again",
            stacklevel=4,
        )
    source = dist.get_global_rank(group, 0) if group is not dist.group.WORLD else 0
    for tensor in head:
        if tensor is not None:
            whole = tensor.detach().contiguous()
            dist.broadcast(whole, source, group=group)
            tensor.detach().copy_(whole)


def row_bytes(batch: Batch) -> int:
    """Bytes of a row, its target (a class as 4) and its weight."""
    target = 4 if batch.classes else batch.target.shape[1] * batch.target.element_size()
    weight = 0 if batch.sample_weight is None else batch.sample_weight.element_size()
    return batch.features.shape[1] * batch.features.element_size() + target + weight


def gather_rows(ranks: Ranks, batch: Batch) -> Batch:
    """The batches of all ranks, in their order."""
    limits = torch.iinfo(torch.int32)  # a class beyond them is none, and stays so
    target = batch.target.clamp(limits.min, limits.max).int() if batch.classes else batch.target
    columns = [batch.features, target.unsqueeze(-1) if batch.classes else target]
    if batch.sample_weight is not None:
        columns.append(batch.sample_weight.unsqueeze(-1))
    count = batch.features.shape[0]
    widths = [column.shape[1] * column.element_size() for column in columns]
    mine = torch.empty(count, sum(widths), dtype=torch.uint8, device=batch.features.device)
    for column, place in zip(columns, mine.split(widths, 1), strict=True):
        place.copy_(column.contiguous().view(torch.uint8).reshape(count, place.shape[1]))
    everyone = mine.new_empty(ranks.total, sum(widths))
    if len(set(ranks.rows)) == 1:
        _gather(everyone, mine, group=ranks.group)
    else:  # no padding: what ranks have differs in the last batch of an epoch
        parts = list(everyone.split(ranks.rows))
        for rank, part in enumerate(parts):
            if rank == ranks.rank:
                part.copy_(mine)
            if ranks.rows[rank]:
                dist.broadcast(part, dist.get_global_rank(ranks.group, rank), group=ranks.group)
    whole = [
        place.contiguous().view(column.dtype)
        for column, place in zip(columns, everyone.split(widths, 1), strict=True)
    ]
    classes = whole[1].reshape(-1).long() if batch.classes else whole[1]
    return Batch(whole[0], classes, whole[2].reshape(-1) if len(whole) > 2 else None, batch.wide)


def sum_over(ranks: Ranks, vector: Tensor) -> Tensor:
    """The sum of all ranks' vectors."""
    dist.all_reduce(vector, group=ranks.group)
    return vector


def refuse_together(name: str, ranks: Ranks, device: torch.device, error: Exception | None) -> None:
    """Raise on every rank, since the sum of all is not finite: what a rank knows of its own rows, if it does."""
    bad = torch.zeros(ranks.size, dtype=torch.float64, device=device)
    _gather(
        bad, torch.full((1,), float(error is not None), dtype=torch.float64, device=device), group=ranks.group
    )
    if error is not None:
        raise error
    which = [str(rank) for rank, flag in enumerate(bad.tolist()) if flag]
    where = f"the batch of rank {', '.join(which)}" if which else "the global batch"
    raise ValueError(
        f"cfl_ops.{name}: {where} has NaN or Inf, a class out of range, or values that overflow; no rank was changed"
    )
