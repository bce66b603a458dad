"""All tasks of an evaluation together: every different sentence is encoded once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simcse_trainer.data.pairs import file_columns, load_labelled
from simcse_trainer.data.retrieval import (
    RetrievalData,
    find_pair_columns,
    is_beir,
    load_beir,
    pairs_to_retrieval,
    read_pairs,
)
from simcse_trainer.data.schema import require_known
from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.published import STS_TASKS
from simcse_trainer.evaluation.retrieval import score_retrieval
from simcse_trainer.evaluation.space import fit_whitening
from simcse_trainer.evaluation.sts import (
    TASKS,
    Encoder,
    PairScores,
    evaluate_sts,
    load_sts_tasks,
    score_pairs,
)
from simcse_trainer.evaluation.tasks import EVALUATE_OPTIONS, TRAINING_OPTIONS, OptionNames
from simcse_trainer.evaluation.transfer import (
    TRANSFER_TASKS,
    evaluate_transfer,
    load_transfer_task,
    split_texts,
)
from simcse_trainer.evaluation.verdict import Interval, bootstrap_change, bootstrap_gains

# Endings of what there is of each task.
_SCORES = ("_spearman", "_accuracy", "_f1")


@dataclass(frozen=True)
class Suite:
    """Tasks with their data.

    Attributes:
        sts: Name -> data set of sentence1, sentence2, score.
        transfer: Name -> split -> data set of text or sentence1 and sentence2, and label.
        retrieval: Name -> queries and passages, which are read again for each evaluation.
        mteb: Name -> task of mteb, from `load_mteb_tasks`.
    """

    sts: dict[str, Any] = field(default_factory=dict)
    transfer: dict[str, dict[str, Any]] = field(default_factory=dict)
    retrieval: dict[str, RetrievalData] = field(default_factory=dict)
    mteb: dict[str, Any] = field(default_factory=dict)

    def counts(self) -> dict[str, dict[str, int]]:
        """Count examples by task and split; the split of an STS task is called `pairs`."""
        scored = {name: {"pairs": len(data["score"])} for name, data in self.sts.items()}
        labelled = {
            name: {split: len(data["label"]) for split, data in splits.items()}
            for name, splits in self.transfer.items()
        }
        searched = {
            name: {"queries": len(data.queries), "passages": data.passages}
            for name, data in self.retrieval.items()
        }
        return scored | labelled | searched

    def texts(self) -> dict[str, list[str]]:
        """Return the texts of each task but retrieval and mteb's, as often as they occur."""
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
    there |= {path.name for path in Path(data_dir).glob("*") if is_beir(path)}
    if not there:
        raise InputError(
            f"{data_dir}: found no <task>/{split}.csv and no <task>/corpus.jsonl. Check --data_dir "
            "and --split, or name files with --tasks."
        )
    order = [*TASKS, *TRANSFER_TASKS]
    return sorted(
        there, key=lambda name: (order.index(name) if name in order else len(order), name)
    )


def load_retrieval(
    task: str,
    *,
    split: str,
    data_dir: str | None,
    options: OptionNames,
    columns: Sequence[str] = (),
    corpus: str | Path | None = None,
) -> RetrievalData | None:
    """Load a task of retrieval: pairs without a score, or a folder as BEIR's.

    Args:
        task: A file, a folder, or the name of a folder in `data_dir`.
        split: Name of the split.
        data_dir: Folder of `<task>/<split>.csv` and of folders as BEIR's.
        options: How errors call the options to change.
        columns: Of pairs: names of the queries' column and the passages'.
        corpus: Of pairs: a file of further passages.

    Returns:
        None where the task is another.

    Raises:
        InputError: The data cannot be used.
    """
    places = [Path(data_dir, task)] if data_dir is not None else []
    if task not in TASKS and task not in TRANSFER_TASKS:
        places.append(Path(task))
    for folder in places:
        if is_beir(folder):
            return load_beir(folder, split, split_option=options.split)
    file = Path(task) if Path(task).suffix else Path(data_dir or "", task, f"{split}.csv")
    if not file.is_file():
        return None
    names = file_columns(file)
    if "label" in names or {"sentence1", "sentence2", "score"} <= set(names):
        return None
    found = find_pair_columns(names, columns)
    if found is None:
        return None
    return pairs_to_retrieval(read_pairs(file, found), source=str(file), corpus=corpus)


