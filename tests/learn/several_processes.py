"""What each rank of test_several_processes.py does: all cases in turn, since starting four processes takes seconds.

A case returns what its test looks at; an error of it is what the test looks at, too. ``python -m torch.distributed.run
--nproc-per-node 4 several_processes.py FOLDER`` writes FOLDER/RANK.json.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cfl_ops.learn import BatchSizeLam, ClosedFormLinear, CosineLam, RecursiveHead, RelativeLam, train_step
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

CASES: dict[str, Callable[[], Any]] = {}


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


def rank() -> int:
    return dist.get_rank()


def bits(head: ClosedFormLinear) -> list[str]:
    return [value.hex() for tensor in head.parameters() for value in tensor.double().flatten().tolist()]


def net(width: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh()).to(dtype)


def compare(
    shares: tuple[int, ...], width: int = 8, targets: str = "classes", weighted: bool = False, steps: int = 3,
    call: str = "loss", **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Train on parts of a batch, and on the whole batch in this process alone; how far they come apart."""
    backbone = net(width)
    alone = copy.deepcopy(backbone)
    schedule = options.pop("schedule", None)
    lam = (schedule(), schedule()) if schedule else (0.3, 0.3)
    head = ClosedFormLinear(width, 3, lam=lam[0], dtype=torch.float64, **options)
    single = ClosedFormLinear(width, 3, lam=lam[1], dtype=torch.float64, process_group=None, **options)
    single.load_state_dict(head.state_dict())
    parallel = DistributedDataParallel(backbone)
    first = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    mine = slice(sum(shares[: rank()]), sum(shares[: rank() + 1]))
    losses = 0.0
    for _ in range(steps):
        x = torch.randn(sum(shares), 6, dtype=torch.float64)
        y = (
            torch.randint(3, (len(x),))
            if targets == "classes"
            else torch.randn(len(x), 3, dtype=torch.float64)
        )
        s = torch.rand(len(x), dtype=torch.float64) if weighted else None
        part = None if s is None else s[mine]
        if call == "loss":
            loss = head.loss(parallel(x[mine]), y[mine], sample_weight=part)
            loss.backward()
            want = single.loss(alone(x), y, sample_weight=s)
            want.backward()
            for optimizer in (first, second):
                optimizer.step()
                optimizer.zero_grad()
        else:
            loss = train_step(parallel, head, first, x[mine], y[mine], order=call, sample_weight=part)
            want = train_step(alone, single, second, x, y, order=call, sample_weight=s)
        losses = max(losses, abs(float(loss.detach() - want.detach())))
        for each in lam:
            if hasattr(each, "step"):
                each.step()
    pairs = [*zip(backbone.parameters(), alone.parameters(), strict=True),
             *zip(head.parameters(), single.parameters(), strict=True)]  # fmt: skip
    return {
        "off": max(float((a - b).abs().max()) for a, b in pairs),
        "loss": losses,
        "traffic": head.traffic._asdict(),
        "head": bits(head),
    }


