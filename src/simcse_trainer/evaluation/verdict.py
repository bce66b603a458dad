"""What happened to a model, in a sentence: the one home of it for summary, card and report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Of many pairs or queries fewer resamples, in about a second: their interval is narrow anyway.
RESAMPLES, _FEWEST = 1_000, 200
_ALL_ELEMENTS = 2_000_000
# Numbers in memory at once.
_CHUNK_ELEMENTS = 2**19

# Smaller changes of a correlation are within what another seed would change.
_NO_CHANGE = 0.5
# A mean cosine from here on is shown as 0.99 or 1.00: all embeddings have one direction.
_COLLAPSED = 0.99
# The log has four digits.
_NO_LOSS = 5e-5
# More pairs or queries nobody collects for an evaluation.
_MOST_EXAMPLES = 20_000


@dataclass(frozen=True)
class Verdict:
    """What happened, and what to try.

    Attributes:
        kind: better, worse, same, unclear, collapsed, nothing_learned or unknown.
        text: The sentence that says what became of the model.
        advice: What to try; empty where there is nothing to.
    """

    kind: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        """Return both on one line."""
        return f"{self.text} {self.advice}".strip()


@dataclass(frozen=True)
class Interval:
    """Where the change of the score would be for other pairs or queries like these.

    Attributes:
        low: The lower end of the 95 percent interval, in points.
        high: The upper end of the interval, in points.
        count: Number of evaluation pairs, or of queries.
        unit: What was drawn: "pairs" or "queries".
    """

    low: float
    high: float
    count: int
    unit: str = "pairs"

    def __str__(self) -> str:
        """Return it as it stands behind a change."""
        ends = f"{self.low:+.2f} to {self.high:+.2f}"
        return f"95 % interval {ends} over {self.count:,} {self.unit}"


def judge(
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    interval: Interval | None = None,
    losses: Sequence[float] = (),
) -> Verdict | None:
    """Say in a sentence what became of a model, by the mean of its scores.

    Args:
        before: From `evaluate_tasks`: `avg_sts` or else `ndcg_at_10`, `anisotropy` and others;
            empty where not measured.
        after: The same of the trained model.
        interval: Of the change, from `bootstrap_change` or `bootstrap_gains`.
        losses: Those of the log, from the first step on.

    Returns:
        None where nothing is known.
    """
    if losses and max(losses) < _NO_LOSS:
        return Verdict(
            "nothing_learned",
            "Nothing was learned: the loss was 0 from the first step on, because no text of a "
            "batch was a negative of another.",
            "Look at the data with `simcse-trainer check`; each text needs an answer of its own.",
        )
    score = "avg_sts" if "avg_sts" in after else "ndcg_at_10"
    if score not in after or score not in before:
        return None
    change = after[score] - before[score]
    certain = change > 0 and (interval is None or interval.low > 0)
    if after.get("anisotropy", 0.0) >= _COLLAPSED and not (certain and change >= _NO_CHANGE):
        return _say_collapsed(before, after)
    if not math.isfinite(change):
        return Verdict("unknown", "No verdict: a score is no number.")
    return _judge_change(change, interval)


def _say_collapsed(before: Mapping[str, float], after: Mapping[str, float]) -> Verdict:
    was = before.get("anisotropy")
    earlier = "" if was is None else f", before {was:.2f}"
    return Verdict(
        "collapsed",
        f"Collapsed: all embeddings point the same way (anisotropy {after['anisotropy']:.2f}"
        f"{earlier}).",
        "Keep the model that training began with, and train with a smaller --learning_rate, such "
        "as 3e-5, or 1e-4 with LoRA.",
    )


def _judge_change(change: float, interval: Interval | None) -> Verdict:
    where = "" if interval is None else f" ({interval})"
    small = abs(change) < _NO_CHANGE
    if interval is not None and interval.low <= 0 <= interval.high:
        small = max(-interval.low, interval.high) < _NO_CHANGE
        if not small:
            more = _count_to_tell(change, interval)
            number = f", about {more:,}" if more else ""
            advice = f"Evaluate on more {interval.unit}{number}, or train longer or on more data."
            text = f"Not enough data to tell: the score changed by {change:+.2f} points{where}."
            return Verdict("unclear", text, advice)
    if small:
        text = f"Neither better nor worse: the score changed by {change:+.2f} points{where}."
        advice = "Train longer, on more data, or from another backbone."
        return Verdict("same", text, advice)
    if change > 0:
        return Verdict("better", f"Better: the score rose by {change:.2f} points{where}.")
    advice = (
        "Keep the model that training began with, or train with a smaller --learning_rate or "
        "other data."
    )
    return Verdict("worse", f"Worse: the score fell by {-change:.2f} points{where}.", advice)


def _count_to_tell(change: float, interval: Interval) -> int:
    """Return how many would tell such a change from none; 0: more than people collect."""
    half = (interval.high - interval.low) / 2
    if abs(change) * math.sqrt(_MOST_EXAMPLES / interval.count) < half:
        return 0
    needed = interval.count * (half / change) ** 2
    digits: int = 10 ** max(0, int(math.log10(needed)) - 1)
    return max(interval.count + 1, math.ceil(needed / digits) * digits)


def bootstrap_change(
    before: Mapping[str, Sequence[float]],
    after: Mapping[str, Sequence[float]],
    gold: Mapping[str, Sequence[float]],
    *,
    resamples: int | None = None,
    seed: int = 0,
) -> Interval | None:
    """Find where the change of the mean score would be for other pairs like these.

    A paired bootstrap (Efron and Tibshirani 1993, chapter 13, percentiles): in each resample both
    models are scored on the same pairs, drawn with replacement from those of each task.

    Args:
        before: Task -> [n] cosines of the pairs, by one model.
        after: The same by the other.
        gold: Task -> [n] scores of the same pairs.
        resamples: How often pairs are drawn; by default 1,000 times, of many pairs less often.
        seed: Of the draws: the same every time.

    Returns:
        The 95 percent interval in points, times 100 as scores are; None where it does not exist.
    """
    if not gold or any(before.keys() ^ gold.keys()) or any(after.keys() ^ gold.keys()):
        return None

    def correlate(task: str, weights: Floats) -> Floats:
        ranks = rank_weighted(np.asarray(gold[task], dtype=float), weights)
        old, new = (
            correlate_weighted(rank_weighted(np.asarray(x[task]), weights), ranks, weights)
            for x in (before, after)
        )
        return new - old

    counts = {task: len(scores) for task, scores in gold.items()}
    return _resample(correlate, counts, "pairs", resamples, seed)


def bootstrap_gains(
    before: Mapping[str, Sequence[float]],
    after: Mapping[str, Sequence[float]],
    *,
    resamples: int | None = None,
    seed: int = 0,
) -> Interval | None:
    """Find where the change of the mean nDCG@10 would be for other queries like these.

    The bootstrap of `bootstrap_change`, with queries in the place of pairs; what there is to find
    stays the same.

    Args:
        before: Task -> [n] nDCG@10 of the queries, from 0 to 1, by one model.
        after: The same by the other.
        resamples: How often queries are drawn; by default 1,000 times, of many less often.
        seed: Of the draws: the same every time.

    Returns:
        The 95 percent interval in points, times 100 as scores are; None where it does not exist.
    """
    if not before or before.keys() ^ after.keys():
        return None
    changes = {task: np.subtract(after[task], before[task]) for task in before}

    def average(task: str, weights: Floats) -> Floats:
        found: Floats = weights @ changes[task] / len(changes[task])
        return found

    counts = {task: len(queries) for task, queries in changes.items()}
    return _resample(average, counts, "queries", resamples, seed)


def _resample(
    measure: Callable[[str, Floats], Floats],
    counts: Mapping[str, int],
    unit: str,
    resamples: int | None,
    seed: int,
) -> Interval | None:
    """Return the interval of the mean over the tasks of what is measured with weights [R, n]."""
    total = sum(counts.values())
    resamples = resamples or max(_FEWEST, min(RESAMPLES, _ALL_ELEMENTS // total))
    random = np.random.default_rng(seed)
    changes = np.zeros(resamples)
    for task, count in counts.items():
        chunk = max(1, _CHUNK_ELEMENTS // count)
        found = [
            measure(task, draw_weights(random, min(chunk, resamples - start), count))
            for start in range(0, resamples, chunk)
        ]
        changes += np.concatenate(found) / len(counts)
    changes = changes[np.isfinite(changes)]
    if len(changes) < resamples / 2:
        return None
    low, high = 100 * np.quantile(changes, (0.025, 0.975))
    return Interval(float(low), float(high), total, unit)


def draw_weights(random: np.random.Generator, resamples: int, count: int) -> Floats:
    """Draw how often each of n pairs is in each of R resamples of n.

    Args:
        random: The source of the draws.
        resamples: R, the number of resamples to draw.
        count: n, the number of pairs in each of them.

    Returns:
        [R, n], whose rows sum to n.
    """
    drawn = random.integers(count, size=(resamples, count))
    drawn += count * np.arange(resamples)[:, None]
    weights = np.bincount(drawn.ravel(), minlength=resamples * count)
    return weights.reshape(resamples, count).astype(float)


def rank_weighted(values: Floats, weights: Floats) -> Floats:
    """Rank values that are there several times, as `scipy.stats.rankdata` ranks the repeated ones.

    One sort serves all resamples: the ranks follow from the sums of the weights up to each value.

    Args:
        values: [n]; equal values share their mean rank.
        weights: [R, n], how often each is there.

    Returns:
        [R, n].
    """
    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.flatnonzero(np.diff(group[order], prepend=-1))
    sums = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks: Floats = sums.cumsum(1) - (sums - 1) / 2
    return ranks[:, group]


def correlate_weighted(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Compute Pearson's correlation of values that are there several times.

    Args:
        x: [R, n], one side of the pairs.
        y: [R, n], the other side of the pairs.
        weights: [R, n], how often each is there.

    Returns:
        [R]; NaN where one side does not vary.
    """
    total = weights.sum(1, keepdims=True)
    x, y = (side - (weights * side).sum(1, keepdims=True) / total for side in (x, y))
    weighted = weights * x
    scale = np.sqrt((weighted * x).sum(1) * (weights * y * y).sum(1))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: Floats = (weighted * y).sum(1) / np.where(scale > 0, scale, np.nan)
    return found
