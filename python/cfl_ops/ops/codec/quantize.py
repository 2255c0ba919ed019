"""codec: weights to a few bits each, and never a wrong byte back.

Uniform quantisation over the range of the weights, bin centres as reconstruction, and a Huffman code over
the bins (chapter 3 of the thesis, Algorithms 1 and 2, with their errata mended: bins are counted from the
smallest weight in both directions, the largest weight is clamped into the last bin, and the number of bits
is rounded half up). docs/format.md describes the bytes.
"""

from __future__ import annotations

import math
import os
import struct
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import Derivative, define_op
from cfl_ops._core.results import result_type
from cfl_ops._gpu.launch import cuda_cpp
from cfl_ops.errors import CorruptDataError
from cfl_ops.ops.codec import cuda
from cfl_ops.ops.codec.reference import payload as _py
from cfl_ops.ops.codec.reference.payload import as_bytes, from_bytes

__all__ = [
    "QuantizedTensor",
    "allocate_bits",
    "compress",
    "compress_state_dict",
    "decompress",
    "decompress_state_dict",
    "dequantize",
    "estimate_entropy",
    "huffman_decode",
    "huffman_encode",
    "load_file",
    "quantize",
    "quantize_ex",
    "save_file",
]

CHUNK_LOG2 = 15
"""Symbols of a chunk, the unit of checksums and of random access: 2^15."""


@result_type("codec")
class QuantizedTensor(NamedTuple):
    """A tensor as bins of a uniform grid over its range (or the range of each row or block)."""

    symbols: Tensor
    """The bins, uint8 for up to 8 bits, else uint16; the shape of the weights."""
    minimum: Tensor
    """The smallest weight of each group, in the dtype of the weights: ``()``, ``(...)`` or ``(blocks,)``."""
    maximum: Tensor
    """The largest weight of each group."""
    bits: int
    """There are ``2^bits`` bins."""
    group_size: int
    """How many consecutive weights share a range."""
    histogram: Tensor | None = None
    """int64 counts of the bins, ``(2^bits,)`` for each group, where asked for."""


# --- quantize -----------------------------------------------------------------------------------------------


class _Affine(NamedTuple):
    """symbol = trunc((w pre - origin) scale); weight = ((symbol + 1/2) step + origin) post. All float64."""

    origin: Tensor
    scale: Tensor
    step: Tensor
    pre: Tensor
    post: Tensor
    wide: Tensor
    """Whether the arithmetic is float64; else it is float32, with pre = post = 1."""


def _affine(minimum: Tensor, maximum: Tensor, bits: int) -> _Affine:
    low, high = minimum.to(torch.float64), maximum.to(torch.float64)
    pre = torch.ones_like(low)
    if minimum.dtype == torch.float64:
        wide = torch.ones_like(low, dtype=torch.bool)
        # Powers of two keep ranges near the ends of float64 away from overflow and underflow.
        pre = torch.where(high - low < 2.0**-899, 2.0**200, pre)
        pre = torch.where(high * 0.5 - low * 0.5 > 2.0**899, 2.0**-4, pre)
        low, high = low * pre, high * pre
        span = high - low
    else:
        span = high - low
        wide = (span != 0) & ~((span >= 2.0**-100) & (span <= 2.0**100))
    levels = 2.0**bits
    scale = torch.where(span > 0, levels / span, 0.0)
    step = torch.where(span > 0, span / levels, 0.0)
    return _Affine(low, scale, step, pre, 1 / pre, wide)


def _symbol_dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.uint16


