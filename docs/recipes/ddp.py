"""Several processes: a DistributedDataParallel backbone and one head for all of them. It resumes where it was stopped.

Run: torchrun --nproc-per-node 4 ddp.py --epochs 5 --checkpoint ddp.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from cfl_ops.learn import ClosedFormLinear
from plain_loop import digits, error_rate
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler


def main(
    epochs: int = 5,
    batch: int = 64,
    lam: float = 1.0,
    checkpoint: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Train on global batches of ``batch`` rows; what is returned is the same on every rank, for any number of them."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    # Ranks may start apart: the backbone of rank 0 becomes everyone's here, its head in the first solve.
    torch.manual_seed(seed + rank)
    backbone = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU()).to(dtype)
    # process_group="auto", the default: it is solved on the rows of all ranks.
    head = ClosedFormLinear(128, 10, lam=lam, init="lecun", dtype=dtype)
    train, test = digits()
    # The head stays outside: it has no gradients to average. After its first step DDP sorts its buckets anew, and then
    # sums in another order. With find_unused_parameters it does not, so that a resumed run has the same bits; leave it
    # out where the last digits may differ.
    wrapped = DistributedDataParallel(backbone, find_unused_parameters=True)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    sampler = DistributedSampler(train, ranks, rank, seed=seed)
    loader = DataLoader(train, batch // ranks, sampler=sampler)

    parts = {"backbone": backbone, "head": head, "optimizer": optimizer}
    first = 0
    if checkpoint and Path(checkpoint).exists():
        saved = torch.load(checkpoint, weights_only=True)
        first = saved.pop("epochs")
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    for epoch in range(first, epochs):
        sampler.set_epoch(epoch)
        for x, y in loader:
            loss = head.loss(wrapped(x.to(dtype)), y)  # that of the global batch, on every rank
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0:
            error = error_rate(backbone, head, test)
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}, error {error:.2%}, {head.traffic}", flush=True)
            if checkpoint:  # written beside, then renamed: an interruption leaves the old one or the new one
                states = {name: part.state_dict() for name, part in parts.items()}
                torch.save({**states, "epochs": epoch + 1}, f"{checkpoint}.new")
                Path(f"{checkpoint}.new").replace(checkpoint)
        dist.barrier()  # no rank goes on, or ends, before the checkpoint is there
    return {**backbone.state_dict(), "head": head.weight.detach(), "head bias": head.bias.detach()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--checkpoint")
    dist.init_process_group("gloo")  # "nccl" with a GPU for each process
    main(**vars(parser.parse_args()))
    dist.destroy_process_group()
