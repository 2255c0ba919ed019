"""blob: weights to bytes that say what they hold, and back. docs/format.md describes the bytes.

Quantisation and a Huffman code over the bins, with a checksum over every byte: never a wrong weight back.
"""

from __future__ import annotations

import math
import struct
import warnings
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.arguments import same_dtype, within
from cfl_ops._core.failures import check_info, error_message
from cfl_ops._core.op import define_op
from cfl_ops._gpu.launch import cuda_cpp
from cfl_ops.errors import CorruptDataError
from cfl_ops.ops.codec import codes, cuda
from cfl_ops.ops.codec.arguments import (
    DecompressArguments,
    QuantizeEncodeArguments,
    check_bytes,
    check_contiguous,
    check_encoded,
)
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
    read_header,
    span,
)
from cfl_ops.ops.codec.plan import Grid, Options, Palette, dense, find_grid, stretched, zero_bin
from cfl_ops.ops.codec.quantize import (
    check_bits,
    check_fraction,
    check_groups,
    from_bins,
    quantize_ex,
    to_bins,
)
from cfl_ops.ops.codec.reference import payload as reference
from cfl_ops.ops.codec.reference.header import as_bytes, from_bytes, prefix, symbol_dtype

__all__ = ["compress", "decompress"]

_BLOB_MAGIC = b"CFLC"
_BLOB = struct.Struct("<4s4BQQQQdI")  # then a checksum: 56 bytes
_BLOB_BYTES = _BLOB.size + 4
_RAW, _QUANTIZED, _PALETTE = 0, 1, 2
_KINDS = {1: (_RAW, _QUANTIZED), 2: (_QUANTIZED, _PALETTE)}
"""What each version has; a writer uses the lowest that says what it has to, so that old readers read on."""
_ZERO_BINS = 1
"""Version 2, quantised: the bin that 0 falls into reads as 0."""
_ERROR = checks.Range("above 0 (it may be inf)", lambda value: value > 0)
_DTYPES = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex32),
)


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

    """
    options = (floor, probe_bits, bits, fraction, per, block_size, nonfinite, max_error, zero)
    return compress_named("compress", "w", w, Options(*options))


def checked_options(w: Tensor, options: Options) -> Options:
    """The options with their numbers as numbers; raises for what is wrong with them or with the weights' kind."""
    checks.floating("compress", "w", w, 0)
    checks.choice("compress", "nonfinite", options.nonfinite, ("refuse", "keep"))
    checks.choice("compress", "zero", options.zero, ("centre", "exact"))
    found = options._replace(
        floor=checks.number("compress", "floor", options.floor),
        probe_bits=check_bits("compress", options.probe_bits, "probe_bits"),
        fraction=check_fraction("compress", options.fraction),
        bits=None if options.bits is None else check_bits("compress", options.bits),
        block_size=check_groups("compress", w, options.per, options.block_size),
        max_error=checks.number("compress", "max_error", options.max_error, _ERROR),
    )
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
    if blob.numel() >= w.numel() * w.element_size() + _BLOB_BYTES + 8 * w.ndim:
        return store_raw("compress", "w", w)
    return blob


def quantised_bits(blob: Tensor) -> int:
    """N of a blob of quantised weights, 0 of one that keeps every bit."""
    return int(blob[7]) if int(blob[5]) == _QUANTIZED else 0


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
    head_bytes = _BLOB_BYTES + table.numel()
    where = list(w.shape), CHUNK_LOG2, head_bytes
    if q is None and w.device.type != "cpu":
        symbols = to_bins(grid.weights.reshape(1, -1), minimum.view(1), maximum.view(1), bits)
        blob: Tensor = HUFFMAN_ENCODE(symbols.view(w.shape).to(symbol_dtype(bits)), *where)
    elif q is None:  # the symbols of a chunk are encoded while they are in the cache
        blob = QUANTIZE_ENCODE(grid.weights.reshape(-1), minimum, maximum, bits, *where)
    else:
        blob = HUFFMAN_ENCODE(q.symbols, *where)
    zero_bins = options.zero == "exact"
    head = _BLOB.pack(
        *(_BLOB_MAGIC, 2 if zero_bins else 1, _QUANTIZED, _DTYPES.index(w.dtype), bits, blob.numel()),
        *(
            group_size,
            minimum.numel(),
            0 if grid.exceptions is None else grid.exceptions.numel(),
            grid.entropy,
        ),
        _ZERO_BINS if zero_bins else 0,
    )
    raw = as_bytes(table)
    head += struct.pack("<I", zlib.crc32(raw, zlib.crc32(head)))
    blob[:head_bytes] = from_bytes(head + raw, w.device)
    return blob


