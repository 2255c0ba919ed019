"""A plain training loop: one forward, a solve, one backward. Run: python plain_loop.py."""

from __future__ import annotations

import torch
from cfl_ops.learn import ClosedFormLinear
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset


def digits(train: int = 1536) -> tuple[TensorDataset, TensorDataset]:
    x, y = load_digits(return_X_y=True)
    x, y = torch.as_tensor(x / 16, dtype=torch.float32), torch.as_tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return (
        TensorDataset(x[order[:train]], y[order[:train]]),
        TensorDataset(x[order[train:]], y[order[train:]]),
    )


def error_rate(backbone: torch.nn.Module, head: torch.nn.Module, data: TensorDataset) -> float:
    x, y = data.tensors
    with torch.no_grad():
        return float((head(backbone(x.to(head.weight.dtype))).argmax(-1) != y).float().mean())


def main(epochs: int = 5, batch: int = 32, lam: float = 10.0, seed: int = 0) -> dict[str, float]:
    torch.manual_seed(seed)
    train, test = digits()
    backbone = torch.nn.Sequential(
        torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 128), torch.nn.GELU()
    )
    head = ClosedFormLinear(128, 10, lam=lam)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    loader = DataLoader(train, batch, shuffle=True)

    for epoch in range(epochs):
        total = 0.0
        for x, y in loader:
            loss = head.loss(backbone(x), y)  # solves the head on this batch, near where it was
            loss.backward()  # the gradient reaches the backbone
            optimizer.step()  # of the backbone alone
            optimizer.zero_grad()
            total += loss.item() * len(x)
        print(
            f"epoch {epoch + 1}: loss {total / len(train):.4f}, error {error_rate(backbone, head, test):.2%}"
        )

    online = error_rate(backbone, head, test)
    refitted = head.refit(loader, backbone)  # ridge on the whole training set, streamed; head stays as it is
    print(f"test error: online {online:.2%}, re-estimated {error_rate(backbone, refitted, test):.2%}")
    return {"online": online, "refitted": error_rate(backbone, refitted, test)}


if __name__ == "__main__":
    main()
