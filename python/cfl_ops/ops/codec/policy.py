"""policy: what a state dict's tensors are to be compressed by: bit for bit, with options of their own, or a budget."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cfl_ops._core import checks
from cfl_ops.ops.codec.arguments import check_data
from cfl_ops.ops.codec.blob import numbers_of, unusual
from cfl_ops.ops.codec.measure import rms_of
from cfl_ops.ops.codec.plan import Options
from cfl_ops.ops.codec.quantize import allocate_bits

OP = "compress_state_dict"
NORMS_AND_BIASES = ("weight", "*bias*", "*scale*", "gamma", "beta", "running_mean", "running_var")
"""The last part of the name of a norm, a bias or a statistic, if the tensor has one dimension or none."""
OPTIONS = Options._fields[:-2]
"""What compress takes."""
SETS_BITS = ("floor", "probe_bits", "bits", "fraction", "max_error")
"""Of these, those that a budget decides."""
_ENTROPY = ("floor", "probe_bits", "bits", "fraction")
"""Of these, those that say how many bits, or how they follow from the entropy."""
ERROR = ("error", "error_kind", "error_unit")
_UNITS = ("deviation", "absolute")


class Budget(NamedTuple):
    """The largest error that a tensor may come back with."""

    error: float
    kind: str = "rms"
    unit: str = "deviation"


class Settings(NamedTuple):
    """The options of compress_state_dict that are not those of compress."""

    lossless: bool = False
    exact: Any = ()
    norms_and_biases: str = "exact"
    overrides: Mapping[str, Any] | None = None
    allocation: str = "entropy"
    gradients: Mapping[str, Any] | None = None
    c0: float = 1.0
    c1: float = 8.0
    error: float | None = None
    error_kind: str = "rms"
    error_unit: str = "deviation"
    max_bytes: int | None = None
    importance: Mapping[str, float] | None = None
    report: Callable[[Any], object] | None = None


class Decision(NamedTuple):
    """How one tensor is compressed."""

    name: str
    value: Tensor
    options: Options | None
    """None: bit for bit."""
    budget: Budget | None = None
    shares: bool = False
    """Whether it gets a share of max_bytes instead of bits of its own."""
    importance: float = 1.0

    @property
    def where(self) -> str:
        return f"state_dict[{self.name!r}]"


@contextmanager
def _within(where: str) -> Iterator[None]:
    """An error in here says what it is about."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} (in {where})") from None


def told(decision: Decision) -> AbstractContextManager[None]:
    """An error in here says which tensor it is about."""
    return _within(decision.where)


class Policy(NamedTuple):
    decisions: list[Decision]
    max_bytes: int | None
    error_unit: str
    report: Callable[[Any], object] | None


def decide(
    state_dict: Mapping[str, Tensor], min_numel: Any, asked: Mapping[str, Any], stacklevel: int
) -> Policy:
    """What is done with each tensor; warns of patterns that no name matches, so many calls up."""
    if unknown := asked.keys() - {*OPTIONS, *Settings._fields}:
        raise TypeError(f"cfl_ops.{OP}: unknown options {', '.join(sorted(unknown))}")
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"cfl_ops.{OP}: state_dict must be a mapping of names to tensors, but got {type(state_dict).__name__}"
        )
    common = numbers_of(OP, Options(**{key: value for key, value in asked.items() if key in OPTIONS}))
    given = {key: getattr(common, key) for key in unusual(common)}
    settings = Settings(**{key: value for key, value in asked.items() if key in Settings._fields})
    settings = _checked(settings, given)
    min_numel = checks.integer(OP, "min_numel", min_numel, 0)
    patterns, dtypes = _exact(settings.exact)
    overrides = {
        _name(pattern, "overrides"): _override(f"overrides[{pattern!r}]", value)
        for pattern, value in (settings.overrides or {}).items()
    }
    for pattern, value in overrides.items():
        with _within(f"overrides[{pattern!r}]"):
            numbers_of(OP, _merged(settings, given, value if isinstance(value, dict) else {})[0])
    _check_error_words(settings, overrides)
    importance = {
        _name(pattern, "importance"): checks.number(OP, f"importance[{pattern!r}]", value, checks.POSITIVE)
        for pattern, value in (settings.importance or {}).items()
    }
    unused = {("exact", p) for p in patterns}
    unused |= {("overrides", p) for p in overrides} | {("importance", p) for p in importance}

    def matching(argument: str, name: str, among: Sequence[str]) -> str | None:
        """The first pattern that the name matches; all of them are used."""
        found = [pattern for pattern in among if fnmatchcase(str(name), pattern)]
        unused.difference_update((argument, pattern) for pattern in found)
        return found[0] if found else None

    def one(name: str, value: Tensor) -> Decision:
        override = matching("overrides", name, [*overrides])
        kept = matching("exact", name, patterns) is not None
        weight = (
            importance[found] if (found := matching("importance", name, [*importance])) is not None else 1.0
        )
        own = None if override is None else overrides[override]
        check_data(OP, f"state_dict[{name!r}]", value)
        if settings.lossless or value.dtype not in checks.FLOATS or own == "exact":
            return Decision(name, value, None)
        if own is None and (
            kept
            or value.dtype in dtypes
            or value.numel() < min_numel
            or (settings.norms_and_biases == "exact" and _is_norm_or_bias(name, value))
        ):
            return Decision(name, value, None)
        options, budget, shares = _merged(settings, given, own if isinstance(own, dict) else {})
        if settings.allocation == "gradient" and budget is None and not _sets_bits(own):
            options = options._replace(allocated=_gradient_bits(settings, name))
        return Decision(name, value, options, budget, shares, weight)

    decisions = [one(name, value) for name, value in state_dict.items()]
    for argument, pattern in sorted(unused) if decisions else []:
        warnings.warn(
            f"cfl_ops.{OP}: {argument} has the pattern {pattern!r}, which no name of the state dict matches",
            UserWarning,
            stacklevel=stacklevel,
        )
    return Policy(decisions, settings.max_bytes, settings.error_unit, settings.report)


