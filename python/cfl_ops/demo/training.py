"""Train the same backbone under several heads, side by side, and time their steps fairly."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import LinAlgError
from ..learn import ClosedFormLinear
from .data import Dataset

__all__ = ["HEADS", "Head", "Learner", "Point", "Run", "Setting", "train_side_by_side", "warm_up"]

# How many steps one head takes before it is the next one's turn: long enough for its own working set to
# be in the cache, short enough (milliseconds) that a busy moment of the machine falls on all heads alike.
TURN = 8

# The head that is re-estimated on the whole training set is a ridge with this coefficient, times the mean
# square of the features: enough to be well posed, too little to matter.
REFIT_RIDGE = 1e-3


@dataclass(frozen=True)
class Head:
    """One way to train the last layer."""

    name: str
    label: str
    closed_form: bool
    explanation: str


HEADS = {
    head.name: head
    for head in (
        Head(
            "proximal",
            "c.f. proximal",
            True,
            "on each batch the closed-form minimiser of the squared loss plus lam times the squared distance "
            "to the last head",
        ),
        Head(
            "ridge",
            "c.f. ridge",
            True,
            "on each batch the closed-form ridge solution with coefficient lam; it forgets the last head",
        ),
        Head(
            "squared",
            "squared loss",
            False,
            "a plain linear layer, trained by gradient steps on the squared loss",
        ),
        Head(
            "cross-entropy",
            "cross-entropy",
            False,
            "a plain linear layer, trained by gradient steps on cross-entropy",
        ),
    )
}


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

    @property
    def steps_done(self) -> int:
        """Steps taken."""
        return len(self.step_seconds)

    @property
    def finished(self) -> bool:
        """Whether all steps were taken; a diverged run has nothing more to do."""
        return self.failure is not None or self.steps_done >= self.setting.steps


class Learner:
    """A backbone, a head and an optimiser. Heads of equal seed start from the same backbone."""

    def __init__(self, setting: Setting, data: Dataset) -> None:
        self.setting, self.data = setting, data
        device = data.train_x.device
        torch.manual_seed(setting.seed)
        widths = [data.train_x.shape[1]] + [setting.width] * setting.depth
        layers = [(nn.Linear(d, k), nn.GELU()) for d, k in itertools.pairwise(widths)]
        self.backbone = nn.Sequential(*itertools.chain(*layers)).to(device)
        self.head: ClosedFormLinear | nn.Linear
        if HEADS[setting.head].closed_form:
            self.head = ClosedFormLinear(
                setting.width,
                data.outputs,
                lam=setting.penalty,
                method=setting.head,
                init="zeros" if setting.optimizer == "sgd" else "lecun",
                device=device,
            )
            groups: list[dict[str, Any]] = [{"params": list(self.backbone.parameters())}]
        else:
            self.head = nn.Linear(setting.width, data.outputs).to(device)
            groups = [
                {"params": list(self.backbone.parameters())},
                {"params": list(self.head.parameters()), "weight_decay": 2 * setting.penalty},
            ]
        self.optimizer: torch.optim.Optimizer
        if setting.optimizer == "sgd":
            self.optimizer = torch.optim.SGD(groups, lr=setting.lr, momentum=0.9, nesterov=True)
        else:
            self.optimizer = torch.optim.Adam(groups, lr=setting.lr)

    def step(self, x: Tensor, y: Tensor, dense: Tensor) -> None:
        """One training step on a batch; ``dense`` is ``y`` as float targets, one-hot for classes."""
        features = self.backbone(x)
        if isinstance(self.head, ClosedFormLinear):
            self.head.step(features, y)
        elif self.setting.head == "squared":
            torch.autograd.backward((self.head(features) - dense).square().sum(1).mean())
        else:
            torch.autograd.backward(F.cross_entropy(self.head(features), y))
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def diverged(self, error: Exception, x: Tensor) -> bool:
        """Whether a step failed because its numbers ran away, not because of a mistake in the code."""
        return isinstance(error, LinAlgError) or not bool(self.backbone(x).isfinite().all())

    @torch.no_grad()
    def predict(self, head: nn.Module | None = None) -> Tensor:
        """The outputs of the present head, or another, for the test part."""
        output: Tensor = (head or self.head)(self.backbone(self.data.test_x))
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
        return (output - dense_targets(self.data, self.data.test_y)).square().sum(1).mean().item()

    @torch.no_grad()
    def refit(self) -> ClosedFormLinear:
        """A head for the present backbone, solved on the whole training set."""
        head = ClosedFormLinear(
            self.setting.width,
            self.data.outputs,
            lam=REFIT_RIDGE,
            method="ridge",
            relative=True,
            device=self.data.train_x.device,
        )
        head.update(self.backbone(self.data.train_x), self.data.train_y)
        return head


def dense_targets(data: Dataset, y: Tensor) -> Tensor:
    """Float targets: one-hot rows for classes."""
    return F.one_hot(y, data.outputs).to(data.train_x.dtype) if data.classes else y


def _batches(data: Dataset, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
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


def _synchronize(device: torch.device) -> None:
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

    Returns:
        A run for each setting, evaluated where it stopped.

    """
    first = settings[0]
    device = data.train_x.device
    learners = [Learner(setting, data) for setting in settings]
    runs = [Run(setting) for setting in settings]
    pairs = list(zip(learners, runs, strict=True))
    batches = _batches(data, first.batch_size, first.seed)
    done, turn = 0, 0
    for target in _evaluation_steps(first.steps, evaluations):
        while done < target and not stop():
            count = min(TURN, target - done)
            turn_batches = list(itertools.islice(batches, count))
            shift = turn % len(pairs)
            for learner, run in pairs[shift:] + pairs[:shift]:
                if run.failure is None:
                    _take_turn(learner, run, turn_batches, device)
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


def _take_turn(
    learner: Learner, run: Run, batches: Sequence[tuple[Tensor, Tensor, Tensor]], device: torch.device
) -> None:
    for batch in batches:
        _synchronize(device)
        start = time.perf_counter()
        try:
            learner.step(*batch)
        except (ValueError, LinAlgError) as error:
            if not learner.diverged(error, batch[0]):
                raise
            run.failure = f"diverged at step {run.steps_done + 1}"
            run.points.append(Point(run.steps_done + 1, sum(run.step_seconds), math.nan))
            return
        _synchronize(device)
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
    if refit and HEADS[run.setting.head].closed_form:
        run.refit = learner.metric(learner.predict(learner.refit()))


def warm_up(settings: Sequence[Setting], data: Dataset, steps: int = 5) -> None:
    """Take a few steps with fresh learners, so that the first timed step pays for nothing but itself."""
    for setting in settings:
        learner = Learner(setting, data)
        for batch in itertools.islice(_batches(data, setting.batch_size, 0), steps):
            learner.step(*batch)
