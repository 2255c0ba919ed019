"""Train the same backbone under several heads, side by side, and time their steps fairly."""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from .. import learn
from ..errors import LinAlgError
from ..learn.head import Head as SolvedHead
from .data import Dataset
from .heads import HEADS, KAPPA, RECURSIVE_DECAY, TARGET_SCALE
from .team import ALONE, Batch, Team

__all__ = ["HEADS", "Learner", "Point", "Run", "Setting", "batches", "train_side_by_side", "warm_up"]

# How many steps one head takes before it is the next one's turn: long enough for its own working set to
# be in the cache, short enough (milliseconds) that a busy moment of the machine falls on all heads alike.
TURN = 8

# The head that is re-estimated on the whole training set is a ridge with this coefficient, times the mean
# square of the features: enough to be well posed, too little to matter.
REFIT_RIDGE = 1e-3


@dataclass(frozen=True)
class Setting:
    """Everything that decides one run."""

    head: str
    batch_size: int
    seed: int
    steps: int
    lr: float
    penalty: float
    """lam of a closed-form head; of the others the coefficient of an L2 penalty on the head's weight."""
    optimizer: str = "sgd"
    width: int = 256
    depth: int = 3
    compile: str | Callable[..., Any] | None = None
    """The backend of ``torch.compile``, or None to train as Python runs it."""


@dataclass(frozen=True)
class Point:
    """One evaluation: after so many steps and so many seconds of training steps."""

    step: int
    seconds: float
    metric: float


@dataclass
class Run:
    """What came of one setting."""

    setting: Setting
    points: list[Point] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    online: float = math.nan
    """The metric of the head as the training left it."""
    refit: float | None = None
    """The metric of the head re-estimated on the whole training set; closed-form heads only."""
    loss: float = math.nan
    """The online head's own loss on the test part."""
    predictions: Tensor | None = None
    """What the online head predicts for the test part."""
    failure: str | None = None
    compiled: str | None = None
    """What ``torch.compile`` made of the step; None where it was not asked for."""
    moved: tuple[str, int] | None = None
    """With several processes: what the head's step moved, and how many bytes of it each one received."""

    @property
    def steps_done(self) -> int:
        """Steps taken."""
        return len(self.step_seconds)

    @property
    def finished(self) -> bool:
        """Whether all steps were taken; a diverged run has nothing more to do."""
        return self.failure is not None or self.steps_done >= self.setting.steps


