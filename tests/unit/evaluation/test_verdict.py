"""What happened to a model, in a sentence; and the bootstrap behind it, against scipy."""

import time

import numpy as np
import pytest
from scipy.stats import spearmanr

from simcse_trainer.evaluation import verdict
from simcse_trainer.evaluation.verdict import (
    Interval,
    bootstrap_change,
    bootstrap_gains,
    correlate_weighted,
    draw_weights,
    judge,
    rank_weighted,
)

RANDOM = np.random.default_rng(3)


def scores(value, **space):
    return {"avg_sts": value} | space


@pytest.mark.parametrize(
    ("before", "after", "kind", "said"),
    [
        (22.28, 60.36, "better", "Better: the score rose by 38.08 points."),
        (60.4, 58.1, "worse", "Worse: the score fell by 2.30 points."),
        (60.0, 60.3, "same", "Neither better nor worse: the score changed by +0.30 points."),
        (60.3, 60.0, "same", "Neither better nor worse: the score changed by -0.30 points."),
        (float("nan"), 60.0, "unknown", "No verdict"),
    ],
)
def test_by_the_scores_alone(before, after, kind, said):
    found = judge(scores(before), scores(after))
    assert found.kind == kind
    assert str(found).startswith(said)


@pytest.mark.parametrize(
    ("change", "interval", "kind", "said"),
    [
        (5.0, (2.1, 8.0), "better", "(95 % interval +2.10 to +8.00 over 100 pairs)."),
        (-5.0, (-8.0, -2.1), "worse", "Keep the model that training began with"),
        (2.0, (-1.0, 5.0), "unclear", "Evaluate on more pairs, about 230,"),
        (0.0, (-3.0, 3.0), "unclear", "Evaluate on more pairs, or"),
        (0.1, (-0.2, 0.4), "same", "Neither better nor worse"),
        (0.3, (0.1, 0.5), "same", "Neither better nor worse"),
    ],
)
def test_by_the_interval_of_the_change(change, interval, kind, said):
    found = judge(scores(50.0), scores(50.0 + change), interval=Interval(*interval, 100))
    assert found.kind == kind
    assert said in str(found)


def test_of_queries_more_are_asked_for():
    low = {"ndcg_at_10": 50.0}
    found = judge(low, {"ndcg_at_10": 52.0}, interval=Interval(-1.0, 5.0, 100, "queries"))
    assert found.kind == "unclear"
    assert "(95 % interval -1.00 to +5.00 over 100 queries)" in found.text
    assert found.advice.startswith("Evaluate on more queries, about 230,")


def test_a_collapse_is_said_before_any_score():
    for after in (float("nan"), 20.0, 50.2):
        found = judge(scores(50.0, anisotropy=0.42), scores(after, anisotropy=0.998))
        assert found.kind == "collapsed"
        assert "(anisotropy 1.00, before 0.42)" in found.text
        assert "--learning_rate" in found.advice
    # A backbone whose embeddings are a narrow cone can be read well.
    found = judge(scores(50.0, anisotropy=0.999), scores(70.0, anisotropy=0.995))
    assert found.kind == "better"


def test_a_loss_of_zero_from_the_first_step_on():
    assert judge({}, {}, losses=[0.0, 0.0]).kind == "nothing_learned"
    assert judge({}, {}, losses=[0.3, 0.0]) is None
    assert judge({}, scores(50.0)) is None


def test_ranks_and_correlations_of_resamples_are_scipys():
    gold = RANDOM.integers(6, size=40).astype(float)
    cosines = np.round(RANDOM.normal(size=40), 1)
    weights = draw_weights(np.random.default_rng(0), 25, 40)
    assert (weights.sum(1) == 40).all()
    found = correlate_weighted(
        rank_weighted(cosines, weights), rank_weighted(gold, weights), weights
    )
    for row, value in zip(weights.astype(int), found, strict=True):
        drawn = np.repeat(np.arange(40), row)
        assert value == pytest.approx(spearmanr(cosines[drawn], gold[drawn]).statistic, abs=1e-12)


def noisy(gold, noise, seed):
    return gold + noise * np.random.default_rng(seed).normal(size=len(gold))


