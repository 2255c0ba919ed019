"""GramAccumulator: streams, files, checkpoints and several processes."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cfl_ops
import numpy as np
import pytest
import torch
from cfl_ops import GramAccumulator
from safetensors.torch import save_file


def assert_same(a: cfl_ops.GramMoments, b: cfl_ops.GramMoments, **tolerance) -> None:
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            torch.testing.assert_close(x, y, **tolerance)


def test_batches_equal_the_whole() -> None:
    x, y, s = torch.randn(103, 7, dtype=torch.float64), torch.randint(4, (103,)), torch.rand(103)
    accumulator = GramAccumulator(bias_column=True, num_classes=4)
    for part in torch.arange(103).split(10):
        accumulator.update(x[part], y[part], s[part])
    assert_same(accumulator.moments, cfl_ops.gram(x, y, bias_column=True, num_classes=4, sample_weight=s))
    assert (accumulator.batches, accumulator.rows) == (11, 103)


def test_decay_is_exponential_forgetting() -> None:
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    accumulator = GramAccumulator(decay=0.5)
    for batch in x:
        accumulator.update(batch)
    want = sum((0.5 ** (2 - i) * b.mT @ b for i, b in enumerate(x)), torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(accumulator.moments.gram, want)
    assert accumulator.moments.count == 5 * 1.75


def test_fit_a_dataloader_with_progress(capsys: pytest.CaptureFixture[str]) -> None:
    x, y = torch.randn(50, 3), torch.randn(50, 2)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    moments = GramAccumulator().fit(loader, progress=True).moments
    assert_same(moments, cfl_ops.gram(x, y), rtol=1e-5, atol=1e-5)
    assert "batch" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["npy", "safetensors", "memmap", "tensor"])
def test_fit_file(kind: str, tmp_path: Path) -> None:
    x, y = torch.randn(1000, 6), torch.randn(1000, 2)
    names = {}
    if kind == "npy":
        np.save(tmp_path / "x.npy", x.numpy())
        np.save(tmp_path / "y.npy", y.numpy())
        sources = (tmp_path / "x.npy", str(tmp_path / "y.npy"))
    elif kind == "safetensors":
        save_file({"x": x, "y": y}, tmp_path / "data.safetensors")
        sources = (tmp_path / "data.safetensors",) * 2
        names = {"x_name": "x", "y_name": "y"}
    elif kind == "memmap":
        np.save(tmp_path / "x.npy", x.numpy())
        sources = (np.load(tmp_path / "x.npy", mmap_mode="r"), y.numpy())
    else:
        sources = (x, y)
    accumulator = GramAccumulator(bias_column=True).fit_file(*sources, batch_rows=96, **names)
    assert accumulator.batches == 11
    assert_same(accumulator.moments, cfl_ops.gram(x, y, bias_column=True), rtol=1e-5, atol=1e-4)


def test_bad_files(tmp_path: Path) -> None:
    save_file({"x": torch.ones(3, 2)}, tmp_path / "a.safetensors")
    np.save(tmp_path / "x.npy", np.ones((3, 2)))
    np.save(tmp_path / "y.npy", np.ones((4, 1)))
    fit = GramAccumulator().fit_file
    with pytest.raises(ValueError, match="x_name must say"):
        fit(tmp_path / "a.safetensors")
    with pytest.raises(KeyError, match="has no tensor 'z'"):
        fit(tmp_path / "a.safetensors", x_name="z")
    with pytest.raises(ValueError, match=r"must be a \.npy or \.safetensors file, but got a\.csv"):
        fit(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="y must have 3 rows as x has, but got 4"):
        fit(tmp_path / "x.npy", tmp_path / "y.npy")


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="decay must be finite"):
        GramAccumulator(decay=-1)
    with pytest.raises(ValueError, match="do not decay"):
        GramAccumulator(decay=0.5, compensated=True)
    with pytest.raises(ValueError, match="are float64"):
        GramAccumulator(acc_dtype=torch.float32, compensated=True)
    with pytest.raises(RuntimeError, match="no batch was added yet"):
        _ = GramAccumulator().moments


def test_a_bad_batch_changes_nothing() -> None:
    accumulator = GramAccumulator(num_classes=2)
    accumulator.update(torch.ones(2, 3), torch.tensor([0, 1]))
    before = [f.clone() for f in accumulator.moments]
    with pytest.raises(IndexError):
        accumulator.update(torch.ones(2, 3), torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="sample_weight"):
        accumulator.update(torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([1.0, -1.0]))
    assert all(torch.equal(a, b) for a, b in zip(accumulator.moments, before, strict=True))
    assert accumulator.batches == 1


def test_gram_in_place_refuses_bad_rows_under_float64_accumulation(tmp_path: Path) -> None:
    m = cfl_ops.gram(torch.ones(2, 3), acc_dtype=torch.float64)
    before = m.gram.clone()
    with pytest.raises(ValueError, match="x has 1 NaN or Inf value"):
        cfl_ops.gram_(m, torch.tensor([[1.0, torch.nan, 2.0]]))
    assert torch.equal(m.gram, before)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            (torch.ones(2, 5),),
            ValueError,
            r"x must have width 3, for m is of order 3 and bias_column is False",
        ),
        ((torch.ones(2, 3), torch.ones(2, 1)), ValueError, "m has no targets"),
        ((torch.ones(2, 3, dtype=torch.float64),), TypeError, "float64 for float64 x"),
        ((torch.ones(4, 2, 3),), ValueError, r"must have the batch shape \(\) of m"),
    ],
)
def test_gram_in_place_bad_arguments(args, error, message) -> None:
    m = cfl_ops.gram(torch.ones(2, 3))
    with pytest.raises(error, match=message):
        cfl_ops.gram_(m, *args)
    with pytest.raises(TypeError, match="m must be GramMoments"):
        cfl_ops.gram_(m.gram, args[0])


def test_compensated_sums_do_not_drift() -> None:
    """Many small float32 batches with a large mean: the error stays that of a float64 sum of few terms.

    The exact sum is known: every batch is the same, and its moments are exact in float64.
    """
    x = torch.tensor([[1.1, -3.7], [0.3, 2.9]])
    once = x.double().mT @ x.double()
    batches = 20_000
    drifting, compensated = GramAccumulator(), GramAccumulator(compensated=True)
    for _ in range(batches):
        drifting.update(x)
        compensated.update(x)
    eps = torch.finfo(torch.float64).eps
    error = ((compensated.moments.gram - batches * once) / (batches * once)).abs().max()
    # A recent sum of 1,024 terms errs by at most 1,024 eps of itself; folding carries its own rounding.
    assert error <= 1026 * eps
    assert ((drifting.moments.gram.double() - batches * once) / (batches * once)).abs().max() > 1e-6


def test_many_batches_in_float32_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from cfl_ops.ops.gram import accumulate

    monkeypatch.setattr(accumulate, "MANY_BATCHES", 5)
    x = torch.ones(1, 2)
    accumulator = GramAccumulator()
    for _ in range(4):
        accumulator.update(x)
    with pytest.warns(UserWarning, match=r"5 batches in float32 may be off .* acc_dtype=torch\.float64"):
        accumulator.update(x)
    for quiet in (GramAccumulator(acc_dtype=torch.float64), GramAccumulator(decay=0.9)):
        for _ in range(9):
            quiet.update(x)


@pytest.mark.slow
def test_a_million_batches_as_exact_as_one_pass() -> None:
    """10^6 small float32 batches: within a small multiple of the error of one float64 pass."""
    cycle = torch.randn(1000, 8, 12) + 1.5
    once = [x.double().mT @ x.double() for x in cycle]
    exact = torch.tensor(
        [[math.fsum(g[i, j].item() for g in once) * 1000 for j in range(12)] for i in range(12)],
        dtype=torch.float64,
    )
    accumulator, plain = GramAccumulator(compensated=True), torch.zeros(12, 12, dtype=torch.float64)
    for _ in range(1000):
        for x, product in zip(cycle, once, strict=True):
            accumulator.update(x)
            plain += product
    scale = exact.abs().max()
    ours = ((accumulator.moments.gram - exact).abs().max() / scale).item()
    one_pass = ((plain - exact).abs().max() / scale).item()
    print(f"relative error after 10^6 batches: compensated {ours:.1e}, plain float64 sums {one_pass:.1e}")
    # FOLD_EVERY = 1,024 additions of eps / 2 of their own sum, and 8 products to a batch.
    assert ours <= 1040 * torch.finfo(torch.float64).eps


def test_state_survives_a_kill_between_batches(tmp_path: Path) -> None:
    """A process that is killed hard resumes from its checkpoint and ends with the same moments."""
    x = torch.randn(4000, 5, dtype=torch.float64)
    np.save(tmp_path / "x.npy", x.numpy())
    script = """
