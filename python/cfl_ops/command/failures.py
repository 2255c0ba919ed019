"""What a shell script sees of a failure: an exit code, and one line on stderr."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import FrameType

from cfl_ops.errors import CorruptDataError, WrongBaseError

__all__ = ["NO_MEMORY", "Code", "UsageError", "VerificationError", "guarded", "plain", "printable", "say"]


class Code(IntEnum):
    """The exit codes: docs/command.md lists them."""

    GOOD = 0
    BAD_DATA = 1
    USAGE = 2
    WRONG_BASE = 3
    INPUT_OUTPUT = 4
    FAULT = 5
    INTERRUPTED = 130
    BROKEN_PIPE = 141


NO_MEMORY = "can't allocate memory"
"""What torch says then, in a RuntimeError."""


class UsageError(Exception):
    """What was asked for cannot be done, whatever the bytes are."""


class VerificationError(Exception):
    """The files were read, and what they hold is not as it should be; the lines were printed already."""


def printable(text: str) -> str:
    """What may go to a terminal: names and metadata of a file may hold its control sequences, and line ends."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text
    )


def say(command: str, message: str) -> None:
    """One line on stderr."""
    print(f"cfl-ops {command}: {printable(' '.join(message.split()))}", file=sys.stderr)


def plain(error: BaseException | str) -> str:
    """A message of the package without the name of the function, which is the command's affair."""
    return re.sub(r"^cfl_ops\.\w+: ", "", str(error))


def guarded(command: str, debug: bool, work: Callable[[], None]) -> int:
    """Do the work; the exit code. What it raises becomes one line, with ``debug`` after its traceback."""
    try:
        with _tidy_when_ended(), _warnings_as_lines(command):
            work()
            sys.stdout.flush()
        return Code.GOOD
    except BrokenPipeError:
        # Whoever read has gone, as `head` does: nothing to say, now or when Python closes its files.
        _silence(sys.stdout)
        return Code.BROKEN_PIPE
    except KeyboardInterrupt:
        say(command, "interrupted; nothing was put in place")
        return Code.INTERRUPTED
    except Exception as error:
        if debug:
            for line in traceback.format_exc().splitlines():
                print(printable(line), file=sys.stderr)
        code, message = _explain(error)
        say(command, message)
        return code


def _explain(error: Exception) -> tuple[int, str]:
    text = plain(error)
    if isinstance(error, UsageError):
        return Code.USAGE, text
    if isinstance(error, WrongBaseError):
        return Code.WRONG_BASE, text
    if isinstance(error, (CorruptDataError, VerificationError)):
        return Code.BAD_DATA, text
    if isinstance(error, OSError):
        where = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        return Code.INPUT_OUTPUT, where + (error.strerror or text or type(error).__name__)
    if isinstance(error, MemoryError) or NO_MEMORY in text:
        return Code.FAULT, "not enough memory"
    if isinstance(error, (TypeError, ValueError)) and str(error).startswith("cfl_ops."):
        return Code.USAGE, text  # the package's own refusal of an argument
    return Code.FAULT, f"{type(error).__name__}: {text} (--debug shows where)"


@contextmanager
def _tidy_when_ended() -> Iterator[None]:
    """SIGTERM and SIGHUP end the work as Ctrl-C does, so that temporary files go."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    kinds = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {}
    try:
        for kind in kinds:
            if signal.getsignal(kind) is signal.SIG_DFL:  # nohup's "ignore" stays
                previous[kind] = signal.signal(kind, stop)
    except ValueError:  # not in the main thread
        pass
    try:
        yield
    finally:
        for kind, handler in previous.items():
            signal.signal(kind, handler)


@contextmanager
def _warnings_as_lines(command: str, most: int = 3) -> Iterator[None]:
    """Print the first warnings as lines, and how many more there were."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            lines = dict.fromkeys(plain(each.message) for each in caught)
            for line in list(lines)[:most]:
                say(command, f"warning: {line}")
            if len(lines) > most:
                say(command, f"warning: and {len(lines) - most} more of the kind")


def _silence(stream: object) -> None:
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())  # type: ignore[attr-defined]
        os.close(null)
    except (OSError, ValueError, AttributeError):  # a stream of a test has no descriptor
        pass