EVEN, UNEVEN, EMPTY = (4, 4, 4, 4), (1, 4, 9, 2), (0, 9, 0, 8)
COMPARED: dict[str, dict[str, Any]] = {
    "rows": {"shares": EVEN, "width": 20},
    "uneven_rows": {"shares": UNEVEN, "width": 20},
    "empty_ranks": {"shares": EMPTY, "width": 20},
    "moments": {"shares": (50, 50, 50, 50)},
    "uneven_moments": {"shares": (0, 90, 10, 100)},
    "free_bias": {"shares": (20, 90, 10, 100), "fit_bias": "free"},
    "no_bias": {"shares": (50,) * 4, "bias": False, "reduction": "sum"},
    "regression": {"shares": UNEVEN, "width": 20, "targets": "float"},
    "regression_moments": {"shares": (50, 60, 0, 50), "targets": "float", "weighted": True},
    "weights": {"shares": UNEVEN, "width": 20, "weighted": True},
    "relative": {"shares": UNEVEN, "width": 20, "relative": True},
    "relative_moments": {"shares": (50, 60, 0, 50), "relative": True},
    "ridge": {"shares": UNEVEN, "width": 20, "method": "ridge"},
    "ema_ridge": {"shares": (50, 60, 0, 50), "method": "ema_ridge"},
    "rescaled": {"shares": (50, 60, 0, 50), "kappa": 3.0, "target_scale": 2.0},
    "cosine": {"shares": UNEVEN, "width": 20, "schedule": lambda: CosineLam(2.0, T_max=3)},
    "batch_size": {"shares": (50, 60, 0, 50), "schedule": lambda: BatchSizeLam(2.0, reference=64)},
    "relative_schedule": {"shares": (50, 60, 0, 50), "schedule": lambda: RelativeLam(0.5)},
    "relative_schedule_rows": {"shares": UNEVEN, "width": 20, "schedule": lambda: RelativeLam(0.5)},
    "algorithm_2": {"shares": UNEVEN, "width": 20, "call": "backbone-first", "init": "lecun"},
    "algorithm_2_cached": {"shares": (50, 60, 0, 50), "call": "backbone-first-cached", "init": "lecun"},
    "skip": {"shares": UNEVEN, "width": 20, "check": "skip"},
    "next": {"shares": UNEVEN, "width": 20, "check": "next"},
}
for _name, _options in COMPARED.items():
    CASES[_name] = lambda options=_options: compare(**options)


@case
def sharded() -> Any:
    backbone = net(20, torch.float32)
    alone = copy.deepcopy(backbone)
    fully_shard(backbone, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    head, single = ClosedFormLinear(20, 3), ClosedFormLinear(20, 3, process_group=None)
    first, second = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (backbone, alone))
    for _ in range(3):
        x, y = torch.randn(16, 6), torch.randint(3, (16,))
        mine = slice(4 * rank(), 4 * rank() + 4)
        head.step(backbone(x[mine]), y[mine])
        single.step(alone(x), y)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    whole = [p.full_tensor() for p in backbone.parameters()]
    return {"off": max(float((a - b).abs().max()) for a, b in zip(whole, alone.parameters(), strict=True))}


