"""Files to rows: one reader per format, each row with the number by which a user finds it."""

from __future__ import annotations

import bz2
import csv
import glob
import gzip
import io
import json
import logging
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from simcse_trainer.data.schema import describe, quote_names, suggest
from simcse_trainer.errors import InputError

logger = logging.getLogger(__name__)

SAMPLE_ROWS = 100

# Beyond this a quote is taken for one that is never closed; csv's own limit is 131,072 characters.
MOST_CHARACTERS = 2**27

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")

# A line of tab-separated cells, of which some are quoted as in csv, and one whose quote is open.
_CELL = rb'(?:"(?:[^"]|"")*"|[^"\t]*)'
_QUOTED = re.compile(rb"%b(?:\t%b)*" % (_CELL, _CELL))
_OPEN = re.compile(rb'(?:%b\t)*"(?:[^"]|"")*' % _CELL)
_DOUBLED = re.compile(rb'(?:^|\t)"(?:[^"]|"")*""(?:[^"]|"")*"(?:\t|$)')


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


# Line at which a record starts, its cells, none of a blank line, and what is wrong with it.
_Record = tuple[int, list[str], "str | None"]
# Column names, and rows, None standing for a blank line.
Table = tuple[Sequence[str], Iterator["Row | None"]]


def expand_files(patterns: Sequence[str]) -> list[Path]:
    """Resolve `~` and globs; the matches of a glob are sorted, no file comes twice.

    Raises:
        InputError: A missing file, a folder, a glob without match, a format that nobody reads.
    """
    patterns = [patterns] if isinstance(patterns, str) else patterns
    files = list(dict.fromkeys(path for pattern in patterns for path in find_files(str(pattern))))
    for path in files:
        if file_format(path) not in _READERS:
            raise InputError(
                f"{path}: unknown kind of file; expected {', '.join(_READERS)}, each also with "
                f"{', '.join(_COMPRESSIONS)}. Rename or convert the file, or narrow the pattern."
            )
    return files


