"""Class probabilities of a head that was fitted to one-hot targets, and how well they are calibrated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from cfl_ops._core import checks
from cfl_ops._core.state import PreciseModule, from_inference_mode, makes_state

__all__ = ["Calibration", "class_probabilities", "expected_calibration_error"]

METHODS = ("clip", "abs")
NAME = "learn.Calibration"
# Newton's steps, or half of what is left: from a bracket of 1e3 down to the last digits, with room.
MOST_STEPS = 100


def class_probabilities(scores: Tensor, method: str = "clip", *, dim: int = -1) -> Tensor:
    r"""Probabilities of the scores of a head that was fitted to one-hot targets.

    .. math:: p_k = g_k / \sum_j g_j, \quad g = \max(f, 0) \text{ or } g = |f|

    (Closed-Form Last Layer Optimization, Eq. 72-73.) Scores of such a head are near 0 and 1 as they are, so that they
    are divided by their sum; softmax of them would be all but uniform, see :class:`Calibration` for its temperature.

    Args:
        scores: ``(..., K)``.
        method: ``"clip"``: a negative score is no sign of the class; ``"abs"``: only its size counts, so that the
            likeliest class may be another than the largest score's.
        dim: that of the classes; 1 for maps ``(B, K, H, W)``.

    Returns:
        ``(..., K)``, of the dtype of ``scores``; half precision is computed in float32. Rows sum to 1 up to rounding;
        where no score counts (all are negative or zero) they are uniform. A row with NaN or ``+Inf`` is all NaN; with
        ``"clip"``, ``-Inf`` is a class that is left out. Differentiable: the gradient of a uniform row is zero.

    Raises:
        TypeError, ValueError: ``scores`` is no floating-point tensor with a last dimension, or there is no such method.

    Example:
        >>> import torch
        >>> from cfl_ops.learn import class_probabilities
        >>> class_probabilities(torch.tensor([[0.75, 0.25, -0.1], [-1.0, -2.0, -0.5]]))
        tensor([[0.7500, 0.2500, 0.0000],
                [0.3333, 0.3333, 0.3333]])

    """
    op = "learn.class_probabilities"
    checks.floating(op, "scores", scores, 1)
    checks.choice(op, "method", method, METHODS)
    dim = checks.integer(op, "dim", dim, -scores.ndim, scores.ndim - 1)
    if dim not in (-1, scores.ndim - 1):
        return class_probabilities(scores.movedim(dim, -1), method).movedim(-1, dim)
    if scores.shape[-1] == 0:
        return scores.clone()
    wide = _wide(scores)
    g = wide.clamp(min=0) if method == "clip" else wide.abs()
    most = g.detach().amax(-1, keepdim=True)
    none = most == 0
    # Of the largest, so that no sum overflows; the result does not depend on it.
    share = torch.where(none, 1.0, g / torch.where(none, 1.0, most))
    return (share / share.sum(-1, keepdim=True)).to(scores.dtype)


class Calibration(PreciseModule):
    r"""A temperature for the scores of a closed-form head: ``softmax(beta * scores)``.

    The scores of a head that was fitted to one-hot targets lie near 0 and 1, so that their softmax is all but uniform.
    One number, fitted on data that the head was not fitted to, makes them probabilities; it does not change which
    class is the likeliest. (Guo et al., On Calibration of Modern Neural Networks, 2017, whose temperature is 1 / beta.)

    Args:
        cap: beta is at most ``cap`` over the mean range of the scores of a row. Where every row's label has the
            largest score, the likelihood grows with beta for ever; there beta is at the cap, and the likeliest class
            has nearly all of the probability. Take more data then.
        device: where beta lives.

    beta is a buffer of float64, which ``half()`` and ``parent.to(dtype)`` leave as it is. It starts at 1.

    Example:
        >>> import torch
        >>> from cfl_ops.learn import Calibration
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.1], [0.2, 0.7], [0.6, 0.4]])
        >>> calibration = Calibration().fit(scores, torch.tensor([0, 0, 1, 1]))
        >>> calibration(scores).argmax(1)
        tensor([0, 0, 1, 0])

    """

    beta: Tensor
    """0-d float64."""

    @makes_state
    def __init__(self, cap: float = 1e3, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.cap = float(checks.number(NAME, "cap", cap, checks.POSITIVE))
        self.register_buffer("beta", torch.ones((), dtype=torch.float64, device=device))

    def extra_repr(self) -> str:
        """What ``print`` shows of it."""
        return f"beta={float(self.beta):.6g}" if not self.beta.is_meta else ""

    def forward(self, scores: Tensor) -> Tensor:
        """Probabilities ``(..., K)`` of scores ``(..., K)``, in their dtype; half precision is computed in float32.

        A row with NaN or ``+Inf`` is NaN.
        """
        checks.floating(NAME, "scores", scores, 1)
        return self._logits(_wide(scores)).softmax(-1).to(scores.dtype)

    @torch.no_grad()
    def nll(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The mean negative log-likelihood of ``labels (...)`` int64: 0-d float64.

        Raises:
            TypeError, ValueError, IndexError: shapes or dtypes do not fit, there is no row, or a label is out of range.

        """
        rows, labels = _labelled(f"{NAME}.nll", "scores", scores, labels)
        logits = self._logits(rows.double())
        return (logits.logsumexp(-1) - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)).mean()

    @makes_state
    def fit(self, scores: Tensor, labels: Tensor) -> Calibration:
        """Set beta to where the likelihood of the labels is largest, from 0 to the cap; returns the module itself.

        The negative log-likelihood is convex in beta. Its minimum is found by Newton's method in float64, which a
        bracket keeps from running away, to the last digits. Where the scores speak against the labels beta is 0, and
        the probabilities are uniform; where no row's scores differ beta is 1.

        Args:
            scores: ``(..., K)``, of data that the head was not fitted to.
            labels: ``(...)`` int64.

        Raises:
            TypeError, ValueError, IndexError: shapes or dtypes do not fit, there is no row, a label is out of range, or
                a score is NaN or Inf. beta is then unchanged.

        Not under ``fullgraph=True`` nor ``torch.export``: how many steps are needed depends on the data.
        """
        op = f"{NAME}.fit"
        rows, labels = _labelled(op, "scores", scores, labels)
        if not bool(rows.isfinite().all()):
            row = int((~rows.isfinite().all(1)).nonzero()[0])
            raise ValueError(f"cfl_ops.{op}: scores has NaN or Inf in row {row}")
        wide = rows.double()
        below = wide - wide.amax(1, keepdim=True)
        spread = float(-below.amin(1).mean())
        if from_inference_mode(self.beta):
            self._make_normal()
        if spread == 0:
            self.beta.fill_(1.0)
            return self
        below = below / spread
        own = below.gather(1, labels.unsqueeze(1)).squeeze(1)

        def slopes(beta: float) -> tuple[float, float]:
            """The first and second derivative of the negative log-likelihood."""
            p = (below * beta).softmax(1)
            mean = (p * below).sum(1, keepdim=True)
            return float((mean.squeeze(1) - own).mean()), float((p * (below - mean).square()).sum(1).mean())

        self.beta.fill_(_convex_minimum(slopes, self.cap) / spread)
        return self

    def _logits(self, scores: Tensor) -> Tensor:
        """In units of their largest, so that none is too large; beta times them."""
        below = scores - scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores
        return below * self.beta.clamp(max=torch.finfo(scores.dtype).max).to(scores.dtype)


