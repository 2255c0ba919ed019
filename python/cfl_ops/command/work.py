"""What the commands do with weights: compress, decompress, inspect, verify."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops.errors import CorruptDataError
from cfl_ops.ops.codec.bits import flat_bits
from cfl_ops.ops.codec.blob import decompress as decoded
from cfl_ops.ops.codec.blob import store_lossless
from cfl_ops.ops.codec.safetensors_file import NAMES
from cfl_ops.ops.codec.state_dict import MIN_NUMEL, named_blobs

from .beside import check_beside
from .compare import difference, same_bits
from .failures import UsageError, VerificationError, plain, printable, say
from .picture import check_picture, draw
from .report import Bar, Report, Row, human, progress, stderr_console, stdout_console
from .sources import LEFT, Facts, Lazy, Shapes, Source, facts_of_blob, open_source
from .targets import STDOUT, Target, check_stdout, target_of, write_coded, write_plain

__all__ = [
    "Showing",
    "compress",
    "decompress",
    "finish",
    "inspect",
    "row_of",
    "store_coded",
    "store_plain",
    "tied_in_place",
    "verify",
    "weights_of",
]

CODED = {"cflz": "", "safetensors": "", "pt": "compress writes .cflz or .safetensors; decompress writes .pt"}
PLAIN = {"safetensors": "", "pt": "", "cflz": "decompress writes .safetensors or .pt; compress writes .cflz"}


class Showing(NamedTuple):
    """What is told of the work, and where."""

    quiet: bool = False
    table: bool = True
    json: str | None = None
    picture: str | None = None
    force: bool = False

    def check(self, target: Target | None, *arguments: str | None) -> None:
        """Before the work; of the files that the arguments name none is written to."""
        out = None if target is None else target.argument
        check_beside({"--json": self.json, "--picture": self.picture}, [*arguments, out], self.force)
        check_picture(self.picture)
        if self.json == "-":
            check_stdout()
        if self.json == "-" and target is not None and target.is_stdout:
            raise UsageError("--json -: stdout takes the output already; name a file")


def compress(
    argument: str,
    out: str,
    *,
    to: str | None,
    force: bool,
    options: Mapping[str, Any],
    budget: str | None,
    min_numel: int | None,
    max_shard: str | None,
    showing: Showing,
) -> None:
    """IN as blobs, in OUT."""
    started = time.perf_counter()
    target = target_of(out, to, CODED, force, "cflz", max_shard)
    showing.check(target, argument)
    with ExitStack() as stack:
        source = weights_of("compress", argument, stack)
        options = dict(options)
        raw = sum(source.facts(name).raw_bytes for name in source.stored())
        if budget is not None:
            options["max_bytes"] = bytes_of(budget, "--budget", raw)
        report = Report("compress", {"input": source.shown, "output": out, "format": target.format})
        with progress(raw, showing.quiet) as bar:
            size = store_coded(source, target, options, report, bar, min_numel, max_shard)
        finish(report, showing, started, size)


def decompress(
    argument: str, out: str, *, to: str | None, force: bool, max_shard: str | None, showing: Showing
) -> None:
    """The weights of IN as they were, in OUT."""
    started = time.perf_counter()
    target = target_of(out, to, PLAIN, force, "safetensors", max_shard)
    showing.check(target, argument)
    with ExitStack() as stack:
        source = weights_of("decompress", argument, stack)
        raw = sum(source.facts(name).raw_bytes for name in source.stored())
        report = Report("decompress", {"input": source.shown, "output": out, "format": target.format})
        with progress(raw, showing.quiet) as bar:
            size = store_plain(source, target, report, bar, max_shard)
        finish(report, showing, started, size)


def store_coded(
    source: Source,
    target: Target,
    options: dict[str, Any],
    report: Report,
    bar: Bar,
    min_numel: int | None = None,
    max_shard: str | None = None,
) -> int:
    """Compress all tensors of a source; returns the bytes of the file, and fills the report."""
    aliases: dict[str, str] = {}
    lazy = Lazy(source)
    blobs = _coded(source, lazy, options, MIN_NUMEL if min_numel is None else min_numel, report, bar)
    size = write_coded(
        target,
        tied_in_place(source, aliases, blobs),
        source.metadata,
        aliases,
        Shapes(source, lazy),
        _shard(max_shard),
    )
    if target.format == "safetensors":
        _as_stored(report)
    _tied_rows(source, report)
    return size


def store_plain(
    source: Source, target: Target, report: Report, bar: Bar, max_shard: str | None = None
) -> int:
    """Write all tensors of a source as they are; returns the bytes of the file, and fills the report."""
    facts = {name: source.facts(name) for name in source.stored()}

    def make(name: str, into: Tensor | None) -> Tensor:
        bar.at(name)
        begin = time.perf_counter()
        tensor = source.tensor(name, out=into)
        report.rows.append(row_of(name, facts[name], time.perf_counter() - begin))
        bar.advance(facts[name].raw_bytes)
        return tensor

    if target.format == "safetensors" and source.aliases:
        some = ", ".join(list(source.aliases)[:3])
        say(report.command, f"note: .safetensors has no tied tensors, so {some} are written out in full")
    specs = {name: (each.dtype, each.shape) for name, each in facts.items()}
    size = write_plain(target, specs, source.names, source.aliases, source.metadata, make, _shard(max_shard))
    _tied_rows(source, report)
    return size


def _tied_rows(source: Source, report: Report) -> None:
    """Rows in the order of the names, each once."""
    rows = {row.name: row for row in report.rows}
    rows |= {name: Row(name, same_as=of) for name, of in source.aliases.items()}
    report.rows = [rows[name] for name in source.names]


def inspect(argument: str, *, showing: Showing) -> None:
    """What the headers say, on stdout."""
    showing.check(None, argument)
    with ExitStack() as stack:
        source = open_source(argument, stack)
        report = Report("inspect", {"input": source.shown, "format": source.format, "delta": source.is_delta})
        report.facts["version"] = source.version
        report.facts["metadata"] = dict(source.metadata)
        for name in source.names:
            if name in source.aliases:
                report.rows.append(Row(name, same_as=source.aliases[name]))
            else:
                report.rows.append(row_of(name, source.facts(name)))
        report.write_json(showing.json)
        if showing.picture is not None:
            draw(showing.picture, report.rows, _title(report))
        if showing.json != "-":
            console = stdout_console()
            if showing.table:
                report.print_table(console)
            what = f"{source.format}{'' if source.version is None else f' version {source.version}'}"
            kind = "a delta, " if source.is_delta else ""
            console.print(
                printable(f"{source.shown}: {what}, {kind}{report.totals_line()}"),
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
            for key, value in source.metadata.items():
                console.print(
                    printable(f"  {key}: {value[:200]}"), soft_wrap=True, highlight=False, markup=False
                )


def verify(argument: str, original: str | None, *, showing: Showing) -> None:
    """Decode everything; compare it with the original, if one is given."""
    started = time.perf_counter()
    showing.check(None, argument, original)
    with ExitStack() as stack:
        source = open_source(argument, stack)
        report = Report("verify", {"input": source.shown, "original": original})
        if source.is_delta and original is not None:
            raise UsageError(f"{source.shown} is a delta: `patch` it, and verify what comes out")
        other = None if original is None else weights_of("verify", original, stack)
        names = source.stored()
        with progress(len(names), showing.quiet, "tensors") as bar:
            for name in names:
                bar.at(name)
                report.rows.append(_verified(source, other, name))
                bar.advance(1)
        if other is not None:
            report.rows += _names_apart(source, other)
        bad = [row for row in report.rows if row.state != "good"]
        report.facts |= {"good": not bad, "seconds": time.perf_counter() - started}
        report.write_json(showing.json)
        if showing.picture is not None:
            draw(showing.picture, report.rows, _title(report))
        for row in bad:
            say("verify", f"{source.shown}: {row.name!r}: {row.state}")
        inexact = [row for row in report.rows if row.max_error]
        if inexact and showing.table and not showing.quiet and showing.json != "-":
            Report("verify", rows=inexact).print_table(stdout_console())
        if bad:
            raise VerificationError(f"{source.shown}: {len(bad)} of {len(report.rows)} tensors are bad")
        if not showing.quiet and showing.json != "-":
            print(printable(f"{source.shown}: {_verdict(report, other, len(inexact))}"))


def _verdict(report: Report, other: Source | None, inexact: int) -> str:
    count = f"{len(report.rows):,} tensor{'s' if len(report.rows) != 1 else ''}"
    if other is None:
        plain_ones = sum(row.kind == "plain" for row in report.rows)
        if plain_ones == 0:
            return f"good, {count}"
        which = "" if plain_ones == len(report.rows) else f"{plain_ones:,} of them "
        return f"readable, {count}, {which}without checksums of their own: give ORIGINAL to compare with"
    if not inexact:
        return f"equal to {other.shown} bit for bit, {count}"
    return f"good, {count}, of which {inexact:,} differ from {other.shown} by the errors above (lossy)"


def _verified(source: Source, other: Source | None, name: str) -> Row:
    """A tensor's row; its state says what is wrong with it."""
    begin = time.perf_counter()
    row = Row(name)
    try:
        facts = source.facts(name)
        row = row_of(name, facts)
        row.state = "good"
        if source.is_delta:
            source.check_delta(name)
        elif other is None:
            source.tensor(name)
        elif name not in other.known:
            row.state = "is not in the original"
        else:
            _compare(source, other, name, facts, row)
    except CorruptDataError as error:
        row.state = re.sub(r" \(in '.*\)$", "", plain(error))  # the line begins with the name
    row.seconds = time.perf_counter() - begin
    return row


