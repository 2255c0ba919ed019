"""state_dict: a state dict as blobs, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cfl_ops.errors import CorruptDataError
from cfl_ops.ops.codec.blob import compress_named, decompress, store_lossless
from cfl_ops.ops.codec.budget import compress_within, share_bytes
from cfl_ops.ops.codec.policy import OP, Decision, Settings, decide, told
from cfl_ops.ops.codec.report import TensorReport, report_of

__all__ = ["compress_state_dict", "decompress_state_dict"]

MIN_NUMEL = 256
_DEFAULT = Settings()


def compress_state_dict(
    state_dict: Mapping[str, Tensor],
    *,
    lossless: bool = False,
    min_numel: int = MIN_NUMEL,
    exact: str | torch.dtype | Sequence[str | torch.dtype] = (),
    norms_and_biases: str = "exact",
    overrides: Mapping[str, Mapping[str, Any] | str] | None = None,
    allocation: str = "entropy",
    gradients: Mapping[str, Tensor | float] | None = None,
    c0: float = _DEFAULT.c0,
    c1: float = _DEFAULT.c1,
    max_bytes: int | None = None,
    importance: Mapping[str, float] | None = None,
    error: float | None = None,
    error_kind: str = "rms",
    error_unit: str = "deviation",
    report: Callable[[TensorReport], object] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    r"""Compress a state dict: each large floating-point tensor to a few bits a weight, all else bit for bit.

    Kept bit for bit are integers, bools, complex numbers and float8; floats of fewer than ``min_numel`` elements;
    norms, biases and running statistics, which are few and count for much (of at most one dimension, by the last
    part of their names: ``weight``, ``*bias*``, ``*scale*``, ``gamma``, ``beta``, ``running_mean``,
    ``running_var``); and what ``exact`` names. The others get :func:`compress`'s bits, or

    - ``allocation="gradient"``: N = log2(G + c0) + c1 rounded half up, G the rms of the tensor's gradient (thesis,
      section 3.3; the thesis prints no base of the logarithm, and c1 = 8 bits is where it finds that quantising costs
      no accuracy). N grows where ``max_error`` asks for more. docs/lossy.md measures what it is worth;
    - ``error``: the fewest bits that keep it;
    - ``max_bytes``: what leaves the least squared error in so many bytes.

    Budgets are kept: by the blobs' own sizes, and by the errors of what they give back.

    Args:
        state_dict: names to tensors.
        lossless: every tensor bit for bit; with none of the options that quantise.
        min_numel: smaller tensors are kept as they are: their headers would outweigh the gain.
        exact: patterns of names (as of the shell: ``"lm_head.*"``) or dtypes, one or several.
        norms_and_biases: ``"exact"``, or ``"quantise"`` those of at least ``min_numel`` elements as well.
        overrides: by patterns of names, of which the first that matches counts, what goes before all of these:
            ``"exact"``, or options of :func:`compress` (and ``error``, ``error_kind``, ``error_unit``) for tensors of
            any size.
        allocation: ``"entropy"`` (thesis, Algorithm 1) or ``"gradient"``.
        gradients: names to gradients, or to their rms.
        c0: with ``allocation="gradient"``.
        c1: and the bits that a tensor without gradient gets.
        max_bytes: of all blobs together (a ``.cflz`` file adds some 100 bytes, and 20 and the name for each tensor;
            ``.safetensors`` about 300 for each).
        importance: by patterns of names, what a tensor's squared error is multiplied by, with ``max_bytes``; 1
            where none matches. Squared errors count as parts of the tensor's variance, or as they are with
            ``error_unit="absolute"``.
        error: the most that a tensor's finite weights may be off.
        error_kind: ``"rms"``, the root of the mean square of the errors; ``"max"``, the largest of them.
        error_unit: of the ``error``: the tensor's standard ``"deviation"``, or ``"absolute"``.
        report: is called with a :class:`TensorReport` for each tensor as it is made (``rows.append``).
        options: those of :func:`compress`.

    Returns:
        names to blobs, for :func:`decompress_state_dict`. (:func:`save_file` takes the state dict and these options.)

    Raises:
        TypeError, ValueError: bad or contradicting arguments, or NaN or Inf weights; or ``max_bytes`` below the least
            that is possible, which the message says.

    Warns:
        UserWarning: as :func:`compress`, with the name of the tensor; and of patterns that match no name.

    Not under ``fullgraph=True`` nor ``torch.export``: it compresses.

    Example:
        >>> import torch, cfl_ops
        >>> model = torch.nn.Linear(100, 100)
        >>> blobs = cfl_ops.compress_state_dict(model.state_dict(), bits=8)
        >>> _ = model.load_state_dict(cfl_ops.decompress_state_dict(blobs))
        >>> small = cfl_ops.compress_state_dict(model.state_dict(), max_bytes=6000)
        >>> sum(map(len, small.values())) <= 6000
        True

    """
    named = {key: value for key, value in locals().items() if key in _DEFAULT._fields} | options
    return dict(_blobs(state_dict, min_numel, named, 4, True))


def named_blobs(
    state_dict: Mapping[str, Tensor],
    min_numel: int,
    options: dict[str, Any],
    stacklevel: int,
    op: str = OP,
) -> Iterator[tuple[str, Tensor]]:
    """What compress_state_dict returns, one by one; warnings point so many calls up.

    ``options`` are all its others, with those of compress; ``op`` is what its warnings name. Nothing is held but one
    blob.
    """
    return _blobs(state_dict, min_numel, options, stacklevel, False, op)


def _blobs(
    state_dict: Mapping[str, Tensor],
    min_numel: int,
    options: dict[str, Any],
    stacklevel: int,
    keep: bool,
    op: str = OP,
) -> Iterator[tuple[str, Tensor]]:
    policy = decide(state_dict, min_numel, options, stacklevel)
    makers: dict[int, Callable[[], Tensor]] = {}
    if policy.max_bytes is not None:
        absolute = policy.error_unit == "absolute"
        makers = share_bytes(policy.decisions, _blob, policy.max_bytes, absolute, keep)
    for i, decision in enumerate(policy.decisions):
        with told(decision):
            blob = makers.pop(i)() if i in makers else _blob(decision, stacklevel + 1, op)
        if policy.report is not None:
            policy.report(report_of(decision.name, decision.value, blob))
        yield decision.name, blob
        del blob  # before the next one is made


def _blob(decision: Decision, stacklevel: int = 1, op: str = OP) -> Tensor:
    """Of a tensor that takes no share of max_bytes."""
    if decision.options is None:
        return store_lossless(op, decision.where, decision.value)
    if decision.budget is not None:
        return compress_within(decision)
    return compress_named(op, decision.where, decision.value, decision.options, stacklevel)


def decompress_state_dict(blobs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict that :func:`compress_state_dict` took; raises CorruptDataError as :func:`decompress`.

    Not under ``fullgraph=True`` nor ``torch.export``: it decompresses.

    Example:
        >>> import torch, cfl_ops
        >>> blobs = cfl_ops.compress_state_dict({"w": torch.zeros(3)})
        >>> cfl_ops.decompress_state_dict(blobs)
        {'w': tensor([0., 0., 0.])}
    """
    if not isinstance(blobs, Mapping):
        raise TypeError(
            f"cfl_ops.decompress_state_dict: blobs must be a mapping of names to blobs, but got {type(blobs).__name__}"
        )
    out = {}
    for name, blob in blobs.items():
        try:
            out[name] = decompress(blob)
        except CorruptDataError as error:
            raise CorruptDataError(f"{error} (in {name!r})") from None
    return out
