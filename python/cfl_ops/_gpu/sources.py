"""The CUDA C++ sources that come with the package: their text, and the constants that they define."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import torch

HEADERS = {
    "codec": ("device", "codec_kernel"),
    "exact": ("device", "gram_kernel"),
    "solve": ("device", "linalg", "solve_kernel"),
    "cholesky": ("device", "linalg", "cholesky_kernel"),
}
"""The headers of a family, by the first word of its kernels' names."""


RANKS = {torch.float32: (1, 4, 16, 32), torch.float64: (1, 4, 16)}
"""Of cholesky_update: a warp holds a row's part of so many vectors in each lane."""


@functools.cache
def _text(family: str) -> str:
    here = Path(__file__).parent
    roots = [parent / "csrc" for parent in here.parents]  # installed, or editable
    root = next((root for root in roots if (root / "cuda" / "device.cuh").is_file()), None)
    if root is None:
        raise RuntimeError("cfl_ops: the CUDA sources are not installed beside the package")
    return "".join((root / "cuda" / f"{name}.cuh").read_text() for name in HEADERS[family])


def source(family: str) -> str:
    """The kernels of a family as one text: NVRTC needs no folder of headers for it."""
    return re.sub(r'^#(pragma once|include "cuda/.*)$', "", _text(family), flags=re.MULTILINE)


@functools.cache
def constant(family: str, name: str) -> int:
    """An integer that the headers of a family define, ``constexpr int kSide = 32;``: there and nowhere else."""
    found = re.search(
        rf"^ *(?:static )?constexpr [\w ]+ {name} = ([^;]+);", _text(family), flags=re.MULTILINE
    )
    if found is None:
        raise KeyError(f"cfl_ops: csrc/cuda has no constant {name} in the headers of {family}")
    return _value(family, found[1])


def _value(family: str, expression: str) -> int:
    """Of numbers and other constants, multiplied, divided, shifted and subtracted from left to right."""
    value, operator = 0, "="
    for word in re.findall(r"\w+|<<|[*/-]", expression):
        if word in ("<<", "*", "/", "-"):
            operator = word
            continue
        number = constant(family, word) if word.startswith("k") else int(word, 0)
        value = {
            "=": lambda a, b: b, "*": lambda a, b: a * b, "/": lambda a, b: a // b,
            "<<": lambda a, b: a << b, "-": lambda a, b: a - b,
        }[operator](value, number)  # fmt: skip
    return value


class Constants:
    """The constants of a family's headers as attributes: ``Constants("solve").kSide``."""

    def __init__(self, family: str) -> None:
        self._family = family

    def __getattr__(self, name: str) -> int:
        if not name.startswith("k"):
            raise AttributeError(name)
        value = constant(self._family, name)
        setattr(self, name, value)  # found at once from now on
        return value
