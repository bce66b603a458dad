"""What is not read as it is: named by its suffix or its content."""

import json
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from helpers.checks import fails

from simcse_trainer.data.foreign import describe_content, describe_kind
from simcse_trainer.data.lines import FileOptions
from simcse_trainer.data.loading import load_training_data, prepare_dataset
from simcse_trainer.data.readers import column_names, read_rows
from simcse_trainer.errors import InputError

# Advice is followed as it is said at the command line.
pytestmark = pytest.mark.usefixtures("command_line")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.xlsx", "read_excel('a.xlsx')"),
        ("a.ods", "odfpy"),
        ("a.pkl", "read_pickle"),
        ("a.zip", "python -m zipfile -e a.zip a"),
        ("a.tar.gz", "tar -xf a.tar.gz"),
        ("a.tgz", "tar -xf"),
    ],
)
def test_kinds(name, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    fails(lambda: load_training_data([name]), said)


def test_an_unknown_kind_stays_unknown(tmp_path):
    assert describe_kind(tmp_path / "a.hwp") is None
    assert describe_content(tmp_path / "a.csv", b"PKs are pink,b\n") is None


@pytest.mark.parametrize("magic", [b"\x1f\x8b", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"])
def test_a_compressed_file_without_its_suffix(magic, tmp_path):
    (tmp_path / "a.csv").write_bytes(magic + b"\0\1")
    fails(lambda: load_training_data([str(tmp_path / "a.csv")]), "Rename it to", "a.csv.")


@pytest.mark.parametrize(
    ("content", "names", "rows"),
    [
        ({"data": [{"a": "x"}, {"a": "y"}], "version": 2}, ["a"], ["x", "y"]),
        (["x", "y"], ["text"], ["x", "y"]),
        ({"a": ["x", "y"], "b": [1, 2]}, ["a", "b"], ["x", "y"]),
        ({"a": {"0": "x", "1": "y"}, "b": {"0": 1, "1": 2}}, ["a", "b"], ["x", "y"]),
        ([{"a": {"t": "x"}}, {"a": {"t": "y"}}], ["a.t"], ["x", "y"]),
    ],
)
def test_json_as_others_nest_it(content, names, rows, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content, indent=1))
    assert column_names(path) == names
    assert [row.values[names[0]] for row in read_rows(path)] == rows


def test_json_of_one_object_a_line(tmp_path):
    (tmp_path / "a.json").write_text('{"a": "x"}\n{"a": "y"}\n')
    assert [row.values for row in read_rows(tmp_path / "a.json")] == [{"a": "x"}, {"a": "y"}]


def test_objects_in_parquet_and_in_data_sets(tmp_path):
    data = Dataset.from_list([{"translation": {"en": "a dog", "ko": "개"}}])
    data.to_parquet(tmp_path / "a.parquet")
    data.save_to_disk(str(tmp_path / "disk"))
    names = ["translation.en", "translation.ko"]
    assert column_names(tmp_path / "a.parquet") == names
    for source in (tmp_path / "a.parquet", tmp_path / "disk"):
        found = load_training_data([str(source)], columns=names)
        assert list(found) == [{"sent0": "a dog", "sent1": "개"}]


@pytest.mark.parametrize("as_name", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_folders_of_save_to_disk(as_name, streaming, tmp_path):
    folder = str(tmp_path / "a")
    data = Dataset.from_dict({"sent0": ["a", "b"], "id": [1, 2]})
    DatasetDict(train=data, test=data.select([1])).save_to_disk(folder)
    given = {"dataset_name": folder} if as_name else {"train_file": [folder]}
    given["streaming"] = streaming
    assert [row["sent0"] for row in load_training_data(**given)] == ["a", "b"]
    assert [row["sent0"] for row in load_training_data(**given, dataset_split="test")] == ["b"]
    fails(
        lambda: load_training_data(**given, dataset_split="dev"),
        "no split 'dev'; found 'train', 'test'. Pass --dataset_split train",
    )


def test_a_damaged_folder_and_a_damaged_arrow_file(tmp_path):
    (tmp_path / "state.json").write_text("{")
    fails(lambda: load_training_data([str(tmp_path)]), "could not be loaded")
    (tmp_path / "a.arrow").write_bytes(b"ARROW1 and no more")
    fails(lambda: load_training_data([str(tmp_path / "a.arrow")]), "is no Arrow file")


def test_an_arrow_file_of_batches(tmp_path):
    import pyarrow

    table = pyarrow.table({"text": ["a", "b"]})
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    assert load_training_data([str(tmp_path / "a.arrow")])["sent0"] == ["a", "b"]


def test_the_encoding_is_for_all_files(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "책"}\n'.encode("cp949"))
    options = FileOptions(encoding="cp949", in_training=True)
    assert load_training_data([str(tmp_path / "a.jsonl")], file_options=options)["sent0"] == ["책"]


PAIRS = [(f"where is my order {n}", f"it comes on day {n}, I think") for n in "abcdefgh"]


def write_rows(name, rows):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def follow(message):
    """Run the Python of a message, and return the rows of the file that it makes."""
    exec(message.split('python -c "')[1].split('"; then')[0], {})
    return list(load_training_data([message.split("then pass ")[1]]))


@pytest.mark.parametrize(
    ("names", "values", "kept"),
    [
        (("question1", "question2", "is_duplicate"), [0, 1], [1, 3, 5, 7]),
        (("sentence1", "sentence2", "score"), [0.5, 5.0, 3.9, 4.0], [1, 3, 5, 7]),
        (("s_a", "s_b", "label"), [1, 0], [0, 2, 4, 6]),
    ],
)
def test_only_judged_pairs_that_belong_together_are_positives(
    names, values, kept, tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    rows = [(*pair, values[i % len(values)]) for i, pair in enumerate(PAIRS)]
    write_rows("a.jsonl", [dict(zip(names, row, strict=True)) for row in rows])
    error = fails(lambda: load_training_data(["a.jsonl"]), names[2], "belong together")
    expected = [dict(zip(("sent0", "sent1"), PAIRS[i], strict=True)) for i in kept]
    assert follow(str(error)) == expected
    assert "is not read" not in caplog.text
    assert len(load_training_data(["a.jsonl"], columns=names[:2])) == 8
    assert f"column '{names[2]}' is not read" in caplog.text


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_that_is_sorted_by_its_judgement(name, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    rows = [
        {"sentence1": f"text number {i}", "sentence2": f"other text {i}", "label": int(i < 150)}
        for i in range(300)
    ]
    write_rows("a.jsonl", rows)
    Dataset.from_list(rows).to_csv("a.csv")
    error = fails(lambda: load_training_data([name]), "label", "of at least 1", "belong together")
    assert len(follow(str(error))) == 150
    prepare_dataset(Dataset.from_list(rows), columns=["sentence1", "sentence2"])
    assert "column 'label' is not read" in caplog.text


def test_short_texts_without_a_header_lose_no_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text("hello,hi there\nbye,see you\nthanks,no problem\n")
    error = fails(lambda: load_training_data(["a.csv"]), "--columns hello 'hi there'; if the first")
    names = str(error).split("pass --column_names ")[1].split()
    found = load_training_data(["a.csv"], file_options=FileOptions(column_names=tuple(names)))
    assert found["sent0"] == ["hello", "bye", "thanks"]
    write_rows("a.jsonl", [{"hello": "bye", "hi there": "see you"}])
    with pytest.raises(InputError) as refused:
        load_training_data(["a.jsonl"])
    assert "first line" not in str(refused.value)


@pytest.mark.parametrize("labels", ["entailment contradiction", "0 2"])
def test_contradictions_are_no_positives(labels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [("premise", "hypothesis", "label")]
    rows += [("a man is here", text, labels.split()[i % 2]) for i, (text, _) in enumerate(PAIRS)]
    (tmp_path / "a.tsv").write_text("\n".join("\t".join(row) for row in rows))
    said = "--nli_triplets true --columns premise hypothesis label"
    fails(lambda: load_training_data(["a.tsv"]), said)
    triplets = load_training_data(["a.tsv"], columns=rows[0], nli_triplets=True)
    assert triplets["hard_neg"] == [text for text, _ in PAIRS[1::2]]


def test_a_label_of_one_text_is_no_judgement(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows("a.jsonl", [{"Q": a, "A": b, "label": i % 3} for i, (a, b) in enumerate(PAIRS)])
    fails(lambda: load_training_data(["a.jsonl"]), "--columns Q A")


def test_lines_that_are_rows_or_objects_are_no_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS))
    fails(lambda: load_training_data(["a.txt"]), "1 tabs", "--delimiter tab")
    (tmp_path / "b.txt").write_text("a text\nanother\twith a tab\n")
    assert len(load_training_data(["b.txt"])) == 2
    write_rows("c.txt", [{"sent0": a, "sent1": b} for a, b in PAIRS])
    fails(lambda: load_training_data(["c.txt"]), "objects of JSON", "Rename it to c.jsonl")


def test_chats_with_parts_and_empty_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = [
        [
            {"role": "user", "content": [{"type": "text", "text": a}, {"type": "image"}]},
            {"role": "assistant", "content": b},
        ]
        for a, b in PAIRS
    ]
    write_rows("a.jsonl", [{"messages": chat} for chat in [said[0], [], None, *said[1:]]])
    error = fails(lambda: load_training_data(["a.jsonl"]), "holds chats")
    assert [(row["sent0"].strip(), row["sent1"]) for row in follow(str(error))] == PAIRS


def test_lists_of_objects_and_of_one_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"sent0": a, "sent1": b} for a, b in PAIRS]
    write_rows("a.jsonl", [{"data": rows[:5]}, {"data": rows[5:]}])
    error = fails(lambda: load_training_data(["a.jsonl"]), "lists of objects")
    assert follow(str(error)) == rows
    write_rows("b.jsonl", [{"query": [a], "pos": b} for a, b in PAIRS])
    error = fails(lambda: load_training_data(["b.jsonl"]), "lists of one text")
    assert follow(str(error)) == rows


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_numbers_of_labels_mean_what_datasets_has_written(kind, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    rows = [{"premise": "a man", "hypothesis": a, "label": i % 2} for i, (a, _) in enumerate(PAIRS)]
    label = ClassLabel(names=["contradiction", "entailment"])
    kinds = Features(premise=Value("string"), hypothesis=Value("string"), label=label)
    data = Dataset.from_list(rows, features=kinds)
    data.to_parquet("a.parquet")
    data.save_to_disk("saved")
    name = "a.parquet" if kind == "parquet" else str(next(Path("saved").glob("*.arrow")))
    triplets = load_training_data([name], nli_triplets=True)
    assert triplets["sent1"] == [a for a, _ in PAIRS[1::2]]
    assert triplets["hard_neg"] == [a for a, _ in PAIRS[::2]]
    load_training_data(["saved"], columns=["premise", "hypothesis"])
    assert "column 'label' is not read" in caplog.text


def test_a_header_in_a_text_file_is_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("sent0,sent1\na b,c d\n")
    fails(lambda: load_training_data(["a.txt"]), "Rename it to a.csv")