def _range_python(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest and largest finite weight of each row, and the number of others."""
    finite = w.isfinite()
    info = (~finite).sum(-1)
    if w.shape[-1] == 0:
        return w.new_zeros(w.shape[:-1]), w.new_zeros(w.shape[:-1]), info
    empty = ~finite.any(-1)
    minimum = torch.where(empty, 0, torch.where(finite, w, math.inf).amin(-1)) + 0.0
    maximum = torch.where(empty, 0, torch.where(finite, w, -math.inf).amax(-1)) + 0.0
    return minimum.to(w.dtype), maximum.to(w.dtype), info


def _bins_python(w: Tensor, minimum: Tensor, maximum: Tensor, bits: int) -> Tensor:
    """int32 bins counted from the minimum; the maximum falls into the last bin."""
    a = _Affine(*(part.unsqueeze(-1) for part in _affine(minimum, maximum, bits)))
    index = ((w.to(torch.float64) * a.pre - a.origin) * a.scale).to(torch.int32)
    if w.dtype != torch.float64:
        single = (w.to(torch.float32) - a.origin.to(torch.float32)) * a.scale.to(torch.float32)
        index = torch.where(a.wide, index, single.to(torch.int32))
    return index.clamp(0, (1 << bits) - 1)


def _count_python(index: Tensor, info: Tensor, levels: int) -> Tensor:
    """int64 counts of the bins of each row; none where info is not 0."""
    counts = torch.zeros(*index.shape[:-1], levels, dtype=torch.int64, device=index.device)
    if levels:
        kept = (info == 0).to(torch.int64).unsqueeze(-1).expand_as(index)
        counts.scatter_add_(-1, index.to(torch.int64), kept)
    return counts


def _quantize_python(w: Tensor, bits: int, histogram: bool) -> tuple[Tensor, ...]:
    minimum, maximum, info = _range_python(w)
    index = torch.where(info.unsqueeze(-1) > 0, 0, _bins_python(w, minimum, maximum, bits))
    counts = _count_python(index, info, 1 << bits if histogram else 0)
    return index.to(_symbol_dtype(bits)), minimum, maximum, counts, info


def _quantize_fake(w: Tensor, bits: int, histogram: bool) -> tuple[Tensor, ...]:
    batch = w.shape[:-1]
    return (
        w.new_empty(w.shape, dtype=_symbol_dtype(bits)),
        w.new_empty(batch),
        w.new_empty(batch),
        w.new_empty(*batch, (1 << bits) if histogram else 0, dtype=torch.int64),
        w.new_empty(batch, dtype=torch.int64),
    )


QUANTIZE = define_op(
    "quantize(Tensor w, int bits, bool histogram)"
    " -> (Tensor symbols, Tensor minimum, Tensor maximum, Tensor histogram, Tensor info)",
    python=_quantize_python,
    fake=_quantize_fake,
    core_dims=(1, None, None),
    cuda=cuda_cpp(cuda.quantize),
)


@error_message("quantize")
def _explain_quantize(info: Tensor, context: Sequence[Tensor]) -> Exception:
    bad = int(info.sum())
    _, _, where = first_failure(info)
    return ValueError(
        f"cfl_ops.quantize: {where}w must be finite, but it has {bad} NaN or Inf value{'s' if bad > 1 else ''}"
    )


def _weight_range_python(w: Tensor, bits: int, every: int) -> tuple[Tensor, ...]:
    minimum, maximum, info = _range_python(w)
    if not bits:
        return minimum, maximum, w.new_empty(*w.shape[:-1], 0, dtype=torch.int64), info
    index = _bins_python(w[..., ::every], minimum, maximum, bits)
    return minimum, maximum, _count_python(index, info, 1 << bits), info


def _weight_range_fake(w: Tensor, bits: int, every: int) -> tuple[Tensor, ...]:
    batch = w.shape[:-1]
    counts = w.new_empty(*batch, (1 << bits) if bits else 0, dtype=torch.int64)
    return w.new_empty(batch), w.new_empty(batch), counts, w.new_empty(batch, dtype=torch.int64)


WEIGHT_RANGE = define_op(
    "weight_range(Tensor w, int bits, int every)"
    " -> (Tensor minimum, Tensor maximum, Tensor histogram, Tensor info)",
    python=_weight_range_python,
    fake=_weight_range_fake,
    core_dims=(1, None, None),
    cuda=cuda_cpp(cuda.weight_range),
)


def _dequantize_python(symbols: Tensor, minimum: Tensor, maximum: Tensor, bits: int) -> Tensor:
    """The centres of the bins."""
    a = _Affine(*(part.unsqueeze(-1) for part in _affine(minimum, maximum, bits)))
    w = ((symbols.to(torch.float64) + 0.5) * a.step + a.origin) * a.post
    if minimum.dtype == torch.float64:
        return w
    single = (symbols.to(torch.float32) + 0.5) * a.step.to(torch.float32) + a.origin.to(torch.float32)
    return torch.where(a.wide, w.to(torch.float32), single).to(minimum.dtype)


def _dequantize_fake(symbols: Tensor, minimum: Tensor, maximum: Tensor, bits: int) -> Tensor:
    return minimum.new_empty(symbols.shape)


def _dequantize_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    symbols, minimum, maximum, ctx.bits = inputs
    ctx.shapes = minimum.shape, maximum.shape
    ctx.save_for_backward(symbols)


def _dequantize_backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
    # weight = minimum (1 - t) + maximum t with t = (symbol + 1/2) / 2^bits
    (symbols,) = ctx.saved_tensors
    t = (symbols.to(torch.float64) + 0.5) / 2.0**ctx.bits
    wide = grad.to(torch.float64)
    low, high = ctx.shapes
    grad_minimum = (wide * (1 - t)).sum(-1).sum_to_size(low).to(grad.dtype)
    return None, grad_minimum, (wide * t).sum(-1).sum_to_size(high).to(grad.dtype), None


DEQUANTIZE = define_op(
    "dequantize(Tensor symbols, Tensor minimum, Tensor maximum, int bits) -> Tensor",
    python=_dequantize_python,
    fake=_dequantize_fake,
    core_dims=(1, 0, 0, None),
    cuda=cuda_cpp(cuda.dequantize),
    derivative=Derivative(_dequantize_setup_context, _dequantize_backward),
)


def _check_bits(op: str, bits: Any) -> None:
    if isinstance(bits, bool) or not isinstance(bits, int) or not 1 <= bits <= 16:
        raise ValueError(f"cfl_ops.{op}: bits must be an integer from 1 to 16, but got {bits!r}")


def quantize_ex(
    w: Tensor, bits: int = 8, *, per: str = "tensor", block_size: int | None = None, histogram: bool = False
) -> tuple[QuantizedTensor, Tensor]:
    """As :func:`quantize`, with the number of NaN and Inf values of each group instead of an error.

    Where it is not zero, all symbols of the group are 0 and its range is that of the finite values.

    Example:
        >>> import torch, cfl_ops
        >>> q, bad = cfl_ops.quantize_ex(torch.tensor([[0.0, 1.0], [float("nan"), 2.0]]), per="row")
        >>> bad
        tensor([0, 1])
    """
    checks.floating("quantize", "w", w, 0)
    _check_bits("quantize", bits)
    checks.choice("quantize", "per", per, ("tensor", "row", "block"))
    if (per == "block") != (block_size is not None):
        raise ValueError("cfl_ops.quantize: block_size must be given with per='block', and only then")
    w = w.detach()
    if per == "row":
        if w.ndim == 0:
            raise ValueError(
                "cfl_ops.quantize: w must have at least 1 dimension for per='row', but got shape ()"
            )
        *parts, info = QUANTIZE(w, bits, histogram)
        symbols, group_size = parts[0], w.shape[-1]
    elif per == "tensor":
        *parts, info = QUANTIZE(w.reshape(-1), bits, histogram)
        symbols, group_size = parts[0].view(w.shape), w.numel()
    else:
        assert block_size is not None
        if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
            raise ValueError(
                f"cfl_ops.quantize: block_size must be a positive integer, but got {block_size!r}"
            )
        flat, whole = w.reshape(-1), w.numel() // block_size * block_size
        results = [QUANTIZE(flat[:whole].view(-1, block_size), bits, histogram)]
        if whole < w.numel():  # the last block is shorter
            results.append(QUANTIZE(flat[whole:].unsqueeze(0), bits, histogram))
        symbols = torch.cat([result[0].flatten() for result in results]).view(w.shape)
        parts = [symbols, *(torch.cat([result[i] for result in results]) for i in (1, 2, 3))]
        info = torch.cat([result[4] for result in results])
        group_size = block_size
    counts = parts[3] if histogram else None
    return QuantizedTensor(symbols, parts[1], parts[2], bits, group_size, counts), info


def quantize(
    w: Tensor, bits: int = 8, *, per: str = "tensor", block_size: int | None = None, histogram: bool = False
) -> QuantizedTensor:
    r"""Uniform quantisation to ``2^bits`` bins over the range of the weights.

    .. math:: q = \min(\lfloor 2^N (w - w_{min}) / (w_{max} - w_{min}) \rfloor, 2^N - 1)

    (thesis, Algorithm 1, mended: bins are counted from the minimum, and the maximum is clamped.) The
    arithmetic is float32 for float16, bfloat16 and float32 weights (float64 where their range needs it),
    float64 for float64.

    Args:
        w: floating-point weights of any shape.
        bits: N, from 1 to 16.
        per: what shares a range: the ``"tensor"``, each ``"row"`` (the last dimension), or each ``"block"``.
        block_size: the consecutive weights of a block (the last one may be shorter).
        histogram: count the bins in the same pass.

    Returns:
        :class:`QuantizedTensor`; symbols are uint8 for up to 8 bits, else uint16.

    Raises:
        TypeError, ValueError: bad arguments, or NaN or Inf weights (with their number).

    Reads the weights twice and writes the symbols once. Not differentiable in ``w``.

    Example:
        >>> import torch, cfl_ops
        >>> q = cfl_ops.quantize(torch.tensor([0.0, 0.3, 0.5, 1.0]), bits=2)
        >>> q.symbols
        tensor([0, 1, 2, 3], dtype=torch.uint8)
        >>> cfl_ops.dequantize(q)
        tensor([0.1250, 0.3750, 0.6250, 0.8750])

    """
    result, info = quantize_ex(w, bits, per=per, block_size=block_size, histogram=histogram)
    check_info("quantize", info, [result.symbols], [])
    return result


def dequantize(q: QuantizedTensor) -> Tensor:
    r"""The weights at the centres of their bins: ``minimum + (symbol + 1/2) (maximum - minimum) / 2^bits``.

    The error is at most half a bin, and a few roundings of the weights' dtype. A group whose weights were all
    equal comes back exactly. Differentiable in ``q.minimum`` and ``q.maximum``.

    Example:
        >>> import torch, cfl_ops
        >>> w = torch.linspace(-1, 1, 100)
        >>> error = cfl_ops.dequantize(cfl_ops.quantize(w, 8)) - w
        >>> bool(error.abs().max() <= 1 / 256 + 1e-6)
        True

    """
    if not isinstance(q, QuantizedTensor):
        raise TypeError(f"cfl_ops.dequantize: q must be a QuantizedTensor, but got {type(q).__name__}")
    _check_bits("dequantize", q.bits)
    if q.symbols.dtype != _symbol_dtype(q.bits):
        raise TypeError(
            f"cfl_ops.dequantize: q.symbols must be {_symbol_dtype(q.bits)} for {q.bits} bits, "
            f"but got {q.symbols.dtype}"
        )
    checks.floating("dequantize", "q.minimum", q.minimum, 0)
    if q.minimum.shape != q.maximum.shape or q.minimum.dtype != q.maximum.dtype:
        raise ValueError("cfl_ops.dequantize: q.minimum and q.maximum must have the same shape and dtype")
    groups, numel = q.minimum.numel(), q.symbols.numel()
    if numel > groups * q.group_size or (numel and numel <= (groups - 1) * q.group_size):
        raise ValueError(
            f"cfl_ops.dequantize: {groups} ranges of {q.group_size} weights do not fit {numel} symbols"
        )
    shape = q.symbols.shape
    if q.minimum.ndim == 0:
        return _as_tensor(DEQUANTIZE(q.symbols.reshape(-1), q.minimum, q.maximum, q.bits)).view(shape)
    if q.minimum.shape == shape[:-1] and shape[-1] == q.group_size:
        return _as_tensor(DEQUANTIZE(q.symbols, q.minimum, q.maximum, q.bits))
    flat, low, high = q.symbols.reshape(-1), q.minimum.reshape(-1), q.maximum.reshape(-1)
    whole = numel // max(q.group_size, 1)
    cut = whole * q.group_size
    parts = [DEQUANTIZE(flat[:cut].view(whole, q.group_size), low[:whole], high[:whole], q.bits).flatten()]
    if cut < numel:
        parts.append(DEQUANTIZE(flat[cut:], low[whole], high[whole], q.bits))
    return torch.cat(parts).view(shape)


def _as_tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value


def estimate_entropy(w: Tensor, *, bits: int = 4, fraction: float = 0.03) -> Tensor:
    r"""The entropy, in bits, of the histogram of a sample of the weights over ``2^bits`` bins.

    (thesis, Algorithm 1: F = 0.03 and M = 4.) The range is that of all weights. The sample is every
    ``round(1 / fraction)``-th weight, so the same tensor always gives the same number.

    Returns:
        A 0-d float64 tensor; 0 for an empty or constant tensor.

    Raises:
        TypeError, ValueError: bad arguments, or NaN or Inf weights.

    Example:
        >>> import torch, cfl_ops
        >>> cfl_ops.estimate_entropy(torch.linspace(0, 1, 1600), fraction=1.0)
        tensor(4., dtype=torch.float64)

    """
    checks.floating("estimate_entropy", "w", w, 0)
    return _entropy(_probe("estimate_entropy", w, bits, fraction)[2])


def _probe(op: str, w: Tensor, bits: int, fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """The range of the weights and the histogram of a sample of them, in one pass."""
    _check_bits(op, bits)
    if not 0 < fraction <= 1:
        raise ValueError(f"cfl_ops.{op}: fraction must be in (0, 1], but got {fraction}")
    every = max(1, round(1 / fraction))
    minimum, maximum, counts, info = WEIGHT_RANGE(w.detach().reshape(-1), bits, every)
    _refuse_nonfinite(op, info)
    return minimum, maximum, counts


def _entropy(counts: Tensor) -> Tensor:
    p = counts.to(torch.float64) / counts.sum().clamp(min=1)
    entropy: Tensor = -torch.special.xlogy(p, p).sum() / math.log(2) + 0.0
    return entropy


def _refuse_nonfinite(op: str, info: Tensor) -> None:
    bad = int(info.sum())
    if bad:
        raise ValueError(
            f"cfl_ops.{op}: w must be finite, but it has {bad} NaN or Inf value{'s' if bad > 1 else ''}"
        )


def allocate_bits(entropy: float | Tensor, *, floor: float = 6) -> int:
    """The bits of a layer, N = H + c rounded half up, from 1 to 16 (thesis, section 3; c = 5 or 6).

    Example:
        >>> import cfl_ops
        >>> cfl_ops.allocate_bits(2.5, floor=6)
        9

    """
    return min(16, max(1, math.floor(float(entropy) + floor + 0.5)))


# --- Huffman ------------------------------------------------------------------------------------------------


def _no_vmap(name: str) -> Any:
    def core_dims(args: Sequence[Any]) -> NoReturn:
        raise RuntimeError(
            f"cfl_ops.{name}: the sizes of encoded bytes depend on the data, so vmap cannot stack them"
        )

    return core_dims


def _huffman_encode_python(symbols: Tensor, shape: Sequence[int], chunk_log2: int, reserve: int) -> Tensor:
    return _py.encode(symbols, tuple(shape), chunk_log2, reserve)


def _huffman_encode_fake(symbols: Tensor, shape: Sequence[int], chunk_log2: int, reserve: int) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size(min=_py.HEADER_BYTES)
    return symbols.new_empty(size, dtype=torch.uint8)


_DATA_DEPENDENT = (torch.Tag.dynamic_output_shape, torch.Tag.cudagraph_unsafe)

HUFFMAN_ENCODE = define_op(
    "huffman_encode(Tensor symbols, SymInt[] shape, int chunk_log2, SymInt reserve) -> Tensor",
    python=_huffman_encode_python,
    fake=_huffman_encode_fake,
    core_dims=_no_vmap("huffman_encode"),
    cuda=cuda_cpp(cuda.huffman_encode),
    tags=_DATA_DEPENDENT,
)


def _quantize_encode_python(
    w: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    bits: int,
    shape: Sequence[int],
    chunk_log2: int,
    reserve: int,
) -> Tensor:
    symbols = _bins_python(w, minimum, maximum, bits).to(_symbol_dtype(bits))
    return _py.encode(symbols, tuple(shape), chunk_log2, reserve)


def _quantize_encode_fake(
    w: Tensor,
    minimum: Tensor,
    maximum: Tensor,
    bits: int,
    shape: Sequence[int],
    chunk_log2: int,
    reserve: int,
) -> Tensor:
    return _huffman_encode_fake(w, shape, chunk_log2, reserve)


QUANTIZE_ENCODE = define_op(
    "quantize_encode(Tensor w, Tensor minimum, Tensor maximum, int bits, SymInt[] shape, int chunk_log2,"
    " SymInt reserve) -> Tensor",
    python=_quantize_encode_python,
    fake=_quantize_encode_fake,
    core_dims=_no_vmap("quantize_encode"),
    tags=_DATA_DEPENDENT,
)


def _info(code: int, device: torch.device) -> Tensor:
    return torch.tensor(code, dtype=torch.int64, device=device)


def _payload_header_python(payload: Tensor) -> Tensor:
    fields = [0] * (5 + _py.MAX_DIMS)
    try:
        header = _py.parse(payload)
        fields[1:5] = header.symbol_bytes, header.chunk_log2, header.numel, len(header.shape)
        fields[5 : 5 + len(header.shape)] = header.shape
    except _py.Corrupt as error:
        fields[0] = error.code
    return torch.tensor(fields, dtype=torch.int64, device=payload.device)


PAYLOAD_HEADER = define_op(
    "payload_header(Tensor payload) -> Tensor",
    python=_payload_header_python,
    fake=lambda payload: payload.new_empty(5 + _py.MAX_DIMS, dtype=torch.int64),
    core_dims=_no_vmap("payload_header"),
)


def _huffman_decode_python(payload: Tensor, out: Tensor, start: int) -> Tensor:
    try:
        symbols = _py.decode(payload, start, out.numel())
        if symbols.dtype != out.dtype:
            raise _py.Corrupt(_py.OUT_OF_RANGE)
    except _py.Corrupt as error:
        return _info(error.code, payload.device)
    out.copy_(symbols.view(out.shape))
    return _info(_py.GOOD, payload.device)


HUFFMAN_DECODE = define_op(
    "huffman_decode_(Tensor payload, Tensor(a!) out, SymInt start) -> Tensor info",
    python=_huffman_decode_python,
    fake=lambda payload, out, start: payload.new_empty((), dtype=torch.int64),
    core_dims=_no_vmap("huffman_decode"),
    cuda=cuda_cpp(cuda.huffman_decode_),
    tags=(torch.Tag.cudagraph_unsafe,),
)


def _decompress_python(
    payload: Tensor, minimum: Tensor, maximum: Tensor, bits: int, group_size: int, out: Tensor, start: int
) -> Tensor:
    count = out.numel()
    if start < 0 or (count and (start + count - 1) // group_size >= minimum.numel()):
        return _info(_py.OUT_OF_RANGE, payload.device)
    try:
        symbols = _py.decode(payload, start, count)
    except _py.Corrupt as error:
        return _info(error.code, payload.device)
    if minimum.numel() == 1:
        weights = _dequantize_python(symbols, minimum.view(()), maximum.view(()), bits)
    else:
        group = torch.arange(start, start + count, device=out.device) // group_size
        weights = _dequantize_python(symbols.unsqueeze(-1), minimum[group], maximum[group], bits)
    out.copy_(weights.view(out.shape))
    return _info(_py.GOOD, payload.device)


DECOMPRESS = define_op(
    "decompress_(Tensor payload, Tensor minimum, Tensor maximum, int bits, SymInt group_size, Tensor(a!) out,"
    " SymInt start) -> Tensor info",
    python=_decompress_python,
    fake=lambda payload, *_: payload.new_empty((), dtype=torch.int64),
    core_dims=_no_vmap("decompress"),
    cuda=cuda_cpp(cuda.decompress_),
    tags=(torch.Tag.cudagraph_unsafe,),
)


def _corrupt(op: str, what: str) -> CorruptDataError:
    return CorruptDataError(f"cfl_ops.{op}: {what}")


def _explain_decode(op: str) -> Any:
    def explain(info: Tensor, context: Sequence[Tensor]) -> Exception:
        code = int(info)
        if code >= _py.BAD_CHUNK:
            return _corrupt(op, f"chunk {code - _py.BAD_CHUNK} of the payload is damaged")
        if code == _py.OUT_OF_RANGE:
            return _corrupt(op, "the payload does not hold the symbols that out asks for")
        return _corrupt(op, f"the payload {_py.WORDS[code]}")

    return explain


error_message("huffman_decode_")(_explain_decode("huffman_decode"))
error_message("decompress_")(_explain_decode("decompress"))


def huffman_encode(symbols: Tensor) -> Tensor:
    """Encode uint8 or uint16 symbols of any shape with a Huffman code made for them.

    The payload remembers shape and dtype, and holds a checksum of its header and of each chunk of 2^15
    symbols. The code is optimal for the counts of the symbols; where there are more than 2,048 symbols for
    each member of the alphabet, for the counts of an evenly spread sample, which costs less than about 0.001
    bits a symbol. Alphabets to 4,096 are what it is made for; all 65,536 work.

    A GPU is waited for twice: for the counts, and for the sizes of the chunks.

    Returns:
        A 1-d uint8 tensor on the device of ``symbols``.

    Example:
        >>> import torch, cfl_ops
        >>> symbols = torch.arange(1000).remainder(3).to(torch.uint8)
        >>> payload = cfl_ops.huffman_encode(symbols)
        >>> len(payload) < 300, torch.equal(cfl_ops.huffman_decode(payload), symbols)
        (True, True)

    """
    _check_symbols("huffman_encode", "symbols", symbols)
    return _as_tensor(HUFFMAN_ENCODE(symbols, list(symbols.shape), CHUNK_LOG2, 0))


def _check_symbols(op: str, name: str, value: Any) -> None:
    checks.tensor(op, name, value, 0)
    if value.dtype not in (torch.uint8, torch.uint16):
        raise TypeError(f"cfl_ops.{op}: {name} must be uint8 or uint16, but got {value.dtype}")


def _check_payload(op: str, name: str, payload: Any) -> None:
    checks.tensor(op, name, payload, 1)
    if payload.dtype != torch.uint8 or payload.ndim != 1:
        raise TypeError(
            f"cfl_ops.{op}: {name} must be a 1-d uint8 tensor, but got {payload.dtype} "
            f"of shape {tuple(payload.shape)}"
        )


def _check_out(op: str, out: Any, payload: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    checks.tensor(op, "out", out, 0)
    if out.dtype not in dtypes:
        raise TypeError(f"cfl_ops.{op}: out must be {' or '.join(map(str, dtypes))}, but got {out.dtype}")
    if not out.is_contiguous():
        raise ValueError(f"cfl_ops.{op}: out must be contiguous, but got strides {out.stride()}")
    checks.same_device(op, "the encoded bytes", payload, out=out)


def _span(op: str, start: int | None, stop: int | None, numel: int) -> tuple[int, int]:
    first, last = 0 if start is None else start, numel if stop is None else stop
    if not 0 <= first <= last <= numel:
        raise IndexError(
            f"cfl_ops.{op}: start and stop must be ordered and within the {numel} elements, "
            f"but got {start} and {stop}"
        )
    return first, last - first


def huffman_decode(
    payload: Tensor, out: Tensor | None = None, *, start: int | None = None, stop: int | None = None
) -> Tensor:
    """Decode what :func:`huffman_encode` wrote, bit for bit, or raise.

    A GPU is waited for twice: for the header, and for the outcome of the checks.

    Args:
        payload: 1-d uint8.
        out: a contiguous tensor of the symbols' dtype to write into, of as many elements as are asked for;
            with it the call is free of data-dependent shapes (torch.compile with fullgraph).
        start: decode only the elements from here on (of the flattened tensor), as a 1-d tensor: only the
            chunks that hold them are read and checked.
        stop: and up to here.

    Raises:
        CorruptDataError: a byte is wrong, missing or too many. ``out`` may then be partly written.
        IndexError: start and stop do not fit the payload.

    Example:
        >>> import torch, cfl_ops
        >>> payload = cfl_ops.huffman_encode(torch.tensor([[1, 2], [1, 1]], dtype=torch.uint8))
        >>> cfl_ops.huffman_decode(payload, start=1, stop=3)
        tensor([2, 1], dtype=torch.uint8)
        >>> payload[-1] ^= 1
        >>> cfl_ops.huffman_decode(payload)
        Traceback (most recent call last):
        ...
        cfl_ops.errors.CorruptDataError: cfl_ops.huffman_decode: chunk 0 of the payload is damaged

    """
    op = "huffman_decode"
    _check_payload(op, "payload", payload)
    whole = start is None and stop is None
    if out is not None:
        _check_out(op, out, payload, (torch.uint8, torch.uint16))
    if out is None or not whole or not torch.compiler.is_compiling():
        header = _header(op, payload)
        first, count = _span(op, start, stop, header.numel)
        dtype = torch.uint8 if header.symbol_bytes == 1 else torch.uint16
        shape = header.shape if whole else (count,)
        if out is None:
            out = torch.empty(shape, dtype=dtype, device=payload.device)
        elif out.numel() != count or out.dtype != dtype:
            raise ValueError(
                f"cfl_ops.{op}: out must hold {count} elements of {dtype}, but got {out.dtype} of shape "
                f"{tuple(out.shape)}"
            )
    else:
        first = 0
    info = HUFFMAN_DECODE(payload, out, first)
    check_info("huffman_decode_", info, [out], [])
    return out


class _Header(NamedTuple):
    """The checked header of a payload."""

    symbol_bytes: int
    numel: int
    shape: tuple[int, ...]


def _header(op: str, payload: Tensor, raw: Tensor | None = None) -> _Header:
    """The checked header, before anything is allocated for what it promises.

    ``raw``: the first bytes of a payload on a GPU, where they are known.
    """
    if payload.device.type == "cpu" or torch.compiler.is_compiling():
        code, symbol_bytes, _, numel, ndim, *extents = _as_tensor(PAYLOAD_HEADER(payload)).tolist()
        shape = tuple(extents[:ndim])
    else:  # read on the host, and not once more by the op that decodes
        code, symbol_bytes, numel, shape = cuda.read_header(payload, raw)
    if code:
        raise _corrupt(op, f"the payload {_py.WORDS[code]}")
    return _Header(symbol_bytes, numel, shape)


# --- weights ------------------------------------------------------------------------------------------------

_BLOB_MAGIC, _BLOB_VERSION = b"CFLC", 1
_BLOB = struct.Struct("<4s4BQQQQdI")  # then a checksum: 56 bytes
_BLOB_BYTES = _BLOB.size + 4
_RAW, _QUANTIZED = 0, 1
_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex32),
)


def _raw_bytes(w: Tensor) -> Tensor:
    """The memory of a tensor as 1-d uint8."""
    w = w.detach().contiguous()
    return (
        w.reshape(-1).view(torch.uint8) if w.numel() else torch.empty(0, dtype=torch.uint8, device=w.device)
    )


def _store_raw(w: Tensor) -> Tensor:
    """A blob that keeps every bit of the tensor."""
    if w.dtype not in _DTYPES:
        raise TypeError(f"cfl_ops.compress_state_dict: cannot store a tensor of {w.dtype}")
    data = as_bytes(_raw_bytes(w))
    shape = struct.pack(f"<{w.ndim}Q", *w.shape)
    total = _BLOB_BYTES + len(shape) + len(data)
    head = _BLOB.pack(
        *(_BLOB_MAGIC, _BLOB_VERSION, _RAW, _DTYPES.index(w.dtype), 0, total),
        *(w.ndim, len(data), 0, 0.0, zlib.crc32(data)),
    )
    head += struct.pack("<I", zlib.crc32(shape, zlib.crc32(head)))
    return from_bytes(head + shape + data, w.device)


def compress(
    w: Tensor,
    *,
    floor: float = 6,
    probe_bits: int = 4,
    bits: int | None = None,
    fraction: float = 0.03,
    per: str = "tensor",
    block_size: int | None = None,
    nonfinite: str = "refuse",
) -> Tensor:
    """Weights to bytes: quantise to N bits, Huffman-code the bins, add checksums.

    (thesis, Algorithm 1.) ``N = H + floor`` rounded half up, where H is :func:`estimate_entropy` with
    ``probe_bits`` and ``fraction``; or ``bits``. The thesis reports 3.55 bits a weight at no loss of accuracy
    with ``floor=5`` and 3.78 with ``floor=6``.

    Args:
        w: floating-point weights, any shape and strides, up to 2^40 of them.
        floor: c, the bits kept above the entropy.
        probe_bits: M, the bits of the histogram that H is measured on.
        bits: N itself, from 1 to 16, instead of the three above.
        fraction: F, the part of the weights that H is measured on.
        per: what shares a range (:func:`quantize`).
        block_size: with ``per="block"``, the weights of a block.
        nonfinite: ``"refuse"`` NaN and Inf with an error that counts them, or ``"keep"`` them exactly.

    Returns:
        A 1-d uint8 tensor (docs/format.md describes it), for :func:`decompress`.

    Raises:
        TypeError, ValueError: bad arguments, or NaN or Inf weights.

    Example:
        >>> import torch, cfl_ops
        >>> w = torch.randn(1000, 50)
        >>> blob = cfl_ops.compress(w, bits=6)
        >>> len(blob) < w.numel() * 6 / 8
        True
        >>> bool((cfl_ops.decompress(blob) - w).abs().max() <= (w.max() - w.min()) / 2**7 * 1.001)
        True

    """
    checks.floating("compress", "w", w, 0)
    checks.choice("compress", "nonfinite", nonfinite, ("refuse", "keep"))
    if bits is not None:
        _check_bits("compress", bits)
    w = w.detach()
    if w.numel() == 0:
        return _store_raw(w)
    index = values = None
    if nonfinite == "keep":
        flat = w.reshape(-1)
        bad = ~flat.isfinite()
        if bool(bad.any()):
            index = bad.nonzero().flatten()
            values = flat[index]
            good = flat[~bad]
            w = torch.where(bad, good[0] if good.numel() else 0, flat).to(w.dtype).view(w.shape)
    entropy, minimum, maximum = math.nan, None, None
    if bits is None:
        minimum, maximum, counts = _probe("compress", w, probe_bits, fraction)
        entropy = float(_entropy(counts.cpu()))  # it stands in the bytes, which do not depend on the device
        bits = allocate_bits(entropy, floor=floor)
    q = None
    if per == "tensor" and block_size is None and w.device.type == "cpu":
        # The symbols of a chunk are encoded while they are in the cache.
        if minimum is None or maximum is None:
            minimum, maximum, _, info = WEIGHT_RANGE(w.reshape(-1), 0, 1)
            _refuse_nonfinite("compress", info)
        group_size = w.numel()
    else:
        q, info = quantize_ex(w, bits, per=per, block_size=block_size)
        if bool(info.any()):
            raise ValueError(str(_explain_quantize(info, [])).replace("quantize", "compress"))
        minimum, maximum, group_size = q.minimum, q.maximum, q.group_size

    low, high = _raw_bytes(minimum), _raw_bytes(maximum)
    tables = [low, high]
    if index is not None and values is not None:
        tables = [_raw_bytes(index), low, high, _raw_bytes(values)]
    table = (
        torch.cat(tables)
        if len(tables) > 2 or low.numel() > 64
        else from_bytes(as_bytes(low) + as_bytes(high))
    )
    head_bytes = _BLOB_BYTES + table.numel()
    where = list(w.shape), CHUNK_LOG2, head_bytes
    if q is None:
        blob = _as_tensor(QUANTIZE_ENCODE(w.reshape(-1), minimum, maximum, bits, *where))
    else:
        blob = _as_tensor(HUFFMAN_ENCODE(q.symbols, *where))
    head = _BLOB.pack(
        *(_BLOB_MAGIC, _BLOB_VERSION, _QUANTIZED, _DTYPES.index(w.dtype), bits, blob.numel()),
        *(group_size, minimum.numel(), 0 if index is None else index.numel(), entropy, 0),
    )
    raw = as_bytes(table)
    head += struct.pack("<I", zlib.crc32(raw, zlib.crc32(head)))
    blob[:head_bytes] = from_bytes(head + raw, w.device)
    return blob


class _Blob(NamedTuple):
    """A checked blob: what decompress needs to know before it allocates anything."""

    shape: tuple[int, ...]
    numel: int
    dtype: torch.dtype
    data: Tensor
    raw: bool
    bits: int = 0
    group_size: int = 1
    minimum: Tensor | None = None
    maximum: Tensor | None = None
    where: Tensor | None = None
    exceptions: Tensor | None = None


def _parse_blob(op: str, blob: Tensor) -> _Blob:
    size = blob.numel()
    if size < _BLOB_BYTES:
        raise _corrupt(op, "the blob is too short to hold a header")
    near = blob  # what can be read without a wait: of a blob on a GPU, its first bytes
    if blob.device.type != "cpu":
        near = cuda.to_host(blob[: _py.prefix(size)])
    fixed = as_bytes(near[:_BLOB_BYTES])
    magic, version, kind, code, bits, total, group_size, groups, exceptions, _, data_crc = _BLOB.unpack_from(
        fixed
    )
    (checksum,) = struct.unpack_from("<I", fixed, _BLOB.size)
    if magic != _BLOB_MAGIC:
        raise _corrupt(op, "the blob does not start with the codec's mark")
    if version != _BLOB_VERSION or kind not in (_RAW, _QUANTIZED) or code >= len(_DTYPES):
        raise _corrupt(op, "the blob was written in a version that this reader does not know")
    if total != size:
        raise _corrupt(op, "the blob has another length than its header says (truncated or extended)")
    dtype = _DTYPES[code]
    element = dtype.itemsize
    if kind == _RAW:
        ndim, table_bytes = group_size, 8 * group_size
    else:
        table_bytes = 2 * groups * element + exceptions * (8 + element)
    head = _BLOB_BYTES + table_bytes
    if head > size or (kind == _RAW and head + groups != size):
        raise _corrupt(op, "the blob has a header that contradicts itself")
    table = as_bytes((near if head <= near.numel() else blob)[_BLOB_BYTES:head])
    if zlib.crc32(table, zlib.crc32(fixed[: _BLOB.size])) != checksum:
        raise _corrupt(op, "the blob has a damaged header (checksum)")
    data = blob[head:]
    if kind == _RAW:
        shape = struct.unpack(f"<{ndim}Q", table)
        numel = math.prod(shape)
        if numel * element != groups or max(shape, default=0) >= 2**63 or ndim > _py.MAX_DIMS:
            raise _corrupt(op, "the blob has a header that contradicts itself")
        if zlib.crc32(as_bytes(data)) != data_crc:
            raise _corrupt(op, "the data of the blob are damaged (checksum)")
        return _Blob(shape, numel, dtype, data, True)

    header = _header(op, data, None if near is blob or head >= near.numel() else near[head:])
    needed = -(-header.numel // group_size) if group_size else 0
    if not 1 <= bits <= 16 or code > 3 or needed != groups or header.symbol_bytes != (1 if bits <= 8 else 2):
        raise _corrupt(op, "the blob has a header that contradicts itself")
    at = 8 * exceptions
    ranges = from_bytes(table[at : at + 2 * groups * element]).view(dtype)
    minimum, maximum = ranges[:groups], ranges[groups:]
    if groups == 1:  # the common case, without the overhead of small tensors
        low, high = ranges.tolist()
        good = math.isfinite(low) and math.isfinite(high) and low <= high
    else:
        good = bool((minimum.isfinite() & maximum.isfinite() & (minimum <= maximum)).all())
    index = values = None
    if exceptions:
        index = from_bytes(table[:at]).view(torch.int64)
        values = from_bytes(table[at + 2 * groups * element :]).view(dtype)
        if int(index.min()) < 0 or int(index.max()) >= header.numel:
            raise _corrupt(op, "the blob has a header that contradicts itself")
    if not good:
        raise _corrupt(op, "the blob has a range that is not finite or not ordered")
    if blob.device.type != "cpu":
        minimum = cuda.to_device(minimum, blob.device)
        maximum = cuda.to_device(maximum, blob.device)
        if index is not None and values is not None:
            index, values = index.to(blob.device), values.to(blob.device)
    return _Blob(
        header.shape, header.numel, dtype, data, False, bits, group_size, minimum, maximum, index, values
    )


def decompress(
    blob: Tensor, out: Tensor | None = None, *, start: int | None = None, stop: int | None = None
) -> Tensor:
    """The weights that :func:`compress` put into a blob, or an error; never wrong weights.

    Decoding and dequantisation are one pass over each chunk. A GPU is waited for twice: for the first bytes, and
    for the outcome of the checks.

    Args:
        blob: 1-d uint8.
        out: a contiguous tensor of the weights' dtype, of as many elements as are asked for.
        start: only the elements from here on (of the flattened tensor), as a 1-d tensor: only their chunks
            are read.
        stop: and up to here.

    Raises:
        CorruptDataError: a byte is wrong, missing or too many. ``out`` may then be partly written.
        IndexError: start and stop do not fit.

    Example:
        >>> import torch, cfl_ops
        >>> blob = cfl_ops.compress(torch.full((2, 3), 0.5))
        >>> cfl_ops.decompress(blob)
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])

    """
    op = "decompress"
    _check_payload(op, "blob", blob)
    parsed = _parse_blob(op, blob)
    whole = start is None and stop is None
    first, count = _span(op, start, stop, parsed.numel)
    if out is None:
        out = torch.empty(parsed.shape if whole else (count,), dtype=parsed.dtype, device=blob.device)
    else:
        _check_out(op, out, blob, (parsed.dtype,))
        if out.numel() != count:
            raise ValueError(
                f"cfl_ops.{op}: out must hold {count} elements, but got shape {tuple(out.shape)}"
            )
    if parsed.raw:
        element = parsed.dtype.itemsize
        part = parsed.data[first * element : (first + count) * element]
        if count:
            out.view(-1).copy_(part.clone().view(parsed.dtype))
        return out
    info = DECOMPRESS(parsed.data, parsed.minimum, parsed.maximum, parsed.bits, parsed.group_size, out, first)
    check_info("decompress_", info, [out], [])
    if parsed.where is not None and parsed.exceptions is not None:
        here = (parsed.where >= first) & (parsed.where < first + count)
        out.view(-1)[parsed.where[here] - first] = parsed.exceptions[here]
    return out


# --- state dicts and files ----------------------------------------------------------------------------------


def compress_state_dict(
    state_dict: Mapping[str, Tensor], *, min_numel: int = 256, **options: Any
) -> dict[str, Tensor]:
    """Compress each floating-point tensor of at least ``min_numel`` elements; keep all others bit for bit.

    Args:
        state_dict: names to tensors.
        min_numel: smaller tensors (biases, norms) are kept as they are: their headers would outweigh the gain.
        options: those of :func:`compress`.

    Returns:
        names to blobs, for :func:`decompress_state_dict` or :func:`save_file`.

    Example:
        >>> import torch, cfl_ops
        >>> model = torch.nn.Linear(100, 100)
        >>> blobs = cfl_ops.compress_state_dict(model.state_dict(), bits=8)
        >>> _ = model.load_state_dict(cfl_ops.decompress_state_dict(blobs))

    """
    out = {}
    for name, value in state_dict.items():
        checks.tensor("compress_state_dict", f"state_dict[{name!r}]", value, 0)
        try:
            compressible = value.dtype in checks.FLOATS and value.numel() >= min_numel
            out[name] = compress(value, **options) if compressible else _store_raw(value)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (in state_dict[{name!r}])") from None
    return out


def decompress_state_dict(blobs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that :func:`compress_state_dict` took; raises CorruptDataError as :func:`decompress`.

    Example:
        >>> import torch, cfl_ops
        >>> blobs = cfl_ops.compress_state_dict({"w": torch.zeros(3)})
        >>> cfl_ops.decompress_state_dict(blobs)
        {'w': tensor([0., 0., 0.])}
    """
    out = {}
    for name, blob in blobs.items():
        try:
            out[name] = decompress(blob)
        except CorruptDataError as error:
            raise CorruptDataError(f"{error} (in {name!r})") from None
    return out


