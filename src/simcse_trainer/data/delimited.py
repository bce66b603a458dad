"""Tables of separated cells to rows: csv, tsv, and what is called so and has other separators."""

from __future__ import annotations

import csv
import io
import logging
import re
import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO

from simcse_trainer.data.kinds import looks_like_a_row, name_columns
from simcse_trainer.data.lines import FileOptions, Lines, file_format, open_bytes, split_lines
from simcse_trainer.data.rows import Row, Table
from simcse_trainer.data.schema import quote_names
from simcse_trainer.errors import InputError, for_caller

logger = logging.getLogger(__name__)

# Beyond this a quote is taken for one that is never closed; csv's own limit is 131,072 characters.
MOST_CHARACTERS = 2**27

_DELIMITERS = (",", ";", "\t", "|")
# Lines by which a separator is chosen.
_SAMPLE_LINES = 50

# A line of tab-separated cells, of which some are quoted as in csv, and one whose quote is open.
_CELL = rb'(?:"(?:[^"]|"")*"|[^"\t]*)'
_QUOTED = re.compile(rb"%b(?:\t%b)*" % (_CELL, _CELL))
_OPEN = re.compile(rb'(?:%b\t)*"(?:[^"]|"")*' % _CELL)
_DOUBLED = re.compile(rb'(?:^|\t)"(?:[^"]|"")*""(?:[^"]|"")*"(?:\t|$)')

_SEPARATOR = re.compile(r"(?i)sep=([,;\t|])[\r\n]*")

# Line at which a record starts, its cells, none of a blank line, and what is wrong with it.
_Record = tuple[int, list[str], "str | None"]


def is_table(path: Path, options: FileOptions) -> bool:
    """Return whether the file has cells between separators, whose values have no types."""
    return file_format(path) in (".csv", ".tsv") or (
        file_format(path) == ".txt" and options.delimiter is not None
    )


def read_csv(file: IO[bytes], source: str, options: FileOptions) -> Table:
    """Read a table of commas, or of what its header is separated by."""
    return read_table(file, source, options, ",")


def read_tsv(file: IO[bytes], source: str, options: FileOptions) -> Table:
    """Read a table of tabs, or of what its header is separated by."""
    return read_table(file, source, options, "\t")


def read_table(file: IO[bytes], source: str, options: FileOptions, usual: str) -> Table:
    """Read a table; with tabs a record a line where nothing is quoted, else as in csv.

    Args:
        file: The bytes of the table, open for reading.
        source: The path of the table, for the errors.
        options: Its encoding, and its delimiter if that is known.
        usual: The delimiter of its kind of file, unless the file tells another.

    Raises:
        InputError: There is no header, or it cannot be used.
    """
    lines = Lines(file, source, options)
    delimiter = options.delimiter or _choose_delimiter(source, options, usual)
    if delimiter == "\t":
        with open_bytes(Path(source)) as again:
            quoted = _is_quoted(again, source, options)
        records = _split_records(lines, "\t", source) if quoted else _split_at_tabs(lines)
    else:
        records = _split_records(lines, delimiter, source)
    return _read_records(_skip_separator(records, delimiter), source, options, delimiter)


def _choose_delimiter(source: str, options: FileOptions, usual: str) -> str:
    with open_bytes(Path(source)) as again:
        sample = list(islice(Lines(again, source, options), _SAMPLE_LINES))
    told = _SEPARATOR.fullmatch(sample[0]) if sample else None
    found = told[1] if told else sniff_delimiter(sample, usual)
    if found != usual:
        logger.info(
            "%s: its cells are separated by %r, not %r. If not: %s",
            source,
            found,
            usual,
            for_caller("--delimiter"),
        )
    return found


def _skip_separator(records: Iterator[_Record], delimiter: str) -> Iterator[_Record]:
    """Leave out a first line such as `sep=;`, which is for Excel."""
    first = next(records, None)
    if first is not None and not _SEPARATOR.fullmatch(delimiter.join(first[1])):
        yield first
    yield from records


