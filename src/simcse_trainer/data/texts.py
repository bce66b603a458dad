"""Texts to embed: of a file or of standard input, as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from simcse_trainer.data.readers import find_files, open_table, read_txt
from simcse_trainer.data.rows import Row
from simcse_trainer.data.schema import find_problem, quote_names
from simcse_trainer.errors import InputError

STANDARD_INPUT = "-"
_COLUMN = "text"


def read_texts(source: str | Path, *, blank_lines: bool = False) -> Iterator[str]:
    """Read texts one at a time.

    Args:
        source: `-` for standard input; or a file, with a text a line, or if its name ends in csv,
            tsv, json, jsonl or parquet with one column, or one called `text`.
        blank_lines: Those of lines are texts too, so that line and text have one number.

    Raises:
        InputError: No such file, no such column, or something that is no text, with its row.
    """
    if str(source) == STANDARD_INPUT:
        _, rows = read_txt(sys.stdin.buffer, "standard input")
        yield from _texts("standard input", _COLUMN, rows, blank_lines)
        return
    path, *others = find_files(str(source))
    if others:
        raise InputError(f"{source} matches {1 + len(others)} files, expected one. Name one file.")
    with open_table(path) as (names, rows):
        yield from _texts(str(path), _text_column(names, str(path)), rows, blank_lines)


def _text_column(names: Sequence[str], source: str) -> str:
    if len(names) == 1:
        return names[0]
    if _COLUMN in names:
        return _COLUMN
    raise InputError(
        f"{source}: which column are the texts? Found {quote_names(names) or 'none'}; expected "
        f"one column, or one called '{_COLUMN}'. Rename it."
    )


def _texts(
    source: str, column: str, rows: Iterable[Row | None], blank_lines: bool
) -> Iterator[str]:
    for row in rows:
        if row is None:
            if blank_lines:
                yield ""
            continue
        problem = row.problem or find_problem(row.values, {_COLUMN: column})
        if problem is not None:
            raise InputError(f"{source} row {row.number}: {problem}. Fix the row, or leave it out.")
        yield str(row.values[column])
