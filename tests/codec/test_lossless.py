"""Lossless blobs: every bit of every dtype comes back, the same bytes everywhere, and no damage goes unseen."""

from __future__ import annotations

import itertools
import math
import mmap
import struct
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import cfl_ops
import numpy as np
import pytest
import torch
from cfl_ops import CorruptDataError
from cfl_ops.ops.codec import blob_reader, layout, planes
from cfl_ops.ops.codec.blob import describe, store_lossless
from cfl_ops.ops.codec.layout import CHUNK, DTYPES, MAX_TABLES, pack_shape, unpack_shape
from cfl_ops.ops.codec.reference.header import as_bytes, from_bytes
from cfl_ops.ops.codec.reference.tables import choose, look_counts
from torch import Tensor

from tests.codec.helpers import (
    DATA,
    EXHAUSTIVE,
    cuts_and_extensions,
    flips,
    golden_lossless,
    lossless_sample,
    same,
)

ROTATED = tuple(dtype for dtype in DTYPES if dtype.is_floating_point)
HARD = {  # by the bytes of a lane: bit patterns of NaN payloads, infinities, zeros, denormals, and random ones
    2: (
        0x7E01,
        0xFE01,
        0x7C01,
        0x7F81,
        0xFFC3,
        0x7C00,
        0xFC00,
        0x7F80,
        0xFF80,
        0x8000,
        1,
        0x8001,
        0x3FF,
        0x7F,
    ),
    4: (0x7FC00001, 0xFFC12345, 0x7F800001, 0x7F800000, 0xFF800000, 0x80000000, 1, 0x80000001, 0x7FFFFF),
    8: (
        0x7FF8000000000001,
        0xFFF8123456789ABC,
        0x7FF0000000000001,
        0x7FF << 52,
        0xFFF << 52,
        1 << 63,
        1,
        2**52 - 1,
    ),
    1: (*range(256), *(0x80, 1, 0xFF, 0x7F) * 40),
}


def as_dtype(raw: Tensor, dtype: torch.dtype) -> Tensor:
    return (raw & 1 if dtype == torch.bool else raw).view(dtype)


