"""What retrieval is measured on: queries, passages as a stream, and which are relevant to which."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simcse_trainer.data import readers, schema
from simcse_trainer.data.texts import read_texts
from simcse_trainer.errors import InputError

logger = logging.getLogger(__name__)

# Names of a query's and a passage's column that need not be told.
_KNOWN_COLUMNS = (
    (schema.ANCHOR, schema.POSITIVE),
    ("query", "passage"),
    ("query", "positive"),
    ("anchor", "positive"),
    ("question", "answer"),
)
# The deepest cut of the metrics: of so many passages any model finds all.
DEPTH = 10
# Names of a split in BEIR's folders that are called otherwise here.
_SPLITS = {"validation": "dev"}
_QRELS = ("query-id", "corpus-id", "score")


@dataclass(frozen=True)
class RetrievalData:
    """Queries, and a collection of passages that may be larger than memory.

    Attributes:
        queries: Q different texts, or texts of different ids.
        relevant: For each query the numbers of its relevant passages, at least one. A negative
            number is a passage that is judged relevant and is not in the collection.
        passages: How many passages there are.
        read_passages: Reads (number, text) of each passage, from the first one at each call. The
            numbers are 0 to `passages` - 1, in any order; of equal scores the smaller one is first.
    """

    queries: Sequence[str]
    relevant: Sequence[frozenset[int]]
    passages: int
    read_passages: Callable[[], Iterator[tuple[int, str]]]

    def read_texts(self, numbers: Collection[int]) -> dict[int, str]:
        """Read the passages of these numbers, as far as they are in the collection."""
        return {number: text for number, text in self.read_passages() if number in numbers}

    def first_relevant(self, query: int) -> int:
        """Return a relevant passage of a query, negative only if none is in the collection."""
        return min(self.relevant[query], key=lambda number: (number < 0, number))


def find_pair_columns(
    names: Sequence[str], columns: Sequence[str] | None = None
) -> tuple[str, str] | None:
    """Find the columns of queries and relevant passages; None where the names do not tell.

    Args:
        names: All columns of the data, in their order.
        columns: The two columns, if the user has named them; further ones are left out.
    """
    wanted = [tuple(columns[:2])] if columns and len(columns) > 1 else []
    for pair in (*wanted, *_KNOWN_COLUMNS):
        if set(pair) <= set(names):
            return pair[0], pair[1]
    alone = len(names) == 2 and not {"score", "label"} & set(names)
    return (names[0], names[1]) if alone else None


def read_pairs(path: str | Path, columns: Sequence[str] | None = None) -> Iterator[tuple[str, str]]:
    """Read a file of pairs row by row, in bounded memory.

    Args:
        path: A file with a column of queries and one of relevant passages.
        columns: Their names, where they are not among those that `find_pair_columns` knows.

    Raises:
        InputError: No such file or columns, or a row with an empty text.
    """
    file, *others = readers.expand_files([str(path)])
    if others:
        raise InputError(f"{path} matches {1 + len(others)} files, expected one. Name one file.")
    names = readers.column_names(file)
    if columns:
        advice = "Pass --columns with the column of queries and that of passages."
        schema.require_known(names, columns[:2], source=str(file), advice=advice)
    found = find_pair_columns(names, columns)
    if found is None:
        raise InputError(
            f"{file}: which columns are the queries and the relevant passages? Found "
            f"{schema.quote_names(names)}; expected '{schema.ANCHOR}' and '{schema.POSITIVE}'. "
            "Pass --columns with the two names, the queries' first."
        )
    mapping = dict(zip(("query", "passage"), found, strict=True))
    for row in readers.read_rows(file):
        problem = row.problem or schema.find_problem(row.values, mapping)
        if problem is not None:
            raise InputError(f"{file} row {row.number}: {problem}. Fix the row, or leave it out.")
        yield str(row.values[found[0]]), str(row.values[found[1]])


def dataset_to_retrieval(data: Any, *, source: str) -> RetrievalData | None:
    """Take evaluation data that was given in Python, if it is pairs without a score.

    Args:
        data: A data set, or a mapping of lists.
        source: Its name in errors, where rows are counted from 1.

    Returns:
        None where its columns are not those of pairs.

    Raises:
        InputError: For the reasons of `pairs_to_retrieval`, or a row with an empty text.
    """
    found = find_pair_columns(list(getattr(data, "column_names", None) or data))
    if found is None:
        return None
    mapping = dict(zip(("query", "passage"), found, strict=True))
    pairs = list(zip(*(list(data[name]) for name in found), strict=True))
    for number, pair in enumerate(pairs, start=1):
        problem = schema.find_problem(dict(zip(found, pair, strict=True)), mapping)
        if problem is not None:
            raise InputError(f"{source} row {number}: {problem}. Fix the row, or leave it out.")
    return pairs_to_retrieval(pairs, source=source)


def pairs_to_retrieval(
    pairs: Iterable[tuple[str, str]], *, source: str, corpus: str | Path | None = None
) -> RetrievalData:
    """Make retrieval of pairs alone: each query is to find its passages among all.

    Equal texts are one passage, and equal queries one query with several relevant passages.

    Args:
        pairs: Queries and relevant passages.
        source: Name of the pairs in errors.
        corpus: Further passages: a file as `read_texts` takes it, read in bounded memory.

    Raises:
        InputError: Too few rows to tell models apart, each query is its own passage, or a row of
            the corpus cannot be used.
    """
    numbers: dict[str, int] = {}
    relevant: dict[str, set[int]] = {}
    rows = different = 0
    for query, passage in pairs:
        rows += 1
        different += query != passage
        relevant.setdefault(query, set()).add(numbers.setdefault(passage, len(numbers)))

    def read_passages() -> Iterator[tuple[int, str]]:
        return ((number, text) for number, text in enumerate(_different(numbers, corpus)))

    count = sum(1 for _ in read_passages()) if rows and corpus is not None else len(numbers)
    if len(relevant) < 2 or count < 2:
        raise InputError(
            f"{source}: found {rows} rows with {len(relevant)} different queries, and {count} "
            "different passages to find theirs among; expected 2 or more of both. Add rows, or "
            "passages of your collection as corpus."
        )
    if not different:
        raise InputError(
            f"{source}: each of the {rows} queries equals its passage, which any model finds. Pair "
            "queries with passages that answer them in other words."
        )
    if count <= DEPTH:
        logger.warning(
            "%s: there are only %d passages, so that recall@%d is 100 for any model. Add rows, or "
            "passages of your collection as corpus.",
            source,
            count,
            DEPTH,
        )
    return RetrievalData(
        list(relevant), [frozenset(found) for found in relevant.values()], count, read_passages
    )


def _different(own: dict[str, int], corpus: str | Path | None) -> Iterator[str]:
    """Iterate over texts, each once; of those of the corpus eight bytes are remembered."""
    yield from own
    seen: set[int] = set()
    for text in () if corpus is None else read_texts(corpus):
        key = hash(text)
        if text not in own and key not in seen:
            seen.add(key)
            yield text


def is_beir(folder: Path) -> bool:
    """Return whether a folder has the files of BEIR's layout."""
    return _find_file(folder, "corpus.jsonl") is not None