_FILE_MAGIC, _FILE_VERSION = b"CFLZ", 1
_FILE = struct.Struct("<4sIQII")  # then a checksum: 28 bytes


def save_file(state_dict: Mapping[str, Tensor], path: str | os.PathLike[str], **options: Any) -> int:
    """Compress a state dict into a ``.cflz`` file; returns its size in bytes.

    The file is written under a temporary name beside ``path`` and renamed when it is complete and on disk.

    Args:
        state_dict: names to tensors.
        path: where to write.
        options: those of :func:`compress_state_dict`.

    Example:
        >>> import tempfile, torch, cfl_ops
        >>> path = tempfile.mktemp(suffix=".cflz")
        >>> _ = cfl_ops.save_file({"weight": torch.randn(300, 300)}, path, bits=8)
        >>> cfl_ops.load_file(path)["weight"].shape
        torch.Size([300, 300])

    """
    blobs = {name: as_bytes(blob) for name, blob in compress_state_dict(state_dict, **options).items()}
    index = b""
    for name, blob in blobs.items():
        encoded = name.encode()
        index += struct.pack("<QI", len(blob), len(encoded)) + encoded
    total = _FILE.size + 4 + len(index) + sum(map(len, blobs.values()))
    head = _FILE.pack(_FILE_MAGIC, _FILE_VERSION, total, len(blobs), len(index))
    head += struct.pack("<I", zlib.crc32(index, zlib.crc32(head)))
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(head + index)
            for blob in blobs.values():
                file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return total


