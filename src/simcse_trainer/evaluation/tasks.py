"""Where evaluation data comes from: `<task>/<split>.csv` in a folder, or data sets of the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simcse_trainer.errors import InputError

# What `evaluate_retrieval` gives for each task -> how it is printed.
RETRIEVAL_METRICS = {
    "recall_at_1": "recall@1",
    "recall_at_5": "recall@5",
    "recall_at_10": "recall@10",
    "mrr_at_10": "MRR@10",
    "ndcg_at_10": "nDCG@10",
}


def split_retrieval_metric(name: str) -> tuple[str, str] | None:
    """Split `faq_recall_at_10` into task and metric; the task of a mean is empty.

    Args:
        name: Name of a result, without `eval_`.

    Returns:
        None where it is none of retrieval.
    """
    for metric in RETRIEVAL_METRICS:
        if name == metric or name.endswith(f"_{metric}"):
            return name.removesuffix(metric).removesuffix("_"), metric
    return None


def label_metric(name: str) -> str:
    """Return how a result is printed: `stsb` of `stsb_spearman`, `faq recall@10`, or `mean ...`."""
    found = split_retrieval_metric(name)
    if found is None:
        return name.removesuffix("_spearman")
    return f"{found[0] or 'mean'} {RETRIEVAL_METRICS[found[1]]}"


@dataclass(frozen=True)
class HubTask:
    """Where a task is on the Hub, and what its columns and splits are called there.

    Attributes:
        dataset: Its name on the Hub.
        splits: Our name of a split -> theirs, joined by "+" where it is made of several.
        config: Of the data set.
        columns: Theirs, in the order of ours.
    """

    dataset: str
    splits: Mapping[str, str]
    config: str | None = None
    columns: tuple[str, ...] = ("sentence1", "sentence2", "score")


@dataclass(frozen=True)
class OptionNames:
    """What the options are called that an error advises to change."""

    tasks: str
    split: str
    data_dir: str


PARAMETERS = OptionNames("tasks", "split", "data_dir")
TRAINING_OPTIONS = OptionNames("--eval_tasks", "--eval_split", "--sts_data_dir")
EVALUATE_OPTIONS = OptionNames("--tasks", "--split", "--data_dir")


def find_task_file(task: str, split: str, data_dir: Path, options: OptionNames) -> Path:
    """Find the file of a split.

    Raises:
        InputError: It is not there; what is there is listed.
    """
    path = data_dir / task / f"{split}.csv"
    if path.is_file():
        return path
    found = sorted(str(p.relative_to(data_dir)) for p in data_dir.glob("*/*.csv"))
    raise InputError(
        f"{path} is not there. Expected <task>/<split>.csv in {data_dir}; found "
        f"{', '.join(found) or 'no such file'}. Check {options.data_dir}, {options.tasks}, "
        f"{options.split}."
    )


def load_from_hub(
    task: str, hub: HubTask, split: str, columns: tuple[str, ...], options: OptionNames
) -> Any:
    """Load a split of a Hub data set.

    Args:
        task: Its name, for errors.
        hub: Where the data set is on the Hub.
        split: A key of `hub.splits`.
        columns: What the columns are called in the result.
        options: How errors call the options to change.

    Raises:
        InputError: There is no such split, or no way to the data.
    """
    if split not in hub.splits:
        raise InputError(
            f"{hub.dataset} has no split '{split}', only {', '.join(hub.splits)}. Pass "
            f"{options.split} {next(iter(hub.splits))}, leave {task} out of {options.tasks}, or "
            f"give your own data with {options.data_dir}."
        )
    from datasets import load_dataset

    try:
        data = load_dataset(hub.dataset, hub.config, split=hub.splits[split])
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"The evaluation task {task} could not be loaded from the Hub ({hub.dataset}): "
            f"{reason} Without Hub access pass {options.data_dir} with <task>/<split>.csv files, "
            f"or {options.tasks} with a file of {', '.join(columns)}."
        ) from error
    return data.select_columns(list(hub.columns)).rename_columns(
        dict(zip(hub.columns, columns, strict=True))
    )