def _store_palette(w: Tensor, palette: Palette) -> Tensor:
    raw = as_bytes(_raw_bytes(palette.values))
    head_bytes = _BLOB_BYTES + len(raw)
    blob: Tensor = HUFFMAN_ENCODE(palette.symbols, list(w.shape), CHUNK_LOG2, head_bytes)
    head = _BLOB.pack(
        *(_BLOB_MAGIC, 2, _PALETTE, _DTYPES.index(w.dtype), 0, blob.numel()),
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
    parsed = _parse_blob(op, blob)
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
    if parsed.raw:
        element = parsed.dtype.itemsize
        part = parsed.data[first * element : (first + count) * element]
        if count:
            out.view(-1).copy_(part.clone().view(parsed.dtype))
        return out
    if parsed.palette is not None:
        symbols = torch.empty(count, dtype=torch.uint8, device=blob.device)
        info = HUFFMAN_DECODE(parsed.data, symbols, first)
        check_info("decompress_", info, [symbols], [])
        if count and int(symbols.max()) >= parsed.palette.numel():
            raise _contradiction(op)
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
    """A blob that keeps every bit of the tensor."""
    if w.dtype not in _DTYPES:
        raise TypeError(f"cfl_ops.{op}: {name} must have a dtype that the format knows, but got {w.dtype}")
    check_shape(op, name, w, 2**63 - 1)
    data = as_bytes(_raw_bytes(w))
    shape = struct.pack(f"<{w.ndim}Q", *w.shape)
    total = _BLOB_BYTES + len(shape) + len(data)
    head = _BLOB.pack(
        *(_BLOB_MAGIC, 1, _RAW, _DTYPES.index(w.dtype), 0, total),
        *(w.ndim, len(data), 0, 0.0, zlib.crc32(data)),
    )
    head += struct.pack("<I", zlib.crc32(shape, zlib.crc32(head)))
    return from_bytes(head + shape + data, w.device)


def store_lossless(op: str, name: str, w: Tensor) -> Tensor:
    """A blob that keeps every bit of the tensor, at most 160 bytes larger than it."""
    return store_raw(op, name, w)


def _raw_bytes(w: Tensor) -> Tensor:
    """The memory of a tensor as 1-d uint8."""
    if w.numel() == 0:
        return torch.empty(0, dtype=torch.uint8, device=w.device)
    return dense(w.detach()).view(torch.uint8)


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
    zero_bins: Tensor | None = None
    """The weight of each group that stands for 0, in a blob where 0 is exact."""
    palette: Tensor | None = None


def _contradiction(op: str) -> CorruptDataError:
    return corrupt(op, "the blob has a header that contradicts itself")


def _parse_blob(op: str, blob: Tensor) -> _Blob:
    size = blob.numel()
    if size < _BLOB_BYTES:
        raise corrupt(op, "the blob is too short to hold a header")
    near = blob  # what can be read without synchronising: of a blob on a GPU, its first bytes
    if cuda.synchronises(blob):
        near = cuda.to_host(blob[: prefix(size)])
    fixed = as_bytes(near[:_BLOB_BYTES])
    magic, version, kind, code, bits, total, group_size, groups, exceptions, _, last = _BLOB.unpack_from(
        fixed
    )
    (checksum,) = struct.unpack_from("<I", fixed, _BLOB.size)
    if magic != _BLOB_MAGIC:
        raise corrupt(op, "the blob does not start with the codec's mark")
    if kind not in _KINDS.get(version, ()) or code >= len(_DTYPES):
        raise corrupt(op, "the blob was written in a version that this reader does not know")
    if total != size:
        raise corrupt(op, "the blob has another length than its header says (truncated or extended)")
    dtype = _DTYPES[code]
    element = dtype.itemsize
    if kind == _RAW:
        ndim, table_bytes = group_size, 8 * group_size
    elif kind == _PALETTE:
        table_bytes = group_size * element
    else:
        table_bytes = 2 * groups * element + exceptions * (8 + element)
    head = _BLOB_BYTES + table_bytes
    if head > size or (kind == _RAW and head + groups != size):
        raise _contradiction(op)
    table = as_bytes((near if head <= near.numel() else blob)[_BLOB_BYTES:head])
    if zlib.crc32(table, zlib.crc32(fixed[: _BLOB.size])) != checksum:
        raise corrupt(op, "the blob has a damaged header (checksum)")
    data = blob[head:]
    if kind == _RAW:
        shape = struct.unpack(f"<{ndim}Q", table)
        if not codes.shape_fits(shape) or math.prod(shape) * element != groups:
            raise _contradiction(op)
        if zlib.crc32(as_bytes(data)) != last:
            raise corrupt(op, "the data of the blob are damaged (checksum)")
        if dtype == torch.bool and bool((data > 1).any()):
            raise corrupt(op, "the data of the blob are neither true nor false")
        return _Blob(shape, math.prod(shape), dtype, data, True)

    header = read_header(op, data, None if near is blob or head >= near.numel() else near[head:])
    if kind == _PALETTE:
        if (
            code > 3
            or header.symbol_bytes != 1
            or not 1 <= group_size <= 256
            or any((groups, exceptions, bits, last))
        ):
            raise _contradiction(op)
        palette = from_bytes(table, blob.device).view(dtype)
        return _Blob(header.shape, header.numel, dtype, header.payload, False, palette=palette)
    if not 1 <= bits <= 16 or code > 3 or header.symbol_bytes != (1 if bits <= 8 else 2):
        raise _contradiction(op)
    if last != (_ZERO_BINS if version == 2 else 0):
        raise _contradiction(op)
    if not 1 <= group_size < 2**63 or -(-header.numel // group_size) != groups:
        raise _contradiction(op)
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
        rising = bool((index[1:] > index[:-1]).all())
        if not rising or int(index[0]) < 0 or int(index[-1]) >= header.numel:
            raise _contradiction(op)
    if not good:
        raise corrupt(op, "the blob has a range that is not finite or not ordered")
    centre = zero_bin(minimum, maximum, bits) if last else None
    if cuda.synchronises(blob):
        minimum = cuda.to_device(minimum, blob.device)
        maximum = cuda.to_device(maximum, blob.device)
        if index is not None and values is not None:
            index, values = index.to(blob.device), values.to(blob.device)
        centre = None if centre is None else centre.to(blob.device)
    return _Blob(
        header.shape,
        header.numel,
        dtype,
        header.payload,
        False,
        bits,
        group_size,
        minimum,
        maximum,
        index,
        values,
        centre,
    )


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
