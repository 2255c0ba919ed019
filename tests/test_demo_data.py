from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from cfl_ops import demo

for _module in demo.EXTRAS:
    pytest.importorskip(_module, reason='the demo needs pip install "cfl-ops[demo]"')

# ruff: noqa: E402
from cfl_ops.demo import cli, user_data
from typer.testing import CliRunner

ROWS, FEATURES = 40, 3
X = np.random.default_rng(0).normal(3.0, 2.0, (ROWS, FEATURES))
CLASSES = np.arange(ROWS) % 4
WORDS = np.array(["ash", "birch", "cedar", "date"])[CLASSES]
TARGETS = X @ np.array([[1.0, 2.0], [0.0, 1.0], [3.0, 0.0]])


def table(*columns, header: str = "", delimiter: str = ",") -> str:
    rows = [delimiter.join(map(str, row)) for row in zip(*columns, strict=True)]
    return "\n".join(([header] if header else []) + rows) + "\n"


def fails(path) -> str:
    with pytest.raises(user_data.UserDataError) as error:
        user_data.load(str(path))
    return str(error.value)


# What is taken


@pytest.mark.parametrize(
    ("x", "y"), [("X", "y"), ("x", "labels"), ("features", "target"), ("Features", "Label")]
)
@pytest.mark.parametrize("labels", [CLASSES, WORDS, CLASSES.astype(np.uint8), CLASSES > 1])
def test_npz_with_classes(tmp_path, x, y, labels):
    np.savez(tmp_path / "mine.npz", **{x: X, y: labels})
    found = user_data.load(str(tmp_path / "mine.npz"))
    assert found.classes == found.outputs == len(np.unique(labels))
    assert found.train_y.dtype == torch.int64
    assert (len(found.train_x), len(found.test_x)) == (30, 10)
    assert found.tuned_as == "digits"
    assert "mine.npz" in found.title
    # Stratified: each class keeps its share.
    assert (torch.bincount(found.test_y) - 10 / found.classes).abs().max() < 1


def test_the_split_is_the_same_each_time_and_standardised_by_its_training_part(tmp_path):
    np.savez(tmp_path / "a.npz", X=X, y=CLASSES)
    first, again = (user_data.load(str(tmp_path / "a.npz")) for _ in range(2))
    torch.testing.assert_close(first.train_x, again.train_x, rtol=0, atol=0)
    torch.testing.assert_close(first.train_x.mean(0), torch.zeros(3), rtol=0, atol=1e-6)
    torch.testing.assert_close(first.train_x.std(0, correction=0), torch.ones(3))
    # Both parts together are the file's rows, shifted and scaled alike.
    both = torch.cat([first.train_x, first.test_x]).double().numpy()
    for ours, theirs in zip(np.sort(both, 0).T, np.sort(X, 0).T, strict=True):
        assert np.abs(np.polyval(np.polyfit(theirs, ours, 1), theirs) - ours).max() < 1e-5


def test_floats_are_a_regression(tmp_path):
    np.savez(tmp_path / "a.npz", X=X, y=TARGETS)
    found = user_data.load(str(tmp_path / "a.npz"))
    assert (found.classes, found.outputs, found.tuned_as) == (0, 2, "diabetes")
    torch.testing.assert_close(found.train_y.mean(0), torch.zeros(2), rtol=0, atol=1e-6)
    np.savez(tmp_path / "b.npz", X=X, y=TARGETS[:, 0])
    assert user_data.load(str(tmp_path / "b.npz")).train_y.shape == (30, 1)


def test_constant_features_become_zero(tmp_path):
    np.savez(tmp_path / "a.npz", X=np.c_[X, np.full(ROWS, 0.1)], y=CLASSES)
    found = user_data.load(str(tmp_path / "a.npz"))
    assert found.train_x[:, 3].abs().max() < 1e-12
    assert found.train_x.isfinite().all()


