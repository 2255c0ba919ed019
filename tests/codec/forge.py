"""Forged headers: a field of a payload, a blob or a file set to what no writer writes, and the checksums repaired.

Run as a module this is the test's other process (tests/codec/test_forged.py): a reader that aborts, or that
allocates what a header promises, takes only this one along.
"""

from __future__ import annotations

import itertools
import math
import random
import resource
import struct
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cfl_ops
import torch
from cfl_ops import CorruptDataError
from cfl_ops.ops.codec.reference.header import as_bytes, from_bytes

from tests.codec.file_helpers import first_version

EXTREMES = (
    *(0, 1, 2, 3, 7, 8, 9, 16, 17, 63, 64, 65, 71, 255, 256, 257, 65_535, 65_536, 2**20, 2**31 - 1, 2**31),
    *(
        2**32 - 1,
        2**32,
        2**40,
        2**40 + 1,
        2**60,
        2**61,
        2**62,
        2**63 - 1,
        2**63,
        2**63 + 1,
        2**64 - 8,
        2**64 - 1,
    ),
)
MEMORY = 2 << 30
"""Bytes that the reader may take beyond those that it has when it begins."""

Field = tuple[str, int, str]
PAYLOAD: tuple[Field, ...] = (
    *(("version", 4, "B"), ("layout", 5, "B"), ("symbol bytes", 6, "B"), ("chunk log2", 7, "B")),
    *(("symbols", 8, "Q"), ("total", 16, "Q"), ("alphabet", 24, "I"), ("dims", 28, "I"), ("table", 32, "I")),
)
BLOB: tuple[Field, ...] = (
    *(("version", 4, "B"), ("kind", 5, "B"), ("dtype", 6, "B"), ("bits", 7, "B"), ("total", 8, "Q")),
    *(
        ("group", 16, "Q"),
        ("groups", 24, "Q"),
        ("exceptions", 32, "Q"),
        ("entropy", 40, "Q"),
        ("flags", 48, "I"),
    ),
)
FIRST_FILE: tuple[Field, ...] = (
    *(("version", 4, "I"), ("total", 8, "Q"), ("entries", 16, "I"), ("index", 20, "I")),
    *(("size", 28, "Q"), ("name", 36, "I")),
)
ITEMSIZE = (2, 2, 4, 8, 1, 1, 1, 2, 4, 8, 2, 4, 8, 8, 16, 1, 1, 4)


def repair_payload(data: bytearray) -> None:
    """The header's checksum, over the bytes that the (forged) header says it has, as far as they are there."""
    (numel,), (dims, table) = struct.unpack_from("<Q", data, 8), struct.unpack_from("<II", data, 28)
    head = min(len(data), 40 + 8 * dims + table + 8 * -(-numel >> data[7]))
    struct.pack_into("<I", data, 36, zlib.crc32(data[40:head], zlib.crc32(data[:36])))


def repair_blob(data: bytearray) -> None:
    """As above; and of a raw blob the checksum of its data."""
    kind, dtype = data[5], data[6]
    group, groups, exceptions = struct.unpack_from("<QQQ", data, 16)
    element = ITEMSIZE[dtype % len(ITEMSIZE)]
    tables = {0: 8 * group, 2: group * element}
    head = 56 + tables.get(kind, 2 * groups * element + exceptions * (8 + element))
    head = min(len(data), head)
    if kind == 0:
        struct.pack_into("<I", data, 48, zlib.crc32(data[head:]))
    struct.pack_into("<I", data, 52, zlib.crc32(data[56:head], zlib.crc32(data[:52])))


def repair_first_file(data: bytearray) -> None:
    """As above, of version 1 of a file; the blobs have checksums of their own."""
    (index,) = struct.unpack_from("<I", data, 20)
    struct.pack_into("<I", data, 24, zlib.crc32(data[28 : 28 + index], zlib.crc32(data[:24])))


def fields_of_file(data: bytes) -> tuple[Field, ...]:
    """Those of version 2: of the head, of the first entry, of the footer."""
    end = len(data) - 28
    entry = end - struct.unpack_from("<Q", data, end)[0]
    return (
        *(("version", 4, "I"), ("reserved", 8, "Q"), ("size", entry, "Q"), ("checksum", entry + 8, "I")),
        *(
            ("alias", entry + 12, "I"),
            ("name", entry + 16, "I"),
            ("index", end, "Q"),
            ("total", end + 8, "Q"),
        ),
        ("entries", end + 16, "I"),
    )


def repair_file(data: bytearray) -> None:
    """The checksum of version 2."""
    end = len(data) - 28
    start = max(16, end - struct.unpack_from("<Q", data, end)[0])
    checksum = zlib.crc32(data[end : end + 20], zlib.crc32(data[start:end], zlib.crc32(data[:16])))
    struct.pack_into("<I", data, end + 20, checksum)


