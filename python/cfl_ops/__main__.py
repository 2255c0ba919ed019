"""``cfl-ops``, which is ``python -m cfl_ops``: files of weights, and ``demo``, ``info`` and ``autotune``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cfl_ops import command as files

_FILES = "\n".join(f"  {name:<11}{help}" for name, help in files.COMMANDS.items())
USAGE = f"""usage: cfl-ops COMMAND ...   (or: python -m cfl_ops COMMAND ...)

files of weights (cfl-ops COMMAND --help):
{_FILES}

others:
  demo       train closed-form heads and their rivals on real data, and write a report (demo --help)
  info       print versions, instruction set, and which backend serves which op
  autotune   time the GPU kernels' tile sizes on this card and keep the fastest (autotune --help)

exit codes of the first: 0 all is well, 1 corrupt data, 2 wrong command line, 3 wrong base of a delta,
4 cannot read or write, 5 no memory or a fault of cfl-ops, 130 interrupted, 141 nobody reads stdout
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:  # while modules are imported, too
        return 130


def _run(arguments: Sequence[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in files.COMMANDS:
        return files.main(arguments)
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
    if command == "--version" and not rest:
        from ._version import __version__

        print(f"cfl-ops {__version__}")
        return 0
    wrong = f"unknown command: {' '.join(arguments)}\n" if arguments else ""
    print(wrong + USAGE, end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
