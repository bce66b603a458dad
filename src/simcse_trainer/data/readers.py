"""Files to rows: one reader per format, each row with the number by which a user finds it."""

from __future__ import annotations

import glob
import io
import json
import logging
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

from simcse_trainer.data.delimited import read_csv, read_table, read_tsv
from simcse_trainer.data.foreign import describe_kind
from simcse_trainer.data.kinds import find_label, is_message
from simcse_trainer.data.lines import COMPRESSIONS, FileOptions, Lines, file_format, open_bytes
from simcse_trainer.data.rows import Row, Table
from simcse_trainer.data.schema import describe, suggest
from simcse_trainer.errors import InputError

logger = logging.getLogger(__name__)

SAMPLE_ROWS = 100
# Rows in which another label is looked for, and labels from which on they are enough to judge by.
_LABELLED_ROWS, _LABELS = 100_000, 8

# Bytes by which an array of objects is told from lines.
_HEAD = 64
_ARRAY = re.compile(rb"(?:\xef\xbb\xbf)?\s*\[\s*\{")

_UTF8 = FileOptions()


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
                describe_kind(path)
                or f"{path}: unknown kind of file; expected {', '.join(_READERS)}, each also with "
                f"{', '.join(COMPRESSIONS)}. Rename or convert the file, or narrow the pattern."
            )
    return files


def read_rows(path: Path, options: FileOptions = _UTF8) -> Iterator[Row]:
    """Read a file row by row; rows that cannot be read come as rows with a `problem`.

    Raises:
        InputError: What follows cannot be read either: a truncated archive, a quote that is
            never closed, a header or an encoding that does not fit.
    """
    blank = 0
    with open_table(path, options) as (_, rows):
        for row in rows:
            if row is None:
                blank += 1
            else:
                yield row
    if blank:
        logger.info("%s: skipped blank lines: %d.", path, blank)


def sample_rows(path: Path, options: FileOptions = _UTF8) -> list[Row]:
    """Return the first `SAMPLE_ROWS` rows, as `read_rows` gives them."""
    with open_table(path, options) as (_, rows):
        return list(islice(filter(None, rows), SAMPLE_ROWS))


def sample_labelled(path: Path, names: Sequence[str], options: FileOptions = _UTF8) -> list[Any]:
    """Return values of the first good rows, and a row for each label that they have not.

    A file may be sorted by its label, and then its first rows do not say that there are others.

    Args:
        path: The file that the errors name and that is read.
        names: The names of all columns of the data.
        options: How the file is read, as in `read_rows`.
    """
    found = [row.values for row in sample_rows(path, options) if not row.problem]
    label = find_label(names)
    if label is None or len(labels := {str(values.get(label)) for values in found}) > 1:
        return found
    with open_table(path, options) as (_, rows):
        for row in islice(filter(None, rows), SAMPLE_ROWS, _LABELLED_ROWS):
            value = str(row.values.get(label))
            if not row.problem and value not in labels:
                labels.add(value)
                found.append(row.values)
                if len(labels) == _LABELS:
                    break
    return found


