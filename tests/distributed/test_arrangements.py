"""One objective, however it is computed: processes, chunks, packing, kinds of data."""

import socket
import time

import arrangements
from torch import multiprocessing


def test_one_process():
    arrangements.run(0, 1, 0, [(arrangements.ROWS,)])


def test_two_processes_with_even_and_uneven_batches():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = multiprocessing.spawn(
        arrangements.run, args=(2, port, [(4, 4), (5, 3)]), nprocs=2, join=False
    )
    deadline = time.monotonic() + 150
    try:
        while not processes.join(timeout=max(0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, "the processes hang"
    finally:
        for process in processes.processes:
            process.kill()
