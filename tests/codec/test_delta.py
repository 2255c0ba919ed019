"""Deltas: bit for bit back, on no other base, and never silently wrong."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cfl_ops
import pytest
import torch
from cfl_ops import CorruptDataError, WrongBaseError
from cfl_ops.ops.codec.bits import copyable
from cfl_ops.ops.codec.delta import describe_delta
from cfl_ops.ops.codec.fingerprint import fingerprint_of
from cfl_ops.ops.codec.layout import DTYPES
from torch import Tensor

from tests.codec.helpers import same
from tests.codec.steps import stepped, weights

EFFORTS = ("fast", "small")


def random_bits(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Of all that the dtype has, NaN payloads, infinities and denormals among it."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, (n,), generator=generator).bool()
    bits = torch.randint(0, 256, (n * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return bits.view(dtype)


def copied(w: Tensor) -> Tensor:
    """With the strides kept; torch does not copy some dtypes."""
    return copyable(w).clone(memory_format=torch.preserve_format).view(w.dtype)


def some_changed(old: Tensor, every: int) -> Tensor:
    """A copy in which the bits of one of each ``every`` elements are others."""
    new = copied(old)
    bits = new.view(torch.uint8)
    size = old.element_size()
    bits.view(-1, size)[::every, 0] ^= 1
    if size > 1:
        bits.view(-1, size)[:: 3 * every, size - 1] ^= 0x80
    return new


def check(new: Any, old: Any, effort: str = "fast") -> Any:
    """The delta, which gives new from old in both ways."""
    kept = copied(old)
    delta = cfl_ops.compress_delta(new, old, effort=effort)
    assert same(cfl_ops.apply_delta(old, delta), new)
    assert same(old, kept)
    target = copied(old)
    assert cfl_ops.apply_delta_(target, delta) is target
    assert same(target, new)
    found = describe_delta(delta)
    assert (found.shape, found.dtype, found.effort) == (tuple(new.shape), new.dtype, effort)
    assert found.nbytes == delta.numel()
    return delta


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("dtype", [*DTYPES[:23], torch.uint7, torch.bits16])
def test_every_dtype_bit_for_bit(dtype: torch.dtype, effort: str, backend: str) -> None:
    old = random_bits(3000, dtype)
    for every in (1, 2, 40, 5000):
        check(some_changed(old, every), old, effort)
    assert describe_delta(check(copied(old), old, effort)).kind == "same"
    check(random_bits(3000, dtype, seed=1), old, effort)


@pytest.mark.parametrize("effort", EFFORTS)
def test_shapes_and_strides(effort: str, backend: str) -> None:
    for shape in ((), (1,), (0,), (3, 0, 2), (7,), (5, 13), (2, 3, 4, 5)):
        old = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        new = old + 1
        check(new, old, effort)
        check(old, old, effort)
    old = torch.randn(60, 50).half()
    new = stepped(old, 1e-4)
    for view in (lambda t: t.mT, lambda t: t[::3, 5:], lambda t: t[:, ::7], lambda t: t[1:].flatten()[3:]):
        base = view(old.clone())
        delta = cfl_ops.compress_delta(view(new), base, effort=effort)
        assert same(cfl_ops.apply_delta(base, delta), view(new))
        cfl_ops.apply_delta_(base, delta)
        assert same(base, view(new))
    expanded = torch.ones(1, 4).expand(3, 4)
    delta = cfl_ops.compress_delta(torch.zeros(3, 4), expanded)
    assert same(cfl_ops.apply_delta(expanded, delta), torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match="old must not share memory between its elements"):
        cfl_ops.apply_delta_(expanded, delta)
    z = torch.randn(20, dtype=torch.complex64)
    delta = cfl_ops.compress_delta(z.conj(), z)
    assert same(cfl_ops.apply_delta(z, delta), z.conj().resolve_conj())
    turned = z.clone().conj()
    cfl_ops.apply_delta_(turned, cfl_ops.compress_delta(z, turned))
    assert same(turned.resolve_conj(), z)
    assert same(cfl_ops.apply_delta(z.conj(), cfl_ops.compress_delta(z, z.conj())), z)


def test_special_values(backend: str) -> None:
    old = torch.zeros(64)
    new = old.clone()
    new[3], new[10], new[20], new[30] = -0.0, torch.nan, -torch.inf, 5e-45
    new.view(torch.int32)[40] = 0x7F812345  # a signalling NaN
    check(new, old)
    check(old, new)


def cases() -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, new, old."""
    old = weights(1 << 16)
    yield "few", stepped(old, 4e-6), old
    yield "a third", stepped(old, 4e-5), old
    yield "most", stepped(old, 1e-3), old
    row = old.view(256, 256).clone()
    row[17] = weights(256, seed=5)
    yield "a row", row, old.view(256, 256)
    yield "unrelated", weights(1 << 16, seed=9), old
    yield "to zeros", torch.zeros_like(old), old
    yield "from zeros", old, torch.zeros_like(old)
    master = weights(30_000, torch.float32)
    yield "float32", stepped(master, 1e-5), master
    yield "float64", stepped(master.double(), 1e-5), master.double()
    counts = torch.arange(40_000, dtype=torch.int64)
    yield "counters", counts + 1, counts
    yield "few counters", torch.where(counts % 97 == 0, counts * 3, counts), counts
    sparse = torch.zeros(40_000, dtype=torch.int32)
    sparse[::1000] = 5
    yield "emptied", torch.zeros_like(sparse), sparse
    mask = torch.arange(50_000) % 7 == 0
    yield "flags", ~mask, mask
    yield "signs", -old, old
    bits = torch.arange(40_000, dtype=torch.int32)
    yield "bits", bits ^ 0x00400000, bits


