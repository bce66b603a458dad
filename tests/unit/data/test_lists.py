"""Lists of positives and negatives, and chats: as FlagEmbedding, ms-swift and others write them."""

import json

import pytest
import torch
from datasets import Dataset
from helpers.checks import fails
from helpers.tiny import tiny_tokenizer

from simcse_trainer.data.loading import load_training_data, prepare_dataset
from simcse_trainer.data.tokenization import tokenize_dataset
from simcse_trainer.objective.contrastive import ContrastiveObjective
from simcse_trainer.objective.loss import find_false_negatives, info_nce
from simcse_trainer.training.dataset import SimCSECollator
from simcse_trainer.training.drawing import ListDraws

ROWS = [
    {"query": "a man", "pos": ["a dog", "a cat"], "neg": ["food", "mat", "big"], "prompt": "x"},
    {"query": "the child", "pos": ["is eating"], "neg": [], "prompt": "x"},
    {"query": "sleeps", "pos": ["runs", "plays", "on"], "neg": ["red"], "prompt": "x"},
]
LISTS = [{"sent0": r["query"], "sent1": r["pos"], "hard_neg": r["neg"]} for r in ROWS]


def turn(text):
    return [{"role": "user", "content": text}]


CHATS = [
    {
        "messages": turn(row["query"]),
        "positive_messages": [turn(text) for text in row["pos"]],
        "negative_messages": [turn(text) for text in row["neg"]],
    }
    for row in ROWS
]


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("rows", [ROWS, CHATS, LISTS], ids=["flag", "swift", "ours"])
@pytest.mark.parametrize("way", ["jsonl", "json", "parquet", "streamed", "dataset", "stream"])
def test_lists_are_read(rows, way, tmp_path):
    if way == "dataset":
        data = prepare_dataset(Dataset.from_list(rows))
    elif way == "stream":
        data = prepare_dataset(Dataset.from_list(rows).to_iterable_dataset())
    else:
        path = tmp_path / f"a.{'jsonl' if way == 'streamed' else way}"
        if way == "parquet":
            Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text(json.dumps(rows) if way == "json" else "")
            if way != "json":
                write(path, rows)
        data = load_training_data([str(path)], streaming=way == "streamed")
    assert list(data) == LISTS
    assert list(prepare_dataset(data)) == LISTS


def test_names_of_their_own_several_columns_and_texts_between_lists(tmp_path):
    rows = [{"q": "a", "p": "b", "n1": ["c"], "n2": "d"}, {"q": "e", "p": ["f"], "n1": "g"}]
    path = write(tmp_path / "a.jsonl", [rows[0], {**rows[1], "n2": None}])
    data = load_training_data([path], columns=["q", "p", "n1", "n2"])
    assert list(data) == [
        {"sent0": "a", "sent1": ["b"], "hard_neg": ["c", "d"]},
        {"sent0": "e", "sent1": ["f"], "hard_neg": ["g"]},
    ]


