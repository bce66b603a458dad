"""One objective, however it is computed: processes, chunks, packing, kinds of data."""

import contextlib
import json
import socket
from pathlib import Path

import pytest
import torch
from helpers import arrangements
from helpers.processes import run_once, run_processes

# Processes, seconds each.
pytestmark = pytest.mark.slow


@pytest.fixture
def found(tmp_path_factory):
    """The folder that two processes wrote to, and how each check ended in both of them."""

    def start() -> list:
        folder = tmp_path_factory.mktemp("arrangements")
        with contextlib.ExitStack() as sockets:
            ports = [free_port(sockets) for _ in arrangements.TWO_PROCESSES]
        run_processes(arrangements.in_two_processes, 2, ports, str(folder), seconds=280)
        texts = [(folder / f"found{rank}.json").read_text("utf-8") for rank in (0, 1)]
        return [str(folder), *map(json.loads, texts)]

    return run_once("arrangements", tmp_path_factory, start)


def free_port(sockets: contextlib.ExitStack) -> int:
    """A port that no other one asked for meanwhile has."""
    free = sockets.enter_context(socket.socket())
    free.bind(("127.0.0.1", 0))
    return free.getsockname()[1]


def test_one_process():
    arrangements.run(0, 1, [(arrangements.ROWS,)])


@pytest.mark.parametrize("name", arrangements.TWO_PROCESSES)
def test_two_processes(name, found):
    _, *ended = found
    assert [outcomes[name] for outcomes in ended] == ["right", "right"]


def test_two_processes_train_as_one_with_the_doubled_batch(found):
    folder = Path(found[0])
    arrangements.train(0, 1, str(folder))
    one, losses = torch.load(folder / "world1.pt")
    two, logged = torch.load(folder / "world2.pt")
    torch.testing.assert_close(logged, losses, rtol=1e-6, atol=1e-6)
    start = arrangements.build("hard negatives", True, None).model.state_dict()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-5, atol=1e-5, msg=name)
    moved = [float((one[name] - start[name]).abs().max()) for name in one]
    assert max(moved) > 0.01