def sample_dataset(dataset: Any) -> list[dict[str, Any]]:
    """Return the first rows; where all are at hand rows from all over, as they may be sorted."""
    if not hasattr(dataset, "__len__"):
        return list(dataset.take(SAMPLE_ROWS))
    return list(dataset.select(range(0, len(dataset), 1 + len(dataset) // SAMPLE_ROWS)))


def column_names(path: Path, options: FileOptions = _UTF8) -> list[str]:
    """Return names of the columns, from the header where the format has one.

    For jsonl they are those of the first `SAMPLE_ROWS` objects. A text file's column is `text`.

    Raises:
        InputError: The file cannot be read, or has no row to take names from.
    """
    with open_table(path, options) as (names, rows):
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
def open_table(path: Path, options: FileOptions = _UTF8) -> Iterator[Table]:
    """Open a table: names of the columns, and rows; a file of unknown kind has a text a line."""
    reader = _READERS.get(file_format(path), read_txt)
    try:
        with open_bytes(path) as file:
            yield reader(file, str(path), options)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        compressed = path.suffix.lower() in COMPRESSIONS
        cause = "the compressed file is truncated or corrupt" if compressed else "it cannot be read"
        raise InputError(f"{path}: {cause} ({error}). Write or download it again.") from None


def read_txt(file: IO[bytes], source: str, options: FileOptions = _UTF8) -> Table:
    """Read a text a line, in the column `text`; with a delimiter a table."""
    if options.delimiter:
        return read_table(file, source, options, options.delimiter)
    lines = Lines(file, source, options)
    rows = (
        Row(lines.number, {"text": line.rstrip("\r\n")}, lines.take_problem())
        if line.strip()
        else None
        for line in lines
    )
    return ["text"], rows


def _read_json(file: IO[bytes], source: str, options: FileOptions) -> Table:
    lines = Lines(file, source, options)
    text = "".join(lines)
    problem = lines.take_problem()
    if problem or not text.strip():
        raise InputError(f"{source} {problem or 'is empty'}. Expected a JSON array of objects.")
    try:
        records = _find_records(json.loads(text))
    except (ValueError, RecursionError) as error:
        if text[0] == "{" and "Extra data" in str(error):
            return _read_jsonl(io.BytesIO(text.encode()), source, _UTF8)
        records, problem = None, f"not valid JSON ({error})"
    if not isinstance(records, list):
        raise InputError(
            f"{source}: {problem or describe(records)}, expected an array of objects, an object "
            "with one array, or one object a line. Write it as one of them."
        )
    rows = [_object_row(number, record) for number, record in enumerate(records, 1)]
    return _union_of_names(rows), iter(rows)


def _find_records(content: Any) -> Any:
    """Return the array of records that a JSON file has: itself, in an object, or by columns."""
    if isinstance(content, list) and content and all(isinstance(item, str) for item in content):
        return [{"text": item} for item in content]
    if not isinstance(content, dict):
        return content
    records = [
        value
        for value in content.values()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]
    if len(records) == 1:
        return records[0]
    columns = list(content.values())
    # As pandas writes them: lists of cells, or objects of cells by their row.
    if (
        columns
        and all(isinstance(column, dict) for column in columns)
        and all(column.keys() == columns[0].keys() for column in columns)
    ):
        columns = [list(column.values()) for column in columns]
    lengths = {len(column) if isinstance(column, list) else -1 for column in columns}
    if len(lengths) == 1 and min(lengths) > 0:
        return [dict(zip(content, row, strict=True)) for row in zip(*columns, strict=True)]
    return content


def _read_jsonl(file: IO[bytes], source: str, options: FileOptions) -> Table:
    peek: Any = getattr(file, "peek", None)
    if peek is not None and _ARRAY.match(peek(_HEAD)[:_HEAD]):
        return _read_json(file, source, options)
    lines = Lines(file, source, options)
    rows = (_json_line(lines, line) if line.strip() else None for line in lines)
    head = list(islice(rows, SAMPLE_ROWS))
    return _union_of_names(head), chain(head, rows)


def _json_line(lines: Lines, line: str) -> Row:
    problem = lines.take_problem()
    if problem is not None:
        return Row(lines.number, {}, problem)
    try:
        return _object_row(lines.number, json.loads(line))
    except (ValueError, RecursionError) as error:
        return Row(lines.number, {}, f"is not valid JSON ({error})")


def _object_row(number: int, record: object) -> Row:
    if isinstance(record, dict):
        return Row(number, _flatten(record))
    return Row(number, {}, f"is {describe(record)}, expected a JSON object")


def _flatten(record: dict[str, Any]) -> dict[str, Any]:
    """Add the parts of objects in a record under dotted names: `item.text`."""
    parts: dict[str, Any] = {}
    for name, value in record.items():
        if isinstance(value, dict) and not is_message(value):
            parts |= {f"{name}.{part}": inner for part, inner in _flatten(value).items()}
        else:
            parts[name] = value
    return parts


def _union_of_names(rows: Sequence[Row | None]) -> list[str]:
    return list(dict.fromkeys(name for row in rows if row for name in row.values))


def _read_parquet(file: IO[bytes], source: str, _: FileOptions) -> Table:
    import pyarrow
    from pyarrow import parquet

    # Parquet is read from its end, where a decompressor cannot go.
    plain = isinstance(getattr(file, "raw", None), io.FileIO)
    try:
        table = parquet.ParquetFile(file if plain else io.BytesIO(file.read()))
    except pyarrow.ArrowException as error:
        raise InputError(f"{source} is no parquet file ({error}). Write it again.") from None
    names = _label_names(table.schema_arrow)
    return _names_of(table.schema_arrow), _arrow_rows(table.iter_batches(1000), source, names)


def _read_arrow(file: IO[bytes], source: str, _: FileOptions) -> Table:
    """Read what `datasets` and pyarrow write: a stream of batches, or a file of them."""
    import pyarrow

    content = pyarrow.py_buffer(file.read())
    try:
        try:
            table = pyarrow.ipc.open_stream(content).read_all()
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(content).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{source} is no Arrow file ({error}). Write it again.") from None
    names = _label_names(table.schema)
    return _names_of(table.schema), _arrow_rows(table.to_batches(1000), source, names)


def _names_of(schema: Any) -> list[str]:
    """Return names of the columns, those of objects with the names of their parts."""
    row = {field.name: _part(field.type) for field in schema}
    return list(_flatten(row))


def _part(kind: Any) -> Any:
    return {field.name: _part(field.type) for field in kind} if str(kind)[:6] == "struct" else None


def _label_names(schema: Any) -> dict[str, list[str]]:
    """Return the names of labels that `datasets` has written beside their numbers, by column."""
    try:
        known = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = known.get("info", {}).get("features", {})
    except (ValueError, AttributeError):  # of others, under the same name
        return {}
    return {
        column: feature["names"]
        for column, feature in features.items()
        if isinstance(feature, dict) and feature.get("names")
    }


def _arrow_rows(batches: Any, source: str, labels: Mapping[str, list[str]]) -> Iterator[Row]:
    number = 0
    try:
        records = (record for batch in batches for record in batch.to_pylist())
        for number, record in enumerate(records, 1):
            for column, names in labels.items():
                # Not every data set has entailment first; -1 is no label.
                if isinstance(label := record.get(column), int) and 0 <= label < len(names):
                    record[column] = names[label]
            yield Row(number, _flatten(record))
    except (ValueError, NotImplementedError) as error:  # pyarrow's own, and texts that are no UTF-8
        problem = f"{source}: rows after {number} cannot be read ({error})"
        raise InputError(f"{problem}. Write it again, as UTF-8.") from None


_READERS: dict[str, Callable[[IO[bytes], str, FileOptions], Table]] = {
    ".txt": read_txt,
    ".csv": read_csv,
    ".tsv": read_tsv,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".ndjson": _read_jsonl,
}