def gradient_bits(rms: float, c0: float, c1: float) -> int:
    """N = log2(G + c0) + c1 rounded half up, from 1 to 16 (thesis, section 3.3)."""
    return allocate_bits(math.log2(rms + c0) if rms + c0 > 0 else -1e9, floor=c1)


def _checked(settings: Settings, given: Mapping[str, Any]) -> Settings:
    """The settings with their numbers as numbers; raises for what contradicts itself."""
    settings = settings._replace(lossless=checks.flag(OP, "lossless", settings.lossless))
    checks.choice(OP, "norms_and_biases", settings.norms_and_biases, ("exact", "quantise"))
    checks.choice(OP, "allocation", settings.allocation, ("entropy", "gradient"))
    for name in ("overrides", "importance", "gradients"):
        value = getattr(settings, name)
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"cfl_ops.{OP}: {name} must be a mapping, but got {type(value).__name__}")
    if settings.report is not None and not callable(settings.report):
        raise TypeError(
            f"cfl_ops.{OP}: report must be a function, such as the append of a list, "
            f"but got {type(settings.report).__name__}"
        )
    settings = settings._replace(
        c0=checks.number(OP, "c0", settings.c0, checks.NOT_NEGATIVE),
        c1=checks.number(OP, "c1", settings.c1),
        max_bytes=None
        if settings.max_bytes is None
        else checks.integer(OP, "max_bytes", settings.max_bytes, 0),
    )
    settings = settings._replace(**_checked_error("", {key: getattr(settings, key) for key in ERROR}))
    default = Settings()
    changed = [key for key in Settings._fields if getattr(settings, key) != getattr(default, key)]
    own = [*given, *changed]
    if settings.lossless:
        _apart(own, "lossless=True keeps every bit", *OPTIONS, "overrides", "allocation", "gradients", "c0", "c1",
               *ERROR, "max_bytes", "importance")  # fmt: skip
    if settings.max_bytes is not None:
        _apart(
            own,
            "max_bytes decides how many bits each tensor gets",
            *SETS_BITS,
            "error",
            "error_kind",
            "allocation",
        )
    elif "importance" in changed:
        raise ValueError(f"cfl_ops.{OP}: importance is a matter of max_bytes, which is not given")
    if settings.error is not None:
        _apart(own, "error decides how many bits each tensor gets", *SETS_BITS, "allocation")
    if settings.allocation == "gradient":
        _apart(
            own,
            "the gradients decide how many bits each tensor gets",
            "floor",
            "probe_bits",
            "bits",
            "fraction",
        )
        if settings.gradients is None:
            raise ValueError(f"cfl_ops.{OP}: gradients must be given with allocation='gradient'")
    elif gradient := [key for key in ("gradients", "c0", "c1") if key in changed]:
        raise ValueError(
            f"cfl_ops.{OP}: {gradient[0]} is a matter of allocation='gradient', which is not given"
        )
    return settings


def _check_error_words(settings: Settings, overrides: Mapping[str, Any]) -> None:
    """The kind and the unit of an error belong to one (or the unit to max_bytes)."""
    bounded = [own for own in overrides.values() if isinstance(own, dict) and own.get("error") is not None]
    for key in ("error_kind", "error_unit"):
        serves = settings.error is not None or (key == "error_unit" and settings.max_bytes is not None)
        if getattr(settings, key) != getattr(Settings(), key) and not serves and not bounded:
            other = " or of max_bytes" if key == "error_unit" else ""
            raise ValueError(f"cfl_ops.{OP}: {key} is a matter of error{other}, which is not given")
        for pattern, own in overrides.items():
            if key in own and isinstance(own, dict) and own not in bounded and settings.error is None:
                raise ValueError(
                    f"cfl_ops.{OP}: {key} of overrides[{pattern!r}] is a matter of error, which is not given"
                )


