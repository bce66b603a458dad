"""The text that ends a run."""

from pathlib import Path

from rich.cells import cell_len

from simcse_trainer.evaluation.tasks import RETRIEVAL_METRICS
from simcse_trainer.training.run import ModelEvaluation, format_summary, judge_run


def test_the_verdict_stands_below_the_scores():
    before, after = (
        ModelEvaluation({"a_spearman": score, "avg_sts": score}, {}, {}) for score in (60.0, 70.0)
    )
    verdict = judge_run(before, after, {})
    text = format_summary(before, after, Path("out"), 7, verdict)
    assert "\nBetter: the score rose by 10.00 points.\n" in text


def judge_gains(change, queries, **tasks):
    """Judge a run by the nDCG@10 of queries, each of which is found or not."""
    old = [float(i % 2) for i in range(queries)]
    new = [min(1.0, x + (i % 4 < change)) for i, x in enumerate(old)]
    before, after = (
        ModelEvaluation({"ndcg_at_10": 100 * sum(x) / queries}, {}, {}, {}, {"faq": x})
        for x in (old, new)
    )
    return judge_run(before, after, tasks)


def test_retrieval_alone_has_an_interval_over_its_queries():
    found = judge_gains(1, 200)
    assert found.text.startswith("Better: the score rose by 25.00 points (95 % interval +1")
    assert found.text.endswith(" over 200 queries).")


def test_a_loss_of_zero_is_said_without_evaluation_data():
    nothing = ModelEvaluation({}, {})
    verdict = judge_run(nothing, nothing, {}, [{"loss": 0.0, "step": 1}, {"train_loss": 0.0}])
    assert format_summary(nothing, nothing, Path("out"), 7, verdict).startswith("Nothing was")


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
        both = [ModelEvaluation(scores, {}, {}) for scores in (before, after)]
        return format_summary(*both, Path("o"), 7, judge_run(*both, {}))

    alone = show(found(50.0), found(60.0))
    assert alone.startswith("Retrieval x 100   before    after   change\nfaq recall@1 ")
    assert alone.count("+10.00") == 5
    assert "Better: the score rose by 10.00 points." in alone
    scored = {"a_spearman": 20.0, "avg_sts": 20.0}
    both = show(scored | found(50.0), scored | found(60.0))
    assert both.index("Spearman x 100") < both.index("Retrieval x 100") < both.index("faq nDCG@10")
    two = found(50.0) | {f"wiki_{name}": 40.0 for name in RETRIEVAL_METRICS}
    assert "\nmean nDCG@10 " in show(two, two)
