"""Schedules of lambda: objects beside the head, as a scheduler of the learning rate stands beside the optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cfl_ops._core import checks
from cfl_ops._core.state import makes_state

__all__ = ["BatchSizeLam", "ConstantLam", "CosineLam", "LamSchedule", "RelativeLam"]


class LamSchedule:
    """A lambda that changes: what all schedules share.

    A head takes one as its lam, and asks it for the value in each update; :meth:`step` counts the steps (or the
    epochs), as that of a scheduler of the learning rate does::

        schedule = CosineLam(10.0, T_max=1000)
        head = ClosedFormLinear(512, 10, lam=schedule)
        for x, y in loader:
            loss = head.step(backbone(x), y)
            optimizer.step()
            schedule.step()

    No change of the value makes a compiled step compile again. The state is the schedule's own, not in the head's
    state_dict: save it beside that of the optimiser. The options are not in it, a schedule goes on with its own.

    A schedule of one's own says in ``_at`` what lambda is at a step.
    """

    @makes_state
    def __init__(self) -> None:
        self.last_step = 0
        """How often :meth:`step` was called."""
        # Written to in place: a graph reads it each time that it runs.
        self._now = _state(self._at(0))

    def _at(self, step: int) -> float:
        """Lambda at a step, of what the schedule has been told."""
        raise NotImplementedError

    def step(self) -> None:
        """Go on to the next step."""
        self._go_to(self.last_step + 1)

    @makes_state
    def _go_to(self, step: int) -> None:
        self.last_step = step
        self._now.fill_(self._at(step))

    def get_last_lam(self) -> float:
        """Lambda as it is; that of the last update, where it depends on the batch. Synchronises a GPU then."""
        return float(self._now[0])

    def value(self, rows: Any, mean_square: Callable[[], Tensor]) -> Tensor:
        """Lambda for a batch: 0-d float64, on the CPU or with the features. Not to be written to.

        Heads call it, with what they know of the batch, which may be spread over processes.

        Args:
            rows: their number: an integer, or a tensor without dimensions.
            mean_square: computes ``trace(Phi^T Phi) / (B D)`` in a tensor without dimensions, if it is asked to.

        """
        return self._now[0]

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, for :meth:`load_state_dict`. Plain numbers: any ``torch.load`` reads it."""
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from where another was, bit for bit. One that does not fit leaves all as it was."""
        self._set(self._checked(state_dict))

    def _checked(self, state: Any) -> dict[str, Any]:
        """A state that fits."""
        name, own = f"learn.{type(self).__name__}.load_state_dict", self.state_dict()
        if not isinstance(state, Mapping) or state.keys() != own.keys():
            got = f"{list(state)}" if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"cfl_ops.{name}: state_dict must have {list(own)}, but got {got}")
        step = checks.integer(name, "last_step", state["last_step"], 0)
        floats = {key: checks.number(name, key, state[key]) for key in own if isinstance(own[key], float)}
        return {"last_step": step, **floats}

    def _set(self, state: dict[str, Any]) -> None:
        self._go_to(state["last_step"])

    def __repr__(self) -> str:
        """The options and lambda."""
        return f"{type(self).__name__}(lam={self.get_last_lam():.6g})"


class ConstantLam(LamSchedule):
    """Always the same lambda.

    Args:
        lam: it, finite and not negative.

    Example:
        >>> from cfl_ops.learn import ConstantLam
        >>> ConstantLam(10.0).get_last_lam()
        10.0

    """

    def __init__(self, lam: float) -> None:
        self.lam = _lam(type(self), "lam", lam)
        super().__init__()

    def _at(self, step: int) -> float:
        return self.lam


class CosineLam(LamSchedule):
    r"""From one lambda to another along half a cosine, as ``CosineAnnealingLR`` takes a learning rate.

    .. math:: \lambda_t = \lambda_\min + (\lambda - \lambda_\min) (1 + \cos(\pi t / T_\max)) / 2

    After ``T_max`` steps it stays at ``lam_min`` (``CosineAnnealingLR`` would go up again). lambda stands where the
    reciprocal of a learning rate does (``1 / (2 lr)``): one that rises slows the head down, with ``lam_min > lam``.

    Args:
        lam: where it starts.
        T_max: how many steps it takes.
        lam_min: where it ends, more than ``lam`` if it shall rise.
        log: take the cosine of the logarithm, so that it spends as many steps in each decade; both ends must be > 0.

    Example:
        >>> from cfl_ops.learn import CosineLam
        >>> schedule = CosineLam(10.0, T_max=2)
        >>> values = [schedule.get_last_lam()]
        >>> for _ in range(3):
        ...     schedule.step()
        ...     values.append(round(schedule.get_last_lam(), 6))
        >>> values
        [10.0, 5.0, 0.0, 0.0]

    """

    def __init__(self, lam: float, T_max: int, lam_min: float = 0.0, *, log: bool = False) -> None:
        self.log = checks.flag("learn.CosineLam", "log", log)
        self.lam = _lam(type(self), "lam", lam, positive=self.log)
        self.lam_min = _lam(type(self), "lam_min", lam_min, positive=self.log)
        self.T_max = checks.integer("learn.CosineLam", "T_max", T_max, 1)
        super().__init__()

    def _at(self, step: int) -> float:
        if step == 0 or step >= self.T_max:  # exactly
            return self.lam_min if step else self.lam
        share = (1 + math.cos(math.pi * step / self.T_max)) / 2
        if self.log:
            return math.exp(share * math.log(self.lam) + (1 - share) * math.log(self.lam_min))
        return share * self.lam + (1 - share) * self.lam_min


class _OfBatch(LamSchedule):
    """A lambda that depends on the batch: another schedule's, times a factor."""

    def __init__(self, lam: float | LamSchedule) -> None:
        self.lam = lam if isinstance(lam, LamSchedule) else ConstantLam(_lam(type(self), "lam", lam))
        super().__init__()

    def _at(self, step: int) -> float:
        """Of no batch yet."""
        return self.lam.get_last_lam()

    def _go_to(self, step: int) -> None:
        self.last_step = step  # the value stays that of the last batch

    def step(self) -> None:
        """Go on to the next step, and so does the schedule within."""
        self.lam.step()
        super().step()

    @makes_state
    def _keep(self, value: Tensor) -> Tensor:
        if self._now.device == value.device:
            self._now.copy_(value)
        else:
            self._now = value.reshape(1).clone()
        return value

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, and the one within."""
        return {**super().state_dict(), "last_lam": float(self._now[0]), "lam": self.lam.state_dict()}

    def _checked(self, state: Any) -> dict[str, Any]:
        return {**super()._checked(state), "lam": self.lam._checked(state["lam"])}

    @makes_state
    def _set(self, state: dict[str, Any]) -> None:
        super()._set(state)
        self.lam._set(state["lam"])
        self._now = _state(state["last_lam"])


class BatchSizeLam(_OfBatch):
    r"""Lambda by the number of rows: the smaller the batch, the nearer to the last head.

    .. math:: \lambda (B_\mathrm{ref} / B)^p

    A loss that is a mean over the batch needs a larger lambda for a small one: with ``power=1`` what a row adds to the
    head is weighed against it alike in batches of all sizes, the last one of an epoch, say (docs/formulas.md, 10: the
    best lambda falls with the batch size).

    Args:
        lam: at ``reference`` rows: a number or another schedule.
        reference: the batch size that lam is for.
        power: p; 0 does nothing.

    Example:
        >>> import torch
        >>> from cfl_ops.learn import BatchSizeLam, ClosedFormLinear
        >>> schedule = BatchSizeLam(1.0, reference=128)
        >>> _ = ClosedFormLinear(4, 3, lam=schedule).update(torch.ones(32, 4), torch.zeros(32, 3))
        >>> schedule.get_last_lam()
        4.0

    """

    def __init__(self, lam: float | LamSchedule, reference: int, power: float = 1.0) -> None:
        self.reference = checks.integer("learn.BatchSizeLam", "reference", reference, 1)
        self.power = float(checks.number("learn.BatchSizeLam", "power", power))
        super().__init__(lam)

    @torch.no_grad()
    def value(self, rows: Any, mean_square: Callable[[], Tensor]) -> Tensor:
        """As that of :class:`LamSchedule`. Without rows, that of one."""
        inner = self.lam.value(rows, mean_square)
        if isinstance(rows, Tensor) or is_compiling():
            # A tensor from here on: the compiler makes one graph for all numbers of rows.
            count = rows.double() if isinstance(rows, Tensor) else checks.number_in_graph(rows)
            return self._keep(inner * (self.reference / count.clamp(min=1)) ** self.power)
        return self._keep(inner * (self.reference / max(1, rows)) ** self.power)


class RelativeLam(_OfBatch):
    r"""Lambda in units of the features: times their mean square, as ``relative=True`` of a head, and smoothed.

    .. math:: \lambda \operatorname{tr}(\Phi^T \Phi) / (B D)

    Lambda then does not depend on the scale of the features, which drifts while the backbone learns.

    Args:
        lam: for features of mean square 1: a number or another schedule.
        decay: how much of the mean square is that of the batches before, an average whose weights fade; 0: of this
            batch alone. A schedule that is smoothed keeps what it has seen: give each head its own.

    A batch with NaN or Inf is passed over: the head has an error for it.

    Example:
        >>> import torch
        >>> from cfl_ops.learn import ClosedFormLinear, RelativeLam
        >>> schedule = RelativeLam(0.5, decay=0.0)
        >>> _ = ClosedFormLinear(4, 3, lam=schedule).update(torch.full((8, 4), 2.0), torch.zeros(8, 3))
        >>> schedule.get_last_lam()
        2.0

    """

    @makes_state
    def __init__(self, lam: float | LamSchedule, decay: float = 0.9) -> None:
        self.decay = float(checks.number("learn.RelativeLam", "decay", decay, _DECAY))
        super().__init__(lam)
        self._seen = _state(0.0, 0.0)
        """The sum of the mean squares, with weights that fade, and the sum of those."""

    @torch.no_grad()
    def value(self, rows: Any, mean_square: Callable[[], Tensor]) -> Tensor:
        """As that of :class:`LamSchedule`. Without rows, that of the average; before the first batch, of 1."""
        inner = self.lam.value(rows, mean_square)
        # What is wrong with the features is theirs to tell, not that of a lambda which is NaN for it.
        square: Tensor | None
        if isinstance(rows, Tensor):
            square = torch.where(rows > 0, mean_square().double(), math.nan)
        else:
            square = mean_square().double() if rows else None
        if self._seen.is_cpu and (square is None or square.is_cpu) and not is_compiling():
            return self._keep(inner * self._see_on_cpu(None if square is None else square.item()))
        if square is not None:
            self._see(square)
        total, weight = self._seen.unbind()
        return self._keep(inner * torch.where(weight > 0, total / weight, 1.0))

    @makes_state
    def _see(self, square: Tensor) -> None:
        """Take a value into the average, if it is finite."""
        if self._seen.device != square.device:
            self._seen = self._seen.to(square.device)
        new = self.decay * self._seen + (1 - self.decay) * torch.stack((square, torch.ones_like(square)))
        self._seen.copy_(torch.where(square.isfinite(), new, self._seen))

    def _see_on_cpu(self, square: float | None) -> float:
        """The same in Python's numbers, bit for bit and in less time; the average."""
        total, weight = self._seen.tolist()
        if square is not None and math.isfinite(square):
            total = self.decay * total + (1 - self.decay) * square
            weight = self.decay * weight + (1 - self.decay)
            self._seen.copy_(_state(total, weight))
        return total / weight if weight > 0 else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is, the one within, and the average."""
        total, weight = self._seen.tolist()
        return {**super().state_dict(), "sum": total, "weight": weight}

    @makes_state
    def _set(self, state: dict[str, Any]) -> None:
        super()._set(state)
        self._seen = _state(state["sum"], state["weight"])


_DECAY = checks.Range("in [0, 1)", lambda value: (value >= 0) & (value < 1))


def _state(*values: float) -> Tensor:
    """Numbers that are written to in place, in one dimension: compiled graphs of PyTorch 2.13 lose what they write to a
    float64 CPU tensor without dimensions.
    """
    return torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")


def _lam(kind: type, name: str, value: Any, positive: bool = False) -> float:
    wanted = checks.POSITIVE if positive else checks.NOT_NEGATIVE
    return float(checks.number(f"learn.{kind.__name__}", name, value, wanted))
