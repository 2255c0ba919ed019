"""``cfl-ops compress``, ``decompress``, ``inspect``, ``verify``, ``diff``, ``patch``: files of weights in a shell."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

__all__ = ["COMMANDS", "main", "missing_extras", "open_streams"]

COMMANDS = {
    "compress": "weights into fewer bytes: without losing a bit, or to so many bits or bytes",
    "decompress": "and back",
    "inspect": "show what a file holds, from its headers alone",
    "verify": "decode everything, and compare it with the original",
    "diff": "what changed between two checkpoints, as a small file",
    "patch": "an old checkpoint and that file: the new checkpoint",
}
EXTRAS = ("typer", "rich")


def missing_extras() -> list[str]:
    """The packages that the command needs and that are not installed."""
    return [name for name in EXTRAS if importlib.util.find_spec(name) is None]


def open_streams() -> None:
    """Streams that the shell closed (``>&-``) lead nowhere, instead of into the next file that is opened."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115, PTH123


def main(arguments: Sequence[str]) -> int:
    """Run a command with its arguments; returns the exit code."""
    open_streams()
    if missing := missing_extras():
        print(
            f"cfl-ops {arguments[0]}: needs packages that are not installed: pip install {' '.join(missing)}"
            ' (or "cfl-ops[cli]")',
            file=sys.stderr,
        )
        return 2
    try:
        from .cli import run

        return run(arguments)
    except KeyboardInterrupt:
        return 130
