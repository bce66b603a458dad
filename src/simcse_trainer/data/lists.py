"""Rows as they are in the data to canonical texts: plain ones, lists of them, and chats."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from simcse_trainer.data.kinds import is_chat
from simcse_trainer.data.schema import (
    ANCHOR,
    MISSING,
    NEGATIVE,
    POSITIVE,
    count_texts,
    find_text_problem,
    suggest_fix,
)
from simcse_trainer.errors import InputError

if TYPE_CHECKING:
    from datasets import Features

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextColumns:
    """The columns of texts, and what they hold.

    Attributes:
        names: Role -> name in the data, as `resolve_text_columns` gives it.
        lists: Positives and negatives are lists of texts, the negatives of all columns one list.
    """

    names: Mapping[str, str]
    lists: bool = False

    @classmethod
    def find(cls, names: Mapping[str, str], rows: Iterable[Mapping[str, object]]) -> TextColumns:
        """Find out by the first rows whether there are lists; drop negatives of which no row has.

        Args:
            names: Role -> name in the data.
            rows: The first rows of the data: column -> value.
        """
        sample = list(rows)
        others = [name for role, name in names.items() if role != ANCHOR]
        if not any(_is_list(row.get(name)) for row in sample for name in others):
            return cls(names)
        used = {
            role: name
            for role, name in names.items()
            if not role.startswith(NEGATIVE) or any(row.get(name) for row in sample)
        }
        return cls(used, lists=True)

    @property
    def roles(self) -> list[str]:
        """Names of the canonical columns."""
        if not self.lists:
            return list(self.names)
        return [ANCHOR, POSITIVE, *([NEGATIVE] if len(self.names) > 2 else [])]

    @property
    def nothing(self) -> dict[str, Any]:
        """A row without texts."""
        return {role: [] if self.lists and role != ANCHOR else "" for role in self.roles}

    def features(self, *more: str) -> Features:
        """Return the types of the canonical columns, and of more columns of texts."""
        from datasets import Features, List, Value

        text: Any = Value("string")
        kinds = {role: text if empty == "" else List(text) for role, empty in self.nothing.items()}
        return Features(kinds | dict.fromkeys(more, text))

    def read(self, row: Mapping[str, object]) -> tuple[dict[str, Any], str | None]:
        """Return the texts of a row by role, and what keeps it from being used.

        Args:
            row: Name in the data -> value.

        Returns:
            The texts, or none; and None, or such as "column 'sent1' is empty".
        """
        texts = self.nothing
        for role, name in self.names.items():
            value = join_turns(row.get(name, MISSING))
            if role == ANCHOR or not self.lists:
                problem, texts[role] = find_text_problem(value), value
            else:
                found = _as_list(value, may_be_empty=role != POSITIVE)
                problem = _find_list_problem(found)
                texts[POSITIVE if role == POSITIVE else NEGATIVE] += found
            if problem is not None:
                return self.nothing, f"column {name!r} {problem}"
        return texts, None

    def read_texts(self, row: Mapping[str, object]) -> dict[str, Any]:
        """Return the texts of a row by role, none where it cannot be used."""
        return self.read(row)[0]


@dataclass
class ExampleCheck:
    """Renames and checks the examples of a stream, as batches of one.

    A stream has no end to report at: drops are logged at the 1st, 10th, 100th, ...
    """

    columns: TextColumns
    drop: bool
    source: str
    dropped: int = field(default=0)

    def __call__(
        self, batch: Mapping[str, list[object]], indices: list[int]
    ) -> dict[str, list[Any]]:
        """Return the same texts under canonical names; none for a row to drop."""
        texts, problem = self.columns.read({name: cells[0] for name, cells in batch.items()})
        if problem is None:
            return {role: [text] for role, text in texts.items()}
        problem = f"{self.source} row {indices[0] + 1}: {problem}"
        if not self.drop:
            needs = count_texts(self.columns.roles)
            raise InputError(f"{problem}. {suggest_fix(needs, 'such rows')}")
        self.dropped += 1
        if str(self.dropped).rstrip("0") == "1":
            logger.warning("%s: dropped %d rows so far; now %s", self.source, self.dropped, problem)
        return {role: [] for role in self.columns.roles}


def join_turns(value: Any) -> Any:
    """Return what the turns of a chat say, a line each; anything else as it is."""
    if not is_chat(value):
        return value
    said = [turn.get("content", turn.get("value")) for turn in value]
    return "\n".join(said) if all(isinstance(text, str) for text in said) else value


def take_first(cells: Sequence[Any]) -> list[str]:
    """Return the texts of a column; of a list the first, and nothing of an empty one."""
    return [next(iter(cell), "") if _is_list(cell) else cell for cell in cells]


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple) and not is_chat(value)


def _as_list(value: Any, *, may_be_empty: bool) -> list[Any]:
    if value is None and may_be_empty:
        return []
    if not _is_list(value):
        return [value]
    return [join_turns(item) for item in value] or ([] if may_be_empty else [_EMPTY])


_EMPTY: list[Any] = []


def _find_list_problem(texts: list[Any]) -> str | None:
    for number, text in enumerate(texts, 1):
        if text is _EMPTY:
            return "is an empty list"
        problem = find_text_problem(text)
        if problem is not None:
            return problem if len(texts) == 1 else f"item {number} {problem}"
    return None
