"""huffman: symbols to a payload of bytes and back, bit for bit. docs/format.md describes the bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops._core.failures import check_info, error_message
from cfl_ops._core.op import define_op
from cfl_ops._gpu.launch import cuda_cpp
from cfl_ops.errors import CorruptDataError
from cfl_ops.ops.codec import codes, cuda
from cfl_ops.ops.codec.arguments import check_bytes, check_contiguous, check_data, check_encoded
from cfl_ops.ops.codec.codes import Corrupt
from cfl_ops.ops.codec.reference import payload as reference
from cfl_ops.ops.codec.reference.header import HEADER_BYTES, parse, symbol_dtype

__all__ = ["huffman_decode", "huffman_encode"]

CHUNK_LOG2 = 15
"""Symbols of a chunk, the unit of checksums and of random access: 2^15."""


def huffman_encode(symbols: Tensor) -> Tensor:
    """Encode uint8 or uint16 symbols of any shape with a Huffman code made for them.

    The payload remembers shape and dtype, and holds a checksum of its header and of each chunk of 2^15
    symbols. The code is optimal for the counts of the symbols; where there are more than 2,048 symbols for
    each member of the alphabet, for the counts of an evenly spread sample, which costs less than about 0.001
    bits a symbol (where the sample shows few symbols, all are counted). Alphabets to 4,096 are what it is made
    for; all 65,536 work.

    Synchronises a GPU twice: for the counts, and for the sizes of the chunks; where all are counted after a
    sample, once more.

    Returns:
        A 1-d uint8 tensor on the device of ``symbols``.

    Raises:
        TypeError, ValueError: other symbols, more than 64 dimensions, or more than 2^40 symbols.

    Example:
        >>> import torch, cfl_ops
        >>> symbols = torch.arange(1000).remainder(3).to(torch.uint8)
        >>> payload = cfl_ops.huffman_encode(symbols)
        >>> len(payload) < 300, torch.equal(cfl_ops.huffman_decode(payload), symbols)
        (True, True)

    """
    _check_symbols("huffman_encode", "symbols", symbols)
    check_data("huffman_encode", "symbols", symbols)
    check_shape("huffman_encode", "symbols", symbols, codes.MAX_SYMBOLS)
    payload: Tensor = HUFFMAN_ENCODE(symbols, list(symbols.shape), CHUNK_LOG2, 0)
    return payload


def huffman_decode(
    payload: Tensor, out: Tensor | None = None, *, start: int | None = None, stop: int | None = None
) -> Tensor:
    """Decode what :func:`huffman_encode` wrote, bit for bit, or raise.

    Synchronises a GPU twice: for the header, and for the outcome of the checks.

    Args:
        payload: 1-d uint8.
        out: a contiguous tensor of the symbols' dtype to write into, of as many elements as are asked for;
            with it the call is free of data-dependent shapes (torch.compile with fullgraph). It shares no
            memory with the payload.
        start: decode only the elements from here on (of the flattened tensor), as a 1-d tensor: only the
            chunks that hold them are read and checked.
        stop: and up to here.

    Raises:
        CorruptDataError: a byte is wrong, missing or too many. Where a chunk is damaged, any element of ``out``
            may have been overwritten.
        IndexError: start and stop do not fit the payload.
        TypeError, ValueError: bad arguments. After these, an IndexError, or an error of the header (all that
            stands before the chunks), ``out`` is as it was.

    Not under ``fullgraph=True`` nor ``torch.export`` without ``out``, or with start or stop: the shape stands in the
    payload.

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
    check_payload(op, "payload", payload)
    whole = start is None and stop is None
    if out is not None:
        check_out(op, out, payload, (torch.uint8, torch.uint16))
    if out is None or not whole or not torch.compiler.is_compiling():
        header = read_header(op, payload)
        payload = header.payload
        first, count = span(op, start, stop, header.numel)
        dtype = symbol_dtype(8 * header.symbol_bytes)
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


class Header(NamedTuple):
    """The checked header of a payload."""

    payload: Tensor
    """The payload; one on a GPU with its first bytes, so that the op that decodes it does not fetch them again."""
    symbol_bytes: int
    numel: int
    shape: tuple[int, ...]