def test_images_are_flattened(tmp_path):
    np.savez(
        tmp_path / "a.npz", X=np.random.default_rng(0).integers(0, 255, (ROWS, 4, 5)), y=CLASSES[:, None]
    )
    assert user_data.load(str(tmp_path / "a.npz")).train_x.shape == (30, 20)


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        (table(*X.T, WORDS), 4),
        (table(*X.T, CLASSES), 4),
        (table(*X.T, CLASSES, header="a,b,c,kind"), 4),
        (table(CLASSES, *X.T, header="label,0,1,2"), 4),
        (table(WORDS, *X.T, header=" Y; a; b; c", delimiter="; "), 4),
        (table(*X.T, WORDS, header="a\tb\tc\td", delimiter="\t"), 4),
        (table(*X.T, TARGETS[:, 0]), 0),
        ("\ufeff" + table(X[:, 0], TARGETS[:, 0], X[:, 1], X[:, 2], header="a,target,b,c") + "\n\n", 0),
    ],
)
def test_tables(tmp_path, text, classes):
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    found = user_data.load(str(tmp_path / "a.csv"))
    np.savez(tmp_path / "a.npz", X=X, y=CLASSES if classes else TARGETS[:, 0])
    expected = user_data.load(str(tmp_path / "a.npz"))
    assert found.classes == classes
    torch.testing.assert_close(found.train_x, expected.train_x)
    torch.testing.assert_close(found.train_y, expected.train_y)


def test_folders(tmp_path):
    arrays = tmp_path / "arrays"
    arrays.mkdir()
    np.save(arrays / "features.npy", X.astype(np.float32))
    np.save(arrays / "labels.npy", WORDS)
    expected = user_data.load(str(arrays))
    assert expected.classes == 4

    classes = tmp_path / "classes"
    for name in np.unique(WORDS):
        (classes / name).mkdir(parents=True)
        rows = X[name == WORDS]
        np.save(classes / name / "0.npy", rows[0])
        np.save(classes / name / "1.npy", rows[1:])
    found = user_data.load(str(classes))
    assert found.classes == 4
    assert len(found.train_x) == len(expected.train_x)


def test_safetensors(tmp_path):
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = {"features": torch.from_numpy(X).bfloat16(), "labels": torch.from_numpy(CLASSES)}
    save_file(tensors, tmp_path / "mine.safetensors")
    assert user_data.load(str(tmp_path)).classes == 4
    assert user_data.load(str(tmp_path / "mine.safetensors")).classes == 4


