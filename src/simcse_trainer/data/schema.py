"""Column roles and their checks: which column is the anchor, and is every cell a text?"""

from __future__ import annotations

import logging
import math
import reprlib
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from simcse_trainer.data.kinds import find_text_columns, is_number, name_columns, suggest_columns
from simcse_trainer.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

ANCHOR, POSITIVE, NEGATIVE = "sent0", "sent1", "hard_neg"

# Columns of other projects, whose names tell their roles: FlagEmbedding's and ms-swift's.
_OTHERS = (("query", "pos", "neg"), ("messages", "positive_messages", "negative_messages"))

# How many positives a row of lists has, beside its tokens.
POSITIVES = "positives"

# Column in which checked rows carry what is wrong with them.
PROBLEM = "problem"

DROPPED = "%s: dropped %d rows, %d are left; the first: %s"

# So many rows can be dropped for a look, also where they are most.
_FEW = 4

# What a row without a column has in it.
MISSING = object()
_KINDS = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}


def resolve_text_columns(
    column_names: Sequence[str],
    columns: Sequence[str] | None = None,
    *,
    source: str,
    rows: Iterable[Mapping[str, object]] | None = None,
    has_header: bool = True,
) -> dict[str, str]:
    """Give each text column its role.

    Args:
        column_names: All columns of the data, in their order.
        columns: The text columns by position: anchor, positive, hard negatives. By default
            `sent0`, `sent1` and every `hard_neg*`; `query`, `pos`, `neg` as FlagEmbedding and
            `messages`, `positive_messages`, `negative_messages` as ms-swift call them; or the
            only column.
        source: File or data set, for the errors.
        rows: The first rows, by which columns of texts are suggested.
        has_header: The names are no row of texts that a table without a header begins with.

    Returns:
        Canonical name -> name in the data, in view order: `sent0[, sent1[, hard_neg...]]`.

    Raises:
        InputError: An unknown or repeated name in `columns`, hard negatives without positives,
            or no way to tell which columns are meant.
    """
    names = list(column_names)
    if columns:
        return _by_position(names, [columns] if isinstance(columns, str) else list(columns), source)
    if ANCHOR in names:
        return _by_name(names, source)
    for known in _OTHERS:
        if {*known[:2]} <= {*names}:
            roles = zip((ANCHOR, POSITIVE, NEGATIVE), known, strict=True)
            return {role: name for role, name in roles if name in names}
    if len(names) == 1:
        return {ANCHOR: names[0]}
    if not names:
        raise InputError(f"{source}: there are no columns; expected at least one of texts.")
    rows = None if rows is None else list(rows)
    suggested = names[:2] if rows is None else suggest_columns(rows, names)
    raise InputError(
        f"{source}: which columns are the texts? Found {quote_names(names)}; expected '{ANCHOR}'"
        f"{_describe_misspelt(names)}. "
        + (
            "Name the text columns in the order anchor, positive, hard negatives, such as "
            f"--columns {shlex.join(suggested)}"
            + ("" if has_header else _describe_header(names, rows or ()))
            if suggested
            else "None of them holds texts, only numbers, names or labels: add a column of texts."
        )
    )


