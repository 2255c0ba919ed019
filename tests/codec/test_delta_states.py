"""Deltas of state dicts and tensors of unusual kinds: lazy mappings, ties, many views, lazy conjugation, bad bools."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import cfl_ops
import pytest
import torch
from cfl_ops import WrongBaseError
from torch import Tensor

from tests.codec.helpers import same
from tests.codec.steps import stepped, weights


class Casting(Mapping[str, Tensor]):
    """Makes a tensor each time that one is read, as a view of a checkpoint that casts does."""

    def __init__(self, of: dict[str, Tensor]) -> None:
        self.of, self.reads = of, 0

    def __getitem__(self, key: str) -> Tensor:
        self.reads += 1
        return self.of[key].bfloat16()

    def __iter__(self) -> Iterator[str]:
        return iter(self.of)

    def __len__(self) -> int:
        return len(self.of)


def test_mappings_that_make_their_tensors_when_read() -> None:
    old = {f"w{i}": torch.randn(64, 8) for i in range(30)}
    new = {key: value * 1.01 for key, value in old.items()}
    old["empty"] = new["empty"] = torch.empty(0)
    lazy_new, lazy_old = Casting(new), Casting(old)
    delta = cfl_ops.compress_delta(lazy_new, lazy_old)
    assert lazy_new.reads == lazy_old.reads == len(old)
    got = cfl_ops.apply_delta(Casting(old), delta)
    for key, value in new.items():
        assert same(got[key], value.bfloat16())

    class Changing(dict[str, Tensor]):
        def __getitem__(self, key: str) -> Tensor:
            return super().__getitem__(key).clone()

    fresh = Changing({key: value.bfloat16() for key, value in old.items()})
    with pytest.raises(RuntimeError, match="old must give one tensor each time that 'w0' is read"):
        cfl_ops.apply_delta_(fresh, delta)
    tied = cfl_ops.compress_delta({"a": got["w0"], "b": got["w0"]}, {"a": old["w0"], "b": old["w0"]})
    assert tied["a"] is tied["b"]


def test_bools_that_are_neither_are_refused(backend: str) -> None:
    fine = torch.arange(40) % 3 == 0
    bad = (torch.arange(40, dtype=torch.uint8) % 3).view(torch.bool)
    for new, old in ((bad, fine), (bad, bad), (bad, bad[:7]), (bad.view(4, 10).mT, fine.view(10, 4))):
        with pytest.raises(ValueError, match="compress_delta: new must have the byte 0 or 1 in each bool"):
            cfl_ops.compress_delta(new, old)
    for base in ({}, {"w": fine}, {"w": torch.ones(3)}):
        with pytest.raises(ValueError, match=r"compress_delta: new\['w'\] must have the byte 0 or 1"):
            cfl_ops.compress_delta({"w": bad}, base)
    got = bad.view(torch.uint8).clone().view(torch.bool)  # as a base they are bytes as any others
    delta = cfl_ops.compress_delta(fine, bad)
    assert same(cfl_ops.apply_delta(bad, delta), fine)
    assert same(cfl_ops.apply_delta_(got, delta), fine)


def bits_of(parts: Tensor) -> Tensor:
    return parts.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[parts.element_size()])


@pytest.mark.parametrize("dtype", [torch.complex32, torch.complex64, torch.complex128])
@pytest.mark.parametrize("few", [True, False])
def test_lazy_conjugation_and_negation_keep_nan_payloads(dtype: torch.dtype, few: bool, backend: str) -> None:
    """The expected bits are made of integers: a conjugate is another sign of each imaginary part."""
    width = dtype.itemsize // 2
    ints = {2: torch.int16, 4: torch.int32, 8: torch.int64}[width]
    data = torch.randint(
        0, 256, (400 * width,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    parts = data.view(ints).view(10, 20, 2)
    nan = {2: 0x7C01, 4: 0x7F800001, 8: 0x7FF0000000000001}[width]  # signalling
    parts[::2, 3], parts[1, :, 1] = nan, nan + 2

    def plain(bits: Tensor) -> Tensor:
        return bits.clone().view(dtype).view(10, 20)

    def conjugate(bits: Tensor) -> Tensor:
        out = bits.clone()
        out[..., 1] ^= torch.iinfo(ints).min
        return out

    after = parts.clone()
    after[:: 5 if few else 1, ::7] ^= 1
    for turn in (lambda z: z.conj(), lambda z: z.mT.conj(), lambda z: torch._neg_view(z)):
        base, new = turn(plain(parts)), turn(plain(after))
        delta = cfl_ops.compress_delta(new, base)
        memory = plain(parts)
        cfl_ops.apply_delta_(turn(memory), delta)
        assert torch.equal(torch.view_as_real(memory).view(ints), after)
        kept = cfl_ops.apply_delta(turn(plain(parts)), delta)
        assert not kept.is_conj()
        assert not kept.is_neg()
        back = torch.view_as_real(kept).view(ints)
        if base.is_conj():
            assert torch.equal(back, conjugate(after if kept.shape[0] == 10 else after.transpose(0, 1)))
        else:
            assert torch.equal(back, after ^ torch.iinfo(ints).min)
    z = plain(parts).conj()  # another shape: as a whole
    whole = cfl_ops.apply_delta(torch.ones(3), cfl_ops.compress_delta(z, torch.ones(3)))
    assert torch.equal(torch.view_as_real(whole).view(ints), conjugate(parts))
    zeros = plain(torch.zeros_like(parts))  # the whole tensor is smaller, and put in place
    memory = plain(parts)
    cfl_ops.apply_delta_(memory.conj(), cfl_ops.compress_delta(zeros, memory.conj()))
    assert torch.equal(torch.view_as_real(memory).view(ints)[..., 0], torch.zeros(10, 20, dtype=ints))
    if dtype != torch.complex32:
        imaginary = plain(parts).conj().imag
        delta = cfl_ops.compress_delta(torch.zeros(10, 20).to(imaginary.dtype), imaginary)
        cfl_ops.apply_delta_(imaginary, delta)
        assert not bits_of(imaginary.resolve_neg()).any()


def test_it_is_the_result_only_where_all_of_it_is() -> None:
    w, v = weights(100), weights(50)
    old = {"a": w, "b": v}
    delta = cfl_ops.compress_delta({"a": stepped(w, 1e-4), "c": v}, old)
    result = cfl_ops.apply_delta(old, delta)
    wrong: list[tuple[dict[str, Tensor], bool]] = [
        (result, True),
        ({}, False),
        ({"a": w, "c": v}, False),
        ({"a": result["a"], "b": v}, False),
        ({"a": w}, False),
        ({"c": v}, False),
        ({"a": result["a"], "b": v, "c": v}, False),
        ({**result, "d": v}, False),
    ]
    for base, there in wrong:
        with pytest.raises(WrongBaseError) as caught:
            cfl_ops.apply_delta(base, delta)
        assert str(caught.value).endswith("; it already is the result") == there
        assert "other names" not in str(caught.value)
    left = cfl_ops.compress_delta({}, {"a": w})
    with pytest.raises(WrongBaseError, match="but got no such name; it already is the result"):
        cfl_ops.apply_delta({}, left)


def test_an_alias_may_go_where_memory_stays() -> None:
    for change, names in (
        (lambda w: {"p": w}, ["p"]),
        (lambda w: {"q": w}, ["q"]),
        (lambda w: {}, []),
        (lambda w: {"p": w, "q": w[:10]}, ["p", "q"]),
        (lambda w: {"p": w.float(), "q": w}, ["p", "q"]),
    ):
        w = weights(100)
        old, kept = {"p": w, "q": w}, w.clone()
        new = change(w)
        cfl_ops.apply_delta_(old, cfl_ops.compress_delta(new, old))
        assert sorted(old) == names
        assert all(same(old[key], new[key].contiguous()) for key in names)
        assert same(w, kept)
    for change in (lambda w: {"p": w}, lambda w: {"q": w}, lambda w: {"p": w, "q": w[:10]}):
        w = weights(100)
        old, kept = {"p": w, "q": w}, w.clone()
        with pytest.raises(RuntimeError, match=r"old\['[pq]'\] and old\['[pq]'\] must be changed alike"):
            cfl_ops.apply_delta_(old, cfl_ops.compress_delta(change(stepped(w, 1e-3)), old))
        assert same(w, kept)


def test_many_views_of_one_matrix() -> None:
    def views(m: Tensor) -> dict[str, Tensor]:
        return {f"column {i}": m[:, i] for i in range(m.shape[1])}

    m = weights(50 * 1000).view(50, 1000)
    after = stepped(m, 1e-3)
    old = views(m)
    delta = cfl_ops.compress_delta(views(after), old)
    begin = time.perf_counter()
    cfl_ops.apply_delta_(old, delta)
    assert time.perf_counter() - begin < 3
    assert same(m, after)
    for extra in (m[3, 6:8], m[49], m.view(torch.int16)[:1, 7]):
        base: dict[str, Any] = {**views(m), "extra": extra}
        kept = m.clone()
        new = {key: value.clone() for key, value in base.items()}
        new["column 5"].view(torch.int16)[3] ^= 1
        apart = cfl_ops.compress_delta(new, base)
        if extra.numel() == 1000:
            with pytest.raises(RuntimeError, match="must not share memory with"):
                cfl_ops.apply_delta_(base, apart)
            assert same(m, kept)
        else:
            cfl_ops.apply_delta_(base, apart)


def test_a_mapping_that_cannot_be_changed() -> None:
    w = weights(20)
    delta = cfl_ops.compress_delta({"w": w * 2}, {"w": w})
    fixed = MappingProxyType({"w": w})
    with pytest.raises(TypeError, match="old must be a mapping that can be changed, .* but got mappingproxy"):
        cfl_ops.apply_delta_(fixed, delta)  # type: ignore[call-overload]
    assert same(cfl_ops.apply_delta(fixed, delta)["w"], w * 2)