def load_file(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Read a ``.cflz`` file back into a state dict.

    Raises:
        CorruptDataError: the file is not one, or a byte of it is wrong, missing or too many.

    Example:
        >>> import os, tempfile, torch, cfl_ops
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.cflz")
        ...     size = cfl_ops.save_file({"w": torch.zeros(3)}, path)
        ...     cfl_ops.load_file(path)
        {'w': tensor([0., 0., 0.])}
    """
    op = "load_file"
    data = Path(path).read_bytes()
    if len(data) < _FILE.size + 4 or data[:4] != _FILE_MAGIC:
        raise _corrupt(op, "the file does not start with the codec's mark")
    _, version, total, count, index_bytes = _FILE.unpack_from(data)
    if version != _FILE_VERSION:
        raise _corrupt(op, "the file was written in a version that this reader does not know")
    at = _FILE.size + 4
    if total != len(data) or at + index_bytes > total:
        raise _corrupt(op, "the file has another length than its header says (truncated or extended)")
    index = data[at : at + index_bytes]
    (checksum,) = struct.unpack_from("<I", data, _FILE.size)
    if zlib.crc32(index, zlib.crc32(data[: _FILE.size])) != checksum:
        raise _corrupt(op, "the file has a damaged header (checksum)")
    sizes: dict[str, int] = {}
    position = 0
    try:
        for _ in range(count):
            size, name_bytes = struct.unpack_from("<QI", index, position)
            position += 12 + name_bytes
            if position > len(index):
                raise ValueError
            sizes[index[position - name_bytes : position].decode()] = size
    except (struct.error, ValueError):
        raise _corrupt(op, "the file has an index that contradicts itself") from None
    at += index_bytes
    if position != len(index) or len(sizes) != count or at + sum(sizes.values()) != total:
        raise _corrupt(op, "the file has an index that contradicts itself")
    blobs, view = {}, memoryview(data)
    for name, size in sizes.items():
        blobs[name] = from_bytes(bytes(view[at : at + size]), torch.device(device))
        at += size
    return decompress_state_dict(blobs)
