"""Scored pairs of sentences, to evaluate on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simcse_trainer.data import readers, schema
from simcse_trainer.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_PAIR_COLUMNS = ("sentence1", "sentence2", "score")


def load_scored_pairs(path: str | Path) -> Dataset:
    """Load an evaluation file: `sentence1`, `sentence2` (text) and `score` (a number).

    Raises:
        InputError: A missing column, a row with an empty text or without a finite score, or fewer
            than two rows.
    """
    from datasets import Dataset, Features, Value

    texts = {name: name for name in _PAIR_COLUMNS[:2]}
    file, *others = readers.expand_files([str(path)])
    if others:
        raise InputError(f"{path} matches {1 + len(others)} files, expected one. Name one file.")
    advice = "Rename the columns of the file."
    schema.require_known(readers.column_names(file), _PAIR_COLUMNS, source=str(file), advice=advice)
    data: dict[str, list[Any]] = {name: [] for name in _PAIR_COLUMNS}
    for row in readers.read_rows(file):
        problem = (
            row.problem
            or schema.find_problem(row.values, texts)
            or schema.find_score_problem(row.values)
        )
        if problem is not None:
            raise InputError(f"{file} row {row.number}: {problem}. Fix the row, or leave it out.")
        for name, cells in data.items():
            cells.append(row.values[name])
    data["score"] = [float(score) for score in data["score"]]
    _check_scores(data["score"], str(file))
    types = {name: Value("string") for name in texts} | {"score": Value("float64")}
    return Dataset.from_dict(data, features=Features(types))


def check_scored_pairs(data: Any, *, source: str) -> None:
    """Check evaluation data that was given in Python as `load_scored_pairs` checks a file.

    Args:
        data: A data set, or a mapping of lists, of sentence1, sentence2 and score.
        source: Its name in errors, where rows are counted from 1.

    Raises:
        InputError: See `load_scored_pairs`.
    """
    names = list(getattr(data, "column_names", None) or data)
    schema.require_known(names, _PAIR_COLUMNS, source=source, advice="Rename the columns.")
    texts = {name: name for name in _PAIR_COLUMNS[:2]}
    columns = [list(data[name]) for name in _PAIR_COLUMNS]
    for number, cells in enumerate(zip(*columns, strict=True), start=1):
        row = dict(zip(_PAIR_COLUMNS, cells, strict=True))
        problem = schema.find_problem(row, texts) or schema.find_score_problem(row)
        if problem is not None:
            raise InputError(f"{source} row {number}: {problem}. Fix the row, or leave it out.")
    _check_scores(columns[2], source)


def _check_scores(scores: Sequence[float], source: str) -> None:
    if len(set(scores)) < 2:
        raise InputError(
            f"{source}: found {len(scores)} rows with {len(set(scores))} different scores, "
            "expected 2 or more of both to correlate. Add rows."
        )
