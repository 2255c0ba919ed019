"""The kernels of csrc/cuda, compiled with the extension or, where it has none, at run time through CuPy.

Both are called in the same way: contiguous tensors and numbers, nothing allocated, nothing checked. What
an op needs around them (shapes, memory, headers) is Python above them, once: ``cuda.py`` of a family.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from cfl_ops._core.op import LIB

_SCHEMAS = (
    "cuda_largest(Tensor symbols, Tensor(a!) largest) -> ()",
    "cuda_histogram(Tensor symbols, Tensor(a!) counts) -> ()",
    "cuda_encode(Tensor symbols, int chunk_log2, Tensor tree, int nodes, int leaves, int alphabet,"
    " Tensor crc_tables, int staged_words, int shared, Tensor(a!) slots, Tensor(b!) entries) -> ()",
    "cuda_gather(Tensor slots, Tensor entries, Tensor offsets, Tensor(a!) out) -> ()",
    "cuda_decode(Tensor payload, Tensor entries, Tensor offsets, int n, int chunk_log2, int first_chunk,"
    " Tensor tree, int nodes, int leaves, Tensor crc_tables, Tensor? affine, int group_size,"
    " int symbol_bytes, int start, int largest, int lists, int shared, Tensor(a!) out, Tensor(b!) info)"
    " -> ()",
    "cuda_range(Tensor weights, int levels, Tensor(a!) ends, Tensor(b!) bad, Tensor(c!) minimum,"
    " Tensor(d!) maximum, Tensor(e!) info, Tensor(f!) affine) -> ()",
    "cuda_affine(Tensor minimum, Tensor maximum, int levels, Tensor(a!) affine) -> ()",
    "cuda_quantize(Tensor weights, Tensor affine, Tensor info, int levels, Tensor(a!) symbols,"
    " Tensor(b!)? counts) -> ()",
    "cuda_dequantize(Tensor symbols, Tensor affine, Tensor(a!) weights) -> ()",
    "cuda_exact_gram(Tensor x, Tensor? weight, Tensor(a!) workspace, Tensor(b!) arrived, Tensor(c!) gram) -> ()",
    "cuda_solve_small(Tensor matrices, Tensor rights, float lam, Tensor? shift, float tolerance, bool in_float64,"
    " Tensor? only, Tensor(a!) solutions, Tensor(b!) info, Tensor(c!)? again) -> ()",
    "cuda_solve_careful(Tensor matrices, Tensor rights, float lam, Tensor? shift, Tensor(a!) solutions,"
    " Tensor(b!) info) -> ()",
    "cuda_solve_tiled(Tensor matrices, Tensor rights, float lam, Tensor? shift, float tolerance, Tensor(a!) work,"
    " Tensor(b!) inverse, Tensor(c!) flags, Tensor(d!) solutions, Tensor(e!)? factors, Tensor(f!) info) -> ()",
    "cuda_small_pinv(Tensor a, float limit, float tolerance, Tensor(a!) results, Tensor(b!) info) -> ()",
    "cuda_cholesky_update(Tensor matrices, Tensor vectors, float scale_l, float scale_v, bool check, bool down,"
    " float breakdown, Tensor(a!) out, Tensor(b!) reflectors, Tensor(c!) flags, Tensor(d!) found) -> ()",
    "cuda_cholesky_choose(Tensor matrices, Tensor found, bool failed, Tensor(a!) out, Tensor(b!) info) -> ()",
)
for _schema in _SCHEMAS:
    LIB.define(_schema)


class Native:
    """The kernels that are compiled into ``cfl_ops._C``: ``.encode(...)`` is ``cfl_ops::cuda_encode``."""

    def __getattr__(self, name: str) -> Any:
        overload = getattr(torch.ops.cfl_ops, f"cuda_{name}").default
        setattr(self, name, overload)
        return overload


@functools.cache
def kernels(backend: str) -> Any:
    """The kernels of a backend, ``"native"`` or ``"nvrtc"``; the latter imports cupy."""
    if backend == "native":
        return Native()
    from cfl_ops._gpu import nvrtc as _nvrtc

    return _nvrtc.Nvrtc()