def pack(words: list[int], width: int) -> Tensor:
    return from_bytes(b"".join(word.to_bytes(width, "little") for word in words))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_for_bit(backend: str, dtype: torch.dtype) -> None:
    for n in (1, 2, 63, 300, CHUNK, CHUNK + 1, 2 * CHUNK + 77):
        w = lossless_sample(dtype, n)
        before, version = w.view(torch.uint8).clone(), w._version
        blob = cfl_ops.compress(w, lossless=True)
        assert same(w.view(torch.uint8), before)
        assert w._version == version
        assert same(cfl_ops.decompress(blob), w)
        out = as_dtype(torch.ones(n * dtype.itemsize, dtype=torch.uint8), dtype)
        assert cfl_ops.decompress(blob, out) is out
        assert same(out, w)
        spans = [(0, n), (n // 3, n - n // 4), (n, n), (n - 1, n)]
        for start, stop in spans + [(CHUNK - 1, CHUNK + 1)] * (n > CHUNK):
            assert same(cfl_ops.decompress(blob, start=start, stop=stop), w[start:stop])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_pattern_of_bits_comes_back(backend: str, dtype: torch.dtype) -> None:
    width = layout.lanes(DTYPES.index(dtype)).width
    generator = torch.Generator().manual_seed(1)
    raw = torch.cat(
        [
            pack(list(HARD[width]) * 60, width),  # which repeat, so that they are coded
            torch.randint(0, 256, (40 * width,), generator=generator).to(torch.uint8),
        ]
    )
    w = as_dtype(raw[: len(raw) // dtype.itemsize * dtype.itemsize], dtype)
    blob = cfl_ops.compress(w, lossless=True)
    assert describe(blob).kind == "lossless"
    assert same(cfl_ops.decompress(blob), w)


@pytest.mark.parametrize("dtype", ROTATED)
def test_split_and_join_are_inverse(dtype: torch.dtype) -> None:
    cut = layout.lanes(DTYPES.index(dtype))
    data = torch.randint(0, 256, (4096 * cut.width,), dtype=torch.uint8)
    parts = planes.split(data, cut)
    assert same(planes.join(parts, cut), data)
    if cut.width > 1:  # the exponent is in the first plane, the sign the lowest bit of the last
        signs = data.view(-1, cut.width)[:, -1] >> 7
        assert same(parts[-1] & 1, signs)
    if dtype == torch.float64:
        usual = planes.split((torch.randn(100, dtype=torch.float64) * 0.02).view(torch.uint8), cut)
        assert int((usual[1] >> 5).max()) == 0


def test_all_backends_write_the_same_bytes(backend: str) -> None:
    for dtype in DTYPES:
        for n in (5, 400, 3 * CHUNK + 1000):
            w = lossless_sample(dtype, n)
            blob = cfl_ops.compress(w, lossless=True)
            want = planes.encode(w.view(torch.uint8), DTYPES.index(dtype), [n])
            assert same(blob, want) if want.numel() else describe(blob).kind == "raw"


def many_tables(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    scale = torch.exp2((torch.arange(n) // CHUNK % 5).double() * 2)
    w = torch.randn(n, generator=generator, dtype=torch.float64) * scale
    mixed = w.float()
    mixed[n // 2 :] = w[n // 2 :].bfloat16().float()  # whose low planes are zero, and so are coded
    return mixed


def test_tables_are_shared_by_chunks_that_are_alike(backend: str) -> None:
    w = many_tables(11 * CHUNK - 5)
    blob = cfl_ops.compress(w, lossless=True)
    head = planes.parse(blob)
    assert len(set(head.maps[0])) >= 4
    assert 0 in head.maps[3]
    assert 1 in head.maps[3]
    assert same(cfl_ops.decompress(blob), w)
    for start, stop in ((3 * CHUNK - 7, 8 * CHUNK + 5), (10 * CHUNK, 11 * CHUNK - 5), (6 * CHUNK, 7 * CHUNK)):
        assert same(cfl_ops.decompress(blob, start=start, stop=stop), w[start:stop])
    one = sum(
        cfl_ops.huffman_encode(planes.split(w.view(torch.uint8), layout.lanes(2))[0]).numel() for _ in "1"
    )
    assert sum(head.sizes[0]) < 0.95 * one


def test_the_same_normal_numbers_need_one_table() -> None:
    w = (torch.randn(12 * CHUNK, generator=torch.Generator().manual_seed(4)) * 0.02).bfloat16()
    blob = cfl_ops.compress(w, lossless=True)
    assert set(planes.parse(blob).maps[0]) == {1}
    assert 2 * w.numel() / blob.numel() > 1.505


def test_choose_keeps_to_its_limits() -> None:
    generator = torch.Generator().manual_seed(5)
    n = 40 * CHUNK
    level = torch.arange(n) // CHUNK * 6
    plane = (level + torch.randint(0, 4, (n,), generator=generator)).to(torch.uint8)
    tables = choose(look_counts(plane, True), n)
    assert 1 < len(tables) <= MAX_TABLES
    assert sorted(itertools.chain(*tables)) == list(range(40))
    noise = torch.randint(0, 256, (n,), generator=generator).to(torch.uint8)
    assert choose(look_counts(noise, False), n) == []


def test_threads_do_not_change_the_bytes() -> None:
    w = many_tables(20 * CHUNK + 99)
    before = torch.get_num_threads()
    try:
        blobs = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            blob = cfl_ops.compress(w, lossless=True)
            assert same(cfl_ops.decompress(blob), w)
            assert same(cfl_ops.decompress(blob, start=CHUNK + 5, stop=19 * CHUNK), w[CHUNK + 5 : 19 * CHUNK])
            blobs.append(blob)
        assert all(same(blob, blobs[0]) for blob in blobs)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.complex64])
def test_out_at_each_alignment_within_the_caches_and_beyond(backend: str, dtype: torch.dtype) -> None:
    n = 600_000 if backend.startswith("isa") else 70_000
    w = lossless_sample(dtype, n)
    blob = cfl_ops.compress(w, lossless=True)
    for shift, start, stop in (
        (0, 0, n),
        (1, 0, n),
        (3, 5, n - 7),
        (15, CHUNK, 2 * CHUNK),
        (7, 32_000, 66_000),
    ):
        buffer = as_dtype(torch.full(((n + 40) * dtype.itemsize,), 7, dtype=torch.uint8), dtype)
        kept = buffer.clone()
        out = buffer[shift : shift + stop - start]
        cfl_ops.decompress(blob, out, start=start, stop=stop)
        assert same(out, w[start:stop])
        assert same(buffer[:shift], kept[:shift])
        assert same(buffer[shift + stop - start :], kept[shift + stop - start :])


def test_shapes_and_strides(backend: str) -> None:
    base = lossless_sample(torch.float32, 6 * 8 * 10)
    deep = base.view((1,) * 61 + (6, 8, 10))
    for w in (
        *(torch.tensor(1.5), torch.tensor(math.nan).double(), torch.empty(0), torch.empty(3, 0, 2)),
        *(torch.empty(0, 2**40), torch.zeros(1, 1, 1)),
        *(base.view(6, 8, 10).permute(2, 0, 1), base.view(6, 80)[:, ::3], base[:1].expand(5, 1)),
        *(deep, deep[..., ::2], torch.zeros((1,) * 64), torch.rand((1,) * 62 + (3, 7))),
        *(torch.complex(base, base).view(20, 24).conj(), torch.complex(base, base).conj().imag, base.flip(0)),
    ):  # fmt: skip
        blob = cfl_ops.compress(w, lossless=True)
        back = cfl_ops.decompress(blob)
        assert same(back, w.resolve_conj().resolve_neg())
        assert blob.numel() <= w.numel() * w.element_size() + 160
        assert describe(blob)[1:5] == (w.dtype, tuple(w.shape), w.numel(), blob.numel())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_blob_is_at_most_160_bytes_larger(backend: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    for n in (0, 1, 3, 17, 200, 1000, 40_000):
        w = as_dtype(torch.randint(0, 256, (n * dtype.itemsize,), generator=generator).to(torch.uint8), dtype)
        for dims in (0, 12, 13, 63):
            shaped = w.view((1,) * dims + (n,))
            blob = store_lossless("test", "w", shaped)
            assert blob.numel() <= n * dtype.itemsize + 160
            assert same(cfl_ops.decompress(blob), shaped)
    worst = torch.empty(0, dtype=dtype).view((128,) * 8 + (0,) + (1,) * 55)
    blob = store_lossless("test", "w", worst)
    assert blob.numel() <= 160
    assert cfl_ops.decompress(blob).shape == worst.shape


def test_memory_that_cannot_be_written_is_read(backend: str) -> None:
    w = lossless_sample(torch.float32, 5000)
    blob = cfl_ops.compress(w, lossless=True)
    with tempfile.TemporaryFile() as file:
        file.write(as_bytes(w.view(torch.uint8)) + as_bytes(blob))
        file.flush()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as memory:
            array = np.frombuffer(memory, dtype=np.uint8)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # which says that it cannot be written to
                raw = torch.from_numpy(array)
            assert same(cfl_ops.compress(raw[:20_000].view(torch.float32), lossless=True), blob)
            assert same(cfl_ops.decompress(raw[20_000:]), w)
            del raw, array


def test_gradients_and_inference_mode(backend: str) -> None:
    w = torch.nn.Parameter(lossless_sample(torch.float32, 500))
    blob = cfl_ops.compress(w, lossless=True)
    assert not blob.requires_grad
    parameter = torch.nn.Parameter(torch.zeros(500))
    with pytest.raises(RuntimeError, match="decompress: out requires grad"):
        cfl_ops.decompress(blob, parameter)
    with torch.no_grad():
        version = parameter._version
        assert cfl_ops.decompress(blob, parameter) is parameter
        assert parameter._version > version
    assert same(parameter.detach(), w.detach())
    with torch.inference_mode():
        assert same(cfl_ops.decompress(cfl_ops.compress(w, lossless=True)), w.detach())


def test_no_gradient_is_lost_unsaid(backend: str) -> None:
    w = torch.randn(300)
    for call in (
        lambda x: cfl_ops.compress(x, lossless=True),
        lambda x: cfl_ops.compress(x),
        lambda x: cfl_ops.compress_state_dict({"w": x}, lossless=True)["w"],
    ):
        for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
            with pytest.raises(RuntimeError, match=r"^cfl_ops\..* is differentiated by torch\.func"):
                transform(lambda x, call=call: call(x).sum() + 0 * x.sum())(w)


@pytest.mark.parametrize("dtype", layout.NOT_COPIED)
def test_dtypes_that_torch_does_not_copy_have_strides(dtype: torch.dtype) -> None:
    raw = torch.arange(96, dtype=torch.uint8).view(dtype).view(8, -1)
    for w in (raw.t(), raw[::2, ::3], raw[:, :1], raw[:0], raw[1].expand(3, -1), raw.unfold(0, 3, 2)):
        blob = cfl_ops.compress(w, lossless=True)
        back = cfl_ops.decompress(blob)
        assert (back.dtype, back.shape) == (dtype, w.shape)
        bits = torch.uint8 if dtype.itemsize == 1 else torch.int16
        assert torch.equal(back.view(bits), w.view(bits))


GIVEN: dict[str, Any] = {
    "floor": 5, "probe_bits": 3, "bits": 8, "fraction": 0.1, "per": "row", "nonfinite": "keep", "max_error": 0.1,
    "zero": "exact",
}  # fmt: skip


def test_options_of_a_loss_are_refused() -> None:
    w = torch.randn(8, 8)
    for name, value in GIVEN.items():
        with pytest.raises(ValueError, match=f"compress: lossless must be given without .* but got {name}$"):
            cfl_ops.compress(w, lossless=True, **{name: value})
    with pytest.raises(ValueError, match="but got bits, per, block_size"):
        cfl_ops.compress(w, lossless=True, bits=8, per="block", block_size=4)
    assert same(cfl_ops.compress(w, lossless=True, floor=6, per="tensor"), cfl_ops.compress(w, lossless=True))
    for bad in (1, None, "yes"):
        with pytest.raises(TypeError, match="compress: lossless must be True or False"):
            cfl_ops.compress(w, lossless=bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="compress: w must be a tensor"):
        cfl_ops.compress([1.0], lossless=True)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="compress: floor must be a number, but got a tensor"):
        cfl_ops.compress(w, lossless=True, floor=torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="compress: w must have a dtype that the format knows"):
        cfl_ops.compress(torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), lossless=True)
    with pytest.raises(ValueError, match="compress: w must have at most 64 dimensions"):
        cfl_ops.compress(torch.ones((1,) * 65), lossless=True)
    with pytest.raises(TypeError, match="compress: w must be float16"):  # without lossless as before
        cfl_ops.compress(torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("backend", EXHAUSTIVE, indirect=True)
@pytest.mark.parametrize("kind", ["bfloat16", "int64", "deep raw"])
def test_every_flip_cut_and_extension_raises(backend: str, kind: str) -> None:
    w = {
        "bfloat16": (torch.arange(300) % 7 / 64).bfloat16() + 0.001,
        "int64": torch.arange(100) % 9 - 5,
        "deep raw": torch.tensor([1.5, -2.5]).view((1,) * 14 + (2,)),
    }[kind]
    blob = cfl_ops.compress(w, lossless=True)
    assert (describe(blob).kind, blob[4]) == ("raw" if kind == "deep raw" else "lossless", 3)
    assert same(cfl_ops.decompress(blob), w)
    for damaged in itertools.chain(flips(blob), cuts_and_extensions(blob)):
        with pytest.raises(CorruptDataError):
            cfl_ops.decompress(damaged)


def test_a_damaged_chunk_is_named_and_the_others_are_read(backend: str) -> None:
    w = many_tables(6 * CHUNK)[: 5 * CHUNK]
    blob = cfl_ops.compress(w, lossless=True)
    head = planes.parse(blob)
    stored = blob.clone()
    stored[head.head + 2 * CHUNK + 10] ^= 1  # of the first chunk, which has three stored pieces
    coded = blob.clone()
    coded[-1] ^= 1  # of the last payload, hence of chunk 4
    for damaged, chunk in ((stored, 0), (coded, 4)):
        with pytest.raises(CorruptDataError, match=f"decompress: chunk {chunk} of the blob is damaged"):
            cfl_ops.decompress(damaged)
        assert same(cfl_ops.decompress(damaged, start=CHUNK, stop=4 * CHUNK), w[CHUNK : 4 * CHUNK])


@pytest.mark.parametrize("backend", EXHAUSTIVE, indirect=True)
def test_out_is_as_it_was_after_errors_of_the_head(backend: str) -> None:
    w = lossless_sample(torch.bfloat16, 300)
    blob = cfl_ops.compress(w, lossless=True)
    head = planes.parse(blob)
    out = torch.full((300,), 7.0, dtype=torch.bfloat16)
    kept = out.clone()
    before = head.head
    for bad in itertools.islice(flips(blob), 8 * before):
        with pytest.raises(CorruptDataError):
            cfl_ops.decompress(bad, out)
        assert same(out, kept)
    for options, error in (
        ({"start": 301}, IndexError),
        ({"stop": 10}, ValueError),
        ({"start": 5, "stop": 2}, IndexError),
    ):
        with pytest.raises(error):
            cfl_ops.decompress(blob, out, **options)  # type: ignore[arg-type]
        assert same(out, kept)


def test_an_old_reader_refuses_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = [
        cfl_ops.compress(torch.zeros(500), lossless=True),
        cfl_ops.compress(torch.ones((1,) * 14), lossless=True),
    ]
    assert all(int(blob[4]) == 3 for blob in blobs)
    newer = blobs[0].clone()
    newer[4] = 4
    with pytest.raises(CorruptDataError, match="written in a version that this reader does not know"):
        cfl_ops.decompress(newer)
    monkeypatch.setattr(blob_reader, "KINDS", {1: (0, 1), 2: (1, 2)})  # as before version 3
    for blob in blobs:
        with pytest.raises(CorruptDataError, match="written in a version that this reader does not know"):
            cfl_ops.decompress(blob)


def repaired(blob: bytes, at: int, form: str, value: int) -> Tensor:
    """With a field set and the checksum of the head repaired."""
    data = bytearray(blob)
    struct.pack_into(form, data, at, value)
    (table,) = struct.unpack_from("<Q", data, 24)
    head = min(len(data), 56 + table)
    struct.pack_into("<I", data, 52, zlib.crc32(data[56:head], zlib.crc32(data[:52])))
    return from_bytes(bytes(data))


@pytest.mark.parametrize("backend", EXHAUSTIVE, indirect=True)
def test_a_forged_head_raises_or_is_read(backend: str) -> None:
    w = lossless_sample(torch.int16, 200).view(10, 20)
    blob = as_bytes(cfl_ops.compress(w, lossless=True))
    head = planes.parse(from_bytes(blob)).head
    for at, form in ((16, "<Q"), (24, "<Q"), (32, "<Q"), (40, "<Q"), (48, "<I")):
        for value in (
            0,
            1,
            199,
            201,
            2**31,
            2**32 - 1,
            *(2**40, 2**63 - 1, 2**63, 2**64 - 1) * (form == "<Q"),
        ):
            if struct.unpack_from(form, blob, at)[0] == value:
                continue
            with pytest.raises(CorruptDataError):
                cfl_ops.decompress(repaired(blob, at, form, value))
    read = 0
    for at in range(56, head):
        for value in (0, 1, 2, 16, 17, 127, 128, 255):
            try:
                read += cfl_ops.decompress(repaired(blob, at, "<B", value)).numel() == 200
            except CorruptDataError:
                continue
    assert read >= 8  # what was there before, at the least
    swapped = repaired(blob, 6, "<B", DTYPES.index(torch.uint16))  # as many bytes, cut alike
    assert same(cfl_ops.decompress(swapped), w.view(torch.uint16))
    true = as_bytes(cfl_ops.compress(torch.arange(200, dtype=torch.uint8) // 100 + 1, lossless=True))
    with pytest.raises(CorruptDataError, match="neither true nor false"):
        cfl_ops.decompress(repaired(true, 6, "<B", DTYPES.index(torch.bool)))


def forged_head(n: int, payload: bytes) -> Tensor:
    """A blob of n bytes, all in one table, with that payload."""
    chunks = -(-n // CHUNK)
    head = (
        pack_shape([n]) + b"\x01" + bytes([1]) * chunks + struct.pack("<Q", len(payload)) + bytes(4 * chunks)
    )
    total = layout.BLOB_BYTES + len(head) + len(payload)
    uint8 = DTYPES.index(torch.uint8)
    fixed = layout.BLOB.pack(layout.MAGIC, 3, layout.LOSSLESS, uint8, 15, total, n, len(head), 0, 0.0, 1)
    checksum = struct.pack("<I", zlib.crc32(head, zlib.crc32(fixed)))
    return torch.frombuffer(bytearray(fixed + checksum + head + payload), dtype=torch.uint8)


@pytest.mark.parametrize("long", [False, True])
def test_nothing_is_allocated_for_a_forged_size(backend: str, long: bool) -> None:
    """2^36 bytes in a code of one symbol: refused by its length, or by what stands in it."""
    n = 1 << 36
    blob = forged_head(n, bytes(48 + 8 * (n // CHUNK) * long))
    with pytest.raises(CorruptDataError):
        cfl_ops.decompress(blob)
    with pytest.raises(CorruptDataError):
        cfl_ops.decompress(blob, torch.empty(1, dtype=torch.uint8), start=5, stop=6)
    good = cfl_ops.huffman_encode(torch.full((70000,), 9, dtype=torch.uint8))
    assert same(
        cfl_ops.decompress(forged_head(70000, good.numpy().tobytes())), torch.full((70000,), 9).byte()
    )
    with pytest.raises(CorruptDataError):
        cfl_ops.decompress(forged_head(70001, good.numpy().tobytes()))


def test_a_glance_at_later_planes_decides_alike(backend: str) -> None:
    """Chunks from uniform to clearly not, around what a glance and a look call nearly uniform, and a short one."""
    generator = torch.Generator().manual_seed(5)
    parts = []
    for power in (1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0, 3.0):
        parts.append((torch.rand(2 * CHUNK, generator=generator).pow(power) * 256).to(torch.uint8))
    low = torch.cat([*parts, parts[-1][:5000]])
    w = torch.stack([low, torch.full_like(low, 63)], 1).flatten().view(torch.uint16)
    blob = cfl_ops.compress(w, lossless=True)
    assert same(blob, planes.encode(w.view(torch.uint8), DTYPES.index(w.dtype), list(w.shape)))
    assert same(cfl_ops.decompress(blob), w)
    chosen = planes.parse(blob).maps[1]
    assert not any(chosen[:2])
    assert all(chosen[-2:])


def test_constant_planes_take_no_bits(backend: str) -> None:
    """Of 2^19 symbols and more a sample is counted, which must not cost those that it does not meet a code."""
    zeros = torch.zeros(1 << 19)
    blob = cfl_ops.compress(zeros, lossless=True)
    assert len(blob) < 1000
    assert same(cfl_ops.decompress(blob), zeros)
    halves = torch.randn(1 << 19, generator=torch.Generator().manual_seed(4)).bfloat16()
    wide, narrow = (cfl_ops.compress(w, lossless=True) for w in (halves.float(), halves))
    assert same(cfl_ops.decompress(wide), halves.float())
    # The sign, which is coded now, and a byte map, code table and entries of chunks more for two planes.
    assert len(wide) < len(narrow) + 2000
    # Chunks of one symbol go to the table that holds no other, whatever order they come in.
    threes = torch.full((CHUNK,), 3, dtype=torch.uint8)
    mostly = torch.arange(CHUNK).remainder(8).clamp(max=3).to(torch.uint8)  # 1.625 bits
    blob = cfl_ops.compress(torch.cat([threes, mostly, threes]), lossless=True)
    assert len(blob) < 1.625 * CHUNK / 8 + 400


def test_shapes_are_packed_in_one_way_only() -> None:
    for shape in ((), (0,), (1, 127, 128, 16_383, 16_384), (2**62,), (2,) * 62, (1,) * 64):
        packed = pack_shape(shape)
        assert unpack_shape(packed + b"\7", len(shape)) == (shape, len(packed))
    for raw, dims in (
        (b"", 1),
        (b"\x80", 1),
        (b"\x80\x00", 1),
        (b"\xff" * 8 + b"\x7f", 2),
        (b"\xff" * 10 + b"\1", 1),
    ):
        with pytest.raises(layout.Corrupt):
            unpack_shape(raw, dims)


def test_describe_reads_the_header_alone() -> None:
    w = torch.randn(40, 50)
    with_outlier = w.clone()
    with_outlier[3, 4] = 1e6
    for blob, kind, bits, exceptions in (
        (cfl_ops.compress(w, bits=7), "quantised", 7, 0),
        (cfl_ops.compress(with_outlier, bits=7), "quantised", 7, 1),
        (cfl_ops.compress(w > 0, lossless=True), "lossless", None, 0),
        (cfl_ops.compress((w > 0).float()), "palette", None, 0),
        (cfl_ops.compress(torch.randint(0, 256, (9,), dtype=torch.uint8), lossless=True), "raw", None, 0),
    ):
        found = describe(blob)
        assert (found.kind, found.bits, found.exceptions, found.nbytes) == (
            kind,
            bits,
            exceptions,
            blob.numel(),
        )
        assert found.numel == math.prod(found.shape)
        blob[-1] ^= 1  # of the data
        assert describe(blob) == found
        with pytest.raises(CorruptDataError, match="describe: the blob"):
            describe(blob[:-1])
    with pytest.raises(TypeError, match="describe: blob must be a 1-d uint8 tensor"):
        describe(w)


@pytest.mark.parametrize("name", list(golden_lossless()))
def test_golden_blobs(backend: str, name: str) -> None:
    golden = from_bytes(Path(DATA / name).read_bytes())
    w = golden_lossless()[name]
    assert same(cfl_ops.compress(w, lossless=True), golden)
    assert same(cfl_ops.decompress(golden), w)


def test_checksums_in_torch_ops_are_zlibs() -> None:
    counts = [2, 1, 0, 3]
    data = torch.randint(0, 256, (CHUNK * sum(counts),), dtype=torch.uint8)
    raw, at, want = as_bytes(data), 0, []
    for count in counts:
        want.append(zlib.crc32(raw[at : at + count * CHUNK]))
        at += count * CHUNK
    assert planes.folded(data, counts) == want


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_large_tensors_and_every_length_around_a_chunk(backend: str, dtype: torch.dtype) -> None:
    for n in (*range(CHUNK - 3, CHUNK + 4), *range(1, 140), 3_000_001):
        w = lossless_sample(dtype, n)
        assert same(cfl_ops.decompress(cfl_ops.compress(w, lossless=True)), w)


def test_views_that_are_yet_to_be_conjugated_or_negated_keep_payloads(backend: str, tmp_path: Path) -> None:
    """torch does these through floats, where a signalling NaN becomes a quiet one."""
    z = torch.zeros(40, dtype=torch.complex32)
    z.view(torch.int16)[1::2] = 0x7C01
    half = torch.zeros(40, dtype=torch.half)
    half.view(torch.int16)[:] = 0x7C01
    state = {"conj": z.conj(), "neg": torch._neg_view(half)}
    cfl_ops.save_file(state, tmp_path / "a.cflz", lossless=True)
    files = cfl_ops.load_file(tmp_path / "a.cflz")
    for name, parts in (("conj", slice(1, None, 2)), ("neg", slice(None))):
        blob = cfl_ops.compress(state[name], lossless=True)
        out = torch._neg_view(torch.zeros_like(state[name]).resolve_conj().resolve_neg())
        assert cfl_ops.decompress(blob, out) is out
        for back in (cfl_ops.decompress(blob), files[name]):
            assert bool((back.view(torch.int16)[parts] == 0x7C01 - 0x8000).all())
        assert bool((torch._neg_view(out).view(torch.int16)[parts] == 0x7C01).all())


def test_bools_that_are_neither_are_refused(backend: str, tmp_path: Path) -> None:
    """Their bytes would be kept, and no reader takes them."""
    odd = torch.tensor([0, 1, 2] * 100, dtype=torch.uint8).view(torch.bool)
    for value in (odd, odd[::2], odd.view(30, 10).t()):
        with pytest.raises(ValueError, match="w must have the byte 0 or 1 in each bool"):
            cfl_ops.compress(value, lossless=True)
        with pytest.raises(ValueError, match=r"state_dict\['m'\] must have the byte 0 or 1"):
            cfl_ops.save_safetensors({"m": value}, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
