"""A backbone sharded by FSDP2's fully_shard; the head is whole on every rank, and solved on the global batch.

Run: torchrun --nproc-per-node 4 fsdp.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from cfl_ops.learn import ClosedFormLinear
from plain_loop import digits
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler


def main(
    epochs: int = 3,
    batch: int = 64,
    lam: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, torch.Tensor]:
    """What is returned, on rank 0, is the same for any number of ranks."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # fully_shard takes each rank's own shard: unlike DDP it makes nothing equal
    backbone = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 128), torch.nn.GELU()
    ).to(device, dtype)
    head = ClosedFormLinear(128, 10, lam=lam, device=device, dtype=dtype)
    mesh = init_device_mesh(device, (ranks,))
    for layer in (backbone[0], backbone[2], backbone):
        fully_shard(layer, mesh=mesh)  # the backbone only: a head within would need ignored_params
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    train, _ = digits()
    sampler = DistributedSampler(train, ranks, rank)
    loader = DataLoader(train, batch // ranks, sampler=sampler)

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        wrong = torch.zeros((), device=device)
        for x, y in loader:
            x, y = x.to(device, dtype), y.to(device)
            features = backbone(x)
            with torch.no_grad():
                wrong += (head(features).argmax(-1) != y).sum()  # before it has seen the batch
            head.loss(features, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        dist.all_reduce(wrong)
        if rank == 0:
            print(
                f"epoch {epoch + 1}: error {float(wrong) / len(train):.2%} on batches not yet seen",
                flush=True,
            )
    full = get_model_state_dict(backbone, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {**full, "head": head.weight.detach()}


if __name__ == "__main__":
    dist.init_process_group("gloo")  # "nccl" with a GPU for each process, and device="cuda"
    main()
    dist.destroy_process_group()
