"""Retrieval: does a query find its relevant passages among all?

Five figures, times 100, at the cuts that leaderboards print: recall@1, recall@5, recall@10, MRR@10
and nDCG@10. They are those of sentence-transformers' `InformationRetrievalEvaluator`: relevance is
yes or no, and a query counts the same however many passages are relevant to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn.functional import normalize

from simcse_trainer.data.retrieval import DEPTH, RetrievalData
from simcse_trainer.evaluation.sts import Encoder
from simcse_trainer.evaluation.tasks import RETRIEVAL_METRICS

# Passages that are encoded, and queries that are compared with them, at a time.
BLOCK_PASSAGES = 16_384
_BLOCK_QUERIES = 1024
_RECALLS = (1, 5, DEPTH)
_DISCOUNTS = [1 / math.log2(rank + 2) for rank in range(DEPTH)]

# Numbers of b different passages [b], rising, and their embeddings of length 1 [b, D].
Block = tuple[Tensor, Tensor]


def evaluate_retrieval(
    encode_queries: Encoder, encode_passages: Encoder, tasks: Mapping[str, RetrievalData]
) -> dict[str, float]:
    """Compute recall@1, @5, @10, MRR@10 and nDCG@10, times 100, by cosine similarity.

    Memory follows the queries and a block of passages, not the number of passages.

    Args:
        encode_queries: Queries to embeddings [n, D]; called once for each task.
        encode_passages: Passages to embeddings [n, D]; called for a block at a time.
        tasks: Name -> queries and passages.

    Returns:
        `<task>_recall_at_1`, `<task>_ndcg_at_10` and so on, by the names of `RETRIEVAL_METRICS`,
        and under each name alone the mean over the tasks.
    """
    return score_retrieval(encode_queries, encode_passages, tasks).metrics


@dataclass(frozen=True)
class RetrievalScores:
    """What a model finds.

    Attributes:
        metrics: As `evaluate_retrieval` gives them.
        gains: Task -> nDCG@10 of each query, from 0 to 1.
        rankings: Task -> for each query the numbers of the nearest passages, nearest first.
    """

    metrics: dict[str, float]
    gains: dict[str, list[float]]
    rankings: dict[str, list[list[int]]]


def score_retrieval(
    encode_queries: Encoder, encode_passages: Encoder, tasks: Mapping[str, RetrievalData]
) -> RetrievalScores:
    """Evaluate as `evaluate_retrieval` does, and keep what is found for each query.

    Args:
        encode_queries: See `evaluate_retrieval`, as for the others.
        encode_passages: Passages to embeddings [n, D].
        tasks: Name -> queries and passages.
    """
    results: dict[str, float] = {}
    gains: dict[str, list[float]] = {}
    rankings: dict[str, list[list[int]]] = {}
    for name, task in tasks.items():
        queries = normalize(encode_queries(task.queries), dim=-1)
        _, found = find_nearest(queries, _encode_blocks(encode_passages, task), DEPTH)
        rankings[name] = found.tolist()
        scored = score_queries(rankings[name], task.relevant)
        gains[name] = scored["ndcg_at_10"]
        results |= {f"{name}_{metric}": _mean(values) for metric, values in scored.items()}
    means = {
        metric: sum(results[f"{name}_{metric}"] for name in tasks) / len(tasks)
        for metric in RETRIEVAL_METRICS
    }
    return RetrievalScores(results | means, gains, rankings)


def score_rankings(
    rankings: Sequence[Sequence[int]], relevant: Sequence[frozenset[int]]
) -> dict[str, float]:
    """Score what was found.

    Args:
        rankings: For each query the numbers of the nearest passages, nearest first, at least ten
            of them where there are so many.
        relevant: For each query the numbers of its relevant passages, at least one.

    Returns:
        Metric of `RETRIEVAL_METRICS` -> mean over the queries, times 100.
    """
    scored = score_queries(rankings, relevant)
    return {metric: _mean(values) for metric, values in scored.items()}


def score_queries(
    rankings: Sequence[Sequence[int]], relevant: Sequence[frozenset[int]]
) -> dict[str, list[float]]:
    """Score what was found for each query.

    Args:
        rankings: See `score_rankings`, as for `relevant`.
        relevant: For each query the numbers of its relevant passages, at least one.

    Returns:
        Metric of `RETRIEVAL_METRICS` -> value of each query, from 0 to 1.
    """
    scored: dict[str, list[float]] = {metric: [] for metric in RETRIEVAL_METRICS}
    for ranking, wanted in zip(rankings, relevant, strict=True):
        hits = [rank for rank, number in enumerate(ranking[:DEPTH]) if number in wanted]
        for cut in _RECALLS:
            scored[f"recall_at_{cut}"].append(sum(rank < cut for rank in hits) / len(wanted))
        scored["mrr_at_10"].append(1 / (hits[0] + 1) if hits else 0.0)
        best = sum(_DISCOUNTS[: len(wanted)])
        scored["ndcg_at_10"].append(sum(_DISCOUNTS[rank] for rank in hits) / best)
    return scored


def _mean(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)


def find_nearest(
    queries: Tensor, blocks: Iterable[Block], top_k: int, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the passages with the largest products, block by block.

    Args:
        queries: Q embeddings of length 1, [Q, D].
        blocks: Numbers and embeddings of passages; see `Block`.
        top_k: At most so many passages for each query.
        exclude: Rows of (query, number) [E, 2] that are not to be found.

    Returns:
        Scores [Q, k], falling, and numbers of the passages [Q, k]; k is `top_k` or the number of
        passages, if that is less. Of equal scores the smaller number is first. What is excluded
        stands last, with a score of minus infinity, where there is nothing else.
    """
    best = queries.new_empty(len(queries), 0)
    found = torch.empty(len(queries), 0, dtype=torch.long)
    for numbers, embeddings in blocks:
        pairs = [
            torch.cat(pair, 1)
            for pair in zip(
                (best, found),
                _search_block(queries, numbers, embeddings, top_k, exclude),
                strict=True,
            )
        ]
        best, found = _rank(pairs[0], pairs[1], top_k)
    return best, found


