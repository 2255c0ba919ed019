"""Damaged and forged deltas: an error, and nothing changed."""

from __future__ import annotations

import os
import random
import struct
import zlib

import cfl_ops
import pytest
import torch
from cfl_ops import CorruptDataError, WrongBaseError
from cfl_ops._core import dispatch
from cfl_ops.ops.codec import delta_encode, delta_format
from cfl_ops.ops.codec.fingerprint import fingerprint_of
from torch import Tensor

from tests.codec.helpers import EXHAUSTIVE, NATIVE, cuts_and_extensions, flips, same
from tests.codec.steps import stepped, weights
from tests.fuzz import deltas


def small_deltas() -> dict[str, tuple[Tensor, Tensor]]:
    """A delta and its base, of each kind and coding."""
    old = weights(300)
    new = old.clone()
    new[::30] *= 1.5
    few = stepped(weights(3000), 3e-6)
    made = {
        "stored": (new, old),
        "coded": (few, weights(3000)),
        "dense": (stepped(old, 1e-3), old),
        "same": (old, old),
        "replaced": (old, old.float()),
        "flags": (torch.arange(90) % 31 == 0, torch.zeros(90, dtype=torch.bool)),
    }
    found = {name: (cfl_ops.compress_delta(*pair), pair[1]) for name, pair in made.items()}
    joined = cfl_ops.compress_delta({"w": old[:20]}, {})["w"]
    found["joined"] = joined, torch.empty(0)
    found["left"] = cfl_ops.compress_delta({}, {"w": old})["w"], old
    classes = old.view(torch.int16).clone().view(torch.bfloat16)
    found["classes"] = by_classes(classes), classes
    return found


def by_classes(old: Tensor) -> Tensor:
    """A small delta with classes, which the encoder would not make of so few changes."""
    new = old.clone()
    new[::20] *= 1.5
    now, then = new.view(torch.int16), old.view(torch.int16)
    positions = (now != then).nonzero().flatten()
    classes = bytes([delta_format.NO_CLASS] * 100 + [0] * 18 + [1] * 138)
    parts = delta_encode._changed_by_class(
        then, classes, positions, now[positions], then[positions], (False, 0)
    )
    plain = delta_encode._delta(
        delta_format.CHANGED,
        delta_format.SMALL | delta_format.CLASSES,
        new,
        fingerprint_of(old),
        fingerprint_of(new),
        positions.numel(),
    )
    return delta_format.pack_delta(plain._replace(classes=classes, parts=parts), old.device)


def test_classes_made_by_hand(backend: str) -> None:
    old = weights(300)
    new = old.clone()
    new[::20] *= 1.5
    delta = by_classes(old)
    assert same(cfl_ops.apply_delta(old, delta), new)


def refused(delta: Tensor, old: Tensor, kind: str) -> None:
    base = old.clone()
    if kind in ("joined", "left"):
        tensors = {} if kind == "joined" else {"w": base}
        with pytest.raises(CorruptDataError, match=r"cfl_ops.apply_delta_: .*delta"):
            cfl_ops.apply_delta_(tensors, {"w": delta})
        assert tensors == {} if kind == "joined" else list(tensors) == ["w"]
    else:
        apply = cfl_ops.apply_delta if kind == "replaced" else cfl_ops.apply_delta_
        with pytest.raises(CorruptDataError, match=r"cfl_ops.apply_delta_?: "):
            apply(base, delta)
    assert same(base, old)


@pytest.mark.parametrize("kind", small_deltas())
@pytest.mark.parametrize("chosen", EXHAUSTIVE)
def test_every_flip_cut_and_extension_is_refused(
    kind: str, chosen: str, request: pytest.FixtureRequest
) -> None:
    """With the best instruction set and the fallback; of the latter every seventh, for its time."""
    delta, old = small_deltas()[kind]
    if chosen == "python":
        dispatch.overrides.install("python")
        request.addfinalizer(lambda: dispatch.overrides.install(os.environ.get("CFL_OPS_BACKEND") or None))
    every = 1 if chosen != "python" or not NATIVE else 7
    for number, damaged in enumerate(flips(delta)):
        if number % every == 0:
            refused(damaged, old, kind)
    for number, damaged in enumerate(cuts_and_extensions(delta)):
        if number % every == 0:
            refused(damaged, old, kind)


