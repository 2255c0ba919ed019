"""Closed-form learning for PyTorch: Gram matrices, proximal steps, solves and weight codecs as fast ops."""

import torch as _torch  # noqa: F401  (the extension needs libtorch in the process)

from . import _library
from ._version import __version__
from .accumulate import GramAccumulator
from .codec import (
    QuantizedTensor,
    allocate_bits,
    compress,
    compress_state_dict,
    decompress,
    decompress_state_dict,
    dequantize,
    estimate_entropy,
    huffman_decode,
    huffman_encode,
    load_file,
    quantize,
    quantize_ex,
    save_file,
)
from .errors import CorruptDataError, LinAlgError
from .gram import GramMoments, gram, gram_, linear_gram
from .proximal import (
    ProximalStep,
    proximal_step,
    proximal_step_,
    proximal_step_ex,
    proximal_step_ex_,
    proximal_update,
    ridge_step,
)
from .rescaled import rescaled_proximal_step

_library.load_backends()

from . import config, learn

__all__ = [
    "CorruptDataError",
    "GramAccumulator",
    "GramMoments",
    "LinAlgError",
    "ProximalStep",
    "QuantizedTensor",
    "__version__",
    "allocate_bits",
    "compress",
    "compress_state_dict",
    "config",
    "decompress",
    "decompress_state_dict",
    "dequantize",
    "estimate_entropy",
    "gram",
    "gram_",
    "huffman_decode",
    "huffman_encode",
    "learn",
    "linear_gram",
    "load_file",
    "proximal_step",
    "proximal_step_",
    "proximal_step_ex",
    "proximal_step_ex_",
    "proximal_update",
    "quantize",
    "quantize_ex",
    "rescaled_proximal_step",
    "ridge_step",
    "save_file",
]
