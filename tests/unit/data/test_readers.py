import bz2
import gzip
import io
import json
import logging
import lzma
import os

import pyarrow
import pytest
from helpers.checks import fails
from pyarrow import parquet

from simcse_trainer.data.readers import column_names, expand_files, read_rows
from simcse_trainer.data.rows import Row

ROWS = [{"sent0": "a, b", "sent1": 'say "c"'}, {"sent0": "한국어", "sent1": "d\u2028e"}]


def to_parquet(rows):
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


CSV = 'sent0,sent1\n"a, b","say ""c"""\n한국어,d\u2028e\n'
FORMATS = {
    ".csv": (CSV.encode(), [2, 3]),
    ".tsv": ('sent0\tsent1\na, b\tsay "c"\n한국어\td\u2028e\n'.encode(), [2, 3]),
    ".json": (json.dumps(ROWS, indent=1).encode(), [1, 2]),
    ".jsonl": ("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode(), [1, 2]),
    ".parquet": (to_parquet(ROWS), [1, 2]),
}
COMPRESSIONS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", FORMATS)
def test_formats(write, suffix, compression):
    content, numbers = FORMATS[suffix]
    path = write(f"train.v2{suffix.upper()}{compression}", COMPRESSIONS[compression](content))
    assert expand_files([str(path)]) == [path]
    assert column_names(path) == ["sent0", "sent1"]
    assert list(read_rows(path)) == [
        Row(number, values) for number, values in zip(numbers, ROWS, strict=True)
    ]


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_txt(write, compression, caplog):
    caplog.set_level(logging.INFO)
    content = "\ufeff one \r\n\r\ntwo\u2028too\n \t\ntwo\u2028too\nlast".encode()
    path = write(f"a.txt{compression}", COMPRESSIONS[compression](content))
    assert column_names(path) == ["text"]
    expected = [(1, " one "), (3, "two\u2028too"), (5, "two\u2028too"), (6, "last")]
    assert [(row.number, row.values["text"]) for row in read_rows(path)] == expected
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: skipped blank lines: 2."
    ]


def test_very_long_line(write):
    (row,) = read_rows(write("a.txt", "x" * 1_000_000))
    assert len(row.values["text"]) == 1_000_000


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_line_ends_marks_and_blank_lines(write, end):
    lines = ["\ufeffsent0,sent1", "a,b", "", '"c', 'c",d', "   ", "e,f", ""]
    rows = list(read_rows(write("a.csv", end.join(lines))))
    assert [(row.number, *row.values.values()) for row in rows] == [
        (2, "a", "b"),
        (4, f"c{end}c", "d"),
        (7, "e", "f"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "number", "problem"),
    [
        ("a.csv", "x,y\na,b\nc,d,e\n", 3, "has 3 cells, the header has 2"),
        ("a.csv", "x,y\na,b\nc\n", 3, "has 1 cells, the header has 2"),
        ("a.csv", 'x,y\na,b\n"c"d,e\nf,g\n', 3, "cannot be parsed"),
        ("a.csv", b"x,y\na,b\nc,\xff\n", 3, "byte 0xff at position 3 of the line is not UTF-8"),
        ("a.txt", "a\né\ncafé\n".encode() + b"caf\xe9\nd", 4, "byte 0xe9 at position 4"),
        ("a.jsonl", '{"x": "a"}\n\n{"x": \n', 3, "is not valid JSON"),
        ("a.jsonl", '{"x": "a"}\n\n"b"\n', 3, "of type str ('b'), expected a JSON object"),
        ("a.jsonl", '{"x": "a"}\n\n[1]\n', 3, "is a list ([1]), expected a JSON object"),
        ("a.jsonl", f'{{"x": "a"}}\n\n{"[" * 200_000}\n', 3, "is not valid JSON"),
        ("a.jsonl", b'{"x": "a"}\n\n{"x": "\xff"}\n', 3, "byte 0xff"),
        ("a.json", '[{"x": "a"}, {"x": "b"}, 7]', 3, "is a number (7), expected a JSON object"),
    ],
)
def test_a_bad_row_is_handed_over_and_the_next_ones_read(write, name, content, number, problem):
    rows = list(read_rows(write(name, content)))
    (bad,) = [row for row in rows if row.problem]
    assert bad.number == number
    assert problem in bad.problem
    assert len(rows) > 1


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", ["is empty", "header"]),
        ("a.csv", "\n\n,\n", ["is empty", "header"]),
        ("a.csv", "a,b,a\n1,2,3\n", ["'a'", "twice"]),
        ("a.csv", "sent0;sent1\na\nb\n", ["'sent0;sent1'", "separated by ','"]),
        ("a.tsv", "sent0,sent1\na\nb\n", ["'sent0,sent1'", r"separated by '\t'"]),
        ("a.csv", b"caf\xff\na\n", ["row 1", "header", "0xff", "UTF-8"]),
        ("a.csv", b"caf\xe9\na\n", ["row 1", "0xe9", "UTF-8", "cp1252"]),
        ("a.csv", 'x,y\na,b\n"c,d\ne,f\n', ["row 3", "quote", "not closed"]),
        ("a.csv", 'x,y\na,b\n"c,d\n' + "e,f\n" * 50_000, ["row 3", "quote", "not closed"]),
        ("a.csv", "sent0\nä\n".encode("utf-16"), ["utf-16", "UTF-8"]),
        ("a.txt", "ä".encode("utf-16"), ["utf-16", "UTF-8"]),
        ("a.json", "", ["is empty", "JSON array"]),
        ("a.json", '{"a": "b"}', ["an object ({'a': 'b'})", "array of objects"]),
        ("a.json", '[{"a": ', ["not valid JSON", "line 1"]),
        ("a.json", b'[\n{"a": "\xff"}]', ["0xff", "UTF-8"]),
        ("a.json", "3", ["a number (3)", "array of objects"]),
        ("a.json", "[]", ["no rows"]),
        ("a.jsonl", "", ["no rows"]),
        ("a.jsonl", "[1]\n", ["row 1", "a list ([1])"]),
        ("a.parquet", b"", ["no parquet file"]),
        ("a.parquet", b"PAR1 and no more PAR1", ["no parquet file"]),
    ],
)
def test_unreadable_files(write, name, content, words):
    path = write(name, content)

    def read():
        column_names(path)
        list(read_rows(path))

    fails(read, path, *words)