CASES = {name: (new, old) for name, new, old in cases()}


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", CASES)
def test_never_much_larger_than_the_tensor_compressed(name: str, effort: str) -> None:
    new, old = CASES[name]
    delta = check(new, old, effort)
    whole = cfl_ops.compress(new, lossless=True)
    assert delta.numel() <= whole.numel() + 200, describe_delta(delta)


@pytest.mark.parametrize("name", CASES)
def test_small_is_never_larger_than_fast(name: str) -> None:
    new, old = CASES[name]
    fast, small = (cfl_ops.compress_delta(new, old, effort=effort).numel() for effort in EFFORTS)
    assert small <= fast + 60


def test_kinds() -> None:
    kinds = {name: describe_delta(cfl_ops.compress_delta(*pair)).kind for name, pair in CASES.items()}
    assert kinds["few"] == kinds["a row"] == kinds["few counters"] == "changed"
    assert kinds["most"] == kinds["float32"] == kinds["counters"] == "dense"
    assert kinds["signs"] == kinds["bits"] == kinds["flags"] == "dense"
    assert kinds["to zeros"] == kinds["unrelated"] == "replaced"
    old = weights(1 << 16)
    for effort in EFFORTS:
        assert describe_delta(cfl_ops.compress_delta(old, old, effort=effort)).kind == "same"
    # 2^16 weights after a small step: about 1.8 % of them changed.
    new, old = CASES["few"]
    found = describe_delta(cfl_ops.compress_delta(new, old))
    assert found.changed == int((new.view(torch.int16) != old.view(torch.int16)).sum())
    assert 2 * old.numel() > 35 * found.nbytes
    assert found.raw_nbytes == 2 * old.numel()
    for name in ("bits", "signs", "flags", "counters"):  # one value, whatever it is
        assert cfl_ops.compress_delta(*CASES[name]).numel() < 200
    narrow = old.float()  # bf16 in float32 takes no more
    wide = cfl_ops.compress_delta(new.float(), narrow).numel()
    assert wide <= found.nbytes + 2


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("name", CASES)
def test_backends_and_threads_write_the_same_bytes(name: str, effort: str, backend: str) -> None:
    new, old = CASES[name]
    got = cfl_ops.compress_delta(new, old, effort=effort)
    torch.set_num_threads(3)  # back to one by the fixture
    assert torch.equal(got, cfl_ops.compress_delta(new, old, effort=effort))
    assert same(cfl_ops.apply_delta(old, got), new)
    assert zlib.crc32(bytes(got.tolist())) == _expected(name, effort)


_CRCS: dict[tuple[str, str], int] = {}


def _expected(name: str, effort: str) -> int:
    """Of the bytes that the first backend to ask writes."""
    new, old = CASES[name]
    if (name, effort) not in _CRCS:
        delta = cfl_ops.compress_delta(new, old, effort=effort)
        _CRCS[name, effort] = zlib.crc32(bytes(delta.tolist()))
    return _CRCS[name, effort]


