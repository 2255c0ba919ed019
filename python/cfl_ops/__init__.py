"""Closed-form learning for PyTorch: Gram matrices, proximal steps, solves and weight codecs as fast ops."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch as _torch  # noqa: F401  (the extension needs libtorch in the process)

from cfl_ops._core import dispatch
from cfl_ops.ops.cholesky.recursive_ridge import RecursiveRidge
from cfl_ops.ops.cholesky.resize import cholesky_append, cholesky_append_ex, cholesky_delete
from cfl_ops.ops.cholesky.safe import (
    SafeCholesky,
    safe_cholesky,
    safe_cholesky_ex,
    spd_inverse,
    spd_inverse_ex,
)
from cfl_ops.ops.cholesky.update import (
    cholesky_downdate,
    cholesky_downdate_,
    cholesky_downdate_ex,
    cholesky_downdate_ex_,
    cholesky_update,
    cholesky_update_,
    cholesky_update_ex,
    cholesky_update_ex_,
)
from cfl_ops.ops.codec.blob import compress, decompress
from cfl_ops.ops.codec.delta import apply_delta, apply_delta_, compress_delta
from cfl_ops.ops.codec.files import load_file, open_file, save_file, save_safetensors
from cfl_ops.ops.codec.huffman import huffman_decode, huffman_encode
from cfl_ops.ops.codec.load_model import load_model
from cfl_ops.ops.codec.quantize import (
    QuantizedTensor,
    allocate_bits,
    dequantize,
    estimate_entropy,
    quantize,
    quantize_ex,
)
from cfl_ops.ops.codec.report import TensorReport, compression_report
from cfl_ops.ops.codec.state_dict import compress_state_dict, decompress_state_dict
from cfl_ops.ops.gram import exact_gram as _exact_gram  # noqa: F401  (an op that no public function calls)
from cfl_ops.ops.gram.accumulate import GramAccumulator
from cfl_ops.ops.gram.gram import gram, gram_
from cfl_ops.ops.gram.linear_gram import linear_gram
from cfl_ops.ops.gram.moments import GramMoments
from cfl_ops.ops.proximal.rescaled import rescaled_proximal_step
from cfl_ops.ops.proximal.short_forms import proximal_update, ridge_step
from cfl_ops.ops.proximal.step import (
    ProximalStep,
    proximal_step,
    proximal_step_,
    proximal_step_ex,
    proximal_step_ex_,
)
from cfl_ops.ops.solve.class_ridge import class_ridge
from cfl_ops.ops.solve.factorize import Factorization, factorize
from cfl_ops.ops.solve.least_squares import lstsq, lstsq_ex, pinv, pinv_ex
from cfl_ops.ops.solve.ridge import ridge, ridge_path
from cfl_ops.ops.solve.ridge_cv import RidgeCVResult, ridge_cv
from cfl_ops.ops.solve.ridge_solve import ridge_solve, ridge_solve_ex

from ._version import __version__
from .errors import CorruptDataError, LinAlgError, WrongBaseError

dispatch.load_backends()

if TYPE_CHECKING:
    from cfl_ops import arrays, config, learn


def __getattr__(name: str) -> Any:
    if name not in ("arrays", "config", "learn"):
        raise AttributeError(f"module 'cfl_ops' has no attribute {name!r}")
    return import_module(f"cfl_ops.{name}")  # when it is first asked for: importing cfl_ops is to be quick


__all__ = [
    "CorruptDataError",
    "Factorization",
    "GramAccumulator",
    "GramMoments",
    "LinAlgError",
    "ProximalStep",
    "QuantizedTensor",
    "RecursiveRidge",
    "RidgeCVResult",
    "SafeCholesky",
    "TensorReport",
    "WrongBaseError",
    "__version__",
    "allocate_bits",
    "apply_delta",
    "apply_delta_",
    "arrays",
    "cholesky_append",
    "cholesky_append_ex",
    "cholesky_delete",
    "cholesky_downdate",
    "cholesky_downdate_",
    "cholesky_downdate_ex",
    "cholesky_downdate_ex_",
    "cholesky_update",
    "cholesky_update_",
    "cholesky_update_ex",
    "cholesky_update_ex_",
    "class_ridge",
    "compress",
    "compress_delta",
    "compress_state_dict",
    "compression_report",
    "config",
    "decompress",
    "decompress_state_dict",
    "dequantize",
    "estimate_entropy",
    "factorize",
    "gram",
    "gram_",
    "huffman_decode",
    "huffman_encode",
    "learn",
    "linear_gram",
    "load_file",
    "load_model",
    "lstsq",
    "lstsq_ex",
    "open_file",
    "pinv",
    "pinv_ex",
    "proximal_step",
    "proximal_step_",
    "proximal_step_ex",
    "proximal_step_ex_",
    "proximal_update",
    "quantize",
    "quantize_ex",
    "rescaled_proximal_step",
    "ridge",
    "ridge_cv",
    "ridge_path",
    "ridge_solve",
    "ridge_solve_ex",
    "ridge_step",
    "safe_cholesky",
    "safe_cholesky_ex",
    "save_file",
    "save_safetensors",
    "spd_inverse",
    "spd_inverse_ex",
]
