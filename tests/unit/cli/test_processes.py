"""Processes that share a command: which there are, and how they divide the work."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.tiny import tiny_backbone, tiny_tokenizer
from pyarrow import parquet

from simcse_trainer import SimCSE, SimCSEModel
from simcse_trainer.cli.processes import Processes, find_processes
from simcse_trainer.inference import simcse

LAUNCHED = {
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = SimCSEModel(tiny_backbone(), tiny_tokenizer(), pooling_mode="mean", max_seq_length=40)
    model.save_pretrained("model")
    return tmp_path


def test_a_launcher_says_which_process_this_is():
    assert find_processes(LAUNCHED) == Processes(1, 4, 0)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        *({name: value} for name, value in LAUNCHED.items()),
        *({k: v for k, v in LAUNCHED.items() if k != name} for name in LAUNCHED),
        LAUNCHED | {"RANK": "four"},
        LAUNCHED | {"RANK": "4"},
        LAUNCHED | {"WORLD_SIZE": "1", "RANK": "0"},
        LAUNCHED | {"MASTER_PORT": ""},
    ],
)
def test_variables_that_are_left_over_make_no_processes(environment):
    found = find_processes(environment)
    assert found == Processes()
    assert found.is_first
    assert found.device is None
    assert [*found.gather(iter([1, 2]))] == [1, 2]


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [0, 1, 8, 9, 13])
def test_every_block_is_of_one_process_in_turn(folder, monkeypatch, count, rows):
    monkeypatch.setattr(simcse, "_BLOCK_SENTENCES", 2)
    monkeypatch.setattr(SimCSE, "_embed", lambda *given: torch.ones(len(given[1]), 1))
    model, texts = SimCSE("model"), [str(i) for i in range(rows)]
    parts = [
        [block for block, _ in model.encode_stream(texts, shard=(rank, count))]
        for rank in range(count)
    ]
    turns = max(map(len, parts))
    blocks = [part[turn] for turn in range(turns) for part in parts if turn < len(part)]
    assert blocks == [texts[i : i + 2] for i in range(0, rows, 2)]


def torchrun(folder, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--standalone", "-m", "simcse_trainer", "encode", "model", *words]
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=-1, stderr=-1, text=True)


@pytest.mark.slow
def test_two_processes_write_what_one_writes(folder):
    words = ["a dog", "", "big red cat", "the man is eating " * 3, "the small mat"]
    lines = [words[i % 5] + " child" * (i % 7) for i in range(100_000)]
    (folder / "in.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with torchrun(folder, "in.txt", "--output", "two.parquet") as process:
        said, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert said == "100000 embeddings of 32 dimensions are in two.parquet.\n"
    found = parquet.read_table(folder / "two.parquet")
    assert found["text"].to_pylist() == lines
    expected = SimCSE("model").encode(lines, return_numpy=True)
    numbers = found["embedding"].combine_chunks().flatten().to_numpy().reshape(expected.shape)
    np.testing.assert_allclose(numbers, expected, atol=1e-6)
    assert sorted(p.name for p in folder.iterdir()) == ["in.txt", "model", "two.parquet"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.txt", "--output", "v.npy"], "none.txt: no such file"),
        (["bad.txt", "--output", "v.npy"], "bad.txt row 5001: byte 0xff"),
        (["in.txt", "--output", "gone/v.npy"], "a folder that exists"),
        (["--output", "v.npy"], "2 processes cannot share standard input"),
    ],
)
def test_what_fails_ends_both_with_one_message(folder, words, said):
    (folder / "bad.txt").write_bytes(b"a dog\n" * 5000 + b"a\xff\n" + b"a dog\n" * 5000)
    (folder / "in.txt").write_text("a dog\n" * 5000, encoding="utf-8")
    before = sorted(path.name for path in folder.iterdir())
    with torchrun(folder, *words) as process:
        _, log = process.communicate(timeout=300)
    assert process.returncode != 0
    (message,) = [line for line in log.splitlines() if "error: " in line]
    assert said in message
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_other(folder):
    import psutil

    (folder / "in.txt").write_text("a dog\n" * 4_000_000, encoding="utf-8")
    with torchrun(folder, "in.txt", "--output", "v.npy") as process:
        started = psutil.Process(process.pid)
        while not any(path.stat().st_size > 1000 for path in folder.glob(".v.npy-*")):
            assert process.poll() is None
        second = next(p for p in started.children() if p.environ().get("RANK") == "1")
        second.send_signal(signal.SIGKILL)
        _, log = process.communicate(timeout=300)
    assert process.returncode != 0
    assert not list(folder.glob("*.npy"))
    assert log.count("error: ") <= 1