def _compare(source: Source, other: Source, name: str, facts: Facts, row: Row) -> None:
    theirs = other.facts(other.aliases.get(name, name))
    if (facts.dtype, facts.shape) != (theirs.dtype, theirs.shape):
        row.state = f"is {facts.dtype} {facts.shape}, of the original {theirs.dtype} {theirs.shape}"
        return
    # A whole tensor is decoded once: the pieces are views of it.
    mine, whole = flat_bits(source.tensor(name)), flat_bits(other.tensor(name))
    reads = (lambda start, stop: mine[start:stop]), (lambda start, stop: whole[start:stop])
    if same_bits(*reads, facts.numel):
        return
    if mine.dtype != facts.dtype:  # torch has no values of these elements, bits alone
        row.state = "differs from the original"
        return
    found = difference(*reads, facts.numel)
    row.max_error, row.rms_error, row.rms_over_std = found
    if not facts.lossy:
        row.state = f"differs from the original (max {found.largest:.3g}, rms {found.rms:.3g})"


def _names_apart(source: Source, other: Source) -> list[Row]:
    rows = [Row(name, state="is not in the file") for name in other.names if name not in source.known]
    for name, of in source.aliases.items():
        row = Row(name, same_as=of, state="good")
        if name not in other.known:
            row.state = "is not in the original"
        elif other.aliases.get(name) != of:
            _compare(source, other, name, source.facts(of), row)
        rows.append(row)
    return rows


