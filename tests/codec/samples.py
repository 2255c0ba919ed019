"""Sample inputs, oracles and error bounds of the codec's ops."""

from __future__ import annotations

import torch
from cfl_ops.ops.codec import planes
from cfl_ops.ops.codec.blob import DECOMPRESS, QUANTIZE_ENCODE
from cfl_ops.ops.codec.codes import BAD_LENGTH
from cfl_ops.ops.codec.huffman import HUFFMAN_DECODE, HUFFMAN_ENCODE, PAYLOAD_HEADER
from cfl_ops.ops.codec.lossless import LOSSLESS_DECODE, LOSSLESS_ENCODE
from cfl_ops.ops.codec.quantize import DEQUANTIZE, QUANTIZE, WEIGHT_RANGE
from cfl_ops.ops.codec.reference import payload as reference
from torch import Tensor

from tests.codec import samples_delta
from tests.codec.helpers import sample_places
from tests.contract import Case, OpSpec


def _weights(shape: tuple[int, ...], bits: int, histogram: bool = False, scale: float = 1.0):
    def make(dtype: torch.dtype):
        generator = torch.Generator().manual_seed(sum(shape) + bits)
        w = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return [w.to(dtype), bits, histogram]

    return make


def _ends(w: Tensor) -> tuple[Tensor, Tensor]:
    if w.shape[-1] == 0:
        return (w.new_zeros(w.shape[:-1], dtype=torch.float64),) * 2
    return w.double().amin(-1), w.double().amax(-1)


def _quantize_oracle(w: Tensor, bits: int, histogram: bool):
    low, high = _ends(w)
    position = (w.double() - low[..., None]) / (high - low)[..., None].clamp(min=1e-300) * 2**bits
    symbols = position.floor().clamp(0, 2**bits - 1)
    return symbols, low, high, None, torch.zeros(w.shape[:-1], dtype=torch.int64)


def _quantize_bound(w: Tensor, bits: int, histogram: bool):
    # Next to an edge the roundings may choose the neighbouring bin; test_quantize.py asks more.
    return 1, 0, 0, 0, 0


def _range_case(shape: tuple[int, ...], bits: int, every: int):
    def make(dtype: torch.dtype):
        # Multiples of 1/64 in [0, 1): exact in every dtype, and never on the wrong side of an edge.
        generator = torch.Generator().manual_seed(sum(shape) + bits)
        w = torch.randint(0, 64, shape, generator=generator).to(torch.float64) / 64
        if w.numel():
            w[..., 0], w[..., -1] = 0, 1
        return [w.to(dtype), bits, every]

    return make


def _range_oracle(w: Tensor, bits: int, every: int):
    low, high = _ends(w)
    counts = torch.zeros(*w.shape[:-1], 2**bits if bits else 0, dtype=torch.int64)
    if bits and w.shape[-1]:
        index = (
            (w.double()[..., sample_places(w.shape[-1], every)] * 2**bits)
            .floor()
            .clamp(0, 2**bits - 1)
            .to(torch.int64)
        )
        counts.scatter_add_(-1, index, torch.ones_like(index))
    return low, high, counts, torch.zeros(w.shape[:-1], dtype=torch.int64)


def _quantize_encode_case(shape: tuple[int, ...], bits: int):
    def make(dtype: torch.dtype):
        w = _weights(shape, bits)(dtype)[0]
        low, high = _ends(w)
        return [w, low.to(dtype), high.to(dtype), bits, list(shape), 10, 5]

    return make


def _quantize_encode_oracle(w, low, high, bits, shape, chunk_log2, reserve):
    symbols = QUANTIZE.python(w, bits, False)[0]
    return (reference.encode(symbols, tuple(shape), chunk_log2, reserve),)


def _quantized(shape: tuple[int, ...], bits: int):
    def make(dtype: torch.dtype):
        generator = torch.Generator().manual_seed(sum(shape) + bits)
        symbols = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.int32)
        low = torch.randn(shape[:-1], generator=generator, dtype=torch.float64)
        high = low + torch.rand(shape[:-1], generator=generator, dtype=torch.float64)
        return [symbols.to(torch.uint8 if bits <= 8 else torch.uint16), low.to(dtype), high.to(dtype), bits]

    return make


