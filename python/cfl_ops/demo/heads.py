"""The ways to train the last layer that the demo knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["ALL", "CLOSED_FORM", "DEFAULT", "DESCENDED", "HEADS", "Head"]

ALL = "all"
"""What stands for every head on the command line."""

# The best on the validation split of digits, at batch sizes 32 and 128 and the rates of c.f. proximal, of kappa
# 2, 3, 5, 10 and scales 1, 2, 4 (kappa 1 and scale 1, which are c.f. proximal, were no worse).
KAPPA, TARGET_SCALE = 2.0, 1.0
EMA_DECAY = 0.9
RECURSIVE_DECAY = 0.99


@dataclass(frozen=True)
class Head:
    """One way to train the last layer."""

    name: str
    label: str
    closed_form: bool
    explanation: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """What ``learn.ClosedFormLinear`` is told besides lam."""
    order: str = "head-first"
    """``learn.train_step``'s order."""
    classes_only: bool = False
    kin: str | None = None
    """The head whose tuned learning rates and penalties it takes where it has none of its own."""
    default: bool = False
    """Whether it runs unless ``--head`` says otherwise."""


HEADS = {
    head.name: head
    for head in (
        Head(
            "proximal",
            "c.f. proximal",
            True,
            "on each batch the closed-form minimiser of the squared loss plus lam times the squared distance "
            "to the last head",
            default=True,
        ),
        Head(
            "ridge",
            "c.f. ridge",
            True,
            "on each batch the closed-form ridge solution with coefficient lam; it forgets the last head",
            {"method": "ridge"},
            default=True,
        ),
        Head(
            "rescaled",
            "c.f. rescaled",
            True,
            f"as c.f. proximal, with the rescaled squared loss of Hui and Belkin: the error of the true class "
            f"counts {KAPPA:g} times, and its target is {TARGET_SCALE:g} (classification only)",
            {"kappa": KAPPA, "target_scale": TARGET_SCALE},
            classes_only=True,
            kin="proximal",
        ),
        Head(
            "ema-ridge",
            "EMA of ridge",
            True,
            f"a moving average of the batches' ridge heads, of which each step keeps {EMA_DECAY:g}",
            {"method": "ema_ridge", "decay": EMA_DECAY},
            kin="ridge",
        ),
        Head(
            "recursive",
            "recursive",
            True,
            f"recursive least squares over all batches, the full-covariance Kalman head: each step multiplies "
            f"the weight of what was before by {RECURSIVE_DECAY:g}; lam is its ridge",
            kin="proximal",
        ),
        Head(
            "algorithm-2",
            "Algorithm 2",
            True,
            "c.f. proximal in the other order: the backbone steps at the last head, then the head is solved on "
            "the features of the new backbone, which costs a second forward",
            order="backbone-first",
            kin="proximal",
        ),
        Head(
            "algorithm-2-cached",
            "Algorithm 2, cached",
            True,
            "Algorithm 2 with the head solved on the features that the backbone's step began with",
            order="backbone-first-cached",
            kin="proximal",
        ),
        Head(
            "squared",
            "squared loss",
            False,
            "a plain linear layer, trained by gradient steps on the squared loss",
            default=True,
        ),
        Head(
            "cross-entropy",
            "cross-entropy",
            False,
            "a plain linear layer, trained by gradient steps on cross-entropy",
            classes_only=True,
            default=True,
        ),
    )
}
DEFAULT = tuple(name for name, head in HEADS.items() if head.default)
CLOSED_FORM = tuple(name for name, head in HEADS.items() if head.closed_form)
DESCENDED = tuple(name for name, head in HEADS.items() if not head.closed_form)