def test_a_run_on_a_users_data(tmp_path):
    path = tmp_path / "trees.csv"
    path.write_text(table(*X.T, WORDS, header="a,b,c,tree"))
    arguments = ["--data", str(path), "--seeds", "1", "--width", "16", "--steps", "5", "--out", str(tmp_path)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "those tuned for digits" in " ".join(result.output.split())
    results = json.loads((tmp_path / "results.json").read_text())
    # 30 rows to train on: of 8, 32 and 128 only 8 fits.
    assert {run["batch_size"] for run in results["runs"]} == {8}
    page = (tmp_path / "index.html").read_text()
    assert "trees.csv (3 features, 4 classes)" in page
    assert 'id="samples"' not in page


def test_errors_end_the_command_with_2(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,x\n")
    result = CliRunner().invoke(cli.app, ["--data", str(tmp_path / "a.csv")])
    assert result.exit_code == 2
    assert "each class needs two samples" in " ".join(re.sub("[│]", " ", result.output).split())


# What is refused


def _replaced(array, row, column, value):
    array = array.copy()
    array[row, column] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"data": X, "y": CLASSES}, "array named x, features was looked for, and data, y found"),
        ({"X": X, "kind": CLASSES}, "no targets: an array named y, labels"),
        ({}, "nothing found"),
        ({"X": X[:30], "y": CLASSES}, "30 rows of features, but 40 targets"),
        ({"X": X[:, 0], "y": CLASSES}, "must have shape (N, D), but have (40,)"),
        ({"X": X, "y": np.eye(4, dtype=int)[CLASSES]}, "labels must have shape (N,), but have (40, 4)"),
        ({"X": X, "y": TARGETS[None]}, "targets must have shape (N,) or (N, K)"),
        ({"X": _replaced(X, 17, 1, np.nan), "y": CLASSES}, "NaN in row 17 (counted from 0), column 1"),
        ({"X": _replaced(X, 3, 0, -np.inf), "y": CLASSES}, "an infinite value in row 3"),
        ({"X": X, "y": _replaced(TARGETS, 5, 1, np.nan)}, "the targets have NaN in row 5"),
        ({"X": X, "y": CLASSES * 0}, "two classes or more, but all 40 labels are [0]"),
        ({"X": X, "y": np.where(np.arange(ROWS) == 7, 9, CLASSES)}, "class '9' has one (for a regression"),
        ({"X": X, "y": np.arange(ROWS) // 2}, "40 rows are too few to split for 20 classes"),
        ({"X": X, "y": TARGETS * 0}, "all targets are equal"),
        ({"X": X[:3], "y": TARGETS[:3]}, "3 rows are too few"),
        ({"X": X[:0], "y": CLASSES[:0]}, "no rows"),
        ({"X": WORDS[:, None], "y": CLASSES}, "features must be numbers"),
        ({"X": X, "y": TARGETS[:, 0] * 1j}, "not complex128"),
        ({"X": X, "y": np.array([None] * ROWS)}, "holds Python objects"),
    ],
)
def test_arrays_that_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    assert message in fails(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b,y\n1,2,3\n\n1,,3\n", "line 4: b: is empty"),
        ("a,b,y\n1,2,3\n1,x,3\n", "line 3: b: 'x' is not a finite number"),
        ("a,b,y\n1,2,3\nnan,1,3\n", "line 3: a: 'nan' is not a finite number"),
        ("1,2,3\n1,2\n", "line 2 has 2 cells, but the first has 3"),
        ("a,b,y\n1,2,\n", "line 2 has no target (y is empty)"),
        ("a,y,label\n1,2,3\n", "several target columns: y, label"),
        ("a,b,y\n", "no rows"),
        ("", "fewer than two columns"),
        ("1\n2\n", "fewer than two columns"),
    ],
)
def test_tables_that_are_refused(tmp_path, text, message):
    (tmp_path / "a.csv").write_text(text)
    assert message in fails(tmp_path / "a.csv")


def test_paths_that_are_refused(tmp_path):
    assert "no such file or folder" in fails(tmp_path / "gone.npz")
    (tmp_path / "a.npz").write_text("x")
    assert "no .npz archive" in fails(tmp_path / "a.npz")
    (tmp_path / "a.parquet").write_text("x")
    assert "is no .npz, .csv" in fails(tmp_path / "a.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "found: nothing" in fails(folder)
    np.save(folder / "features.npy", X)
    assert "has no labels.npy" in fails(folder)
    (folder / "labels.npy").write_text("x")
    assert "holds Python objects, or what is no array" in fails(folder)


def test_class_folders_that_are_refused(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "0.npy", X[:5])
    np.save(tmp_path / "b" / "1.npy", np.array([1.0, np.nan, 2.0]))
    assert "NaN in b/1.npy, column 1" in fails(tmp_path)
    np.save(tmp_path / "b" / "1.npy", X[0, :2])
    assert "has 2 features a row, but a/0.npy row 0 has 3" in fails(tmp_path)
    np.save(tmp_path / "b" / "1.npy", X[None])
    assert "must hold a row (D,) or rows (N, D), but has shape (1, 40, 3)" in fails(tmp_path)
    (tmp_path / "c").mkdir()
    np.save(tmp_path / "b" / "1.npy", X[0])
    assert "holds no .npy file" in fails(tmp_path)