@torch.no_grad()
def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    r"""How far confidence is from accuracy: 0 for probabilities that are what they say.

    .. math:: \sum_b \frac{n_b}{N} |\mathrm{accuracy}_b - \mathrm{confidence}_b|

    (Guo et al., On Calibration of Modern Neural Networks, 2017.) The confidence of a row is its largest probability;
    the bins ``((b - 1) / bins, b / bins]`` are equally wide. With few rows it is too large as a rule: compare it at the
    same number of rows and bins only.

    Args:
        probabilities: ``(..., K)``.
        labels: ``(...)`` int64.
        bins: how many.

    Returns:
        A 0-d float64 tensor in [0, 1].

    Raises:
        TypeError, ValueError, IndexError: shapes or dtypes do not fit, there is no row, a label is out of range, or a
            probability is not in [0, 1].

    Not under ``fullgraph=True`` nor ``torch.export``: it looks at the data.

    Example:
        >>> import torch
        >>> from cfl_ops.learn import expected_calibration_error
        >>> sure = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> expected_calibration_error(sure, torch.tensor([0, 0, 1, 0]))
        tensor(0.2500, dtype=torch.float64)

    """
    op = "learn.expected_calibration_error"
    rows, labels = _labelled(op, "probabilities", probabilities, labels)
    bins = checks.integer(op, "bins", bins, 1)
    if not bool(((rows >= 0) & (rows <= 1)).all()):
        raise ValueError(f"cfl_ops.{op}: probabilities must be in [0, 1], but there are others, or NaN")
    confidence, likeliest = rows.max(1)
    confidence = confidence.double()
    number = (confidence * bins).ceil().long().sub_(1).clamp_(0, bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=rows.device)
    gap.index_add_(0, number, (likeliest == labels).double() - confidence)
    return gap.abs().sum() / len(labels)


