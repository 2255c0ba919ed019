"""Learning algorithms, each a thin layer over the ops."""

from .closed_form_linear import ClosedFormLinear

__all__ = ["ClosedFormLinear"]
