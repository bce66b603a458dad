"""Text files as people save them: encodings, separators and headers, each read or named."""

import logging
import shlex

import pytest
from helpers.checks import fails, refusal

from simcse_trainer.data.delimited import sniff_delimiter
from simcse_trainer.data.kinds import find_text_columns, looks_like_a_row, suggest_columns
from simcse_trainer.data.lines import FileOptions, find_wide_encoding, guess_encoding
from simcse_trainer.data.loading import load_training_data
from simcse_trainer.data.pairs import load_texts
from simcse_trainer.errors import at_command_line

# Advice is followed as it is said at the command line.
pytestmark = pytest.mark.usefixtures("command_line")

KOREAN = ["배송은 언제 오나요", "주문을 취소합니다", "환불은 며칠 걸리나요", "가격을 알려 주세요"]
TEXTS = {
    "cp949": KOREAN,
    "euc_kr": KOREAN,
    "cp1252": ["Où est ma commande ?", "Die Größe paßt nicht", "It’s “broken”", "I am late"],
    "cp932": ["荷物はいつ届きますか", "注文をキャンセルしたい", "返金はいつですか"],
    "gb18030": ["我的包裹什么时候到", "我想取消订单", "退款需要几天"],
    "cp1251": ["Где мой заказ", "Отмените заказ", "Когда вернут деньги"],
    "utf-16": KOREAN,
    "utf-16-le": KOREAN,
    "utf-16-be": KOREAN,
    "utf-32": KOREAN,
}
SHOWN = {"euc_kr": "cp949"}


def load(name, *words, **options):
    """Load a file with the options of an advice, as at the command line."""
    given = {}
    for word in words:
        if word.startswith("--"):
            values = given.setdefault(word.removeprefix("--"), [])
        else:
            values.append(word)
    columns = given.pop("columns", None)
    one = {key: values[0] for key, values in given.items() if key != "column_names"}
    names = tuple(given.get("column_names", ()))
    files = FileOptions(column_names=names, in_training=True, **one)
    return load_training_data([str(name)], columns=columns, file_options=files, **options)


def advice(message):
    """The options that an error ends with."""
    return shlex.split(message[message.rindex(" --") :])


