"""``--distributed N``: the demo's training in several processes on this machine, which torchrun's agent starts."""

from __future__ import annotations

import logging
import signal
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from . import user_data
from .display import Outcome, stop_on_interrupt, train
from .team import Team
from .training import Setting

__all__ = ["DistributedError", "launch", "train_distributed"]

# How long a process waits for the others before it gives up.
PATIENCE = timedelta(seconds=120)
# Ctrl-C is not for the agent: it would end the processes, and with them what is to be reported.
SIGNALS = "SIGTERM,SIGHUP,SIGQUIT"


class DistributedError(RuntimeError):
    """A process has failed; the message says which, and why."""


@dataclass(frozen=True)
class _Job:
    """What each process is told."""

    groups: Sequence[Sequence[Setting]]
    data: str
    threads: int
    stop_file: str


def train_distributed(
    groups: Sequence[Sequence[Setting]], data: str, *, processes: int, threads: int
) -> Outcome:
    """Train in several processes; the first draws the display, and its outcome is returned.

    Args:
        groups: as :func:`train` takes them; each batch is split over the processes.
        data: what ``--data`` names, which each process loads.
        processes: how many.
        threads: CPU threads of each.

    Raises:
        DistributedError: a process has failed; the others were ended.

    """
    with tempfile.TemporaryDirectory(prefix="cfl_ops_demo_") as folder:
        # Ctrl-C reaches the processes, which cannot be signalled safely in a collective, as a file.
        stop_file = Path(folder) / "stop"
        with stop_on_interrupt(tell=stop_file.touch):
            outcome: Outcome = launch(_work, (_Job(groups, data, threads, str(stop_file)),), processes)[0]
        return outcome


def launch(function: Callable[..., Any], arguments: Sequence[Any], processes: int) -> dict[int, Any]:
    """Run a function in several processes as torchrun does; what each returned, by rank.

    Raises:
        DistributedError: a process has failed.

    """
    with tempfile.TemporaryDirectory(prefix="cfl_ops_demo_") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=str(uuid.uuid4()),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            signals_to_handle=SIGNALS,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        # What the agent has to say is said in the error below.
        logger = logging.getLogger("torch.distributed.elastic")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        handlers = {name: signal.getsignal(getattr(signal, name)) for name in SIGNALS.split(",")}
        try:
            results: dict[int, Any] = elastic_launch(config, function)(*arguments)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            message = failure.message
            if isinstance(message, dict):
                message = message.get("message", message)
            if failure.exitcode > 0 and not Path(failure.error_file).is_file():  # no exception ended it
                message = f"it ended with exit code {failure.exitcode}"
            raise DistributedError(f"process {rank} of {processes} failed: {message}") from None
        finally:
            logger.setLevel(level)
            for name, handler in handlers.items():
                signal.signal(getattr(signal, name), handler)
    return results


def _work(job: _Job) -> Outcome | None:
    """What each process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(job.threads)
    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        team = Team.joined()
        first = team.rank == 0
        data = user_data.load(job.data)
        stop = team.together(lambda: first and Path(job.stop_file).exists())
        outcome = train(job.groups, data, Console(quiet=not first), stop, team)
    finally:
        torch.distributed.destroy_process_group()
    return outcome if first else None
