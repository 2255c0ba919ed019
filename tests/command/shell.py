"""The command as a shell sees it, in this process, and what it is given."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from cfl_ops import __main__
from torch import Tensor

PAGE = Path(__file__).parents[2] / "docs" / "command.md"


class Done(NamedTuple):
    code: int
    out: bytes
    err: str


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def cfl(*arguments: object, stdin: bytes | Terminal = b"", terminal: bool = False) -> Done:
    """Run the command; its stdout is bytes."""
    out, err = io.BytesIO(), io.BytesIO()
    kind = Terminal if terminal else io.TextIOWrapper
    read = stdin if isinstance(stdin, Terminal) else io.TextIOWrapper(io.BytesIO(stdin))
    with contextlib.ExitStack() as stack:
        stack.callback(setattr, sys, "stdin", sys.stdin)
        sys.stdin = read
        stack.enter_context(contextlib.redirect_stdout(io.TextIOWrapper(out, write_through=True)))
        stack.enter_context(contextlib.redirect_stderr(kind(err, write_through=True)))
        try:
            code = __main__.main([str(each) for each in arguments])
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
        return Done(code, out.getvalue(), err.getvalue().decode())


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"layers.{i}.weight": (0.02 * torch.randn(64, 80, generator=generator)).to(dtype)
        for i, dtype in enumerate((torch.bfloat16, torch.float16, torch.float32, torch.float64))
    }
    odd = torch.tensor([0.0, -0.0, torch.inf, torch.nan, 1e-42])
    return {
        **weights,
        "norm.weight": torch.ones(80),
        "odd": odd,
        "ids": torch.arange(77),
        "mask": torch.arange(9) % 2 == 0,
        "step": torch.tensor(3),
        "none": torch.empty(0, 4),
        "unicode é": torch.ones(3),
    }


def bits(tensor: Tensor) -> bytes:
    return b"" if tensor.numel() == 0 else bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(got[name]) == bits(tensor), name


def listed() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def ok(*arguments: object, **more: object) -> Done:
    done = cfl(*arguments, **more)
    assert done.code == 0, done.err
    return done


def assert_one_line(done: Done, code: int, words: str) -> None:
    assert done.code == code, done.err
    assert re.search(words, done.err), done.err
    assert done.err.count("\n") == 1
    assert done.err.startswith("cfl-ops ")
    assert "Traceback" not in done.err
