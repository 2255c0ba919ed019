"""Learning algorithms, each a thin layer over the ops."""

from .closed_form_linear import ClosedFormLinear
from .train_step import train_step

__all__ = ["ClosedFormLinear", "train_step"]
