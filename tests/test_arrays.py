"""cfl_ops.arrays: arrays of other libraries in and out through DLPack."""

from __future__ import annotations

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


@pytest.mark.gpu
def test_cupy_arrays_stay_on_the_gpu() -> None:
    cupy = pytest.importorskip("cupy")
    x = cupy.random.standard_normal((100, 8))
    moments = cfl_ops.arrays.gram(x)
    assert isinstance(moments.gram, cupy.ndarray)
    assert cupy.allclose(moments.gram, x.T @ x)
    symbols = cupy.random.randint(0, 9, 5000).astype(cupy.uint8)
    payload = cfl_ops.arrays.huffman_encode(symbols)
    assert cupy.array_equal(cfl_ops.arrays.huffman_decode(payload), symbols)