def forged(
    data: bytes, fields: tuple[Field, ...], repair: Callable[[bytearray], None], pairs: int
) -> Iterator[tuple[str, bytes]]:
    """Each field at each extreme; and ``pairs`` times two of them at once."""
    single = [(field, value) for field in fields for value in EXTREMES]
    generator = random.Random(0)
    double = [tuple(generator.sample(single, 2)) for _ in range(pairs)]
    for changes in itertools.chain(((change,) for change in single), double):
        out = bytearray(data)
        for (_, at, kind), value in changes:
            if at + struct.calcsize(kind) <= len(out):
                struct.pack_into("<" + kind, out, at, value % 256 ** struct.calcsize(kind))
        repair(out)
        yield ", ".join(f"{name} = {value}" for (name, _, _), value in changes), bytes(out)


def payload(shape: tuple[int, ...], symbols: int = 0) -> bytes:
    """A payload of ``symbols`` ones, with any shape that its header can be given."""
    table = bytes([13, 7 << 4]) if symbols else b""  # the lengths 0 (as 13, 0, 0) and 1 (as 6 + 1)
    rest = struct.pack(f"<{len(shape)}Q", *shape) + table + bytes(8 * -(-symbols >> 20))
    head = struct.pack("<4s4B", b"CFLH", 1, 1, 1, 20)
    head += struct.pack("<QQIII", symbols, 40 + len(rest), 2 if symbols else 0, len(shape), len(table))
    return head + struct.pack("<I", zlib.crc32(rest, zlib.crc32(head))) + rest


def quantised(inner: bytes, group: int, groups: int, kept: tuple[int, ...] = ()) -> bytes:
    """A blob of float32 weights in 4 bits around a payload."""
    table = struct.pack(f"<{len(kept)}q", *kept)
    table += struct.pack(
        f"<{2 * groups + len(kept)}f", *[0.0] * groups, *[1.0] * groups, *[math.inf] * len(kept)
    )
    total = 56 + len(table) + len(inner)
    head = struct.pack("<4s4BQQQQdI", b"CFLC", 1, 1, 2, 4, total, group, groups, len(kept), math.nan, 0)
    return head + struct.pack("<I", zlib.crc32(table, zlib.crc32(head))) + table + inner


def raw(shape: tuple[int, ...], data: bytes, dtype: int) -> bytes:
    """A blob that keeps its bytes."""
    table = struct.pack(f"<{len(shape)}Q", *shape)
    total = 56 + len(table) + len(data)
    fixed = (b"CFLC", 1, 0, dtype, 0, total, len(shape), len(data), 0, 0.0, zlib.crc32(data))
    head = struct.pack("<4s4BQQQQdI", *fixed)
    return head + struct.pack("<I", zlib.crc32(table, zlib.crc32(head))) + table + data


SHAPES = (
    *((0, 2**62, 2**62), (2**62, 2**62, 0), (2**40, 2**40, 0, 2**40), (0, 2**63), (2**64 - 1, 0)),
    *(
        (0,) * 65,
        (1,) * 65,
        (1,) * 71,
        (2**32, 2**32),
        (2**63, 2),
        (2**64 - 1, 2**64 - 1),
        (2**40,),
        (2**40, 2**20),
    ),
)
"""No tensor has them, or their product is 0 or 1 in 64 bits, or they promise what is not there."""


def payloads() -> Iterator[tuple[str, bytes]]:
    """Forged payloads."""
    generator = torch.Generator().manual_seed(0)
    samples = {
        "uint8": torch.randint(0, 9, (3, 700), generator=generator).to(torch.uint8),
        "uint16": torch.randint(0, 3000, (2100,), generator=generator).to(torch.uint16),
        "empty": torch.empty(3, 0, dtype=torch.uint8),
        "one symbol": torch.ones(1500, dtype=torch.uint8),
    }
    for name, symbols in samples.items():
        data = as_bytes(cfl_ops.huffman_encode(symbols))
        dims = tuple((f"extent {d}", 40 + 8 * d, "Q") for d in range(symbols.ndim))
        for what, bad in forged(data, PAYLOAD + dims, repair_payload, 60):
            yield f"payload of {name}, {what}", bad
    for shape in SHAPES:
        for numel in (0, 1, 2**40):
            yield f"payload of shape {shape} and {numel} symbols", payload(shape, min(numel, 1))
            tiny = bytearray(payload(shape, min(numel, 1)))
            struct.pack_into("<Q", tiny, 8, numel)
            repair_payload(tiny)
            yield f"payload of shape {shape} that promises {numel} symbols", bytes(tiny)


