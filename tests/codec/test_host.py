"""The host's part of the codec on a GPU: C++ and Python give the same bytes, whatever they are given."""

from __future__ import annotations

import math

import pytest
import torch
from cfl_ops._core import dispatch
from cfl_ops.ops.codec import host
from cfl_ops.ops.codec.huffman import HUFFMAN_ENCODE
from cfl_ops.ops.codec.reference.header import parse

if not dispatch.extension_available():
    pytest.skip("needs the extension: there is nothing to compare with", allow_module_level=True)
native = torch.ops.cfl_ops


def same(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


COUNTS = {
    "one": torch.tensor([0, 7]),
    "two": torch.tensor([1, 1, 0]),
    "ties": torch.ones(256, dtype=torch.int64),
    "normal": (torch.randn(4000) * 60 + 500).clamp(0, 1023).to(torch.int64).bincount(minlength=1024),
    "large": torch.randint(2**33, (3000,)),
    "skewed": torch.tensor([2**i for i in range(40)]),
    "all": torch.randint(5, (65536,)),
}


@pytest.mark.parametrize("stride", [1, 5])
@pytest.mark.parametrize("name", COUNTS)
def test_code(name: str, stride: int) -> None:
    counts = COUNTS[name]
    want = host.code(counts, stride)
    same(native.host_code(counts, stride), want)
    alphabet, nodes, leaves = want[2].tolist()[:3]
    assert want[0].numel() == 4 * nodes + -(-leaves // 2) + alphabet


@pytest.mark.parametrize("shape", [(), (3,), (5, 0, 7), (1,) * 64, (17, 2**10, 2**5)])
def test_head(shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    entries = torch.randint(2**20, (-(-numel >> 15), 2), dtype=torch.int32)
    table = torch.randint(256, (9,), dtype=torch.uint8)
    arguments = (entries, table, shape, 2, 15, numel, 300, 11)
    same([native.host_head(*arguments)], [host.head(*arguments)])


def payload_of(dtype: torch.dtype) -> torch.Tensor:
    symbols = (torch.randn(5000) * 20 + 100).clamp(0, 255).to(dtype)
    return HUFFMAN_ENCODE(symbols, [50, 100], 10, 0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16])
def test_parse(dtype: torch.dtype) -> None:
    payload = payload_of(dtype)
    size = payload.numel()
    for start, count in ((0, 5000), (0, 1), (1023, 2), (4999, 1), (0, 0), (-1, 5), (10, 5000), (5000, 1)):
        want = host.parse(payload, size, start, count)
        same(native.host_parse(payload, size, start, count), want)
        assert want[0][0] == 0
    assert want[0].tolist()[9:] == [50, 100]
    empty = HUFFMAN_ENCODE(torch.empty(0, 4, dtype=dtype), [0, 4], 15, 0)
    same(native.host_parse(empty, empty.numel(), 0, 0), host.parse(empty, empty.numel(), 0, 0))


def test_parse_asks_for_the_rest_of_a_long_header() -> None:
    payload = payload_of(torch.uint8)
    size, head = payload.numel(), parse(payload).data
    for have in (0, 39, 40, head - 1, head):
        got = native.host_parse(payload[:have], size, 0, 5000)
        same(got, host.parse(payload[:have], size, 0, 5000))
        assert int(got[0][0]) == (0 if have == head else -head if have >= 40 else -40)


def test_parse_of_damaged_headers() -> None:
    payload = payload_of(torch.uint8)
    head = parse(payload).data
    for at in range(head):
        for flip in (1, 128):
            damaged = payload.clone()
            damaged[at] ^= flip
            got = native.host_parse(damaged, damaged.numel(), 0, 5000)
            same(got, host.parse(damaged, damaged.numel(), 0, 5000))
            assert int(got[0][0]) > 0
