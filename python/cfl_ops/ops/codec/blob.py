"""blob: weights to bytes that say what they hold, and back. docs/format.md describes the bytes.

Quantisation and a Huffman code over the bins, with a checksum over every byte: never a wrong weight back.
"""

from __future__ import annotations

import struct
import warnings
import zlib

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.arguments import same_dtype, within
from cfl_ops._core.failures import check_info, error_message
from cfl_ops._core.op import define_op
from cfl_ops._gpu.launch import cuda_cpp
from cfl_ops.ops.codec import codes, cuda
from cfl_ops.ops.codec.arguments import (
    DecompressArguments,
    QuantizeEncodeArguments,
    check_bytes,
    check_contiguous,
    check_data,
    check_encoded,
)
from cfl_ops.ops.codec.bits import as_uint8, flat_bits, refuse_odd_bools, write_bits
from cfl_ops.ops.codec.blob_reader import contradiction, describe, parse_blob
from cfl_ops.ops.codec.codes import Corrupt
from cfl_ops.ops.codec.huffman import (
    CHUNK_LOG2,
    DATA_DEPENDENT,
    HUFFMAN_DECODE,
    HUFFMAN_ENCODE,
    NO_VMAP,
    check_out,
    check_payload,
    check_shape,
    corrupt,
    decode_error,
    encoded_fake,
    span,
)
from cfl_ops.ops.codec.layout import (
    BLOB,
    BLOB_BYTES,
    DTYPES,
    MAGIC,
    MOST_RAW_DIMS,
    PALETTE,
    QUANTIZED,
    RAW,
    ZERO_BINS,
    pack_shape,
)
from cfl_ops.ops.codec.lossless import LOSSLESS_DECODE, LOSSLESS_ENCODE
from cfl_ops.ops.codec.plan import Grid, Options, Palette, find_grid, stretched
from cfl_ops.ops.codec.quantize import (
    check_bits,
    check_fraction,
    check_groups,
    from_bins,
    quantize_ex,
    to_bins,
)
from cfl_ops.ops.codec.reference import payload as reference
from cfl_ops.ops.codec.reference.header import as_bytes, from_bytes, memory_of, symbol_dtype

__all__ = ["compress", "decompress", "describe"]

_ERROR = checks.Range("above 0 (it may be inf)", lambda value: value > 0)


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
    max_error: float = 0.02,
    zero: str = "centre",
    lossless: bool = False,
) -> Tensor:
    """Weights to bytes: quantise to N bits, Huffman-code the bins, add checksums.

    (thesis, Algorithm 1.) ``N = H + floor`` rounded half up, where H is :func:`estimate_entropy` with
    ``probe_bits`` and ``fraction``; or ``bits``. The thesis reports 3.55 bits a weight at no loss of accuracy
    with ``floor=5`` and 3.78 with ``floor=6``.

    Beyond the thesis, so that no weight comes back wrong unsaid (docs/format.md, what compress decides):

    - where that N does not keep to ``max_error``, outliers are left out of the range and kept exactly, and N
      (unless given as ``bits``) grows; where no N serves, the bytes are kept as they are;
    - few different values (a mask's 0 and ``finfo.min``) are kept exactly, as a palette;
    - and so is every tensor whose own bytes are no more than the coded ones.

    Args:
        w: floating-point weights of up to 64 dimensions and any strides, up to 2^40 of them.
        floor: c, the bits kept above the entropy.
        probe_bits: M, the bits of the histogram that H is measured on.
        bits: N itself, from 1 to 16, instead of the three above.
        fraction: F, the part of the weights that H is measured on (at least 4,096 of them, or all).
        per: what shares a range (:func:`quantize`).
        block_size: with ``per="block"``, the weights of a block.
        nonfinite: ``"refuse"`` NaN and Inf with an error that counts them, or ``"keep"`` them exactly.
        max_error: the most rms error that is asked for, as a part of the standard deviation (of the group; outliers
            not counted, up to 1 weight in 64, and of two clusters far apart that within a cluster). It makes N larger,
            never smaller: for fewer bits give ``floor`` or ``bits``. With ``inf``, N and the range are the thesis' and
            nothing warns.
        zero: ``"exact"``: what falls into the bin of 0 comes back as 0, for pruned weights; otherwise 0 comes back
            as the centre of its bin, up to half a bin off.
        lossless: keep every bit (NaN payloads, infinities, -0.0 too) of a tensor of any dtype that the format knows:
            exponents, and what else of the bytes pays, are Huffman-coded (docs/format.md, lossless). No other option
            goes with it. At most 160 bytes more than the tensor.

    Returns:
        A 1-d uint8 tensor (docs/format.md describes it), for :func:`decompress`.

    Raises:
        TypeError, ValueError: bad arguments, or NaN or Inf weights.

    Warns:
        UserWarning: the rms error (measured on 1,024 weights) passes ``max_error``, for so few ``bits`` were asked.

    Not under ``fullgraph=True`` nor ``torch.export``: the bytes are written on the host.

    Example:
        >>> import torch, cfl_ops
        >>> w = torch.randn(1000, 50)
        >>> blob = cfl_ops.compress(w, bits=7)
        >>> len(blob) < w.numel() * 7 / 8
        True
        >>> bool((cfl_ops.decompress(blob) - w).abs().max() <= (w.max() - w.min()) / 2**8 * 1.001)
        True
        >>> blob = cfl_ops.compress(w.bfloat16(), lossless=True)
        >>> len(blob) < 0.7 * w.numel() * 2, torch.equal(cfl_ops.decompress(blob), w.bfloat16())
        (True, True)

    """
    options = Options(floor, probe_bits, bits, fraction, per, block_size, nonfinite, max_error, zero)
    if checks.flag("compress", "lossless", lossless):
        refuse_options("compress", options)
        return store_lossless("compress", "w", w)
    return compress_named("compress", "w", w, options)


