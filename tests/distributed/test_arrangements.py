"""One objective, however it is computed: processes, chunks, packing, kinds of data."""

import socket

import pytest
import torch
from helpers import arrangements
from helpers.processes import run_processes

# Processes, seconds each.
pytestmark = pytest.mark.slow


def in_two_processes(function, *args) -> None:
    """Run function(rank, 2, port, *args) in two processes that find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_processes(function, 2, 2, port, *args)


def test_one_process():
    arrangements.run(0, 1, 0, [(arrangements.ROWS,)])


def test_two_processes_with_even_and_uneven_batches():
    in_two_processes(arrangements.run, [(4, 4), (5, 3)])


def test_two_processes_with_a_sharded_model():
    in_two_processes(arrangements.sharded)


def test_two_processes_with_decoders_of_every_family():
    in_two_processes(arrangements.families)


def test_two_processes_keep_the_best_model(tmp_path):
    in_two_processes(arrangements.keep_the_best, str(tmp_path))


def test_two_processes_train_as_one_with_the_doubled_batch(tmp_path):
    arrangements.train(0, 1, 0, str(tmp_path))
    in_two_processes(arrangements.train, str(tmp_path))
    one, losses = torch.load(tmp_path / "world1.pt")
    two, logged = torch.load(tmp_path / "world2.pt")
    torch.testing.assert_close(logged, losses, rtol=1e-6, atol=1e-6)
    start = arrangements.build("hard negatives", True, None).model.state_dict()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-5, msg=name)
    moved = [float((one[name] - start[name]).abs().max()) for name in one]
    assert max(moved) > 0.01
