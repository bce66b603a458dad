"""All tasks of an evaluation together: every different sentence is encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simcse_trainer.data.pairs import file_columns, load_labelled
from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.published import STS_TASKS
from simcse_trainer.evaluation.space import fit_whitening
from simcse_trainer.evaluation.sts import TASKS, Encoder, evaluate_sts, load_sts_tasks
from simcse_trainer.evaluation.tasks import EVALUATE_OPTIONS
from simcse_trainer.evaluation.transfer import (
    TRANSFER_TASKS,
    evaluate_transfer,
    load_transfer_task,
    split_texts,
)

# Endings of what there is of each task.
_SCORES = ("_spearman", "_accuracy", "_f1")


@dataclass(frozen=True)
class Suite:
    """Tasks with their data.

    Attributes:
        sts: Name -> data set of sentence1, sentence2, score.
        transfer: Name -> split -> data set of text or sentence1 and sentence2, and label.
    """

    sts: dict[str, Any] = field(default_factory=dict)
    transfer: dict[str, dict[str, Any]] = field(default_factory=dict)

    def counts(self) -> dict[str, dict[str, int]]:
        """Count examples by task and split; the split of an STS task is called `pairs`."""
        scored = {name: {"pairs": len(data["score"])} for name, data in self.sts.items()}
        labelled = {
            name: {split: len(data["label"]) for split, data in splits.items()}
            for name, splits in self.transfer.items()
        }
        return scored | labelled

    def texts(self) -> dict[str, list[str]]:
        """Return the texts of each task, as often as they occur."""
        scored = {name: split_texts(data) for name, data in self.sts.items()}
        labelled = {
            name: [text for data in splits.values() for text in split_texts(data)]
            for name, splits in self.transfer.items()
        }
        return scored | labelled


def default_tasks(split: str, data_dir: str | None) -> list[str]:
    """Return the paper's STS tasks, or all tasks of a folder, the paper's first."""
    if data_dir is None:
        return list(STS_TASKS)
    there = {
        path.parent.name
        for path in Path(data_dir).glob("*/*.csv")
        if path.stem == split or _is_transfer(path.parent.name, data_dir)
    }
    if not there:
        raise InputError(
            f"{data_dir}: found no <task>/{split}.csv. Check --data_dir and --split, or name files "
            "with --tasks."
        )
    order = [*TASKS, *TRANSFER_TASKS]
    return sorted(
        there, key=lambda name: (order.index(name) if name in order else len(order), name)
    )


def load_suite(tasks: Sequence[str], *, split: str, data_dir: str | None) -> Suite:
    """Load tasks by name.

    Args:
        tasks: Names of `sts.TASKS` and `transfer.TRANSFER_TASKS`, folders of `data_dir`, or files.
            What is not known by name is told by its columns: `score` or `label`.
        split: Of the STS tasks; transfer uses all splits.
        data_dir: See `load_sts_tasks` and `load_transfer_task`; by default from the Hub.

    Raises:
        InputError: An unknown task, or one whose data cannot be used.
    """
    suite = Suite()
    for task in tasks:
        if not _is_transfer(task, data_dir):
            if task not in TASKS and not Path(task).suffix and data_dir is None:
                raise InputError(
                    f"'{task}' is no known task; expected one of "
                    f"{', '.join([*TASKS, *TRANSFER_TASKS])}, a file, or a folder in --data_dir."
                )
            loaded = load_sts_tasks(
                [task], split=split, data_dir=data_dir, options=EVALUATE_OPTIONS
            )
            target: dict[str, Any] = suite.sts
        elif Path(task).suffix:
            loaded = {Path(task).name.split(".")[0]: {"train": load_labelled(task)}}
            target = suite.transfer
        else:
            loaded = {task: load_transfer_task(task, data_dir=data_dir, options=EVALUATE_OPTIONS)}
            target = suite.transfer
        (name,) = loaded
        if name in suite.sts or name in suite.transfer:
            raise InputError(f"Two tasks are called '{name}'. Leave one out, or rename its file.")
        target |= loaded
    return suite


def encode_once(encode: Encoder, texts: Iterable[str]) -> Encoder:
    """Encode every different text, and look embeddings up from then on."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    embeddings = encode(list(rows))

    def look_up(wanted: Sequence[str]) -> Tensor:
        return embeddings[torch.tensor([rows[text] for text in wanted])]

    return look_up


def evaluate_suite(encode: Encoder, suite: Suite) -> dict[str, float]:
    """Run `evaluate_sts` and `evaluate_transfer`."""
    found = evaluate_sts(encode, suite.sts) if suite.sts else {}
    return found | (evaluate_transfer(encode, suite.transfer) if suite.transfer else {})


def evaluate_whitened(
    encode: Encoder, suite: Suite, *, fit_on: Sequence[str] = ()
) -> dict[str, float]:
    """Evaluate the same after whitening.

    Args:
        encode: Texts to embeddings [n, D]; asked for every text often: see `encode_once`.
        suite: The tasks to evaluate on.
        fit_on: Fit one map on these texts. By default each task has its own, fitted on its
            different texts (the "target" of Su et al. 2021), and so there is no one space whose
            metrics could be told.
    """
    if fit_on:
        return evaluate_suite(_whitened(encode, fit_on), suite)
    results: dict[str, float] = {}
    for name, texts in suite.texts().items():
        part = Suite(*({name: d[name]} if name in d else {} for d in (suite.sts, suite.transfer)))
        found = evaluate_suite(_whitened(encode, texts), part)
        results |= {key: value for key, value in found.items() if key.endswith(_SCORES)}
    for average, ending in zip(("avg_sts", "avg_transfer"), _SCORES, strict=False):
        scores = [value for key, value in results.items() if key.endswith(ending)]
        if scores:
            results[average] = sum(scores) / len(scores)
    return results


def _whitened(encode: Encoder, texts: Sequence[str]) -> Encoder:
    whiten = fit_whitening(encode(list(dict.fromkeys(texts))))
    return lambda wanted: whiten(encode(wanted))


def _is_transfer(task: str, data_dir: str | None) -> bool:
    if task in TRANSFER_TASKS or task in TASKS:
        return task in TRANSFER_TASKS
    files = [Path(task)] if Path(task).suffix else []
    if data_dir is not None and not files:
        files = sorted(Path(data_dir, task).glob("*.csv"))
    if not files:
        return False
    names = file_columns(files[0])
    return "label" in names and "score" not in names
