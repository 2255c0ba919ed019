"""Closed-form learning for PyTorch: Gram matrices, proximal steps, solves and weight codecs as fast ops."""

import torch as _torch  # noqa: F401  (the extension needs libtorch in the process)

from . import _library
from ._version import __version__
from .accumulate import GramAccumulator
from .errors import CorruptDataError, LinAlgError
from .gram import GramMoments, gram, gram_, linear_gram
from .least_squares import Factorization, factorize, lstsq, lstsq_ex, pinv, pinv_ex
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
from .ridge import RidgeCVResult, class_ridge, ridge, ridge_cv, ridge_path
from .solve import ridge_solve, ridge_solve_ex

_library.load_backends()

from . import config, learn

__all__ = [
    "CorruptDataError",
    "Factorization",
    "GramAccumulator",
    "GramMoments",
    "LinAlgError",
    "ProximalStep",
    "RidgeCVResult",
    "__version__",
    "class_ridge",
    "config",
    "factorize",
    "gram",
    "gram_",
    "learn",
    "linear_gram",
    "lstsq",
    "lstsq_ex",
    "pinv",
    "pinv_ex",
    "proximal_step",
    "proximal_step_",
    "proximal_step_ex",
    "proximal_step_ex_",
    "proximal_update",
    "rescaled_proximal_step",
    "ridge",
    "ridge_cv",
    "ridge_path",
    "ridge_solve",
    "ridge_solve_ex",
    "ridge_step",
]
