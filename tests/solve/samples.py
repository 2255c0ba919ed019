"""Sample inputs, oracles and error bounds of the solve family: a module for each file of ops."""

from __future__ import annotations

from tests.solve import (
    samples_class_ridge,
    samples_least_squares,
    samples_ridge,
    samples_ridge_cv,
    samples_ridge_solve,
)

SPECS = [
    *samples_ridge_solve.SPECS,
    *samples_least_squares.SPECS,
    *samples_ridge.SPECS,
    *samples_ridge_cv.SPECS,
    *samples_class_ridge.SPECS,
]