import sys, time, cfl_ops
class Slow(cfl_ops.GramAccumulator):
    def update(self, *batch):
        super().update(*batch)
        time.sleep(float(sys.argv[2]))
Slow(bias_column=True).fit_file(sys.argv[1] + "/x.npy", batch_rows=40, checkpoint=sys.argv[1] + "/c.pt",
                                checkpoint_every=5)
"""
    slow = subprocess.Popen([sys.executable, "-c", script, str(tmp_path), "0.05"])
    deadline = time.monotonic() + 60
    while not (tmp_path / "c.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    slow.send_signal(signal.SIGKILL)
    slow.wait()
    partial = GramAccumulator(bias_column=True)
    partial.load(tmp_path / "c.pt")
    assert 0 < partial.batches < 100
    subprocess.run([sys.executable, "-c", script, str(tmp_path), "0"], check=True)
    done = GramAccumulator(bias_column=True)
    done.load(tmp_path / "c.pt")
    assert done.batches == 100
    assert_same(done.moments, cfl_ops.gram(x, bias_column=True))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".c.pt")] == []


def rows_of_classes(width: int = 5, rows: int = 1000) -> tuple[torch.Tensor, ...]:
    return torch.randn(rows, width, dtype=torch.float64), torch.randint(3, (rows,)), torch.rand(rows)


def in_batches(
    rows: tuple[torch.Tensor, ...], size: int, until: int = 1000
) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(part[i : min(i + size, until)] for part in rows) for i in range(0, until, size)]


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("size", [100, 200, 300, 7, 1000])
def test_a_checkpoint_is_resumed_by_rows(size: int, compensated: bool, tmp_path: Path) -> None:
    """It was counted in batches, so that larger ones lost rows without a word."""
    rows = rows_of_classes()
    options = {"bias_column": True, "num_classes": 3}
    GramAccumulator(**options, compensated=compensated).fit(
        in_batches(rows, 100, 500), checkpoint=tmp_path / "c.pt"
    )
    resumed = GramAccumulator(**options, compensated=compensated)
    resumed.fit(in_batches(rows, size), checkpoint=tmp_path / "c.pt")
    assert resumed.rows == 1000
    want = cfl_ops.gram(*rows[:2], sample_weight=rows[2], **options)
    assert_same(resumed.moments, want)


def test_batches_of_another_dtype_of_targets_are_split_too(tmp_path: Path) -> None:
    x, y = torch.randn(2, 30, 4), torch.randn(2, 30, 3)
    GramAccumulator().fit([(x[:, :20], y[:, :20])], checkpoint=tmp_path / "c.pt")
    resumed = GramAccumulator().fit(
        [(x[:, :15], y[:, :15]), [x[:, 15:], y[:, 15:]]], checkpoint=tmp_path / "c.pt"
    )
    assert_same(resumed.moments, cfl_ops.gram(x, y), rtol=1e-5, atol=1e-5)


def test_resuming_with_what_does_not_fit(tmp_path: Path) -> None:
    rows, path = rows_of_classes(), tmp_path / "c.pt"
    options = {"num_classes": 3}
    GramAccumulator(**options).fit(in_batches(rows, 100, 300), checkpoint=path)

    def resume(batches: list, **other: object) -> None:
        GramAccumulator(**{**options, **other}).fit(batches, checkpoint=path)

    with pytest.raises(ValueError, match="the checkpoint has seen 300 rows, but batches have 200"):
        resume(in_batches(rows, 100, 200))
    with pytest.raises(ValueError, match=r"x must have width 5 .* got shape \(100, 4\)"):
        resume(in_batches(rows_of_classes(4), 100))
    with pytest.raises(TypeError, match=r"y must be class indices .* got torch\.float64"):
        resume([(rows[0], rows[0])])
    with pytest.raises(ValueError, match="y must have size 1000"):
        resume([(rows[0], rows[1][:400])])
    for other in ({"decay": 0.5}, {"bias_column": True}, {"num_classes": 4}, {"compensated": True}):
        with pytest.raises(ValueError, match="other options"):
            resume(in_batches(rows, 100), **other)
    busy = GramAccumulator(**options)
    busy.update(*rows)
    with pytest.raises(ValueError, match="must be empty to begin a checkpoint, but it holds 1000 rows"):
        busy.fit(in_batches(rows, 100), checkpoint=tmp_path / "new.pt")
    assert busy.rows == 1000
    assert not (tmp_path / "new.pt").exists()
    np.save(tmp_path / "x.npy", rows[0][:200].numpy())
    with pytest.raises(ValueError, match="the checkpoint has seen 300 rows, but batches have 200"):
        GramAccumulator(**options).fit_file(tmp_path / "x.npy", rows[1][:200], checkpoint=path)


def test_decay_is_by_batches_so_none_is_split(tmp_path: Path) -> None:
    x = torch.randn(400, 3, dtype=torch.float64)
    GramAccumulator(decay=0.5).fit(x[:200].split(100), checkpoint=tmp_path / "c.pt")
    with pytest.raises(ValueError, match="ends within a batch of 300"):
        GramAccumulator(decay=0.5).fit(x.split(300), checkpoint=tmp_path / "c.pt")
    whole, resumed = GramAccumulator(decay=0.5).fit(x.split(100)), GramAccumulator(decay=0.5)
    assert_same(resumed.fit(x.split(100), checkpoint=tmp_path / "c.pt").moments, whole.moments)


def test_interrupted_files(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    accumulator = GramAccumulator()
    accumulator.update(torch.randn(9, 4))
    accumulator.save(path)
    whole = path.read_bytes()
    cut = [whole[:length] for length in (0, 9, len(whole) // 2, len(whole) - 1)]
    flipped = [whole[:i] + bytes([whole[i] ^ 16]) + whole[i + 1 :] for i in range(0, len(whole), 5)]
    torch.save({"weight": torch.ones(2)}, path)
    for damaged in (*cut, *flipped, whole + b"x", bytes(4), b"hello", path.read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"GramAccumulator\.load: .*c\.pt is no whole file"):
            accumulator.load(path)
    with pytest.raises(FileNotFoundError):
        accumulator.load(tmp_path / "none.pt")
    assert accumulator.rows == 9


def test_counters_without_sums_are_refused() -> None:
    accumulator = GramAccumulator()
    state = accumulator.state_dict()
    for counters in ({"batches": 3, "rows": 30}, {"rows": 30}):
        with pytest.raises(ValueError, match="recent sums must be there where batches were added"):
            accumulator.load_state_dict({**state, **counters})
    accumulator.load_state_dict(state)
    assert accumulator.rows == 0


def test_batches_of_another_width_or_kind_change_nothing() -> None:
    for options, y in (
        ({"num_classes": 3}, torch.tensor([0, 1, 2])),
        ({"bias_column": True}, torch.ones(3, 3)),
    ):
        accumulator = GramAccumulator(**options)
        accumulator.update(torch.ones(3, 4), y)
        before = [field.clone() for field in accumulator.moments]
        for width in (2, 3, 5):
            with pytest.raises(ValueError, match="x must have width 4 as in the batches before"):
                accumulator.update(torch.ones(3, width), y)
        other = torch.ones(3, 3) if "num_classes" in options else torch.tensor([0, 1, 2])
        with pytest.raises(TypeError, match="y must be .* where num_classes is"):
            accumulator.update(torch.ones(3, 4), other)
        assert all(torch.equal(a, b) for a, b in zip(accumulator.moments, before, strict=True))
        assert accumulator.rows == 3


@pytest.mark.parametrize("targets", [False, True])
def test_gram_in_place_is_told_of_the_bias_column(targets: bool, backend: str) -> None:
    """Rows one column short were taken for those of moments with a bias column, and rows with one too many."""
    x, y = torch.randn(6, 3), torch.randn(6, 2) if targets else None
    plain, with_bias = cfl_ops.gram(x, y), cfl_ops.gram(x, y, bias_column=True)
    for m, width, bias in ((plain, 2, False), (plain, 4, False), (with_bias, 3, False), (with_bias, 4, True)):
        before = m.gram.clone()
        with pytest.raises(ValueError, match=rf"x must have width .* bias_column is {bias}, but got shape"):
            cfl_ops.gram_(m, torch.randn(6, width), y, bias_column=bias)
        assert torch.equal(m.gram, before)
    cfl_ops.gram_(with_bias, x, y, bias_column=True)
    twice = cfl_ops.gram(torch.cat([x, x]), None if y is None else torch.cat([y, y]), bias_column=True)
    assert_same(with_bias, twice, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_other_options_is_refused(tmp_path: Path) -> None:
    accumulator = GramAccumulator()
    accumulator.update(torch.ones(2, 2))
    accumulator.save(tmp_path / "c.pt")
    with pytest.raises(ValueError, match="other options"):
        GramAccumulator(bias_column=True).load(tmp_path / "c.pt")


def test_four_ranks_equal_one_process(tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(
        """
