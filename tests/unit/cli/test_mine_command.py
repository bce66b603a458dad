"""`simcse-trainer mine`, from the command line to a file that trains."""

import csv
import sys

import pytest
from helpers.retrieval import random_texts
from helpers.tiny import tiny_config, tiny_tokenizer

from simcse_trainer import SimCSEModel
from simcse_trainer.cli import main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    import torch
    from transformers import AutoModel

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    backbone = AutoModel.from_config(tiny_config("bert"))
    SimCSEModel(backbone, tiny_tokenizer(), pooling_mode="mean").save_pretrained("model")
    texts = random_texts(60, 1)
    with open("pairs.csv", "w", newline="") as file:
        csv.writer(file).writerows([("a", "b"), *zip(texts[:20], texts[20:40], strict=True)])
    (tmp_path / "corpus.txt").write_text("\n".join(texts[30:]))
    return tmp_path


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["simcse-trainer", "mine", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    found = capsys.readouterr()
    return ended.value.code or 0, found.out, found.err.splitlines()[-1:]


def test_pairs_become_triplets(folder, monkeypatch, capsys):
    words = ["pairs.csv", "out.csv", "--model", "model", "--corpus", "corpus.txt"]
    more = ["--columns", "a", "b", "--num_negatives", 2, "--guide_model", "model"]
    status, out, _ = run(monkeypatch, capsys, *words, *more)
    assert status == 0
    with open("out.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = "sent0, sent1, hard_neg_1, hard_neg_2"
    assert out.startswith(f"out.csv has {len(rows)} rows of {names}, with negatives from 30 pass")
    assert "Mean cosine with the query: positives" in out
    left = 20 - len(rows)
    assert (f"{left} rows had fewer than 2 in the ranks 1 to 30" in out) == (left > 0)
    corpus = set((folder / "corpus.txt").read_text().splitlines())
    assert {row["hard_neg_2"] for row in rows} <= corpus
    status, _, err = run(monkeypatch, capsys, *words)
    assert status == 2
    assert err == ["error: out.csv is there already; name another file, or pass --overwrite."]
    assert run(monkeypatch, capsys, *words, "--overwrite", "--short_rows", "drop")[0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pairs.csv", "out.csv"], "Missing option '--model'"),
        (["gone.csv", "out.csv", "--model", "model"], "gone.csv: no such file"),
        (["pairs.csv", "out.parquet", "--model", "model"], "neither .csv nor .jsonl"),
        (["pairs.csv", "pairs.csv", "--model", "m", "--overwrite"], "pairs.csv is what is read"),
        (["pairs.csv", "o.csv", "--model", "m", "--corpus", "no.txt"], "no.txt: no such file"),
        (["pairs.csv", "o.csv", "--model", "m", "--rank_max", "0"], "rank_max is 0; expected 1"),
        (["pairs.csv", "o.csv", "--model", "m", "--columns", "a", "c"], "no column 'c'"),
        (["pairs.csv", "o.csv", "--model", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(words, said, folder, monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, *words)
    assert status == 2
    assert err[0].startswith("error: ")
    assert said in err[0]
    assert (folder / "pairs.csv").read_text().startswith("a,b")
    assert not list(folder.glob(".o*"))