@pytest.mark.parametrize("encoding", TEXTS)
@pytest.mark.parametrize("suffix", [".txt", ".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_another_encoding_is_named_and_the_option_reads_it(encoding, suffix, end, tmp_path):
    texts = TEXTS[encoding]
    lines = {
        ".txt": texts,
        ".csv": ["sent0,sent1", *(f"{text},{text}" for text in texts)],
        ".tsv": ["sent0\tsent1", *(f'{text}\tthe "{text}' for text in texts)],
        ".jsonl": [f'{{"text": "{text}"}}' for text in texts],
    }[suffix]
    path = tmp_path / f"a{suffix}"
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    message = refusal(lambda: load(path))
    assert f"--encoding {SHOWN.get(encoding, encoding)}" in message
    assert load(path, *advice(message))["sent0"] == texts
    assert list(load(path, *advice(message), streaming=True))[-1]["sent0"] == texts[-1]


@pytest.mark.parametrize("encoding", ["cp949", "cp1252", "utf-16"])
def test_where_no_option_reads_it_the_command_does(encoding, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_bytes("\n".join(TEXTS[encoding]).encode(encoding))
    message = refusal(lambda: load_texts("a.txt"))
    exec(message.split('python -c "')[1].rsplit('"', 1)[0])
    assert load_texts("a-utf8.txt") == TEXTS[encoding]


def test_marks_and_a_file_that_is_utf8_after_all(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("sent0,sent1\r\n" + "\r\n".join(f"{x},{x}" for x in KOREAN), "utf-8-sig")
    assert load(path)["sent0"] == KOREAN
    fails(lambda: load(path, "--encoding", "cp949"), "a.csv is UTF-8", "Leave --encoding out")
    assert load(path, "--encoding", "utf-8")["sent0"] == KOREAN


def test_a_line_in_another_encoding_is_that_line_s_problem(tmp_path):
    path = tmp_path / "a.txt"
    lines = [text.encode() for text in KOREAN]
    path.write_bytes(b"\n".join([*lines, "환불".encode("cp949"), *lines]))
    fails(lambda: load(path), "row 5: byte 0xba at position 3 of the line is not UTF-8")
    assert len(load(path, drop_invalid_rows=True)) == 8


@pytest.mark.parametrize("data", [b"", b"a\0b", b"x\n\0\n", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0"])
def test_what_is_no_text_is_no_encoding(data):
    assert find_wide_encoding(data) is None
    assert guess_encoding(b"x\xff") is None


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("a.csv", "sent0;sent1\na, b;c\nd;e, f\n", ";"),
        ("a.csv", "sent0\tsent1\na, b\tc\nd\te, f\n", "\t"),
        ("a.csv", 'sent0\tsent1\nsay "a, b\tc\nd\te, f\n', "\t"),
        ("a.csv", "sent0|sent1\na, b|c\nd|e, f\n", "|"),
        ("a.tsv", "sent0,sent1\na;b,c\n", ","),
        ("a.csv", "sent0;sent1\na, b;c\nd;e, f\n" * 200, ";"),
    ],
)
def test_the_header_tells_what_separates(name, content, found, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / name).write_text(content)
    data = load(tmp_path / name)
    assert data.column_names == ["sent0", "sent1"]
    assert f"separated by {found!r}" in caplog.text
    assert "--delimiter" in caplog.text


def test_a_delimiter_that_is_given_is_taken(tmp_path):
    (tmp_path / "a.csv").write_text("sent0;x,sent1\na;b,c\n")
    assert load(tmp_path / "a.csv", "--columns", "sent0;x")["sent0"] == ["a;b"]
    (tmp_path / "a.txt").write_text("sent0#sent1\na#b\n")
    assert load(tmp_path / "a.txt", "--delimiter", "#")["sent1"] == ["b"]


@pytest.mark.parametrize("text", ["a, b; c", "what | ever", "x"])
def test_one_column_stays_one(text):
    assert sniff_delimiter(["text\n", f'"{text}"\n', f'"{text}"\n'], ",") == ","


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("where is my order,it comes soon\nhow do I pay,by card\n", ["sent0", "sent1"]),
        ("1,where is my order,it comes soon\n2,how do I pay,by card\n", ["column1", "sent0"]),
        ("배송은 언제 오나요?,내일 도착합니다.\n환불되나요?,네 됩니다.\n", ["sent0", "sent1"]),
        ("Where is my order?\nHow do I pay, by card?\n".replace(",", ""), ["sent0"]),
        ("a man eats a meal;b, c, d and e\na dog, a cat sleeps;it is night\n", ["sent0", "sent1"]),
        ("a man\tis the boss of us\nthe dog\tis at home\n", ["sent0", "sent1"]),
    ],
)
def test_a_file_without_a_header_is_asked_about_and_both_answers_work(content, named, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(content)
    message = refusal(lambda: load(path))
    assert "has this file no header?" in message
    names, columns = message.split("--column_names ")[1].split("; if these")
    given = shlex.split(names)
    assert given[: len(named)] == named
    data = load(path, "--column_names", *given)
    assert len(data) == len(content.splitlines())
    assert len(load(path, *advice(columns))) == len(data) - 1
    assert next(iter(load(path, "--column_names", *given, streaming=True))) == data[0]


def test_names_for_a_file_that_has_a_header(tmp_path):
    (tmp_path / "a.csv").write_text("sent0,sent1\na,b\n")
    fails(lambda: load(tmp_path / "a.csv", "--column_names", "sent0", "sent1"), "Leave --column")
    (tmp_path / "a.csv").write_text("a,b\nc,d\n")
    fails(
        lambda: load(tmp_path / "a.csv", "--column_names", "sent0"),
        "row 1: has 2 cells, --column_names gives 1",
    )


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("sent0 sent1", False),
        ("질문 답변", False),
        ("0 1 2", False),
        ("3 5", True),
        ("Text Q?", False),
    ],
)
def test_headers(header, expected):
    assert looks_like_a_row(header.split()) is expected
    assert looks_like_a_row(["", "the text"]) is False


CELLS = {
    "id": [f"doc_{i:04}" for i in range(20)],
    "number": [str(i) for i in range(20)],
    "uuid": [f"{i:08x}-dead-beef-0000-{i:012x}" for i in range(20)],
    "date": [f"2024-01-{i + 1:02} 10:00:00" for i in range(20)],
    "label": [["긍정", "부정"][i % 2] for i in range(20)],
    "url": [f"https://example.org/{'abc'[i % 3]}/x" for i in range(20)],
    "price": [f"{i},000 원".replace(" 원", "") for i in range(20)],
    "flag": ["true", "false"] * 10,
    "empty": [""] * 20,
    "question": [f"how do I pay bill {i}" for i in range(20)],
    "word": [2 * letter for letter in "abcdefghijklmnopqrst"],
    "answer": [f"by card {i}" for i in range(20)],
}  # fmt: skip


def test_only_texts_are_suggested_and_what_is_suggested_trains(tmp_path):
    rows = [dict(zip(CELLS, cells, strict=True)) for cells in zip(*CELLS.values(), strict=True)]
    assert find_text_columns(rows, list(CELLS)) == ["question", "word", "answer"]
    assert suggest_columns(rows, list(CELLS)) == ["question", "answer"]
    lines = ["\t".join(CELLS), *("\t".join(row.values()) for row in rows)]
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    message = refusal(lambda: load(tmp_path / "a.tsv"))
    assert advice(message) == ["--columns", "question", "answer"]
    assert load(tmp_path / "a.tsv", *advice(message)).column_names == ["sent0", "sent1"]


@pytest.mark.parametrize("name", ["id", "number", "uuid", "date"])
def test_a_file_without_texts_is_said_to_have_none(name, tmp_path):
    (tmp_path / "a.csv").write_text("\n".join([name, *CELLS[name]]))
    fails(lambda: load(tmp_path / "a.csv"), f"column '{name}' holds only", "Add a column of texts")
    other = [f"{a}\t{b}" for a, b in zip(CELLS["flag"], CELLS[name], strict=True)]
    (tmp_path / "b.tsv").write_text("\n".join([f"flag\t{name}", *other]))
    fails(lambda: load(tmp_path / "b.tsv"), "add a column of texts")


def test_an_index_column_and_spaces_of_a_header(tmp_path):
    (tmp_path / "a.csv").write_text(",sent0, sent1 \n0,a,b\n1,c,d\n")
    assert load(tmp_path / "a.csv").column_names == ["sent0", "sent1"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_the_line_that_tells_excel_the_separator_is_no_header(delimiter, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"sep={delimiter}\r\nsent0{delimiter}sent1\r\na b{delimiter}c d\r\n")
    assert list(load_training_data([str(path)])) == [{"sent0": "a b", "sent1": "c d"}]


def test_a_repeated_number_in_the_first_line_is_no_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("0,where is it now,it is on its way,0\n1,who is it then,it is me,1\n")
    with at_command_line:
        said = "--column_names column1 sent0 sent1 column4"
        fails(lambda: load_training_data([str(path)]), "no header", said)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_a_header_alone_has_no_rows(name, tmp_path):
    path = tmp_path / name
    path.write_text("question,answer\n")
    fails(lambda: load_training_data([str(path)]), "has no rows")


def test_an_array_in_a_file_of_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff [\n{"sent0": "a"},\n{"sent0": "b"}\n]', encoding="utf-8")
    assert load_training_data([str(path)])["sent0"] == ["a", "b"]


def test_dropping_most_rows_is_not_offered(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"sent0": "a"},\n' * 7 + '{"sent0": "a"}\n')
    message = str(fails(lambda: load_training_data([str(path)]), "7 of the 8 rows", "not valid"))
    assert "drop_invalid_rows" not in message
