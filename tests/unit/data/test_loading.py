import gzip
import json
import logging
import os
import subprocess
import sys

import datasets
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value
from helpers.checks import fails

from simcse_trainer.data import loading
from simcse_trainer.data.loading import load_training_data, prepare_dataset
from simcse_trainer.data.pairs import load_scored_pairs

PAIRS = "sent0,sent1,id\na,b,1\n,c,2\nd,e,3\nf,\n\n g ,g,4\n"
GOOD_PAIRS = [("a", "b"), ("d", "e"), (" g ", "g")]
NLI = "premise,hypothesis,label\nP,e1,entailment\nP,n,1\nP,c,contradiction\nQ,x,-\nP,e2,0\n"
TRIPLETS = [("P", "e1", "c"), ("P", "e2", "c")]


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes files into the working folder, so that messages have short names in them."""
    monkeypatch.chdir(tmp_path)

    def write(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return write


def rows(dataset):
    return [tuple(row.values()) for row in dataset]


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("streaming", [False, True])
class TestFiles:
    def test_one_column_is_the_sentence(self, write, streaming):
        text = write("a.txt", "\ufeffone\r\ntwo\r\ntwo\r\n\r\n" + "x" * 1_000_000)
        dataset = load_training_data([text], streaming=streaming)
        assert dataset.features == Features(sent0=Value("string"))
        assert rows(dataset) == [("one",), ("two",), ("two",), ("x" * 1_000_000,)]

    def test_only_the_roles_are_kept_in_view_order(self, write, streaming):
        name = write("a.tsv", "hard_neg_x\tid\tsent1\tsent0\nn\t7\tp\ta\n")
        dataset = load_training_data([name], streaming=streaming)
        assert dataset.column_names == ["sent0", "sent1", "hard_neg_x"]
        assert rows(dataset) == [("a", "p", "n")]

    def test_columns_by_position(self, write, streaming):
        name = write("a.jsonl", json.dumps({"n": "n", "a": "a", "score": 3, "p": "p"}))
        dataset = load_training_data([name], columns=["a", "p", "n"], streaming=streaming)
        assert list(dataset) == [{"sent0": "a", "sent1": "p", "hard_neg": "n"}]

    def test_several_files_and_globs(self, write, streaming):
        for name, text in (("b.csv", "b"), ("a.csv", "a"), ("c.csv", "c")):
            write(name, f"sent0\n{text}\n")
        other = write("d.jsonl", '{"sent0": "d"}')
        dataset = load_training_data([other, "*.csv"], streaming=streaming)
        assert rows(dataset) == [("d",), ("a",), ("b",), ("c",)]
        if streaming:
            assert dataset.num_shards == 4

    def test_single_numbers_in_csv_are_text(self, write, streaming):
        name = write("a.csv", "sent0,sent1\n2019,the year\nthe age,42\n")
        dataset = load_training_data([name], streaming=streaming)
        assert rows(dataset) == [("2019", "the year"), ("the age", "42")]

    def test_numeric_csv_column_is_an_error(self, write, streaming):
        name = write("a.csv", "sentence1,score\nx,1\ny,2.5\n")
        columns = ["sentence1", "score"]
        fails(
            lambda: load_training_data([name], columns=columns, streaming=streaming),
            "a.csv: column 'score' holds only numbers in the first 2 rows",
            "columns",
        )

    def test_unknown_and_differing_columns(self, write, streaming):
        first = write("a.csv", "sent0,sent1\na,b\n")
        second = write("b.csv", "sent0,text\na,b\n")
        fails(
            lambda: load_training_data([first, second], streaming=streaming),
            "a.csv has the columns 'sent0', 'sent1', but b.csv has 'sent0', 'text'",
            "columns",
        )
        common = load_training_data([first, second], columns=["sent0"], streaming=streaming)
        assert rows(common) == [("a",), ("a",)]
        fails(
            lambda: load_training_data([first, second], columns=["text"], streaming=streaming),
            "a.csv has the columns",
            "b.csv",
        )
        fails(
            lambda: load_training_data([first], columns=["sent_0"], streaming=streaming),
            "a.csv: there is no column 'sent_0' (nearest: 'sent0')",
            "columns",
        )
        unclear = write("c.csv", "text,sent_1\na,b\n")
        fails(
            lambda: load_training_data([unclear], streaming=streaming),
            "c.csv",
            "'sent_1' looks like 'sent1'",
            "columns text sent_1",
        )

    @pytest.mark.parametrize(
        ("name", "content", "words"),
        [
            ("a.txt", "", "a.txt has no rows"),
            ("a.txt", "\n \n", "a.txt has no rows"),
            ("a.csv", "", "a.csv is empty; expected a header"),
            ("a.csv", "sent0\n", "a.csv has no rows"),
            ("a.csv", 'sent0\nx\n"y\nz\n', "a.csv row 3: a quote that opens in this row"),
            (
                "a.txt.gz",
                gzip.compress(os.urandom(9000))[:-9],
                "a.txt.gz: the compressed file is tr",
            ),
        ],
    )
    def test_unreadable_files_leave_no_cache(self, write, streaming, name, content, words):
        write(name, content)
        for _ in range(2):
            fails(
                lambda: list(
                    load_training_data([name], drop_invalid_rows=True, streaming=streaming)
                ),
                words,
            )

    @pytest.mark.parametrize(
        ("name", "bad", "problem"),
        [
            ("a.txt", b"x\xff", "byte 0xff at position 2 of the line is not UTF-8"),
            ("a.txt", b"x\0", "column 'text' holds a NUL character"),
            ("a.csv", b'"  "', "column 'text' is empty"),
            ("a.csv", b"x,y", "has 2 cells, the header has 1"),
            ("a.jsonl", b'{"text": null}', "column 'text' is null"),
            ("a.jsonl", b'{"text": 3.5}', "column 'text' is a number (3.5), expected text"),
            ("a.jsonl", b'{"text": true}', "column 'text' is a boolean (True), expected text"),
            ("a.jsonl", b'{"text": ["x"]}', "column 'text' is a list (['x']), expected text"),
            ("a.jsonl", b'{"text": "x\\ud83d"}', r"half of a character, \ud83d"),
            ("a.jsonl", b"{}", "column 'text' is missing"),
            ("a.jsonl", b'{"text"', "is not valid JSON"),
        ],
    )
    def test_bad_rows(self, write, caplog, streaming, name, bad, problem):
        good = b'{"text": "ok"}' if name == "a.jsonl" else b"ok"
        lines = [b"text", good] if name == "a.csv" else [good, good]
        write(name, b"\n".join([*lines, bad, good, bad]))
        count = "such rows" if streaming else "the 2 such rows"
        fails(
            lambda: list(load_training_data([name], streaming=streaming)),
            f"{name} row 3: ",
            f"{problem}",
            f"Every row needs 1 text; fix the row, or pass drop_invalid_rows=True to skip {count}.",
        )
        dataset = load_training_data([name], drop_invalid_rows=True, streaming=streaming)
        assert set(rows(dataset)) == {("ok",)}
        (warning,) = warnings(caplog)
        assert f"{name}: dropped 2 rows, " in warning
        assert f"are left; the first: {name} row 3: " in warning

    def test_dropped_rows_are_counted_cold_and_cached(self, write, caplog, streaming):
        name = write("a.csv", PAIRS)
        for _ in range(2):
            caplog.clear()
            options = {"drop_invalid_rows": True, "streaming": streaming}
            dataset = load_training_data([name], **options)
            assert rows(dataset) == GOOD_PAIRS
            expected = "a.csv: dropped 2 rows, 3 are left; the first: a.csv row 3: column 'sent0'"
            assert [message.split(" is empty")[0] for message in warnings(caplog)] == [expected]

    def test_nothing_left(self, write, streaming):
        name = write("a.csv", "sent0,sent1\na,\n,b\n")
        fails(
            lambda: list(load_training_data([name], drop_invalid_rows=True, streaming=streaming)),
            "a.csv: no row is left without 2 bad ones; a.csv row 2: column 'sent1' is empty",
        )

    def test_one_row(self, write, streaming):
        name = write("a.csv", "text\nx\n")
        assert rows(load_training_data([name], streaming=streaming)) == [("x",)]


def test_the_error_counts_the_whole_input_also_from_the_cache(write, monkeypatch):
    names = [write("a.csv", PAIRS), write("b.csv", "sent0,sent1,id\nx,,1\n")]
    for _ in range(2):
        fails(
            lambda: load_training_data(names),
            "a.csv row 3: column 'sent0' is empty. Every row needs 2 texts; fix the row, or pass "
            "drop_invalid_rows=True to skip the 3 such rows.",
        )
        # The second time nothing may be read.
        monkeypatch.setattr(loading, "_check_rows", None)


def test_one_bad_row_is_counted_as_one(write):
    name = write("a.txt", "x\n\0\n")
    fails(lambda: load_training_data([name]), "a.txt row 2", "to skip the 1 such row.")


def test_a_changed_file_is_read_anew(write, tmp_path):
    name = write("a.txt", "one\n")
    assert rows(load_training_data([name])) == [("one",)]
    write(name, "two\n")
    stat = (tmp_path / name).stat()
    os.utime(tmp_path / name, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert rows(load_training_data([name])) == [("two",)]


def test_the_cache_keeps_its_fingerprint(write, tmp_path):
    name = write("a.csv", PAIRS)
    options = {"drop_invalid_rows": True, "cache_dir": str(tmp_path / "cache")}
    first, second = (load_training_data([name], **options) for _ in range(2))
    assert first._fingerprint == second._fingerprint
    assert str(tmp_path / "cache") in first.cache_files[0]["filename"]


def test_streams_raise_at_the_turn_of_the_bad_row(write):
    stream = iter(load_training_data([write("a.csv", PAIRS)], streaming=True))
    assert next(stream) == {"sent0": "a", "sent1": "b"}
    fails(lambda: next(stream), "a.csv row 3: column 'sent0' is empty", "to skip such rows.")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "Nothing to train on. Pass train_file or dataset_name"),
        ({"train_file": ["b.txt"], "dataset_name": "x"}, "b.txt could not be downloaded"),
        ({"train_file": ["a.txt"], "nli_triplets": True, "streaming": True}, "streaming=False"),
        ({"train_file": ["missing.txt"]}, "missing.txt: no such file"),
        ({"train_file": ["."]}, "is a folder"),
        ({"dataset_name": "a.txt"}, "train_file a.txt"),
        ({"dataset_name": "nobody/has-this"}, "nobody/has-this: the data set could not be loaded"),
    ],
)
def test_options(write, options, words):
    write("a.txt", "x")
    fails(lambda: load_training_data(**options), words)


class TestNli:
    def test_files_together(self, write):
        header = NLI.split("\n")[0]
        first = write("a.csv", f"{header}\nP,e1,entailment\n")
        second = write("b.csv", f"{header}\nP,c,contradiction\nP,e2,entailment\n")
        dataset = load_training_data([first, second], nli_triplets=True)
        assert dataset.column_names == ["sent0", "sent1", "hard_neg"]
        assert rows(dataset) == TRIPLETS

    def test_bad_rows(self, write, caplog):
        name = write("a.csv", f"{NLI}P,c3,maybe\nP,,2\nP,c4\n")
        for _ in range(2):
            fails(
                lambda: load_training_data([name], nli_triplets=True),
                "a.csv row 7: column 'label' is 'maybe', expected entailment",
                "a premise, a hypothesis and a label",
                "skip the 3 such rows",
            )
        dataset = load_training_data([name], nli_triplets=True, drop_invalid_rows=True)
        assert rows(dataset) == TRIPLETS
        assert "a.csv: dropped 3 rows, 2 are left" in caplog.text

    def test_columns_and_their_names_in_errors(self, write):
        columns = {"columns": ["s1", "s2", "gold"], "nli_triplets": True}
        name = write("a.csv", NLI.replace("premise,hypothesis,label", "s1,s2,gold"))
        assert rows(load_training_data([name], **columns)) == TRIPLETS
        fails(lambda: load_training_data([name], nli_triplets=True), "no column 'premise'")
        name = write("b.csv", "s1,s2,gold\nP,,0\n")
        fails(lambda: load_training_data([name], **columns), "b.csv row 2: column 's2' is empty")

    def test_no_triplet(self, write):
        name = write("a.csv", "premise,hypothesis,label\nP,e,0\n")
        fails(lambda: load_training_data([name], nli_triplets=True), "no triplet", "label")

    def test_data_set_from_a_folder(self, write):
        write("data/train.csv", NLI.replace("n,1", "n,neutral").replace("e2,0", "e2,entailment"))
        assert rows(load_training_data(dataset_name="data", nli_triplets=True)) == TRIPLETS

    def test_class_labels_have_their_own_order(self, monkeypatch):
        label = ClassLabel(names=["contradiction", "entailment", "neutral"])
        data = Dataset.from_dict(
            {"premise": ["P"] * 4, "hypothesis": ["c", "e", "n", ""], "label": [0, 1, 2, -1]},
            features=Features(premise=Value("string"), hypothesis=Value("string"), label=label),
        )
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: data)
        dataset = load_training_data(dataset_name="some/nli", nli_triplets=True)
        assert rows(dataset) == [("P", "e", "c")]


class TestDataSetsByName:
    """A local folder takes the way of the Hub, without a network."""

    @pytest.fixture(autouse=True)
    def _folder(self, write):
        write("data/train.csv", "sent0,sent1,x\na,b,1\nc,,2\n")

    @pytest.mark.parametrize("streaming", [False, True])
    def test_rows(self, caplog, streaming):
        load = {"dataset_name": "data", "streaming": streaming}
        fails(lambda: list(load_training_data(**load)), "data row 2: column 'sent1' is null")
        dataset = load_training_data(**load, drop_invalid_rows=True)
        assert rows(dataset) == [("a", "b")]
        assert dataset.features == Features(sent0=Value("string"), sent1=Value("string"))
        assert "data: dropped 1 rows" in caplog.text
        assert "row 2: column 'sent1' is null" in caplog.text
        # A stream does not know its types beforehand.
        problem = "row 1: column 'x' is a number (1)" if streaming else "column 'x' holds int64"
        fails(lambda: list(load_training_data(**load, columns=["x"])), "data", problem)

    def test_slices(self):
        dataset = load_training_data(dataset_name="data", dataset_split="train[:1]")
        assert rows(dataset) == [("a", "b")]

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"dataset_split": "test"}, ['split "test"', "['train']", "dataset_split"]),
            ({"dataset_config_name": "en"}, ["'en'", "default", "dataset_config_name"]),
        ],
    )
    def test_unknown_split_and_config(self, options, words):
        fails(lambda: load_training_data(dataset_name="data", **options), "data:", *words)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ConnectionError("Couldn't reach 'x' on the Hub"), "Check the connection"),
        (ConnectionError("OfflineModeIsEnabled"), "HF_HUB_OFFLINE"),
        (
            datasets.exceptions.DatasetNotFoundError("'x' doesn't exist\nor is private."),
            "hf auth login",
        ),
        (RuntimeError(), "RuntimeError"),
        (ValueError("word " * 1000), "[...]"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, error, words):
    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    raised = fails(lambda: load_training_data(dataset_name="x"), "x: the data set", words)
    assert len(str(raised)) < 500


QUERIES = {"id": [1, 2, 3], "q": ["a", None, "b"], "d": ["p", "x", "\0"]}


class TestPrepareDataset:
    def test_roles_and_problems(self, caplog):
        data = Dataset.from_dict(QUERIES)
        columns = ["q", "d"]
        fails(
            lambda: prepare_dataset(data, columns=columns),
            "train_dataset row 2: column 'q' is null",
            "to skip the 2 such rows",
        )
        dataset = prepare_dataset(data, columns=columns, drop_invalid_rows=True, source="mine")
        assert list(dataset) == [{"sent0": "a", "sent1": "p"}]
        assert "mine: dropped 2 rows, 1 are left; the first: mine row 2" in caplog.text

    def test_streams(self, caplog):
        data = Dataset.from_dict(QUERIES).to_iterable_dataset(num_shards=1)
        fails(lambda: list(prepare_dataset(data, columns=["q"])), "train_dataset row 2", "null")
        dataset = prepare_dataset(data, columns=["q"], drop_invalid_rows=True)
        assert list(dataset) == [{"sent0": "a"}, {"sent0": "b"}]
        assert "train_dataset: dropped 1 rows so far" in caplog.text

    def test_stream_of_unknown_columns(self):
        data = IterableDataset.from_generator(lambda: iter([{"text": "a"}, {"text": "b"}]))
        dataset = prepare_dataset(data)
        assert dataset.column_names == ["sent0"]
        assert rows(dataset) == [("a",), ("b",)]

    def test_selected_formatted_and_swapped(self):
        data = Dataset.from_dict({"sent0": list("abc"), "sent1": list("xyz")}).select([2, 0])
        dataset = prepare_dataset(data.with_format("numpy"), columns=["sent1", "sent0"])
        assert list(dataset) == [{"sent0": "z", "sent1": "c"}, {"sent0": "x", "sent1": "a"}]

    def test_large_strings_become_strings(self):
        features = Features(text=Value("large_string"))
        dataset = prepare_dataset(Dataset.from_dict({"text": ["a"]}, features=features))
        assert dataset.features == Features(sent0=Value("string"))

    def test_twice_is_once(self, write):
        dataset = load_training_data([write("a.txt", "x\ny\n")])
        assert prepare_dataset(dataset)._fingerprint == prepare_dataset(dataset)._fingerprint
        assert rows(prepare_dataset(prepare_dataset(dataset))) == [("x",), ("y",)]

    @pytest.mark.parametrize(
        ("data", "words"),
        [
            (datasets.DatasetDict(train=Dataset.from_dict({"a": ["x"]})), "splits 'train'"),
            ([{"a": "x"}], "a list ([{'a': 'x'}]), expected a datasets.Dataset"),
            (Dataset.from_dict({"a": [1]}), "column 'a' holds int64, expected text"),
            (Dataset.from_dict({"a": [["x"]]}), "column 'a' holds "),
            (Dataset.from_dict({"a": []}, features=Features(a=Value("string"))), "has no rows"),
            (Dataset.from_dict({}), "no columns"),
            (Dataset.from_dict({"a": ["x"], "b": ["y"]}), "columns a b"),
        ],
    )
    def test_unusable(self, data, words):
        fails(lambda: prepare_dataset(data), "train_dataset", words)


class TestScoredPairs:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.csv", "score,sentence1,sentence2,x\n3.5,a,b,\n0,a,b,\n"),
            ("a.tsv", "sentence1\tsentence2\tscore\na\tb\t3.5\na\tb\t0\n"),
            (
                "a.jsonl",
                '{"sentence1": "a", "sentence2": "b", "score": 3.5}\n'
                '{"sentence1": "a", "sentence2": "b", "score": 0}\n',
            ),
        ],
    )
    def test_formats(self, write, name, content):
        data = load_scored_pairs(write(name, content))
        assert data.features["score"] == Value("float64")
        assert list(data) == [
            {"sentence1": "a", "sentence2": "b", "score": 3.5},
            {"sentence1": "a", "sentence2": "b", "score": 0.0},
        ]

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("sentence1,sentence2,score\na,b,1\na,b,high\n", "row 3: column 'score' is 'high'"),
            ("sentence1,sentence2,score\na,b,nan\na,b,1\n", "row 2: column 'score' is nan"),
            ("sentence1,sentence2,score\na,b,\na,b,1\n", "row 2: column 'score' is ''"),
            ("sentence1,sentence2,score\na,,1\na,b,1\n", "row 2: column 'sentence2' is empty"),
            ("sentence1,sentence2,score\na,b\na,b,1\n", "row 2: has 2 cells, the header has 3"),
            (
                "sentence1,sentence2,score\na,b,1\n",
                "found 1 rows with 1 different scores, expected 2 or more",
            ),
            ("sentence1,sentence2,scores\na,b,1\n", "no column 'score' (nearest: 'scores')"),
            ("", "is empty; expected a header"),
        ],
    )
    def test_unusable(self, write, content, words):
        path = write("a.csv", content)
        fails(lambda: load_scored_pairs(path), "a.csv", words)

    def test_no_text_file_and_no_missing_one(self, write):
        path = write("a.txt", "x\n")
        fails(lambda: load_scored_pairs(path), "a.txt: there is no column 'sentence1'")
        fails(lambda: load_scored_pairs("b.csv"), "b.csv: no such file")
        write("b.txt", "x\n")
        fails(lambda: load_scored_pairs("*.txt"), "*.txt matches 2 files, expected one")


def test_workers_share_the_files_of_a_stream(write):
    names = [write("a.txt", "a\nb\n"), write("b.txt", "c\n"), write("c.txt", "d\ne\nf\n")]
    stream = prepare_dataset(load_training_data(names, streaming=True))
    loader = torch.utils.data.DataLoader(stream, batch_size=2, num_workers=2)
    assert sorted(text for batch in loader for text in batch["sent0"]) == list("abcdef")


def test_streams_resume_where_they_were(write):
    options = {"streaming": True, "drop_invalid_rows": True}
    stream = prepare_dataset(load_training_data([write("a.csv", PAIRS)], **options))
    iterator = iter(stream)
    next(iterator)
    stream.load_state_dict(stream.state_dict())
    assert rows(stream) == GOOD_PAIRS[1:]


def test_importing_is_light():
    code = (
        "import sys, simcse_trainer.data.loading; "
        "print({'torch', 'transformers', 'datasets', 'pyarrow'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


def test_files_of_a_data_sets_repository(write, tmp_path):
    # A folder stands for the repository; the Hub itself is asked in the same way.
    write("wiki.txt", "one\ntwo\n")
    data = load_training_data(["wiki.txt"], dataset_name=str(tmp_path))
    assert data["sent0"][:] == ["one", "two"]


def test_a_local_file_stays_local_beside_a_recipes_data_set(write):
    # As when a command line gives another --train_file to a config with a dataset_name.
    path = write("mine.txt", "one\ntwo\n")
    assert load_training_data([path], dataset_name="nobody/has-this")["sent0"][:] == ["one", "two"]
