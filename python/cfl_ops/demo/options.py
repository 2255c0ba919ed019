"""What the demo's options may hold, and their values read from text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import torch
import typer

from .heads import ALL, HEADS

__all__ = ["Device", "Optimizer", "bad", "batch_sizes", "head_names", "per_head", "place_of"]


class Optimizer(StrEnum):
    """The choices of --optimizer."""

    sgd = "sgd"
    adam = "adam"


class Device(StrEnum):
    """The choices of --device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def bad(option: str, message: str) -> typer.BadParameter:
    """The error of an option."""
    return typer.BadParameter(message, param_hint=option)


def head_names(text: str) -> list[str]:
    """Names of heads, in the order of HEADS; ``all`` is every one."""
    names = [part.strip() for part in text.split(",")]
    if ALL in names:
        return list(HEADS)
    for name in names:
        if name not in HEADS:
            raise bad("--head", f"{name!r} is none of {', '.join(HEADS)}, nor {ALL}")
    return [name for name in HEADS if name in names]


def batch_sizes(text: str) -> list[int]:
    """Positive whole numbers, each once, from small to large."""
    try:
        sizes = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise bad("--batch-sizes", f"{text!r} is not a list of whole numbers such as 8,32,128") from None
    if sizes[0] < 1:
        raise bad("--batch-sizes", f"a batch has at least one row, but got {sizes[0]}")
    return sizes


def per_head(
    option: str, text: str | None, heads: Sequence[str], zero_allowed: bool = False
) -> dict[str, float]:
    """``0.1`` for all of these heads, or ``ridge=0.1,proximal=10`` for those named."""
    values: dict[str, float] = {}
    for part in text.split(",") if text is not None else ():
        name, _, digits = (piece.strip() for piece in part.rpartition("="))
        if name and name not in heads:
            raise bad(option, f"{name!r} is none of {', '.join(heads)}")
        try:
            value = float(digits)
        except ValueError:
            raise bad(option, f"{digits!r} is not a number") from None
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
            raise bad(
                option,
                f"must be finite and {'not negative' if zero_allowed else 'positive'}, but got {digits}",
            )
        values.update(dict.fromkeys([name] if name else heads, value))
    return values


def place_of(choice: Device, processes: int | None = None) -> torch.device:
    """The device to train on; several processes train on the CPU."""
    if processes is not None:
        if choice is Device.cuda:
            raise bad("--device", "--distributed trains on the CPU, and cuda was asked for")
        return torch.device("cpu")
    if choice is Device.cuda and not torch.cuda.is_available():
        raise bad("--device", "cuda was asked for, but torch sees no CUDA device")
    use_cuda = choice is Device.cuda or (choice is Device.auto and torch.cuda.is_available())
    return torch.device("cuda" if use_cuda else "cpu")
