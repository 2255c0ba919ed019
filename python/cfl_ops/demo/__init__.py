"""``python -m cfl_ops demo``: closed-form heads and their rivals on real data, with a report to look at."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

__all__ = ["main", "missing_extras"]

# import name: package to install
EXTRAS = {
    "typer": "typer",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "jinja2": "jinja2",
    "sklearn": "scikit-learn",
    "mlxtend": "mlxtend",
}


def missing_extras() -> list[str]:
    """The packages that the demo needs and that are not installed."""
    return [package for module, package in EXTRAS.items() if importlib.util.find_spec(module) is None]


def main(arguments: Sequence[str]) -> int:
    """Run the demo with command-line arguments; returns the exit code."""
    missing = missing_extras()
    if missing:
        print(
            f"The demo needs packages that are not installed: {', '.join(missing)}.\n"
            'Install them with: pip install "cfl-ops[demo]"',
            file=sys.stderr,
        )
        return 2
    try:
        from .cli import run

        return run(arguments)
    except KeyboardInterrupt:
        return 130