def read_header(op: str, payload: Tensor, raw: Tensor | None = None) -> Header:
    """The checked header, before anything is allocated for what it promises.

    ``raw``: the first bytes of a payload on a GPU, where they are known; else this synchronises once.
    """
    if torch.compiler.is_compiling() or not cuda.synchronises(payload):
        fields: list[int] = PAYLOAD_HEADER(payload).tolist()
        code, symbol_bytes, _, numel, ndim, *extents = fields
        shape = tuple(extents[:ndim])
    else:
        code, symbol_bytes, numel, shape, raw = cuda.read_header(payload, raw)
        payload = cuda.with_first_bytes(payload, raw)
    if code:
        raise corrupt(op, f"the payload {codes.WORDS[code]}")
    if numel == 0 and not codes.shape_fits(shape):  # else its product is numel, which is checked
        raise corrupt(op, f"the payload {codes.WORDS[codes.BAD_HEADER]}")
    return Header(payload, symbol_bytes, numel, shape)


def _check_symbols(op: str, name: str, value: Any) -> None:
    checks.tensor(op, name, value, 0)
    if value.dtype not in (torch.uint8, torch.uint16):
        raise TypeError(f"cfl_ops.{op}: {name} must be uint8 or uint16, but got {value.dtype}")


def check_shape(op: str, name: str, value: Tensor, most: int) -> None:
    """The format holds the shape, and no more than ``most`` elements."""
    if value.ndim > codes.MAX_DIMS:
        raise ValueError(
            f"cfl_ops.{op}: {name} must have at most {codes.MAX_DIMS} dimensions, but got {value.ndim}"
        )
    if torch.compiler.is_compiling():
        return  # sizes may be symbolic, and a guard on them would recompile
    if value.numel() > most or not codes.shape_fits(value.shape):
        raise ValueError(
            f"cfl_ops.{op}: {name} must have at most {most} elements, but got shape {tuple(value.shape)}"
        )


def check_payload(op: str, name: str, payload: Any) -> None:
    checks.tensor(op, name, payload, 1)
    if payload.dtype != torch.uint8 or payload.ndim != 1:
        raise TypeError(
            f"cfl_ops.{op}: {name} must be a 1-d uint8 tensor, but got {payload.dtype} "
            f"of shape {tuple(payload.shape)}"
        )
    check_data(op, name, payload)


def check_out(op: str, out: Any, payload: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    checks.tensor(op, "out", out, 0)
    if out.dtype not in dtypes:
        raise TypeError(f"cfl_ops.{op}: out must be {' or '.join(map(str, dtypes))}, but got {out.dtype}")
    if not out.is_contiguous():
        raise ValueError(f"cfl_ops.{op}: out must be contiguous, but got strides {out.stride()}")
    checks.same_device(op, "the encoded bytes", payload, out=out)
    if out.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"cfl_ops.{op}: out requires grad, but no gradient passes decoding: give out.detach(), or use "
            "torch.no_grad()"
        )
    if not torch.compiler.is_compiling() and _overlap(out, payload):
        raise ValueError(f"cfl_ops.{op}: out must not share memory with the encoded bytes")


def _overlap(out: Tensor, payload: Tensor) -> bool:
    """Whether a contiguous tensor and a 1-d tensor of bytes have memory in common."""
    if out.numel() == 0 or payload.numel() == 0:
        return False
    mine, theirs = out.data_ptr(), payload.data_ptr()
    span = (payload.numel() - 1) * payload.stride(0) + 1
    return mine < theirs + span and theirs < mine + out.numel() * out.element_size()


def span(op: str, start: int | None, stop: int | None, numel: int) -> tuple[int, int]:
    """The first element that is asked for, and how many."""
    first = 0 if start is None else checks.integer(op, "start", start)
    last = numel if stop is None else checks.integer(op, "stop", stop)
    if not 0 <= first <= last <= numel:
        raise IndexError(
            f"cfl_ops.{op}: start and stop must be ordered and within the {numel} elements, "
            f"but got {start} and {stop}"
        )
    return first, last - first


NO_VMAP = "the sizes of encoded bytes depend on the data, so vmap cannot stack them"


