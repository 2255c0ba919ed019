"""quantize: weights to the bins of a uniform grid over their range, and back to the centres of their bins.

Chapter 3 of the thesis, Algorithms 1 and 2, with their errata mended: bins are counted from the smallest weight in
both directions, the largest weight is clamped into the last bin, and the number of bits is rounded half up.
docs/format.md has the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.arguments import same_dtype, within
from cfl_ops._core.failures import check_info, error_message, first_failure
from cfl_ops._core.op import Derivative, define_op
from cfl_ops._core.results import result_type
from cfl_ops._gpu.launch import cuda_cpp
from cfl_ops.ops.codec import cuda
from cfl_ops.ops.codec.reference.header import symbol_dtype
from cfl_ops.ops.codec.sample import LEAST_SAMPLE, MOST_EVERY, sampled

__all__ = [
    "QuantizedTensor",
    "allocate_bits",
    "dequantize",
    "estimate_entropy",
    "quantize",
    "quantize_ex",
]


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
    check_info("quantize", info, [value for value in result if isinstance(value, Tensor)], [])
    return result


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
    bits = check_bits("quantize", bits)
    histogram = checks.flag("quantize", "histogram", histogram)
    block_size = check_groups("quantize", w, per, block_size)
    w = w.detach()
    if per == "row":
        *parts, info = QUANTIZE(w, bits, histogram)
        symbols, group_size = parts[0], w.shape[-1]
    elif per == "tensor":
        *parts, info = QUANTIZE(w.reshape(-1), bits, histogram)
        symbols, group_size = parts[0].view(w.shape), w.numel()
    else:
        assert block_size is not None
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
    bits, group_size = (
        check_bits("dequantize", q.bits),
        checks.integer("dequantize", "q.group_size", q.group_size, 0),
    )
    checks.tensor("dequantize", "q.symbols", q.symbols, 0)
    if q.symbols.dtype != symbol_dtype(bits):
        raise TypeError(
            f"cfl_ops.dequantize: q.symbols must be {symbol_dtype(bits)} for {bits} bits, "
            f"but got {q.symbols.dtype}"
        )
    checks.floating("dequantize", "q.minimum", q.minimum, 0)
    checks.floating("dequantize", "q.maximum", q.maximum, 0)
    if q.minimum.shape != q.maximum.shape or q.minimum.dtype != q.maximum.dtype:
        raise ValueError("cfl_ops.dequantize: q.minimum and q.maximum must have the same shape and dtype")
    groups, numel = q.minimum.numel(), q.symbols.numel()
    if numel > groups * group_size or (numel and numel <= (groups - 1) * group_size):
        raise ValueError(
            f"cfl_ops.dequantize: {groups} ranges of {group_size} weights do not fit {numel} symbols"
        )
    shape = q.symbols.shape
    if q.minimum.ndim == 0:
        weights: Tensor = DEQUANTIZE(q.symbols.reshape(-1), q.minimum, q.maximum, bits)
        return weights.view(shape)
    if q.minimum.shape == shape[:-1] and shape[-1] == group_size:
        weights = DEQUANTIZE(q.symbols, q.minimum, q.maximum, bits)
        return weights
    flat, low, high = q.symbols.reshape(-1), q.minimum.reshape(-1), q.maximum.reshape(-1)
    whole = numel // max(group_size, 1)
    cut = whole * group_size
    parts = [DEQUANTIZE(flat[:cut].view(whole, group_size), low[:whole], high[:whole], bits).flatten()]
    if cut < numel:
        parts.append(DEQUANTIZE(flat[cut:], low[whole], high[whole], bits))
    return torch.cat(parts).view(shape)


def estimate_entropy(w: Tensor, *, bits: int = 4, fraction: float = 0.03) -> Tensor:
    r"""The entropy, in bits, of the histogram of a sample of the weights over ``2^bits`` bins.

    (thesis, Algorithm 1: F = 0.03 and M = 4.) The range is that of all weights. The sample is one of each
    ``round(1 / fraction)`` weights, of small tensors one of fewer so that it has at least 4,096 (or all there are);
    which one a hash decides, not chance: the same tensor always gives the same number, on every device.

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
    bits, fraction = check_bits("estimate_entropy", bits), check_fraction("estimate_entropy", fraction)
    return entropy_of(probe("estimate_entropy", w, bits, fraction)[2])


def allocate_bits(entropy: float | Tensor, *, floor: float = 6) -> int:
    """The bits of a layer, N = H + c rounded half up, from 1 to 16 (thesis, section 3; c = 5 or 6).

    Example:
        >>> import cfl_ops
        >>> cfl_ops.allocate_bits(2.5, floor=6)
        9

    """
    found = checks.number("allocate_bits", "entropy", entropy)
    kept = checks.number("allocate_bits", "floor", floor)
    return min(16, max(1, math.floor(found + kept + 0.5)))


