"""cfl_ops.arrays: arrays of other libraries in and out through DLPack."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import cfl_ops
import numpy as np
import pytest
import torch


def test_results_are_arrays_of_the_library_that_came_in() -> None:
    x, y = np.random.default_rng(0).normal(size=(20, 3)), np.arange(20) % 4
    moments = cfl_ops.arrays.gram(x, y, bias_column=True, num_classes=4)
    want = cfl_ops.gram(torch.from_numpy(x), torch.from_numpy(y), bias_column=True, num_classes=4)
    assert type(moments) is type(want)
    for got, expected in zip(moments, want, strict=True):
        assert isinstance(got, np.ndarray)
        assert np.array_equal(got, expected.numpy())
    weight = cfl_ops.arrays.ridge_solve(moments.gram, moments.cross, 0.1)
    assert np.array_equal(weight, cfl_ops.ridge_solve(want.gram, want.cross, 0.1).numpy())


def test_in_place_functions_write_to_the_arrays() -> None:
    weight = np.zeros((2, 5), dtype=np.float32)
    features = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
    loss, grad = cfl_ops.arrays.proximal_step_(features, np.arange(8) % 2, weight, lam=1.0)
    assert weight.any()
    assert isinstance(grad, np.ndarray)
    assert loss.shape == ()


def test_tensors_stay_tensors_and_other_names_are_unknown() -> None:
    assert isinstance(cfl_ops.arrays.pinv(torch.eye(2)), torch.Tensor)
    assert "gram" in dir(cfl_ops.arrays)
    with pytest.raises(AttributeError):
        cfl_ops.arrays.GramAccumulator  # noqa: B018


def one_op_a_family(xp: ModuleType) -> None:
    """Arrays of ``xp`` in, the same kind out, with the right values: gram, cholesky, proximal, solve, codec."""
    rng = np.random.default_rng(0)

    def near(got: Any, want: np.ndarray) -> None:
        assert isinstance(got, xp.ndarray)
        assert np.allclose(got.get() if hasattr(got, "get") else got, want, rtol=1e-9, atol=1e-9)

    x, y = rng.normal(size=(100, 8)), rng.normal(size=(100, 2))
    moments = cfl_ops.arrays.gram(xp.asarray(x), xp.asarray(y))
    near(moments.gram, x.T @ x)
    near(moments.cross, x.T @ y)
    solution = cfl_ops.arrays.ridge_solve(moments.gram, moments.cross, 0.1)
    near(solution, np.linalg.solve(x.T @ x + 0.1 * np.eye(8), x.T @ y))
    factor = cfl_ops.arrays.cholesky_update(xp.asarray(np.linalg.cholesky(x.T @ x)), xp.asarray(x[:1].T))
    near(factor, np.linalg.cholesky(x.T @ x + x[:1].T @ x[:1]))
    weight = np.zeros((2, 8))
    step = cfl_ops.arrays.proximal_step(xp.asarray(x), xp.asarray(y), xp.asarray(weight), lam=0.5)
    near(step.weight, np.linalg.solve(x.T @ x + 50 * np.eye(8), x.T @ y).T)
    symbols = rng.integers(0, 9, 5000).astype(np.uint8)
    payload = cfl_ops.arrays.huffman_encode(xp.asarray(symbols))
    assert isinstance(payload, xp.ndarray)
    near(cfl_ops.arrays.huffman_decode(payload), symbols)


def test_one_op_a_family_takes_numpy_arrays() -> None:
    one_op_a_family(np)


@pytest.mark.gpu
def test_one_op_a_family_takes_cupy_arrays() -> None:
    if not torch.cuda.is_available():
        pytest.skip("a rehearsal: CuPy's arrays need a device")
    one_op_a_family(pytest.importorskip("cupy"))