def _is(value: Any, usual: Any) -> bool:
    """Whether it is that number or word, or None."""
    return value is usual or (isinstance(value, str | int | float) and bool(value == usual))


def _apart(given: Sequence[str], why: str, *others: str) -> None:
    if wrong := [name for name in given if name in others]:
        raise ValueError(f"cfl_ops.{OP}: {why}: leave out {', '.join(wrong)}")


def _checked_error(where: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The error budget among some options, and its words."""
    out = dict(given)
    if out.get("error") is not None:
        out["error"] = checks.number(OP, f"{where}error", out["error"], checks.POSITIVE)
    for key, allowed in (("error_kind", ("rms", "max")), ("error_unit", _UNITS)):
        if key in out:
            checks.choice(OP, f"{where}{key}", out[key], allowed)
    return out


def _override(where: str, value: Any) -> dict[str, Any] | str:
    if isinstance(value, str):
        checks.one_of(OP, where, value, ("exact",))
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f'cfl_ops.{OP}: {where} must be "exact" or a mapping, but got {type(value).__name__}')
    if unknown := value.keys() - {*OPTIONS, *ERROR}:
        raise TypeError(f"cfl_ops.{OP}: {where} has unknown options {', '.join(sorted(map(str, unknown)))}")
    if value.get("error") is not None:
        usual = Options()._asdict()
        others = [key for key in value if key not in usual or not _is(value[key], usual[key])]
        _apart(others, f"error of {where} decides how many bits a tensor gets", *SETS_BITS)
        value = {key: option for key, option in value.items() if key not in SETS_BITS}
    return _checked_error(f"{where} ", value)


def _merged(
    settings: Settings, given: Mapping[str, Any], own: Mapping[str, Any]
) -> tuple[Options, Budget | None, bool]:
    """The options of a tensor, its budget, and whether it shares max_bytes; its own go before those of all."""
    error = own.get("error", settings.error)
    if _sets_bits(own):
        error = None
    common = {} if own.get("error") is not None else {k: v for k, v in given.items() if k in SETS_BITS}
    if own.get("error") is None and any(key in own for key in _ENTROPY):
        # Bits that are given leave nothing to the entropy, and what the entropy is to say sets no bits.
        common = {k: v for k, v in common.items() if k != "bits" and (k == "max_error" or "bits" not in own)}
    rest = {k: v for k, v in given.items() if k not in SETS_BITS}
    options = Options(**{**common, **rest, **{k: v for k, v in own.items() if k in OPTIONS}})
    budget = None
    if error is not None:
        kind, unit = (own.get(key, getattr(settings, key)) for key in ("error_kind", "error_unit"))
        budget = Budget(error, kind, unit)
    shares = settings.max_bytes is not None and budget is None and not _sets_bits(own)
    return options, budget, shares


def _sets_bits(own: Any) -> bool:
    return isinstance(own, Mapping) and any(key in own for key in SETS_BITS)


def _name(pattern: Any, argument: str) -> str:
    if not isinstance(pattern, str):
        raise TypeError(
            f"cfl_ops.{OP}: {argument} must have patterns as keys, but got {type(pattern).__name__}"
        )
    return pattern


def _exact(value: Any) -> tuple[list[str], set[torch.dtype]]:
    """The patterns and the dtypes of what stays as it is."""
    one = isinstance(value, str | torch.dtype) or not isinstance(value, Iterable)
    several = [value] if one else [*value]
    for item in several:
        if not isinstance(item, str | torch.dtype):
            raise TypeError(
                f"cfl_ops.{OP}: exact must be patterns of names or dtypes, but got {type(item).__name__}"
            )
    patterns = list(dict.fromkeys(item for item in several if isinstance(item, str)))
    return patterns, {item for item in several if isinstance(item, torch.dtype)}


def _is_norm_or_bias(name: str, value: Tensor) -> bool:
    last = str(name).rsplit(".", 1)[-1]
    return value.ndim <= 1 and any(fnmatchcase(last, pattern) for pattern in NORMS_AND_BIASES)


def _gradient_bits(settings: Settings, name: str) -> int:
    assert settings.gradients is not None
    if name not in settings.gradients:
        raise ValueError(
            f"cfl_ops.{OP}: gradients must have one for each tensor that is quantised, but there is none for "
            f"state_dict[{name!r}]; exact= keeps it as it is"
        )
    value, where = settings.gradients[name], f"gradients[{name!r}]"
    if isinstance(value, Tensor) and value.ndim:
        checks.floating(OP, where, value, 0)
        value = rms_of(value)
    return gradient_bits(checks.number(OP, where, value, checks.NOT_NEGATIVE), settings.c0, settings.c1)
