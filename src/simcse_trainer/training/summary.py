"""What a run says at its end: scores and neighbours before and after, and how to load the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from simcse_trainer.evaluation.sts import SPACE_METRICS, evaluate_sts

Neighbors = dict[str, list[tuple[float, str]]]


@dataclass(frozen=True)
class ModelEvaluation:
    """A model's scores, and the nearest sentences of some queries, at one moment.

    Attributes:
        scores: Correlations from `evaluate_sts`; empty without evaluation data.
        neighbors: Query -> (cosine, sentence), nearest first.
        space: Alignment, uniformity and anisotropy from `evaluate_sts`.
    """

    scores: dict[str, float]
    neighbors: Neighbors
    space: dict[str, float] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """Scores and space together, as `evaluate_sts` gives them."""
        return self.scores | self.space


def evaluate_model(
    encode: Callable[[Sequence[str]], Tensor],
    tasks: Mapping[str, Any],
    queries: Sequence[str],
    *,
    neighbors: int = 3,
) -> ModelEvaluation:
    """Evaluate, and search the evaluation sentences for the queries.

    Args:
        encode: Texts to embeddings [n, D].
        tasks: Name -> scored pairs.
        queries: Texts whose neighbours are searched.
        neighbors: Sentences per query; the query itself is not among them.
    """
    if not tasks:
        return ModelEvaluation({}, {})
    found: Neighbors = {}
    if queries:
        corpus = list(dict.fromkeys(s for t in tasks.values() for s in t["sentence1"]))
        corpus = list(dict.fromkeys(corpus + [s for t in tasks.values() for s in t["sentence2"]]))
        rows = F.normalize(encode(corpus), dim=-1)
        cosines = F.normalize(encode(queries), dim=-1) @ rows.T
        for query, row in zip(queries, cosines, strict=True):
            others = [i for i in row.argsort(descending=True).tolist() if corpus[i] != query]
            found[query] = [(float(row[i]), corpus[i]) for i in others[:neighbors]]
    metrics = evaluate_sts(encode, tasks)
    space = {name: metrics.pop(name) for name in SPACE_METRICS if name in metrics}
    return ModelEvaluation(metrics, found, space)


def format_summary(
    before: ModelEvaluation, after: ModelEvaluation, folder: Path, steps: int
) -> str:
    """Format the text that ends a run."""
    parts = []
    if after.scores:
        parts.append(_score_table(before, after))
    if after.neighbors:
        parts.append(_neighbor_list(before.neighbors, after.neighbors))
    parts.append(f"The model after {steps} steps is in {folder}. Load it with any of\n")
    parts.append(_loading(folder))
    return "\n".join(parts)


def _score_table(before: ModelEvaluation, after: ModelEvaluation) -> str:
    scores, space = after.scores, [name for name in after.space if name in before.space]
    names = [name for name in scores if name != "avg_sts" or len(scores) > 2]
    width = max(len(name) for name in [*names, "Lower is better"])
    lines = [f"{'Spearman x 100':<{width}}  {'before':>7}  {'after':>7}  {'change':>7}"]
    for name in [*names, *space]:
        if space and name == space[0]:
            lines.append("Lower is better")
        old, new = before.metrics[name], after.metrics[name]
        label = name.removesuffix("_spearman")
        lines.append(f"{label:<{width}}  {old:7.2f}  {new:7.2f}  {new - old:+7.2f}")
    return "\n".join([*lines, ""])


def _neighbor_list(before: Neighbors, after: Neighbors) -> str:
    lines = ["Nearest sentences of the evaluation data (cosine)"]
    for query in after:
        lines.append(f"\n  {query}")
        for moment, neighbors in (("before", before[query]), ("after", after[query])):
            for rank, (cosine, sentence) in enumerate(neighbors):
                lines.append(f"    {moment if rank == 0 else '':<6}  {cosine:.2f}  {sentence}")
    return "\n".join([*lines, ""])


def _loading(folder: Path) -> str:
    path = repr(str(folder))
    return (
        f"  from simcse_trainer import SimCSEModel\n"
        f"  SimCSEModel.from_pretrained({path}).encode(['a sentence'])\n\n"
        f"  from sentence_transformers import SentenceTransformer\n"
        f"  SentenceTransformer({path}).encode(['a sentence'])\n\n"
        f"  from transformers import AutoModel, AutoTokenizer\n"
        f"  AutoModel.from_pretrained({path}), AutoTokenizer.from_pretrained({path})\n"
    )
