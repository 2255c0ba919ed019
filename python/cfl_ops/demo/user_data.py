"""A user's own data for the demo: an ``.npz``, a CSV, or a folder of features."""

from __future__ import annotations

import csv
import io
import math
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from .data import DATASETS, Dataset
from .data import load as load_named

__all__ = ["FEATURE_NAMES", "TARGET_NAMES", "UserDataError", "load", "load_path"]

# Taken in this order, in any case of letters.
FEATURE_NAMES = ("x", "features")
TARGET_NAMES = ("y", "labels", "label", "target", "targets")
DELIMITERS = ",;\t"
TEST_SHARE = 0.25

Array = NDArray[Any]
Where = Callable[[int], str]
"""How a row is named in an error."""


class UserDataError(ValueError):
    """The data of ``--data`` cannot be used; the message says why."""


def load(text: str) -> Dataset:
    """What ``--data`` names: one of DATASETS, or else the path of a user's own data."""
    if text in DATASETS:
        return load_named(text)
    path = Path(text).expanduser()
    if not path.exists():
        raise UserDataError(f"{text!r} is none of {', '.join(DATASETS)}, and there is no such file or folder")
    return load_path(path)


def load_path(path: Path) -> Dataset:
    """Load a file or a folder and split it 75/25, always in the same way.

    Integer or string labels are classes, and keep their shares in both parts; floating-point ones are the
    targets of a regression. Features, and the targets of a regression, are standardised by the training part.

    Args:
        path: ``.npz`` with arrays ``X`` (or ``x``, ``features``) and ``y`` (``labels``, ``target``);
            ``.csv`` or ``.tsv`` of numbers, with a header or not, whose target is the column of that name, or
            the last; or a folder that holds ``features.npy`` and ``labels.npy``, or one ``.safetensors`` file
            with tensors named as in an ``.npz``, or a subfolder for each class with ``.npy`` files, each a
            row ``(D,)`` or rows ``(N, D)``.

    Raises:
        UserDataError: there is no such path, or what it holds cannot be used.

    """
    where: Where = lambda row: f"row {row} (counted from 0)"  # noqa: E731
    if path.is_dir():
        features, target, names = _folder(path)
        if names:
            where = lambda row: names[row]  # noqa: E731
    elif path.suffix == ".npz":
        features, target = _npz(path)
    elif path.suffix == ".safetensors":
        features, target = _safetensors(path)
    elif path.suffix in (".csv", ".tsv", ".txt"):
        features, target, lines = _table(path)
        where = lambda row: f"line {lines[row]}"  # noqa: E731
    else:
        raise UserDataError(
            f"{path.name} is no .npz, .csv, .tsv, .txt or .safetensors file, and no folder: what it holds is not known"
        )
    return _dataset(path, features, target, where)


# Files


def _npz(path: Path) -> tuple[Array, Array]:
    if not zipfile.is_zipfile(path):
        raise UserDataError(f"{path} is no .npz archive")
    with np.load(path, allow_pickle=False) as archive:
        features, target = _named(path, list(archive))
        return _array(path, lambda: archive[features]), _array(path, lambda: archive[target])


def _named(path: Path, found: Iterable[str]) -> tuple[str, str]:
    """The names of the features and of the target among those found."""
    lower = {name.lower(): name for name in found}
    mine = []
    for what, wanted in (("features", FEATURE_NAMES), ("targets", TARGET_NAMES)):
        name = next((lower[name] for name in wanted if name in lower), None)
        if name is None:
            raise UserDataError(
                f"{path} has no {what}: an array named {', '.join(wanted)} was looked for, and "
                f"{', '.join(found) or 'nothing'} found"
            )
        mine.append(name)
    return mine[0], mine[1]


def _safetensors(path: Path) -> tuple[Array, Array]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserDataError(f"{path.name} needs a package: pip install safetensors") from None
    try:
        tensors = load_file(path)
    except Exception as error:
        raise UserDataError(f"{path} cannot be read: {error}") from None
    features, target = (tensors[name] for name in _named(path, tensors))
    if target.dtype == torch.bfloat16:
        target = target.float()
    return features.double().numpy(), target.numpy()


def _npy(path: Path) -> Array:
    return _array(path, lambda: np.load(path, allow_pickle=False))


