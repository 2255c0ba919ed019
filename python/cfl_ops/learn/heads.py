"""Several solved heads on one backbone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cfl_ops._core import checks

from .head import Head

__all__ = ["ClosedFormHeads"]

NAME = "learn.ClosedFormHeads"


class ClosedFormHeads(nn.Module):
    """Several heads, each of its own targets and options, on the same features or each on its own.

    Every head is solved on the batch; the loss is the weighted sum of theirs, and the features that heads share get the
    sum of their gradients, in one backward pass.

    Args:
        heads: by name.
        weights: of the losses, 1 by default. A head of weight 0 is solved and does not touch the backbone.

    Example:
        >>> import torch
        >>> from cfl_ops.learn import ClosedFormHeads, ClosedFormLinear
        >>> heads = ClosedFormHeads({"digit": ClosedFormLinear(8, 10), "slant": ClosedFormLinear(8, 1, lam=0.1)})
        >>> backbone = torch.nn.Linear(4, 8)
        >>> target = {"digit": torch.randint(10, (16,)), "slant": torch.randn(16, 1)}
        >>> loss = heads.loss(backbone(torch.randn(16, 4)), target)
        >>> loss.backward()
        >>> {name: tuple(out.shape) for name, out in heads(torch.randn(2, 8)).items()}
        {'digit': (2, 10), 'slant': (2, 1)}

    """

    def __init__(self, heads: Mapping[str, Head], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        for name, head in heads.items():
            if not isinstance(head, Head):
                raise TypeError(
                    f"cfl_ops.{NAME}: heads[{name!r}] must be a head, but got {type(head).__name__}"
                )
        self.heads = nn.ModuleDict(heads)
        unknown = set(weights or {}) - set(heads)
        if unknown:
            raise ValueError(
                f"cfl_ops.{NAME}: weights names {sorted(unknown)}, but the heads are {sorted(heads)}"
            )
        self.weights = {
            name: checks.number(
                NAME, f"weights[{name!r}]", (weights or {}).get(name, 1.0), checks.NOT_NEGATIVE
            )
            for name in heads
        }

    def __getitem__(self, name: str) -> Head:
        """One of the heads."""
        head = self.heads[name]
        assert isinstance(head, Head)
        return head

    def _each(self, argument: str, value: Any) -> dict[str, Any]:
        """A value for each head: that of its name, or the same for all."""
        if not isinstance(value, Mapping):
            return dict.fromkeys(self.heads, value)
        if value.keys() != self.weights.keys():
            raise ValueError(
                f"cfl_ops.{NAME}: {argument} must name the heads {sorted(self.heads)}, but got {sorted(value)}"
            )
        return dict(value)

    def forward(self, features: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The predictions by name."""
        each = self._each("features", features)
        return {name: head(each[name]) for name, head in self.heads.items()}

    def losses(
        self,
        features: Tensor | Mapping[str, Tensor],
        target: Tensor | Mapping[str, Tensor],
        *,
        sample_weight: Tensor | Mapping[str, Tensor | None] | None = None,
        solve: bool | None = None,
    ) -> dict[str, Tensor]:
        """The losses of :meth:`Head.loss` by name, not weighted. Each argument is for all heads, or a dict by name."""
        given = self._each("features", features), self._each("target", target)
        weight = self._each("sample_weight", sample_weight)
        return {
            name: self[name].loss(given[0][name], given[1][name], sample_weight=weight[name], solve=solve)
            for name in self.heads
        }

    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The weighted sum of :meth:`losses`, which takes the arguments: ``loss.backward()`` trains the backbone."""
        return torch.stack(
            [self.weights[name] * loss for name, loss in self.losses(*args, **kwargs).items()]
        ).sum()

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """:meth:`loss` and its backward pass; the loss without a graph."""
        loss = self.loss(*args, **kwargs)
        if loss.requires_grad:
            torch.autograd.backward(loss)
        return loss.detach()
