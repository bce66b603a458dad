"""What is evaluated on: pairs of sentences with a score, and texts or pairs with a label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simcse_trainer.data import readers, schema
from simcse_trainer.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

_PAIR_COLUMNS = ("sentence1", "sentence2", "score")
_TEXT_COLUMNS = ("text", "sentence1", "sentence2", "sent0", "sent1", "hard_neg")


def load_scored_pairs(path: str | Path) -> Dataset:
    """Load an evaluation file: `sentence1`, `sentence2` (text) and `score` (a number).

    Raises:
        InputError: A missing column, a row with an empty text or without a finite score, or fewer
            than two rows.
    """
    data = _read(Path(path), _PAIR_COLUMNS, schema.find_score_problem)
    data["score"] = [float(score) for score in data["score"]]
    _check_scores(data["score"], str(path))
    return _to_dataset(data, "float64")


def load_labelled(path: str | Path) -> Dataset:
    """Load a classification file: `text`, or `sentence1` and `sentence2`, and `label`.

    Labels are texts or whole numbers; they come as text.

    Raises:
        InputError: A missing column, or a row with an empty text or label.
    """
    names = file_columns(path)
    texts = _PAIR_COLUMNS[:2] if _PAIR_COLUMNS[0] in names else ("text",)
    data = _read(Path(path), (*texts, "label"), _find_label_problem)
    data["label"] = [str(label).strip() for label in data["label"]]
    return _to_dataset(data, "string")


def load_texts(path: str | Path) -> list[str]:
    """Load all texts of a file: of its only column, or of those that training and evaluation know.

    Raises:
        InputError: No such column, or a row with an empty text.
    """
    names = file_columns(path)
    found = [name for name in names if name in _TEXT_COLUMNS or len(names) == 1]
    if not found:
        raise InputError(
            f"{path}: there is no column of texts; found {schema.quote_names(names)}, expected one "
            f"column, or some of {schema.quote_names(_TEXT_COLUMNS)}. Rename the columns."
        )
    return [text for column in _read(Path(path), found).values() for text in column]


def file_columns(path: str | Path) -> list[str]:
    """Return names of the columns of one evaluation file.

    Raises:
        InputError: No such file, several, or one that cannot be read.
    """
    return readers.column_names(_one_file(Path(path)))


def check_scored_pairs(data: Any, *, source: str) -> None:
    """Check evaluation data that was given in Python as `load_scored_pairs` checks a file.

    Args:
        data: A data set, or a mapping of lists, of sentence1, sentence2 and score.
        source: Its name in errors, where rows are counted from 1.

    Raises:
        InputError: For the reasons of `load_scored_pairs`.
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


def _read(
    path: Path,
    columns: Sequence[str],
    find_problem: Callable[[Mapping[str, object]], str | None] | None = None,
) -> dict[str, list[Any]]:
    """Read columns of texts as lists, and the last, which `find_problem` then checks."""
    file = _one_file(path)
    advice = "Rename the columns of the file."
    schema.require_known(readers.column_names(file), columns, source=str(file), advice=advice)
    data: dict[str, list[Any]] = {name: [] for name in columns}
    texts = {name: name for name in (columns if find_problem is None else columns[:-1])}
    for row in readers.read_rows(file):
        problem = row.problem or schema.find_problem(row.values, texts)
        if problem is None and find_problem is not None:
            problem = find_problem(row.values)
        if problem is not None:
            raise InputError(f"{file} row {row.number}: {problem}. Fix the row, or leave it out.")
        for name, cells in data.items():
            cells.append(row.values[name])
    return data


def _one_file(path: Path) -> Path:
    file, *others = readers.expand_files([str(path)])
    if others:
        raise InputError(f"{path} matches {1 + len(others)} files, expected one. Name one file.")
    return file


def _find_label_problem(row: Mapping[str, object]) -> str | None:
    value = row.get("label")
    if isinstance(value, str):
        return None if value.strip() else "column 'label' is empty"
    if type(value) in (int, bool):
        return None
    return f"column 'label' is {schema.describe(value)}, expected a text or a whole number"


def _to_dataset(data: Mapping[str, list[Any]], last: str) -> Dataset:
    """Make a data set in which all columns but the last are text."""
    from datasets import Dataset, Features, Value

    types = dict.fromkeys(data, "string") | {list(data)[-1]: last}
    return Dataset.from_dict(
        dict(data), features=Features({name: Value(kind) for name, kind in types.items()})
    )


def _check_scores(scores: Sequence[float], source: str) -> None:
    if len(set(scores)) < 2:
        raise InputError(
            f"{source}: found {len(scores)} rows with {len(set(scores))} different scores, "
            "expected 2 or more of both to correlate. Add rows."
        )
