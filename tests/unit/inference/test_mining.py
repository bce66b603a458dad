"""Hard negatives: which passages they are, against sentence-transformers and by hand."""

import csv
import json
import random
from itertools import pairwise

import pytest
import torch
from helpers.checks import fails
from helpers.retrieval import random_texts
from helpers.tiny import tiny_config, tiny_tokenizer

from simcse_trainer import SimCSEModel
from simcse_trainer.data.loading import load_training_data
from simcse_trainer.inference import mining
from simcse_trainer.inference.mining import MiningOptions, mine_hard_negatives


def table(texts, seed=1, dimensions=8):
    """An encoder of random directions, all somewhat alike, as those of a model."""
    rows = torch.randn(len(texts), dimensions, generator=torch.Generator().manual_seed(seed)) + 0.7
    found = dict(zip(texts, rows, strict=True))
    return lambda wanted: torch.stack([found[text] for text in wanted])


def write_pairs(path, pairs, names=("sent0", "sent1")):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([names, *pairs])
    return path


def read(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def mine(tmp_path, pairs, encode, out="out.csv", **more):
    path = write_pairs(tmp_path / "pairs.csv", pairs)
    names = [name for name in ("corpus", "columns", "guide") if name in more]
    passed = {name: more.pop(name) for name in names}
    options = MiningOptions(**more)
    result = mine_hard_negatives(path, tmp_path / out, encode, encode, options=options, **passed)
    return result, tmp_path / out


def cosine(encode, a, b):
    return float(torch.cosine_similarity(encode([a])[0], encode([b])[0], dim=0))


@pytest.fixture
def texts():
    return random_texts(90, 3)


def some_pairs(texts, count=30, seed=1):
    """Some queries have several passages, and some passages several queries."""
    draw = random.Random(seed)
    pairs = [(query, draw.choice(texts[30:70])) for query in texts[:count] for _ in range(2)]
    return list(dict.fromkeys(pairs))


@pytest.mark.parametrize("block", [5, 10_000])
@pytest.mark.parametrize("with_corpus", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"num_negatives": 2, "relative_margin": 0.0},
        {"rank_min": 3, "rank_max": 7, "num_negatives": 3, "relative_margin": 0.0},
        {"margin": 0.1, "relative_margin": 0.2, "rank_max": 10},
        {"guide": 5, "num_negatives": 2, "rank_max": 8},
    ],
)
def test_by_hand(tmp_path, texts, options, with_corpus, block, monkeypatch):
    for name in ("_BLOCK_ROWS", "_BLOCK_TEXTS", "_BLOCK_PASSAGES", "_BLOCK_GUIDED"):
        monkeypatch.setattr(mining, name, block)
    encode, guide = table(texts), table(texts, seed=5)
    pairs = some_pairs(texts)
    passages = list(dict.fromkeys(passage for _, passage in pairs))
    more = {"short_rows": "drop", **options}
    if with_corpus:
        # Some of the positives, others, and a query: its own text is no negative of it.
        passages = [*texts[40:], texts[0], texts[45]]
        (tmp_path / "corpus.txt").write_text("\n".join(passages))
        more["corpus"] = tmp_path / "corpus.txt"
    if "guide" in options:
        more["guide"] = (guide, guide)
    result, out = mine(tmp_path, pairs, encode, **more)
    o = MiningOptions(**{k: v for k, v in options.items() if k != "guide"})
    expected = []
    for query, positive in pairs:
        own = {p for q, p in pairs if q == query} | {query}
        ranked = sorted(set(passages) - own, key=lambda p: -cosine(encode, query, p))
        score = cosine(encode, query, positive)
        limit = min(score - o.margin, score - o.relative_margin * abs(score))
        window = ranked[o.rank_min - 1 : o.rank_max]
        kept = [p for p in window if cosine(encode, query, p) <= limit]
        if "guide" in options:
            kept = [p for p in kept if cosine(guide, query, p) < cosine(guide, query, positive)]
        if len(kept) >= o.num_negatives:
            expected.append((query, positive, *kept[: o.num_negatives]))
    rows = read(out)
    assert [tuple(row[name] for name in result.columns) for row in rows] == expected
    assert 0 < len(expected) < len(pairs)
    assert (result.rows, result.dropped) == (len(expected), len(pairs) - len(expected))
    assert result.passages == len(set(passages))
    for row in rows:
        for name in result.columns[1:]:
            expected_score = cosine(encode, row["sent0"], row[name])
            assert float(row[f"score_{name}"]) == pytest.approx(expected_score, abs=2e-6)
    assert {path.name for path in tmp_path.iterdir()} <= {"pairs.csv", "out.csv", "corpus.txt"}