def _array(path: Path, read: Callable[[], Array]) -> Array:
    """An array of plain values; Python objects could run code."""
    try:
        return read()
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserDataError(f"{path} cannot be read: {error}") from None
    except ValueError:
        raise UserDataError(f"{path} holds Python objects, or what is no array") from None


def _folder(path: Path) -> tuple[Array, Array, list[str]]:
    """Features, target, and for class folders the name of each row."""
    features, labels = path / "features.npy", path / "labels.npy"
    if features.exists() or labels.exists():
        for file in (features, labels):
            if not file.exists():
                raise UserDataError(
                    f"{path} has no {file.name}, only the other of features.npy and labels.npy"
                )
        return _npy(features), _npy(labels), []
    tensors = sorted(path.glob("*.safetensors"))
    if len(tensors) == 1:
        return *_safetensors(tensors[0]), []
    classes = {each.name: sorted(each.glob("*.npy")) for each in sorted(path.iterdir()) if each.is_dir()}
    if len(tensors) > 1 or not any(classes.values()):
        found = ", ".join(sorted(each.name for each in path.iterdir())[:8]) or "nothing"
        raise UserDataError(
            f"{path} holds neither features.npy and labels.npy, nor one .safetensors file, nor subfolders with .npy "
            f"files; found: {found}"
        )
    rows: list[Array] = []
    names: list[str] = []
    target: list[str] = []
    for label, files in classes.items():
        if not files:
            raise UserDataError(f"the class folder {path / label} holds no .npy file")
        for file in files:
            array = _npy(file)
            if array.ndim not in (1, 2):
                raise UserDataError(
                    f"{file} must hold a row (D,) or rows (N, D), but has shape {array.shape}"
                )
            array = np.atleast_2d(array)
            if rows and array.shape[1] != rows[0].shape[1]:
                raise UserDataError(
                    f"{file} has {array.shape[1]} features a row, but {names[0]} has {rows[0].shape[1]}"
                )
            rows.append(array)
            names += [
                f"{label}/{file.name}" + (f" row {i}" if len(array) > 1 else "") for i in range(len(array))
            ]
            target += [label] * len(array)
    return np.concatenate(rows), np.array(target), names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _table(path: Path) -> tuple[Array, Array, list[int]]:
    """Features, target, and the line of each row. Cells are numbers, but for those of the target."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserDataError(f"{path} cannot be read: {error}") from None
    head = text.split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    rows, lines = [], []
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                rows.append([cell.strip() for cell in row])
                lines.append(reader.line_num)
    except csv.Error as error:
        raise UserDataError(f"{path} line {reader.line_num}: {error}") from None
    if not rows or len(rows[0]) < 2:
        raise UserDataError(f"{path} has fewer than two columns: features and a target are needed")
    first, column = rows[0], len(rows[0]) - 1
    named = [i for i, cell in enumerate(first) if cell.lower() in TARGET_NAMES]
    # The last cell of a row without a header may be the name of a class; the others are numbers.
    if named or any(cell and not _is_number(cell) for cell in first[:-1]):
        if len(named) > 1:
            raise UserDataError(f"{path} has several target columns: {', '.join(first[i] for i in named)}")
        column = named[0] if named else column
        header, rows, lines = first, rows[1:], lines[1:]
    else:
        header = [f"column {i + 1}" for i in range(len(first))]
    features = np.empty((len(rows), len(header) - 1))
    target = []
    for i, row in enumerate(rows):
        if len(row) != len(header):
            raise UserDataError(
                f"{path} line {lines[i]} has {len(row)} cells, but the first has {len(header)}"
            )
        label = row.pop(column)
        if not label:
            raise UserDataError(f"{path} line {lines[i]} has no target ({header[column]} is empty)")
        target.append(label)
        for k, cell in enumerate(row):
            if not _is_number(cell) or not math.isfinite(float(cell)):
                name = (header[:column] + header[column + 1 :])[k]
                what = f"{cell!r} is not a finite number" if cell else "is empty"
                raise UserDataError(f"{path} line {lines[i]}: {name}: {what}")
        features[i] = row
    return features, _labels(target), lines


def _labels(cells: list[str]) -> Array:
    """Text as whole numbers where all are, else as numbers, else as it is."""
    for kind in (int, float):
        try:
            return np.array([kind(cell) for cell in cells])
        except (ValueError, OverflowError):
            continue
    return np.array(cells)


# Checks


def _dataset(path: Path, features: Array, target: Array, where: Where) -> Dataset:
    if features.dtype.kind not in "fiub":
        raise UserDataError(f"the features must be numbers, but {path.name} has {features.dtype}")
    if 0 in (len(features), len(target)):
        raise UserDataError(f"{path.name} has no rows")
    if features.ndim < 2 or 0 in features.shape:
        raise UserDataError(f"the features must have shape (N, D), but have {features.shape}")
    if target.ndim == 2 and (target.shape[1] == 1 or target.dtype.kind not in "fc") and target.shape[1] > 0:
        if target.shape[1] > 1:
            raise UserDataError(f"labels must have shape (N,), but have {target.shape}")
        target = target[:, 0]
    if target.ndim not in (1, 2) or 0 in target.shape[1:]:
        raise UserDataError(f"the targets must have shape (N,) or (N, K), but have {target.shape}")
    if len(features) != len(target):
        raise UserDataError(f"there are {len(features)} rows of features, but {len(target)} targets")
    features = features.reshape(len(features), -1).astype(np.float64)
    _finite("features", features, where)
    if target.dtype.kind == "f":
        return _regression(path, features, target.reshape(len(target), -1).astype(np.float64), where)
    if target.dtype.kind not in "iubUS":
        raise UserDataError(
            f"labels must be whole numbers or text, and targets floating point, not {target.dtype}"
        )
    return _classification(path, features, target)


def _finite(what: str, values: Array, where: Where) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = (int(each) for each in bad[0])
        value = "NaN" if math.isnan(values[row, column]) else "an infinite value"
        raise UserDataError(f"the {what} have {value} in {where(row)}, column {column} (counted from 0)")


def _standardised(*parts: Array) -> Iterable[torch.Tensor]:
    """Each part less the mean of the first over its deviation, in float32; constant columns become zero."""
    mean, std = parts[0].mean(0), parts[0].std(0)
    std[std <= 1e-12 * abs(mean)] = 1.0
    return (torch.from_numpy((part - mean) / std).float() for part in parts)


def _classification(path: Path, features: Array, target: Array) -> Dataset:
    names, index, counts = np.unique(target, return_inverse=True, return_counts=True)
    if len(names) < 2:
        raise UserDataError(
            f"there must be two classes or more, but all {len(target)} labels are {names[:1].tolist()}"
        )
    if counts.min() < 2:
        lonely = str(names[counts.argmin()])
        hint = (
            " (for a regression write the targets as floating-point numbers)"
            if target.dtype.kind in "iu"
            else ""
        )
        raise UserDataError(
            f"each class needs two samples, one to train and one to test on, but class {lonely!r} has one{hint}"
        )
    if math.ceil(TEST_SHARE * len(target)) < len(names):
        raise UserDataError(f"{len(target)} rows are too few to split for {len(names)} classes")
    train_x, test_x, train_y, test_y = train_test_split(
        features, index.astype(np.int64), test_size=TEST_SHARE, stratify=index, random_state=0
    )
    train_x, test_x = _standardised(train_x, test_x)
    return Dataset(
        str(path),
        f"{path.name} ({features.shape[1]:,} features, {len(names)} classes)",
        classes=len(names),
        outputs=len(names),
        train_x=train_x,
        train_y=torch.from_numpy(train_y),
        test_x=test_x,
        test_y=torch.from_numpy(test_y),
        preparation="features standardised by the training part",
        kin="digits",
    )


def _regression(path: Path, features: Array, target: Array, where: Where) -> Dataset:
    _finite("targets", target, where)
    if len(target) < 4:
        raise UserDataError(f"{len(target)} rows are too few to split")
    if np.ptp(target, 0).max() == 0:
        raise UserDataError("all targets are equal: there is nothing to learn")
    train_x, test_x, train_y, test_y = train_test_split(
        features, target, test_size=TEST_SHARE, random_state=0
    )
    train_x, test_x = _standardised(train_x, test_x)
    train_y, test_y = _standardised(train_y, test_y)
    outputs = target.shape[1]
    return Dataset(
        str(path),
        f"{path.name} (regression, {features.shape[1]:,} features, {outputs} target{'s' if outputs > 1 else ''})",
        classes=0,
        outputs=outputs,
        train_x=train_x,
        train_y=train_y,
        test_x=test_x,
        test_y=test_y,
        preparation="features and targets standardised by the training part, so that predicting the mean costs about "
        "1 a target",
        kin="diabetes",
    )