def _dequantize_oracle(symbols: Tensor, low: Tensor, high: Tensor, bits: int):
    t = (symbols.double() + 0.5) / 2**bits
    return (low.double()[..., None] + t * (high.double() - low.double())[..., None],)


def _dequantize_bound(symbols: Tensor, low: Tensor, high: Tensor, bits: int):
    # Three roundings of numbers up to the larger end, and one to the dtype.
    unit = torch.maximum(low.double().abs(), high.double().abs())[..., None]
    return (4 * torch.finfo(low.dtype).eps * unit + torch.zeros(symbols.shape, dtype=torch.float64),)


def _symbols(n: int, top: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return (torch.rand(n, generator=generator) ** 3 * top).to(torch.int32).to(torch.uint8)


def _payload_oracle(symbols: Tensor, shape: list[int], chunk_log2: int, reserve: int):
    return (reference.encode(symbols, tuple(shape), chunk_log2, reserve),)


def _decode_case(n: int, start: int, count: int):
    def make(dtype: torch.dtype):
        payload = reference.encode(_symbols(n, 40), (n,), 10, 0)
        return [payload, torch.zeros(count, dtype=torch.uint8), start]

    return make


def _decode_oracle(payload: Tensor, out: Tensor, start: int):
    return _symbols(5000, 40)[start : start + out.numel()], torch.tensor(0)


def _decompress_case(start: int, count: int, group_size: int):
    def make(dtype: torch.dtype):
        groups = -(-5000 // group_size)
        low = torch.linspace(-2, -1, groups, dtype=torch.float64).to(dtype)
        payload = reference.encode(_symbols(5000, 40), (5000,), 10, 0)
        return [payload, low, low + 3, 6, group_size, torch.zeros(count, dtype=dtype), start]

    return make


def _decompress_oracle(payload, low, high, bits, group_size, out, start):
    stop = start + out.numel()
    group = torch.arange(start, stop) // group_size
    t = (_symbols(5000, 40)[start:stop].double() + 0.5) / 2**bits
    return low.double()[group] + t * (high.double() - low.double())[group], torch.tensor(0)


def _lossless_bytes(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return (torch.randn(n, generator=generator) * 0.02).to(torch.bfloat16).view(torch.uint8)


def _lossless_decode_case(start: int, count: int):
    def make(dtype: torch.dtype):
        blob = planes.encode(_lossless_bytes(1200), 1, [12, 100])
        return [blob, torch.zeros(2 * count, dtype=torch.uint8), start]

    return make


def _lossless_decode_oracle(blob: Tensor, out: Tensor, start: int):
    return _lossless_bytes(1200)[2 * start :][: out.numel()], torch.tensor(0)


ONCE = (torch.float32,)
NO_VMAP = frozenset({"no vmap"})

SPECS = [
    OpSpec(
        QUANTIZE,
        [
            Case("rows", _weights((3, 50), 8, True)),
            Case("batch", _weights((2, 3, 41), 5)),
            Case("vector of 12 bits", _weights((1000,), 12, True, 1e-3)),
            Case("one weight a row", _weights((4, 1), 3)),
            Case("no rows", _weights((0, 7), 4, True)),
            Case("no columns", _weights((3, 0), 4, True)),
        ],
        _quantize_oracle,
        _quantize_bound,
        export_dynamic=lambda: (
            _weights((5, 20), 6, True)(torch.float32),
            ({0: torch.export.Dim("rows", min=2, max=100)},),
            _weights((9, 20), 6, True)(torch.float32),
        ),
    ),
    OpSpec(
        WEIGHT_RANGE,
        [
            Case("vector", _range_case((1000,), 4, 7)),
            Case("rows", _range_case((3, 50), 2, 1)),
            Case("no histogram", _range_case((3, 50), 0, 1)),
            Case("every beyond the end", _range_case((2, 9), 3, 100)),
            Case("no columns", _range_case((3, 0), 4, 2)),
        ],
        _range_oracle,
        lambda *args: (0, 0, 0, 0),
    ),
    OpSpec(
        QUANTIZE_ENCODE,
        [
            Case("vector", _quantize_encode_case((5000,), 6)),
            Case("rows of 12 bits", _quantize_encode_case((3, 700), 12)),
            Case("one", _quantize_encode_case((1,), 4)),
        ],
        _quantize_encode_oracle,
        lambda *args: (0,),
        tags=NO_VMAP,
    ),
    OpSpec(
        DEQUANTIZE,
        [
            Case("rows", _quantized((3, 20), 6), gradcheck=True),
            Case("vector", _quantized((500,), 7)),
            Case("batch", _quantized((2, 3, 11), 8)),
            Case("no columns", _quantized((3, 0), 8)),
        ],
        _dequantize_oracle,
        _dequantize_bound,
        differentiable=(1, 2),
    ),
    OpSpec(
        HUFFMAN_ENCODE,
        [
            Case("skewed", lambda dtype: [_symbols(5000, 60), [50, 100], 10, 0], dtypes=ONCE),
            Case("reserved", lambda dtype: [_symbols(300, 200), [300], 15, 17], dtypes=ONCE),
            Case("empty", lambda dtype: [_symbols(0, 2), [3, 0], 15, 0], dtypes=ONCE),
        ],
        _payload_oracle,
        lambda *args: (0,),
        tags=NO_VMAP,
    ),
    OpSpec(
        PAYLOAD_HEADER,
        [
            Case("good", lambda dtype: [reference.encode(_symbols(600, 60), (2, 300), 10, 0)], dtypes=ONCE),
            Case(
                "cut", lambda dtype: [reference.encode(_symbols(600, 60), (2, 300), 10, 0)[:-1]], dtypes=ONCE
            ),
        ],
        lambda payload: (
            torch.tensor(
                ([0, 1, 10, 600, 2, 2, 300] + [0] * 62)
                if payload.numel() == reference.encode(_symbols(600, 60), (2, 300), 10, 0).numel()
                else [BAD_LENGTH] + [0] * 68
            ),
        ),
        lambda *args: (0,),
        tags=NO_VMAP,
    ),
    OpSpec(
        HUFFMAN_DECODE,
        [
            Case("all", _decode_case(5000, 0, 5000), dtypes=ONCE),
            Case("slice", _decode_case(5000, 1000, 2500), dtypes=ONCE),
            Case("nothing", _decode_case(5000, 5000, 0), dtypes=ONCE),
        ],
        _decode_oracle,
        lambda *args: (0, 0),
        mutates=(1,),
        tags=NO_VMAP,
    ),
    OpSpec(
        DECOMPRESS,
        [
            Case("one range", _decompress_case(0, 5000, 5000)),
            Case("ranges of 77", _decompress_case(0, 5000, 77)),
            Case("slice", _decompress_case(990, 2000, 333)),
        ],
        _decompress_oracle,
        lambda payload, low, high, *rest: (16 * torch.finfo(low.dtype).eps, 0),
        mutates=(5,),
        tags=NO_VMAP,
    ),
    OpSpec(
        LOSSLESS_ENCODE,
        [
            Case("bfloat16", lambda dtype: [_lossless_bytes(1200), 1, [12, 100]], dtypes=ONCE),
            Case("no gain", lambda dtype: [_lossless_bytes(20), 1, [20]], dtypes=ONCE),
            Case("empty", lambda dtype: [_lossless_bytes(0), 1, [3, 0]], dtypes=ONCE),
        ],
        lambda data, dtype, shape: (planes.encode(data, dtype, shape),),
        lambda *args: (0,),
        tags=NO_VMAP,
    ),
    OpSpec(
        LOSSLESS_DECODE,
        [
            Case("all", _lossless_decode_case(0, 1200), dtypes=ONCE),
            Case("slice", _lossless_decode_case(200, 700), dtypes=ONCE),
            Case("nothing", _lossless_decode_case(1200, 0), dtypes=ONCE),
        ],
        _lossless_decode_oracle,
        lambda *args: (0, 0),
        mutates=(1,),
        tags=NO_VMAP,
    ),
    *samples_delta.SPECS,
]