def _huffman_encode_python(symbols: Tensor, shape: Sequence[int], chunk_log2: int, reserve: int) -> Tensor:
    return reference.encode(symbols, tuple(shape), chunk_log2, reserve)


def _payload_header_python(payload: Tensor) -> Tensor:
    fields = [0] * (5 + codes.MAX_DIMS)
    try:
        header = parse(payload)
        fields[1:5] = header.symbol_bytes, header.chunk_log2, header.numel, len(header.shape)
        fields[5 : 5 + len(header.shape)] = header.shape
    except Corrupt as error:
        fields[0] = error.code
    return torch.tensor(fields, dtype=torch.int64, device=payload.device)


def _huffman_decode_python(payload: Tensor, out: Tensor, start: int) -> Tensor:
    try:
        symbols = reference.decode(payload, start, out.numel())
        if symbols.dtype != out.dtype:
            raise Corrupt(codes.OUT_OF_RANGE)
    except Corrupt as error:
        return codes.info(error.code, payload.device)
    out.copy_(symbols.view(out.shape))
    return codes.info(codes.GOOD, payload.device)


def encoded_fake(like: Tensor) -> Tensor:
    """Bytes whose number depends on the data."""
    size = torch.library.get_ctx().new_dynamic_size(min=HEADER_BYTES)
    return like.new_empty(size, dtype=torch.uint8)


DATA_DEPENDENT = (torch.Tag.dynamic_output_shape, torch.Tag.cudagraph_unsafe)


def _check_huffman_encode(symbols: Tensor, shape: Sequence[int], chunk_log2: int, reserve: int) -> None:
    check_encoded("huffman_encode", symbols.numel(), shape, chunk_log2, reserve)


def _check_huffman_decode(payload: Tensor, out: Tensor, start: int) -> None:
    check_bytes("huffman_decode_", "payload", payload)
    check_contiguous("huffman_decode_", "out", out)


HUFFMAN_ENCODE = define_op(
    "huffman_encode(Tensor symbols, SymInt[] shape, int chunk_log2, SymInt reserve) -> Tensor",
    python=_huffman_encode_python,
    fake=lambda symbols, shape, chunk_log2, reserve: encoded_fake(symbols),
    shapes={"symbols": "symbols ..."},
    check=_check_huffman_encode,
    no_vmap=NO_VMAP,
    cuda=cuda_cpp(cuda.huffman_encode),
    tags=DATA_DEPENDENT,
)

PAYLOAD_HEADER = define_op(
    "payload_header(Tensor payload) -> Tensor",
    python=_payload_header_python,
    fake=lambda payload: payload.new_empty(5 + codes.MAX_DIMS, dtype=torch.int64),
    shapes={"payload": "uint8 ..."},
    check=lambda payload: check_bytes("payload_header", "payload", payload),
    no_vmap=NO_VMAP,
)

HUFFMAN_DECODE = define_op(
    "huffman_decode_(Tensor payload, Tensor(a!) out, SymInt start) -> Tensor info",
    python=_huffman_decode_python,
    fake=lambda payload, out, start: payload.new_empty((), dtype=torch.int64),
    shapes={"payload": "uint8 ...", "out": "symbols ..."},
    check=_check_huffman_decode,
    no_vmap=NO_VMAP,
    cuda=cuda_cpp(cuda.huffman_decode_),
    tags=(torch.Tag.cudagraph_unsafe,),
)


def corrupt(op: str, what: str) -> CorruptDataError:
    """What to raise for bytes that nobody wrote."""
    return CorruptDataError(f"cfl_ops.{op}: {what}")


def decode_error(op: str) -> Callable[[Tensor, Sequence[Tensor]], Exception]:
    """The error of an op that decodes, as a function of its info."""

    def message(info: Tensor, context: Sequence[Tensor]) -> Exception:
        code = int(info)
        if code >= codes.BAD_CHUNK:
            return corrupt(op, f"chunk {code - codes.BAD_CHUNK} of the payload is damaged")
        if code == codes.OUT_OF_RANGE:
            return corrupt(op, "the payload does not hold the symbols that out asks for")
        return corrupt(op, f"the payload {codes.WORDS[code]}")

    return message


error_message("huffman_decode_")(decode_error("huffman_decode"))