class Learner:
    """A backbone, a head and an optimiser. Heads of equal seed start from the same backbone.

    With ``setting.compile`` the step is as compiled as :attr:`compiled` says, but only after :meth:`prepare`.
    In a team each process steps with its share of a batch, and all end with the same numbers.
    """

    def __init__(self, setting: Setting, data: Dataset, team: Team = ALONE) -> None:
        self.setting, self.data, self.team = setting, data, team
        self.kind = HEADS[setting.head]
        device = data.train_x.device
        torch.manual_seed(setting.seed)
        widths = [data.train_x.shape[1]] + [setting.width] * setting.depth
        layers = [(nn.Linear(d, k), nn.GELU()) for d, k in itertools.pairwise(widths)]
        self.network = nn.Sequential(*itertools.chain(*layers)).to(device)
        self.head = _head(setting, data)
        # None: head.step, which costs less than a loss with a graph, but cannot be compiled.
        self._loss: Loss | None = LOSSES.get(setting.head)
        self.compiled: str | None = None
        # What a step calls: the same modules, which may be compiled and shared with other processes.
        self.backbone: nn.Module = self.network
        self.output: nn.Module = self.head
        if setting.compile is not None:
            self._compile(setting.compile)
        if team.size > 1:
            self.backbone = DistributedDataParallel(self.backbone)
            if not self.kind.closed_form:
                self.output = DistributedDataParallel(self.head)
        self.optimizer = self._optimizer()

    def _compile(self, backend: str | Callable[..., Any]) -> None:
        """Compile what can be; the work is done in the first steps."""
        loss = self._loss or (_solved if self.kind.order == "head-first" else None)
        if loss is None or self.team.size > 1:  # a solve over several processes stays outside a graph
            self.compiled = "the backbone"
            self.backbone = _Compiled(self.network, backend)
        else:
            self.compiled = "backbone, head and loss in one graph"
            self._loss = _compiled(loss, backend)

    def _optimizer(self) -> torch.optim.Optimizer:
        setting = self.setting
        groups: list[dict[str, Any]] = [{"params": list(self.network.parameters())}]
        if not self.kind.closed_form:
            groups.append({"params": list(self.head.parameters()), "weight_decay": 2 * setting.penalty})
        if setting.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=setting.lr, momentum=0.9, nesterov=True)
        return torch.optim.Adam(groups, lr=setting.lr)

    def step(self, x: Tensor, y: Tensor, dense: Tensor) -> None:
        """One training step on a batch; ``dense`` is ``y`` as float targets, one-hot for classes."""
        if self._loss is not None:
            loss = self._loss(self.backbone, self.output, x, y, dense)
            torch.autograd.backward(loss if self.team.size == 1 else loss * self.share_of_loss(len(x)))
        else:
            assert not isinstance(self.head, nn.Linear)
            if self.kind.order != "head-first":
                learn.train_step(self.backbone, self.head, self.optimizer, x, y, order=self.kind.order)
                return
            self.head.step(self.backbone(x), y)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def share_of_loss(self, rows: int) -> float:
        """What makes the mean over processes of a mean over their rows the mean over all rows.

        Solved heads see to that themselves.
        """
        return 1.0 if self.kind.closed_form else rows * self.team.size / self.setting.batch_size

    def prepare(self, batch: Batch) -> None:
        """Compile the step, if the setting asks for it, by taking steps that are undone.

        Where compiling fails the step stays as Python runs it, and :attr:`compiled` says why.
        """
        if self.setting.compile is None:
            return
        before = [copy.deepcopy(module.state_dict()) for module in (self.network, self.head)]
        try:
            self._undo(batch, before)
        except Exception as error:  # whatever a compiler stumbles over
            reason = " ".join(str(error).split())
            self.compiled = f"nothing ({type(error).__name__}: {reason[:160]})"
            self._loss = LOSSES.get(self.setting.head)
            for module in self.backbone.modules():
                if isinstance(module, _Compiled):
                    module.run = _features
            self._undo(batch, before, steps=0)

    def _undo(self, batch: Batch, before: list[dict[str, Any]], steps: int = 3) -> None:
        """Take some steps, and be as before them."""
        try:
            for _ in range(steps):
                self.step(*batch)
        finally:
            for module, state in zip((self.network, self.head), before, strict=True):
                module.load_state_dict(state)
                module.zero_grad()
            self.optimizer = self._optimizer()

    @torch.no_grad()
    def diverged(self, error: Exception, x: Tensor) -> bool:
        """Whether a step failed because its numbers ran away, not because of a mistake in the code."""
        return isinstance(error, LinAlgError) or not bool(self.network(x).isfinite().all())

    @torch.no_grad()
    def predict(self, head: nn.Module | None = None) -> Tensor:
        """The outputs of the present head, or another, for the test part."""
        output: Tensor = (head or self.head)(self.network(self.data.test_x))
        return output

    def metric(self, output: Tensor) -> float:
        """Error in percent, or mean squared error; NaN if the output is not finite."""
        if not output.isfinite().all():
            return math.nan
        if self.data.classes:
            return 100 * (output.argmax(1) != self.data.test_y).double().mean().item()
        return (output - self.data.test_y).double().square().mean().item()

    def loss(self, output: Tensor) -> float:
        """The loss that this head is trained on, for the test part: finer than the error, to break ties."""
        if self.setting.head == "cross-entropy":
            return F.cross_entropy(output, self.data.test_y).item()
        dense = dense_targets(self.data, self.data.test_y)
        if self.setting.head == "rescaled":
            return ((1 + (KAPPA - 1) * dense) * (output - TARGET_SCALE * dense).square()).sum(1).mean().item()
        return (output - dense).square().sum(1).mean().item()

    @torch.no_grad()
    def refit(self) -> nn.Module:
        """A head for the present backbone, solved on the whole training set."""
        head = learn.ClosedFormLinear(
            self.setting.width,
            self.data.outputs,
            lam=REFIT_RIDGE,
            relative=True,
            process_group=None,  # every process has all rows
            device=self.data.train_x.device,
            **{key: self.kind.options[key] for key in ("kappa", "target_scale") if key in self.kind.options},
            method="ridge",
        )
        head.update(self.network(self.data.train_x), self.data.train_y)
        return head

    def moved(self) -> tuple[str, int] | None:
        """What the head's last step moved between processes, and the bytes of it that each one received."""
        if self.team.size == 1:
            return None
        if isinstance(self.head, learn.ClosedFormLinear):
            return self.head.traffic.kind, self.head.traffic.bytes
        size, features, outputs = self.team.size, self.setting.width, self.data.outputs
        if self.kind.closed_form:  # rows and their targets, a class as four bytes
            row = 4 * features + (4 if self.data.classes else 4 * outputs)
            return "features", round(self.setting.batch_size * row * (size - 1) / size)
        # Of a ring, as the solved heads count theirs.
        return "gradients", round(2 * 4 * outputs * (features + 1) * (size - 1) / size)


