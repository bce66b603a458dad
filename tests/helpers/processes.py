"""Real processes for a test, and an end to those that hang."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
from filelock import FileLock
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


def run_once(name: str, tmp_path_factory: pytest.TempPathFactory, start: Callable[[], Any]) -> Any:
    """Return what start() found, called once for all tests, whichever of pytest's own processes
    asks."""
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    found = shared / f"{name}.json"
    with FileLock(shared / f"{name}.lock"):
        if not found.exists():
            found.write_text(json.dumps(start()), encoding="utf-8")
    return json.loads(found.read_text(encoding="utf-8"))
