"""What the tests of files share: state dicts of hard tensors, files of the first version, damage."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from cfl_ops.ops.codec.layout import NOT_COPIED
from cfl_ops.ops.codec.reference.header import as_bytes
from torch import Tensor

from tests.codec.helpers import same

WIDE = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8),
    *(torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.complex64),
    *(torch.complex32, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz),
    *(torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.float4_e2m1fn_x2),
)
NARROW = (torch.int1, torch.int4, torch.uint2, torch.uint7, torch.bits8, torch.bits16)


def of_bits(dtype: torch.dtype, count: int, seed: int = 0) -> Tensor:
    """Elements of any bits: NaN with payloads, infinities, denormals, -0.0 among them."""
    g = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=g).bool()
    data = torch.randint(0, 256, (count * dtype.itemsize,), generator=g, dtype=torch.uint8)
    return data.view(dtype)


def hard_state(dtypes: tuple[torch.dtype, ...] = WIDE + NARROW) -> dict[str, Tensor]:
    """Every dtype, shape, stride and name that may come."""
    state = {f"all.{dtype}": of_bits(dtype, 60) for dtype in dtypes}
    state |= {f"strided.{dtype}": of_bits(dtype, 60).view(6, 10).t() for dtype in dtypes}
    base = torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-45, -1e-40, 3e38] * 50)
    state |= {
        "0-d": torch.tensor(3.5),
        "0-d integer": torch.tensor(7),
        "one": torch.tensor([1.5], dtype=torch.bfloat16),
        "nothing": torch.empty(0, 5),
        "nothing huge": torch.empty(0, 2**40, dtype=torch.bfloat16),
        "special": special,
        "weights": (base * 0.02).bfloat16(),
        "transposed": base.t(),
        "strided": base[::2, 1::3],
        "expanded": base[:1].expand(40, 30),
        "conjugated": torch.complex(base, base).conj(),
        "parameter": torch.nn.Parameter(base + 1),
        "../up": base[0],
        "/absolute": base[1] + 1,
        'a\0b\nc\\d"e': base[2] + 2,
        "ünïcode/名": torch.arange(5),
        "": base[3] + 3,
    }
    return state


def equal_states(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> bool:
    """The same names and the same bits."""

    def dense(value: Tensor) -> Tensor:
        value = value.detach().resolve_conj().resolve_neg()
        if value.dtype not in NOT_COPIED:
            return value
        return value.view(torch.uint8 if value.itemsize == 1 else torch.int16)

    return got.keys() == want.keys() and all(
        got[name].dtype == want[name].dtype and same(dense(got[name]), dense(want[name])) for name in want
    )


def first_version(blobs: Mapping[str, Tensor]) -> bytes:
    """A .cflz file as the first version of save_file wrote it."""
    index = b""
    for name, blob in blobs.items():
        index += struct.pack("<QI", blob.numel(), len(name.encode())) + name.encode()
    total = 28 + len(index) + sum(map(len, blobs.values()))
    head = struct.pack("<4sIQII", b"CFLZ", 1, total, len(blobs), len(index))
    head += struct.pack("<I", zlib.crc32(index, zlib.crc32(head)))
    return head + index + b"".join(map(as_bytes, blobs.values()))


def parts(data: bytes) -> tuple[bytes, bytes, int]:
    """Of a .cflz of version 2 the blobs, the index and the number of entries."""
    index_bytes, _, count = struct.unpack("<QQI", data[-28:-8])
    return data[16 : -28 - index_bytes], data[-28 - index_bytes : -28], count


def second_version(
    body: bytes, index: bytes, count: int, *, version: int = 2, reserved: int = 0, total: int | None = None
) -> bytes:
    """A .cflz of these parts, with the right checksum."""
    head = struct.pack("<4sIQ", b"CFLZ", version, reserved)
    size = 16 + len(body) + len(index) + 28
    fields = struct.pack("<QQI", len(index), size if total is None else total, count)
    checksum = zlib.crc32(fields, zlib.crc32(index, zlib.crc32(head)))
    return head + body + index + fields + struct.pack("<I4s", checksum, b"CFLE")


def safetensors_bytes(header: object, body: bytes = b"") -> bytes:
    """A .safetensors file of any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def damaged(path: Path) -> Iterator[bytes]:
    """Two bits of every byte flipped (all in turn), every cut, some extensions."""
    data = path.read_bytes()
    for i in range(len(data)):
        for bit in (i % 8, (3 * i + 4) % 8):
            out = bytearray(data)
            out[i] ^= 1 << bit
            yield bytes(out)
    for size in range(len(data)):
        yield data[:size]
    for extra in (1, 2, 7, 8, 100):
        yield data + bytes(extra)
        yield data + data[:extra]


def overwrite(path: Path, data: bytes) -> None:
    """Without the wait for the disk that some file systems put behind a file that was emptied first."""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.write(data)
        file.truncate()


def opened(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What the library of that name sees."""
    safetensors = pytest.importorskip("safetensors")
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def blob_bytes(stored: Tensor) -> int:
    """Of a tensor of a safetensors file what is not padding."""
    return int(struct.unpack("<Q", bytes(stored[8:16].tolist()))[0])