def load_beir(folder: str | Path, split: str, *, split_option: str = "--split") -> RetrievalData:
    """Load a folder of `corpus.jsonl`, `queries.jsonl` and `qrels/<split>.tsv`.

    A grade above 0 is relevant, and all count alike. A query without one is left out. A passage
    that is judged relevant and is not in the corpus counts as one that was not found, as it does
    in trec_eval.

    Args:
        folder: The folder; its files may be compressed.
        split: Name of the split; `validation` is also looked for as `dev`.
        split_option: How an error calls the option to change.

    Raises:
        InputError: A file is missing or cannot be read, or no judged query is left.
    """
    folder = Path(folder)
    judged = _read_judgements(_find_qrels(folder, split, split_option))
    queries = dict(_read_records(_require_file(folder, "queries.jsonl"), with_title=False))
    corpus = _require_file(folder, "corpus.jsonl")
    ids: list[str] = []
    for name, _ in _read_records(corpus, with_title=True):
        ids.append(name)
    # Of equal scores the smaller id is first, as in sentence-transformers.
    order = sorted(range(len(ids)), key=ids.__getitem__)
    numbers = array("q", bytes(8 * len(ids)))
    known: dict[str, int] = {}
    wanted = {name for passages in judged.values() for name in passages}
    for number, row in enumerate(order):
        if number and ids[row] == ids[order[number - 1]]:
            raise InputError(
                f"{corpus}: the _id {ids[row]!r} is there twice. Give each passage its own."
            )
        numbers[row] = number
        if ids[row] in wanted:
            known[ids[row]] = number
    missing = sorted(wanted - set(known))
    known |= {name: -1 - place for place, name in enumerate(missing)}
    found = {name: passages for name, passages in judged.items() if name in queries}
    _tell_missing(folder, len(judged) - len(found), missing)
    if not found:
        raise InputError(
            f"{folder}: none of the {len(judged)} judged queries is in queries.jsonl. Check that "
            "query-id in qrels and _id are the same ids."
        )

    def read_passages() -> Iterator[tuple[int, str]]:
        texts = (text for _, text in _read_records(corpus, with_title=True))
        return zip(numbers, texts, strict=True)

    return RetrievalData(
        [queries[name] for name in found],
        [frozenset(known[name] for name in passages) for passages in found.values()],
        len(ids),
        read_passages,
    )