def test_a_column_of_empty_negatives_is_none(tmp_path):
    path = write(tmp_path / "a.jsonl", [{**row, "neg": []} for row in ROWS])
    assert load_training_data([path]).column_names == ["sent0", "sent1"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"pos": []}, "column 'pos' is an empty list"),
        ({"pos": None}, "column 'pos' is null"),
        ({"pos": ["a", ""]}, "column 'pos' item 2 is empty"),
        ({"neg": ["a", 3]}, "column 'neg' item 2 is a number (3), expected text"),
        ({"query": ["a"]}, "column 'query' is a list (['a']), expected text"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_of_lists(change, problem, streaming, tmp_path):
    path = write(tmp_path / "a.jsonl", [ROWS[0], {**ROWS[1], **change}, ROWS[2]])
    fails(lambda: list(load_training_data([path], streaming=streaming)), f"row 2: {problem}")
    data = load_training_data([path], drop_invalid_rows=True, streaming=streaming)
    assert list(data) == [LISTS[0], LISTS[2]]


def tokens(text):
    return tiny_tokenizer()(text)["input_ids"]


def test_tokens_of_lists():
    data = tokenize_dataset(prepare_dataset(Dataset.from_list(ROWS)), tiny_tokenizer(),
                            max_seq_length=20)  # fmt: skip
    assert data.column_names == ["input_ids", "positives"]
    for found, row in zip(data, ROWS, strict=True):
        assert found["input_ids"] == [tokens(t) for t in (row["query"], *row["pos"], *row["neg"])]
        assert found["positives"] == len(row["pos"])


TEXTS = [[1], [2], [3], [4], [5], [6], [7]]


def test_draws_follow_from_seed_epoch_and_row():
    draws = ListDraws(seed=1, negatives=2)
    seen = set()
    for epoch in range(60):
        draws.epoch = epoch
        texts, others = draws(TEXTS, 3)
        assert (texts, others) == ListDraws(1, 2, epoch)(TEXTS, 3)
        assert texts[0] == [1]
        assert sorted([texts[1], *others]) == [[2], [3], [4]]
        assert len({*map(tuple, texts[2:])} & {(5,), (6,), (7,)}) == 2
        seen.add(str(texts))
    assert len(seen) == 3 * 3 * 2
    assert [ListDraws(2, 2, e)(TEXTS, 3) for e in range(9)] != [
        ListDraws(1, 2, e)(TEXTS, 3) for e in range(9)
    ]


def test_negatives_too_few_are_not_made_up():
    texts, others = ListDraws(0, 3)([[1], [2], [3]], 1)
    assert texts == [[1], [2], [3], None, None]
    assert others == []


def collate(negatives=2, **options):
    data = tokenize_dataset(prepare_dataset(Dataset.from_list(ROWS)), tiny_tokenizer(),
                            max_seq_length=20)  # fmt: skip
    collator = SimCSECollator(0, draws=ListDraws(3, negatives), **options)
    return collator([data[i] for i in range(3)])


def test_a_batch_of_lists_and_what_is_no_negative_in_it():
    batch = collate()
    assert batch["lengths"].shape == (4 * 3,)
    ids = batch["text_ids"]
    assert ids.shape == (4 + 3, 3)  # one id of no text, and at most two other positives
    assert (ids[4] == 0).all()
    assert ids[2:4, 1].tolist() == [0, 0]  # no negatives at all
    assert batch["lengths"].reshape(4, 3)[2:, 1].tolist() == [1, 1]
    masked = find_false_negatives(ids[:4], ids[4:])
    missing = ids[1:4].flatten() == 0
    assert missing.sum() == 3
    assert masked[:, missing].all()
    assert not masked[:, ~missing].any()


def naive_loss(views, ids, temperature=0.05):
    """As the definition has it: each anchor, and every candidate that is not to be left out."""
    count = views.shape[1]
    losses = []
    for i in range(count):
        anchor = torch.nn.functional.normalize(views[0, i], dim=-1)
        logits = []
        for c in range(1, len(views)):
            for j in range(count):
                left_out = {int(x) for x in ids[len(views) :, i]} | {int(ids[0, i]), int(ids[1, i])}
                own = (c, j) == (1, i)
                same = c == 1 and ids[0, j] == ids[0, i]
                if own or not (same or int(ids[c, j]) in left_out):
                    candidate = torch.nn.functional.normalize(views[c, j], dim=-1)
                    logits.append(anchor @ candidate / temperature)
                    if own:
                        positive = logits[-1]
        losses.append(torch.stack(logits).logsumexp(0) - positive)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("seed", range(5))
def test_the_loss_with_other_positives_is_that_of_the_definition(seed):
    torch.manual_seed(seed)
    views = torch.randn(4, 6, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 12, (4 + 3, 6))
    ids[4] = 0
    ids[0] = torch.arange(100, 106)
    ids[1][ids[1] == 0] = 99
    expected = naive_loss(views, ids)
    (gradient,) = torch.autograd.grad(expected, views)
    for loss in (
        ContrastiveObjective()(views, ids),
        *(
            info_nce(
                views[0],
                views[1:],
                temperature=0.05,
                text_ids=ids[:4],
                others=ids[4:],
                tile_size=tile_size,
            )
            for tile_size in (None, 4)
        ),
    ):
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
        (found,) = torch.autograd.grad(loss, views)
        assert torch.allclose(found, gradient, atol=1e-9)
