"""The Huffman code of a payload: the lengths of its words, their table, and the tree that decodes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from cfl_ops.ops.codec.codes import BAD_CODE_TABLE, MAX_LENGTH, Corrupt


def code_lengths(counts: list[int]) -> list[int]:
    """Huffman code lengths for these counts; 0 for a count of 0.

    Two queues: the leaves by (count, symbol), and the joined nodes, which come out in order by themselves;
    on ties a leaf goes first. So every implementation finds the same lengths.
    """
    order = sorted((count, symbol) for symbol, count in enumerate(counts) if count)
    n = len(order)
    lengths = [0] * len(counts)
    if n == 1:
        lengths[order[0][1]] = 1
    if n < 2:
        return lengths
    weight = [count for count, _ in order] + [0] * (n - 1)
    parent = [0] * (2 * n - 1)
    leaf, joined = 0, n
    for node in range(n, 2 * n - 1):
        for _ in range(2):
            if leaf < n and (joined >= node or weight[leaf] <= weight[joined]):
                child, leaf = leaf, leaf + 1
            else:
                child, joined = joined, joined + 1
            weight[node] += weight[child]
            parent[child] = node
    depth = [0] * (2 * n - 1)
    for node in range(2 * n - 3, -1, -1):
        depth[node] = depth[parent[node]] + 1
    for i, (_, symbol) in enumerate(order):
        lengths[symbol] = depth[i]
    return lengths


def pack_lengths(lengths: list[int]) -> bytes:
    """The code table: nibbles, the low one of a byte first."""
    nibbles: list[int] = []
    previous, i = 8, 0
    while i < len(lengths):
        run = 0
        while i + run < len(lengths) and lengths[i + run] == previous and run < 258:
            run += 1
        if run >= 3:
            nibbles += [14, (run - 3) & 15, (run - 3) >> 4]
            i += run
            continue
        length, change = lengths[i], lengths[i] - previous
        nibbles += [change + 6] if -6 <= change <= 6 else [13, length & 15, length >> 4]
        previous, i = length, i + 1
    if len(nibbles) % 2:
        nibbles.append(0)
    return bytes(low | high << 4 for low, high in zip(nibbles[::2], nibbles[1::2], strict=True))


def unpack_lengths(table: bytes, alphabet: int) -> list[int]:
    """The code lengths of ``alphabet`` symbols."""
    nibbles = [nibble for byte in table for nibble in (byte & 15, byte >> 4)]
    lengths: list[int] = []
    previous, at = 8, 0
    while len(lengths) < alphabet:
        if at >= len(nibbles):
            raise Corrupt(BAD_CODE_TABLE)
        op, run = nibbles[at], 1
        at += 1
        if op <= 12:
            previous += op - 6
        else:
            if op == 15 or at + 2 > len(nibbles):
                raise Corrupt(BAD_CODE_TABLE)
            value = nibbles[at] | nibbles[at + 1] << 4
            at += 2
            previous, run = (value, 1) if op == 13 else (previous, value + 3)
        if not 0 <= previous <= MAX_LENGTH or run > alphabet - len(lengths):
            raise Corrupt(BAD_CODE_TABLE)
        lengths += [previous] * run
    if (at + 1) // 2 != len(table) or any(nibbles[at:]):
        raise Corrupt(BAD_CODE_TABLE)
    return lengths


@dataclass
class Node:
    """An inner node (``right`` > 0; its left child follows it) or a leaf of 2^bits symbols."""

    right: int = 0
    first: int = 0
    bits: int = 0


@dataclass
class Tree:
    """The code tree in pre-order, and the symbols in the order of its leaves."""

    nodes: list[Node] = field(default_factory=list)
    symbols: list[int] = field(default_factory=list)


def build_tree(lengths: list[int]) -> Tree:
    """The tree of a complete set of code lengths (not to be changed: one payload's header asks for it twice)."""
    return _build_tree(bytes(lengths))


@functools.lru_cache(maxsize=16)
def _build_tree(lengths: bytes) -> Tree:
    """Build it.

    The symbols of each length are cut, in order, into runs of powers of two from the largest down. A run of
    2^k symbols of length l is a leaf at depth l - k. Leaves take their places from left to right by depth.
    """
    of: dict[int, list[int]] = {}
    for symbol, length in enumerate(lengths):
        if length:
            of.setdefault(length, []).append(symbol)
    total = sum(map(len, of.values()))
    if total == 0 or (total == 1 and list(of) != [1]):
        raise Corrupt(BAD_CODE_TABLE)
    if total == 1:
        return Tree([Node()], of[1])
    if sum(len(symbols) << (MAX_LENGTH - length) for length, symbols in of.items()) != 1 << MAX_LENGTH:
        raise Corrupt(BAD_CODE_TABLE)
    leaves = [leaf for length in sorted(of) for leaf in _runs(length, of[length])]
    return _grow(sorted(leaves, key=lambda leaf: leaf[0]))


def _runs(length: int, symbols: list[int]) -> list[tuple[int, int, list[int]]]:
    runs, start = [], 0
    for bits in range(16, -1, -1):
        if len(symbols) >> bits & 1:
            runs.append((length - bits, bits, symbols[start : start + (1 << bits)]))
            start += 1 << bits
    return runs


def _grow(leaves: list[tuple[int, int, list[int]]]) -> Tree:
    tree, waiting = Tree(), iter(leaves)
    depth_next, bits, symbols = next(waiting)

    def grow(depth: int) -> None:
        nonlocal depth_next, bits, symbols
        node = Node()
        tree.nodes.append(node)
        node.first = len(tree.symbols)
        if depth_next == depth:
            node.bits = bits
            tree.symbols += symbols
            depth_next, bits, symbols = next(waiting, (MAX_LENGTH + 1, 0, []))
            return
        grow(depth + 1)
        node.right, node.first = len(tree.nodes), len(tree.symbols)
        grow(depth + 1)

    grow(0)
    return tree
