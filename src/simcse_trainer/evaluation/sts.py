"""Semantic textual similarity: does the cosine of two embeddings rank pairs as people do?

The protocol of Gao et al. 2021, section 6.1 and appendix B: no regressor, Spearman correlation,
all pairs of a task together ("all").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from simcse_trainer.data.pairs import load_scored_pairs
from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.metrics import SpearmanCorrelation
from simcse_trainer.evaluation.space import alignment, anisotropy, uniformity
from simcse_trainer.evaluation.tasks import (
    PARAMETERS,
    HubTask,
    OptionNames,
    find_task_file,
    load_from_hub,
)

Encoder = Callable[[Sequence[str]], Tensor]

# What `evaluate_sts` says of the embedding space; lower is better for all three.
SPACE_METRICS = ("alignment", "uniformity", "anisotropy")
# Uniformity is quadratic in them.
UNIFORMITY_SENTENCES = 4096

_TEST = {"test": "test"}
_ALL = {"train": "train", "validation": "validation", "test": "test"}

TASKS = {
    "sts12": HubTask("mteb/sts12-sts", _TEST),
    "sts13": HubTask("mteb/sts13-sts", _TEST),
    "sts14": HubTask("mteb/sts14-sts", _TEST),
    "sts15": HubTask("mteb/sts15-sts", _TEST),
    "sts16": HubTask("mteb/sts16-sts", _TEST),
    "stsb": HubTask("mteb/stsbenchmark-sts", _ALL),
    "sickr": HubTask("mteb/sickr-sts", _TEST),
    "korsts": HubTask("dkoterwa/kor-sts", _ALL),
}


def load_sts_tasks(
    tasks: Sequence[str],
    *,
    split: str,
    data_dir: str | None = None,
    options: OptionNames = PARAMETERS,
) -> dict[str, Any]:
    """Load tasks by name.

    Args:
        tasks: Names of `TASKS`, or of folders in `data_dir`, or csv/tsv/jsonl files of
            sentence1, sentence2 and score; a file's name without its ending becomes its task.
        split: Name of the split: `validation` or `test`.
        data_dir: A folder of `<task>/<split>.csv`; by default the tasks come from the Hub.
        options: How errors call the options to change.

    Returns:
        Name -> data set of sentence1, sentence2, score.

    Raises:
        InputError: An unknown task, or one that does not have the split.
    """
    loaded: dict[str, Any] = {}
    for task in tasks:
        path = Path(task)
        name = get_task_name(task)
        if name in loaded:
            raise InputError(
                f"Two evaluation tasks are called '{name}', the second is {task}. Rename one file."
            )
        if path.suffix:
            loaded[name] = load_scored_pairs(path)
        elif data_dir is not None:
            path = find_task_file(task, split, Path(data_dir), options)
            loaded[name] = load_scored_pairs(path)
        elif task in TASKS:
            columns = ("sentence1", "sentence2", "score")
            loaded[name] = load_from_hub(task, TASKS[task], split, columns, options)
        else:
            raise InputError(
                f"'{task}' is no known task; expected one of {', '.join(TASKS)}, a file of "
                f"sentence1, sentence2, score, or a folder in {options.data_dir}."
            )
    return loaded


def get_task_name(task: str) -> str:
    """Return what a task is called in metrics: of a file its name without the ending."""
    path = Path(task)
    return path.name.split(".")[0] if path.suffix else task


@dataclass(frozen=True)
class PairScores:
    """What a model makes of scored pairs, and of queries where there are some.

    Attributes:
        metrics: As `evaluate_sts` and `evaluate_retrieval` give them.
        cosines: Task -> cosine of each pair.
        gains: Task of retrieval -> nDCG@10 of each query, from 0 to 1.
        rankings: Task of retrieval -> for each query the numbers of the nearest passages.
    """

    metrics: dict[str, float]
    cosines: dict[str, list[float]]
    gains: dict[str, list[float]] = field(default_factory=dict)
    rankings: dict[str, list[list[int]]] = field(default_factory=dict)


def evaluate_sts(encode: Encoder, tasks: Mapping[str, Any]) -> dict[str, float]:
    """Compute Spearman's correlation, times 100, of cosine similarities with gold scores.

    Args:
        encode: Texts to embeddings [n, D]; called once, with every different text once.
        tasks: Name -> data set (or mapping of lists) of sentence1, sentence2, score.

    Returns:
        `<task>_spearman` of each task and their mean, `avg_sts`. A correlation that does not
        exist, because all cosines are equal, is NaN. Then, each only where it exists, `alignment`
        of the pairs rated above 4 of 5 (Gao et al. 2021, section 3; above 4/5 of the task's
        scale), `uniformity` and `anisotropy` of all different sentences of all tasks.
    """
    return score_pairs(encode, tasks).metrics


def score_pairs(encode: Encoder, tasks: Mapping[str, Any]) -> PairScores:
    """Evaluate as `evaluate_sts` does, and keep the cosines.

    Args:
        encode: Texts to embeddings [n, D]; called once, with every different text once.
        tasks: Name -> data set (or mapping of lists) of sentence1, sentence2, score.
    """
    pairs = {
        name: (list(data["sentence1"]), list(data["sentence2"])) for name, data in tasks.items()
    }
    sides = [text for both in pairs.values() for side in both for text in side]
    rows = {text: row for row, text in enumerate(dict.fromkeys(sides))}
    embeddings = F.normalize(encode(list(rows)).double(), dim=-1)
    metric = SpearmanCorrelation(keep_in_memory=True)
    results, positives, found_cosines = {}, [], {}
    for name, (left, right) in pairs.items():
        first, second = (
            embeddings[torch.tensor([rows[text] for text in side])] for side in (left, right)
        )
        cosines = (first * second).sum(-1)
        gold = list(tasks[name]["score"])
        found_cosines[name] = cosines.tolist()
        found = metric.compute(predictions=found_cosines[name], references=gold)
        results[f"{name}_spearman"] = found["spearman"]
        alike = torch.tensor(gold, dtype=torch.float64) > 0.8 * get_scale(gold)
        positives.append((first[alike], second[alike]))
    results["avg_sts"] = sum(results.values()) / len(results)
    return PairScores(results | describe_space(embeddings, positives), found_cosines)


def get_scale(scores: Sequence[float]) -> float:
    """Return the highest score there could be: scales end at 1, at 5, or where the data do."""
    highest = max(scores)
    return next((top for top in (1.0, 5.0) if highest <= top), highest)


def describe_space(
    embeddings: Tensor, positives: Sequence[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Compute `SPACE_METRICS`, each only where it exists.

    Args:
        embeddings: [N, D] of all different texts, of length 1; of many, uniformity takes every
            n-th, the same every time.
        positives: Both sides, each [n, D], of texts that belong together, task by task.
    """
    found = {}
    first, second = (torch.cat(side) for side in zip(*positives, strict=True))
    if len(first):
        found["alignment"] = alignment(first, second)
    if (count := len(embeddings)) > 1:
        most = min(count, UNIFORMITY_SENTENCES)
        found["uniformity"] = uniformity(embeddings[torch.arange(most) * count // most])
        found["anisotropy"] = anisotropy(embeddings)
    return {name: value for name, value in found.items() if math.isfinite(value)}