def _tell_missing(folder: Path, queries: int, passages: Sequence[str]) -> None:
    if queries:
        logger.warning("%s: left out %d judged queries that are not in it.", folder, queries)
    if passages:
        logger.warning(
            "%s: %d passages that are judged relevant, such as %r, are not in the corpus, and "
            "count as not found.",
            folder,
            len(passages),
            passages[0],
        )


def _read_judgements(path: Path) -> dict[str, set[str]]:
    """Read the relevant passages of each query that has one, by ids."""
    advice = "The first line of qrels names the columns: query-id, corpus-id and score."
    schema.require_known(readers.column_names(path), _QRELS, source=str(path), advice=advice)
    judged: dict[str, set[str]] = {}
    for row in readers.read_rows(path):
        problem = row.problem or schema.find_score_problem(row.values)
        if problem is not None:
            raise InputError(f"{path} row {row.number}: {problem}. Fix the row, or leave it out.")
        query, passage, grade = (str(row.values[name]) for name in _QRELS)
        if float(grade) > 0:
            judged.setdefault(query, set()).add(passage)
    if not judged:
        raise InputError(f"{path}: no row has a score above 0. Add the relevant passages.")
    return judged


def _read_records(path: Path, *, with_title: bool) -> Iterator[tuple[str, str]]:
    """Read the id and text of each object; a title stands before the text, as BEIR has it."""
    for row in readers.read_rows(path):
        name, text = row.values.get("_id"), row.values.get("text")
        problem = row.problem
        if problem is None and not isinstance(name, str | int):
            problem = "there is no '_id'"
        if problem is None and not isinstance(text, str):
            problem = f"'text' is {schema.describe(text)}, expected text"
        if problem is not None:
            raise InputError(f"{path} row {row.number}: {problem}. Fix the row, or leave it out.")
        title = str(row.values.get("title") or "") if with_title else ""
        yield str(name), f"{title} {text}".strip()


def _find_qrels(folder: Path, split: str, option: str) -> Path:
    for name in (split, _SPLITS.get(split, split)):
        path = _find_file(folder / "qrels", f"{name}.tsv")
        if path is not None:
            return path
    there = sorted(path.name.split(".")[0] for path in (folder / "qrels").glob("*.tsv*"))
    advice = f"Pass {option} {there[0]}." if there else "Add the file."
    raise InputError(
        f"{folder / 'qrels' / split}.tsv is not there; found {', '.join(there) or 'no qrels'}. "
        f"{advice}"
    )


def _require_file(folder: Path, name: str) -> Path:
    path = _find_file(folder, name)
    if path is None:
        raise InputError(
            f"{folder / name} is not there. Expected corpus.jsonl, queries.jsonl and "
            "qrels/<split>.tsv. Check the folder."
        )
    return path


def _find_file(folder: Path, name: str) -> Path | None:
    places = (folder / name, folder / f"{name}.gz")
    return next((path for path in places if path.is_file()), None)
