"""Tasks told apart, every text encoded once, whitened by task or by other texts."""

import csv

import pytest
import torch
from helpers.checks import fails

from simcse_trainer.evaluation.space import fit_whitening
from simcse_trainer.evaluation.sts import evaluate_sts
from simcse_trainer.evaluation.suite import (
    Suite,
    default_tasks,
    encode_once,
    evaluate_suite,
    evaluate_whitened,
    load_suite,
)

LETTERS = "abcdefghijkl"
TABLE = dict(
    zip(LETTERS, torch.randn(12, 4, generator=torch.Generator().manual_seed(1)) + 2, strict=True)
)


def embed(texts):
    return torch.stack([TABLE[text] for text in texts])


def pairs(letters):
    turned = letters[1:] + letters[0]
    return {
        "sentence1": [*letters],
        "sentence2": [*turned],
        "score": [*map(float, range(len(letters)))],
    }


def write(path, header, rows):
    path.parent.mkdir(exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def test_looked_up_embeddings_are_those_that_were_encoded():
    asked = []
    look_up = encode_once(lambda texts: (asked.append(texts), embed(texts))[1], ["b", "a", "b"])
    torch.testing.assert_close(look_up(["a", "b", "a"]), embed(["a", "b", "a"]))
    assert asked == [["b", "a"]]
    torch.testing.assert_close(look_up(["c", "a", "c"]), embed(["c", "a", "c"]))
    assert asked == [["b", "a"], ["c"]]


def test_each_task_is_whitened_on_its_own_texts():
    suite = Suite({"x": pairs("abcdefg"), "y": pairs("efghijkl")})
    found = evaluate_whitened(embed, suite)
    for name, letters in (("x", "abcdefg"), ("y", "efghijkl")):
        whiten = fit_whitening(embed(letters))
        alone = evaluate_sts(lambda texts, w=whiten: w(embed(texts)), {name: suite.sts[name]})
        assert found[f"{name}_spearman"] == pytest.approx(alone[f"{name}_spearman"])
    assert found["avg_sts"] == pytest.approx((found["x_spearman"] + found["y_spearman"]) / 2)
    assert set(found) == {"x_spearman", "y_spearman", "avg_sts"}


def test_or_all_on_other_texts():
    suite = Suite({"x": pairs("abcdefg")})
    whiten = fit_whitening(embed("defghijkl"))
    expected = evaluate_suite(lambda texts: whiten(embed(texts)), suite)
    assert evaluate_whitened(embed, suite, fit_on=[*"defghijkl", "d"]) == pytest.approx(expected)
    assert "anisotropy" in expected


def test_columns_tell_the_kind_of_a_task_without_a_known_name(tmp_path):
    scored = (("sentence1", "sentence2", "score"), [("a", "b", 1), ("c", "d", 2)])
    labelled = (("text", "label"), [("a", 1), ("b", 0)])
    write(tmp_path / "pairs" / "test.csv", *scored)
    write(tmp_path / "topics" / "train.csv", *labelled)
    write(tmp_path / "stsb" / "test.csv", *scored)
    write(tmp_path / "labels.csv", *labelled)
    assert default_tasks("test", str(tmp_path)) == ["stsb", "pairs", "topics"]
    tasks = ["topics", str(tmp_path / "labels.csv"), "pairs", "stsb"]
    suite = load_suite(tasks, split="test", data_dir=str(tmp_path))
    assert list(suite.sts) == ["pairs", "stsb"]
    assert list(suite.transfer) == ["topics", "labels"]
    assert suite.counts()["topics"] == {"train": 2}
    assert suite.texts()["labels"] == ["a", "b"]
    write(tmp_path / "topics.csv", *labelled)
    again = ["topics", str(tmp_path / "topics.csv")]
    fails(lambda: load_suite(again, split="test", data_dir=str(tmp_path)), "called 'topics'")


def test_without_a_folder_the_papers_seven_tasks():
    assert default_tasks("test", None) == [
        "sts12",
        "sts13",
        "sts14",
        "sts15",
        "sts16",
        "stsb",
        "sickr",
    ]
