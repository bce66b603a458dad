"""Transfer: what a logistic regression reads off frozen embeddings.

The protocol of SentEval (Conneau and Kiela 2018), which Gao et al. 2021, appendix E follow, with
its folds, its values of C and its features, by the splits that a task has:

    one split                 ten folds; in each, C is chosen by ten folds of the other nine
    train, test               C is chosen by ten folds of train
    train, validation, test   C is chosen on validation
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict

from simcse_trainer.data.pairs import load_labelled
from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.metrics import F1, Accuracy
from simcse_trainer.evaluation.sts import Encoder
from simcse_trainer.evaluation.tasks import HubTask, OptionNames, find_task_file, load_from_hub
from simcse_trainer.model.progress import bar

SPLITS = ("train", "validation", "test")

_TEXT = ("text", "label")
_PAIR = ("sentence1", "sentence2", "label")

# SentEval's SST2 also trains on phrases; the Hub's data set of that name has no labels to test on.
TRANSFER_TASKS = {
    "mr": HubTask(
        "cornell-movie-review-data/rotten_tomatoes",
        {"train": "train+validation+test"},
        columns=_TEXT,
    ),
    "cr": HubTask("SetFit/SentEval-CR", {"train": "train+test"}, columns=_TEXT),
    "subj": HubTask("SetFit/subj", {"train": "train+test"}, columns=_TEXT),
    "mpqa": HubTask(
        "rahulsikder223/SentEval-MPQA", {"train": "train+test"}, columns=("sentence", "label")
    ),
    "sst2": HubTask("SetFit/sst2", {split: split for split in SPLITS}, columns=_TEXT),
    "trec": HubTask(
        "SetFit/TREC-QC", {"train": "train", "test": "test"}, columns=("text", "label_coarse")
    ),
    "mrpc": HubTask(
        "nyu-mll/glue", {"train": "train+validation", "test": "test"}, "mrpc", columns=_PAIR
    ),
}

_NESTED_C = [2.0**power for power in range(-2, 4)]
_FOLDS_C = [2.0**power for power in range(-1, 6)]
_FOLDS = StratifiedKFold(10, shuffle=True, random_state=1111)
# Of each class, so that ten folds of nine tenths still have one each.
_FEWEST = 12


def load_transfer_task(task: str, *, data_dir: str | None, options: OptionNames) -> dict[str, Any]:
    """Load a task.

    Args:
        task: A key of `TRANSFER_TASKS`, or a folder in `data_dir`.
        data_dir: A folder of `<task>/<split>.csv` of text and label, or of sentence1, sentence2
            and label; by default the tasks come from the Hub.
        options: How errors call the options to change.

    Returns:
        Split -> data set of those columns; the splits decide on the protocol.

    Raises:
        InputError: No such task, or a split without data.
    """
    hub = TRANSFER_TASKS.get(task)
    if data_dir is None:
        assert hub is not None
        columns = _TEXT if len(hub.columns) == 2 else _PAIR
        return {name: load_from_hub(task, hub, name, columns, options) for name in hub.splits}
    folder = Path(data_dir, task)
    there = [split for split in SPLITS if (folder / f"{split}.csv").is_file()]
    wanted = hub.splits if hub is not None else {split: split for split in there}
    return {
        split: _join(
            [
                load_labelled(find_task_file(task, part, Path(data_dir), options))
                # Of those that make up a split in SentEval, what there is.
                for part in [p for p in parts.split("+") if p in there] or [split]
            ]
        )
        for split, parts in wanted.items()
    }


def evaluate_transfer(encode: Encoder, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Compute the accuracy, times 100, of a logistic regression on frozen embeddings.

    Args:
        encode: Texts to embeddings [n, D].
        tasks: Name -> split -> data set (or mapping of lists), from `load_transfer_task`. Texts
            have the features x, pairs |u - v| and u * v.

    Returns:
        `<task>_accuracy` of each task, `<task>_f1` where there are two classes (of the second in
        order), and the mean accuracy, `avg_transfer`. Over folds, all predictions together.

    Raises:
        InputError: A task with one class, or with too few examples of a class for ten folds.
    """
    accuracy, f1 = Accuracy(keep_in_memory=True), F1(keep_in_memory=True)
    results: dict[str, float] = {}
    for task, splits in bar(tasks.items(), "Transfer", unit="task"):
        predictions, references, classes = _predict(task, splits, encode)
        given = {"predictions": predictions.tolist(), "references": references.tolist()}
        results[f"{task}_accuracy"] = accuracy.compute(**given)["accuracy"]
        if classes == 2:
            results[f"{task}_f1"] = f1.compute(**given)["f1"]
    scores = [results[f"{task}_accuracy"] for task in tasks]
    return results | {"avg_transfer": sum(scores) / len(scores)}


