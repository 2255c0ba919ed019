"""What the GPU path of the codec does on the host between its kernels: the code for counts, the header, and back.

Small ops on CPU tensors, in C++ (csrc/cpu/codec_host.cpp) where the extension is there: a code for 1,024 symbols
takes Python most of a millisecond, which is what the kernels take for 2^27 symbols. What follows is the same in
Python.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from cfl_ops._core.arguments import within
from cfl_ops._core.op import LIB
from cfl_ops.ops.codec.arguments import check_bytes, check_encoded
from cfl_ops.ops.codec.codes import Corrupt
from cfl_ops.ops.codec.reference.header import as_bytes, from_bytes, head_bytes, parse_bytes
from cfl_ops.ops.codec.reference.huffman_code import Tree, build_tree, code_lengths, pack_lengths

MOST_COUNTED = 2**57 - 1
"""So many symbols of the longest code word have fewer than 2^63 bits."""


def pack_tree(tree: Tree, alphabet: int) -> Tensor:
    """The tree as the kernels of csrc/cuda read it, int32.

    For each node the right child, the first rank, the bits and the depth modulo 2; the symbol of each rank (16
    bits, padded to a word); for each symbol below ``alphabet`` its rank and, in the upper half, its leaf.
    """
    codes, odd = [0] * alphabet, [0] * len(tree.nodes)
    nodes: list[int] = []
    for v, node in enumerate(tree.nodes):
        if node.right:
            odd[v + 1] = odd[node.right] = 1 - odd[v]
        elif alphabet:
            for rank in range(node.first, node.first + (1 << node.bits)):
                codes[tree.symbols[rank]] = v << 16 | rank
        nodes += node.right, node.first, node.bits, odd[v]
    symbols = tree.symbols + [0] * (len(tree.symbols) % 2)
    data = struct.pack(f"<{len(nodes)}i{len(symbols)}H{alphabet}I", *nodes, *symbols, *codes)
    return from_bytes(data).view(torch.int32)


def code(counts: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """From int64 counts of one block of symbols in ``stride`` to the packed tree, the code table, and facts.

    Facts: alphabet, nodes, symbols with a code, longest code word, bits of all counted symbols, their number.
    """
    op = "host_code"
    if counts.dtype != torch.int64 or counts.ndim != 1:
        raise ValueError(
            f"cfl_ops.{op}: counts must be 1-d int64, but got {counts.dtype} of {counts.ndim} dimensions"
        )
    within(op, "the number of counts", counts.numel(), 1, 2**16)
    within(op, "stride", stride, 1)
    scaled: list[int] = counts.tolist()
    within(op, "the least of counts", min(scaled), 0)
    within(op, "the sum of counts times stride", sum(scaled) * stride, 1, MOST_COUNTED)
    if stride > 1:
        scaled = [count * stride if count else 1 for count in scaled]
    while scaled[-1] == 0:
        scaled.pop()
    lengths = code_lengths(scaled)
    tree = build_tree(lengths)
    bits = sum(count * length for count, length in zip(scaled, lengths, strict=True))
    facts = [len(lengths), len(tree.nodes), len(tree.symbols), max(lengths), bits, sum(scaled)]
    table = from_bytes(pack_lengths(lengths))
    return pack_tree(tree, len(lengths)), table, torch.tensor(facts)


def head(
    entries: Tensor,
    table: Tensor,
    shape: Sequence[int],
    symbol_bytes: int,
    chunk_log2: int,
    numel: int,
    alphabet: int,
    reserve: int,
) -> Tensor:
    """All of a payload before its chunks, behind ``reserve`` zeros. entries: (chunks, 2) int32."""
    op = "host_head"
    check_bytes(op, "table", table)
    check_encoded(op, numel, shape, chunk_log2, reserve)
    within(op, "symbol_bytes", symbol_bytes, 1, 2)
    within(op, "alphabet", alphabet, 0, 256**symbol_bytes)
    wanted = (-(-numel >> chunk_log2), 2)
    if entries.dtype != torch.int32 or tuple(entries.shape) != wanted:
        raise ValueError(
            f"cfl_ops.{op}: entries must be int32 of shape {wanted}, but got {entries.dtype} of {tuple(entries.shape)}"
        )
    packed, chunks = as_bytes(table), as_bytes(entries.contiguous().view(torch.uint8).flatten())
    data = head_bytes(symbol_bytes, chunk_log2, numel, tuple(shape), alphabet, packed, chunks)
    return from_bytes(bytes(reserve) + data)


def parse(raw: Tensor, size: int, start: int, count: int) -> tuple[Tensor, Tensor]:
    """The header of a payload whose first bytes are ``raw``, and the packed tree (no codes).

    Facts: a code of codes.py, or minus the bytes of the header if ``raw`` has fewer; bytes of a symbol; log2 of
    a chunk; symbols; first byte of the chunks; nodes; symbols with a code; then for symbols ``start`` to ``start +
    count`` the bytes of the chunks before theirs and of the largest of theirs; the shape.
    """
    check_bytes("host_parse", "raw", raw)
    within("host_parse", "size", size, 0)
    facts, none = [0] * 9, torch.empty(0, dtype=torch.int32)
    try:
        header = parse_bytes(as_bytes(raw), size)
    except Corrupt as error:
        facts[0] = error.code
        return torch.tensor(facts), none
    facts[1:5] = header.symbol_bytes, header.chunk_log2, header.numel, header.data
    if start >= 0 and 0 < count <= header.numel - start:
        first, last = start >> header.chunk_log2, (start + count - 1) >> header.chunk_log2
        facts[7:9] = sum(header.sizes[:first]), max(header.sizes[first : last + 1])
    if header.numel:
        tree = build_tree(header.lengths)
        facts[5:7] = len(tree.nodes), len(tree.symbols)
        none = pack_tree(tree, 0)
    return torch.tensor([*facts, *header.shape]), none


for _schema, _python in (
    ("host_code(Tensor counts, int stride) -> (Tensor, Tensor, Tensor)", code),
    (
        "host_head(Tensor entries, Tensor table, int[] shape, int symbol_bytes, int chunk_log2, int numel,"
        " int alphabet, int reserve) -> Tensor",
        head,
    ),
    ("host_parse(Tensor raw, int size, int start, int count) -> (Tensor, Tensor)", parse),
):
    LIB.define(_schema)
    LIB.impl(_schema.split("(")[0], _python, "CompositeExplicitAutograd")