def check_bits(op: str, bits: Any, name: str = "bits") -> int:
    """The bits of a symbol, as an int."""
    return checks.integer(op, name, bits, 1, 16)


def check_fraction(op: str, fraction: Any) -> float:
    """The part of the weights that a sample holds, as a float."""
    return checks.number(op, "fraction", fraction, checks.SHARE)


def check_groups(op: str, w: Tensor | None, per: Any, block_size: Any) -> int | None:
    """What shares a range (of weights, or of any); the weights of a block, where blocks do."""
    checks.choice(op, "per", per, ("tensor", "row", "block"))
    if per == "row" and w is not None and w.ndim == 0:
        raise ValueError(f"cfl_ops.{op}: w must have at least 1 dimension for per='row', but got shape ()")
    if (per == "block") != (block_size is not None):
        raise ValueError(f"cfl_ops.{op}: block_size must be given with per='block', and only then")
    return None if block_size is None else checks.integer(op, "block_size", block_size, 1)


def probe(op: str, w: Tensor, bits: int, fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    """The range of the weights and the histogram of a sample of them, in one pass."""
    every = round(min(1 / fraction, float(MOST_EVERY)))
    every = max(1, min(every, w.numel() // LEAST_SAMPLE))
    minimum, maximum, counts, info = WEIGHT_RANGE(w.detach().reshape(-1), bits, every)
    check_info(op, info, [minimum, maximum, counts], [])
    return minimum, maximum, counts


def entropy_of(counts: Tensor) -> Tensor:
    """The entropy of a histogram in bits."""
    p = counts.to(torch.float64) / counts.sum().clamp(min=1)
    entropy: Tensor = -torch.special.xlogy(p, p).sum() / math.log(2) + 0.0
    return entropy


class _Affine(NamedTuple):
    """symbol = trunc((w pre - origin) scale); weight = ((symbol + 1/2) step + origin) post. All float64 tensors."""

    origin: Tensor
    scale: Tensor
    step: Tensor
    pre: Tensor
    post: Tensor
    in_float64: Tensor
    """Whether the arithmetic is float64; else it is float32, with pre = post = 1."""


def _affine(minimum: Tensor, maximum: Tensor, bits: int) -> _Affine:
    low, high = minimum.to(torch.float64), maximum.to(torch.float64)
    pre = torch.ones_like(low)
    if minimum.dtype == torch.float64:
        in_float64 = torch.ones_like(low, dtype=torch.bool)
        # Powers of two keep ranges near the ends of float64 away from overflow and underflow.
        pre = torch.where((high > low) & (high - low < 2.0**-899), 2.0**200, pre)
        pre = torch.where(high * 0.5 - low * 0.5 > 2.0**899, 2.0**-4, pre)
        low, high = low * pre, high * pre
        span = high - low
    else:
        span = high - low
        in_float64 = (span != 0) & ~((span >= 2.0**-100) & (span <= 2.0**100))
    levels = 2.0**bits
    scale = torch.where(span > 0, levels / span, 0.0)
    step = torch.where(span > 0, span / levels, 0.0)
    return _Affine(low, scale, step, pre, 1 / pre, in_float64)


def _range(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest and largest finite weight of each row, and the number of others."""
    finite = w.isfinite()
    info = (~finite).sum(-1)
    if w.shape[-1] == 0:
        return w.new_zeros(w.shape[:-1]), w.new_zeros(w.shape[:-1]), info
    empty = ~finite.any(-1)
    minimum = torch.where(empty, 0, torch.where(finite, w, math.inf).amin(-1)) + 0.0
    maximum = torch.where(empty, 0, torch.where(finite, w, -math.inf).amax(-1)) + 0.0
    return minimum.to(w.dtype), maximum.to(w.dtype), info


def to_bins(w: Tensor, minimum: Tensor, maximum: Tensor, bits: int) -> Tensor:
    """int32 bins counted from the minimum; the maximum falls into the last bin."""
    a = _Affine(*(part.unsqueeze(-1) for part in _affine(minimum, maximum, bits)))
    index = ((w.to(torch.float64) * a.pre - a.origin) * a.scale).to(torch.int32)
    if w.dtype != torch.float64:
        single = (w.to(torch.float32) - a.origin.to(torch.float32)) * a.scale.to(torch.float32)
        index = torch.where(a.in_float64, index, single.to(torch.int32))
    return index.clamp(0, (1 << bits) - 1)


def _counts(index: Tensor, info: Tensor, levels: int) -> Tensor:
    """int64 counts of the bins of each row; none where info is not 0."""
    counts = torch.zeros(*index.shape[:-1], levels, dtype=torch.int64, device=index.device)
    if levels:
        kept = (info == 0).to(torch.int64).unsqueeze(-1).expand_as(index)
        counts.scatter_add_(-1, index.to(torch.int64), kept)
    return counts


def _quantize_python(w: Tensor, bits: int, histogram: bool) -> tuple[Tensor, ...]:
    minimum, maximum, info = _range(w)
    index = torch.where(info.unsqueeze(-1) > 0, 0, to_bins(w, minimum, maximum, bits))
    counts = _counts(index, info, 1 << bits if histogram else 0)
    return index.to(symbol_dtype(bits)), minimum, maximum, counts, info


def _weight_range_python(w: Tensor, bits: int, every: int) -> tuple[Tensor, ...]:
    minimum, maximum, info = _range(w)
    if not bits:
        return minimum, maximum, w.new_empty(*w.shape[:-1], 0, dtype=torch.int64), info
    index = to_bins(sampled(w, every), minimum, maximum, bits)
    return minimum, maximum, _counts(index, info, 1 << bits), info


def from_bins(symbols: Tensor, minimum: Tensor, maximum: Tensor, bits: int) -> Tensor:
    """The centres of the bins."""
    a = _Affine(*(part.unsqueeze(-1) for part in _affine(minimum, maximum, bits)))
    w = ((symbols.to(torch.float64) + 0.5) * a.step + a.origin) * a.post
    if minimum.dtype == torch.float64:
        return w
    single = (symbols.to(torch.float32) + 0.5) * a.step.to(torch.float32) + a.origin.to(torch.float32)
    return torch.where(a.in_float64, w.to(torch.float32), single).to(minimum.dtype)


def _quantize_fake(w: Tensor, bits: int, histogram: bool) -> tuple[Tensor, ...]:
    batch = w.shape[:-1]
    return (
        w.new_empty(w.shape, dtype=symbol_dtype(bits)),
        w.new_empty(batch),
        w.new_empty(batch),
        w.new_empty(*batch, (1 << bits) if histogram else 0, dtype=torch.int64),
        w.new_empty(batch, dtype=torch.int64),
    )


def _weight_range_fake(w: Tensor, bits: int, every: int) -> tuple[Tensor, ...]:
    batch = w.shape[:-1]
    counts = w.new_empty(*batch, (1 << bits) if bits else 0, dtype=torch.int64)
    return w.new_empty(batch), w.new_empty(batch), counts, w.new_empty(batch, dtype=torch.int64)


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
    grad64 = grad.to(torch.float64)
    low, high = ctx.shapes
    grad_minimum = (grad64 * (1 - t)).sum(-1).sum_to_size(low).to(grad.dtype)
    return None, grad_minimum, (grad64 * t).sum(-1).sum_to_size(high).to(grad.dtype), None


def _check_weight_range(w: Tensor, bits: int, every: int) -> None:
    within("weight_range", "bits", bits, 0, 16)
    within("weight_range", "every", every, 1, MOST_EVERY)


def _check_dequantize(symbols: Tensor, minimum: Tensor, maximum: Tensor, bits: int) -> None:
    within("dequantize", "bits", bits, 1, 16)
    same_dtype("dequantize", "maximum", maximum, "minimum", minimum.dtype)


QUANTIZE = define_op(
    "quantize(Tensor w, int bits, bool histogram)"
    " -> (Tensor symbols, Tensor minimum, Tensor maximum, Tensor histogram, Tensor info)",
    python=_quantize_python,
    fake=_quantize_fake,
    shapes={"w": "N"},
    check=lambda w, bits, histogram: within("quantize", "bits", bits, 1, 16),
    cuda=cuda_cpp(cuda.quantize),
)

WEIGHT_RANGE = define_op(
    "weight_range(Tensor w, int bits, int every)"
    " -> (Tensor minimum, Tensor maximum, Tensor histogram, Tensor info)",
    python=_weight_range_python,
    fake=_weight_range_fake,
    shapes={"w": "N"},
    check=_check_weight_range,
    cuda=cuda_cpp(cuda.weight_range),
)

DEQUANTIZE = define_op(
    "dequantize(Tensor symbols, Tensor minimum, Tensor maximum, int bits) -> Tensor",
    python=from_bins,
    fake=_dequantize_fake,
    shapes={"symbols": "symbols N", "minimum": "", "maximum": ""},
    check=_check_dequantize,
    cuda=cuda_cpp(cuda.dequantize),
    derivative=Derivative(_dequantize_setup_context, _dequantize_backward),
)


def _nonfinite_error(op: str, info: Tensor) -> ValueError:
    """What to raise for weights of which ``info`` counts the NaN and Inf values."""
    bad = int(info.sum())
    _, _, where = first_failure(info)
    return ValueError(
        f"cfl_ops.{op}: {where}w must be finite, but it has {bad} NaN or Inf value{'s' if bad > 1 else ''}"
        + ('; nonfinite="keep" keeps them' if op == "compress" else "")
    )


@error_message("quantize")
def _quantize_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    return _nonfinite_error("quantize", info)


@error_message("estimate_entropy")
def _entropy_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    return _nonfinite_error("estimate_entropy", info)


@error_message("compress")
def _compress_error(info: Tensor, context: Sequence[Tensor]) -> Exception:
    return _nonfinite_error("compress", info)
