"""The errors that cfl_ops raises beside Python's and torch's own."""

import torch

__all__ = ["CorruptDataError", "LinAlgError", "WrongBaseError"]

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]


class CorruptDataError(ValueError):
    """Encoded bytes that are damaged, truncated, or were never written by cfl_ops."""


class WrongBaseError(ValueError):
    """A delta was to be applied to something else than what it was made from."""

    already_applied = False
    """Whether what it was to be applied to is its result: it was delivered twice."""