def refuse_options(op: str, options: Options) -> None:
    """Raise for options that ask for a loss, where nothing is to be lost."""
    if given := unusual(numbers_of(op, options)):
        raise ValueError(
            f"cfl_ops.{op}: lossless must be given without other options, but got {', '.join(given)}"
        )


def unusual(options: Options) -> list[str]:
    """The names of the options that are not as they are by default."""
    return [name for name, value in options._asdict().items() if value != getattr(Options(), name)]


def numbers_of(op: str, options: Options, w: Tensor | None = None) -> Options:
    """The options with their numbers as numbers; raises for what is wrong with them, whatever the weights are."""
    checks.choice(op, "nonfinite", options.nonfinite, ("refuse", "keep"))
    checks.choice(op, "zero", options.zero, ("centre", "exact"))
    return options._replace(
        floor=checks.number(op, "floor", options.floor),
        probe_bits=check_bits(op, options.probe_bits, "probe_bits"),
        fraction=check_fraction(op, options.fraction),
        bits=None if options.bits is None else check_bits(op, options.bits),
        block_size=check_groups(op, w, options.per, options.block_size),
        max_error=checks.number(op, "max_error", options.max_error, _ERROR),
    )


def checked_options(w: Tensor, options: Options) -> Options:
    """The options with their numbers as numbers; raises for what is wrong with them or with the weights' kind."""
    checks.floating("compress", "w", w, 0)
    check_data("compress", "w", w)
    found = numbers_of("compress", options, w)
    check_shape("compress", "w", w, codes.MAX_SYMBOLS)
    return found


def compress_named(op: str, name: str, w: Tensor, asked: Options, stacklevel: int = 3) -> Tensor:
    """As :func:`compress`; warnings call the weights ``name`` and point so many calls up."""
    options = checked_options(w, asked)
    w = w.detach()
    if w.numel() == 0:
        return store_raw("compress", "w", w)
    grid = find_grid(w, options)
    blob = store_planned(w, grid, options)
    if isinstance(grid, Grid) and grid.error > options.max_error and quantised_bits(blob):
        warnings.warn(
            f"cfl_ops.{op}: {name} comes back with an rms error of about {grid.error:.2g} of its standard deviation, "
            f"which passes max_error={options.max_error:g}: {grid.bits} bits are too few for it; ask for more, "
            "or leave out bits",
            UserWarning,
            stacklevel=stacklevel,
        )
    return blob


def store_planned(w: Tensor, grid: Grid | Palette | None, options: Options) -> Tensor:
    """The blob that :func:`find_grid` has found to serve; the weights' own bytes where they are no more."""
    if isinstance(grid, Palette):
        blob = _store_palette(w, grid)
    elif grid is None:
        return store_raw("compress", "w", w)
    else:
        blob = _store_bins(w, grid, options)
    if blob.numel() >= w.numel() * w.element_size() + BLOB_BYTES + 8 * w.ndim:
        return store_raw("compress", "w", w)
    return blob


