"""`simcse-trainer encode`: a row a line, and no file but a whole one."""

import functools
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.command_line import error, run
from helpers.tiny import tiny_backbone, tiny_tokenizer
from pyarrow import parquet

from simcse_trainer import SimCSE, SimCSEModel
from simcse_trainer.inference import export, simcse

LINES = ["a dog", "", "big red cat", "child " * 60, "the man"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = SimCSEModel(tiny_backbone(), tiny_tokenizer(), pooling_mode="mean", max_seq_length=40)
    model.save_pretrained("model")
    (tmp_path / "in.txt").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return tmp_path


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("block", [1, 2, 4096])
def test_a_line_is_a_row_whatever_the_blocks(folder, monkeypatch, capsys, block):
    monkeypatch.setattr(simcse, "_BLOCK_SENTENCES", block)
    expected = SimCSE("model").encode(LINES, return_numpy=True)
    assert run(monkeypatch, "encode", "model", "in.txt", "--output", "v.npy") == 0
    assert capsys.readouterr().out == "5 embeddings of 32 dimensions are in v.npy.\n"
    found = np.load("v.npy", allow_pickle=False)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert run(monkeypatch, "encode", "model", "in.txt", "--output", "v.jsonl") == 0
    lines = (folder / "v.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["text"] for record in records] == LINES
    numbers = np.array([record["embedding"] for record in records], dtype=np.float32)
    np.testing.assert_array_equal(numbers, found)
    assert run(monkeypatch, "encode", "model", "in.txt", "--output", "v.parquet") == 0
    file = parquet.ParquetFile("v.parquet")
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert sizes == [min(block, 5 - start) for start in range(0, 5, block)]
    table = file.read()
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 32)
    assert table["text"].to_pylist() == LINES
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), np.float32), found)
    assert listing(folder) == ["in.txt", "model", "v.jsonl", "v.npy", "v.parquet"]


def test_options(folder, monkeypatch):
    words = ("encode", "model", "in.txt", "--output", "v.npy", "--no-normalize")
    assert run(monkeypatch, *words, "--truncate-dim", 8, "--max_seq_length", 5, "--device=cpu") == 0
    model = SimCSE("model", truncate_dim=8, max_seq_length=5)
    expected = model.encode(LINES, return_numpy=True, normalize_to_unit=False)
    np.testing.assert_allclose(np.load("v.npy"), expected, atol=1e-6)


def test_standard_input_and_columns(folder, monkeypatch):
    expected = SimCSE("model").encode(["a dog", "a cat"], return_numpy=True)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"a dog\na cat")))
    assert run(monkeypatch, "encode", "model", "--output", "v.npy") == 0
    np.testing.assert_allclose(np.load("v.npy"), expected, atol=1e-6)
    (folder / "in.csv").write_text('text,id\na dog,1\n"a cat",2\n', encoding="utf-8")
    assert run(monkeypatch, "encode", "model", "in.csv", "--output", "v.npy") == 0
    np.testing.assert_allclose(np.load("v.npy"), expected, atol=1e-6)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert run(monkeypatch, "encode", "model", "--output", "v.npy") == 0
    assert np.load("v.npy").shape == (0, 32)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert run(monkeypatch, "encode", "model", "--output", "v.parquet") == 0
    assert parquet.read_table("v.parquet").shape == (0, 2)


