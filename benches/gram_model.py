"""What gram should take on an H100, by arithmetic: ``python benches/gram_model.py [rows]``.

For each size the rule of the registry and the launcher's own sharing of tiles are costed: tensor cores, reads of
tiles through the L2 cache, memory, launches. Rates are datasheets' and others' measurements, none ours: correct them
(RATES) once a GPU has run the kernels. The ratio is to torch.mm at the rates of MM.
"""

from __future__ import annotations

import sys

import torch
import triton
from cfl_ops._gpu import tuning
from cfl_ops._gpu.device import Device, pretend
from cfl_ops.triton_kernels import gram

H100 = Device("NVIDIA H100", "sm_90", 132, 227 << 10)
RATES = {
    "bf16": 989e12 * 0.85, "float64": 67e12 * 0.7,  # tensor cores; the rest is clocks under load and latency
    "l2": 7.5e12, "memory": 3.0e12,
    "launch": 2.5e-6,  # a kernel in a CUDA graph
}  # fmt: skip
MM = {"half": 700e12, "tf32": 400e12, "tf32x3": 50e12, "float64": 58e12}  # FLOP/s of torch.mm
PRODUCTS = {"half": 1, "tf32": 1, "tf32x3": 6, "float64": 1}


def model(kind: str, rows: int, width: int) -> dict[str, float | str]:
    """Seconds by part, and the ratio of torch.mm's time to their sum."""
    size = {"half": 2, "float64": 8}.get(kind, 4)
    mm = max(2 * rows * width * width / MM[kind], size * rows * width / RATES["memory"]) + RATES["launch"]
    problem = {"kind": kind, "order": width, "rows": rows, "planes": kind != "float64"}
    use = dict(tuning.choose("gram", torch.device("cpu"), **problem))
    how = str(use.pop("how"))
    out = 8 * width * width / RATES["memory"]
    if how == "library":
        total = mm + out + 3 * RATES["launch"]
        return {"how": how, "total": total, "mm": mm, "ratio": mm / total}
    x = torch.empty(1, rows, width, device="meta")
    bytes_each = 8 if kind == "float64" else 2 * (3 if kind == "tf32x3" else 1)
    slots = use["resident"] * H100.multiprocessors
    _, whole, rest, splits, per_split = gram._share(x, 1, bytes_each, use)
    tile, tile_n, depth = use["TILE"], use["TILE_N"], use["DEPTH"]

    products = tile * tile_n * depth * 2 * PRODUCTS[kind] / RATES["float64" if kind == "float64" else "bf16"]
    reads = (tile + tile_n) * depth * bytes_each / RATES["l2"]

    def busy(programs: int, step_rows: int) -> float:
        """Rounds of as many programs as fit, each limited by its own products or by what all of them read."""
        steps, seconds = triton.cdiv(step_rows, depth), 0.0
        while programs > 0:
            now = min(programs, slots)
            each = triton.cdiv(now, H100.multiprocessors) * H100.multiprocessors
            seconds += steps * max(products * each, reads * now)
            programs -= now
        return seconds

    tiles = busy(whole, rows) + busy(rest * splits, per_split)
    parts = 4 * tile * tile_n * (whole + rest * splits) * 2 / RATES["l2"] * (2 if kind == "float64" else 1)
    # Read 4 bytes and write three planes, or read for the largest of each column, then read and write one plane.
    planes = rows * width * 10 / RATES["memory"] if kind.startswith("tf32") else 0.0
    launches = RATES["launch"] * (4 + {"half": 0, "tf32": 6, "tf32x3": 1, "float64": 0}[kind])
    total = planes + tiles + parts + out + launches
    shape = {"tile": f"{tile}x{tile_n}", "whole": whole, "rest": rest, "splits": splits}
    times = {"planes": planes, "tiles": tiles, "parts": parts + out, "total": total, "mm": mm}
    return {"how": how, **shape, **times, "ratio": mm / total}


def main() -> None:
    """The table."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else 65536
    head = (
        "kind",
        "D",
        "how",
        "tile",
        "whole",
        "rest",
        "splits",
        "planes",
        "tiles",
        "parts",
        "total",
        "mm",
        "ratio",
    )
    print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
    with pretend(H100):
        for kind in MM:
            for width in (256, 512, 1024, 1536, 2048, 4096):
                got = model(kind, rows, width)

                def cell(key: str, got: dict[str, float | str] = got) -> str:
                    value = got.get(key, "")
                    if key == "ratio":
                        return f"{value:.2f}"
                    return f"{1e3 * value:.3f}" if isinstance(value, float) else str(value)

                print(f"| {kind} | {width} | " + " | ".join(cell(key) for key in head[2:]) + " |")


if __name__ == "__main__":
    main()
