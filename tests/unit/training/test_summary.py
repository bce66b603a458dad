"""The text that ends a run."""

from pathlib import Path

import pytest
from rich.cells import cell_len

from simcse_trainer.evaluation.tasks import RETRIEVAL_METRICS
from simcse_trainer.training.run import ModelEvaluation, format_summary


def summary(before, after):
    found = [
        ModelEvaluation({"a_spearman": score, "avg_sts": score}, {}, {})
        for score in (before, after)
    ]
    return format_summary(*found, Path("out"), 7)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (22.28, 60.36, "Better: the score rose by 38.08 points."),
        (60.4, 58.1, "Worse: the score fell by 2.30 points. Keep"),
        (60.0, 60.3, "Neither better nor worse: the score changed by +0.30 points."),
        (60.3, 60.0, "Neither better nor worse: the score changed by -0.30 points."),
        (float("nan"), 60.0, "No verdict"),
    ],
)
def test_whether_training_helped_is_said_in_a_sentence(before, after, said):
    (line,) = [line for line in summary(before, after).splitlines() if said in line]
    assert line.startswith(said)


def test_columns_stand_below_each_other_whatever_the_letters():
    scores = {"고객 문의_spearman": 20.0, "stsb_spearman": 50.0, "avg_sts": 35.0}
    text = format_summary(*[ModelEvaluation(scores, {}, {})] * 2, Path("out"), 7)
    lines = [line for line in text.splitlines() if line.endswith("+0.00")]
    assert len(lines) == 3
    assert len({cell_len(line) for line in lines}) == 1
    assert cell_len("고객 문의") == 9


def test_without_evaluation_data_there_is_no_verdict():
    nothing = ModelEvaluation({}, {})
    text = format_summary(nothing, nothing, Path("out"), 7)
    assert "training" not in text
    assert text.startswith("The model after 7 steps is in out.")


def test_retrieval_alone_and_beside_correlations():
    def found(x):
        return {f"{task}{name}": x for task in ("faq_", "") for name in RETRIEVAL_METRICS}

    def show(before, after):
        return format_summary(*[ModelEvaluation(s, {}, {}) for s in (before, after)], Path("o"), 7)

    alone = show(found(50.0), found(60.0))
    assert alone.startswith("Retrieval x 100   before    after   change\nfaq recall@1 ")
    assert alone.count("+10.00") == 5
    assert "Better: the score rose by 10.00 points." in alone
    scored = {"a_spearman": 20.0, "avg_sts": 20.0}
    both = show(scored | found(50.0), scored | found(60.0))
    assert both.index("Spearman x 100") < both.index("Retrieval x 100") < both.index("faq nDCG@10")
    two = found(50.0) | {f"wiki_{name}": 40.0 for name in RETRIEVAL_METRICS}
    assert "\nmean nDCG@10 " in show(two, two)
