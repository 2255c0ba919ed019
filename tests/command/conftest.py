"""A folder with two checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.command.shell import state


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with a.safetensors and b.safetensors, a step later."""
    from safetensors.torch import save_file  # the modules with tests are skipped where it is missing

    monkeypatch.chdir(tmp_path)
    old, new = state(), state()
    new["layers.0.weight"][3] += 0.01
    del new["mask"]
    new["ids"] = new["ids"].to(torch.int32)
    new["joined"] = torch.ones(300)
    save_file(old, "a.safetensors", metadata={"format": "pt", "who": "é"})
    save_file(new, "b.safetensors")
    return tmp_path
