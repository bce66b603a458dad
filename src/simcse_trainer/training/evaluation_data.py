"""What a run is evaluated on: scored pairs, and queries with their passages, by task.

The trainer takes it from Python, `run` from files; both check it here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from simcse_trainer.arguments import SimCSETrainingArguments
from simcse_trainer.data.pairs import check_scored_pairs
from simcse_trainer.data.retrieval import RetrievalData, dataset_to_retrieval
from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.tasks import RETRIEVAL_METRICS

logger = logging.getLogger(__name__)

# Of more passages no pairs are listed.
_MOST_PASSAGES = 20_000


def check_evaluation(args: SimCSETrainingArguments, tasks: Any) -> Any:
    """Refuse what would end the run at its first evaluation.

    Args:
        args: The training options, `SimCSETrainingArguments`.
        tasks: The evaluation data, whichever way it was given.

    Returns:
        The data, in which pairs without a score are queries and passages.

    Raises:
        InputError: There is no data, or it does not go with the options.
    """
    named = tasks_by_name(tasks) if tasks else {}
    searched = [name for name, data in named.items() if isinstance(data, RetrievalData)]
    scored = [name for name in named if name not in searched]
    for name in scored:
        check_scored_pairs(named[name], source=f"eval_dataset '{name}'")
    check_metric(args, scored, searched)
    return named or tasks


def check_metric(
    args: SimCSETrainingArguments, scored: Sequence[str], searched: Sequence[str]
) -> None:
    """Refuse options that need other evaluation data than there is.

    Args:
        args: The training options, `SimCSETrainingArguments`; where they choose a model and there
            is retrieval alone, the metric becomes its nDCG@10 in place of the mean of STS.
        scored: Names of the tasks of scored pairs.
        searched: Names of the tasks of retrieval.

    Raises:
        InputError: There is nothing to evaluate on, or no such metric.
    """
    names = [*(f"{task}_spearman" for task in scored), *(["avg_sts"] if scored else [])]
    names += [f"{task}_{metric}" for task in searched for metric in RETRIEVAL_METRICS]
    names += RETRIEVAL_METRICS if searched else []
    if not names:
        if args.eval_strategy != "no" or args.eval_on_start:
            raise InputError(
                "eval_strategy or eval_on_start is set, but there is nothing to evaluate on. Pass "
                "--eval_tasks, or --eval_strategy no."
            )
        return
    metric = str(args.metric_for_best_model).removeprefix("eval_")
    if args.uses_scores and metric == "avg_sts" not in names:
        args.metric_for_best_model = metric = "ndcg_at_10"
        logger.info("The best model is the one with the highest nDCG@10.")
    if args.uses_scores and metric not in names:
        raise InputError(
            f"metric_for_best_model is '{metric}'; the evaluation gives {', '.join(names)}."
        )


def tasks_by_name(tasks: Any) -> Mapping[str, Any]:
    """Return evaluation data as a dictionary, whichever way it was given.

    Raises:
        InputError: Pairs without a score that cannot be used.
    """
    if not isinstance(tasks, Mapping):
        found = _to_task(tasks, "eval_dataset")
        return {"retrieval" if isinstance(found, RetrievalData) else "sts": found}
    return {name: _to_task(data, f"eval_dataset '{name}'") for name, data in tasks.items()}


def _to_task(data: Any, source: str) -> Any:
    if isinstance(data, RetrievalData):
        return data
    return dataset_to_retrieval(data, source=source) or data


def list_pairs(task: Any) -> Iterable[tuple[str, str]]:
    """List the pairs of a task; none where they would have to be found in a large corpus.

    Args:
        task: Scored pairs, or queries and passages.
    """
    if not isinstance(task, RetrievalData):
        return zip(task["sentence1"], task["sentence2"], strict=True)
    if task.passages > _MOST_PASSAGES:
        return ()
    texts = dict(task.read_passages())
    found = zip(task.queries, task.relevant, strict=True)
    return [(query, texts[n]) for query, numbers in found for n in numbers if n in texts]
