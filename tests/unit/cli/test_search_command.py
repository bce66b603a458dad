"""`simcse-trainer search`, from a corpus or a saved index to a table or JSON."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from helpers.command_line import error, run
from helpers.tiny import WORDS, tiny_backbone, tiny_tokenizer

from simcse_trainer import SimCSE, SimCSEModel
from simcse_trainer.cli import search

TEXTS = [" ".join(WORDS[(i * 5 + k * k) % 17] for k in range(1 + i % 7)) for i in range(30)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = SimCSEModel(tiny_backbone(), tiny_tokenizer(), pooling_mode="mean", max_seq_length=40)
    model.save_pretrained("model")
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS) + "\n\n", encoding="utf-8")
    return tmp_path


def test_the_table_and_the_json_say_what_the_class_finds(folder, monkeypatch, capsys):
    tool = SimCSE("model")
    tool.build_index(TEXTS)
    queries = [TEXTS[3], "child child"]
    words = ("--top_k", 3, "--threshold", "0.99")
    expected = tool.search(queries, threshold=0.99, top_k=3)
    assert run(monkeypatch, "search", "model", "--corpus", "corpus.txt", *queries, *words) == 0
    lines = []
    for query, hits in zip(queries, expected, strict=True):
        lines += [query, *(f"  {score:.2f}  {sentence}" for sentence, score in hits), ""]
    assert capsys.readouterr().out.splitlines() == lines
    monkeypatch.setattr(
        sys,
        "stdin",
        SimpleNamespace(buffer=io.BytesIO("\n".join(queries).encode()), isatty=lambda: False),
    )
    monkeypatch.setattr(search, "_BLOCK_QUERIES", 1)
    assert run(monkeypatch, "search", "model", "--corpus=corpus.txt", "--json", *words) == 0
    for line, query, hits in zip(
        capsys.readouterr().out.splitlines(), queries, expected, strict=True
    ):
        found = json.loads(line)
        assert found["query"] == query
        assert [hit["sentence"] for hit in found["results"]] == [sentence for sentence, _ in hits]
        scores = [hit["score"] for hit in found["results"]]
        assert scores == pytest.approx([score for _, score in hits], abs=1e-5)


@pytest.mark.parametrize("storage", ["float32", "int8", "binary"])
def test_a_saved_index_is_searched_without_the_corpus(folder, monkeypatch, capsys, storage):
    corpus = ("--corpus", "corpus.txt", "--storage", storage)
    assert run(monkeypatch, "search", "model", TEXTS[3], *corpus, "--save_index", "index") == 0
    first = capsys.readouterr().out
    (folder / "corpus.txt").unlink()
    assert run(monkeypatch, "search", "model", TEXTS[3], "--index", "index") == 0
    assert capsys.readouterr().out == first
    assert first.splitlines()[1].startswith("  1.00  ")


def test_where_nothing_reaches_the_threshold_the_nearest_is_shown(folder, monkeypatch, capsys):
    words = ("--corpus", "corpus.txt", "--threshold", "1.5")
    assert run(monkeypatch, "search", "model", TEXTS[3], *words) == 0
    said = f"{TEXTS[3]}\n  nothing at 1.5 or above\n  the nearest: 1.00  {TEXTS[3]}\n\n"
    assert capsys.readouterr().out == said
    assert run(monkeypatch, "search", "model", TEXTS[3], *words, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["results"] == []
    (nearest,) = found["nearest"]
    assert nearest == {"sentence": TEXTS[3], "score": pytest.approx(1, abs=1e-5)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model", "q"], "Pass either --corpus"),
        (["model", "q", "--corpus", "corpus.txt", "--index", "index"], "Pass either --corpus"),
        (["model", "q", "--corpus", "none.txt"], "none.txt: no such file"),
        (["model", "q", "--corpus", "empty.txt"], "There are no sentences"),
        (["model", "q", "--index", "model"], "model holds no index"),
        (["model", "q", "--corpus", "corpus.txt", "--save_index", "model"], "is no index"),
        (["model", "q", "--corpus", "corpus.txt", "--storage", "int4"], "storage is 'int4'"),
        (["model", "q", "--corpus", "corpus.txt", "--top_k", "0"], "top_k"),
        (["nowhere", "q", "--corpus", "corpus.txt"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(folder, monkeypatch, capsys, words, said):
    (folder / "empty.txt").write_text("\n\n", encoding="utf-8")
    assert said in error(monkeypatch, capsys, "search", *words)
