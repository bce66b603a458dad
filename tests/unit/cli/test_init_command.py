"""`simcse-trainer init`: a config that trains as it is, and a held-out part of the data."""

import csv
import json
import shlex
import warnings

import psutil
import pytest
import yaml
from helpers.command_line import error, run
from helpers.tiny import WORDS, save_tiny

from simcse_trainer.planning import proposal

TEXTS = [f"{WORDS[i % 16]} {WORDS[(i * 3) % 17]} {WORDS[(i * 5 + 1) % 17]} {i}" for i in range(60)]
REPLIES = [f"{text} mat" for text in TEXTS]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "model")
    return tmp_path


def write(name, **columns):
    with open(name, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(columns)
        table.writerows(zip(*columns.values(), strict=True))


def read(name):
    with open(name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_config_trains_as_printed(here, monkeypatch, capsys):
    write("faq.csv", id=range(60), question=TEXTS, answer=REPLIES)
    before = (here / "faq.csv").read_bytes()
    assert run(monkeypatch, "init", "faq.csv", "--model", "model") == 0
    commands = [x.strip() for x in capsys.readouterr().out.splitlines() if x.startswith("   ")]
    command, search = commands
    assert command == "simcse-trainer train faq.yaml"
    assert (here / "faq.csv").read_bytes() == before
    options = yaml.safe_load((here / "faq.yaml").read_text(encoding="utf-8"))
    assert options["model_name_or_path"] == "model"
    assert options["max_seq_length"] == 32
    assert options["per_device_train_batch_size"] == 8
    train, pairs = read("faq_train.jsonl"), read("faq_eval.jsonl")
    assert len(train) == 54
    assert [pair["score"] for pair in pairs] == [1.0] * 6 + [0.0] * 6
    held = {pair["sentence1"] for pair in pairs}
    assert len(held) == 6
    assert not held & {row["sent0"] for row in train}
    assert {row["sent0"]: row["sent1"] for row in train}.items() <= dict(
        zip(TEXTS, REPLIES, strict=True)
    ).items()
    with warnings.catch_warnings(record=True) as said:
        assert run(monkeypatch, *command.split()[1:], "--max_steps", 2, "--use_cpu", "true") == 0
    assert not [str(one.message) for one in said if "pin_memory" in str(one.message)]
    assert "The model after 2 steps is in outputs/faq" in capsys.readouterr().out
    assert [row["text"] for row in read("faq_corpus.jsonl")] == REPLIES
    assert run(monkeypatch, *shlex.split(search)[1:]) == 0
    query, *hits, _ = capsys.readouterr().out.splitlines()
    assert query == TEXTS[0]
    assert len(hits) == 5


@pytest.mark.slow
def test_the_split_is_seeded_and_nothing_is_overwritten(here, monkeypatch, capsys):
    write("faq.csv", sent0=TEXTS, sent1=REPLIES)
    words = ("init", "faq.csv", "--model", "model", "--output", "my.yaml")
    assert run(monkeypatch, *words) == 0
    first = (here / "my_eval.jsonl").read_bytes()
    capsys.readouterr()
    assert "my.yaml is there already" in error(monkeypatch, capsys, *words)
    (here / "my.yaml").unlink()
    assert "my_train.jsonl is there already" in error(monkeypatch, capsys, *words)
    assert run(monkeypatch, *words, "--overwrite") == 0
    assert (here / "my_eval.jsonl").read_bytes() == first
    assert run(monkeypatch, *words, "--overwrite", "--seed", 7) == 0
    assert (here / "my_eval.jsonl").read_bytes() != first


def test_what_does_not_fit_leaves_nothing_behind(here, monkeypatch, capsys):
    write("faq.csv", sent0=TEXTS, sent1=REPLIES)
    free = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    said = error(monkeypatch, capsys, "init", "faq.csv", "--model", "model")
    assert "needs at least" in said
    assert [path.name for path in here.glob("*faq*")] == ["faq.csv"]


def test_the_data_itself_is_never_replaced(here, monkeypatch, capsys):
    (here / "x_train.jsonl").write_text(
        "".join(json.dumps({"sent0": text}) + "\n" for text in TEXTS), encoding="utf-8"
    )
    words = ("init", "x_train.jsonl", "--model", "model", "--output", "x.yaml", "--overwrite")
    assert "is the data itself" in error(monkeypatch, capsys, *words)


@pytest.mark.slow
def test_texts_alone_are_paired_with_shortened_copies(here, monkeypatch, capsys):
    (here / "texts.txt").write_text("\n".join(TEXTS), encoding="utf-8")
    assert run(monkeypatch, "init", "texts.txt", "--model", "model") == 0
    for pair in read("texts_eval.jsonl")[:6]:
        assert pair["score"] == 1
        assert len(pair["sentence2"].split()) < len(pair["sentence1"].split())
    assert len(read("texts_train.jsonl")) == 54
    command = ("train", "texts.yaml", "--max_steps", 2, "--use_cpu", "true")
    assert run(monkeypatch, *command) == 0


def test_scored_pairs_of_ones_own_leave_the_data_whole(here, monkeypatch, capsys):
    write("faq.csv", question=TEXTS, answer=REPLIES)
    write("pairs.csv", sentence1=TEXTS[:4], sentence2=TEXTS[4:8], score=range(4))
    words = ("init", "faq.csv", "--model", "model", "--eval_file", "pairs.csv")
    assert run(monkeypatch, *words) == 0
    options = yaml.safe_load((here / "faq.yaml").read_text(encoding="utf-8"))
    assert (options["train_file"], options["eval_tasks"]) == ("faq.csv", "pairs.csv")
    first = (here / "faq.yaml").read_text(encoding="utf-8").splitlines()[0]
    said = f"# Written by `simcse-trainer {shlex.join(words[:2])} --model=model"
    assert first == f"{said} --eval_file=pairs.csv`, and yours to change."
    assert options["columns"] == ["question", "answer"]
    assert not (here / "faq_train.jsonl").exists()
    assert run(monkeypatch, "train", "faq.yaml", "--max_steps", 2, "--use_cpu", "true") == 0
    assert "scores, as evaluation data has" in error(monkeypatch, capsys, "init", "pairs.csv")


def test_lists_are_held_out_and_trained_on_whole(here, monkeypatch, capsys):
    rows = [{"query": t, "pos": [f"{t} mat", f"{t} red"], "neg": ["dog"] * (i % 2)}
            for i, t in enumerate(TEXTS)]  # fmt: skip
    (here / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(monkeypatch, "init", "a.jsonl", "--model", "model") == 0
    train, pairs = read("a_train.jsonl"), read("a_eval.jsonl")
    assert len(train) == 54
    known = {row["query"]: row for row in rows}
    assert all(row["sent1"] == known[row["sent0"]]["pos"] for row in train)
    assert all(row["hard_neg"] == known[row["sent0"]]["neg"] for row in train)
    assert {p["sentence2"] for p in pairs if p["score"]} == {f"{p['sentence1']} mat" for p in pairs}
    assert all(p["sentence2"] for p in pairs)
    words = ("--max_steps", 2, "--use_cpu", "true")
    assert run(monkeypatch, "train", "a.yaml", *words) == 0


def test_files_as_training_reads_them(here, monkeypatch, capsys):
    lines = [f"{text}|한국어 {text}" for text in TEXTS]
    (here / "a.csv").write_bytes("\n".join([*lines, "x"]).encode("cp949"))
    words = ["init", "a.csv", "--model", "model", "--encoding", "cp949"]
    words += ["--delimiter", "|", "--column_names", "sent0", "sent1"]
    assert "--drop_invalid_rows true" in error(monkeypatch, capsys, *words)
    assert run(monkeypatch, *words, "--drop_invalid_rows", "true") == 0
    assert all(row["sent1"] == f"한국어 {row['sent0']}" for row in read("a_train.jsonl"))
    write("e.csv", sentence1=TEXTS[:4], sentence2=TEXTS[4:8], score=range(4))
    words += ["--drop_invalid_rows", "true", "--eval_file", "e.csv", "--output", "b.yaml"]
    assert run(monkeypatch, *words) == 0
    assert run(monkeypatch, "train", "b.yaml", "--max_steps", 2, "--use_cpu", "true") == 0


def test_judged_pairs_are_not_taken_for_positives(here, monkeypatch, capsys):
    write("a.csv", question1=TEXTS, question2=REPLIES, is_duplicate=[0, 1] * 30)
    assert "belong together" in error(monkeypatch, capsys, "init", "a.csv", "--model", "model")


def test_without_a_backbone_for_the_language_it_says_what_to_install(here, monkeypatch, capsys):
    monkeypatch.setattr(proposal, "is_at_hand", lambda name: False)
    write(
        "faq.csv",
        질문=[f"{text} 언제 여나요" for text in TEXTS],
        답변=[f"{n}시에 엽니다" for n in TEXTS],
    )
    said = error(monkeypatch, capsys, "init", "faq.csv")
    assert "BAAI/bge-m3, is not on this machine" in said
    assert "pip install 'simcse-trainer[gemma]'" in said
    assert "minilm" not in said
    assert not (here / "faq.yaml").exists()