@pytest.mark.parametrize("compression", list(COMPRESSIONS)[1:])
def test_truncated_and_corrupt_archives(write, compression):
    text = "".join(f"sentence {number}\n" for number in range(20_000)).encode()
    compressed = COMPRESSIONS[compression](text)
    path = write(f"a.txt{compression}", compressed[:-100])
    fails(lambda: list(read_rows(path)), path, "truncated or corrupt")
    path = write(f"b.txt{compression}", text)
    fails(lambda: list(read_rows(path)), path, "truncated or corrupt")


def test_only_the_head_is_read_for_the_columns(write):
    bad_tail = gzip.compress(b"x,y\n" + os.urandom(1_000_000))[:-100]
    assert column_names(write("a.csv.gz", bad_tail)) == ["x", "y"]
    path = write("a.jsonl", '{"x": "a"}\n{"x": "b", "y": "c"}\nbroken')
    assert column_names(path) == ["x", "y"]


def test_globs_are_sorted_and_files_come_once(write, tmp_path, monkeypatch):
    paths = [write(name, "x") for name in ("b.txt", "a.txt", "c[1].txt")]
    (tmp_path / "folder.txt").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    b, a, c = paths
    assert expand_files([f"{tmp_path}/[ab].txt"]) == [a, b]
    assert expand_files([str(b), f"{tmp_path}/*.txt"]) == [b, a, c]
    assert expand_files(["~/a.txt", str(c)]) == [a, c]
    assert expand_files(str(a)) == [a]


def test_missing_files_and_folders(write, tmp_path):
    write("pairs.csv", "x")
    write("notes.md", "x")
    write("old.gz", "x")
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (tmp_path / "pair.csv", ["no such file", "nearest: 'pairs.csv'"]),
        (tmp_path / "no" / "a.csv", ["no such file"]),
        (tmp_path, ["is a folder", "it holds pairs.csv.", "/*.csv"]),
        (empty, ["is a folder", "no data files"]),
        (tmp_path / "*.tsv", ["no file matches"]),
        (tmp_path / "notes.md", ["unknown kind", ".csv", ".parquet", ".gz"]),
        (tmp_path / "old.gz", ["unknown kind"]),
        (tmp_path / "*", ["unknown kind", "notes.md"]),
    ]
    for pattern, words in cases:
        fails(lambda pattern=pattern: expand_files([str(pattern)]), *words)


def test_parquet_texts_that_are_no_utf8(tmp_path):
    broken = pyarrow.array([b"a dog", b"c\xff"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    fails(lambda: list(read_rows(tmp_path / "a.parquet")), "a.parquet: rows after 0 cannot")
