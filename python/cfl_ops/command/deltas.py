"""What the commands do with deltas: diff makes one of two checkpoints, patch applies it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from cfl_ops.errors import CorruptDataError, WrongBaseError
from cfl_ops.ops.codec.delta import apply_delta, compress_delta
from cfl_ops.ops.codec.delta_format import is_whole_delta

from .failures import UsageError, plain
from .report import Bar, Report, Row, progress
from .sources import DELTA_NOTE, LEFT, STDIN, Facts, Source, facts_of_blob, open_source
from .targets import STDOUT, SUFFIXES, target_of, write_coded
from .work import Showing, finish, row_of, store_coded, store_plain, tied_in_place, weights_of

__all__ = ["diff", "patch"]

ONE = {"cflz": ""}
ANY = {"cflz": "", "safetensors": "", "pt": ""}


def diff(old: str, new: str, out: str, *, small: bool, force: bool, showing: Showing) -> None:
    """What makes NEW of OLD, in OUT."""
    started = time.perf_counter()
    _one_stdin(old, new)
    if out != STDOUT and SUFFIXES.get(Path(out).suffix.lower(), "cflz") != "cflz":
        raise UsageError(f"{out}: diff writes a .cflz file")
    target = target_of(out, "cflz", ONE, force, "cflz")
    showing.check(target, old, new)
    with ExitStack() as stack:
        before, after = weights_of("diff", old, stack), weights_of("diff", new, stack)
        facts = {name: after.facts(name) for name in after.stored()}
        report = Report("diff", {"old": before.shown, "new": after.shown, "output": out})
        with progress(sum(each.raw_bytes for each in facts.values()), showing.quiet) as bar:
            aliases: dict[str, str] = {}
            entries = _deltas(before, after, facts, "small" if small else "fast", report, bar)
            metadata = {**after.metadata, DELTA_NOTE: "1"}
            size = write_coded(target, tied_in_place(after, aliases, entries), metadata, aliases, None, None)
        report.rows += [Row(name, same_as=of) for name, of in after.aliases.items()]
        finish(report, showing, started, size)


def _deltas(
    before: Source, after: Source, facts: dict[str, Facts], effort: str, report: Report, bar: Bar
) -> Iterator[tuple[str, Tensor]]:
    """A delta for each tensor of the new checkpoint, then for those that the old one alone has."""
    for name in [*facts, *(name for name in before.names if name not in after.known)]:
        bar.at(name)
        begin = time.perf_counter()
        # By mappings of one tensor each: tensors that joined or left are told apart there.
        new = {name: after.tensor(name)} if name in facts else {}
        base = {name: before.tensor(name)} if name in before.known else {}
        delta = compress_delta(new, base, effort=effort)[name]
        row = row_of(name, facts_of_blob(delta), time.perf_counter() - begin)
        if new:
            row.raw_bytes, row.parameters = facts[name].raw_bytes, facts[name].numel
            bar.advance(row.raw_bytes)
        report.rows.append(row)
        del new, base
        yield name, delta
        del delta


def patch(old: str, delta: str, out: str, *, to: str | None, force: bool, showing: Showing) -> None:
    """OLD with what changed, in OUT."""
    started = time.perf_counter()
    _one_stdin(old, delta)
    target = target_of(out, to, ANY, force, "safetensors")
    showing.check(target, old, delta)
    with ExitStack() as stack:
        change = open_source(delta, stack)
        if not change.is_delta and _keeps_deltas(change):
            change = KeptDeltas(change)
        if not change.is_delta:
            raise UsageError(f"{change.shown} is no delta: `cfl-ops diff OLD NEW DELTA` makes one")
        before = weights_of("patch", old, stack)
        report = Report("patch", {"old": before.shown, "delta": change.shown, "output": out})
        patched = Patched(before, change)
        with progress(sum(patched.facts(name).raw_bytes for name in patched.stored()), showing.quiet) as bar:
            if target.format == "cflz" or (target.format == "safetensors" and before.compressed):
                size = store_coded(patched, target, {"lossless": True}, report, bar)
            else:
                size = store_plain(patched, target, report, bar)
        finish(report, showing, started, size)


def _keeps_deltas(source: Source) -> bool:
    """Whether tensors are deltas, as a Python program saves those that compress_delta gave it."""
    first = next(iter(source.stored()), None)
    if first is None:
        return False
    facts = source.facts(first)
    return facts.dtype == torch.uint8 and len(facts.shape) == 1 and is_whole_delta(source.tensor(first))


class KeptDeltas(Source):
    """Deltas that were saved as tensors are, as those of ``diff`` are."""

    is_delta = True

    def __init__(self, source: Source) -> None:
        self._source, self.shown, self.format = source, source.shown, source.format
        self.names, self.aliases, self.metadata = source.names, source.aliases, source.metadata

    def facts(self, name: str) -> Facts:
        return facts_of_blob(self.blob(name))

    def blob(self, name: str) -> Tensor:
        tensor = self._source.tensor(self.aliases.get(name, name))
        if not is_whole_delta(tensor):
            raise CorruptDataError(f"{name!r} of {self.shown} is no delta, as others are")
        return tensor


class Patched(Source):
    """The new checkpoint, made tensor by tensor of the old one and a delta."""

    format = "cflz"

    def __init__(self, before: Source, change: Source) -> None:
        self._before, self._change = before, change
        self._facts = {name: change.facts(name) for name in change.stored()}
        left = {name: None for name, facts in self._facts.items() if facts.kind == LEFT}
        self.shown, self.metadata, self.aliases = before.shown, change.metadata, change.aliases
        self.names = tuple(name for name in change.names if name not in left)
        if unknown := [name for name in before.names if name not in change.known]:
            more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
            raise WrongBaseError(f"{before.shown} has {unknown[0]!r}{more}, which the delta's base had not")
        for name in left:  # that it is the base is known of all tensors or of none
            self._applied(name)

    def facts(self, name: str) -> Facts:
        return self._facts[name]

    def tensor(
        self, name: str, start: int | None = None, stop: int | None = None, out: Tensor | None = None
    ) -> Tensor:
        tensor = self._applied(name)[name]
        if start is not None or stop is not None:
            tensor = tensor.reshape(-1)[start:stop]
        return tensor if out is None else out.copy_(tensor)

    def _applied(self, name: str) -> dict[str, Tensor]:
        base = {name: self._before.tensor(name)} if name in self._before.known else {}
        try:
            return apply_delta(base, {name: self._change.blob(name)})
        except (CorruptDataError, WrongBaseError) as error:
            wrong = isinstance(error, WrongBaseError)
            what = f"{self._before.shown} is not the base of " if wrong else ""
            raise type(error)(f"{what}{self._change.shown}: {plain(error)}") from None


def _one_stdin(*arguments: str) -> None:
    if arguments.count(STDIN) > 1:
        raise UsageError("stdin can be read once: only one argument may be -")
