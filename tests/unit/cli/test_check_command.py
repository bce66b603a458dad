"""`simcse-trainer check`: facts, warnings, and exit status 2 where training would be pointless."""

import csv
import json

import pytest
from helpers.command_line import error, run
from helpers.tiny import WORDS, save_tiny

TEXTS = [f"{WORDS[i % 16]} {WORDS[(i * 3) % 17]} {WORDS[(i * 5 + 1) % 17]}" for i in range(60)]


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(name, **columns):
        with open(name, "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(columns)
            table.writerows(zip(*columns.values(), strict=True))
        return name

    return write


def test_facts_with_the_tokens_of_a_model(write, tmp_path, monkeypatch, capsys):
    model = save_tiny(tmp_path / "model")
    write("a.csv", sent0=TEXTS, sent1=[f"{text} mat" for text in TEXTS])
    write("e.csv", sentence1=TEXTS[:4], sentence2=TEXTS[4:8], score=range(4))
    words = ("--model", model, "--eval_file", "e.csv", "--max_seq_length", 5)
    assert run(monkeypatch, "check", "a.csv", *words) == 0
    out = capsys.readouterr().out
    assert "a.csv: 60 rows of sent0, sent1" in out
    assert "Trains supervised, on pairs." in out
    assert [line.split() for line in out.splitlines() if line.startswith("sent1")] == [
        ["sent1", "6", "6", "6", "100.0", "%"]
    ]
    assert "Evaluation pairs in the data: 0 of 4" in out
    assert "Warning: 100.0 % of the texts in 'sent1' are cut at 5 tokens" in out
    assert out.count("[CLS]") == 10


def test_columns_are_named_as_in_training(write, monkeypatch, capsys):
    write("a.csv", question=TEXTS, reply=[f"{text} mat" for text in TEXTS], id=range(60))
    assert run(monkeypatch, "check", "a.csv", "--columns", "question", "reply") == 0
    assert "60 rows of sent0, sent1" in capsys.readouterr().out
    assert "question" in error(monkeypatch, capsys, "check", "a.csv")


def test_exit_status_2_where_training_would_be_pointless(write, monkeypatch, capsys):
    write("a.csv", sent0=TEXTS, sent1=["the answer"] * 60)
    said = error(monkeypatch, capsys, "check", "a.csv")
    assert said.startswith("error: Training on this would be pointless. 60 of 60 rows have")
    write("b.csv", sent0=TEXTS, sent1=TEXTS)
    assert "In every row 'sent1' is the text of 'sent0'" in error(
        monkeypatch, capsys, "check", "b.csv"
    )


@pytest.mark.parametrize("command", ["check", "init"])
def test_a_value_that_is_neither_true_nor_false_is_refused(command, write, monkeypatch, capsys):
    name = write("a.csv", sent0=["a man", "a dog"])
    said = error(monkeypatch, capsys, command, name, "--drop_invalid_rows", "yes")
    assert "expected true or false" in said


def test_evaluation_data_without_scores_is_looked_for_too(write, monkeypatch, capsys):
    write("a.csv", sent0=TEXTS, sent1=[f"{text} mat" for text in TEXTS])
    write("e.csv", sent0=TEXTS[:2], sent1=[f"{TEXTS[0]} mat", "other"])
    assert run(monkeypatch, "check", "a.csv", "--eval_file", "e.csv") == 0
    assert "Warning: 1 of 2 evaluation pairs are in the training data" in capsys.readouterr().out


def test_more_rows_than_are_looked_at(write, monkeypatch, capsys):
    monkeypatch.setattr("simcse_trainer.cli.check.ROWS", 50)
    write("a.csv", sent0=TEXTS, sent1=[f"{text} mat" for text in TEXTS])
    assert run(monkeypatch, "check", "a.csv") == 0
    assert "the first 50 rows" in capsys.readouterr().out
    assert run(monkeypatch, "check", "a.csv", "--all") == 0
    assert "a.csv: 60 rows" in capsys.readouterr().out


def test_lists_and_files_as_training_reads_them(write, tmp_path, monkeypatch, capsys):
    rows = [{"query": text, "pos": [f"{text} mat", "x"], "neg": []} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(monkeypatch, "check", "a.jsonl") == 0
    assert "60 rows of sent0, sent1" in capsys.readouterr().out
    (tmp_path / "a.txt").write_bytes("\n".join(f"{t};한국어 {t}" for t in TEXTS).encode("cp949"))
    words = ("--encoding", "cp949", "--delimiter", ";", "--column_names", "sent0", "sent1")
    assert run(monkeypatch, "check", "a.txt", *words) == 0
    assert f"한국어 {TEXTS[0]}" in capsys.readouterr().out