import torch, torch.distributed as dist, cfl_ops
dist.init_process_group("gloo")
torch.manual_seed(0)
x, y = torch.randn(400, 5, dtype=torch.float64), torch.randint(3, (400,))
mine = torch.arange(dist.get_rank(), 400, dist.get_world_size())
accumulator = cfl_ops.GramAccumulator(bias_column=True, num_classes=3)
for part in mine.split(16):
    accumulator.update(x[part], y[part])
moments = accumulator.reduce()
want = cfl_ops.gram(x, y, bias_column=True, num_classes=3)
for a, b in zip(moments, want):
    torch.testing.assert_close(a, b)
assert accumulator.moments.count == len(mine)
wider = cfl_ops.GramAccumulator()
wider.update(x[:, : 3 + dist.get_rank() // 2])
empty = cfl_ops.GramAccumulator()
if dist.get_rank() != 2:
    empty.update(x)
for broken, error, text in (wider, ValueError, "rank 2 has"), (empty, RuntimeError, "rank 2 has added no batch"):
    try:
        broken.reduce()
        raise SystemExit("nothing was raised")
    except error as raised:
        assert text in str(raised)
print("rank", dist.get_rank(), "agrees", flush=True)
dist.destroy_process_group()
"""
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4", str(script)],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.count("agrees") == 4, done.stderr


def test_linear_gram_memory_does_not_depend_on_the_batch() -> None:
    """The peak of resident memory grows by less than the features would take (here 256 MB)."""
    code = """
import resource, torch, cfl_ops
x, w = torch.randn(65536, 16), torch.randn(1024, 16)
cfl_ops.linear_gram(x[:4096], w)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cfl_ops.linear_gram(x, w)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 64


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "tanh", "celu", "identity"])
def test_linear_gram_equals_the_layer(activation: str) -> None:
    x, w, b, y = torch.randn(5000, 6), torch.randn(600, 6), torch.randn(600), torch.randn(5000, 2)
    got = cfl_ops.linear_gram(x, w, b, activation, y, bias_column=True)
    h = torch.nn.functional.linear(x, w, b)
    functional = torch.nn.functional
    h = {
        "relu": functional.relu, "gelu": functional.gelu, "silu": functional.silu, "tanh": torch.tanh,
        "celu": functional.celu, "identity": lambda t: t,
        "gelu_tanh": lambda t: functional.gelu(t, approximate="tanh"),
    }[activation](h)  # fmt: skip
    assert_same(got, cfl_ops.gram(h, y, bias_column=True), rtol=1e-4, atol=1e-3)


def test_linear_gram_bad_arguments() -> None:
    x, w = torch.ones(3, 2), torch.ones(4, 2)
    with pytest.raises(ValueError, match="activation must be one of identity, relu, .*but got 'elu'"):
        cfl_ops.linear_gram(x, w, activation="elu")
    with pytest.raises(ValueError, match="weight must have size 2"):
        cfl_ops.linear_gram(x, torch.ones(4, 3))
    with pytest.raises(ValueError, match="bias must have size 4"):
        cfl_ops.linear_gram(x, w, torch.ones(3))
    with pytest.raises(TypeError, match=r"weight must be torch\.float32 as x is"):
        cfl_ops.linear_gram(x, w.double())
