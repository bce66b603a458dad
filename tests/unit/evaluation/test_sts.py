import math

import pytest
import torch
from scipy.stats import spearmanr

from simcse_trainer import InputError
from simcse_trainer.evaluation import sts
from simcse_trainer.evaluation.metrics import SpearmanCorrelation
from simcse_trainer.evaluation.space import alignment, anisotropy, uniformity
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
        ("sickr", "validation", False, r"no split 'validation', only test.*split test"),
        ("stsb", "test", False, r"could not be loaded from the Hub.*data_dir"),
    ],
)
def test_errors_say_what_to_do(task, split, data_dir, message, tmp_path):
    (tmp_path / "stsb").mkdir()
    (tmp_path / "stsb" / "test.csv").write_text("sentence1,sentence2,score\na,b,1\nc,d,4\n")
    with pytest.raises(InputError, match=message):
        load_sts_tasks([task], split=split, data_dir=str(tmp_path) if data_dir else None)


def evaluated(tasks, dimensions=6):
    texts = sorted(
        {s for t in tasks.values() for side in ("sentence1", "sentence2") for s in t[side]}
    )
    table = dict(zip(texts, torch.randn(len(texts), dimensions), strict=True))
    return evaluate_sts(lambda given: torch.stack([table[t] for t in given]), tasks), table


def test_the_space_is_described_from_the_same_embeddings():
    found, table = evaluated({"x": PAIRS, "y": PAIRS | {"score": [0.9, 0.1, 0.2, 0.3, 0.8]}})
    # Above 4 of 5 is the pair (b, b) of x, above 0.8 of 1 the pair (a, b) of y.
    a, b, every = table["a"][None], table["b"][None], torch.stack(list(table.values()))
    assert found["alignment"] == pytest.approx((alignment(b, b) + alignment(a, b)) / 2, rel=1e-5)
    assert found["uniformity"] == pytest.approx(uniformity(every), rel=1e-5)
    assert found["anisotropy"] == pytest.approx(anisotropy(every), rel=1e-4)
    spearman = [value for name, value in found.items() if name.endswith("_spearman")]
    assert found["avg_sts"] == pytest.approx(sum(spearman) / 2)


def test_what_does_not_exist_is_absent():
    found, _ = evaluated({"x": PAIRS | {"score": [1.0, 3.0, 2.0, 4.0, 3.5]}})
    assert "alignment" not in found
    assert "uniformity" in found
    nan = evaluate_sts(lambda given: torch.full((len(given), 2), math.nan), {"x": PAIRS})
    assert set(nan) == {"x_spearman", "avg_sts"}


def test_uniformity_of_many_sentences_takes_the_same_some(monkeypatch):
    monkeypatch.setattr(sts, "UNIFORMITY_SENTENCES", 3)
    found, table = evaluated({"x": PAIRS})
    rows = [table[text] for text in ("a", "b", "c")]  # 0, 1 and 2 of a, b, c, d: i * 4 // 3
    assert found["uniformity"] == pytest.approx(uniformity(torch.stack(rows)), rel=1e-5)