def blobs() -> Iterator[tuple[str, bytes]]:
    """Forged blobs, and blobs around forged payloads."""
    generator = torch.Generator().manual_seed(14)
    w = torch.randn(5, 8, generator=generator)
    kept = w.clone()
    kept[1, 2], kept[4, 4] = math.inf, math.nan
    samples = {
        "quantised": cfl_ops.compress(w, bits=4, max_error=1),
        "16 bits": cfl_ops.compress(torch.randn(300, generator=generator).double(), bits=9),
        "zero bins": cfl_ops.compress(w, bits=4, per="row", zero="exact", max_error=1),
        "palette": cfl_ops.compress((torch.arange(300) % 3).half()),
        "rows": cfl_ops.compress(w, bits=4, per="row", max_error=1),
        "blocks": cfl_ops.compress(
            torch.randn(400, generator=generator).half(), bits=4, per="block", block_size=70, max_error=1
        ),
        "kept": cfl_ops.compress(kept, bits=4, nonfinite="keep", max_error=1),
        "raw": cfl_ops.compress_state_dict({"w": w})["w"],
        "raw flags": cfl_ops.compress_state_dict({"w": w > 0})["w"],
        "nothing": cfl_ops.compress(torch.empty(0, 3)),
    }
    kinds = {"quantised": 1, "16 bits": 1, "rows": 1, "blocks": 1, "kept": 1, "zero bins": 1, "palette": 2}
    for name, blob in samples.items():
        assert blob[5] == kinds.get(name, 0), name
        table = tuple((f"table {i}", 56 + 8 * i, "Q") for i in range(3))
        for what, bad in forged(as_bytes(blob), BLOB + table, repair_blob, 100):
            yield f"blob {name}, {what}", bad
    for what, bad in payloads():
        yield f"blob around {what}", quantised(bad, 2100, 1)
    for shape in SHAPES:
        yield f"raw blob of shape {shape}", raw(shape, b"", 3)
        yield f"raw blob of shape {shape} and 4 bytes", raw(shape, bytes(4), 2)
    for group, groups in itertools.product(EXTREMES, (0, 1, 2)):
        yield f"{groups} groups of {group}, no weights", quantised(payload((0,)), group, groups)
        yield f"{groups} groups of {group}", quantised(payload((9,), 9), group, groups)
    for where in ((0,), (8,), (9,), (-1,), (2**63 - 1,), (-(2**63),), (3, 3), (5, 2), tuple(range(10))):
        yield f"exceptions at {where}", quantised(payload((9,), 9), 9, 1, where)
    for used in (1, 2, 256, 257, 2**40):
        inner = payload((300,), 300)  # of ones
        table = bytes(4 * min(used, 300))
        fixed = (b"CFLC", 2, 2, 2, 0, 56 + len(table) + len(inner), used, 0, 0, 0.0, 0)
        head = struct.pack("<4s4BQQQQdI", *fixed)
        yield (
            f"palette of {used} for symbols of 1",
            head + struct.pack("<I", zlib.crc32(table, zlib.crc32(head))) + table + inner,
        )
    yield "flags that are 2", raw((4,), b"\0\1\2\1", 4)


def files() -> Iterator[tuple[str, bytes]]:
    """Forged files of both versions, and files of forged blobs."""
    state = {"a": torch.randn(20), "b": torch.randn(40)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.cflz"
        cfl_ops.save_file(state, path, bits=3, min_numel=30, max_error=1)
        data = path.read_bytes()
    first = first_version(cfl_ops.compress_state_dict(state, bits=3, min_numel=30, max_error=1))
    yield from ((f"file, {what}", bad) for what, bad in forged(data, fields_of_file(data), repair_file, 100))
    for what, bad in forged(first, FIRST_FILE, repair_first_file, 100):
        yield f"file of version 1, {what}", bad
    for what, blob in blobs():
        yield f"file of a {what}", first_version({"w": from_bytes(blob)})


def read_file(data: torch.Tensor) -> None:
    """load_file of these bytes."""
    with tempfile.NamedTemporaryFile(suffix=".cflz") as file:
        file.write(as_bytes(data))
        file.flush()
        cfl_ops.load_file(file.name)


def main() -> None:
    """Reads all of them; prints how many were refused and how many were read, or what else came."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    refused, read, wrong = 0, 0, []
    kinds = ((payloads, cfl_ops.huffman_decode), (blobs, cfl_ops.decompress), (files, read_file))
    for make, reader in kinds:
        for what, data in make():
            try:
                reader(from_bytes(data))  # type: ignore[operator]
                read += 1
            except CorruptDataError:
                refused += 1
            except Exception as error:
                wrong.append(f"{what}: {type(error).__name__}: {str(error).splitlines()[:1]}")
    print(refused, read, len(wrong))
    print("\n".join(wrong[:20]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