def quantised_bits(blob: Tensor) -> int:
    """N of a blob of quantised weights, 0 of one that keeps every bit."""
    return int(blob[7]) if int(blob[5]) == QUANTIZED else 0


def _store_bins(w: Tensor, grid: Grid, options: Options) -> Tensor:
    q = None
    bits, minimum, maximum, group_size = grid.bits, grid.minimum, grid.maximum, w.numel()
    if grid.stretch > 1:
        maximum = stretched(grid)
    if options.per != "tensor" or (w.device.type != "cpu" and grid.stretch == 1):
        q, info = quantize_ex(grid.weights, bits, per=options.per, block_size=options.block_size)
        check_info("compress", info, [q.symbols], [])
        minimum, maximum, group_size = q.minimum, q.maximum, q.group_size
    low, high = _raw_bytes(minimum), _raw_bytes(maximum)
    tables = [low, high]
    if grid.exceptions is not None:
        tables = [_raw_bytes(grid.exceptions), low, high, _raw_bytes(w.reshape(-1)[grid.exceptions])]
    table = (
        torch.cat(tables)
        if len(tables) > 2 or low.numel() > 64
        else from_bytes(as_bytes(low) + as_bytes(high))
    )
    head_bytes = BLOB_BYTES + table.numel()
    where = list(w.shape), CHUNK_LOG2, head_bytes
    if q is None and w.device.type != "cpu":
        symbols = to_bins(grid.weights.reshape(1, -1), minimum.view(1), maximum.view(1), bits)
        blob: Tensor = HUFFMAN_ENCODE(symbols.view(w.shape).to(symbol_dtype(bits)), *where)
    elif q is None:  # the symbols of a chunk are encoded while they are in the cache
        blob = QUANTIZE_ENCODE(grid.weights.reshape(-1), minimum, maximum, bits, *where)
    else:
        blob = HUFFMAN_ENCODE(q.symbols, *where)
    zero_bins = options.zero == "exact"
    head = BLOB.pack(
        *(MAGIC, 2 if zero_bins else 1, QUANTIZED, DTYPES.index(w.dtype), bits, blob.numel()),
        *(
            group_size,
            minimum.numel(),
            0 if grid.exceptions is None else grid.exceptions.numel(),
            grid.entropy,
        ),
        ZERO_BINS if zero_bins else 0,
    )
    raw = as_bytes(table)
    head += struct.pack("<I", zlib.crc32(raw, zlib.crc32(head)))
    blob[:head_bytes] = from_bytes(head + raw, w.device)
    return blob


def _store_palette(w: Tensor, palette: Palette) -> Tensor:
    raw = as_bytes(_raw_bytes(palette.values))
    head_bytes = BLOB_BYTES + len(raw)
    blob: Tensor = HUFFMAN_ENCODE(palette.symbols, list(w.shape), CHUNK_LOG2, head_bytes)
    head = BLOB.pack(
        *(MAGIC, 2, PALETTE, DTYPES.index(w.dtype), 0, blob.numel()),
        *(palette.values.numel(), 0, 0, 0.0, 0),
    )
    head += struct.pack("<I", zlib.crc32(raw, zlib.crc32(head)))
    blob[:head_bytes] = from_bytes(head + raw, w.device)
    return blob


