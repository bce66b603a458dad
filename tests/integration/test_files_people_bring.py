"""Files people bring: each trains, or ends with one message whose advice trains when followed.

The advice is followed literally: options are added to the command, Python is run, a file that it
names is taken, a rename is carried out.
"""

import contextlib
import io
import json
import re
import shlex
import shutil
import tarfile
import zipfile
from pathlib import Path

import pandas
import pytest
from datasets import Dataset, DatasetDict
from helpers.checks import mostly_slow, refusal, run_command
from helpers.tiny import save_tiny
from helpers.training import build_args, build_model

from simcse_trainer import SimCSETrainer
from simcse_trainer.cli.config import parse_arguments
from simcse_trainer.training.run import _load_train_dataset

# Advice is followed as it is said at the command line.
pytestmark = pytest.mark.usefixtures("command_line")

ENGLISH = [(f"where is my order {w}", f"it comes on {w}, I think; or later") for w in
           ("monday", "tuesday", "sunday", "friday", "time", "foot", "plan", "paper")]  # fmt: skip
KOREAN = [(f"{w} 언제 오나요", f"{w}, 곧 도착합니다; 기다려 주세요") for w in
          ("책이", "옷이", "신발이", "가방이", "컵이", "의자가", "펜이", "공이")]  # fmt: skip
BOTH = pytest.mark.parametrize("pairs", [ENGLISH, KOREAN], ids=["en", "ko"])


def table(pairs, delimiter=",", header=("sent0", "sent1"), quote=True):
    rows = [header, *pairs] if header else pairs
    cells = [[f'"{cell}"' if quote and delimiter in cell else cell for cell in row] for row in rows]
    return "\n".join(delimiter.join(row) for row in cells) + "\n"


def lists(pairs):
    return [{"query": a, "pos": [b, b + "!"], "neg": [a + "?"] * (i % 3)}
            for i, (a, b) in enumerate(pairs)]  # fmt: skip


def turn(text, role="user"):
    return {"role": role, "content": text}


def swift(pairs):
    return [{"messages": [turn(a)], "positive_messages": [[turn(b)]],
             "negative_messages": [[turn(a + "?")], [turn(b + "?")]]}
            for a, b in pairs]  # fmt: skip


def chat(pairs):
    return [{"messages": [turn("be kind", "system"), turn(a), turn(b, "assistant"), turn("ok")]}
            for a, b in pairs]  # fmt: skip