def _wide(scores: Tensor) -> Tensor:
    return scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores


def _labelled(op: str, name: str, scores: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """``(N, K)`` and ``(N,)``, N and K at least 1, labels in range."""
    checks.floating(op, name, scores, 1)
    checks.tensor(op, "labels", labels, 0)
    if labels.dtype is not torch.int64:
        raise TypeError(f"cfl_ops.{op}: labels must be int64, but got {labels.dtype}")
    checks.tensor(op, name, scores, 1 + min(1, labels.ndim))  # a row for each label
    lead, classes = scores.shape[:-1], scores.shape[-1]
    if labels.shape not in (lead, (math.prod(lead),)):
        raise ValueError(
            f"cfl_ops.{op}: labels must have shape {tuple(lead)} or be flat, but got {tuple(labels.shape)}"
        )
    checks.same_device(op, name, scores, labels=labels)
    if not scores.numel():
        raise ValueError(
            f"cfl_ops.{op}: {name} must have at least 1 row and 1 class, but got shape {tuple(scores.shape)}"
        )
    rows, labels = scores.detach().reshape(-1, classes), labels.reshape(-1)
    if not is_compiling():
        bad = (labels < 0) | (labels >= classes)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise IndexError(
                f"cfl_ops.{op}: labels must be from 0 to {classes - 1}, but got {int(labels[row])} in row {row}"
            )
    return rows, labels


def _convex_minimum(slopes: Callable[[float], tuple[float, float]], cap: float) -> float:
    """Where a convex function of [0, cap] is least, by its derivatives: Newton's steps, within a bracket."""
    if slopes(0.0)[0] >= 0:
        return 0.0
    if slopes(cap)[0] <= 0:
        return cap
    low, high, here = 0.0, cap, min(1.0, cap / 2)
    last = high - low
    for _ in range(MOST_STEPS):
        first, second = slopes(here)
        if first == 0:
            break
        low, high = (here, high) if first < 0 else (low, here)
        # Half of the bracket, where Newton would leave it or is no quicker.
        if second > 0 and low < here - first / second < high and abs(2 * first) < abs(last * second):
            step = -first / second
        else:
            step = (low + high) / 2 - here
        last, before, here = step, here, here + step
        if here == before or abs(step) < 1e-15 * here:
            break
    return here
