"""Headers that nobody wrote, what the writers refuse, what ``out`` holds after an error, and numbers of other kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cfl_ops
import numpy as np
import pytest
import torch
from cfl_ops import CorruptDataError
from cfl_ops.ops.codec import blob_reader
from cfl_ops.ops.codec.reference.header import from_bytes
from torch import Tensor

from tests.codec import forge
from tests.codec.helpers import EXHAUSTIVE, NATIVE, flips, same


@pytest.mark.parametrize("chosen", ["native", "python"])
def test_a_forged_header_is_corrupt_data_and_nothing_else(chosen: str) -> None:
    """No other error, no end of the process, no memory for what a header promises (tests/codec/forge.py)."""
    if chosen == "native" and not NATIVE:
        pytest.skip("the extension is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "tests.codec.forge"],
        env={**os.environ, "CFL_OPS_BACKEND": chosen, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    refused, read, _ = map(int, done.stdout.splitlines()[0].split())
    assert refused > 10_000  # else the checksums are not those that a reader checks
    assert read > 100  # else nothing but them is tested


@pytest.mark.parametrize("backend", EXHAUSTIVE, indirect=True)
def test_what_could_be_read_but_was_never_written(backend: str) -> None:
    good = forge.quantised(forge.payload((9,), 9), 9, 1, (3, 8))
    assert cfl_ops.decompress(from_bytes(good)).isinf().nonzero().flatten().tolist() == [3, 8]
    for where in ((3, 3), (5, 2), (8, 9), (-1, 3)):
        with pytest.raises(CorruptDataError, match="contradicts itself"):
            cfl_ops.decompress(from_bytes(forge.quantised(forge.payload((9,), 9), 9, 1, where)))
    assert cfl_ops.decompress(from_bytes(forge.raw((2,), b"\0\1", 4))).tolist() == [False, True]
    with pytest.raises(CorruptDataError, match="neither true nor false"):
        cfl_ops.decompress(from_bytes(forge.raw((2,), b"\2\1", 4)))
    for dims in (64, 65):
        for reader, data in (
            (cfl_ops.decompress, forge.raw((1,) * dims, bytes(4), 2)),
            (cfl_ops.decompress, forge.quantised(forge.payload((1,) * dims, 1), 1, 1)),
            (cfl_ops.huffman_decode, forge.payload((1,) * dims, 1)),
        ):
            if dims == 64:
                assert reader(from_bytes(data)).ndim == 64
            else:
                with pytest.raises(CorruptDataError, match="contradicts itself"):
                    reader(from_bytes(data))


DEEP = (1,) * 71


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: cfl_ops.compress(torch.ones(DEEP)),
            "compress: w must have at most 64 dimensions, but got 71",
        ),
        (
            lambda: cfl_ops.compress(torch.ones(*DEEP, 0)),
            "compress: w must have at most 64 dimensions, but got 72",
        ),
        (
            lambda: cfl_ops.huffman_encode(torch.ones(DEEP, dtype=torch.uint8)),
            "huffman_encode: symbols must have at most 64 dimensions, but got 71",
        ),
        (
            lambda: cfl_ops.compress_state_dict({"a": torch.ones(DEEP)}),
            r"state_dict\['a'\] must have at most 64 dimensions, but got 71",
        ),
        (
            lambda: cfl_ops.compress(torch.ones(1).expand(2**40 + 1)),
            "w must have at most 1099511627776 elements",
        ),
        (
            lambda: cfl_ops.huffman_encode(torch.ones(1, dtype=torch.uint8).expand(2**20, 2**21)),
            "symbols must have at most 1099511627776 elements",
        ),
        (lambda: cfl_ops.compress(torch.empty(0, 1, 1).expand(0, 2**62, 2**62)), r"but got shape \(0, 4611"),
    ],
)
def test_writers_refuse_what_readers_do(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_64_dimensions_go_and_come_back(backend: str) -> None:
    w = torch.randn((1,) * 62 + (3, 5))
    assert cfl_ops.decompress(cfl_ops.compress(w, bits=12)).shape == w.shape
    assert same(cfl_ops.decompress_state_dict(cfl_ops.compress_state_dict({"w": w}))["w"], w)
    symbols = (w > 0).to(torch.uint8)
    assert same(cfl_ops.huffman_decode(cfl_ops.huffman_encode(symbols)), symbols)
    empty = torch.empty(0, 2**40)
    assert cfl_ops.decompress(cfl_ops.compress(empty)).shape == empty.shape


@pytest.mark.parametrize("backend", EXHAUSTIVE, indirect=True)
def test_out_is_as_it_was_after_errors_of_header_and_arguments(backend: str) -> None:
    w = torch.randn(5, 8, generator=torch.Generator().manual_seed(14))
    symbols = torch.arange(40, dtype=torch.uint8).view(5, 8)
    raw, rows, payload = (
        cfl_ops.compress_state_dict({"w": w})["w"],
        cfl_ops.compress(w, bits=4, per="row"),
        cfl_ops.huffman_encode(symbols),
    )
    chunk = 20  # the bytes of the only chunk, at the most: all before are header
    for data, before, reader, out in (
        (raw, len(raw), cfl_ops.decompress, torch.full((5, 8), 7.0)),
        (rows, len(rows) - chunk, cfl_ops.decompress, torch.full((5, 8), 7.0)),
        (payload, len(payload) - 40, cfl_ops.huffman_decode, torch.full((5, 8), 7, dtype=torch.uint8)),
    ):
        kept = out.clone()
        calls: list[tuple[Tensor, dict[str, Any], type[Exception]]] = [
            (data, {"start": 5, "stop": 3}, IndexError),
            (data, {"start": 41}, IndexError),
            (data, {"stop": 10}, ValueError),
            (data, {"start": True}, TypeError),
            (data[:-1], {}, CorruptDataError),
        ]
        calls += [(bad, {}, CorruptDataError) for bad in list(flips(data))[: 8 * before]]
        for bad, options, error in calls:
            with pytest.raises(error):
                reader(bad, out, **options)
            assert same(out, kept)
        assert same(reader(data, out), reader(data))


def test_out_must_not_share_memory_with_the_bytes(backend: str) -> None:
    w = torch.randn(40)
    blob = cfl_ops.compress(w, bits=4)
    memory = torch.cat([torch.zeros(160, dtype=torch.uint8), blob, torch.zeros(200, dtype=torch.uint8)])
    place = memory[160 : 160 + len(blob)]
    assert same(cfl_ops.decompress(place, memory[:160].view(torch.float32)), cfl_ops.decompress(blob))
    with pytest.raises(ValueError, match="decompress: out must not share memory with the encoded bytes"):
        cfl_ops.decompress(place, memory[4:164].view(torch.float32))
    payload = cfl_ops.huffman_encode(torch.zeros(30, dtype=torch.uint8))
    with pytest.raises(ValueError, match="huffman_decode: out must not share memory with the encoded bytes"):
        cfl_ops.huffman_decode(payload, payload[:30])


def test_out_that_requires_grad_is_written_without_a_graph_only(backend: str) -> None:
    w = torch.randn(40)
    for blob in (cfl_ops.compress(w, bits=4), cfl_ops.compress_state_dict({"w": w})["w"]):
        parameter = torch.nn.Parameter(torch.zeros(40))
        for out in (parameter, parameter * 1):
            with pytest.raises(
                RuntimeError, match="decompress: out requires grad, but no gradient passes decoding"
            ):
                cfl_ops.decompress(blob, out)
            assert not out.any()
        with torch.no_grad():
            assert cfl_ops.decompress(blob, parameter) is parameter
        assert same(parameter.detach(), cfl_ops.decompress(blob))


INTEGERS = (np.int64, np.uint8, torch.tensor, np.array)
REALS = (np.float32, np.float64, torch.tensor, np.array)


def test_numbers_of_other_libraries_are_numbers(backend: str) -> None:
    w = torch.randn(50, 8, generator=torch.Generator().manual_seed(1))
    want = cfl_ops.compress(w, bits=5, per="block", block_size=30)
    estimated = cfl_ops.compress(w, floor=2.5, probe_bits=3, fraction=0.5, max_error=0.5)
    for of in INTEGERS:
        assert same(cfl_ops.compress(w, bits=of(5), per="block", block_size=of(30)), want)
        q = cfl_ops.quantize(w, of(5), per="block", block_size=of(30))
        assert (type(q.bits), q.bits, type(q.group_size), q.group_size) == (int, 5, int, 30)
        assert same(cfl_ops.dequantize(q._replace(bits=of(5), group_size=of(30))), cfl_ops.decompress(want))
        assert same(
            cfl_ops.decompress(want, start=of(7), stop=of(90)), cfl_ops.decompress(want, start=7, stop=90)
        )
        assert cfl_ops.compress_state_dict({"w": w}, min_numel=of(2), bits=of(5)).keys() == {"w"}
    for of in REALS:
        assert same(
            cfl_ops.compress(w, floor=of(2.5), probe_bits=np.int32(3), fraction=of(0.5), max_error=of(0.5)),
            estimated,
        )
        assert cfl_ops.allocate_bits(of(2.5), floor=of(6)) == 9


@pytest.mark.parametrize(
    "bad", [True, np.bool_(True), torch.tensor(True), 2.0, np.float64(2), "2", torch.ones(2), [2]]
)
def test_what_is_no_integer_is_refused(bad: Any) -> None:
    w = torch.randn(8)
    blob = cfl_ops.compress(w)
    payload = cfl_ops.huffman_encode(torch.zeros(30, dtype=torch.uint8))
    for name, call in (
        ("bits", lambda: cfl_ops.compress(w, bits=bad)),
        ("probe_bits", lambda: cfl_ops.compress(w, probe_bits=bad)),
        ("bits", lambda: cfl_ops.quantize(w, bad)),
        ("bits", lambda: cfl_ops.estimate_entropy(w, bits=bad)),
        ("block_size", lambda: cfl_ops.quantize(w, per="block", block_size=bad)),
        ("block_size", lambda: cfl_ops.compress(w, per="block", block_size=bad)),
        ("start", lambda: cfl_ops.decompress(blob, start=bad)),
        ("stop", lambda: cfl_ops.huffman_decode(payload, stop=bad)),
        ("min_numel", lambda: cfl_ops.compress_state_dict({"w": w}, min_numel=bad)),
    ):
        with pytest.raises(TypeError, match=f"{name} must be an integer"):
            call()


@pytest.mark.parametrize("bad", [True, "2", None, torch.ones(2), 1j])
def test_what_is_no_number_is_refused(bad: Any) -> None:
    w = torch.randn(8)
    for name, call in (
        ("floor", lambda: cfl_ops.compress(w, floor=bad)),
        ("max_error", lambda: cfl_ops.compress(w, max_error=bad)),
        ("fraction", lambda: cfl_ops.compress(w, fraction=bad)),
        ("fraction", lambda: cfl_ops.estimate_entropy(w, fraction=bad)),
        ("floor", lambda: cfl_ops.allocate_bits(2.0, floor=bad)),
        ("entropy", lambda: cfl_ops.allocate_bits(bad)),
    ):
        with pytest.raises(TypeError, match=f"{name} must be a number"):
            call()


def test_numbers_without_sense_are_refused_at_once() -> None:
    empty = torch.empty(0)  # nothing is computed of it, and still
    for message, options in (
        ("floor must be finite, but got nan", {"floor": float("nan")}),
        ("floor must be finite, but got inf", {"floor": float("inf")}),
        (r"fraction must be in \(0, 1\], but got 0", {"fraction": 0}),
        ("per must be one of tensor, row, block, but got 'all'", {"per": "all"}),
        ("block_size must be given with per='block', and only then", {"block_size": 3}),
        (r"block_size must be less than 2\^63", {"per": "block", "block_size": 2**63}),
    ):
        with pytest.raises(ValueError, match=f"cfl_ops.compress: {message}"):
            cfl_ops.compress(empty, **options)  # type: ignore[arg-type]
    for bad in (0, -1, float("nan")):
        with pytest.raises(ValueError, match="cfl_ops.compress: max_error must be above 0"):
            cfl_ops.compress(empty, max_error=bad)
    with pytest.raises(ValueError, match="zero must be one of centre, exact, but got 'keep'"):
        cfl_ops.compress(empty, zero="keep")
    with pytest.raises(TypeError, match="compress_state_dict: unknown options bit"):
        cfl_ops.compress_state_dict({}, bit=3)
    w = torch.randn(8)
    assert float(cfl_ops.estimate_entropy(w, fraction=5e-324)) > 0  # of few weights all are looked at
    assert cfl_ops.decompress(cfl_ops.compress(w, per="block", block_size=2**63 - 1)).shape == w.shape


def test_tensors_without_data_are_refused() -> None:
    w = torch.empty(20, 20, device="meta")
    state, data = {"w": w}, torch.empty(100, dtype=torch.uint8, device="meta")
    for call, name in (
        (lambda: cfl_ops.compress(w, lossless=True), "compress: w"),
        (lambda: cfl_ops.compress(w), "compress: w"),
        (lambda: cfl_ops.compress_state_dict(state), r"compress_state_dict: state_dict\['w'\]"),
        (
            lambda: cfl_ops.compress_state_dict(state, lossless=True),
            r"compress_state_dict: state_dict\['w'\]",
        ),
        (lambda: cfl_ops.decompress(data), "decompress: blob"),
        (lambda: blob_reader.describe(data), "describe: blob"),
        (lambda: cfl_ops.huffman_decode(data), "huffman_decode: payload"),
        (lambda: cfl_ops.huffman_encode(data), "huffman_encode: symbols"),
    ):
        with pytest.raises(
            ValueError, match=rf"^cfl_ops\.{name} must have data, but it is on the device meta"
        ):
            call()


def test_out_that_is_yet_to_be_conjugated_or_negated() -> None:
    w = torch.randn(5, dtype=torch.complex64)
    out = torch.zeros(5, dtype=torch.complex64).conj()
    assert cfl_ops.decompress(cfl_ops.compress(w, lossless=True), out) is out
    assert torch.equal(out, w)
    assert torch.equal(
        cfl_ops.decompress(cfl_ops.compress(w, lossless=True), out[1:3], start=2, stop=4), w[2:4]
    )
    out = torch._neg_view(torch.zeros(5))
    for options in ({}, {"lossless": True}):
        blob = cfl_ops.compress(w.real, **options)  # type: ignore[arg-type]
        assert cfl_ops.decompress(blob, out) is out
        assert torch.equal(out, cfl_ops.decompress(blob))
