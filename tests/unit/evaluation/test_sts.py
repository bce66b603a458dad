import math

import pytest
import torch
from scipy.stats import spearmanr

from simcse_trainer import InputError, SimCSEModel
from simcse_trainer.evaluation.metrics import SpearmanCorrelation
from simcse_trainer.evaluation.sts import evaluate_sts, load_sts_tasks

PAIRS = {
    "sentence1": ["a", "b", "c", "a", "b"],
    "sentence2": ["b", "c", "d", "d", "b"],
    "score": [1.0, 3.0, 2.0, 4.0, 5.0],
}


def test_cosines_of_pairs_are_correlated_and_each_text_is_encoded_once():
    table = dict(zip("abcd", torch.randn(4, 6), strict=True))
    seen = []

    def encode(texts):
        seen.extend(texts)
        return torch.stack([table[text] for text in texts])

    found = evaluate_sts(encode, {"x": PAIRS, "y": PAIRS})
    assert sorted(seen) == ["a", "b", "c", "d"]
    cosines = [
        float(torch.cosine_similarity(table[a], table[b], dim=0))
        for a, b in zip(PAIRS["sentence1"], PAIRS["sentence2"], strict=True)
    ]
    expected = 100 * spearmanr(cosines, PAIRS["score"]).statistic
    assert found["x_spearman"] == found["y_spearman"] == pytest.approx(expected)
    assert found["avg_sts"] == pytest.approx(expected)


def test_equal_embeddings_have_no_correlation():
    with pytest.warns(match="constant"):
        found = evaluate_sts(lambda texts: torch.ones(len(texts), 3), {"x": PAIRS})
    assert math.isnan(found["x_spearman"])


def test_metric_needs_no_network():
    found = SpearmanCorrelation().compute(predictions=[1, 2, 3, 4], references=[1, 3, 2, 4])
    assert found == {"spearman": pytest.approx(80.0)}


def test_tasks_from_a_folder_and_from_a_file(tmp_path):
    (tmp_path / "stsb").mkdir()
    text = "sentence1,sentence2,score\na,b,1.5\nc,d,4\n"
    (tmp_path / "stsb" / "test.csv").write_text(text)
    (tmp_path / "mine.csv").write_text(text)
    tasks = load_sts_tasks(
        ["stsb", str(tmp_path / "mine.csv")], split="test", data_dir=str(tmp_path)
    )
    assert list(tasks) == ["stsb", "mine"]
    assert list(tasks["stsb"]["score"]) == [1.5, 4.0]


@pytest.mark.parametrize(
    ("task", "split", "data_dir", "message"),
    [
        ("stsb", "validation", True, r"validation\.csv is not there.*found stsb/test\.csv"),
        ("nonsense", "test", False, r"'nonsense' is no known task; expected one of sts12"),
        ("sickr", "validation", False, r"no split 'validation', only test.*--eval_split test"),
        ("stsb", "test", False, r"could not be loaded from the Hub.*--sts_data_dir"),
    ],
)
def test_errors_say_what_to_do(task, split, data_dir, message, tmp_path):
    (tmp_path / "stsb").mkdir()
    (tmp_path / "stsb" / "test.csv").write_text("sentence1,sentence2,score\na,b,1\nc,d,4\n")
    with pytest.raises(InputError, match=message):
        load_sts_tasks([task], split=split, data_dir=str(tmp_path) if data_dir else None)


@pytest.mark.real_weights
def test_published_scores_of_all_minilm_l6_v2(minilm, sts_dir):
    published = {"sts12": 72.37, "sts13": 80.60, "sts15": 85.39, "stsb": 82.03}
    model = SimCSEModel.from_pretrained(minilm)
    tasks = load_sts_tasks(list(published), split="test", data_dir=str(sts_dir))
    found = evaluate_sts(model.encode, tasks)
    for task, score in published.items():
        assert found[f"{task}_spearman"] == pytest.approx(score, abs=0.02), task
