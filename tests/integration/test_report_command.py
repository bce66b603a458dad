"""`simcse-trainer report`, as it is typed."""

import json
import sys

import pytest
from helpers.retrieval import random_texts, write_beir
from helpers.tiny import WORDS
from helpers.training import build_model

from simcse_trainer import cli

LOG = [
    {"step": step, "eval_alignment": 0.1 * step, "eval_uniformity": -1.0 * step}
    for step in range(3)
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A trained folder, and pairs to measure it on; the working folder is theirs."""
    pytest.importorskip("matplotlib", reason="pip install simcse-trainer[plots]")
    monkeypatch.chdir(tmp_path)
    build_model().save_pretrained(tmp_path / "run")
    (tmp_path / "run/trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    rows = [
        f"{' '.join(WORDS[i : i + 3])},{' '.join(WORDS[i + 1 : i + 4])},{i % 6}" for i in range(12)
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(["sentence1,sentence2,score", *rows]))
    return tmp_path


def report(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["simcse-trainer", "report", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code or 0


@pytest.mark.slow
def test_a_run_against_another_reading_of_it(folder, monkeypatch, capsys):
    given = ["run", "--tasks", "pairs.csv", "--baseline", "run", "--baseline_pooling_mode", "max"]
    assert report(monkeypatch, *given) == 0
    assert (
        capsys.readouterr().out == "The report is report/report.html; its figures are beside it.\n"
    )
    page = (folder / "report/report.html").read_text(encoding="utf-8")
    assert "max pooling" in page
    assert "cls pooling" in page
    assert "The line is the training run" in page
    assert "pairs.csv" in page
    assert (folder / "report/alignment_uniformity.png").is_file()


@pytest.mark.slow
def test_how_it_is_computed_is_said_as_to_the_other_commands(folder, monkeypatch, capsys):
    words = ["run", "--tasks", "pairs.csv", "--batch_size", "2", "--device", "cpu"]
    assert report(monkeypatch, *words, "--max_seq_length", "3") == 0
    short = (folder / "report/report.html").read_text(encoding="utf-8")
    assert report(monkeypatch, *words) == 0
    assert (folder / "report/report.html").read_text(encoding="utf-8") != short
    assert report(monkeypatch, "run", "--tasks", "pairs.csv", "--device", "gpu9") == 2
    assert "device is 'gpu9', which is not there" in capsys.readouterr().err


def test_retrieval_of_pairs_and_of_a_folder_as_beirs(folder, monkeypatch, capsys):
    texts = random_texts(24, 3)
    rows = [f"{a},{b}" for a, b in zip(texts[:12], texts[12:], strict=True)]
    (folder / "faq.csv").write_text("\n".join(["frage,antwort", *rows]))
    (folder / "more.txt").write_text("\n".join(random_texts(5, 4)))
    ids = [str(i) for i in range(12)]
    corpus, queries = dict(zip(ids, texts[12:], strict=True)), dict(zip(ids, texts, strict=False))
    write_beir(folder / "beir", corpus, queries, [(name, name, 1) for name in ids], "dev")
    words = ["run", "--baseline", "run", "--baseline_pooling_mode", "max", "--split", "dev"]
    words += ["--tasks", "faq.csv", "beir", "--columns", "frage", "antwort"]
    assert report(monkeypatch, *words, "--corpus", "more.txt") == 0
    page = (folder / "report/report.html").read_text(encoding="utf-8")
    assert "12 queries among 17 passages of faq and 12 queries among 12 passages of beir" in page
    assert "faq.csv, beir (dev)." in page
    for measure in ("faq recall@1", "beir MRR@10", "mean nDCG@10", "over 24 queries"):
        assert measure in page
    (folder / "labels.csv").write_text("text,label\na man,0\na dog,1\n")
    assert report(monkeypatch, "run", "--tasks", "labels.csv") == 2
    assert "labels has labels. Leave it out of --tasks" in capsys.readouterr().err


def test_a_task_of_a_folder_and_no_run(folder, monkeypatch):
    (folder / "data/stsb").mkdir(parents=True)
    (folder / "pairs.csv").rename(folder / "data/stsb/validation.csv")
    (folder / "run/trainer_state.json").unlink()
    words = ["run", "--data_dir", "data", "--split", "validation", "--output", "out"]
    assert report(monkeypatch, *words) == 0
    page = (folder / "out/report.html").read_text(encoding="utf-8")
    assert "stsb (validation)" in page
    assert "training run" not in page


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "--tasks", "gone.csv"], ("gone.csv",)),
        (
            ["run", "--tasks", "pairs.csv", "--run", "gone"],
            ("There is no folder gone", "output_dir"),
        ),
        (
            ["run", "--tasks", "pairs.csv", "--run", "."],
            ("no trainer_state.json", "as --eval_tasks"),
        ),
        (["gone", "--tasks", "pairs.csv"], ("gone",)),
        ([".", "--tasks", "pairs.csv"], ("holds no model",)),
        (
            ["run", "--tasks", "pairs.csv", "--baseline", "run", "--baseline_pooling_mode", "x"],
            ("pooling_mode is 'x'; expected one of cls",),
        ),
    ],
)
def test_what_cannot_be_is_one_line(folder, monkeypatch, capsys, words, expected):
    assert report(monkeypatch, *words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    for part in expected:
        assert part in line
    assert not (folder / "report").exists()


@pytest.mark.slow
def test_baseline_and_model_are_read_at_one_length(folder, monkeypatch):
    from simcse_trainer.analysis import space

    lengths = []
    measure = space.measure_space

    def record(model, *args, **options):
        lengths.append(model.max_seq_length)
        return measure(model, *args, **options)

    monkeypatch.setattr(space, "measure_space", record)
    build_model().backbone.save_pretrained(folder / "plain")
    build_model().tokenizer.save_pretrained(folder / "plain")
    words = ["run", "--tasks", "pairs.csv", "--baseline", "plain"]
    assert report(monkeypatch, *words) == 0
    assert report(monkeypatch, *words, "--max_seq_length", "9") == 0
    assert lengths == [20, 20, 9, 9]
    page = (folder / "report/report.html").read_text(encoding="utf-8")
    assert "Verdict" in page
