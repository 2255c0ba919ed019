"""What torchrun starts for test_recipes: the recipes of several processes, and what they must come to."""

from __future__ import annotations

import faulthandler
import gc
import runpy
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from cfl_ops.learn import ClosedFormLinear
from torch.nn.parallel import DistributedDataParallel

RECIPES = Path(__file__).parents[2] / "docs" / "recipes"
sys.path.insert(0, str(RECIPES))

import ddp  # noqa: E402
import fsdp  # noqa: E402


class Stopped(Exception):
    """An interruption in the middle of an epoch."""


def interrupted(epochs: int, after: int, **options: Any) -> None:
    """Run the recipe, but let every rank stop after some steps."""
    steps = 0
    original = torch.optim.SGD.step

    def step(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps > after:
            raise Stopped
        return original(*args, **kwargs)

    torch.optim.SGD.step = step  # type: ignore[method-assign]
    try:
        ddp.main(epochs, **options)
    except Stopped:
        return
    finally:
        torch.optim.SGD.step = original  # type: ignore[method-assign]
    raise AssertionError("it was not interrupted")


def loss_inside() -> dict[str, torch.Tensor]:
    """A module with backbone and head whose forward is the loss, as Lightning and Trainer wrap one."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = torch.nn.Linear(6, 8, dtype=torch.float64)
            self.head = ClosedFormLinear(8, 3, lam=0.1, init="lecun", dtype=torch.float64)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.head.loss(self.backbone(x).tanh(), y)

    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    model = Model()
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.backbone.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        x = torch.randn(16, 6, dtype=torch.float64, generator=generator)
        y = torch.randint(3, (16,), generator=generator)
        wrapped(x[rank::ranks], y[rank::ranks]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def alike() -> dict[str, dict[str, torch.Tensor]]:
    """What must be the same for any number of processes."""
    return {
        "ddp float32": ddp.main(2),
        "ddp float64": ddp.main(1, dtype=torch.float64),
        "fsdp": fsdp.main(1, dtype=torch.float64),
        "inside": loss_inside(),
    }


def first_step() -> dict[str, Any]:
    """Heads of different values meet in the first solve, and heads that something else has changed in the next."""
    rank = dist.get_rank()
    torch.manual_seed(100 + rank)
    head = ClosedFormLinear(8, 3, lam=0.1, init="lecun")
    before = head.weight.clone()
    features, y = torch.randn(4, 8), torch.randint(3, (4,))
    head.update(features, y)
    once = head.weight.clone()
    with torch.no_grad():
        head.weight += rank
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        head.update(features, y)
    said = [str(warning.message) for warning in caught if "differ" in str(warning.message)]
    return {"before": before, "once": once, "again": head.weight.clone(), "said": said}


def main(folder: Path) -> None:
    """Each rank writes what it has come to."""
    faulthandler.dump_traceback_later(90, exit=True)  # a hang says where
    out: dict[str, Any] = {}
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    sys.argv = ["ddp.py", "--epochs", "1", "--checkpoint", str(folder / "cli.pt")]
    with mock.patch.object(dist, "init_process_group"), mock.patch.object(dist, "destroy_process_group"):
        runpy.run_path(
            str(RECIPES / "ddp.py"), run_name="__main__"
        )  # as torchrun runs it, in the group that is here
    out.update(alike())
    checkpoint = str(folder / "resume.pt")
    interrupted(2, after=30, checkpoint=checkpoint)  # 24 steps are an epoch
    out["epochs before"] = torch.load(checkpoint, weights_only=True)["epochs"]
    out["resumed"] = ddp.main(2, checkpoint=checkpoint)
    out["first step"] = first_step()
    torch.save(out, folder / f"rank {dist.get_rank()}.pt")
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