def load_training_tasks(
    tasks: Sequence[str],
    *,
    split: str,
    data_dir: str | None,
    columns: Sequence[str] = (),
    corpus: str | None = None,
) -> dict[str, Any]:
    """Load what is evaluated on while training: tasks of STS and of retrieval, by name.

    Args:
        tasks: See `load_sts_tasks` and `load_retrieval`.
        split: Name of the split.
        data_dir: See `load_sts_tasks` and `load_retrieval`.
        columns: Of the training data; they are looked for in files of pairs.
        corpus: A file of further passages for the pairs.

    Raises:
        InputError: An unknown task, one whose data cannot be used, or a corpus without pairs.
    """
    loaded: dict[str, Any] = {}
    for task in tasks:
        found: Any = load_retrieval(
            task,
            split=split,
            data_dir=data_dir,
            options=TRAINING_OPTIONS,
            columns=columns,
            corpus=corpus,
        )
        name = name_task(task)
        if name in loaded:
            raise InputError(
                f"Two evaluation tasks are called '{name}', the second is {task}. Rename one file."
            )
        if found is None:
            (found,) = load_sts_tasks([task], split=split, data_dir=data_dir).values()
        loaded[name] = found
    check_corpus(corpus, loaded, "--eval_corpus")
    return loaded


def name_task(task: str) -> str:
    """Return what a task's results are called: by a file's or folder's name, or as it is."""
    path = Path(task)
    if path.is_dir():
        return path.resolve().name
    return path.name.split(".")[0] if path.suffix else task


def check_corpus(corpus: Any, tasks: Mapping[str, Any], option: str) -> None:
    """Raise InputError where a corpus is given and there is nothing to find in it."""
    if corpus is not None and not any(isinstance(t, RetrievalData) for t in tasks.values()):
        raise InputError(
            f"{option} adds passages to tasks of pairs, and there is none. Leave it out, or add a "
            "file of queries and relevant passages to the tasks."
        )


def load_suite(
    tasks: Sequence[str],
    *,
    split: str,
    data_dir: str | None,
    columns: Sequence[str] = (),
    corpus: str | Path | None = None,
) -> Suite:
    """Load tasks by name.

    Args:
        tasks: Names of `sts.TASKS` and `transfer.TRANSFER_TASKS`, folders of `data_dir`, or files.
            What is not known by name is told by its columns: `score`, `label`, or neither.
        split: Of the STS tasks and of retrieval; transfer uses all splits.
        data_dir: See `load_sts_tasks` and `load_transfer_task`; by default from the Hub.
        columns: See `load_retrieval`, as for `corpus`.
        corpus: A file of further passages.

    Raises:
        InputError: An unknown task, or one whose data cannot be used.
    """
    suite = Suite()
    for task in tasks:
        if columns and Path(task).is_file():
            advice = "Pass --columns with the column of queries and that of passages."
            require_known(file_columns(task), columns, source=task, advice=advice)
        found = load_retrieval(
            task,
            split=split,
            data_dir=data_dir,
            options=EVALUATE_OPTIONS,
            columns=columns,
            corpus=corpus,
        )
        if found is not None:
            loaded: dict[str, Any] = {name_task(task): found}
            target: dict[str, Any] = suite.retrieval
        elif not _is_transfer(task, data_dir):
            if task not in TASKS and not Path(task).suffix and data_dir is None:
                raise InputError(
                    f"'{task}' is no known task; expected one of "
                    f"{', '.join([*TASKS, *TRANSFER_TASKS])}, a file, or a folder in --data_dir."
                )
            loaded = load_sts_tasks(
                [task], split=split, data_dir=data_dir, options=EVALUATE_OPTIONS
            )
            target = suite.sts
        elif Path(task).suffix:
            loaded = {Path(task).name.split(".")[0]: {"train": load_labelled(task)}}
            target = suite.transfer
        else:
            loaded = {task: load_transfer_task(task, data_dir=data_dir, options=EVALUATE_OPTIONS)}
            target = suite.transfer
        (name,) = loaded
        if any(name in part for part in (suite.sts, suite.transfer, suite.retrieval)):
            raise InputError(f"Two tasks are called '{name}'. Leave one out, or rename its file.")
        target |= loaded
    check_corpus(corpus, suite.retrieval, "--corpus")
    return suite