def _coded(
    source: Source, lazy: Lazy, options: dict[str, Any], min_numel: int, report: Report, bar: Bar
) -> Iterator[tuple[str, Tensor]]:
    """Blobs one by one, each with its row in the report."""
    lossless = bool(options.get("lossless"))
    pairs = _pairs(source, lazy, options, min_numel, bar)
    while True:
        begin = time.perf_counter()
        pair = next(pairs, None)
        if pair is None:
            return
        seconds = time.perf_counter() - begin
        name, blob = pair
        facts = facts_of_blob(blob)
        row = row_of(name, facts, seconds=seconds)
        if not lossless and facts.lossy:
            row.max_error, row.rms_error, row.rms_over_std = difference(
                lambda start, stop, blob=blob: decoded(blob, start=start, stop=stop),  # type: ignore[misc]
                lambda start, stop, name=name: lazy[name].reshape(-1)[start:stop],  # type: ignore[misc]
                facts.numel,
            )
        report.rows.append(row)
        bar.advance(facts.raw_bytes)
        yield name, blob
        del blob, pair  # before the next one is made


def _pairs(
    source: Source, lazy: Lazy, options: dict[str, Any], min_numel: int, bar: Bar
) -> Iterator[tuple[str, Tensor]]:
    if options.get("lossless"):
        for name in source.stored():
            bar.at(name)
            value, coded = lazy[name], source.coded(name)  # decoded in any case, which finds damage
            yield name, store_lossless("compress", name, value) if coded is None else coded
            del value, coded
        return
    patterns = options.get("exact", ())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in source.names):
            raise UsageError(f"--exact {pattern}: no tensor has such a name")
    if "max_bytes" in options:  # what a tensor gets depends on all others
        bar.at("planning")
        yield from named_blobs(lazy, min_numel, options, 2)
        return
    for name in source.stored():
        bar.at(name)
        mine = dict(options)
        if patterns:
            mine["exact"] = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        yield from named_blobs({name: lazy[name]}, min_numel, mine, 2)


