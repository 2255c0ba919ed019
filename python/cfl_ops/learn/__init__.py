"""Learning algorithms, each a thin layer over the ops."""

from typing import TYPE_CHECKING, Any

from .closed_form_linear import ClosedFormLinear
from .gain import ClosedFormGain, closed_form_gain, feature_alignment
from .heads import ClosedFormHeads
from .probabilities import Calibration, class_probabilities, expected_calibration_error
from .recursive_head import RecursiveHead
from .schedules import BatchSizeLam, ConstantLam, CosineLam, LamSchedule, RelativeLam
from .train_step import train_step

if TYPE_CHECKING:
    from cfl_ops.learn.ridge import Ridge, RidgeCV

__all__ = [
    "BatchSizeLam",
    "Calibration",
    "ClosedFormGain",
    "ClosedFormHeads",
    "ClosedFormLinear",
    "ConstantLam",
    "CosineLam",
    "LamSchedule",
    "RecursiveHead",
    "RelativeLam",
    "Ridge",
    "RidgeCV",
    "class_probabilities",
    "closed_form_gain",
    "expected_calibration_error",
    "feature_alignment",
    "train_step",
]

# These need scikit-learn, which cfl_ops itself does not: they are imported when first asked for.
_ESTIMATORS = {"Ridge": "ridge", "RidgeCV": "ridge"}


def __getattr__(name: str) -> Any:
    if name not in _ESTIMATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_ESTIMATORS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
