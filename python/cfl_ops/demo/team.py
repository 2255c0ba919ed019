"""The processes that train together with ``--distributed``, as the training sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ALONE", "Team"]

Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Team:
    """One process among those of a process group; alone it talks to nobody."""

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls) -> Team:
        """The team of the default process group."""
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    def share(self, batch: Batch) -> Batch:
        """The rows of a batch that are for this process; every process gets one at least where there are enough."""
        if self.size == 1:
            return batch
        x, y, dense = (part.tensor_split(self.size)[self.rank] for part in batch)
        return x, y, dense

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all must ask. The answer is the same in all."""
        if self.size == 1:
            return flag
        flags = torch.tensor([int(flag)])
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        return bool(flags.item())

    def together(self, flag: Callable[[], bool]) -> Callable[[], bool]:
        """A function that all processes call alike, which tells whether ``flag`` is set in any of them."""
        return lambda: self.any(flag())


ALONE = Team()
