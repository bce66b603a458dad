"""The text that ends a run."""

from pathlib import Path

import pytest

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


def test_without_evaluation_data_there_is_no_verdict():
    nothing = ModelEvaluation({}, {})
    text = format_summary(nothing, nothing, Path("out"), 7)
    assert "training" not in text
    assert text.startswith("The model after 7 steps is in out.")
