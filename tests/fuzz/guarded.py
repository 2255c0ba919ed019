"""Tensors whose memory ends or begins at a page that cannot be touched."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
FILL = 0xFF
"""What lies around and between the elements: NaN for floats, -1 for integers."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


class Region:
    """Bytes between two guard pages, and what they held when the call was made."""

    def __init__(self, nbytes: int) -> None:
        self.size = max(-(-nbytes // PAGE), 1) * PAGE
        self.mapped = _libc.mmap(None, self.size + 2 * PAGE, 0, _PRIVATE_ANONYMOUS, -1, 0)
        if self.mapped in (None, ctypes.c_void_p(-1).value):
            raise MemoryError(f"cannot map {self.size} bytes")
        self.address = self.mapped + PAGE
        _libc.mprotect(self.address, self.size, mmap.PROT_READ | mmap.PROT_WRITE)
        ctypes.memset(self.address, FILL, self.size)
        self.before = b""

    def storage(self, nbytes: int, at_end: bool) -> Tensor:
        """uint8, flush with a guard page."""
        start = self.address + (self.size - nbytes if at_end else 0)
        return torch.frombuffer((ctypes.c_char * nbytes).from_address(start), dtype=torch.uint8)

    def now(self) -> bytes:
        return ctypes.string_at(self.address, self.size)

    def remember(self) -> None:
        self.before = self.now()

    def free(self) -> None:
        """Later uses of it end the process."""
        _libc.munmap(self.mapped, self.size + 2 * PAGE)


def place(
    content: Tensor, strides: Sequence[int], offset: int = 0, *, at_end: bool = True
) -> tuple[Tensor, Region]:
    """A copy of a tensor, of these strides, in memory of its own; ``offset`` elements lie before it."""
    last = offset + sum((n - 1) * s for n, s in zip(content.shape, strides, strict=True) if n)
    empty = content.numel() == 0
    elements = max(offset, 1) if empty else last + 1
    item = content.element_size()
    region = Region(elements * item)
    storage = region.storage(elements * item, at_end).untyped_storage()
    # An empty tensor points at the guard page itself (or at the first byte).
    first = (elements if at_end else 0) if empty else offset
    out = torch.empty(0, dtype=content.dtype).set_(storage, first, content.shape, tuple(strides))
    if not empty:
        out.copy_(content)
    return out, region


def dense_strides(shape: Sequence[int], order: Sequence[int] | None = None) -> list[int]:
    """Strides of a dense tensor whose dimensions lie in memory in ``order``, the last one fastest."""
    strides, step = [0] * len(shape), 1
    for d in reversed(range(len(shape)) if order is None else order):
        strides[d] = step
        step *= max(shape[d], 1)
    return strides
