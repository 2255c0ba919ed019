"""Peaks of memory of writing and reading a file, as a module whose process has no other: ``memory MEGABYTES LOSSLESS``.

Prints them in tensors, of which the state dict has eight: above the state dict, or above the result.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cfl_ops
import torch

TENSORS = 8


def status(field: str) -> int:
    """Bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise KeyError(field)


def peak(work: Callable[[], Any]) -> tuple[int, Any]:
    """What the work took at most above what was there, and its result."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    result = work()
    return status("VmHWM") - before, result


def main() -> None:
    megabytes, lossless = int(sys.argv[1]), bool(int(sys.argv[2]))
    size = (megabytes << 20) // TENSORS
    options: dict[str, Any] = {"lossless": True} if lossless else {"lossless": False, "bits": 8}
    torch.set_num_threads(1)
    state = {f"w{i}": torch.empty(size // 2, dtype=torch.bfloat16) for i in range(TENSORS)}
    for value in state.values():
        for part in value.split(1 << 16):
            part.copy_(torch.randn(len(part)) * 0.02)
    out: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        warm = {"w": state["w0"][:70_000].clone()}
        for kind, save in (("cflz", cfl_ops.save_file), ("safetensors", cfl_ops.save_safetensors)):
            path = Path(folder) / f"model.{kind}"
            save(warm, path, **options)  # type: ignore[operator]
            cfl_ops.load_file(path)
            above, stored = peak(lambda save=save, path=path: save(state, path, **options))  # type: ignore[misc]
            out[f"save {kind}"] = above / size
            out["ratio"] = stored / (size * TENSORS)
            above, back = peak(lambda path=path: cfl_ops.load_file(path))  # type: ignore[misc]
            out[f"load {kind}"] = above / size - TENSORS
            del back
            model = torch.nn.Module()
            for name in state:
                model.register_buffer(name, torch.ones(size // 2, dtype=torch.bfloat16))
            above, _ = peak(lambda model=model, path=path: cfl_ops.load_model(model, path))  # type: ignore[misc]
            out[f"load_model {kind}"] = above / size
            del model
    print(json.dumps(out))


if __name__ == "__main__":
    main()