def _head(setting: Setting, data: Dataset) -> SolvedHead | nn.Linear:
    """The last layer of a setting."""
    kind = HEADS[setting.head]
    device = data.train_x.device
    if not kind.closed_form:
        return nn.Linear(setting.width, data.outputs).to(device)
    if setting.head == "recursive":
        head: SolvedHead = learn.RecursiveHead(
            setting.width,
            data.outputs,
            alpha=max(setting.penalty, 1e-12),
            decay=RECURSIVE_DECAY,
            device=device,
        )
        return head
    # Zeros, as the paper has it with SGD; but the first backbone step of Algorithm 2 needs a head.
    zeros = setting.optimizer == "sgd" and kind.order == "head-first"
    return learn.ClosedFormLinear(
        setting.width,
        data.outputs,
        lam=setting.penalty,
        init="zeros" if zeros else "lecun",
        device=device,
        **kind.options,
    )


def _squared(backbone: nn.Module, head: nn.Module, x: Tensor, y: Tensor, dense: Tensor) -> Tensor:
    residual: Tensor = head(backbone(x)) - dense
    return residual.square().sum(1).mean()


def _cross_entropy(backbone: nn.Module, head: nn.Module, x: Tensor, y: Tensor, dense: Tensor) -> Tensor:
    return F.cross_entropy(head(backbone(x)), y)


def _solved(backbone: nn.Module, head: SolvedHead, x: Tensor, y: Tensor, dense: Tensor) -> Tensor:
    return head.loss(backbone(x), y)


Loss = Callable[..., Tensor]
LOSSES: dict[str, Loss] = {"squared": _squared, "cross-entropy": _cross_entropy}


def _features(backbone: nn.Module, x: Tensor) -> Tensor:
    features: Tensor = backbone(x)
    return features


def _compiled(function: Callable[..., Tensor], backend: str | Callable[..., Any]) -> Callable[..., Tensor]:
    """``torch.compile`` of a function of modules and tensors.

    The code is copied, as compiled code is kept with it: where several learners share a function's code,
    each searches in every call through what was compiled for the others, and a limit of eight is soon met.
    """
    assert isinstance(function, FunctionType)
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    compiled: Callable[..., Tensor] = torch.compile(own, fullgraph=True, dynamic=False, backend=backend)
    return compiled


class _Compiled(nn.Module):
    """A compiled backbone."""

    def __init__(self, network: nn.Module, backend: str | Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.run = network, _compiled(_features, backend)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self.network, x)


def dense_targets(data: Dataset, y: Tensor) -> Tensor:
    """Float targets: one-hot rows for classes."""
    return F.one_hot(y, data.outputs).to(data.train_x.dtype) if data.classes else y


def batches(data: Dataset, batch_size: int, seed: int) -> Iterator[Batch]:
    """Shuffled full batches without end; what is left of an epoch is dropped, so all steps cost the same."""
    generator = torch.Generator().manual_seed(seed)
    dense = dense_targets(data, data.train_y)
    rows = len(data.train_x)
    while True:
        order = torch.randperm(rows, generator=generator).to(data.train_x.device)
        for start in range(0, rows - batch_size + 1, batch_size):
            index = order[start : start + batch_size]
            yield data.train_x[index], data.train_y[index], dense[index]