def _as_stored(report: Report) -> None:
    """What does not get smaller, safetensors keeps as it is."""
    for row in report.rows:
        if row.dtype is not None and row.bytes >= row.raw_bytes and getattr(torch, row.dtype) in NAMES:
            row.kind, row.bytes = "plain", row.raw_bytes


def tied_in_place(
    source: Source, aliases: dict[str, str], entries: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The entries; ``aliases`` gets each further name when it comes, so that names keep their order in the file."""
    waiting = deque(source.names)
    for name, blob in entries:
        while waiting and waiting[0] != name:
            passed = waiting.popleft()
            if passed in source.aliases:
                aliases[passed] = source.aliases[passed]
        yield name, blob
        del blob
    aliases.update(source.aliases)


def weights_of(command: str, argument: str, stack: ExitStack) -> Source:
    """Open IN, which must hold weights; say what of it is left out."""
    source = open_source(argument, stack)
    if source.is_delta:
        raise UsageError(f"{source.shown} is a delta: `cfl-ops patch OLD DELTA OUT` applies it")
    if source.left_out:
        shown = ", ".join(source.left_out[:5]) + (", ..." if len(source.left_out) > 5 else "")
        say(command, f"warning: {source.shown} holds more than a state dict's tensors; left out: {shown}")
    return source


def row_of(name: str, facts: Facts, seconds: float | None = None) -> Row:
    """A row with what a header says."""
    if facts.kind == LEFT:  # a delta of a tensor that is gone: nothing that comes back
        return Row(name, kind=facts.kind, bytes=facts.nbytes, seconds=seconds)
    return Row(
        name,
        list(facts.shape),
        str(facts.dtype).removeprefix("torch."),
        facts.kind,
        facts.numel,
        facts.raw_bytes,
        facts.nbytes,
        facts.bits,
        facts.changed,
        seconds=seconds,
    )


def finish(report: Report, showing: Showing, started: float, size: int) -> None:
    """Tell what was done, on stderr."""
    report.facts |= {"seconds": time.perf_counter() - started, "output_bytes": size}
    report.write_json(showing.json)
    if showing.picture is not None:
        draw(showing.picture, report.rows, _title(report))
    if showing.quiet:
        return
    console = stderr_console()
    if showing.table:
        report.print_table(console)
    name = "stdout" if report.facts["output"] == STDOUT else report.facts["output"]
    line = f"{name}: {report.totals_line()}, {human(size)} written"
    console.print(printable(line), highlight=False, soft_wrap=True, markup=False)


def _title(report: Report) -> str:
    totals = report.totals()
    bits = totals["bits_per_parameter"]
    return f"{report.facts.get('output', report.facts['input'])}: {0 if bits is None else bits:.3f} bits a parameter"


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def bytes_of(text: str, option: str, whole: int | None = None) -> int:
    """``100MB``, ``1.5GiB``, or ``40%`` of the whole."""
    word = text.strip().lower()
    digits = word.rstrip("kmgtib% ")
    unit = word[len(digits) :].strip()
    try:
        value = float(digits)
    except ValueError:
        value = -1.0
    known = unit in _UNITS or (unit == "%" and whole is not None)
    if not known or not 0 < value < 1e30:
        example = "100MB, 1.5GiB or 40%" if whole is not None else "100MB or 1.5GiB"
        raise UsageError(f"{option} {text}: must be a size such as {example}")
    return int(value * whole / 100) if unit == "%" and whole is not None else int(value * _UNITS[unit])


def _shard(text: str | None) -> int | None:
    return None if text is None else bytes_of(text, "--max-shard")
