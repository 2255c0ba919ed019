"""tied: a state dict with each tensor once, and the further names of those that have several."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

from cfl_ops._core import checks
from cfl_ops.ops.codec.bits import resolved

__all__: list[str] = []


def has_memory(value: Tensor) -> bool:
    """Whether it has data of its own: subclasses that wrap other tensors, and torch's fake ones, have none."""
    if type(value).__torch_dispatch__ is Tensor.__torch_dispatch__:
        return True
    if isinstance(value, FakeTensor) or not value.numel():
        return False
    try:
        value.untyped_storage().data_ptr()
    except RuntimeError:
        return False
    return True


def memory(value: Tensor) -> tuple[object, ...]:
    """What tied tensors, and only they, have in common."""
    if is_lazy(value) or value.is_meta or not value.numel() or not has_memory(value):
        return (id(value),)
    return (
        *(value.device, value.data_ptr(), value.shape),
        *(value.stride(), value.dtype, value.is_conj(), value.is_neg()),
    )


class Distinct(Mapping[str, Tensor]):
    """A checked view of a state dict without the further names of its tensors.

    Two names are tied where their tensors are the same elements of the same memory: a change of one is a change of the
    other. ``aliases`` gets each further name, with the first one, when ``items()`` passes it. Only tensors that live at
    the same time can be told to share memory, so the values of a mapping that makes them when they are asked for are
    never tied.
    """

    def __init__(self, op: str, state_dict: Any) -> None:
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                f"cfl_ops.{op}: state_dict must map names to tensors, but got {type(state_dict).__name__}"
            )
        self._op, self._state_dict = op, state_dict
        self.aliases: dict[str, str] = {}
        for key in state_dict:
            if not isinstance(key, str):
                raise TypeError(f"cfl_ops.{op}: state_dict must have strings as keys, but got {key!r}")

    def __getitem__(self, name: str) -> Tensor:
        return self._checked(name, self._state_dict[name])

    def __len__(self) -> int:
        return len(self._state_dict) - len(self.aliases)

    def __iter__(self) -> Iterator[str]:
        for name, _ in self._pairs():
            yield name

    def items(self) -> Any:
        """As a dict's, but one after the other."""
        return self._pairs()

    def _checked(self, name: str, value: Any) -> Tensor:
        checks.tensor(self._op, f"state_dict[{name!r}]", value, 0)
        if value.is_meta:
            raise ValueError(
                f"cfl_ops.{self._op}: state_dict[{name!r}] must hold data, but it is on the meta device"
            )
        if not has_memory(value):
            raise TypeError(
                f"cfl_ops.{self._op}: state_dict[{name!r}] must be a plain tensor, but got {type(value).__name__}, "
                "whose data are others' (full_tensor(), to_local() or dequantize() may make one of it)"
            )
        return resolved(value.detach())

    def _pairs(self) -> Iterator[tuple[str, Tensor]]:
        seen: dict[Any, tuple[str, weakref.ref[Tensor]]] = {}
        for name, value in self._state_dict.items():
            tensor = self._checked(name, value)
            if value.numel():
                key = memory(value)
                first = seen.get(key)
                if first is not None and first[1]() is not None:
                    self.aliases[name] = first[0]
                    continue
                seen[key] = name, weakref.ref(value)
            del value
            yield name, tensor
            del tensor