def _search_block(
    queries: Tensor, numbers: Tensor, embeddings: Tensor, top_k: int, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    parts = []
    for start in range(0, len(queries), _BLOCK_QUERIES):
        scores = queries[start : start + _BLOCK_QUERIES] @ embeddings.to(queries.dtype).T
        if exclude is not None:
            rows, excluded = exclude[:, 0] - start, exclude[:, 1]
            here = (rows >= 0) & (rows < len(scores))
            rows, excluded = rows[here], excluded[here].contiguous()
            columns = torch.searchsorted(numbers, excluded).clamp(max=len(numbers) - 1)
            there = numbers[columns] == excluded
            scores[rows[there], columns[there]] = -math.inf
        parts.append(_top_columns(scores, min(top_k, len(numbers))))
    scores, columns = (torch.cat(part) for part in zip(*parts, strict=True))
    return scores, numbers[columns]


def _top_columns(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the largest scores of each row; `topk` alone takes any of several equal ones."""
    best, columns = scores.topk(top_k)
    tied = (scores >= best[:, -1:]).sum(1) > top_k
    if tied.any():
        order = scores[tied].argsort(dim=1, descending=True, stable=True)[:, :top_k]
        columns[tied] = order
        best[tied] = scores[tied].gather(1, order)
    return best, columns


def _rank(scores: Tensor, numbers: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    numbers, order = numbers.sort(1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores[:, :top_k], numbers.gather(1, order[:, :top_k])


def _encode_blocks(encode: Encoder, task: RetrievalData) -> Iterator[Block]:
    passages = task.read_passages()
    while block := list(islice(passages, BLOCK_PASSAGES)):
        block.sort(key=lambda passage: passage[0])
        embeddings = encode([text for _, text in block])
        yield torch.tensor([number for number, _ in block]), normalize(embeddings, dim=-1)