def _evaluation_steps(steps: int, count: int) -> list[int]:
    """Where to evaluate: closer together at the start, where the curves move."""
    return sorted({max(1, round(steps * (i / count) ** 2)) for i in range(1, count + 1)})


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_side_by_side(
    settings: Sequence[Setting],
    data: Dataset,
    *,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], None] = lambda steps: None,
    evaluations: int = 24,
    refit: bool = True,
    team: Team = ALONE,
) -> list[Run]:
    """Train several heads on the same batches, taking turns of a few steps.

    The settings share batch size, seed and number of steps. Each step is timed alone: drawing the batch,
    evaluating and drawing the progress bar are outside. The heads rotate in who goes first.

    Args:
        settings: one for each head.
        data: on the device to train on.
        stop: asked at every turn; when true, the runs end where they are.
        progress: told how many steps were taken (or skipped, after a divergence).
        evaluations: how often the curves are sampled.
        refit: whether closed-form heads are re-estimated on the whole training set at the end.
        team: the processes that train together, each of which makes this call; ``stop`` must tell all the same.

    Returns:
        A run for each setting, evaluated where it stopped.

    """
    first = settings[0]
    learners = [Learner(setting, data, team) for setting in settings]
    runs = [Run(setting) for setting in settings]
    pairs = list(zip(learners, runs, strict=True))
    source = batches(data, first.batch_size, first.seed)
    for learner, run in pairs:
        learner.prepare(team.share(next(batches(data, first.batch_size, first.seed))))
        run.compiled = learner.compiled
    done, turn = 0, 0
    for target in _evaluation_steps(first.steps, evaluations):
        while done < target and not stop():
            count = min(TURN, target - done)
            turn_batches = list(itertools.islice(source, count))
            shift = turn % len(pairs)
            for learner, run in pairs[shift:] + pairs[:shift]:
                if run.failure is None:
                    _take_turn(learner, run, turn_batches)
                progress(count)
            done, turn = done + count, turn + 1
        for learner, run in pairs:
            if run.failure is None and run.steps_done:
                _evaluate(learner, run)
        if done < target:
            break
    for learner, run in pairs:
        if run.failure is None and run.steps_done:
            _finish(learner, run, refit)
    return runs


def _take_turn(learner: Learner, run: Run, turn_batches: Sequence[Batch]) -> None:
    device = learner.data.train_x.device
    for whole in turn_batches:
        batch = learner.team.share(whole)
        synchronize(device)
        start = time.perf_counter()
        try:
            learner.step(*batch)
        except (ValueError, LinAlgError, RuntimeError) as error:
            if not learner.diverged(error, whole[0]):
                raise
            run.failure = f"diverged at step {run.steps_done + 1}"
            run.points.append(Point(run.steps_done + 1, sum(run.step_seconds), math.nan))
            return
        synchronize(device)
        run.step_seconds.append(time.perf_counter() - start)


def _evaluate(learner: Learner, run: Run) -> None:
    metric = learner.metric(learner.predict())
    run.points.append(Point(run.steps_done, sum(run.step_seconds), metric))
    if math.isnan(metric):
        run.failure = f"diverged by step {run.steps_done}"


def _finish(learner: Learner, run: Run, refit: bool) -> None:
    output = learner.predict()
    run.online, run.loss = learner.metric(output), learner.loss(output)
    run.predictions = (output.argmax(1) if learner.data.classes else output).cpu()
    run.moved = learner.moved()
    if refit and learner.kind.closed_form:
        run.refit = learner.metric(learner.predict(learner.refit()))


def warm_up(settings: Sequence[Setting], data: Dataset, steps: int = 5, team: Team = ALONE) -> None:
    """Take a few steps with fresh learners, so that the first timed step pays for nothing but itself."""
    for setting in settings:
        learner = Learner(replace(setting, compile=None), data, team)
        for batch in itertools.islice(batches(data, setting.batch_size, 0), steps):
            learner.step(*team.share(batch))
