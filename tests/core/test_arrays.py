"""cfl_ops.arrays: arrays of other libraries in and out through DLPack."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import cfl_ops
import numpy as np
import pytest
import torch
from cfl_ops.arrays import WRITTEN
from torch.utils import _pytree as pytree


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


def calls(path: Path) -> dict[str, dict[str, Any]]:
    """For every public function, arguments that make it do all that it does, in fresh arrays."""
    rng = np.random.default_rng(0)
    x, y, labels = rng.normal(size=(12, 4)), rng.normal(size=(12, 2)), np.arange(12) % 2
    gram, cross = x.T @ x, x.T @ y
    factor, rows = np.linalg.cholesky(gram), rng.normal(size=(4, 2)) / 9
    weight, bias, per_row = rng.normal(size=(2, 4)), rng.normal(size=2), rng.uniform(0.5, 1, 12)
    symbols = np.arange(40, dtype=np.uint8).reshape(5, 8)
    payload = cfl_ops.arrays.huffman_encode(symbols)
    blob = cfl_ops.arrays.compress(x, bits=6)
    delta = cfl_ops.arrays.compress_delta(x + 1, x)
    moments = cfl_ops.arrays.gram(x, y)
    step = {
        "features": x,
        "target": y,
        "weight": weight,
        "bias": bias,
        "lam": 0.5,
        "lam_diag": rng.uniform(size=4),
    }
    step |= {"sample_weight": per_row}
    grow = {"L": factor, "rows": rng.normal(size=(2, 4)) / 9, "corner": np.eye(2) * 9}
    update, quantized = {"L": factor, "V": rows}, cfl_ops.arrays.quantize(x, 5, per="row")
    cfl_ops.arrays.save_file({"w": x}, path, min_numel=1)
    model = torch.nn.Linear(4, 2)
    cfl_ops.save_file(model.state_dict(), path.with_suffix(".model"))
    made: dict[str, dict[str, Any]] = {
        "allocate_bits": {"entropy": np.array(2.5)},
        **dict.fromkeys(("cholesky_append", "cholesky_append_ex"), grow),
        "cholesky_delete": {"L": factor, "index": 1},
        **{
            f"cholesky_{kind}{end}": update
            for kind in ("update", "downdate")
            for end in ("", "_", "_ex", "_ex_")
        },
        "class_ridge": {"x": x, "y": labels, "lam": 0.5, "num_classes": 2, "prox": 0.1, "weight": weight.T},
        **{key: {"old": x, "delta": delta} for key in ("apply_delta", "apply_delta_")},
        "compress": {"w": x},
        "compress_delta": {"new": x + 1, "old": x},
        "compress_state_dict": {"state_dict": {"w": x, "v": y}, "min_numel": 30},
        "compression_report": {"state_dict": {"w": x}, "blobs": {"w": blob}},
        "decompress": {"blob": blob, "out": np.zeros((12, 4))},
        "decompress_state_dict": {"blobs": {"w": blob}},
        "dequantize": {"q": quantized},
        "estimate_entropy": {"w": x, "fraction": 0.5},
        "factorize": {"a": x},
        "gram": {"x": x, "y": y, "sample_weight": per_row, "bias_column": True},
        "gram_": {"m": moments, "x": x, "y": y, "sample_weight": per_row},
        "huffman_decode": {"payload": payload, "out": np.zeros((5, 8), np.uint8)},
        "huffman_encode": {"symbols": symbols},
        "linear_gram": {"x": x, "weight": weight, "bias": bias, "y": y, "sample_weight": per_row},
        "load_file": {"path": path},
        "open_file": {"path": path},
        "load_model": {"model": model, "path": path.with_suffix(".model")},
        **{key: {"a": x, "b": y} for key in ("lstsq", "lstsq_ex")},
        **{key: {"a": x} for key in ("pinv", "pinv_ex")},
        **{f"proximal_step{end}": step for end in ("", "_", "_ex", "_ex_")},
        "proximal_update": step,
        **{key: {"w": x, "histogram": True} for key in ("quantize", "quantize_ex")},
        "rescaled_proximal_step": {
            "features": x,
            "labels": labels,
            "weight": weight,
            "bias": bias,
            "lam": 0.5,
        },
        "ridge": {"x": x, "y": y, "lam": 0.5, "bias": True},
        "ridge_cv": {"x": x, "y": y, "lams": np.array([0.1, 1.0])},
        "ridge_path": {"x": x, "y": y, "lams": np.array([0.1, 1.0])},
        **{
            key: {"gram": gram, "cross": cross, "lam_diag": np.ones(4)}
            for key in ("ridge_solve", "ridge_solve_ex")
        },
        "ridge_step": {
            "features": x,
            "target": labels,
            "num_classes": 2,
            "lam": 0.5,
            "sample_weight": per_row,
        },
        **{
            key: {"a": gram} for key in ("safe_cholesky", "safe_cholesky_ex", "spd_inverse", "spd_inverse_ex")
        },
        "save_file": {"state_dict": {"w": x, "v": y}, "path": path},
        "save_safetensors": {"state_dict": {"w": x, "v": y}, "path": path.with_suffix(".safetensors")},
    }
    return {name: copied(arguments) for name, arguments in made.items()}


def copied(tree: Any) -> Any:
    return pytree.tree_map_only(np.ndarray, np.copy, tree)


def same(a: Any, b: Any) -> bool:
    """Equal bits and types, in nests; of an object, its solutions."""
    if hasattr(a, "solve"):
        a, b = [a.solve(np.ones((12, 1))), a.rank], [b.solve(np.ones((12, 1))), b.rank]
    if hasattr(a, "header"):  # an open file
        a, b = [{name: one.tensor(name).numpy() for name in one.names} for one in (a, b)]
    first, second = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(first) == len(second) and all(
        type(p) is type(q) and (np.asarray(p).tobytes() == np.asarray(q).tobytes())
        for p, q in zip(first, second, strict=True)
    )


def reversed_in_memory(array: np.ndarray) -> np.ndarray:
    """The same values with negative strides."""
    flip = (slice(None, None, -1),) * array.ndim
    return array[flip].copy()[flip]


def foreign(array: np.ndarray) -> np.ndarray:
    """The same values in the other byte order."""
    return array.astype(array.dtype.newbyteorder())


def packed(array: np.ndarray) -> np.ndarray:
    """The same values at odd addresses with odd strides."""
    records = np.zeros(array.shape, dtype=[("before", "u1"), ("value", array.dtype)])
    records["value"] = array
    return records["value"]


def read_only(array: np.ndarray) -> np.ndarray:
    out = array.copy()
    out.setflags(write=False)
    return out


FUNCTIONS = sorted(set(dir(cfl_ops.arrays)) - set(cfl_ops.arrays.__all__))


def test_every_function_is_tried_and_those_that_say_that_they_write_are_listed(tmp_path: Path) -> None:
    assert sorted(calls(tmp_path / "a.cflz")) == FUNCTIONS
    for name in FUNCTIONS:
        assert name in WRITTEN or not name.endswith("_"), name
        assert name in WRITTEN or "out" not in inspect.signature(getattr(cfl_ops, name)).parameters, name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_writes_to_what_is_listed_and_to_nothing_else(name: str, tmp_path: Path) -> None:
    arguments = calls(tmp_path / "a.cflz")[name]
    before = copied(arguments)
    getattr(cfl_ops.arrays, name)(**arguments)
    changed = {key for key in arguments if not same(arguments[key], before[key])}
    assert changed == set(WRITTEN.get(name, ()))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("layout", [reversed_in_memory, foreign, packed, read_only])
def test_arrays_of_any_layout_are_read_and_never_written(name: str, layout: Any, tmp_path: Path) -> None:
    function, arguments = getattr(cfl_ops.arrays, name), calls(tmp_path / "a.cflz")[name]
    written = WRITTEN.get(name, ())
    strange = {
        key: value if key in written else pytree.tree_map_only(np.ndarray, layout, value)
        for key, value in copied(arguments).items()
    }
    kept = copied(strange)
    assert same(function(**strange), function(**copied(arguments)))
    for key in strange:
        assert key in written or same(strange[key], kept[key])
    for key in written:
        leaves, spec = pytree.tree_flatten(arguments[key])
        for i, leaf in enumerate(leaves):
            if layout in (foreign, packed) and leaf.itemsize == 1:
                continue  # a byte has no order, and no odd address
            if leaf.ndim == 0 and layout in (reversed_in_memory, packed):
                continue  # nor a number strides
            value = pytree.tree_unflatten([*leaves[:i], layout(leaf), *leaves[i + 1 :]], spec)
            bad = {**copied(arguments), key: value}
            before = copied(bad)
            with pytest.raises(
                ValueError, match=rf"arrays\.{name}: {key}\S* is written to, but the array (has|is)"
            ):
                function(**bad)
            assert same(bad, before)


def test_strides_that_are_no_multiples_of_elements_are_copied() -> None:
    records = np.zeros(5, dtype=[("before", "f8"), ("value", "c16")])
    records["value"] = np.arange(5) * 1j
    values = records["value"]
    assert values.flags.aligned
    assert values.strides == (24,)
    blobs = cfl_ops.arrays.compress_state_dict({"w": values})
    assert np.array_equal(cfl_ops.arrays.decompress_state_dict(blobs)["w"], values)


def test_memory_maps_and_broadcasts_are_read_where_they_are_and_never_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "w.npy", rng.normal(size=(2, 5)))
    np.save(tmp_path / "x.npy", rng.normal(size=(8, 5)))
    w, x = np.load(tmp_path / "w.npy", mmap_mode="r"), np.load(tmp_path / "x.npy", mmap_mode="r")
    assert cfl_ops.arrays.to_tensors(x).data_ptr() == x.ctypes.data
    before = (tmp_path / "w.npy").read_bytes()
    with pytest.raises(ValueError, match="proximal_step_: weight is written to, but the array is read-only"):
        cfl_ops.arrays.proximal_step_(x, np.arange(8) % 2, w, lam=1.0)
    assert (tmp_path / "w.npy").read_bytes() == before
    step = cfl_ops.arrays.proximal_step(x, np.arange(8) % 2, w, lam=1.0)
    assert np.array_equal(
        step.weight, cfl_ops.arrays.proximal_step(x.copy(), np.arange(8) % 2, w.copy(), lam=1.0)[0]
    )
    stack = np.broadcast_to(np.eye(3), (2, 3, 3))
    with pytest.raises(ValueError, match="cholesky_update_: L is written to, but the array is read-only"):
        cfl_ops.arrays.cholesky_update_(stack, np.ones((2, 3, 1)))
    assert cfl_ops.arrays.cholesky_update(stack, np.ones((2, 3, 1))).shape == (2, 3, 3)
    # A view of it that comes out is as read-only as it is.
    f = cfl_ops.arrays.factorize(x)
    assert np.shares_memory(f.a, x)
    assert not f.a.flags.writeable
    assert f.solve(np.ones((8, 1))).flags.writeable


@pytest.mark.parametrize(
    "values",
    [np.array([[object()]]), np.array([["a"]]), np.zeros((2, 2), np.longdouble), np.zeros((2, 2), "M8[s]")],
)
def test_what_is_no_array_of_numbers_is_a_type_error(values: np.ndarray) -> None:
    for array in (values, values[::-1]):
        with pytest.raises(
            TypeError, match=r"arrays\.gram: x must be an array that torch can read, but got dtype"
        ):
            cfl_ops.arrays.gram(array)
        with pytest.raises(TypeError, match=r"arrays\.to_tensors: tree\[0\]\['a'\] must be an array"):
            cfl_ops.arrays.to_tensors([{"a": array}])
    with pytest.raises(TypeError, match=r"arrays\.gram: x must not be a masked array"):
        cfl_ops.arrays.gram(np.ma.array([[1.0]], mask=True))
    with pytest.raises(TypeError, match=r"state_dict\['w'\] must be an array"):
        cfl_ops.arrays.compress_state_dict({"w": values})


def test_an_object_takes_and_gives_arrays() -> None:
    x, b = np.random.default_rng(0).normal(size=(6, 3)), np.arange(6.0)[:, None]
    f, want = cfl_ops.arrays.factorize(x), cfl_ops.factorize(torch.from_numpy(x))
    for got, expected in (
        (f.solve(b), want.solve(torch.from_numpy(b))),
        (f.solve(b=b[::-1]), want.solve(torch.from_numpy(b[::-1].copy()))),
        (f.pinv(), want.pinv()),
        (f.singular_values, want.singular_values),
        (f.logdet, want.logdet),
        (f.rank, want.rank),
    ):
        assert isinstance(got, np.ndarray)
        assert np.array_equal(got, expected.numpy())
    assert f.a is not x
    assert np.shares_memory(f.a, x)
    with pytest.raises(
        TypeError, match=r"arrays\.Factorization\.solve: b must be an array that torch can read"
    ):
        f.solve(np.array([["a"]]))
    assert repr(f).startswith(
        "<cfl_ops.Factorization with arrays of numpy: a, condition, logdet, pinv(), rank,"
    )
    assert dir(f) == ["a", "condition", "logdet", "pinv", "rank", "singular_values", "solve"]
    with pytest.raises(AttributeError):
        f.a = x
    for again in (copy.copy(f), copy.deepcopy(f), pickle.loads(pickle.dumps(f))):
        assert np.array_equal(again.solve(b), f.solve(b))
    assert cfl_ops.arrays.to_tensors(f) is not f
    assert isinstance(cfl_ops.arrays.factorize(torch.from_numpy(x)), cfl_ops.Factorization)


def test_an_argument_that_comes_back_is_the_same_array() -> None:
    blob, out = cfl_ops.arrays.compress(np.ones(5)), np.zeros(5)
    assert cfl_ops.arrays.decompress(blob, out) is out
    assert out.all()


def test_mixed_libraries_and_what_is_no_array() -> None:
    x, y = np.random.default_rng(0).normal(size=(6, 3)), torch.ones(6, 1, dtype=torch.float64)
    want = cfl_ops.ridge_path(torch.from_numpy(x), y, [0.1, 1.0])
    got = cfl_ops.arrays.ridge_path(x, y=y, lams=[0.1, 1.0])
    assert isinstance(got, np.ndarray)
    assert np.array_equal(got, want.numpy())
    assert isinstance(cfl_ops.arrays.ridge_path(y, x, np.array([0.1, 1.0])), np.ndarray)
    with pytest.raises(TypeError, match="positional argument"):
        cfl_ops.arrays.gram(x, x, x, x, x)
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        cfl_ops.arrays.gram(x, z=x)
    with pytest.raises(TypeError, match="numpy has no array for a tensor of torch.bfloat16"):
        cfl_ops.arrays.decompress(cfl_ops.compress(torch.ones(3).bfloat16()).numpy())


def test_a_subclass_and_a_library_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(np.ndarray):
        pass

    got = cfl_ops.arrays.pinv(np.eye(3).view(Mine))
    assert type(got) is np.ndarray

    class Array:
        """As jax's: no strides, no flags, and nobody may write to it."""

        def __init__(self, values: np.ndarray) -> None:
            self.values, self.ndim, self.dtype = values, values.ndim, values.dtype

        def __dlpack__(self, **options: Any) -> Any:
            return self.values.__dlpack__(**options)

        def __dlpack_device__(self) -> Any:
            return self.values.__dlpack_device__()

    Array.__module__ = "jaxlib.xla"
    library = ModuleType("jaxlib")
    library.from_dlpack = lambda tensor: Array(tensor.numpy())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "jaxlib", library)
    monkeypatch.setitem(sys.modules, "jaxlib.xla", ModuleType("jaxlib.xla"))
    assert isinstance(cfl_ops.arrays.pinv(Array(np.eye(3))), Array)
    with pytest.raises(ValueError, match="L is written to, but the array is read-only"):
        cfl_ops.arrays.cholesky_update_(Array(np.eye(3)), np.ones((3, 1)))


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
