"""Mutated deltas with their checksums repaired, into apply_delta and apply_delta_.

``python -m tests.fuzz.deltas --runs N [--seed S]``. Only CorruptDataError, WrongBaseError and ValueError may come
back, the base must be as it was, and what is taken for sound must lead to the result whose fingerprint the delta
has. A failure prints the seed and the number of its run, for ``--reproduce SEED:RUN``.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import zlib
from collections.abc import Iterator

import cfl_ops
import torch
from cfl_ops import CorruptDataError, WrongBaseError
from cfl_ops._core import dispatch
from cfl_ops.ops.codec.delta import describe_delta
from cfl_ops.ops.codec.fingerprint import fingerprint_of
from torch import Tensor

HEAD, TABLE_AT, DATA_CRC, HEAD_CRC = 52, 40, 44, 48


def samples() -> Iterator[tuple[bytes, Tensor]]:
    """Deltas of all kinds, and their bases."""
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.uint8):
        old = (torch.randn(4000, generator=generator) * (0.02 if dtype.is_floating_point else 50)).to(dtype)
        size = old.element_size()
        for every, step in ((400, 1), (9, 3), (1, 1)):
            new = old.clone()
            new.view(torch.uint8).view(-1, size)[::every, 0] += step
            for effort in ("fast", "small"):
                yield bytes(cfl_ops.compress_delta(new, old, effort=effort).tolist()), old
        yield bytes(cfl_ops.compress_delta(old, old).tolist()), old
        yield bytes(cfl_ops.compress_delta(torch.zeros_like(old), old).tolist()), old
    flags = torch.arange(300) % 7 == 0
    yield bytes(cfl_ops.compress_delta(~flags.view(3, 100), flags.view(3, 100)).tolist()), flags.view(3, 100)
    z = torch.randn(50, dtype=torch.complex64, generator=generator)
    yield bytes(cfl_ops.compress_delta(z + 1, z).tolist()), z
    # Steps that depend on the exponent, so that there are classes.
    old = (torch.randn(60_000, generator=generator) * 0.02).bfloat16()
    new = (old.double() + 4e-6 * torch.randn(60_000, generator=generator).double()).bfloat16()
    yield bytes(cfl_ops.compress_delta(new, old, effort="small").tolist()), old


def repair(data: bytearray) -> None:
    """Make length and checksums fit what the header says, where there is room for that."""
    if len(data) < HEAD:
        return
    struct.pack_into("<Q", data, 8, len(data))
    (table,) = struct.unpack_from("<I", data, TABLE_AT)
    end = min(len(data), HEAD + table)
    # How much behind the table is stored is in the table: try what makes the reader go on.
    struct.pack_into("<I", data, HEAD_CRC, zlib.crc32(data[HEAD:end], zlib.crc32(data[:HEAD_CRC])))
    stored = _stored(data)
    if stored is not None:
        struct.pack_into("<I", data, DATA_CRC, zlib.crc32(data[end : end + stored]))
        struct.pack_into("<I", data, HEAD_CRC, zlib.crc32(data[HEAD:end], zlib.crc32(data[:HEAD_CRC])))


def _stored(data: bytearray) -> int | None:
    """How many bytes behind the table have their checksum in the header; None where the table makes no sense."""
    from cfl_ops.ops.codec.delta_format import _parse

    try:
        _, (begin, end, _) = _parse("fuzz", torch.frombuffer(data, dtype=torch.uint8))
    except CorruptDataError:
        return None
    return end - begin


def mutated(rng: random.Random, data: bytes) -> bytearray:
    """A few bytes changed, mostly in the head, and sometimes some cut out or put in."""
    out = bytearray(data)
    (table,) = struct.unpack_from("<I", data, TABLE_AT)
    for _ in range(rng.randrange(1, 5)):
        where = rng.randrange(3)
        limit = (HEAD, HEAD + table, len(out))[where]
        at = rng.randrange((0, min(HEAD, len(out) - 1), 0)[where], max(min(limit, len(out)), 1))
        if rng.random() < 0.5:
            out[at] ^= 1 << rng.randrange(8)
        else:
            out[at] = rng.choice((0, 1, 2, 3, 127, 128, 254, 255, rng.randrange(256)))
    if rng.random() < 0.1:
        at, n = rng.randrange(len(out)), rng.randrange(1, 20)
        if rng.random() < 0.5:
            del out[at : at + n]
        else:
            out[at:at] = rng.randbytes(n)
    return out


def one(rng: random.Random, made: list[tuple[bytes, Tensor]]) -> str:
    """One run: what came of it."""
    data, old = rng.choice(made)
    bad = mutated(rng, data)
    if rng.random() < 0.9:
        repair(bad)
    delta = torch.frombuffer(bad, dtype=torch.uint8) if bad else torch.empty(0, dtype=torch.uint8)
    base = old.clone()
    try:
        found = cfl_ops.apply_delta(base, delta)
    except (CorruptDataError, WrongBaseError, ValueError) as error:
        kind = type(error).__name__
        if not _same(base, old):
            raise AssertionError("the base was changed") from error
    else:
        kind = "read"
        if fingerprint_of(found) != describe_delta(delta).result:
            raise AssertionError("a wrong result")
    try:
        cfl_ops.apply_delta_(base, delta)
    except (CorruptDataError, WrongBaseError, ValueError) as error:
        if not _same(base, old):
            raise AssertionError("the base was changed in place by a delta that was refused") from error
    else:
        if kind != "read" or not _same(base, found):
            raise AssertionError("apply_delta_ took what apply_delta did not, or otherwise")
    return kind


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def main() -> None:
    """Run so many, on the extension's kernels and every tenth in Python."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reproduce", help="SEED:RUN")
    options = parser.parse_args()
    torch.set_num_threads(1)
    made = list(samples())
    runs = range(options.runs)
    if options.reproduce:
        options.seed, run = map(int, options.reproduce.split(":"))
        runs = range(run, run + 1)
    outcomes: dict[str, int] = {}
    for run in runs:
        dispatch.overrides.install("python" if run % 10 == 9 else None)
        try:
            kind = one(random.Random(f"{options.seed}:{run}"), made)
        except BaseException:
            print(f"python -m tests.fuzz.deltas --reproduce {options.seed}:{run}", file=sys.stderr)
            raise
        outcomes[kind] = outcomes.get(kind, 0) + 1
    print(
        f"{len(runs)} mutated deltas:",
        ", ".join(f"{count} {kind}" for kind, count in sorted(outcomes.items())),
    )


if __name__ == "__main__":
    main()
