"""Data as other projects write it: read as it was meant, or refused."""

import csv
import io
import os
import random

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers.checks import fails
from helpers.tiny import save_tiny, tiny_backbone, tiny_tokenizer

from simcse_trainer import InputError, SimCSEModel, SimCSETrainer, SimCSETrainingArguments
from simcse_trainer.data.loading import load_training_data
from simcse_trainer.data.readers import column_names, read_rows

field = pytest.mark.field


def get_rows(path, content):
    """The cells of each row, or the error there was instead of them."""
    path.write_text(content, encoding="utf-8", newline="")
    try:
        return [tuple(row.values.values()) for row in read_rows(path)]
    except InputError as error:
        return error


def trainer(tmp_path, dataset, **options):
    model = SimCSEModel(tiny_backbone(), tiny_tokenizer(), pooling_mode="mean", max_seq_length=12)
    args = SimCSETrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, report_to=[], use_cpu=True,
        per_device_train_batch_size=4, save_strategy="no",
    )  # fmt: skip
    return SimCSETrainer(model, args, dataset)


@field("29a")
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lone_quotes_of_a_tsv_belong_to_its_texts(tmp_path, end):
    lines = [
        ("sent0", "sent1"),
        ("he left early", '"until tomorrow, he said'),
        ("it rains", "the ground is wet"),
        ('say "please"', '"please"'),
        ('""', "two marks"),
        ("she called", 'she said: come"'),
    ]
    found = get_rows(tmp_path / "a.tsv", end.join("\t".join(line) for line in lines) + end)
    assert found == lines[1:]


@field("29a")
def test_a_quote_that_nothing_closes_is_a_text_of_a_tsv(tmp_path):
    found = get_rows(tmp_path / "a.tsv", 'sent0\tsent1\n"yes, she said\tb\nc\td\n')
    assert found == [('"yes, she said', "b"), ("c", "d")]


@field("29a")
def test_a_score_file_of_glue_is_read_line_by_line(tmp_path):
    """Seven columns, of which only some are used, as KorSTS and STS-B have them."""
    before = ("a\tb\t2012\t1\t5.0\t", "a\tb\t2012\t2\t0.5\t")
    header = "genre\tfilename\tyear\tid\tscore\tsentence1\tsentence2\n"
    body = f'{before[0]}"한 남자가 말했다\t그가 말했다\n{before[1]}개가 잔다\t고양이"\n'
    found = get_rows(tmp_path / "sts.tsv", header + body)
    assert found == [
        ("a", "b", "2012", "1", "5.0", '"한 남자가 말했다', "그가 말했다"),
        ("a", "b", "2012", "2", "0.5", "개가 잔다", '고양이"'),
    ]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_tsv_that_csv_writers_have_quoted_is_read_as_before(tmp_path, quoting):
    """Tabs, line ends and quotes inside of cells, as pandas writes them."""
    draw = random.Random(0)
    # Without a quoted header, lines of a cell that are like rows would make the file ambiguous.
    pieces = ['"', "\n", "a", "b", " c", *(["\t"] if quoting == csv.QUOTE_ALL else [])]
    for _ in range(20):
        texts = ["".join(draw.choice(pieces) for _ in range(9)).strip() or "x" for _ in range(12)]
        rows = [
            ("sent0", "sent1"),
            ('he said "so"', "a\tb"),
            *zip(texts[:6], texts[6:], strict=True),
        ]
        buffer = io.StringIO()
        csv.writer(buffer, delimiter="\t", quoting=quoting, lineterminator="\n").writerows(rows)
        assert get_rows(tmp_path / "a.tsv", buffer.getvalue()) == rows[1:]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('a\tb\n"so ""he"" said"\tc\n"yes\td\n', ["row 2", "row 3", "quote none"]),
        ('text\n"one\ntwo"\n', ["row 2", "no other does", "quote none"]),
        (
            'a\tb\n"so ""he"" said"\tc\nx\t"yes\ny\tz"\n',
            ["row 2", "row 3", "belongs to its text"],
        ),
    ],
)
def test_a_tsv_that_could_be_read_in_two_ways_is_refused(tmp_path, content, words):
    path = tmp_path / "a.tsv"
    path.write_text(content, encoding="utf-8")
    fails(lambda: list(read_rows(path)), "a.tsv", *words)
    assert fails(lambda: column_names(path))


@field("29b")
@pytest.mark.parametrize("text", ["d" * 200_000, "many words\n" * 20_000])
def test_a_long_cell_of_a_csv_is_read(tmp_path, text):
    found = get_rows(tmp_path / "a.csv", f'x,y\na,b\nc,"{text}"\ne,f\n')
    assert isinstance(found, list), found
    assert [len(cell) for row in found for cell in row] == [1, 1, 1, len(text), 1, 1]


@field("29c")
def test_rows_that_a_filter_has_left_out_are_not_judged(tmp_path):
    rows = [[[2, 5, 3]]] * 8 + [[[2] + [5] * 30 + [3]], [[]], [[2, 5, 3], [2, 3]]]
    data = Dataset.from_dict({"input_ids": rows}).filter(
        lambda row: [len(ids) for ids in row["input_ids"]] == [3]
    )
    assert len(data) == 8
    try:
        views = trainer(tmp_path, data).views
    except InputError as error:
        views = error
    assert views == 1


@field("29c")
def test_rows_that_a_selection_keeps_are_judged(tmp_path):
    data = Dataset.from_dict({"input_ids": [[[2, 5, 3]]] * 8 + [[[2] + [5] * 30 + [3]]]})
    fails(lambda: trainer(tmp_path, data.select([8, 0, 1, 2])), "3 to 32 tokens in a text")