def sniff_delimiter(sample: list[str], usual: str) -> str:
    """Find what separates the cells of a table: what is usual, unless only another fits.

    Args:
        sample: The first lines, with their ends.
        usual: The delimiter of that kind of file.
    """
    fits = {delimiter: _fit(sample, delimiter) for delimiter in _DELIMITERS}
    if fits[usual] > 0.5:
        return usual
    best = max(_DELIMITERS, key=lambda delimiter: fits[delimiter])
    return best if fits[best] > 0.5 else usual


def _fit(sample: list[str], delimiter: str) -> float:
    """Return the share of rows that have as many cells as the header; 0 if that has one."""
    try:
        rows = [cells for cells in csv.reader(sample, delimiter=delimiter) if any(cells)]
    except csv.Error:
        return 0.0
    if not rows or len(rows[0]) < 2:
        return 0.0
    # The header counts, for a table that has nothing else.
    return sum(len(cells) == len(rows[0]) for cells in rows) / len(rows)


def _read_records(
    records: Iterator[_Record], source: str, options: FileOptions, delimiter: str
) -> Table:
    if options.column_names:
        names = list(options.column_names)
        return names, _named_rows(names, records, source)
    number, header, problem = next((r for r in records if r[2] or any(r[1])), (1, [], None))
    if problem:
        raise InputError(f"{source} row {number} (the header): {problem}. Fix the header.")
    if not header:
        raise InputError(f"{source} is empty; expected a header line with the column names.")
    header = [name.strip() for name in header]
    repeated = {name for name in header if name and header.count(name) > 1}
    if repeated and looks_like_a_row(header):
        places = [str(place) for place in range(len(header))]
        given = name_columns([dict(zip(places, header, strict=True))], places)
        raise InputError(
            f"{source}: has this file no header? Its first line is {quote_names(header)}. If so, "
            f"name its columns: --column_names {shlex.join(given)}"
        )
    if repeated:
        raise InputError(f"{source}: the header names {quote_names(repeated)} twice. Rename one.")
    if len(header) == 1 and set(header[0]) & set(",;\t".replace(delimiter, "")):
        raise InputError(
            f"{source}: the header is {header[0]!r}, one column. Expected columns separated by "
            f"{delimiter!r} and a header of column names: .csv for ',' and .tsv for tabs."
        )
    return header, (_table_row(header, "the header has", *record) for record in records)


def _named_rows(names: list[str], records: Iterator[_Record], source: str) -> Iterator[Row | None]:
    first = True
    for record in records:
        if first and [cell.strip() for cell in record[1]] == names:
            raise InputError(
                f"{source}: its first line is the header that --column_names gives. Leave "
                "--column_names out."
            )
        first = first and not record[1]
        yield _table_row(names, "--column_names gives", *record)


def _table_row(
    names: list[str], expected: str, number: int, cells: list[str], problem: str | None
) -> Row | None:
    if problem is None:
        if not cells:
            return None
        if len(cells) == len(names):
            return Row(number, dict(zip(names, cells, strict=True)))
        problem = f"has {len(cells)} cells, {expected} {len(names)}"
        if len(cells) > len(names):
            problem += " (a text that holds the delimiter needs quotes around it)"
    return Row(number, {}, problem)


def _is_quoted(file: IO[bytes], source: str, options: FileOptions) -> bool:
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
    for number, line in enumerate(split_lines(file, options.encoding or "utf-8"), 1):
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
            lines_fit = all(part.count(b"\t") == width for part in split_lines(io.BytesIO(body)))
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


def _split_records(lines: Lines, delimiter: str, source: str) -> Iterator[_Record]:
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


def _split_at_tabs(lines: Lines) -> Iterator[_Record]:
    for line in lines:
        body = line.rstrip("\r\n")
        blank = "\t" not in body and not body.strip()
        yield lines.number, [] if blank else body.split("\t"), lines.take_problem()