def test_blocks_and_threads(backend: str) -> None:
    """Several blocks of raw bits, words at the end that are not full, and parts of several threads."""
    n = (1 << 18 if backend != "python" else 1 << 16) + 5
    for dtype in (torch.uint8, torch.bfloat16, torch.float32, torch.float64):
        old = random_bits(n, dtype)
        new = some_changed(old, 3)
        torch.set_num_threads(2)
        delta = cfl_ops.compress_delta(new, old)
        assert same(cfl_ops.apply_delta(old, delta), new)
        torch.set_num_threads(1)
        assert torch.equal(delta, cfl_ops.compress_delta(new, old))


# --- bases


def changed_bases(old: Tensor) -> Iterator[Tensor]:
    bits = old.view(torch.int16)
    for bit in range(16):
        for place in (0, 1, 100, old.numel() - 1):
            other = bits.clone()
            other.view(-1)[place] ^= (1 << bit) - (1 << 16 if bit == 15 else 0)
            yield other.view(old.dtype)
    for a, b in ((0, 1), (2, 7), (0, 15)):
        other = bits.clone()
        other[[a, b]] = other[[b, a]]
        yield other.view(old.dtype)  # rows
        other = bits.clone()
        other[:, [a, b]] = other[:, [b, a]]
        yield other.view(old.dtype)  # columns
        other = bits.clone()
        other[[a, b], 3] ^= -(1 << 15)
        yield other.view(old.dtype)  # two signs of a column
        other = bits.clone()
        other.view(-1)[[a, b]] = other.view(-1)[[b, a]]
        yield other.view(old.dtype)
    yield old + 0.0625
    yield old.roll(1)
    yield old.roll(4)


@pytest.mark.parametrize("kind", ["changed", "dense", "same", "replaced"])
def test_another_base_is_refused_and_nothing_changed(kind: str, backend: str) -> None:
    old = weights(16 * 40).view(16, 40)
    new = {
        "changed": stepped(old, 1e-5),
        "dense": stepped(old, 1e-3),
        "same": old.clone(),
        "replaced": torch.full_like(old, 0.5),
    }[kind]
    delta = cfl_ops.compress_delta(new, old)
    assert describe_delta(delta).kind == kind
    for base in changed_bases(old):
        kept = base.clone()
        for apply in (cfl_ops.apply_delta, cfl_ops.apply_delta_):
            with pytest.raises(WrongBaseError, match=r"old must be what the delta was made from, .* but got"):
                apply(base, delta)
        assert same(base, kept)
    for base in (old.view(40, 16), old.flatten(), old.view(torch.int16), old.half(), old[:15]):
        with pytest.raises(WrongBaseError, match=r"torch.bfloat16 of shape \(16, 40\), but got torch"):
            cfl_ops.apply_delta(base, delta)
    if kind != "same":
        with pytest.raises(WrongBaseError, match="apply_delta_: old .*; it already is the result"):
            cfl_ops.apply_delta_(new.clone(), delta)
    assert issubclass(WrongBaseError, ValueError)