HEAD = struct.Struct("<4s4BQQQQII")
EXTREMES = (0, 1, 2, 5, 7, 127, 128, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def repaired(delta: bytes) -> Tensor:
    """The checksum of the header made right again."""
    (table,) = struct.unpack_from("<I", delta, 40)
    out = bytearray(delta)
    crc = zlib.crc32(bytes(out[52 : 52 + table]), zlib.crc32(bytes(out[:48])))
    struct.pack_into("<I", out, 48, crc)
    return torch.frombuffer(out, dtype=torch.uint8)


FIELDS = {
    "version": 4,
    "kind": 5,
    "dtype": 6,
    "flags": 7,
    "total": 8,
    "base": 16,
    "result": 24,
    "changed": 32,
}


@pytest.mark.parametrize("kind", small_deltas())
def test_forged_headers(kind: str) -> None:
    """Each field at each extreme, and each byte of the table: an error, or (of flags that say nothing) the result."""
    delta, old = small_deltas()[kind]
    want = None if kind in ("joined", "left") else cfl_ops.apply_delta(old, delta)
    data = bytes(delta.tolist())
    (table,) = struct.unpack_from("<I", data, 40)
    forged, said = [], set()
    for at in FIELDS.values():
        size = 1 if at < 8 else 8
        for value in EXTREMES:
            forged.append((at, value % 256**size, size))
    forged += [(40, value % 2**32, 4) for value in EXTREMES]
    forged += [(52 + i, value, 1) for i in range(table) for value in (0, 1, 2, 127, 128, 254, 255)]
    for at, value, size in forged:
        bad = bytearray(data)
        bad[at : at + size] = value.to_bytes(size, "little")
        if bad == data:
            continue
        base = old.clone()
        try:
            if want is None:
                cfl_ops.apply_delta({} if kind == "joined" else {"w": base}, {"w": repaired(bad)})
            else:
                assert same(cfl_ops.apply_delta(base, repaired(bad)), want), (at, value)
        except (CorruptDataError, WrongBaseError, ValueError) as error:
            said.add(str(error)[:21])
        assert same(base, old)
    assert said == {"cfl_ops.apply_delta: "}


def test_a_large_rank_is_told_from_the_end_of_a_class() -> None:
    """More changes of a class than the base has elements of it."""
    old = weights(300)
    delta = by_classes(old)
    parsed = delta_format.parse_delta("test", delta)
    assert parsed.classes is not None
    swapped = bytes(1 - c if c < 2 else c for c in parsed.classes)
    bad = delta_format.pack_delta(parsed._replace(classes=swapped), old.device)
    with pytest.raises(CorruptDataError, match="the delta contradicts itself|does not lead"):
        cfl_ops.apply_delta(old, bad)


def test_wrong_results_are_refused_before_anything_is_written() -> None:
    """A delta whose parts are all sound, and which says another result."""
    old = weights(3000)
    for new in (stepped(old, 1e-5), stepped(old, 1e-2)):
        parsed = delta_format.parse_delta("test", cfl_ops.compress_delta(new, old))
        bad = delta_format.pack_delta(parsed._replace(result=parsed.result ^ 1), old.device)
        base = old.clone()
        with pytest.raises(CorruptDataError, match="does not lead to the result"):
            cfl_ops.apply_delta_(base, bad)
        assert same(base, old)
    flags = torch.zeros(90, dtype=torch.bool)
    new = torch.arange(90) % 31 == 0
    parsed = delta_format.parse_delta("test", cfl_ops.compress_delta(new, flags))
    values = parsed.parts[0].values
    worse = values._replace(symbols=values.symbols + 4)
    part = parsed.parts[0]._replace(values=worse)
    with pytest.raises(CorruptDataError, match="neither true nor false"):
        cfl_ops.apply_delta(flags, delta_format.pack_delta(parsed._replace(parts=[part]), flags.device))


def test_mutated_deltas() -> None:
    """A few runs of the fuzzer (make fuzz has more), the bytes repaired where they are checked."""
    made = list(deltas.samples())
    outcomes = {deltas.one(random.Random(run), made) for run in range(300)}
    assert (
        {"CorruptDataError", "WrongBaseError"}
        <= outcomes
        <= {"CorruptDataError", "WrongBaseError", "ValueError", "read"}
    )