def _describe_header(names: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Return what to do where the names are a row, so that no text is lost.

    Names above columns of numbers or ids are names; above texts alone they may be texts.
    """
    rows = list(rows)
    if find_text_columns(rows, names) != list(names):
        return ""
    given = name_columns([dict(zip(names, names, strict=True)), *rows], names)
    return f"; if the first line is a row, not a header, pass --column_names {shlex.join(given)}"


def is_known_elsewhere(names: Collection[str]) -> bool:
    """Return whether columns have the names that tell the roles in other projects' data."""
    return any({*known[:2]} <= {*names} for known in _OTHERS)


def find_problem(row: Mapping[str, object], columns: Mapping[str, str]) -> str | None:
    """Say what keeps a row from being used.

    Args:
        row: Name in the data -> value.
        columns: Role -> name in the data, as `resolve_text_columns` gives it.

    Returns:
        Short text such as "column 'sent1' is empty", or None for a good row.
    """
    for name in columns.values():
        problem = find_text_problem(row.get(name, MISSING))
        if problem is not None:
            return f"column {name!r} {problem}"
    return None


def find_numeric_column(
    rows: Iterable[Mapping[str, object]], columns: Mapping[str, str]
) -> str | None:
    """Return the first text column with nothing but numbers in it, None if there is none.

    A csv cell has no type: a score or label named as text column shows only in its values.
    """
    sample = list(rows)
    for name in columns.values():
        cells = [str(row[name]) for row in sample if row.get(name)]
        if cells and all(is_number(cell) for cell in cells):
            return name
    return None


def find_score_problem(row: Mapping[str, object], name: str = "score") -> str | None:
    """Say why a cell is no finite number, None if it is one."""
    value = row.get(name)
    number = is_number(value) if isinstance(value, str) else type(value) in (int, float)
    if not number:
        found = repr(value) if isinstance(value, str) else describe(value)
        return f"column {name!r} is {found}, expected a number"
    if not math.isfinite(float(str(value))):
        return f"column {name!r} is {value}, expected a finite number"
    return None


def require_known(names: Sequence[str], wanted: Iterable[str], *, source: str, advice: str) -> None:
    """Check that all wanted columns are there.

    Raises:
        InputError: One is not; the nearest name is given, and the advice.
    """
    for name in wanted:
        if name not in names:
            raise InputError(
                f"{source}: there is no column {name!r}{suggest(name, names)}; found "
                f"{quote_names(names)}. {advice}"
            )


def suggest_fix(needs: str, what: str) -> str:
    """Return the end of an error about a row: what each row needs, and what to do."""
    return f"Every row needs {needs}; fix the row, or pass --drop_invalid_rows true to skip {what}."


def count_texts(roles: Collection[str]) -> str:
    """Say how many texts each row needs: "1 text", "2 texts"."""
    return "1 text" if len(roles) == 1 else f"{len(roles)} texts"


def no_row_can_be_used(source: str, rows: str, first: str) -> InputError:
    """Return the error of data without a good row, for which dropping rows would leave nothing.

    Args:
        source: File or data set.
        rows: Which rows were looked at: "the 12 rows".
        first: The problem of the first one.
    """
    return InputError(
        f"{source}: none of {rows} can be used; {first}. Name other columns with --columns, or "
        "correct the file."
    )


def drop_or_raise_invalid_rows(
    dataset: Dataset, problems: Mapping[int, str], *, needs: str = "", drop: bool, source: str
) -> Dataset:
    """Leave out the rows with problems and log how many, or stop at the first.

    Args:
        dataset: The data, with canonical text columns.
        problems: Index of a row -> "pairs.csv row 7: column 'sent1' is empty".
        needs: What each row must have, for the error; by default a text in each column.
        drop: Leave the rows out.
        source: File or data set, for the log.

    Raises:
        InputError: There are problems and `drop` is false, or no row is left.
    """
    if not len(dataset):
        raise InputError(f"{source} has no rows. Add texts.")
    if not problems:
        return dataset
    first = next(iter(problems.values()))
    if not drop and len(problems) == len(dataset) > 1:
        raise no_row_can_be_used(source, f"the {len(problems)} rows", first)
    if not drop and len(problems) > max(_FEW, len(dataset) / 2):
        raise InputError(
            f"{source}: {len(problems)} of the {len(dataset)} rows cannot be used; {first}. Name "
            "other columns with --columns, or correct the file."
        )
    if not drop:
        what = f"the {len(problems)} such row{'s' if len(problems) > 1 else ''}"
        raise InputError(
            f"{first}. {suggest_fix(needs or count_texts(dataset.column_names), what)}"
        )
    if len(problems) == len(dataset):
        raise InputError(f"{source}: no row is left without {len(problems)} bad ones; {first}.")
    logger.warning(DROPPED, source, len(problems), len(dataset) - len(problems), first)
    return dataset.select([index for index in range(len(dataset)) if index not in problems])


def suggest(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Return ` (nearest: 'x')` for an unknown name; empty if nothing is near."""
    near = get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (nearest: {near[0]!r})" if near else ""


def quote_names(names: Iterable[str]) -> str:
    """Quote names, on one line, whatever is in them."""
    return ", ".join(map(repr, names)) or "no columns"


def describe(value: object) -> str:
    """Describe something that is not what was expected by its kind and value, shortened."""
    kind = _KINDS.get(type(value), f"of type {type(value).__name__}")
    return f"{kind} ({reprlib.repr(value)})"


def _by_position(names: list[str], columns: list[str], source: str) -> dict[str, str]:
    advice = "Pass --columns with names of the data."
    require_known(names, columns, source=source, advice=advice)
    if len(set(columns)) < len(columns):
        raise InputError(
            f"{source}: --columns {shlex.join(columns)} names a column twice. Name each text "
            "column once; one column alone trains unsupervised."
        )
    negatives = range(1, len(columns) - 1)
    roles = [ANCHOR, POSITIVE, *(f"{NEGATIVE}_{number}" for number in negatives)]
    if len(negatives) == 1:
        roles[-1] = NEGATIVE
    return dict(zip(roles, columns, strict=False))


def _by_name(names: list[str], source: str) -> dict[str, str]:
    negatives = [name for name in names if name.startswith(NEGATIVE)]
    if negatives and POSITIVE not in names:
        raise InputError(
            f"{source}: column {negatives[0]!r} needs a column '{POSITIVE}', which is not there; "
            f"found {quote_names(names)}. Add the positives, or pass --columns {ANCHOR} to train "
            "on single sentences."
        )
    used = [ANCHOR, *([POSITIVE] if POSITIVE in names else []), *negatives]
    misspelt = _describe_misspelt([name for name in names if name not in used])
    if misspelt:
        logger.warning("%s: used %s%s, which is ignored.", source, quote_names(used), misspelt)
    return {name: name for name in used}


def _describe_misspelt(names: Iterable[str]) -> str:
    for name in names:
        near = get_close_matches(name.lower(), [ANCHOR, POSITIVE, NEGATIVE], n=1, cutoff=0.8)
        if near:
            return f"; {name!r} looks like '{near[0]}'"
    return ""


def find_text_problem(value: object) -> str | None:
    """Say what keeps a value from being a text to train on, such as "is empty"; None if nothing."""
    if isinstance(value, str):
        return _find_character_problem(value)
    if value is MISSING:
        return "is missing"
    if value is None:
        return "is null"
    return f"is {describe(value)}, expected text"


def _find_character_problem(text: str) -> str | None:
    if not text or text.isspace():
        return "is empty"
    if "\0" in text:
        return "holds a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"holds half of a character, \\u{ord(text[error.start]):04x}"
    return None