@field("29d")
@pytest.mark.parametrize("kind", ["with_transform", "set_transform"])
def test_a_transform_is_refused_and_the_advice_works(tmp_path, kind):
    def louder(batch):
        return {"sent0": [f"{text} big" for text in batch["sent0"]]}

    data = Dataset.from_dict({"sent0": [f"a dog {'runs ' * i}" for i in range(8)]})
    if kind == "set_transform":
        data.set_transform(louder)
    else:
        data = data.with_transform(louder)
    with pytest.raises(InputError, match=r"with_transform .*map\(transform, batched=True\)"):
        trainer(tmp_path, data)
    made = trainer(tmp_path, data.with_format(None).map(louder, batched=True))
    assert made.train_dataset[0]["input_ids"][0][-2] == tiny_tokenizer()("big")["input_ids"][1]


@field("29e")
@pytest.mark.parametrize("options", [{}, {"nli_triplets": True}])
def test_a_cache_knows_files_by_what_they_hold(tmp_path, monkeypatch, options):
    """Two projects, a relative path, files of one size and one time."""
    found = []
    for word in ("cat", "dog"):
        folder = tmp_path / word
        folder.mkdir()
        text = f"premise,hypothesis,label\nthe {word},a {word},0\nthe {word},no {word},2\n"
        name = "train.csv" if options else "train.txt"
        (folder / name).write_text(text)
        os.utime(folder / name, (1_600_000_000, 1_600_000_000))
        monkeypatch.chdir(folder)
        data = load_training_data([name], cache_dir=str(tmp_path / "cache"), **options)
        found.append(data[0]["sent0"] if options else data[1]["sent0"])
    assert ["cat" in found[0], "dog" in found[1]] == [True, True]


@field("27a")
@pytest.mark.parametrize("rows", [[[[2, 99, 3]]] * 8, [[[2, 5, 3]]] * 7 + [[[2, 64, 3]]]])
@pytest.mark.parametrize("streamed", [False, True])
def test_token_ids_without_an_embedding_are_refused(tmp_path, rows, streamed):
    data = Dataset.from_dict({"input_ids": rows})
    if streamed:
        data = IterableDataset.from_generator(lambda: iter([{"input_ids": row} for row in rows]))

    def train():
        trainer_ = trainer(tmp_path, data)
        list(trainer_.get_train_dataloader())

    with pytest.raises(Exception) as error:  # noqa: PT011
        train()
    assert isinstance(error.value, InputError), error.value
    assert "0 to 63" in str(error.value)


@field("27a")
def test_a_word_without_an_embedding_is_named_and_the_advice_works(tmp_path):
    """A tokenizer that was given words, beside a model that was not."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(60)])
    name = save_tiny(tmp_path / "base", tokenizer=tokenizer)
    model = SimCSEModel.from_pretrained(name, pooling_mode="mean")
    assert torch.isfinite(model.encode(["a dog sleeps"])).all()
    for use in (
        lambda: model.encode(["a dog", "the new59 dog"]),
        lambda: build_trainer(model, tmp_path, ["a dog", "the new59 dog", "a", "b"]),
    ):
        with pytest.raises(Exception) as error:  # noqa: PT011
            use()
        assert isinstance(error.value, InputError), error.value
        for words in ("new59", "64 word embeddings", f"resize_token_embeddings({len(tokenizer)})"):
            assert words in str(error.value)
    resized = AutoModel.from_pretrained(name)
    resized.resize_token_embeddings(len(tokenizer))
    resized.save_pretrained(tmp_path / "resized")
    AutoTokenizer.from_pretrained(name).save_pretrained(tmp_path / "resized")
    again = SimCSEModel.from_pretrained(tmp_path / "resized", pooling_mode="mean")
    assert again.encode(["the new59 dog"]).shape == (1, 32)


def build_trainer(model, tmp_path, texts):
    args = SimCSETrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, report_to=[], use_cpu=True,
        per_device_train_batch_size=4, save_strategy="no",
    )  # fmt: skip
    return SimCSETrainer(model, args, Dataset.from_dict({"sent0": texts})).train()


@field("31c")
@pytest.mark.parametrize("kind", ["series", "array", "tuple", "generator"])
def test_texts_in_other_containers_are_embedded(kind):
    import numpy as np
    import pandas as pd

    texts = ["a man", "the dog sleeps", "a"]
    given = {
        "series": pd.Series(texts, index=[7, 3, 5]),
        "array": np.array(texts),
        "tuple": tuple(texts),
        "generator": (text for text in texts),
    }[kind]
    model = SimCSEModel(tiny_backbone(), tiny_tokenizer(), pooling_mode="mean").eval()
    try:
        found = model.encode(given)
    except Exception as error:
        raise AssertionError(f"{kind}: {error!r}") from error
    assert torch.equal(found, model.encode(texts))


@field("31c")
@pytest.mark.parametrize(
    "given", [[("a man", "a dog")], [["a", "b"], ["c", "d"]], [None], ["a", 7]]
)
def test_what_is_no_text_is_refused(given):
    model = SimCSEModel(tiny_backbone(), tiny_tokenizer(), pooling_mode="mean").eval()
    with pytest.raises(Exception) as error:  # noqa: PT011
        model.encode(given)
    assert isinstance(error.value, InputError), repr(error.value)
    assert "expected a text" in str(error.value)