def test_the_interval_covers_the_change_and_pairs_are_paired():
    gold = RANDOM.uniform(0, 5, size=200)
    before, after = noisy(gold, 4, 1), noisy(gold, 1, 2)
    change = 100 * (spearmanr(after, gold).statistic - spearmanr(before, gold).statistic)
    found = bootstrap_change({"a": before}, {"a": after}, {"a": gold})
    assert 0 < found.low < change < found.high
    assert (found.count, found.unit) == (200, "pairs")
    assert found == bootstrap_change({"a": before}, {"a": after}, {"a": gold})
    # The same ranks on the same pairs differ by nothing, whatever is drawn.
    same = bootstrap_change({"a": before}, {"a": 3 * before}, {"a": gold})
    assert (same.low, same.high) == (0.0, 0.0)


def test_a_gain_within_noise_has_zero_in_its_interval():
    gold = RANDOM.uniform(0, 5, size=24)
    found = bootstrap_change({"a": noisy(gold, 3, 5)}, {"a": noisy(gold, 3, 6)}, {"a": gold})
    assert found.low < 0 < found.high


def test_tasks_are_averaged_and_what_does_not_vary_has_no_interval():
    gold = {name: RANDOM.uniform(0, 5, size=50) for name in "ab"}
    before = {name: noisy(x, 4, 1) for name, x in gold.items()}
    after = {"a": noisy(gold["a"], 1, 2), "b": before["b"]}
    both = bootstrap_change(before, after, gold)
    one = bootstrap_change({"a": before["a"]}, {"a": after["a"]}, {"a": gold["a"]})
    assert both.high < one.high
    constant = {name: np.ones(50) for name in "ab"}
    assert bootstrap_change(before, constant, gold) is None
    assert bootstrap_change({}, after, gold) is None


def test_the_interval_over_queries_is_a_plain_bootstraps():
    before = {"a": RANDOM.uniform(size=40), "b": RANDOM.uniform(size=300)}
    after = {task: np.clip(x + RANDOM.normal(0.1, 0.3, len(x)), 0, 1) for task, x in before.items()}
    found = bootstrap_gains(before, after, resamples=500, seed=7)
    # One query after the other, with the draws that the weights count.
    random = np.random.default_rng(7)
    changes = np.zeros(500)
    for task, old in before.items():
        for resample, drawn in enumerate(random.integers(len(old), size=(500, len(old)))):
            changes[resample] += (after[task][drawn].mean() - old[drawn].mean()) / 2
    expected = 100 * np.quantile(changes, (0.025, 0.975))
    assert (found.low, found.high) == pytest.approx(tuple(expected), abs=1e-10)
    assert (found.count, found.unit) == (340, "queries")
    assert str(found).endswith(" over 340 queries")
    assert found == bootstrap_gains(before, after, resamples=500, seed=7)
    assert found != bootstrap_gains(before, after, resamples=500, seed=8)


def test_many_queries_are_drawn_in_parts(monkeypatch):
    before, after = {"a": RANDOM.uniform(size=100)}, {"a": RANDOM.uniform(size=100)}
    whole = bootstrap_gains(before, after)
    monkeypatch.setattr(verdict, "_CHUNK_ELEMENTS", 1_700)
    found = bootstrap_gains(before, after)
    assert (found.low, found.high) == pytest.approx((whole.low, whole.high), abs=1e-10)


def test_queries_are_paired_and_have_to_be_the_same():
    before = {"a": RANDOM.uniform(size=50)}
    found = bootstrap_gains(before, {"a": before["a"] + 0.125})
    assert (found.low, found.high) == pytest.approx((12.5, 12.5), abs=1e-10)
    assert bootstrap_gains(before, {}) is None
    assert bootstrap_gains({}, {}) is None


def test_a_thousand_resamples_of_a_benchmark_take_about_a_second():
    gold = RANDOM.uniform(0, 5, size=1379)
    start = time.process_time()
    bootstrap_change({"a": noisy(gold, 3, 5)}, {"a": noisy(gold, 3, 6)}, {"a": gold})
    assert time.process_time() - start < 3
