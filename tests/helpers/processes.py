"""Real processes for a test, and an end to those that hang."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import multiprocessing


def run_processes(function: Callable, world: int, *args, seconds: float = 150) -> None:
    """Run function(rank, *args) in `world` processes; raises what one of them raises."""
    processes = multiprocessing.spawn(function, args=args, nprocs=world, join=False)
    deadline = time.monotonic() + seconds
    # Each join waits for one more process, and raises what a process raised.
    try:
        while not processes.join(timeout=max(0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()