def test_the_negatives_of_sentence_transformers(tmp_path, texts):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives as reference
    from transformers import AutoModel

    pairs = list(zip(texts[:30], texts[30:60], strict=True))
    torch.manual_seed(0)
    backbone = AutoModel.from_config(tiny_config("bert"))  # weights that spread texts
    ours = SimCSEModel(backbone, tiny_tokenizer(), pooling_mode="mean")
    ours.save_pretrained(tmp_path / "model")
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    found = reference(
        Dataset.from_dict({"query": texts[:30], "answer": texts[30:60]}),
        theirs,
        range_max=29,  # all: it counts ranks after the margin
        absolute_margin=0.01,
        num_negatives=2,
        sampling_strategy="top",
        output_format="n-tuple",
        verbose=False,
    )
    _, out = mine(
        tmp_path,
        pairs,
        ours.encode,
        rank_max=29,
        margin=0.01,
        relative_margin=0.0,
        num_negatives=2,
        short_rows="drop",
    )
    rows = [tuple(row.values())[:4] for row in read(out)]
    assert rows == [tuple(row.values())[:4] for row in found]
    assert 0 < len(rows) < 30


@pytest.mark.parametrize("guided", [False, True])
def test_rows_with_too_few_are_filled_up_at_the_same_distance(tmp_path, texts, guided):
    encode, guide = table(texts), table(texts, seed=5)
    pairs = some_pairs(texts)
    more = {"rank_max": 3, "num_negatives": 3, "relative_margin": 0.3}
    if guided:
        more["guide"] = (guide, guide)
    result, out = mine(tmp_path, pairs, encode, **more)
    rows = read(out)
    assert result.filled > 0
    assert result.rows + result.dropped == len(pairs)
    for row in rows:
        own = {p for q, p in pairs if q == row["sent0"]} | {row["sent0"]}
        negatives = [row[f"hard_neg_{i}"] for i in (1, 2, 3)]
        assert len(set(negatives) - own) == 3
        for negative in negatives:
            limit = 0.7 * cosine(encode, row["sent0"], row["sent1"])
            assert cosine(encode, row["sent0"], negative) <= limit + 1e-6
            if guided:
                scores = [cosine(guide, row["sent0"], t) for t in (negative, row["sent1"])]
                assert scores[0] < scores[1]
    again, other = mine(tmp_path, pairs, encode, out="again.csv", **more)
    assert again.rows == result.rows
    assert other.read_bytes() == out.read_bytes()


@pytest.mark.parametrize("name", ["out.csv", "out.jsonl"])
@pytest.mark.parametrize("count", [1, 2])
def test_training_takes_the_file(tmp_path, name, count, caplog):
    texts = ['a "quoted", text', "한국어 문장", "two\nlines", "x\ty", "one", "two", "three", "four"]
    _, out = mine(
        tmp_path,
        list(pairwise(texts)),
        table(texts),
        out=name,
        num_negatives=count,
    )
    data = load_training_data([str(out)])
    negatives = ["hard_neg"] if count == 1 else ["hard_neg_1", "hard_neg_2"]
    assert data.column_names == ["sent0", "sent1", *negatives]
    assert set(data["sent0"]) <= set(texts)
    assert set(data[negatives[0]]) <= set(texts)
    assert "ignored" not in caplog.text
    if name.endswith("jsonl"):
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert {"score_sent1", f"score_{negatives[0]}"} < set(rows[0])


def test_texts_that_differ_in_white_space_are_equal(tmp_path):
    pairs = [("q", "an  answer"), ("q", "b"), ("r", "c"), ("r", "an answer "), ("s", "d")]
    encode = table(["q", "r", "s", "an  answer", "an answer ", "b", "c", "d"])
    result, out = mine(tmp_path, pairs, encode, relative_margin=0.0, short_rows="drop", rank_max=9)
    assert result.passages == 4
    for row in read(out):
        assert row["sent0"] == "s" or "answer" not in row["hard_neg"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_negatives": 0}, "num_negatives is 0"),
        ({"rank_min": 0}, "rank_min is 0"),
        ({"rank_min": 5, "rank_max": 6, "num_negatives": 3}, "rank_max is 6; expected 7 or more"),
        ({"margin": -1}, "margin is -1"),
        ({"relative_margin": 1.0}, "relative_margin is 1.0"),
        ({"short_rows": "keep"}, "short_rows is keep; expected random or drop"),
    ],
)
def test_options_that_cannot_be(options, said):
    fails(lambda: MiningOptions(**options), said)


def test_what_cannot_be_mined_leaves_nothing(tmp_path):
    encode = table(["q", "r", "a", "b"])
    pairs = [("q", "a"), ("q", "b")]
    fails(lambda: mine(tmp_path, pairs, encode), "none of the 2 rows has a negative among 2")
    fails(lambda: mine(tmp_path, pairs, encode, out="x.txt"), "neither .csv nor .jsonl")
    fails(lambda: mine(tmp_path, pairs, encode, out="gone/x.csv"), "a folder that exists")
    fails(lambda: mine(tmp_path, [], encode), "has no rows")
    (tmp_path / "corpus.txt").write_text("\n")
    more = {"corpus": tmp_path / "corpus.txt"}
    fails(lambda: mine(tmp_path, pairs, encode, **more), "corpus.txt has no texts")
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.csv", "corpus.txt"}


def test_a_kill_would_leave_one_empty_file(tmp_path, texts):
    seen = []
    encode = table(texts)

    def watched(wanted):
        seen.append({path.name: path.stat().st_size for path in tmp_path.iterdir()})
        return encode(wanted)

    mine(tmp_path, some_pairs(texts), watched)
    for found in seen:
        found.pop("pairs.csv")
        ((name, size),) = found.items()
        assert name.endswith(".unfinished")
        assert size == 0
