"""A call made of a seed and a number: a sample's arguments, and what is done to them, step by step.

Each step has a random generator of its own, so that a call without some of its steps is the same otherwise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.guarded import Region, dense_strides, place
from tests.fuzz.targets import Target

DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
    *(torch.complex64, torch.complex128, torch.complex32),
)
INTS = (-1, 0, 1, 2, 3, 5, 8, 15, 16, 17, 31, 64, 255, 2**15, 2**16, 10**9, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62,
        2**63 - 1, -(2**63))  # fmt: skip
FLOATS = (float("nan"), float("inf"), float("-inf"), -1.0, 0.0, -0.0, 0.5, 1.0, 2.0, 1e-320, 1e-30, 1e30, 1e308,
          -1e308)  # fmt: skip
WORDS = ("", "junk", "loo", "folds", "mean", "sum", "none", "penalized", "free", "auto", "gram", "woodbury", "dual",
         "primal", "relu", "gelu", "identity", "tanh", "tensor", "row", "block", "refuse", "keep", "\0", "ä" * 3,
         "x" * 5000)  # fmt: skip
MODES = ("plain",) * 6 + ("no_grad", "no_grad", "inference_mode", "requires_grad")
VALID_LAYOUTS = ("dense", "dense", "dense", "offset", "column-major", "every other", "padded rows")
WRITTEN_LAYOUTS = VALID_LAYOUTS[:4]
"""Not every op writes to any strides."""
OTHER_LAYOUTS = ("column-major", "every other", "padded rows", "overlapping", "expanded", "negative bit",
                 "conjugate bit", "meta", "sparse", "sparse_csr", "mkldnn")  # fmt: skip
MOST_ELEMENTS = 1 << 17


@dataclass
class Slot:
    """An argument, and where its tensor is to lie."""

    value: Any
    layout: str = "dense"
    at_end: bool = True
    alias: tuple[int, str] | None = None


@dataclass
class Call:
    target: Target
    sample: str
    mode: str
    slots: list[Slot]
    steps: list[str] = field(default_factory=list)
    """What was done to the sample; empty for a valid call."""
    count: int = 0
    """The steps that there are, with those left out."""

    @property
    def valid(self) -> bool:
        return not self.count


def make_call(targets: Sequence[Target], seed: int, index: int, keep: Sequence[int] | None = None) -> Call:
    """The call of a number; ``keep`` are the steps to take, all by default."""
    rng = random.Random(f"{seed}:{index}")
    target = rng.choice(targets)
    sample, make = rng.choice(target.samples)
    layouts = [WRITTEN_LAYOUTS if i in target.writes else VALID_LAYOUTS for i in range(len(target.arguments))]
    slots = [Slot(value, rng.choice(layouts[i]), rng.random() < 0.5) for i, value in enumerate(make())]
    call = Call(target, sample, rng.choice(MODES), slots)
    call.count = 0 if rng.random() < 0.25 else rng.choice((1, 1, 1, 1, 2, 2, 3, 4))
    for step in range(call.count):
        if keep is None or step in keep:
            call.steps.append(f"{step}: {_mutate(call, random.Random(f'{seed}:{index}:{step}'))}")
    return call


def _mutate(call: Call, rng: random.Random) -> str:
    position = rng.randrange(len(call.slots))
    slot, kind, name = call.slots[position], call.target.kinds[position], call.target.arguments[position]
    choices: list[Callable[[random.Random, Call, int], str]] = [_swap] if rng.random() < 0.05 else []
    if not choices:
        value = slot.value
        if isinstance(value, Tensor):
            choices = [_shape, _shape, _dtype, _values, _layout, _alias]
            if kind in ("Tensor?", "any"):
                choices.append(_none)
        elif kind in ("Tensor?", "Tensor"):
            choices = [_given]
        elif kind == "Tensor[]" and isinstance(value, list):
            choices = [_tensor_list]
        else:
            choices = [_scalar]
    mutation = rng.choice(choices)
    try:
        return f"{name}: {mutation(rng, call, position)}"
    except (RuntimeError, NotImplementedError, TypeError):
        return f"{name}: unchanged, torch does not do {mutation.__name__[1:]} of this dtype"


def _generator(rng: random.Random) -> torch.Generator:
    return torch.Generator().manual_seed(rng.getrandbits(40))


def _swap(rng: random.Random, call: Call, position: int) -> str:
    other = rng.randrange(len(call.slots))
    call.slots[position], call.slots[other] = call.slots[other], call.slots[position]
    return f"swapped with {call.target.arguments[other]}"


def resize(t: Tensor, dim: int, size: int) -> Tensor:
    """Rows repeated or left out, so that values stay such as they were."""
    if t.shape[dim] == 0:
        shape = list(t.shape)
        shape[dim] = size
        return t.new_zeros(shape)
    return t.index_select(dim, torch.arange(size) % t.shape[dim])


def _shape(rng: random.Random, call: Call, position: int) -> str:
    slot = call.slots[position]
    t = slot.value
    if t.ndim == 0 or rng.random() < 0.15:
        shape = [rng.choice((0, 1, 2, 3, 7)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 4)))]
        if rng.random() < 0.1:
            shape = [1] * 65 + shape
        slot.value = torch.randint(0, 3, shape, generator=_generator(rng)).to(t.dtype)
        return f"made anew {_sizes(shape)}"
    dim = rng.randrange(t.ndim)
    kind = rng.choice(("size", "size", "size", "size", "drop", "add", "add", "permute", "0-d", "empty"))
    if kind == "size":
        sizes = (t.shape[dim] + 1, max(t.shape[dim] - 1, 0), 0, 2 * t.shape[dim], 1)
        size = rng.choice(sizes)
        if t.numel() // max(t.shape[dim], 1) * size <= MOST_ELEMENTS:
            slot.value = resize(t, dim, size)
        return f"size {dim} is {size}"
    if kind == "drop":
        slot.value = t.select(dim, 0) if t.shape[dim] else t.sum(dim).to(t.dtype)
    elif kind == "add":
        times = rng.choice((1, 1, 2, 3))
        slot.value = t.unsqueeze(dim).expand(*t.shape[:dim], times, *t.shape[dim:])
        return f"dimension {dim} of {times} added"
    elif kind == "permute":
        slot.value = t.permute(rng.sample(range(t.ndim), t.ndim))
    elif kind == "0-d":
        slot.value = t.flatten()[0] if t.numel() else t.new_zeros(())
    else:
        slot.value = t.new_zeros([0] if rng.random() < 0.5 else [0] * t.ndim)
    return f"{kind} {dim}"


def _dtype(rng: random.Random, call: Call, position: int) -> str:
    slot = call.slots[position]
    dtype = rng.choice(DTYPES)
    slot.value = _cast(slot.value, dtype)
    return f"to {dtype}"


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    if t.is_complex() and not dtype.is_complex:
        t = t.real
    return t.to(dtype)


def _values(rng: random.Random, call: Call, position: int) -> str:
    slot = call.slots[position]
    # A copy: case.make may give the same tensor again.
    t = slot.value = slot.value.clone(memory_format=torch.contiguous_format)
    if t.numel() == 0:
        return "no value"
    if t.dtype.is_floating_point or t.is_complex():
        value: Any = rng.choice((*FLOATS, 1e-44, 1e38, 6e4))
    elif t.dtype == torch.bool:
        value = rng.random() < 0.5
    else:
        info = torch.iinfo(t.dtype)
        value = max(min(rng.choice((*INTS, info.min, info.max, info.max - 1)), info.max), info.min)
    flat = t.view(-1)
    if rng.random() < 0.25:
        flat.copy_(torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None))
        return f"all {value}"
    if t.dtype == torch.uint8 and rng.random() < 0.7:
        for _ in range(rng.choice((1, 1, 3))):  # a payload's bytes
            flat[rng.randrange(min(len(flat), rng.choice((30, 200, 10**9))))] = rng.randrange(256)
        return "bytes overwritten"
    where = rng.randrange(len(flat))
    flat[where] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None).to(t.dtype)
    return f"element {where} is {value}"


def _layout(rng: random.Random, call: Call, position: int) -> str:
    call.slots[position].layout = rng.choice(OTHER_LAYOUTS)
    return call.slots[position].layout


def _alias(rng: random.Random, call: Call, position: int) -> str:
    others = [i for i, slot in enumerate(call.slots) if i != position and isinstance(slot.value, Tensor)]
    written = [i for i in others if i in call.target.writes]
    if not others:
        return "nothing to alias"
    other = rng.choice(written if written and rng.random() < 0.7 else others)
    how = rng.choice(("the same tensor", "the same memory", "overlaps"))
    call.slots[position].alias = (other, how)
    return f"{how} as {call.target.arguments[other]}"


def _none(rng: random.Random, call: Call, position: int) -> str:
    call.slots[position].value = None
    return "None"


def _given(rng: random.Random, call: Call, position: int) -> str:
    """A tensor where none was: that of another argument, or a new one."""
    others = [slot.value for slot in call.slots if isinstance(slot.value, Tensor)]
    slot = call.slots[position]
    if others and rng.random() < 0.5:
        t = rng.choice(others)
        slot.value = t.select(-1, 0) if t.ndim and t.shape[-1] and rng.random() < 0.5 else t
        return "given as another argument"
    slot.value = torch.ones([rng.choice((1, 2, 3, 4, 7, 12)) for _ in range(rng.choice((0, 1, 1, 2, 3)))])
    return f"given as ones{[*slot.value.shape]}"


def _tensor_list(rng: random.Random, call: Call, position: int) -> str:
    slot = call.slots[position]
    change = rng.choice(("empty", "twice", "dtype", "0-d"))
    tensors = list(slot.value)
    slot.value = {
        "empty": [],
        "twice": tensors * 2,
        "dtype": [t.to(rng.choice(DTYPES)) for t in tensors],
        "0-d": [torch.tensor(3)],
    }[change]
    return change


def _scalar(rng: random.Random, call: Call, position: int) -> str:
    slot, kind = call.slots[position], call.target.kinds[position]
    value = slot.value
    if kind == "any" and rng.random() < 0.25:  # public functions take any object at all
        fresh: tuple[Any, ...] = (
            None,
            "junk",
            True,
            [],
            [1, -2],
            torch.ones(()),
            torch.ones(3),
            1j,
            2**70,
            -1,
            0.5,
        )
        slot.value = rng.choice(fresh)
    elif isinstance(value, bool):
        slot.value = not value
    elif kind == "dtype" or isinstance(value, torch.dtype):
        slot.value = rng.choice(DTYPES)
    elif isinstance(value, int):
        slot.value = rng.choice((*INTS, value - 1, value + 1))
    elif isinstance(value, float):
        slot.value = rng.choice(FLOATS)
    elif isinstance(value, str):
        slot.value = rng.choice(WORDS)
    elif isinstance(value, (list, tuple)):
        slot.value = _list(rng, list(value))
    elif kind == "any":
        slot.value = rng.choice((0, 3, 0.5, "junk", torch.ones(3), torch.float16, [1, 2]))
    return f"is {_brief(slot.value)}"


def _list(rng: random.Random, values: list[Any]) -> list[Any]:
    numbers = FLOATS if values and isinstance(values[0], float) else INTS
    change = rng.choice(("replace", "append", "drop", "junk", "many"))
    if change == "replace" and values:
        values[rng.randrange(len(values))] = rng.choice(numbers)
    elif change == "append":
        values.append(rng.choice(numbers))
    elif change == "drop":
        values = values[:-1]
    elif change == "many":
        values = [rng.choice((0, 1))] * rng.choice((64, 65, 71, 1000)) + values
    else:
        values = [rng.choice(numbers) for _ in range(rng.choice((1, 2, 3)))]
    return values


@dataclass
class Placed:
    """The arguments in guarded memory."""

    args: list[Any]
    regions: dict[int, Region]
    """By argument; those that share memory share a region."""

    def free(self) -> None:
        self.args.clear()
        for region in {id(region): region for region in self.regions.values()}.values():
            region.free()


def realize(call: Call) -> Placed:
    """Put the arguments into memory as the call says."""
    placed = Placed([slot.value for slot in call.slots], {})
    for i, slot in enumerate(call.slots):
        if isinstance(slot.value, Tensor) and slot.alias is None:
            try:
                placed.args[i], region = _place(slot)
            except (RuntimeError, NotImplementedError):  # of this dtype torch makes no such view
                placed.args[i], region = place(
                    slot.value, dense_strides(slot.value.shape), at_end=slot.at_end
                )
            if region is not None:
                placed.regions[i] = region
    for i, slot in enumerate(call.slots):
        if slot.alias is not None:
            _share(placed, i, *slot.alias, slot)
    if call.mode == "requires_grad":
        for i in call.target.differentiable:
            if i in placed.regions and placed.args[i].dtype in (torch.float32, torch.float64):
                placed.args[i] = placed.args[i].detach().requires_grad_()
    for region in placed.regions.values():
        region.remember()
    return placed


def _place(slot: Slot) -> tuple[Tensor, Region | None]:
    t, layout = slot.value, slot.layout
    if layout == "meta":
        return t.to("meta"), None
    if layout in ("sparse", "sparse_csr", "mkldnn"):
        try:
            return {"sparse": t.to_sparse, "sparse_csr": t.to_sparse_csr, "mkldnn": t.to_mkldnn}[
                layout
            ](), None
        except Exception:
            layout = "dense"  # torch makes none of this dtype or shape
    if t.ndim == 0:
        layout = "offset" if layout == "offset" else "dense"
    if layout == "negative bit" and t.dtype in _COMPLEX_OF:
        wide, region = place(torch.complex(t.float() * 0, -t.float()).to(_COMPLEX_OF[t.dtype]),
                             dense_strides(t.shape), at_end=slot.at_end)  # fmt: skip
        return wide.conj().imag, region
    if layout == "conjugate bit" and t.is_complex():
        wide, region = place(t.conj().resolve_conj(), dense_strides(t.shape), at_end=slot.at_end)
        return wide.conj(), region
    strides, offset = dense_strides(t.shape), 0
    if layout == "column-major":
        strides = dense_strides(t.shape, [*range(t.ndim - 2), t.ndim - 1, t.ndim - 2] if t.ndim > 1 else None)
    elif layout == "every other":
        strides = [2 * s for s in strides]
    elif layout == "padded rows" and t.ndim > 1:
        strides = [*dense_strides([*t.shape[:-1], t.shape[-1] + 3])[:-1], 1]
    elif layout == "offset":
        offset = 1
    elif layout == "overlapping":
        strides = [max(s // 2, 1) for s in strides]
    elif layout == "expanded":
        strides = [0 if d == 0 else s for d, s in enumerate(strides)]
        if t.numel():  # copy_ refuses memory that elements share
            one, region = place(t[:1], strides, at_end=slot.at_end)
            return one.expand(t.shape), region
    if layout == "overlapping" and t.numel():
        flat, region = place(
            t.reshape(-1)[: 1 + sum((n - 1) * s for n, s in zip(t.shape, strides, strict=True))],
            [1],
            at_end=slot.at_end,
        )
        return flat.as_strided(t.shape, strides), region
    return place(t, strides, offset, at_end=slot.at_end)


_COMPLEX_OF = {
    torch.float32: torch.complex64,
    torch.float64: torch.complex128,
    torch.float16: torch.complex32,
}


def _share(placed: Placed, position: int, other: int, how: str, slot: Slot) -> None:
    source = placed.args[other]
    if other not in placed.regions or not isinstance(
        source, Tensor
    ):  # it is an alias, None, or has no memory
        placed.args[position] = source if isinstance(source, Tensor) else slot.value
        return
    placed.regions[position] = placed.regions[other]
    shape = slot.value.shape if isinstance(slot.value, Tensor) else source.shape
    room = source.untyped_storage().nbytes() // source.element_size()
    needed = max(shape.numel(), 1)
    if how == "the same tensor" or source.is_neg() or source.is_conj() or needed > room:
        placed.args[position] = source
    elif how == "the same memory":
        placed.args[position] = source.detach().as_strided(
            source.shape, source.stride(), source.storage_offset()
        )
    else:
        placed.args[position] = source.detach().as_strided(shape, dense_strides(shape), room - needed)


def describe(call: Call) -> Iterator[str]:
    """The call in lines, for people."""
    placed = realize(call)
    what = "; ".join(call.steps) if call.steps else "valid"
    yield f"{call.target.name} [{call.sample}], {call.mode}: {what}"
    for name, arg, slot in zip(call.target.arguments, placed.args, call.slots, strict=True):
        alias = f", {slot.alias[1]} as {call.target.arguments[slot.alias[0]]}" if slot.alias else ""
        edge = f", {'ends' if slot.at_end else 'begins'} at a guard page" if isinstance(arg, Tensor) else ""
        yield f"    {name} = {_brief(arg)}{alias or edge}"
    placed.free()


def _sizes(sizes: Sequence[int]) -> str:
    return (
        str(list(sizes))
        if len(sizes) < 9
        else f"[{sizes[0]}, {sizes[1]}, ... {len(sizes)} of them, {sizes[-1]}]"
    )


def _brief(value: Any) -> str:
    if not isinstance(value, Tensor):
        few = isinstance(value, list) and len(value) < 9
        text = f"[{', '.join(map(_brief, value))}]" if few else repr(value)
        return text if len(text) < 120 else f"{text[:100]}... ({len(text)} characters)"
    text = f"{str(value.dtype)[6:]}{_sizes(value.shape)}"
    if value.layout != torch.strided:
        return f"{text} {value.layout}"
    if value.is_meta:
        return f"{text} meta"
    if not value.is_contiguous():
        text += f" strides {_sizes(value.stride())}"
    bits = [name for name, on in (("neg", value.is_neg()), ("conj", value.is_conj())) if on]
    if 0 < value.numel() <= 6 and value.dtype.itemsize > 1:
        text += f" = {value.tolist()}"
    return " ".join([text, *bits])
