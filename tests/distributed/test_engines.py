"""DDP, FSDP2 and ZeRO-2 in two processes: each saves, resumes and evaluates as one would."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from helpers import ROOT
from helpers.processes import run_once

# Processes, seconds each.
pytestmark = pytest.mark.slow

SCRIPT = ROOT / "tests/helpers/engines.py"
KINDS = ("full", "lora", "lora and head", "unsupervised head", "mlm")
CELLS = ("save", "resume", "load_best", "evaluate", "chunks")
FAMILIES = ("roberta", "xlm-roberta", "modernbert", "qwen3")


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """How each cell of an engine ended, in both processes: one start for all of them."""

    @functools.cache
    def run(engine: str) -> list[dict]:
        return run_once(f"engine-{engine}", tmp_path_factory, functools.partial(start, engine))

    return run


def start(engine: str) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        process = subprocess.Popen(
            [sys.executable, *torchrun, str(SCRIPT), engine, folder],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            said = process.communicate(timeout=280)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said = "the processes hang"
        print(said[-3000:])
        paths = [Path(folder) / f"found{rank}.json" for rank in (0, 1)]
        return [json.loads(p.read_text("utf-8")) if p.is_file() else {} for p in paths]


def check(run, engine: str, kind: str, cell: str) -> None:
    ended = [found.get(kind, {}).get(cell, "not reached") for found in run(engine)]
    assert ended == ["right", "right"]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
def test_ddp(kind, cell, run):
    check(run, "ddp", kind, cell)


@pytest.mark.field("12a")
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
def test_fsdp2(kind, cell, run):
    check(run, "fsdp2", kind, cell)


@pytest.mark.field("12b")
@pytest.mark.parametrize("family", FAMILIES)
def test_fsdp2_trains_every_family(family, run):
    check(run, "fsdp2", "families", family)


@pytest.mark.field("13a")
@pytest.mark.parametrize("cell", ["accumulated", "saved by epoch", "resumed in the second pass"])
def test_streams_of_several_files_in_two_processes(cell, run):
    check(run, "streams", "streams", cell)


@pytest.mark.field("14b")
def test_processes_with_slow_steps_save_before_they_are_killed(run):
    check(run, "streams", "streams", "SIGTERM")


@pytest.mark.field("15e")
def test_fsdp2_refuses_checkpointing_that_draws_other_masks(run):
    check(run, "fsdp2", "refusals", "activation checkpointing")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", KINDS)
def test_zero2(kind, cell, run):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed: it is in the extra `test`, on Linux")
    check(run, "zero2", kind, cell)