def plain_fingerprint(w: Tensor) -> int:
    """docs/format.md's, in plain integers."""
    data = bytes(w.contiguous().view(-1).view(torch.uint8).tolist()) if w.numel() else b""
    total = 0
    for i in range(0, len(data), 8):
        t = (int.from_bytes(data[i : i + 8], "little") + (i // 8 + 1) * 0x9E3779B97F4A7C15) % 2**64
        product = t % 2**32 * (t >> 32)
        b = t ^ (product % 2**32 << 32 | product >> 32)
        total += b + b % 2**32 * (b >> 32)
    x = total + len(data) * 0xD6E8FEB86659FD93 + (DTYPES.index(w.dtype) + 1) * 0xA0761D6478BD642F
    x %= 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


def test_fingerprints_do_not_depend_on_layout_or_backend(backend: str) -> None:
    w = torch.arange(5000, dtype=torch.float32).view(50, 100)
    assert fingerprint_of(w) == fingerprint_of(w.mT.contiguous().mT) == plain_fingerprint(w)
    for n in (0, 1, 7, 8, 9, 63, 64, 65, 511, 512, 513, 2000):
        part = random_bits(n + 3, torch.uint8)[3:]
        assert fingerprint_of(part) == plain_fingerprint(part)
    assert fingerprint_of(torch.empty(0)) != fingerprint_of(torch.empty(0, dtype=torch.int32))
    some = torch.arange(100, dtype=torch.uint8)
    marks = {fingerprint_of(some[:n]) for n in range(100)} | {
        fingerprint_of(torch.zeros(n, dtype=torch.uint8)) for n in range(2, 100)
    }
    assert len(marks) == 198
    assert fingerprint_of(some[3:50]) == fingerprint_of(some[3:50].clone())


@pytest.mark.parametrize("kind", ["identity", "permutation", "one-hot", "mask", "differences"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.int64])
def test_fingerprints_tell_structured_matrices_apart(dtype: torch.dtype, kind: str, backend: str) -> None:
    """Small numbers, whose changes add up to nothing: a sum linear in words and places would not see them."""
    generator = torch.Generator().manual_seed(1)
    for n in (16, 40, 64):
        order = torch.arange(n) if kind == "identity" else torch.randperm(n, generator=generator)
        if kind == "one-hot":
            order = torch.randint(0, 5, (n,), generator=generator)
        m = torch.eye(n, dtype=dtype)[order]
        if kind == "mask":
            m = torch.randint(0, 2, (n, n), generator=generator).to(dtype)
        if kind == "differences":
            m = torch.ones(n * n, dtype=dtype)
        seen = {bytes(m.view(torch.uint8).flatten().tolist()): fingerprint_of(m)}
        for _ in range(10):
            changed = m.clone()
            if kind == "differences":  # of the first to third order: +1 -1; +1 -2 +1; +1 -3 +3 -1
                at, step = (int(torch.randint(low, n * n // 5, (1,), generator=generator)) for low in (0, 1))
                for order_of in ([1, -1], [1, -2, 1], [1, -3, 3, -1]):
                    changed = 4 * m
                    for j, by in enumerate(order_of):
                        changed[at + j * step] += by
                    seen[bytes(changed.view(torch.uint8).tolist())] = fingerprint_of(changed)
                continue
            a, b = torch.randperm(n, generator=generator)[:2].tolist()
            for dim in (0, 1):
                places = list(range(n))
                places[a], places[b] = b, a
                swapped = m.index_select(dim, torch.tensor(places))
                seen[bytes(swapped.view(torch.uint8).flatten().tolist())] = fingerprint_of(swapped)
        assert len(set(seen.values())) == len(seen)


# --- mappings


def state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(50, 40, generator=generator).bfloat16(),
        "b": torch.randn(7, generator=generator),
        "steps": torch.tensor(3),
        "mask": torch.arange(40) % 3 == 0,
        "gone": torch.ones(5),
        "grown": torch.ones(2, 3),
        "cast": torch.ones(4),
    }


def next_state(old: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        "new": torch.arange(6.0),
        "steps": old["steps"] + 1,
        "a": stepped(old["a"], 1e-4),
        "b": old["b"].clone(),
        "mask": ~old["mask"],
        "grown": torch.ones(3, 3),
        "cast": old["cast"].half(),
    }


def same_dict(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


@pytest.mark.parametrize("effort", EFFORTS)
def test_a_state_dict(effort: str, backend: str, tmp_path: Path) -> None:
    old = state()
    new = next_state(old)
    kept = {key: value.clone() for key, value in old.items()}
    delta = cfl_ops.compress_delta(new, old, effort=effort)
    assert list(delta) == [*new, "gone"]
    kinds = {key: describe_delta(value).kind for key, value in delta.items()}
    assert kinds == {
        **{"new": "joined", "gone": "left", "grown": "replaced", "cast": "replaced", "b": "same"},
        **{key: kinds[key] for key in ("a", "mask", "steps")},
    }
    assert describe_delta(delta["cast"]).base_dtype == torch.float32
    assert describe_delta(delta["grown"]).base_shape == (2, 3)
    got = cfl_ops.apply_delta(old, delta)
    assert list(got) == list(new)
    assert same_dict(got, new)
    assert same_dict(old, kept)
    a, grown = old["a"], old["grown"]
    assert cfl_ops.apply_delta_(old, delta) is old
    assert same_dict(old, new)
    assert old["a"] is a
    assert same(grown, torch.ones(2, 3))
    cfl_ops.save_file(delta, tmp_path / "delta.cflz")  # tensors of bytes, as any others
    again = cfl_ops.load_file(tmp_path / "delta.cflz")
    assert same_dict(cfl_ops.apply_delta(kept, again), new)


def test_a_state_dict_on_another_base_stays_as_it_is(backend: str) -> None:
    old = state()
    delta = cfl_ops.compress_delta(next_state(old), old)

    def broken(change: Any, message: str, error: type[Exception] = WrongBaseError) -> None:
        base, of = {key: value.clone() for key, value in old.items()}, dict(delta)
        change(base, of)
        kept = {key: value.clone() for key, value in base.items()}
        for apply in (cfl_ops.apply_delta, cfl_ops.apply_delta_):
            with pytest.raises(error, match=message):
                apply(base, of)
            assert same_dict(base, kept)
            assert list(base) == list(kept)

    for key in old:
        broken(
            lambda base, of, key=key: base.update({key: base[key].logical_not()}), rf"old\['{key}'\] must be"
        )
        broken(lambda base, of, key=key: base.pop(key), f"old must have '{key}'")
        broken(
            lambda base, of, key=key: of.pop(key), f"old must not have '{key}', which the delta does not know"
        )
    broken(lambda base, of: base.update(extra=torch.ones(1)), "old must not have 'extra'")
    broken(
        lambda base, of: base.update(new=torch.ones(1)), "old must not have 'new' yet, which the delta adds$"
    )
    broken(lambda base, of: base.update(new=torch.arange(6.0)), "which the delta adds$")
    broken(
        lambda base, of: base.update(a=next_state(base)["a"]), "with the fingerprint .* but got [0-9a-f]{16}$"
    )
    broken(lambda base, of: base.pop("gone"), "which the delta was made from, but got no such name$")
    for key in delta:
        damaged = delta[key].clone()
        damaged[-1] ^= 64
        broken(lambda base, of, key=key, d=damaged: of.update({key: d}), f"delta.*{key}", CorruptDataError)
        broken(lambda base, of, key=key: of.update({key: of[key][:-1]}), f"delta.*{key}", CorruptDataError)
    with pytest.raises(WrongBaseError, match="already is the result"):
        cfl_ops.apply_delta_(cfl_ops.apply_delta(old, delta), delta)


def test_tied_tensors_are_changed_once() -> None:
    w = weights(100)
    old = {"a": w, "b": w, "c": w[:0]}
    after = stepped(w, 1e-4)
    delta = cfl_ops.compress_delta({"a": after, "b": after, "c": after[:0]}, old)
    assert delta["a"] is delta["b"]
    cfl_ops.apply_delta_(old, delta)
    assert same(w, after)
    assert old["a"] is old["b"] is w
    w = weights(100)
    apart = cfl_ops.compress_delta({"a": after, "b": after + 1}, {"a": w, "b": w})
    with pytest.raises(RuntimeError, match=r"old\['a'\] and old\['b'\] must be changed alike"):
        cfl_ops.apply_delta_({"a": w, "b": w}, apart)
    for overlapping in ({"a": w, "b": w[10:20]}, {"a": w[:60], "b": w[40:]}):
        new = {key: stepped(value, 1e-3) for key, value in overlapping.items()}
        part = cfl_ops.compress_delta(new, overlapping)
        kept = w.clone()
        with pytest.raises(RuntimeError, match="must not share memory with old"):
            cfl_ops.apply_delta_(dict(overlapping), part)
        assert same(w, kept)
        assert same_dict(cfl_ops.apply_delta(overlapping, part), new)
    rows = {"even": w.view(10, 10)[::2], "odd": w.view(10, 10)[1::2]}  # of one matrix, and apart
    new = {key: stepped(value, 1e-3) for key, value in rows.items()}
    cfl_ops.apply_delta_(rows, cfl_ops.compress_delta(new, rows))
    assert same_dict(rows, new)


def test_a_module_is_updated_through_its_state_dict() -> None:
    torch.manual_seed(0)
    trainer, worker = torch.nn.Linear(30, 20).bfloat16(), torch.nn.Linear(30, 20).bfloat16()
    worker.load_state_dict(trainer.state_dict())
    before = {key: value.clone() for key, value in trainer.state_dict().items()}
    with torch.no_grad():
        trainer.weight += 1e-3
    delta = cfl_ops.compress_delta(trainer.state_dict(), before)
    cfl_ops.apply_delta_(worker.state_dict(), delta)
    assert same(worker.weight.data, trainer.weight.data)
    parameters = dict(trainer.named_parameters())
    back = cfl_ops.compress_delta(before, parameters)
    with pytest.raises(RuntimeError, match=r"old\['weight'\] requires grad"):
        cfl_ops.apply_delta_(parameters, back)
    with torch.no_grad():
        cfl_ops.apply_delta_(parameters, back)
    assert same(trainer.weight.data, before["weight"])


def test_autograd_is_told() -> None:
    w = torch.ones(3)
    x = torch.ones(3, requires_grad=True)
    y = (w * x).sum()
    cfl_ops.apply_delta_(w, cfl_ops.compress_delta(w + torch.tensor([1.0, 0, 0]), w))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# --- arguments


def test_bad_arguments() -> None:
    w = torch.ones(3)
    delta = cfl_ops.compress_delta(w + 1, w)
    for call, error, message in (
        (
            lambda: cfl_ops.compress_delta([1.0], w),
            TypeError,
            "compress_delta: new must be a tensor, but got list",
        ),
        (lambda: cfl_ops.compress_delta(w, None), TypeError, "compress_delta: old must be a tensor"),
        (lambda: cfl_ops.compress_delta(w, {"w": w}), TypeError, "both be tensors or both be mappings"),
        (lambda: cfl_ops.compress_delta({"w": 1}, {"w": w}), TypeError, r"new\['w'\] must be a tensor"),
        (
            lambda: cfl_ops.compress_delta(w, w, effort="best"),
            ValueError,
            "effort must be one of fast, small",
        ),
        (lambda: cfl_ops.compress_delta(w, w, effort=1), TypeError, "effort must be one of fast, small"),
        (lambda: cfl_ops.compress_delta(w.to_sparse(), w), TypeError, "new must be a strided tensor"),
        (
            lambda: cfl_ops.compress_delta(torch.quantize_per_tensor(w, 1, 0, torch.qint8), w),
            TypeError,
            "new must have a dtype that the format knows",
        ),
        (lambda: cfl_ops.apply_delta(w, w), TypeError, "apply_delta: delta must be a 1-d uint8 tensor"),
        (lambda: cfl_ops.apply_delta(w, {"w": delta}), TypeError, "both be tensors or both be mappings"),
        (lambda: cfl_ops.apply_delta_({"w": w}, delta), TypeError, "both be tensors or both be mappings"),
        (lambda: cfl_ops.apply_delta(w, delta.view(1, -1)), TypeError, "1-d uint8"),
        (lambda: cfl_ops.apply_delta({"w": w}, {"w": 3}), TypeError, r"delta\['w'\] must be a tensor"),
        (
            lambda: cfl_ops.apply_delta(w, cfl_ops.compress_delta({}, {"w": w})["w"]),
            ValueError,
            "delta must be of one tensor, but it is that of a tensor that left: apply it to a dict",
        ),
        (
            lambda: cfl_ops.apply_delta_(w, cfl_ops.compress_delta(w.half(), w)),
            ValueError,
            "delta must not change the shape or dtype of a tensor in place",
        ),
        (lambda: describe_delta(3), TypeError, "describe_delta: delta must be a tensor"),
    ):
        with pytest.raises(error, match=message):
            call()  # type: ignore[no-untyped-call]


def test_the_example_of_the_page(backend: str) -> None:
    """Of docs/format.md: bytes that were written stay readable, and are written on."""
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    example = page[page.index("Example: the bfloat16 1, -2, 0.5") :]
    raw = bytes.fromhex(example[example.index("```text") + 7 :].split("```")[0])
    old = torch.tensor([1.0, -2.0, 0.5]).bfloat16()
    new = torch.tensor([1.0, -2.015625, 0.5]).bfloat16()
    assert f"{fingerprint_of(old):#x}" in example[:200]
    assert bytes(cfl_ops.compress_delta(new, old).tolist()) == raw
    assert same(cfl_ops.apply_delta(old, torch.tensor(list(raw), dtype=torch.uint8)), new)
