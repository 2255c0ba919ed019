"""``python -m cfl_ops demo``, ``info`` and ``autotune``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """usage: python -m cfl_ops COMMAND

  demo      train closed-form heads and their rivals on real data, and write a report (demo --help)
  info      print versions, instruction set, and which backend serves which op
  autotune  time the GPU kernels' tile sizes on this card and keep the fastest (autotune --help)
"""


def main(arguments: Sequence[str]) -> int:
    """Run a subcommand; returns the exit code."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "demo":
        from . import demo

        return demo.main(rest)
    if command == "autotune":
        from cfl_ops._gpu import autotune as _autotune

        return _autotune.main(rest)
    if command == "info" and not rest:
        from . import config

        config.show()
        return 0
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    wrong = f"unknown command: {' '.join(arguments)}\n" if arguments else ""
    print(wrong + USAGE, end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
