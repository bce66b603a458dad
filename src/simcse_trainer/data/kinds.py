"""What columns hold, as far as their first rows tell: texts, lists, chats, or numbers and names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

# Of a table, names by which others call anchor, positive and negatives, which are then suggested.
_WELL_KNOWN = (
    ("anchor", "positive", "negative"),
    ("query", "positive", "negative"),
    ("query", "response", "rejected_response"),
    ("prompt", "chosen", "rejected"),
    ("premise", "hypothesis"),
    ("question", "answer"),
    ("sentence1", "sentence2"),
    ("text1", "text2"),
    ("질문", "답변"),
)

# Columns that say whether two texts belong together, and names of two texts that are judged.
_JUDGEMENTS = {
    *("label", "labels", "gold_label", "score", "similarity", "similarity_score", "is_duplicate"),
    *("is_paraphrase", "duplicate", "relatedness_score", "relevance", "binary_label"),
}
_JUDGED = {("premise", "hypothesis"), ("query", "passage"), ("query", "document")}

_NOT_TEXT = (
    re.compile(r"[\w./:+#@-]*\d[\w./:+#@-]*"),  # a number or name: 17, doc_0001, a uuid, an address
    re.compile(r"[0-9a-fA-F]{8,}"),
    re.compile(r"\d{1,4}[-./년]\s?\d{1,2}[-./월]\s?\d{1,4}일?([ T][\d:.+Z-]+)?"),  # a date
    re.compile(r"[\d\s.,%$€₩:+-]+"),
    re.compile(r"(?i)true|false|yes|no|null|none|nan|n/a"),
    re.compile(r"(?i)(https?|ftp|s3|file)://\S+|\S+@\S+\.\w+"),
)
# Cells, and how often each is there, from which on repeated ones are labels.
_MANY, _REPEATED, _LONGEST_LABEL = 8, 4, 30


def is_number(text: str) -> bool:
    """Return whether Python reads the text as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def find_text_columns(rows: Iterable[Mapping[str, object]], names: Sequence[str]) -> list[str]:
    """Return the columns that hold texts or lists of texts: no numbers, ids, dates or labels.

    Args:
        rows: The first rows of the data: column -> value.
        names: The names of all columns of the data.
    """
    sample = list(rows)
    return [name for name in names if holds_text([row.get(name) for row in sample])]


def holds_text(cells: Sequence[object]) -> bool:
    """Return whether the cells are texts, or lists of texts or of messages."""
    known = [cell for cell in cells if cell is not None and cell != ""]
    if not known:
        return False
    if all(isinstance(cell, list | tuple) for cell in known):
        inner = [item for cell in known for item in cell]  # type: ignore[attr-defined]
        return bool(inner) and (holds_text(inner) or all(map(is_message, inner)))
    texts = [cell.strip() for cell in known if isinstance(cell, str)]
    if len(texts) < len(known):
        return False
    if sum(any(kind.fullmatch(text) for kind in _NOT_TEXT) for text in texts) >= 0.9 * len(texts):
        return False
    return not _are_labels(texts)


def _are_labels(texts: Sequence[str]) -> bool:
    return (
        len(texts) >= _MANY
        and _REPEATED * len(set(texts)) <= len(texts)
        and max(map(len, texts)) <= _LONGEST_LABEL
    )


def suggest_columns(rows: Iterable[Mapping[str, object]], names: Sequence[str]) -> list[str]:
    """Return columns to train on: those of well-known names, else the first one or two of texts.

    Args:
        rows: The first rows of the data: column -> value.
        names: The names of all columns of the data.
    """
    texts = find_text_columns(rows, names)
    for known in _WELL_KNOWN:
        found = [name for name in known if name in texts]
        if list(known[:2]) == found[:2]:
            return found
    return texts[:2]


def find_label(names: Iterable[str]) -> str | None:
    """Return the column whose name says that it judges two texts; None if there is none."""
    return next((name for name in names if name.lower() in _JUDGEMENTS), None)


def find_judgement(names: Sequence[str], rows: Sequence[Mapping[str, object]]) -> list[str]:
    """Return two columns of texts and the one that says whether they belong together.

    Args:
        names: The names of all columns of the data.
        rows: The first rows of the data: column -> value.

    Returns:
        Nothing where there are no such columns, or all rows have the same in the last.
    """
    label = find_label(names)
    texts = [name for name in names if name != label and _may_be_text(name, rows)]
    if label is None or len({str(row.get(label)) for row in rows}) < 2:
        return []
    for first, second in pairwise(texts):
        pair = (first.lower(), second.lower())
        numbered = re.sub(r"\d+$|_?[ab]$", "", pair[0]) == re.sub(r"\d+$|_?[ab]$", "", pair[1])
        if numbered or pair in _JUDGED:
            return [first, second, label]
    return []


def _may_be_text(name: str, rows: Sequence[Mapping[str, object]]) -> bool:
    cells = [row[name] for row in rows if row.get(name)]
    return bool(cells) and all(isinstance(c, str) and not is_number(c) for c in cells)


def looks_like_a_row(header: Sequence[str]) -> bool:
    """Return whether a header has cells that are texts or numbers rather than names.

    Args:
        header: The cells of the first line.
    """
    if [name for name in header if name.isdecimal()] == [
        str(n) for n in range(sum(map(str.isdecimal, header)))
    ]:
        # Names such as pandas gives, 0, 1, ..., are no numbers of a row.
        header = [name for name in header if not name.isdecimal()]
    return any(map(_is_like_a_cell, header))


def _is_like_a_cell(name: str) -> bool:
    ends = name.endswith((".", "!", "。", "？", "！")) or name.endswith("?")
    return is_number(name) or len(name) > 40 or len(name.split()) > 2 or (ends and len(name) > 3)


def name_columns(rows: Iterable[Mapping[str, object]], names: Sequence[str]) -> list[str]:
    """Return names for the columns of a table without a header: sent0, sent1, ... for the texts.

    Args:
        rows: The first rows, the first line of the file among them.
        names: What the columns are called in them.
    """
    texts = find_text_columns(rows, names) or list(names)
    roles = ["sent0", "sent1", "hard_neg", *(f"hard_neg{n}" for n in range(2, len(texts)))]
    given = dict(zip(texts, roles, strict=False))
    return [given.get(name, f"column{place}") for place, name in enumerate(names, 1)]


def is_message(value: object) -> bool:
    """Return whether a value is a turn of a chat, as {"role": ..., "content": ...}."""
    return isinstance(value, Mapping) and (
        {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys()
    )


def is_chat(value: object) -> bool:
    """Return whether a value is a list of turns."""
    return isinstance(value, list | tuple) and bool(value) and all(map(is_message, value))
