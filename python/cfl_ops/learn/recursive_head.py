"""A linear head that remembers every batch: the Kalman filter of Closed-Form Last Layer Optimization, Appendix B."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from cfl_ops._core import checks
from cfl_ops._core.state import makes_state
from cfl_ops.ops.cholesky.recursive_ridge import RecursiveRidge

from . import distributed
from .distributed import Choice, Ranks, group_of
from .global_head import of_their_kind, rows_facts
from .head import Batch, Head, check_classes, squared_loss

__all__ = ["RecursiveHead"]

NAME = "learn.RecursiveHead"


class RecursiveHead(Head):
    r"""A linear head that is the Kalman filter of all batches, with the variance of its predictions.

    .. math::
        P^- = P / \mathrm{decay} + q^2 I, \quad
        G = P^- \Phi^T (\Phi P^- \Phi^T + s^2 I)^{-1}, \quad
        W \leftarrow W + (Y - \Phi W^T)^T G^T, \quad
        P \leftarrow P^- - G \Phi P^-

    (Closed-Form Last Layer Optimization, Appendix B; P_0 = noise / alpha I.) The targets share one D x D covariance. It
    is called as :class:`ClosedFormLinear` is: :meth:`update`, :meth:`step` and :meth:`loss` learn a batch, and give the
    loss ``(1 / B) |Y - Phi W^T - b|^2`` at the new head and its gradient for the features. A
    :class:`cfl_ops.RecursiveRidge`, ``head.filter``, is inside; a bias is the weight of a feature that is 1, with the
    prior of all weights.

    What it is, by its options:

    - ``decay=1`` and no process noise: after any number of batches the ridge solution of all their rows,
      ``sklearn.linear_model.Ridge(alpha)``, for features that stay as they are. Those of a backbone that learns do not:
      what was learnt of the old features is kept for ever, and the head gets stiff.
    - ``process_noise`` = q2 > 0: the weights may walk by it from batch to batch. Without the covariance (P = 0 before
      each batch) this is the proximal head with ``mu = s2 / q2``, that is ``lam = noise / (B * process_noise)``: the
      MAP collapse of Appendix B. With it, directions that few rows have shown move more than the others.
    - ``decay`` < 1: the weight of older batches fades by it in each update, the prior's too.
    - ``window``: the ridge solution of the last rows.

    Args:
        in_features: D.
        out_features: K, targets or classes (which are learnt as one-hot targets).
        bias: whether there is one.
        alpha: the ridge, > 0, of the sum of squares: the precision of the prior in units of ``1 / noise``.
        noise: s2 > 0, the variance of a target around its mean. It scales variances, and process noise against it.
        decay: in (0, 1].
        process_noise: q2 >= 0. Costs ``O(D^3)`` an update.
        window: how many rows to keep; takes neither decay nor process noise.
        process_group: over which processes a batch is spread: ``"auto"`` (all, where a default group is initialised),
            a group, or None for this process alone. Rows are gathered, every rank learns all of them, and the gradient
            is scaled so that DDP's mean over ranks is that of the global loss.
        dtype: of the state, float64 or float32, whatever that of the features.
        device: where it lives.

    The state is in the state_dict (``filter.*``), the options (``noise``, which scales variances, say) are not. It
    keeps its dtypes under ``half()`` and ``parent.to(dtype)``. There are no parameters: an optimiser has nothing to
    pass over. A batch that is refused, for NaN say, leaves it as it was.

    Not under ``fullgraph=True`` nor ``torch.export`` with a window: which rows leave depends on how many came.

    Example:
        >>> import torch
        >>> from cfl_ops.learn import RecursiveHead
        >>> head = RecursiveHead(2, 1, bias=False, noise=0.5)
        >>> loss = head.step(torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0]]))
        >>> head.weight
        tensor([[1., 0.]], dtype=torch.float64)
        >>> mean, variance = head.predict(torch.eye(2), return_variance=True)
        >>> variance
        tensor([0.7500, 1.0000])

    """

    name = NAME

    @makes_state
    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        alpha: float = 1.0,
        noise: float = 1.0,
        decay: float = 1.0,
        process_noise: float = 0.0,
        window: int | None = None,
        process_group: Any = "auto",
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = checks.integer(NAME, "in_features", in_features, 0)
        self.out_features = checks.integer(NAME, "out_features", out_features, 0)
        self.has_bias = checks.flag(NAME, "bias", bias)
        if isinstance(process_group, str):
            checks.choice(NAME, "process_group", process_group, ("auto",))
        self.process_group = process_group
        decay = checks.number(NAME, "decay", decay, checks.SHARE)
        self.filter = RecursiveRidge(
            self.in_features + int(self.has_bias), self.out_features, alpha=alpha, noise=noise, forgetting=decay,
            process_noise=process_noise, window=window, dtype=dtype, device=device,
        )  # fmt: skip
        self._agreed = False

    @property
    def weight(self) -> Tensor:
        """``(K, D)``: W, a copy in the dtype of the state."""
        return self.filter.weight[:, : self.in_features]

    @property
    def bias(self) -> Tensor | None:
        """``(K,)``, a copy in the dtype of the state; None without one."""
        return self.filter.weight[:, -1] if self.has_bias else None

    @property
    def covariance(self) -> Tensor:
        """The covariance P of each target's weights, the bias last. Costs ``O(D^3)``."""
        return self.filter.covariance

    def forward(self, features: Tensor) -> Tensor:
        """The prediction ``features W^T + b`` of the present head, in the dtype of the features."""
        weight = self.filter.wide_weight
        bias = weight[:, -1] if self.has_bias else None
        return F.linear(features.double(), weight[:, : self.in_features], bias).to(features.dtype)

    def predict(self, features: Tensor, *, return_variance: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The mean ``(..., K)`` and, if asked for, the variance ``(...)`` of a target around it; without a graph.

        The variance is ``phi^T P phi + noise``, the same for all targets: noise, and what is not known of the weights.

        Args:
            features: ``(..., D)``.
            return_variance: whether to return ``(mean, variance)``.

        """
        checks.floating(NAME, "features", features, 1)
        checks.size(NAME, "features", features, -1, self.in_features, "the head's in_features")
        return_variance = checks.flag(NAME, "return_variance", return_variance)
        return self.filter.predict(self._with_ones(features.detach()), return_variance=return_variance)

    def _with_ones(self, features: Tensor) -> Tensor:
        if not self.has_bias:
            return features
        return torch.cat((features, features.new_ones(*features.shape[:-1], 1)), -1)

    # Solving

    def _rows(self, features: Any, target: Any, sample_weight: Any, together: bool) -> Batch:
        try:
            batch = super()._rows(features, target, sample_weight, together)
            self._check_batch(batch)
        except Exception as error:
            group = group_of(self.process_group) if together else None
            if group is not None:
                self._agree(group, None, error)
            raise
        return batch

    def _check_batch(self, batch: Batch) -> None:
        """What the filter does not check itself, or under other names."""
        features, target, sample_weight, _ = batch
        checks.same_device(NAME, "the head", self.filter.factor, features=features, target=target,
                           sample_weight=sample_weight)  # fmt: skip
        if batch.classes and not is_compiling():
            check_classes(NAME, target, self.out_features)

    def _solve(self, batch: Batch) -> tuple[Tensor, Tensor]:
        group = group_of(self.process_group)
        if group is None:
            return self._solve_here(batch)
        ranks = self._agree(group, batch, None)
        try:
            loss, grad = self._solve_here(
                distributed.gather_rows(ranks, of_their_kind(ranks, batch, self.out_features))
            )
        except ValueError as error:
            ranks.explain_rows(error)
            raise
        return loss, grad[ranks.mine] * ranks.size

    def _solve_here(self, batch: Batch) -> tuple[Tensor, Tensor]:
        target = batch.target
        if batch.classes:
            own = target.unsqueeze(-1) == torch.arange(self.out_features, device=target.device)
            target = own.to(self.filter.factor.dtype)
        try:
            self.filter.update(self._with_ones(batch.features), target, batch.sample_weight)
        except ValueError as error:
            raise _in_our_words(error) from None
        return self._evaluate_here(batch)

    def _evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        # An evaluation of one rank alone must not wait for the others.
        group = group_of(self.process_group) if self.training else None
        if group is None:
            return self._evaluate_here(batch)
        ranks = self._agree(group, batch, None, solve=False)
        loss, grad = self._evaluate_here(
            distributed.gather_rows(ranks, of_their_kind(ranks, batch, self.out_features))
        )
        return loss, grad[ranks.mine] * ranks.size

    def _evaluate_here(self, batch: Batch) -> tuple[Tensor, Tensor]:
        batch = batch.widened()
        features, target, sample_weight, _ = batch
        if sample_weight is not None:  # a row of weight 0 is missing, whatever it holds
            there = (sample_weight > 0).unsqueeze(-1)
            features = torch.where(there, features, 0.0)
            target = target if batch.classes else torch.where(there, target, 0.0)
        weight = self.filter.weight
        bias = weight[:, -1] if self.has_bias else None
        rows = Batch(features, target, sample_weight)
        loss, grad = squared_loss(rows, weight[:, : self.in_features], bias)
        return loss.to(torch.promote_types(features.dtype, torch.float32)), grad

    def _agree(self, group: Any, batch: Batch | None, error: Exception | None, solve: bool = True) -> Ranks:
        """What all ranks have of a batch, before anything is changed; see :func:`distributed.agree`."""
        distributed.refuse_graph(NAME)
        model = self.filter
        facts: dict[str, float | Choice] = {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": Choice(self.has_bias, (False, True)),
            "alpha": model.alpha,
            "noise": model.noise,
            "decay": model.forgetting,
            "process_noise": model.process_noise,
            "window": model.window or 0,
            "dtype": Choice(model.factor.dtype, (torch.float32, torch.float64)),
            "solve": Choice(solve, (False, True)),
            **rows_facts(batch),
        }
        state = tuple(model.buffers())

        def repair() -> None:
            distributed.copy_from_first(NAME, group, state, not self._agreed)

        rows = 0 if batch is None else batch.features.shape[0]
        device = distributed.device_for(group, model.factor)
        ranks = distributed.agree(NAME, group, device, rows, False, facts, error, state, repair)
        self._agreed = True
        return ranks

    def extra_repr(self) -> str:
        """The options that the filter does not show."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}"


def _in_our_words(error: ValueError) -> ValueError:
    """An error of the filter, which calls the features x and the target y."""
    text = str(error)
    for theirs, ours in (
        ("RecursiveRidge.update: x ", f"{NAME}: features "),
        ("RecursiveRidge.update: x, y or", f"{NAME}: features, target or"),
        ("RecursiveRidge.update: y ", f"{NAME}: target "),
        ("RecursiveRidge.update: ", f"{NAME}: "),
    ):
        if theirs in text:
            ours_too = type(error)(text.replace(theirs, ours))
            ours_too.__dict__.update(error.__dict__)  # info
            return ours_too
    return error
