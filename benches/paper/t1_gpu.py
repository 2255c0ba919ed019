"""T1 on a GPU: rSPS with ResNet-18 and -50 under torch.compile, channels-last, bf16 autocast backbones.

Synthetic CIFAR-shaped data (K = 100). The two heads take turns step by step, and the ratio of their median step
times is printed. Needs torch and cfl_ops alone. ``--device cpu --width 8 --cells 16x64 --eager`` rehearses it.
Each cell is printed and written as soon as it is there; one that fails says why and the others go on. Exit status:
0; 1 if a cell failed or was not reached; 5 without a device; 70 if the GPU's context was lost; 130 if interrupted.

Run: python benches/paper/t1_gpu.py --out FOLDER
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from cfl_ops.learn import ClosedFormLinear
from resnet import resnet18, resnet50
from torch import nn
from torch.nn import functional as F

CLASSES = 100
CELLS = "32x512,32x2048,32x4096,128x512,128x2048,128x4096,1024x512,1024x2048"
NETWORKS = {"resnet18": resnet18, "resnet50": resnet50}
LOST = 70
"""The exit status after an error that no later call survives, as gpu_table.py's."""
Step = Callable[[], None]
Row = dict[str, Any]


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


def measure(row: Row, options: argparse.Namespace, until: float) -> None:
    """Fill in a cell."""
    torch._dynamo.reset()
    rows, features = (int(part) for part in row["cell"].split("x"))
    pair = steps(NETWORKS[row["network"]], rows, features, options.width, options.device, options.eager)
    start = time.perf_counter()
    for step in pair:
        timed(step, options.device)
    row["first steps s"] = time.perf_counter() - start
    for _ in range(2):
        for step in pair:
            timed(step, options.device)
    times: list[list[float]] = [[], []]
    for repeat in range(options.repeats):
        if repeat >= 3 and time.perf_counter() > until:
            break
        for i in (0, 1) if repeat % 2 == 0 else (1, 0):
            times[i].append(timed(pair[i], options.device))
    closed, cross = (statistics.median(t) * 1e3 for t in times)
    row |= {
        "closed form ms": closed,
        "cross-entropy ms": cross,
        "rSPS": cross / closed,
        "steps": len(times[0]),
    }


def lost(device: str) -> bool:
    """Whether an error has taken the GPU's context with it."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception:
        return True
    return False


def run(table: list[Row], options: argparse.Namespace, write: Callable[[], None]) -> int:
    """Every cell; what remains of it is in the table whenever it ends."""
    until = time.perf_counter() + options.seconds
    for cell in options.cells.split(","):
        for network in options.networks.split(","):
            row: Row = {"network": network, "cell": cell, "error": "cut off"}
            table.append(row)
            write()
            if time.perf_counter() > until:
                row["error"] = "not run: out of time"
                print(row, flush=True)
                write()
                continue
            try:
                measure(row, options, until)
                del row["error"]
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:300]
                row["traceback"] = traceback.format_exc()
                if lost(options.device):
                    row["error"] += " (the GPU's context is lost: what came after was not run)"
                    return LOST
            finally:
                print({key: value for key, value in row.items() if key != "traceback"}, flush=True)
                print(row.get("traceback", ""), end="", flush=True)
                write()
    return int(any("error" in row for row in table))


def stop(number: int, frame: object) -> None:
    """GNU timeout sends the signal twice: the second must not end the writing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", default=CELLS)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="of resnet18 and resnet50")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--seconds", type=float, default=240, help="stop starting cells after this time")
    parser.add_argument("--out", type=Path, default=Path("build/gpu-table"))
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("t1_gpu: there is no CUDA device (--device cpu rehearses)")
        return 5  # as pytest's: nothing to run
    options.out.mkdir(parents=True, exist_ok=True)
    table: list[Row] = []

    def write() -> None:
        fresh = options.out / "t1_gpu.json.new"
        fresh.write_text(json.dumps(table, indent=1) + "\n")
        fresh.replace(options.out / "t1_gpu.json")

    try:
        return run(table, options, write)
    except KeyboardInterrupt:
        write()
        print("t1_gpu: interrupted", flush=True)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)  # a script's background jobs would ignore it
    faulthandler.register(signal.SIGINT, chain=True)  # where a kernel hangs, only this says in which call
    result = main()
    if result == LOST:  # a tidy exit would meet the same error in destructors, and end with another status
        os._exit(result)
    raise SystemExit(result)
