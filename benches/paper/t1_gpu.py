"""T1 on a GPU: rSPS with ResNet-18 and -50 under torch.compile, channels-last, bf16 autocast backbones.

Synthetic CIFAR-shaped data (K = 100). The two heads take turns step by step, and the ratio of their median step
times is printed. Needs torch and cfl_ops alone. ``--device cpu --width 8 --cells 16x64 --eager`` rehearses it.

Run: python benches/paper/t1_gpu.py --out FOLDER
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cfl_ops.learn import ClosedFormLinear
from resnet import resnet18, resnet50
from torch import nn
from torch.nn import functional as F

CLASSES = 100
CELLS = "32x512,32x2048,32x4096,128x512,128x2048,128x4096,1024x512,1024x2048"
Step = Callable[[], None]


def steps(make: Any, rows: int, features: int, width: int, device: str, eager: bool) -> tuple[Step, Step]:
    """A training step with the closed-form head, and one with cross-entropy, of twin networks."""
    x = torch.randn(rows, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(CLASSES, (rows,), device=device)

    def twin() -> tuple[Any, torch.optim.Optimizer]:
        torch.manual_seed(0)
        backbone = make(width, features).to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            backbone.parameters(), lr=0.01, momentum=0.9, nesterov=True, fused=device == "cuda"
        )
        return backbone if eager else torch.compile(backbone), optimizer

    def forward(backbone: Any) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return backbone(x)

    backbone, optimizer = twin()
    closed = ClosedFormLinear(features, CLASSES, lam=1.0, check="next").to(device)

    def closed_form() -> None:
        closed.step(forward(backbone), y)
        optimizer.step()
        optimizer.zero_grad()

    rival, rival_optimizer = twin()
    head = nn.Linear(features, CLASSES).to(device)
    rival_optimizer.add_param_group({"params": list(head.parameters())})

    def cross_entropy() -> None:
        h = forward(rival)
        with torch.autocast(device, torch.bfloat16):
            logits = head(h)
        F.cross_entropy(logits.float(), y).backward()
        rival_optimizer.step()
        rival_optimizer.zero_grad()

    return closed_form, cross_entropy


def timed(step: Step, device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", default=CELLS)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--seconds", type=float, default=240, help="stop starting cells after this time")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-table"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("t1_gpu: there is no CUDA device (--device cpu rehearses)")
        return 5  # as pytest's: nothing to run
    options.out.mkdir(parents=True, exist_ok=True)
    start, rows_out = time.perf_counter(), []
    for cell in options.cells.split(","):
        for name, make in (("ResNet-18", resnet18), ("ResNet-50", resnet50)):
            row: dict[str, Any] = {"network": name, "cell": cell}
            if time.perf_counter() - start > options.seconds:
                row["error"] = "not run: out of time"
            else:
                try:
                    rows, features = (int(part) for part in cell.split("x"))
                    pair = steps(make, rows, features, options.width, options.device, options.eager)
                    for _ in range(3):
                        for step in pair:
                            timed(step, options.device)
                    times: list[list[float]] = [[], []]
                    for repeat in range(options.repeats):
                        for i in (0, 1) if repeat % 2 == 0 else (1, 0):
                            times[i].append(timed(pair[i], options.device))
                    closed, cross = (statistics.median(t) * 1e3 for t in times)
                    row |= {"closed form ms": closed, "cross-entropy ms": cross, "rSPS": cross / closed}
                except Exception as error:
                    row["error"] = f"{type(error).__name__}: {error}"[:300]
            rows_out.append(row)
            print(row, flush=True)
            (options.out / "t1_gpu.json").write_text(json.dumps(rows_out, indent=1) + "\n")
            torch._dynamo.reset()
    return int(any("error" in row for row in rows_out))


if __name__ == "__main__":
    raise SystemExit(main())