def encode_once(encode: Encoder, texts: Iterable[str]) -> Encoder:
    """Encode every different text, and look embeddings up from then on; those of others follow."""
    rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
    if not rows:
        return encode
    embeddings = encode(list(rows))

    def look_up(wanted: Sequence[str]) -> Tensor:
        new = list(dict.fromkeys(text for text in wanted if text not in rows))
        places, known = rows, embeddings
        if new:
            places = rows | {text: len(rows) + i for i, text in enumerate(new)}
            known = torch.cat([embeddings, encode(new)])
        return known[torch.tensor([places[text] for text in wanted])]

    return look_up


def evaluate_tasks(encode: Encoder, tasks: Mapping[str, Any]) -> dict[str, float]:
    """Run `evaluate_sts` on scored pairs, and `evaluate_retrieval` on the others.

    Args:
        encode: Texts to embeddings [n, D].
        tasks: Name -> data set of sentence1, sentence2, score; or queries and passages.
    """
    return score_tasks(encode, tasks).metrics


def score_tasks(encode: Encoder, tasks: Mapping[str, Any]) -> PairScores:
    """Evaluate as `evaluate_tasks` does, and keep what there is of each pair and query.

    Args:
        encode: Texts to embeddings [n, D].
        tasks: Name -> data set of sentence1, sentence2, score; or queries and passages.
    """
    scored, searched = split_tasks(tasks)
    found = score_pairs(encode, scored) if scored else PairScores({}, {})
    if searched:
        retrieved = score_retrieval(encode, encode, searched)
        found.metrics.update(retrieved.metrics)
        found.gains.update(retrieved.gains)
        found.rankings.update(retrieved.rankings)
    return found


def split_tasks(tasks: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, RetrievalData]]:
    """Return the scored pairs, and the queries and passages."""
    searched = {name: data for name, data in tasks.items() if isinstance(data, RetrievalData)}
    return {name: data for name, data in tasks.items() if name not in searched}, searched


def bootstrap_tasks(before: Any, after: Any, tasks: Mapping[str, Any]) -> Interval | None:
    """Find where the change of the score that `judge` looks at would be for other data like this.

    Args:
        before: The `cosines` and `gains` of `score_tasks`, by one model.
        after: The same by the other.
        tasks: The data of both.
    """
    gold = {name: list(task["score"]) for name, task in split_tasks(tasks)[0].items()}
    if gold:
        return bootstrap_change(before.cosines, after.cosines, gold)
    return bootstrap_gains(before.gains, after.gains)


def count_examples(tasks: Mapping[str, Any]) -> int:
    """Count the scored pairs and the queries of all tasks."""
    return sum(
        len(data.queries) if isinstance(data, RetrievalData) else len(data["score"])
        for data in tasks.values()
    )


def evaluate_suite(encode: Encoder, suite: Suite) -> dict[str, float]:
    """Run `evaluate_sts` and `evaluate_transfer`; retrieval has too many texts to look up."""
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
        sts, transfer = ({name: d[name]} if name in d else {} for d in (suite.sts, suite.transfer))
        found = evaluate_suite(_whitened(encode, texts), Suite(sts, transfer))
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