def decompress(
    blob: Tensor, out: Tensor | None = None, *, start: int | None = None, stop: int | None = None
) -> Tensor:
    """The weights that :func:`compress` put into a blob, or an error; never wrong weights.

    Decoding and dequantisation are one pass over each chunk. Synchronises a GPU twice: for the first bytes, and
    for the outcome of the checks.

    Args:
        blob: 1-d uint8.
        out: a contiguous tensor of the weights' dtype, of as many elements as are asked for, which shares no
            memory with the blob, and requires no grad (or is written under ``torch.no_grad()``).
        start: only the elements from here on (of the flattened tensor), as a 1-d tensor: only their chunks
            are read.
        stop: and up to here.

    Raises:
        CorruptDataError: a byte is wrong, missing or too many. Where a chunk of the payload is damaged, any
            element of ``out`` may have been overwritten.
        IndexError: start and stop do not fit.
        TypeError, ValueError: bad arguments. After these, an IndexError, or an error of the header and its
            tables (and of any byte of a blob that is stored as it is), ``out`` is as it was.

    Not under ``fullgraph=True`` nor ``torch.export``: the bytes are read on the host.

    Example:
        >>> import torch, cfl_ops
        >>> blob = cfl_ops.compress(torch.full((2, 3), 0.5))
        >>> cfl_ops.decompress(blob)
        tensor([[0.5000, 0.5000, 0.5000],
                [0.5000, 0.5000, 0.5000]])

    """
    op = "decompress"
    check_payload(op, "blob", blob)
    parsed = parse_blob(op, blob)
    whole = start is None and stop is None
    first, count = span(op, start, stop, parsed.numel)
    if out is None:
        out = torch.empty(parsed.shape if whole else (count,), dtype=parsed.dtype, device=blob.device)
    else:
        check_out(op, out, blob, (parsed.dtype,))
        if out.numel() != count:
            raise ValueError(
                f"cfl_ops.{op}: out must hold {count} elements, but got shape {tuple(out.shape)}"
            )
        if out.is_conj() or out.is_neg():  # its memory holds other bits than it shows
            write_bits(out.detach(), decompress(blob, start=start, stop=stop))
            return out
    if parsed.lossless:
        flat = out.detach().view(-1).view(torch.uint8)
        check_info("lossless_decode_", LOSSLESS_DECODE(blob, flat, first), [flat], [])
        if parsed.dtype == torch.bool and bool((flat > 1).any()):
            flat.zero_()
            raise corrupt(op, "the data of the blob are neither true nor false")
        return out
    if parsed.raw:
        element = parsed.dtype.itemsize
        part = parsed.data[first * element : (first + count) * element]
        if count:
            out.detach().view(-1).view(torch.uint8).copy_(
                part
            )  # bytes: some dtypes can be copied in no other way
        return out
    if parsed.palette is not None:
        symbols = torch.empty(count, dtype=torch.uint8, device=blob.device)
        info = HUFFMAN_DECODE(parsed.data, symbols, first)
        check_info("decompress_", info, [symbols], [])
        if count and int(symbols.max()) >= parsed.palette.numel():
            raise contradiction(op)
        torch.index_select(parsed.palette, 0, symbols.to(torch.int32), out=out.detach().view(-1))
        return out
    info = DECOMPRESS(parsed.data, parsed.minimum, parsed.maximum, parsed.bits, parsed.group_size, out, first)
    check_info("decompress_", info, [out], [])
    if parsed.zero_bins is not None:
        _zero_bins(out.detach().view(-1), parsed.zero_bins, first, parsed.group_size)
    if parsed.where is not None and parsed.exceptions is not None:
        here = (parsed.where >= first) & (parsed.where < first + count)
        out.view(-1)[parsed.where[here] - first] = parsed.exceptions[here]
    return out