def shared(pairs):
    return [{"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]}
            for a, b in pairs]  # fmt: skip


def objects(pairs):
    return [{"sent0": a, "sent1": b} for a, b in pairs]


def jsonl(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"


def encoded(text, encoding="utf-8"):
    return text.encode(encoding, errors="ignore")


def zipped(pairs):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("pairs.csv", table(pairs))
    return buffer.getvalue()


def save_to_disk(folder, pairs):
    Dataset.from_list(objects(pairs)).save_to_disk(str(folder))


def save_splits(folder, pairs):
    data = Dataset.from_list(lists(pairs))
    DatasetDict({"fit": data, "test": data}).save_to_disk(str(folder))


def arrow(folder, pairs):
    save_to_disk(folder / "x", pairs)
    (data,) = (folder / "x").glob("*.arrow")
    return data.read_bytes()


# Name -> what is in it, of some pairs of texts.
FILES = {
    "utf8.csv": lambda p: encoded(table(p)),
    "excel_utf8.csv": lambda p: encoded(table(p).replace("\n", "\r\n"), "utf-8-sig"),
    "cp949.csv": lambda p: encoded(table(p), "cp949"),
    "euckr.tsv": lambda p: encoded(table(p, "\t"), "euc-kr"),
    "latin.csv": lambda p: encoded(table([(a + " é", b + " à la carte") for a, b in p]), "cp1252"),
    "cp949.txt": lambda p: encoded("\r\n".join(a for a, _ in p), "cp949"),
    "utf16.txt": lambda p: encoded("\r\n".join(a for a, _ in p), "utf-16"),
    "utf16.csv": lambda p: encoded(table(p, "\t"), "utf-16"),
    "nomark.csv": lambda p: encoded(table(p), "utf-16-le"),
    "semicolon.csv": lambda p: encoded(table(p, ";")),
    "tabs.csv": lambda p: encoded(table(p, "\t")),
    "bars.csv": lambda p: encoded(table(p, "|")),
    "cp949_semicolon.csv": lambda p: encoded(table(p, ";", ("질문", "답변")), "cp949"),
    "noheader.csv": lambda p: encoded(table(p, header=None)),
    "noheader.tsv": lambda p: encoded(
        table([(str(i), *row) for i, row in enumerate(p)], "\t", None)),
    "ids.csv": lambda p: encoded(
        table([(f"q{i:04}", str(i), *row) for i, row in enumerate(p)],
              header=("id", "number", "질문", "답변"))),
    "index.csv": lambda p: encoded(
        table([(str(i), *row) for i, row in enumerate(p)], header=("", "title", "body"))),
    "quoted.tsv": lambda p: encoded(table([(f'"{a}"', f'"{b}"') for a, b in p], "\t")),
    "written.csv": lambda p: encoded(
        table([(a, f'"[\'{b}\', \'{a}?\']"') for a, b in p], header=("query", "pos"), quote=False)),
    "flag.jsonl": lambda p: encoded(jsonl(lists(p))),
    "swift.jsonl": lambda p: encoded(jsonl(swift(p))),
    "chat.jsonl": lambda p: encoded(jsonl(chat(p))),
    "shared.json": lambda p: encoded(json.dumps(shared(p))),
    "sets.jsonl": lambda p: encoded(jsonl([{"set": [a, b, a + "?"]} for a, b in p])),
    "nested.jsonl": lambda p: encoded(jsonl([{"id": i, "item": {"text": a}}
                                             for i, (a, _) in enumerate(p)])),
    "data.json": lambda p: encoded(json.dumps({"version": 1, "data": objects(p)})),
    "lines.json": lambda p: encoded(jsonl(objects(p))),
    "columns.json": lambda p: encoded(pandas.DataFrame(objects(p)).to_json()),
    "strings.json": lambda p: encoded(json.dumps([a for a, _ in p])),
    "cp949.jsonl": lambda p: encoded(jsonl(objects(p)), "cp949"),
    "pairs.zip": zipped,
    "zipped.csv": zipped,
}  # fmt: skip


def make(folder, name, pairs):
    path = folder / name
    if name == "disk":
        save_to_disk(path, pairs)
    elif name == "splits":
        save_splits(path, pairs)
    elif name == "data.arrow":
        path.write_bytes(arrow(folder, pairs))
    elif name.endswith(".parquet"):
        Dataset.from_list(lists(pairs)).to_parquet(path)
    elif name == "frame.pkl":
        pandas.DataFrame(objects(pairs)).to_pickle(path)
    elif name == "packed.tar.gz":
        (folder / "pairs.csv").write_text(table(pairs), encoding="utf-8")
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder / "pairs.csv", arcname="pairs.csv")
        (folder / "pairs.csv").unlink()
    else:
        path.write_bytes(FILES[name](pairs))
    return name


def load(words):
    _, data_args, _ = parse_arguments([*words, "--output_dir", "out", "--report_to", "none"])
    return _load_train_dataset(data_args, 0)


def follow(message, words):
    """Do what a message says, and return the words of the next command."""
    assert "\n" not in message
    assert "drop_invalid_rows" not in message
    for code in re.findall(r'python -c "(.*?)"(?:;|,|$| and)', message):
        exec(code, {})
    for archive, folder in re.findall(r"python -m zipfile -e (\S+) (\S+);", message):
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
        return ["--train_file", f"{folder}/*.csv"]
    if (archive := re.search(r"tar -xf (\S+)\)", message)) is not None:
        shutil.unpack_archive(archive[1], ".", "tar", filter="data")
        return ["--train_file", "pairs.csv"]
    if (new := re.search(r"pass (\S+\.(?:csv|jsonl))\.?$", message)) is not None:
        return ["--train_file", new[1]]
    if (new := re.search(r"Rename it to (\S+)$", message)) is not None:
        Path(words[1]).rename(new[1])
        return ["--train_file", new[1]]
    options = re.sub(r"; if (these are|the first line is).*", "", message)
    return [*words, *shlex.split(options[options.rindex(" --") :])]


def train(words):
    """Read, and where a message says why not, do what it says, at most three times."""
    told = []
    for _ in range(4):
        with contextlib.suppress(Exception):
            return load(words), told
        message = refusal(lambda words=words: load(words))
        assert message, f"{words}: no message"
        told.append(message)
        words = follow(message, words)
    raise AssertionError(told)


NAMES = [*FILES, "disk", "splits", "data.arrow", "lists.parquet", "frame.pkl", "packed.tar.gz"]


@BOTH
@pytest.mark.parametrize("name", NAMES)
def test_what_people_bring_is_read_or_says_how(name, pairs, tmp_path, monkeypatch):
    if name == "latin.csv" and pairs is KOREAN:
        return
    monkeypatch.chdir(tmp_path)
    data, told = train(["--train_file", make(tmp_path, name, pairs)])
    assert len(told) <= 2, told
    assert len(data) >= len(pairs)
    texts = {row["sent0"].strip('"') for row in data} | {row["sent0"] for row in data}
    assert texts & {a for a, _ in pairs} | {a + " é" for a, _ in pairs} & texts
    if name not in ("cp949.txt", "utf16.txt", "nested.jsonl", "strings.json"):
        assert "sent1" in data.column_names


@pytest.mark.parametrize(
    "name",
    ["cp949_semicolon.csv", "noheader.csv",
     *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES
       if name not in ("cp949_semicolon.csv", "noheader.csv", "latin.csv"))],
)  # fmt: skip
def test_and_it_trains(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data, _ = train(["--train_file", make(tmp_path, name, KOREAN)])
    args = build_args(tmp_path / "out", max_steps=2, per_device_train_batch_size=4)
    trainer = SimCSETrainer(build_model(), args, data)
    assert trainer.train().global_step == 2


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def init(words, backbone, capsys):
    """Run `init`, do what it says where it refuses; return the command to train that it prints."""
    for _ in range(4):
        status = run_command("init", *words[1:], "--model", backbone)
        said = capsys.readouterr()
        if status == 0:
            printed = [line for line in said.out.splitlines() if line.startswith("    ")]
            return shlex.split(printed[0])
        words = follow(said.err.splitlines()[-1].removeprefix("error: "), words)
    raise AssertionError(words)


@pytest.mark.parametrize("name", mostly_slow(NAMES, ["noheader.csv", "splits"]))
def test_init_writes_a_config_that_trains_as_printed(name, backbone, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pairs = ENGLISH if name == "latin.csv" else KOREAN
    program, *command = init(["--train_file", make(tmp_path, name, pairs)], backbone, capsys)
    assert program == "simcse-trainer"
    written = [*tmp_path.glob("*_train.jsonl"), *tmp_path.glob("*_eval.jsonl")]
    texts = "".join(path.read_text(encoding="utf-8") for path in written)
    assert [a for a, b in pairs if a not in texts and b not in texts] == []
    assert not re.search(r"[*?\[\]]", command[-1])
    assert run_command(*command, "--max_steps", 2, "--use_cpu", "true") == 0
    assert "The model after 2 steps is in" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["a.xlsx", "a.xls", "a.ods", "a.csv"])
def test_a_workbook_is_named_as_such_and_both_ways_train(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content = b"PK\x03\x04\x14\0\0\0\x08\0\0\0!\0[Content_Types].xml"
    Path(name).write_bytes(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" if name == "a.xls" else content)
    message = refusal(lambda: load(["--train_file", name]))
    assert "is a workbook" in message
    assert "CSV UTF-8" in message
    Path("a.csv").write_text(table(KOREAN), encoding="utf-8-sig")
    assert len(load(["--train_file", "a.csv"])) == len(KOREAN)
    assert "pandas.read_excel" in message


def test_a_workbook_through_pandas(tmp_path, monkeypatch):
    pytest.importorskip("openpyxl", reason="pandas needs openpyxl for workbooks")
    monkeypatch.chdir(tmp_path)
    pandas.DataFrame(objects(KOREAN)).to_excel("a.xlsx", index=False)
    data, told = train(["--train_file", "a.xlsx"])
    assert list(data) == objects(KOREAN)
    assert len(told) == 1


@pytest.mark.parametrize("streaming", ["true", "false"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "sent0,sent1\na,\nb,\nc,\n"),
        ("a.jsonl", '{"sent0": 3}\n{"sent0": 4}\n'),
    ],
)
def test_dropping_every_row_is_never_offered(name, content, streaming, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(content)
    words = ["--train_file", name, "--streaming", streaming, "--columns", "sent0", "sent1"]
    words = words[:4] if "jsonl" in name else words
    message = refusal(lambda: list(load(words)))
    assert message
    assert "drop_invalid_rows" not in message
