"""Mixed precision with a GradScaler, and gradient accumulation in two ways. Run: python amp_accumulation.py."""

from __future__ import annotations

import torch
from cfl_ops.learn import ClosedFormLinear
from plain_loop import digits, error_rate
from torch.utils.data import DataLoader

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.float16 if DEVICE == "cuda" else torch.bfloat16


def main(
    accumulation: str = "algorithm-1",
    epochs: int = 5,
    batch: int = 64,
    parts: int = 4,
    amp: bool = True,
    lam: float = 1.0,
) -> tuple[torch.nn.Module, ClosedFormLinear, float]:
    """``accumulation``: ``"none"``, ``"algorithm-1"`` (a forward pass more) or ``"algorithm-2"`` (cached)."""
    torch.manual_seed(0)
    train, test = digits()
    backbone = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU()).to(DEVICE)
    head = ClosedFormLinear(128, 10, lam=lam, device=DEVICE)  # float32: so it stays under autocast
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler(DEVICE, enabled=amp)

    def features_of(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE, HALF, enabled=amp):
            return backbone(x)

    for _ in range(epochs):
        for x, y in DataLoader(train, batch, shuffle=True):
            x, y = x.to(DEVICE), y.to(DEVICE)
            if accumulation == "none":
                scaler.scale(head.loss(features_of(x), y)).backward()
            else:
                pieces = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
                if accumulation == "algorithm-1":  # the head of all pieces first: equal to the large batch
                    with torch.no_grad():
                        for piece, label in pieces:
                            head.accumulate(features_of(piece), label)
                    head.solve()
                for piece, label in pieces:
                    features = features_of(piece)
                    loss = head.loss(features, label, solve=False)  # at the present head
                    scaler.scale(loss * len(piece) / len(x)).backward()
                    if accumulation == "algorithm-2":
                        head.accumulate(features, label)
                if accumulation == "algorithm-2":
                    head.solve()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    error = error_rate(backbone.cpu(), head.cpu(), test)
    print(f"amp {amp}, accumulation {accumulation}: test error {error:.2%}")
    return backbone, head, error


if __name__ == "__main__":
    for way in ("none", "algorithm-1", "algorithm-2"):
        main(way)
        main(way, amp=False)