def _zero_bins(flat: Tensor, centre: Tensor, first: int, group_size: int) -> None:
    """Set to 0 what stands for it, in pieces that stay in the cache (torch writes a float faster than a bool)."""
    piece = 1 << 16 if flat.device.type == "cpu" else max(1, flat.numel())
    other = torch.empty(min(piece, flat.numel()), dtype=flat.dtype, device=flat.device)
    for at in range(0, flat.numel(), piece):
        part = flat[at : at + piece]
        here = centre
        if centre.numel() > 1:
            begin = first + at
            here = centre[torch.arange(begin, begin + len(part), device=flat.device) // group_size]
        part.mul_(torch.ne(part, here, out=other[: len(part)])).add_(0.0)  # no negative zeros


def store_raw(op: str, name: str, w: Tensor) -> Tensor:
    """A blob that keeps every bit of the tensor, as it is."""
    return _raw_blob(_checked_bytes(op, name, w), w)


def _raw_blob(data: Tensor, w: Tensor) -> Tensor:
    host = memory_of(data)
    if w.ndim <= MOST_RAW_DIMS:
        version, shape, table_bytes = 1, struct.pack(f"<{w.ndim}Q", *w.shape), 0
    else:
        version, shape = 3, pack_shape(w.shape)
        table_bytes = len(shape)
    total = BLOB_BYTES + len(shape) + data.numel()
    head = BLOB.pack(
        *(MAGIC, version, RAW, DTYPES.index(w.dtype), 0, total),
        *(w.ndim, data.numel(), table_bytes, 0.0, zlib.crc32(host)),
    )
    head += struct.pack("<I", zlib.crc32(shape, zlib.crc32(head)))
    blob = torch.empty(total, dtype=torch.uint8, device=w.device)
    blob[: BLOB_BYTES + len(shape)] = from_bytes(head + shape, w.device)
    blob[BLOB_BYTES + len(shape) :] = data
    return blob


def store_lossless(op: str, name: str, w: Tensor) -> Tensor:
    """A blob that keeps every bit of the tensor, at most 160 bytes larger than it."""
    check_data(op, name, w)
    data = _checked_bytes(op, name, w)
    blob: Tensor = LOSSLESS_ENCODE(data, DTYPES.index(w.dtype), list(w.shape))
    return blob if blob.numel() else _raw_blob(data, w)


def _checked_bytes(op: str, name: str, w: Tensor) -> Tensor:
    """What is to be kept of a tensor that the format can hold."""
    _check_dtype(op, name, w)
    check_shape(op, name, w, 2**63 - 1)
    refuse_odd_bools(op, name, w)
    return _raw_bytes(w)


def _check_dtype(op: str, name: str, w: Tensor) -> None:
    if w.dtype not in DTYPES:
        raise TypeError(f"cfl_ops.{op}: {name} must have a dtype that the format knows, but got {w.dtype}")


def _raw_bytes(w: Tensor) -> Tensor:
    """The memory of a tensor as 1-d uint8."""
    return as_uint8(flat_bits(w))


def _quantize_encode_python(args: QuantizeEncodeArguments) -> Tensor:
    symbols = to_bins(args.w, args.minimum, args.maximum, args.bits).to(symbol_dtype(args.bits))
    return reference.encode(symbols, tuple(args.shape), args.chunk_log2, args.reserve)


def _decompress_python(args: DecompressArguments) -> Tensor:
    payload, minimum, maximum, bits, group_size, out, start = args
    if not args.in_range():
        return codes.info(codes.OUT_OF_RANGE, payload.device)
    count = out.numel()
    try:
        symbols = reference.decode(payload, start, count)
    except Corrupt as error:
        return codes.info(error.code, payload.device)
    if minimum.numel() == 1:
        weights = from_bins(symbols, minimum.view(()), maximum.view(()), bits)
    else:
        group = torch.arange(start, start + count, device=out.device) // group_size
        weights = from_bins(symbols.unsqueeze(-1), minimum.flatten()[group], maximum.flatten()[group], bits)
    out.copy_(weights.view(out.shape))
    return codes.info(codes.GOOD, payload.device)


def _check_quantize_encode(args: QuantizeEncodeArguments) -> None:
    op = "quantize_encode"
    within(op, "bits", args.bits, 1, 16)
    check_encoded(op, args.w.numel(), args.shape, args.chunk_log2, args.reserve)
    for name, value in (("minimum", args.minimum), ("maximum", args.maximum)):
        same_dtype(op, name, value, "w", args.w.dtype)


def _check_decompress(args: DecompressArguments) -> None:
    op, groups = "decompress_", args.minimum.numel()
    check_bytes(op, "payload", args.payload)
    within(op, "bits", args.bits, 1, 16)
    within(op, "group_size", args.group_size, 1)
    within(op, "the number of maximum", args.maximum.numel(), groups, groups)
    for name, value in (("minimum", args.minimum), ("maximum", args.maximum)):
        same_dtype(op, name, value, "out", args.out.dtype)
    check_contiguous(op, "out", args.out)


QUANTIZE_ENCODE = define_op(
    "quantize_encode(Tensor w, Tensor minimum, Tensor maximum, int bits, SymInt[] shape, int chunk_log2,"
    " SymInt reserve) -> Tensor",
    arguments=QuantizeEncodeArguments,
    python=_quantize_encode_python,
    fake=lambda args: encoded_fake(args.w),
    shapes={"w": "N", "minimum": "", "maximum": ""},
    check=_check_quantize_encode,
    no_vmap=NO_VMAP,
    tags=DATA_DEPENDENT,
)

DECOMPRESS = define_op(
    "decompress_(Tensor payload, Tensor minimum, Tensor maximum, int bits, SymInt group_size, Tensor(a!) out,"
    " SymInt start) -> Tensor info",
    arguments=DecompressArguments,
    python=_decompress_python,
    fake=lambda args: args.payload.new_empty((), dtype=torch.int64),
    shapes={"payload": "uint8 ...", "minimum": "...", "maximum": "...", "out": "..."},
    check=_check_decompress,
    no_vmap=NO_VMAP,
    cuda=cuda_cpp(cuda.decompress_),
    tags=(torch.Tag.cudagraph_unsafe,),
)

error_message("decompress_")(decode_error("decompress"))
