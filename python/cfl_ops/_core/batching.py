"""Batch dimensions: one common shape for all arguments, and the one vmap rule that serves every op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CoreDims = Callable[[Sequence[Any]], Sequence[int | None]]


def expand_batch(
    args: Sequence[Any], core_dims: Sequence[int | None], batch: Sequence[int] | None = None
) -> list[Any]:
    """Expand (as views) the batch dimensions of all tensors to the common batch shape.

    A 0-d tensor where the op works on 0 dimensions (a penalty) stays as it is: it serves every batch.
    """
    if batch is None:
        batch = torch.broadcast_shapes(
            *(
                arg.shape[: arg.ndim - core]
                for arg, core in zip(args, core_dims, strict=True)
                if core is not None and arg is not None
            )
        )

    def expand(arg: Any, core: int | None) -> Any:
        if core is None or arg is None or arg.ndim == 0 or arg.shape[: arg.ndim - core] == tuple(batch):
            return arg
        return arg.expand(*batch, *arg.shape[arg.ndim - core :])

    return [expand(arg, core) for arg, core in zip(args, core_dims, strict=True)]


def vmap_rule(op: Callable[..., Any], schema: Any, declared: CoreDims) -> Callable[..., tuple[Any, Any]]:
    """How ``op`` is called for all mapped calls at once; it may be under further transforms."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        core_dims = declared(args)
        batch_ndim = max(
            arg.ndim - core - (dim is not None)
            for arg, core, dim in zip(args, core_dims, in_dims, strict=True)
            if core is not None and arg is not None
        )

        def front(arg: Any, core: int | None, dim: int | None) -> Any:
            if core is None or arg is None or dim is None:
                return arg
            arg = arg.movedim(dim, 0)
            missing = batch_ndim - (arg.ndim - core - 1)
            return arg.reshape(arg.shape[:1] + (1,) * missing + arg.shape[1:]) if missing else arg

        moved = [front(*item) for item in zip(args, core_dims, in_dims, strict=True)]
        expanded = expand_batch(moved, core_dims)
        for argument, before, after in zip(schema.arguments, moved, expanded, strict=True):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and before is not None and before.shape != after.shape:
                raise RuntimeError(
                    f"{schema.name.replace('::', '.')}: vmap cannot update {argument.name} in "
                    "place, which is shared by the mapped calls"
                )
        out = op(*expanded)
        if out is None:
            return None, None
        return (out, 0) if isinstance(out, Tensor) else (out, tuple(0 for _ in out))

    return rule
