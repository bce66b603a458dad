"""Natural language inference to triplets: entailments are positives, contradictions hard negatives.

Gao et al. 2021, section 4.1 ("entailment + hard neg." in its table of supervised data).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING

from simcse_trainer.data.lines import FileOptions
from simcse_trainer.data.lists import TextColumns
from simcse_trainer.data.readers import read_rows
from simcse_trainer.data.schema import (
    ANCHOR,
    NEGATIVE,
    POSITIVE,
    PROBLEM,
    describe,
    find_problem,
    quote_names,
    require_known,
)
from simcse_trainer.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

NLI_COLUMNS = ("premise", "hypothesis", "label")
TRIPLETS = TextColumns({role: role for role in (ANCHOR, POSITIVE, NEGATIVE)})

NLI_NEEDS = "a premise, a hypothesis and a label"

_CANONICAL = {name: name for name in NLI_COLUMNS}
_LABELS = ("entailment", "neutral", "contradiction")
_NO_GOLD_LABEL = "no gold label"
_LABEL_OF: dict[object, str] = {
    **{name: name for name in _LABELS},
    **{number: name for number, name in enumerate(_LABELS)},
    **{str(number): name for number, name in enumerate(_LABELS)},
    **dict.fromkeys(("-", "-1", -1), _NO_GOLD_LABEL),
}


def build_triplets(rows: Iterable[Mapping[str, object]]) -> Iterator[dict[str, str]]:
    """Turn premise, hypothesis and label into `sent0`, `sent1`, `hard_neg`.

    Each premise with at least one entailment and one contradiction gives one triplet per
    entailment; its contradictions serve in turn. Premises come in the order of their first
    appearance. All rows are read before the first triplet comes.

    Args:
        rows: Labels are entailment, neutral, contradiction (in any case) or 0, 1, 2; rows
            labelled `-` or -1 have no gold label and are skipped.

    Raises:
        InputError: A missing column, an empty text, an unknown label, or no triplet at all.
    """
    number = 0
    groups: dict[str, dict[str, list[str]]] = {}
    for number, row in enumerate(rows, 1):
        problem = find_nli_problem(row)
        if problem is not None:
            raise InputError(f"row {number}: {problem}. Fix the row, or leave it out.")
        label = _read_label(row["label"])
        if label != _NO_GOLD_LABEL:
            group = groups.setdefault(str(row["premise"]), {name: [] for name in _LABELS})
            group[str(label)].append(str(row["hypothesis"]))
    found = False
    for premise, group in groups.items():
        # An empty list of contradictions makes an empty cycle, and so no triplet.
        pairs = zip(group["entailment"], cycle(group["contradiction"]), strict=False)
        for positive, negative in pairs:
            found = True
            yield {ANCHOR: premise, POSITIVE: positive, NEGATIVE: negative}
    if not found:
        raise InputError(
            f"no premise of the {number} rows has both an entailment and a contradiction, so there "
            "is no triplet. Check the labels, or keep the entailments alone and train on pairs of "
            "these without --nli_triplets."
        )


def find_nli_problem(
    row: Mapping[str, object], columns: Mapping[str, str] = _CANONICAL
) -> str | None:
    """Say why a row cannot be used, such as "column 'label' is 'maybe', expected ..."."""
    name = columns["label"]
    if name not in row:
        return f"column {name!r} is missing"
    value = row[name]
    label = _read_label(value)
    if label is None:
        found = repr(value) if isinstance(value, str) else describe(value)
        return f"column {name!r} is {found}, expected {', '.join(_LABELS)}, 0, 1, 2, '-' or -1"
    texts = {role: columns[role] for role in NLI_COLUMNS[:2]}
    return None if label == _NO_GOLD_LABEL else find_problem(row, texts)


def resolve_nli_columns(
    column_names: Sequence[str], columns: Sequence[str] | None, *, source: str
) -> dict[str, str]:
    """Name in the data of premise, hypothesis and label; `columns` gives them by position.

    Raises:
        InputError: One of the three is not there.
    """
    wanted = list(columns or NLI_COLUMNS)
    if len(set(wanted)) != len(NLI_COLUMNS) or len(wanted) != len(NLI_COLUMNS):
        raise InputError(
            f"{source}: --columns {shlex.join(wanted)} does not fit --nli_triplets, which needs "
            f"three columns: {', '.join(NLI_COLUMNS)}. Found {quote_names(column_names)}."
        )
    advice = "Name them in the order premise, hypothesis, label: --columns A B C"
    require_known(column_names, wanted, source=source, advice=advice)
    return dict(zip(NLI_COLUMNS, wanted, strict=True))


def file_triplets(
    files: Iterable[tuple[str, str, str]], columns: Mapping[str, str], options: FileOptions
) -> Iterator[dict[str, str | None]]:
    """Yield triplets of all files together, then a row with a `problem` for each bad row."""
    rows = (
        (f"{path} row {row.number}", row.values, row.problem)
        for path, *_ in files
        for row in read_rows(Path(path), options)
    )
    return _triplets_then_problems(rows, columns)


def dataset_triplets(
    dataset: Dataset, columns: Mapping[str, str], source: str
) -> Iterator[dict[str, str | None]]:
    """Yield triplets of a data set, then a row with a `problem` for each bad row."""
    label = columns["label"]
    # A ClassLabel says what its numbers mean, and not every data set has entailment first.
    names: list[str] = getattr(dataset.features[label], "names", None) or []

    def named(row: dict[str, object]) -> dict[str, object]:
        number = row[label]
        if isinstance(number, int) and 0 <= number < len(names):
            return {**row, label: names[number]}
        return row

    rows = (
        (f"{source} row {number}", named(row), None)
        for number, row in enumerate(dataset.select_columns(list(columns.values())), 1)
    )
    return _triplets_then_problems(rows, columns)


def _triplets_then_problems(
    rows: Iterable[tuple[str, Mapping[str, object], str | None]], columns: Mapping[str, str]
) -> Iterator[dict[str, str | None]]:
    problems: list[str] = []

    def good_rows() -> Iterator[dict[str, object]]:
        for where, row, known_problem in rows:
            problem = known_problem or find_nli_problem(row, columns)
            if problem is None:
                # A row without gold label may lack its texts.
                yield {role: row.get(name) for role, name in columns.items()}
            else:
                problems.append(f"{where}: {problem}")

    try:
        for triplet in build_triplets(good_rows()):
            yield {**triplet, PROBLEM: None}
    except InputError:
        # Bad rows explain better why there is no triplet.
        if not problems:
            raise
    for problem in problems:
        yield {**TRIPLETS.nothing, PROBLEM: problem}


def _read_label(label: object) -> str | None:
    if isinstance(label, str):
        return _LABEL_OF.get(label.strip().lower())
    if isinstance(label, int | float) and not isinstance(label, bool):
        return _LABEL_OF.get(label)
    return None
