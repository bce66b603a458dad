"""What is checked and decided before the first step."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from datasets import Dataset, IterableDataset

from simcse_trainer.arguments import SimCSETrainingArguments
from simcse_trainer.data.loading import prepare_dataset
from simcse_trainer.data.tokenization import INPUT_IDS, tokenize_dataset
from simcse_trainer.errors import InputError
from simcse_trainer.model.modeling import SimCSEModel

logger = logging.getLogger(__name__)


def tokenize_if_text(
    dataset: Dataset | IterableDataset,
    model: SimCSEModel,
    args: SimCSETrainingArguments,
    num_proc: int | None,
) -> Dataset | IterableDataset:
    """Text columns are checked and tokenized; what has `input_ids` is taken as it is."""
    if INPUT_IDS in (dataset.column_names or next(iter(dataset))):
        return dataset
    if model.tokenizer is None:
        raise InputError("train_dataset has text columns, but the model has no tokenizer.")
    with args.main_process_first(desc="tokenization"):
        return tokenize_dataset(
            prepare_dataset(dataset),
            model.tokenizer,
            max_seq_length=model.max_seq_length,
            num_proc=num_proc,
        )


def check_size(dataset: Dataset | IterableDataset, args: SimCSETrainingArguments) -> None:
    """Too few rows for a contrastive loss, or an unknown number of them without `max_steps`."""
    if isinstance(dataset, IterableDataset):
        if args.max_steps <= 0:
            raise InputError(
                "Streamed data has no known length, so training needs --max_steps; found "
                f"{args.max_steps}."
            )
        return
    rows, batch = len(dataset), args.per_device_train_batch_size
    if rows < 2:
        raise InputError(
            f"train_dataset has {rows} row(s); a contrastive loss needs at least 2, and many "
            "more to learn from."
        )
    if rows < batch:
        logger.warning(
            "The batch (%d) is larger than the data set (%d rows): each step sees all of it, "
            "with %d negatives per sentence.",
            batch,
            rows,
            rows - 1,
        )


def check_evaluation(args: SimCSETrainingArguments, tasks: Any) -> None:
    """What is missing would end the run at its first evaluation."""
    if tasks is None:
        if args.eval_strategy != "no":
            raise InputError(
                "eval_strategy is set, but there is nothing to evaluate on. Pass --eval_tasks "
                "(in Python eval_dataset), or --eval_strategy no."
            )
        return
    if not args.load_best_model_at_end:
        return
    names = [*(f"{task}_spearman" for task in tasks_by_name(tasks)), "avg_sts"]
    metric = str(args.metric_for_best_model).removeprefix("eval_")
    if metric not in names:
        raise InputError(
            f"metric_for_best_model is '{metric}'; the evaluation gives {', '.join(names)}."
        )


def tasks_by_name(tasks: Any) -> Mapping[str, Any]:
    """Evaluation data as a dictionary, whichever way it was given."""
    return tasks if isinstance(tasks, Mapping) else {"sts": tasks}


def decide_head(model: SimCSEModel, dataset: Dataset | IterableDataset) -> None:
    """The paper's use of the head: unsupervised in training only, supervised always."""
    if model.head is None or model.mlp_only_train is not None:
        return
    unsupervised = len(next(iter(dataset))[INPUT_IDS]) == 1
    model.mlp_only_train = unsupervised
    logger.info(
        "The data is %s: the projection head is used %s.",
        "unsupervised" if unsupervised else "supervised",
        "in training only" if unsupervised else "at inference too",
    )


def warn_of_accumulation(args: SimCSETrainingArguments) -> None:
    """Accumulated micro-batches do not see each other."""
    steps, batch = args.gradient_accumulation_steps, args.per_device_train_batch_size
    if steps > 1 and args.mini_batch_size is None:
        logger.warning(
            "Gradient accumulation does not add negatives: each of the %d micro-batches of a step "
            "has its own. For more negatives in the same memory pass "
            "--gradient_accumulation_steps 1 --per_device_train_batch_size %d --mini_batch_size %d",
            steps,
            steps * batch,
            batch,
        )
