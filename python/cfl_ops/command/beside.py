"""The files that --json and --picture write beside the output: what is wrong with their names, before any work."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .failures import UsageError

__all__ = ["check_beside", "same_file"]

WEIGHTS = (".cflz", ".safetensors", ".pt", ".pth", ".bin", ".index.json")


def check_beside(options: dict[str, str | None], others: Iterable[str | None], force: bool) -> None:
    """Refuse a file that the command reads or writes otherwise, and one that is there already.

    Args:
        options: the file of each option, ``-`` for stdout.
        others: the command's arguments.
        force: replace a file that is there, if it is none of those.
    """
    taken = [Path(each) for each in others if each is not None and each != "-"]
    for option, name in options.items():
        if name is None or name == "-":
            continue
        path = Path(name)
        if path.is_dir():
            raise UsageError(f"{option} {name}: is a folder: name the file to write in it")
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{option} {name}: there is no folder {path.parent}")
        if path.exists() and not path.is_file():
            continue  # a pipe or a device is written to as it is
        if any(same_file(path, other) for other in taken):
            raise UsageError(f"{option} {name}: is a file that the command reads or writes otherwise")
        if name.lower().endswith(WEIGHTS):
            raise UsageError(f"{option} {name}: has the ending of a file of weights")
        if path.is_file() and not force:
            raise UsageError(f"{option} {name}: is there already: --force replaces it")
        taken.append(path)


def same_file(one: Path, other: Path) -> bool:
    """Whether two names are one file's, or will be."""
    try:
        return one.samefile(other)
    except OSError:  # one is not there
        return one.resolve() == other.resolve()