def split_texts(data: Any) -> list[str]:
    """Return all texts of a split."""
    return [text for name in ("text", "sentence1", "sentence2") for text in _column(data, name)]


def _column(data: Any, name: str) -> list[Any]:
    names = getattr(data, "column_names", None) or data
    return list(data[name]) if name in names else []


def _join(parts: list[Any]) -> Any:
    from datasets import concatenate_datasets

    return concatenate_datasets(parts)


def _predict(
    task: str, splits: Mapping[str, Any], encode: Encoder
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return predicted and true classes of the tested examples, and how many classes there are."""
    labels = {split: [str(x) for x in data["label"]] for split, data in splits.items()}
    classes = sorted({label for split in labels.values() for label in split})
    _check_classes(task, labels, classes)
    x = {split: _features(data, encode) for split, data in splits.items()}
    y = {
        split: np.array([classes.index(label) for label in found])
        for split, found in labels.items()
    }
    # Newton's method is exact in a few steps; with several classes its matrix grows too large.
    solver = "newton-cholesky" if len(classes) == 2 else "lbfgs"
    model = LogisticRegression(solver=solver, max_iter=1000, random_state=1111)
    if len(splits) == 1:
        ((features, truth),) = zip(x.values(), y.values(), strict=True)
        search = GridSearchCV(model, {"C": _NESTED_C}, scoring="accuracy", cv=_FOLDS)
        return cross_val_predict(search, features, truth, cv=_FOLDS), truth, len(classes)
    if "validation" in splits:
        fitted = [
            LogisticRegression(**model.get_params() | {"C": c}).fit(x["train"], y["train"])
            for c in _NESTED_C
        ]
        best: Any = max(fitted, key=lambda m: m.score(x["validation"], y["validation"]))
    else:
        best = GridSearchCV(model, {"C": _FOLDS_C}, scoring="accuracy", cv=_FOLDS)
        best.fit(x["train"], y["train"])
    return best.predict(x["test"]), y["test"], len(classes)


def _features(data: Any, encode: Encoder) -> np.ndarray:
    """Make features [n, D] of texts, [n, 2 D] of pairs; float64."""
    sides = [
        encode(column).double().numpy()
        for name in ("text", "sentence1", "sentence2")
        if (column := _column(data, name))
    ]
    if len(sides) == 1:
        return sides[0]
    first, second = sides
    return np.concatenate([np.abs(first - second), first * second], axis=1)


def _check_classes(task: str, labels: Mapping[str, list[str]], classes: list[str]) -> None:
    if len(classes) < 2:
        raise InputError(
            f"{task}: found {len(classes)} different labels, expected 2 or more. Add examples."
        )
    if len(labels) > 1 and "test" not in labels:
        raise InputError(
            f"{task}: found {' and '.join(labels)} without test. Expected one split, or train and "
            "test, or all three. Add the file, or join the splits."
        )
    label, fewest = Counter(next(iter(labels.values()))).most_common()[-1]
    if "validation" not in labels and fewest < _FEWEST:
        raise InputError(
            f"{task}: there are {fewest} examples with label {label!r}; ten folds need {_FEWEST} "
            "of each. Add examples, or a validation split."
        )