@case
def sharded_head() -> Any:
    model = nn.Sequential(nn.Linear(6, 8), ClosedFormLinear(8, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return bits(model[1]) if model[1].update(torch.randn(2, 8), torch.tensor([0, 1])) else None


def one_step(head: ClosedFormLinear, rows: int = 4, **options: Any) -> dict[str, Any]:
    torch.manual_seed(100 + rank())
    width = options.get("width", head.in_features)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        head.update(torch.randn(rows, width), torch.randint(head.out_features, (rows,)))
    return {"head": bits(head), "warnings": [str(w.message) for w in caught if "cfl_ops" in str(w.message)]}


@case
def other_initial_heads() -> Any:
    torch.manual_seed(rank())
    return one_step(ClosedFormLinear(20, 3, init="lecun"))


@case
def a_head_that_was_changed() -> Any:
    head = ClosedFormLinear(20, 3)
    one_step(head)
    if rank() == 2:
        with torch.no_grad():
            head.weight[0, 0] += 1e-7
    return one_step(head)


@case
def permuted_and_negated_heads() -> Any:
    """Equal numbers in other places."""
    out = []
    for change in (lambda w: w.flip(0), lambda w: -w, lambda w: w.flip(1), lambda w: torch.full_like(w, 0.5)):
        head = ClosedFormLinear(20, 4)
        torch.manual_seed(0)
        head.weight.copy_(torch.randn(4, 20))
        if rank() == 1:
            head.weight.copy_(change(head.weight.clone()))
        out.append(one_step(head)["head"])
    return out


@case
def local() -> Any:
    return one_step(ClosedFormLinear(20, 3, process_group=None))


@case
def a_group_of_two() -> Any:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    head = ClosedFormLinear(20, 3, process_group=groups[rank() // 2])
    out = [one_step(head)["head"]]
    return [*out, one_step(copy.deepcopy(head))["head"]]


@case
def accumulated() -> Any:
    """Rank 0 has so many rows that it keeps moments, the others rows, the last none."""
    torch.manual_seed(0)
    x, y = torch.randn(130, 8), torch.randint(3, (130,))
    first, last = [(0, 100), (100, 115), (115, 130), (130, 130)][rank()]
    out = []
    for options in ({}, {"fit_bias": "free"}, {"ignore_index": 2}):
        head, single = (
            ClosedFormLinear(8, 3, **options),
            ClosedFormLinear(8, 3, process_group=None, **options),
        )
        for part in range(first, max(last, first + 1), 5):
            head.accumulate(x[part : min(part + 5, last)], y[part : min(part + 5, last)])
        loss, (want, _) = head.solve(), single.update(x, y)
        off = float((head.weight - single.weight).abs().max()) + abs(float(loss) - float(want))
        out.append({"off": off, "head": bits(head)})
    return out


def refused(name: str, make: Callable[[], Any]) -> None:
    """A case in which every rank must raise, and no head may change."""

    def run() -> Any:
        head, call = make()
        before = bits(head)
        try:
            call()
        except Exception as error:
            notes = getattr(error, "__notes__", [])
            return {
                "error": type(error).__name__,
                "text": str(error),
                "notes": notes,
                "same": bits(head) == before,
            }
        return {"error": None}

    CASES[name] = run


def batch_of(
    head: ClosedFormLinear, rows: int = 4, spoil: Callable[[Any, Any], None] = lambda x, y: None
) -> Any:
    x, y = torch.randn(rows, head.in_features), torch.randint(head.out_features, (rows,))
    spoil(x, y)
    return lambda: head.update(x, y)


def on_rank_2(x: Any, y: Any, what: str) -> None:
    if rank() == 2:
        if what == "nan":
            x[1, 0] = torch.nan
        else:
            y[1] = 77


def with_head(options: Callable[[], dict[str, Any]], rows: int = 4, spoil: Any = lambda x, y: None) -> Any:
    def make() -> Any:
        given = {"in_features": 20, "out_features": 3} | options()
        head = ClosedFormLinear(given.pop("in_features"), given.pop("out_features"), **given)
        return head, batch_of(head, rows, spoil)

    return make


refused("other_classes", with_head(lambda: {"out_features": 3 + (rank() == 1)}))
refused("other_width", with_head(lambda: {"in_features": 20 + (rank() == 3)}))
refused("other_lam", with_head(lambda: {"lam": 1.0 + rank()}))
refused("other_method", with_head(lambda: {"method": "ridge" if rank() == 1 else "proximal"}))
refused("other_dtype", with_head(lambda: {"dtype": torch.float64 if rank() == 1 else torch.float32}))


def with_weight(make: Callable[[], Any], rows: int) -> Any:
    def run() -> Any:
        head, weight = ClosedFormLinear(4, 3), make() if rank() == 1 else torch.ones(rows)
        x, y = torch.randn(rows, 4), torch.randint(3, (rows,))
        return head, lambda: head.update(x, y, sample_weight=weight)

    return run


for _rows in (1, 100):  # by rows, and by moments
    refused(f"float64_weight_{_rows}", with_weight(lambda n=_rows: torch.ones(n, dtype=torch.float64), _rows))
    refused(f"long_weight_{_rows}", with_weight(lambda n=_rows: torch.ones(n + 1), _rows))
    refused(f"int_weight_{_rows}", with_weight(lambda n=_rows: torch.ones(n, dtype=torch.int32), _rows))
refused("nan_rows", with_head(dict, spoil=lambda x, y: on_rank_2(x, y, "nan")))
refused("bad_class", with_head(dict, spoil=lambda x, y: on_rank_2(x, y, "class")))
refused("nan_moments", with_head(lambda: {"in_features": 4}, 100, lambda x, y: on_rank_2(x, y, "nan")))
refused("singular", with_head(lambda: {"lam": 0.0, "bias": False}, 4, lambda x, y: x.zero_()))


@case
def a_batch_of_the_wrong_width() -> Any:
    head = ClosedFormLinear(20, 3)
    try:
        head.update(torch.randn(4, 21 if rank() == 1 else 20), torch.randint(3, (4,)))
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error), "same": not head.weight.any()}
    return {"error": None}


@case
def skipped() -> Any:
    """A bad batch of one rank is skipped by all."""
    out = []
    for width, rows in ((20, 4), (4, 100)):
        head = ClosedFormLinear(width, 3, check="skip")
        x, y = torch.randn(rows, width), torch.randint(3, (rows,))
        on_rank_2(x, y, "nan")
        loss = head.loss(x, y)
        out.append([bool(loss.isnan()), int(head.skipped), not bool(head.weight.any()), head.traffic.kind])
    return out


@case
def evaluation_of_one_rank() -> Any:
    """In eval mode no rank waits for others."""
    head = ClosedFormLinear(20, 3).eval()
    return float(head.loss(torch.randn(4, 20), torch.randint(3, (4,)))) if rank() == 0 else None


@case
def refit() -> Any:
    torch.manual_seed(0)
    head = ClosedFormLinear(8, 3)
    x, y = torch.randn(100, 8), torch.randint(3, (100,))
    first, last = [(0, 60), (60, 90), (90, 90), (90, 100)][rank()]
    new = head.refit([(x[first:last], y[first:last])] if rank() != 2 else [])
    want = ClosedFormLinear(8, 3, process_group=None).refit([(x, y)])
    return {"off": float((new.weight - want.weight).abs().max()), "head": bits(new)}


@case
def recursive() -> Any:
    """The filter of all ranks' rows, in their order."""
    out = []
    for options in ({"decay": 0.9}, {"process_noise": 0.1}, {"window": 30}):
        torch.manual_seed(0)
        backbone = net(8)
        alone = copy.deepcopy(backbone)
        head, single = RecursiveHead(8, 3, **options), RecursiveHead(8, 3, process_group=None, **options)
        parallel = DistributedDataParallel(backbone)
        for shares in (EVEN, UNEVEN, EMPTY):
            x, y = torch.randn(sum(shares), 6, dtype=torch.float64), torch.randint(3, (sum(shares),))
            mine = slice(sum(shares[: rank()]), sum(shares[: rank() + 1]))
            losses = [head.loss(parallel(x[mine]), y[mine]), single.loss(alone(x), y)]
            head.eval().loss(parallel(x[mine]), y[mine])
            losses += [head.train().loss(parallel(x[mine]), y[mine], solve=False)]
            for model, loss in ((backbone, losses[0]), (alone, losses[1])):
                model.zero_grad()
                loss.backward()
            off = [float((a.grad - b.grad).abs().max()) for a, b in
                   zip(backbone.parameters(), alone.parameters(), strict=True)]  # fmt: skip
            off += [abs(float(loss - losses[1])) for loss in losses]
            off += [float((head.weight - single.weight).abs().max())]
            out.append([max(off), head.weight.flatten().tolist()])
    return out


@case
def recursive_refused() -> Any:
    head = RecursiveHead(20, 3)
    head.update(torch.randn(4, 20), torch.randint(3, (4,)))
    before, out = head.weight, []
    for what in ("nan", "class"):
        x, y = torch.randn(4, 20), torch.randint(3, (4,))
        on_rank_2(x, y, what)
        try:
            head.update(x, y)
        except Exception as error:
            out.append([type(error).__name__, str(error), torch.equal(before, head.weight)])
    try:
        RecursiveHead(20, 3, alpha=1.0 + rank()).update(x, y.clamp(max=2))
    except ValueError as error:
        out.append(str(error))
    return out


@case
def refit_of_a_bad_loader() -> Any:
    try:
        ClosedFormLinear(8, 3).refit([(torch.randn(2, 8 + (rank() == 1)), torch.tensor([0, 1]))])
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@case
def compiled() -> Any:
    head = ClosedFormLinear(20, 3)
    function = torch.compile(head.loss, backend="eager", fullgraph=True)
    try:
        function(torch.randn(4, 20), torch.randint(3, (4,)))
    except Exception as error:
        return str(error)
    return None


def main(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {}
    for name, run in CASES.items():
        torch.manual_seed(rank())
        try:
            results[name] = run()
        except Exception as error:
            results[name] = {"raised": f"{type(error).__name__}: {error}"}
    Path(folder, f"{rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def dying() -> None:
    """The last rank is gone before the second solve."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    head = ClosedFormLinear(20, 3)
    one_step(head)
    if rank() == dist.get_world_size() - 1:
        os._exit(0)
    one_step(head)


if __name__ == "__main__":
    dying() if sys.argv[1] == "dying" else main(sys.argv[1])
