"""Processes that share the work of one command, as `torchrun` and `accelerate launch` start them.

Each does its part, the first one writes, and what fails in one of them ends all with one message.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from simcse_trainer.cli.train import print_error
from simcse_trainer.errors import InputError

T = TypeVar("T")

# A process that ended is noticed at once; one that reads a slow disk is waited for.
_LONGEST_BLOCK = timedelta(days=1)
# How long the others keep quiet, so that the launcher does not end the one that speaks.
_LONGEST_MESSAGE = timedelta(seconds=10)


@dataclass(frozen=True)
class Processes:
    """Which process this is, and of how many.

    Attributes:
        rank: Its number among all of them.
        count: How many there are; 1 without a launcher.
        local_rank: Its number among those of this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this one reports and writes."""
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """An accelerator of its own, while there are enough; None where all is as without them."""
        accelerator = torch.accelerator.current_accelerator()
        if self.count == 1 or accelerator is None:
            return None
        return f"{accelerator.type}:{self.local_rank % torch.accelerator.device_count()}"

    def gather(self, parts: Iterator[T]) -> Iterator[T]:
        """Yield the parts of all processes in the first one, and none in the others.

        Args:
            parts: Of this process: of n parts every `count`-th, from its `rank` on.

        Yields:
            The n parts, in order.

        Raises:
            ConnectionError: Another process has ended.
        """
        if self.count == 1:
            yield from parts
            return
        complete = True
        while complete:
            part = next(parts, None)
            received: list[Any] | None = [None] * self.count if self.is_first else None
            with _named_failures():
                dist.gather_object(part, received)
                flag = torch.tensor(part is not None, dtype=torch.int32)
                dist.all_reduce(flag, dist.ReduceOp.MIN)
            complete = bool(flag)
            yield from (one for one in received or () if one is not None)


def find_processes(environment: Mapping[str, str]) -> Processes:
    """Find which process this is by what launchers say to those they start.

    Args:
        environment: Environment variables. Where some of a launcher's are missing, as where one
            of them is left from something else, there is one process.
    """
    try:
        rank, count, local = (int(environment[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    except (KeyError, ValueError):
        return Processes()
    address = environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")
    if not address or not 0 <= rank < count or count == 1:
        return Processes()
    return Processes(rank, count, local)


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Meet the other processes of this command, and leave together with them.

    Raises:
        SystemExit: A process has failed, and one of them has said why.
    """
    processes = find_processes(os.environ)
    if processes.count == 1:
        yield processes
        return
    # So that a file that is being written is deleted.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    store, _, _ = next(rendezvous("env://"))
    try:
        dist.init_process_group(
            "gloo",
            store=store,
            rank=processes.rank,
            world_size=processes.count,
            timeout=_LONGEST_BLOCK,
        )
        yield processes
        with _named_failures():
            dist.barrier()
        dist.destroy_process_group()
    except Exception as error:
        sys.exit(_say_once(error, store))


def _say_once(error: Exception, store: Any) -> int:
    """Report an error if no other process has, and return the exit status."""
    is_known = isinstance(error, InputError | OSError)
    try:
        is_silent = store.add("failed", 1) > 1
    except RuntimeError:  # the process that kept the store is gone
        is_silent = False
    if is_silent:
        with suppress(RuntimeError):
            store.wait(["said"], _LONGEST_MESSAGE)
    elif is_known:
        print_error(str(error))
    else:
        traceback.print_exception(error)
    with suppress(RuntimeError):
        store.set("said", "yes")
    return 2 if is_known else 1


@contextmanager
def _named_failures() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(
            "another process of this command has ended. If it was killed, memory was too small: "
            "start fewer processes, or pass a smaller --batch_size."
        ) from error