def file_format(path: Path) -> str:
    """Return the suffix that decides on the reader: `.csv` for `train.CSV.gz`."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in _COMPRESSIONS), "")


def read_rows(path: Path) -> Iterator[Row]:
    """Read a file row by row; rows that cannot be read come as rows with a `problem`.

    Raises:
        InputError: What follows cannot be read either: a truncated archive, a quote that is
            never closed, a header or an encoding that does not fit.
    """
    blank = 0
    with open_table(path) as (_, rows):
        for row in rows:
            if row is None:
                blank += 1
            else:
                yield row
    if blank:
        logger.info("%s: skipped blank lines: %d.", path, blank)


def sample_rows(path: Path) -> list[Row]:
    """Return the first `SAMPLE_ROWS` rows, as `read_rows` gives them."""
    with open_table(path) as (_, rows):
        return list(islice(filter(None, rows), SAMPLE_ROWS))


def column_names(path: Path) -> list[str]:
    """Return names of the columns, from the header where the format has one.

    For jsonl they are those of the first `SAMPLE_ROWS` objects. A text file's column is `text`.

    Raises:
        InputError: The file cannot be read, or has no row to take names from.
    """
    with open_table(path) as (names, rows):
        if not names:
            row = next(filter(None, rows), None)
            found = (
                f"{path} has no rows" if row is None else f"{path} row {row.number} {row.problem}"
            )
            raise InputError(
                f"{found}. Expected {file_format(path)} with at least one row of texts."
            )
        return list(names)


def find_files(pattern: str) -> list[Path]:
    """Return the files of a name or pattern; `expand_files` also looks at their kind."""
    path = Path(os.path.expanduser(pattern))
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file_format(file) in _READERS)
        found = f"it holds {', '.join(inside[:5])}" if inside else "it holds no data files"
        raise InputError(
            f"{path} is a folder, expected a file; {found}. Name the files, or a quoted pattern: "
            f"'{path}/*{file_format(Path(inside[0])) if inside else '.csv'}'."
        )
    if path.exists():
        return [path]
    if not glob.has_magic(pattern):
        siblings = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(
            f"{path}: no such file{suggest(path.name, siblings, cutoff=0.8)}. Check the path."
        )
    files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files = [file for file in files if not file.is_dir()]
    if not files:
        raise InputError(f"{path}: no file matches the pattern. Check it, and the folder.")
    return files


@contextmanager
def open_table(path: Path) -> Iterator[Table]:
    """Open a table: names of the columns, and rows; a file of unknown kind has a text a line."""
    try:
        with _open(path) as file:
            yield _READERS.get(file_format(path), read_txt)(file, str(path))
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        compressed = path.suffix.lower() in _COMPRESSIONS
        cause = "the compressed file is truncated or corrupt" if compressed else "it cannot be read"
        raise InputError(f"{path}: {cause} ({error}). Write or download it again.") from None


def _open(path: Path) -> Any:
    return _COMPRESSIONS.get(path.suffix.lower(), partial(open, mode="rb"))(path)


def _open_zstd(path: Path) -> IO[bytes]:
    # pyarrow always comes with datasets, and unlike zstandard it notices a truncated file.
    import pyarrow

    return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))


def _split_lines(file: IO[bytes]) -> Iterator[bytes]:
    # bytes.splitlines knows \n, \r\n and \r; str.splitlines would also cut at U+2028.
    return (part for line in file for part in line.splitlines(keepends=True))


class _Lines(Iterator[str]):
    """UTF-8 lines with their ends, decoded one by one so that an error knows its line."""

    def __init__(self, file: IO[bytes], source: str) -> None:
        self._lines = _split_lines(file)
        self._source = source
        self._problem: str | None = None
        self.number = 0
        self.last = ""
        self.at_end = False

    def __next__(self) -> str:
        line = next(self._lines, None)
        if line is None:
            self.at_end = True
            raise StopIteration
        self.number += 1
        if self.number == 1:
            if line.startswith(_UTF16_MARKS):
                raise InputError(f"{self._source} is UTF-16, expected UTF-8. Save it as UTF-8.")
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            self.last = line.decode()
        except UnicodeDecodeError as error:
            where = f"byte 0x{line[error.start]:02x} at position {error.start + 1} of the line"
            self._problem = self._problem or f"{where} is not UTF-8"
            self.last = line.decode(errors="replace")
        return self.last

    def take_problem(self) -> str | None:
        """Return the problem with the lines since the last call, if any."""
        problem, self._problem = self._problem, None
        return problem


def read_txt(file: IO[bytes], source: str) -> Table:
    """Read a text a line, in the column `text`."""
    lines = _Lines(file, source)
    rows = (
        Row(lines.number, {"text": line.rstrip("\r\n")}, lines.take_problem())
        if line.strip()
        else None
        for line in lines
    )
    return ["text"], rows


def _read_csv(file: IO[bytes], source: str) -> Table:
    return _read_records(_split_records(_Lines(file, source), ",", source), source, ",")


def _read_tsv(file: IO[bytes], source: str) -> Table:
    """Read a record a line where nothing is quoted, as most such files are; else as in csv."""
    with _open(Path(source)) as again:
        quoted = _is_quoted(again, source)
    lines = _Lines(file, source)
    records = _split_records(lines, "\t", source) if quoted else _split_at_tabs(lines)
    return _read_records(records, source, "\t")


def _read_records(records: Iterator[_Record], source: str, delimiter: str) -> Table:
    number, header, problem = next((r for r in records if r[2] or any(r[1])), (1, [], None))
    if problem:
        raise InputError(f"{source} row {number} (the header): {problem}. Fix the header.")
    if not header:
        raise InputError(f"{source} is empty; expected a header line with the column names.")
    repeated = {name for name in header if name and header.count(name) > 1}
    if repeated:
        raise InputError(f"{source}: the header names {quote_names(repeated)} twice. Rename one.")
    if len(header) == 1 and set(header[0]) & set(",;\t".replace(delimiter, "")):
        raise InputError(
            f"{source}: the header is {header[0]!r}, one column. Expected columns separated by "
            f"{delimiter!r} and a header of column names: .csv for ',' and .tsv for tabs."
        )
    return header, (_csv_row(header, *record) for record in records)


def _is_quoted(file: IO[bytes], source: str) -> bool:
    """Return whether cells are quoted as in csv; otherwise quotes are part of the texts.

    Writers of csv quote a cell that holds a tab, a line end or a quote, and double the quotes
    within. A lone quote says that nothing is quoted, also where another one some lines further
    would make one cell of all that stands between them, tabs included.

    Raises:
        InputError: Some rows say the one and some the other, or nothing tells.
    """
    width: int | None = None
    record, start = bytearray(), 0
    quoted = plain = spans = swallows = complete = 0  # rows that say so
    header_is_quoted = False
    for number, line in enumerate(_split_lines(file), 1):
        if b'"' not in line and (record or width is not None or not line.strip()):
            record += line if record else b""
            continue
        start = start if record else number
        record += line
        body, is_header = record.rstrip(b"\r\n"), width is None
        tabs = body.count(b"\t")
        width = tabs if width is None else width
        if _OPEN.fullmatch(body):
            continue
        if not _QUOTED.fullmatch(body):
            plain = plain or start
        elif number > start and tabs > width > 0:
            swallows = swallows or start
            lines_fit = all(part.count(b"\t") == width for part in _split_lines(io.BytesIO(body)))
            complete = complete or (start if lines_fit else 0)
        else:
            spans = spans or (start if number > start else 0)
            header_is_quoted |= is_header and b'"' in body
            if header_is_quoted or _DOUBLED.search(body) or tabs > width:
                quoted = quoted or start
        record = bytearray()
    # Rows that are whole by themselves are no lines of a cell, unless the header settles it.
    weak = 0 if header_is_quoted else complete if quoted else swallows
    plain = plain or (start if record else 0) or weak
    if width:
        quoted = quoted or spans
    if (quoted and plain) or (spans and not quoted and not plain):
        other = f"row {plain} has a quote that belongs to its text" if plain else "no other does"
        raise InputError(
            f"{source}: row {quoted or spans} quotes a cell as csv files do, and {other}. Quote "
            'every such cell and double the quotes within (""), or quote none and take line ends '
            "and tabs out of the texts."
        )
    return bool(quoted)


def _csv_row(header: list[str], number: int, cells: list[str], problem: str | None) -> Row | None:
    if problem is None:
        if not cells:
            return None
        if len(cells) == len(header):
            return Row(number, dict(zip(header, cells, strict=True)))
        problem = f"has {len(cells)} cells, the header has {len(header)}"
    return Row(number, {}, problem)


def _split_records(lines: _Lines, delimiter: str, source: str) -> Iterator[_Record]:
    csv.field_size_limit(MOST_CHARACTERS)  # of the process: texts may be long
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        start = lines.number + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if lines.at_end or "field limit" in str(error):
                raise InputError(
                    f"{source} row {start}: a quote that opens in this row is not closed"
                    f"{'' if lines.at_end else f' within {MOST_CHARACTERS:,} characters'}. Close "
                    'it, or double it (") where it belongs to the text.'
                ) from None
            lines.take_problem()
            yield start, [], f"cannot be parsed ({error})"
            continue
        # A line of spaces is a blank line, one of tabs in a tsv or of '" "' has cells.
        blank = len(cells) == 1 and not lines.last.strip()
        yield start, [] if blank else cells, lines.take_problem()


def _split_at_tabs(lines: _Lines) -> Iterator[_Record]:
    for line in lines:
        body = line.rstrip("\r\n")
        blank = "\t" not in body and not body.strip()
        yield lines.number, [] if blank else body.split("\t"), lines.take_problem()


def _read_json(file: IO[bytes], source: str) -> Table:
    lines = _Lines(file, source)
    text = "".join(lines)
    problem = lines.take_problem()
    if problem or not text.strip():
        raise InputError(f"{source} {problem or 'is empty'}. Expected a JSON array of objects.")
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        records, problem = None, f"not valid JSON ({error})"
    if not isinstance(records, list):
        advice = " Rename it to .jsonl if it has one object a line." if text[0] == "{" else ""
        raise InputError(
            f"{source}: {problem or describe(records)}, expected an array of objects.{advice}"
        )
    rows = [_object_row(number, record) for number, record in enumerate(records, 1)]
    return _union_of_names(rows), iter(rows)


def _read_jsonl(file: IO[bytes], source: str) -> Table:
    lines = _Lines(file, source)
    rows = (_json_line(lines, line) if line.strip() else None for line in lines)
    head = list(islice(rows, SAMPLE_ROWS))
    return _union_of_names(head), chain(head, rows)


def _json_line(lines: _Lines, line: str) -> Row:
    problem = lines.take_problem()
    if problem is not None:
        return Row(lines.number, {}, problem)
    try:
        return _object_row(lines.number, json.loads(line))
    except (ValueError, RecursionError) as error:
        return Row(lines.number, {}, f"is not valid JSON ({error})")


def _object_row(number: int, record: object) -> Row:
    if isinstance(record, dict):
        return Row(number, record)
    return Row(number, {}, f"is {describe(record)}, expected a JSON object")


def _union_of_names(rows: Sequence[Row | None]) -> list[str]:
    return list(dict.fromkeys(name for row in rows if row for name in row.values))


def _read_parquet(file: IO[bytes], source: str) -> Table:
    import pyarrow
    from pyarrow import parquet

    # Parquet is read from its end, where a decompressor cannot go.
    plain = isinstance(getattr(file, "raw", None), io.FileIO)
    try:
        table = parquet.ParquetFile(file if plain else io.BytesIO(file.read()))
    except pyarrow.ArrowException as error:
        raise InputError(f"{source} is no parquet file ({error}). Write it again.") from None
    return table.schema_arrow.names, _parquet_rows(table, source)


def _parquet_rows(table: Any, source: str) -> Iterator[Row]:
    number = 0
    try:
        records = (record for batch in table.iter_batches(1000) for record in batch.to_pylist())
        for number, record in enumerate(records, 1):
            yield Row(number, record)
    except (ValueError, NotImplementedError) as error:  # pyarrow's own, and texts that are no UTF-8
        problem = f"{source}: rows after {number} cannot be read ({error})"
        raise InputError(f"{problem}. Write it again, as UTF-8.") from None


_READERS: dict[str, Callable[[IO[bytes], str], Table]] = {
    ".txt": read_txt,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
_COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