def test_parquet_holds_one_block_at_a_time(tmp_path):
    """Blocks are written as they come: the file grows before the next is asked for."""
    path, sizes = tmp_path / "v.parquet", []

    def blocks():
        for _ in range(4):
            yield ["a"] * 1000, torch.randn(1000, 64)
            (unfinished,) = tmp_path.iterdir()
            sizes.append(unfinished.stat().st_size)

    with export.open_embeddings(path) as write:
        assert write(blocks(), 64) == 4000
        assert not path.exists()
    assert all(later - earlier > 200_000 for earlier, later in itertools.pairwise([0, *sizes]))
    assert parquet.read_table(path).num_rows == 4000


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_text_that_is_no_unicode_is_one_line(folder, monkeypatch, capsys, suffix):
    (folder / "in.jsonl").write_text('{"text": "a"}\n{"text": "\\ud800"}\n', encoding="utf-8")
    words = ("encode", "model", "in.jsonl", "--output", f"v.{suffix}")
    assert "in.jsonl row 2" in error(monkeypatch, capsys, *words)
    assert listing(folder) == ["in.jsonl", "in.txt", "model"]


def test_a_run_that_was_stopped_has_its_model_in_a_checkpoint(folder, monkeypatch):
    from simcse_trainer.model.io.checkpoints import finalize

    (folder / "run").mkdir()
    (folder / "model").rename(folder / "staged")
    finalize(folder / "staged", folder / "run" / "checkpoint-3")
    assert run(monkeypatch, "encode", "run", "in.txt", "--output", "v.npy") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model", "none.txt", "--output", "v.npy"], "none.txt: no such file"),
        (["model", "model", "--output", "v.npy"], "model is a folder"),
        (["model", "bad.txt", "--output", "v.npy"], "bad.txt row 3: byte 0xff at position 2"),
        (["model", "two.csv", "--output", "v.npy"], "which column are the texts?"),
        (["nowhere", "in.txt", "--output", "v.npy"], "nowhere"),
        (["model", "in.txt", "--output", "v.pt"], "v.pt is none of .npy, .jsonl, .parquet"),
        (["model", "in.txt", "--output", "gone/v.npy"], "a folder that exists"),
        (["model", "in.txt"], "--output"),
        (["model", "in.txt", "--output", "v.npy", "--truncate_dim", "99"], "expected 1 to 32"),
        (["model", "in.txt", "--output", "v.npy", "--batch_size", "0"], "batch_size"),
        (["model", "in.txt", "--output", "v.npy", "--device", "tpu9"], "device is 'tpu9'"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_no_file(folder, monkeypatch, capsys, words, said):
    (folder / "bad.txt").write_bytes(b"a\nb\nc\xff\n")
    (folder / "two.csv").write_text("a,b\nc,d\n", encoding="utf-8")
    (folder / "v.npy").write_text("of yesterday", encoding="utf-8")
    before = listing(folder)
    monkeypatch.setattr(simcse, "_BLOCK_SENTENCES", 1)  # rows are written before the bad one
    assert said in error(monkeypatch, capsys, "encode", *words)
    assert listing(folder) == before
    assert (folder / "v.npy").read_text(encoding="utf-8") == "of yesterday"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.slow
def test_an_interrupted_run_leaves_no_such_file(folder, how):
    code = (
        "from simcse_trainer.inference import simcse; simcse._BLOCK_SENTENCES = 50; "
        "from simcse_trainer.cli import main; main()"
    )
    words = ["encode", "model", "--output", "v.npy"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words], stdin=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdin.write(b"a dog\n" * 500)
        process.stdin.flush()
        wait_for(lambda: any(path.stat().st_size > 0 for path in folder.glob(".v.npy-*")))
        process.send_signal(how)
        # Nothing else holds the pipe open: what was sent is the end.
        _, said = process.communicate(timeout=200)
    assert process.returncode in (130, -how)
    assert b"Traceback" not in said
    assert not (folder / "v.npy").exists()
    if how == signal.SIGINT:
        assert listing(folder) == ["in.txt", "model"]


def wait_for(condition):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_full_disk_is_one_line(folder, monkeypatch, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")

    full = functools.partial(open, "/dev/full")
    monkeypatch.setattr(export, "open", lambda _, mode: full(mode), raising=False)
    assert "No space left" in error(
        monkeypatch, capsys, "encode", "model", "in.txt", "--output", "v.npy"
    )
    assert listing(folder) == ["in.txt", "model"]
