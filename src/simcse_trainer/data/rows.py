"""What every reader of files gives: rows, each with the number by which a user finds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A record of a file.

    Attributes:
        number: Line at which it starts (txt, jsonl, csv with the header as line 1), or which
            record it is (json, parquet); from 1.
        values: Column -> value; empty where `problem` says why it could not be read.
        problem: Short text such as "has 3 cells, the header has 2".
    """

    number: int
    values: dict[str, object] = field(default_factory=dict)
    problem: str | None = None


# Column names, and rows, None standing for a blank line.
Table = tuple[Sequence[str], Iterator["Row | None"]]
