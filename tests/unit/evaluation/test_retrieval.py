"""Retrieval from pairs and from BEIR's folders, against sentence-transformers' evaluator."""

import gzip
import logging
import random

import pytest
import torch
from helpers.checks import fails
from helpers.retrieval import random_texts, reference, write_beir
from helpers.tiny import tiny_backbone, tiny_tokenizer

from simcse_trainer import SimCSEModel
from simcse_trainer.data.retrieval import load_beir, pairs_to_retrieval, read_pairs
from simcse_trainer.evaluation import retrieval
from simcse_trainer.evaluation.retrieval import (
    evaluate_retrieval,
    find_nearest,
    score_queries,
    score_rankings,
)
from simcse_trainer.evaluation.suite import score_tasks
from simcse_trainer.evaluation.tasks import RETRIEVAL_METRICS


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model, as it is here and in sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    folder = tmp_path_factory.mktemp("model")
    ours = SimCSEModel(tiny_backbone(), tiny_tokenizer(), pooling_mode="mean")
    ours.save_pretrained(folder)
    return ours, SentenceTransformer(str(folder), device="cpu")


def evaluate(model, data):
    found = evaluate_retrieval(model.encode, model.encode, {"x": data})
    return {name: found[f"x_{name}"] for name in RETRIEVAL_METRICS}


def agrees(found, expected):
    assert found == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["recall_at_10"] < 100  # a figure that could have been another


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("block", [7, 1000])
def test_pairs_score_as_in_sentence_transformers(models, seed, block, monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK_PASSAGES", block)
    monkeypatch.setattr(retrieval, "_BLOCK_QUERIES", block)
    texts = random_texts(90, seed)
    draw = random.Random(seed)
    queries, passages = texts[:30], texts[30:]
    # Several passages of a query, and several queries of a passage.
    pairs = [(q, draw.choice(passages)) for q in queries for _ in range(draw.randint(1, 4))]
    pairs += [(query, passage) for query, passage in zip(queries, passages, strict=False)]
    ids = {text: f"{i:03}" for i, text in enumerate(dict.fromkeys(p for _, p in pairs))}
    relevant: dict[str, set[str]] = {}
    for query, passage in pairs:
        relevant.setdefault(query, set()).add(ids[passage])
    ours, theirs = models
    expected = reference(
        theirs, {q: q for q in queries}, {i: text for text, i in ids.items()}, relevant
    )
    agrees(evaluate(ours, pairs_to_retrieval(pairs, source="pairs")), expected)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_beirs_folder_scores_as_in_sentence_transformers(models, seed, tmp_path, caplog):
    draw = random.Random(seed)
    texts = random_texts(120, seed)
    names = [f"d{i}" for i in range(90)]
    draw.shuffle(names)  # ids are not in the order of the file
    corpus = dict(zip(names, texts[:90], strict=True))
    corpus[names[7]] = ("dog cat", corpus[names[7]])
    queries = {f"q{i}": text for i, text in enumerate(texts[90:])}
    qrels = [(q, draw.choice(names), draw.randint(0, 3)) for q in queries for _ in range(3)]
    qrels = list({(q, d): (q, d, grade) for q, d, grade in qrels}.values())
    qrels += [("q1", "gone", 2), ("nobody", names[0], 1), ("q2", names[1], 1), ("q3", names[1], 1)]
    data = load_beir(write_beir(tmp_path, corpus, queries, qrels), "test")
    relevant: dict[str, set[str]] = {}
    for query, passage, grade in qrels:
        if grade > 0:
            relevant.setdefault(query, set()).add(passage)
    shown = {n: f"{t[0]} {t[1]}" if isinstance(t, tuple) else t for n, t in corpus.items()}
    agrees(evaluate(models[0], data), reference(models[1], queries, shown, relevant))
    assert data.passages == 90
    assert "left out 1 judged queries" in caplog.text
    assert "'gone', are not in the corpus" in caplog.text


class Table:
    """Embeddings by text, for ours and for the reference: ties are then exact."""

    similarity_fn_name = "cosine"

    def __init__(self, table):
        self.table = {text: torch.tensor(row, dtype=torch.float32) for text, row in table.items()}

    def encode(self, texts, **_):
        return torch.stack([self.table[text] for text in texts])

    encode_query = encode_document = encode

    def similarity(self, a, b):
        return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T

    class model_card_data:
        @staticmethod
        def set_evaluation_metrics(*_, **__):
            pass


@pytest.mark.parametrize("block", [3, 100])
def test_of_equal_scores_the_smaller_id_is_first(block, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval, "BLOCK_PASSAGES", block)
    names = [f"{i * 7 % 30:02}" for i in range(30)]  # in an order of their own
    corpus = {name: f"text {name}" for name in names}
    # Fifteen passages at each of two distances: the cut at ten is inside of a tie.
    table = {text: [1.0, 0.0] if int(name) % 2 else [0.0, 1.0] for name, text in corpus.items()}
    queries = {"a": "first", "b": "second"}
    table |= {"first": [2.0, 0.0], "second": [0.0, 4.0]}
    qrels = [("a", "05", 1), ("a", "21", 1), ("a", "29", 1), ("b", "18", 1), ("b", "06", 1)]
    data = load_beir(write_beir(tmp_path, corpus, queries, qrels), "test")
    relevant = {"a": {"05", "21", "29"}, "b": {"18", "06"}}
    model = Table(table)
    agrees(evaluate(model, data), reference(model, queries, corpus, relevant))
    nearest = find_nearest(
        torch.tensor([[1.0, 0.0]]),
        [
            (torch.tensor([2, 5]), torch.eye(2)[[0, 0]]),
            (torch.tensor([1, 3]), torch.eye(2)[[0, 1]]),
        ],
        3,
    )
    assert nearest[1].tolist() == [[1, 2, 5]]


def test_what_is_excluded_is_not_found():
    passages = torch.eye(4)[[0, 0, 1, 2]]
    blocks = [(torch.tensor([0, 1]), passages[:2]), (torch.tensor([2, 3]), passages[2:])]
    queries = torch.eye(4)[[0, 1]]
    scores, found = find_nearest(queries, blocks, 2, torch.tensor([[0, 0], [1, 2], [1, 9]]))
    assert found.tolist() == [[1, 2], [0, 1]]
    assert scores.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_the_metrics_by_hand():
    rankings = [[3, 1, 2], [4, 5, 6]]
    found = score_rankings(rankings, [frozenset({1, 7}), frozenset({4})])
    log = torch.log2(torch.tensor(3.0)).item()
    assert found == pytest.approx(
        {
            "recall_at_1": 50.0,
            "recall_at_5": 75.0,
            "recall_at_10": 75.0,
            "mrr_at_10": 75.0,
            "ndcg_at_10": 50 * (1 / log / (1 + 1 / log) + 1),
        }
    )


def test_what_each_query_finds_is_kept_in_the_order_of_the_queries(models):
    texts = random_texts(60, 5)
    data = pairs_to_retrieval(zip(texts, texts[30:], strict=False), source="pairs")
    scored = score_tasks(models[0].encode, {"x": data})
    assert scored.metrics == evaluate_retrieval(models[0].encode, models[0].encode, {"x": data})
    assert len(scored.gains["x"]) == len(data.queries) == 30
    mean = 100 * sum(scored.gains["x"]) / 30
    assert scored.metrics["x_ndcg_at_10"] == pytest.approx(mean, abs=1e-10)
    found = score_queries([[3, 1], [0, 2]], [frozenset({3}), frozenset({1})])
    assert found["ndcg_at_10"] == found["recall_at_1"] == [1.0, 0.0]


def test_equal_texts_are_one_passage_also_in_the_corpus(tmp_path, caplog):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("b\nnew\nnew\nother\n")
    pairs = [("q", "a"), ("q", "b"), ("r", "b"), ("r", "b"), ("s", "c")]
    data = pairs_to_retrieval(pairs, source="pairs", corpus=corpus)
    assert list(data.read_passages()) == [*enumerate(["a", "b", "c", "new", "other"])]
    assert data.passages == 5
    assert [sorted(numbers) for numbers in data.relevant] == [[0, 1], [1], [2]]
    assert "only 5 passages, so that recall@10 is 100 for any model" in caplog.text


def test_several_tasks_have_a_mean_and_queries_a_function_of_their_own():
    table = {name: torch.nn.functional.one_hot(torch.tensor(i), 4) for i, name in enumerate("abcd")}
    asked = {"queries": [], "passages": []}

    def encoder(kind):
        return lambda texts: (
            asked[kind].extend(texts),
            torch.stack([table[text.lower()] for text in texts]).float(),
        )[1]

    right = pairs_to_retrieval([("A", "a"), ("B", "b")], source="x")
    wrong = pairs_to_retrieval([("A", "b"), ("B", "a"), ("C", "c"), ("D", "d")], source="y")
    found = evaluate_retrieval(encoder("queries"), encoder("passages"), {"x": right, "y": wrong})
    assert found["x_recall_at_1"] == 100
    assert found["y_recall_at_1"] == 50
    assert found["recall_at_1"] == 75
    assert asked == {"queries": [*"ABABCD"], "passages": [*"abbacd"]}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("sent0,sent1\nq,a\n", "found 1 rows with 1 different queries, and 1 different passages"),
        ("sent0,sent1\nq,a\nr,a\n", "expected 2 or more of both"),
        ("sent0,sent1\na,a\nb,b\nc,c\n", "each of the 3 queries equals its passage"),
        ("sent0,sent1\nq,a\nr,\n", "row 3: column 'sent1' is empty"),
        ("x,y,z\n1,2,3\n", "which columns are the queries"),
        ("a,score\nq,1\n", "which columns are the queries"),
    ],
)
def test_pairs_that_cannot_be_used_are_one_line(rows, said, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(rows)
    fails(lambda: pairs_to_retrieval(read_pairs(path), source=str(path)), path, said)


@pytest.mark.parametrize(
    ("header", "columns", "expected"),
    [
        ("sent0,sent1,hard_neg", None, ("1", "2")),
        ("positive,query,id", None, ("2", "1")),
        ("frage,antwort", None, ("1", "2")),
        ("id,antwort,frage", ["frage", "antwort"], ("3", "2")),
    ],
)
def test_columns_of_pairs(header, columns, expected, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(f"{header}\n{','.join('123'[: header.count(',') + 1])}\n")
    assert list(read_pairs(path, columns)) == [expected]
    fails(lambda: list(read_pairs(path, ["nothing", "here"])), "no column 'nothing'", "columns")


def test_a_split_by_either_name_and_compressed_files(tmp_path):
    write_beir(tmp_path, {"1": "a", "2": "b"}, {"1": "q"}, [("1", "2", 1)], split="dev")
    plain = tmp_path / "corpus.jsonl"
    (tmp_path / "corpus.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert load_beir(tmp_path, "validation").queries == ["q"]
    fails(
        lambda: load_beir(tmp_path, "test", split_option="--eval_split"),
        "test.tsv is not there; found dev. Pass eval_split dev.",
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"qrels": [("1", "2", 0)]}, "no row has a score above 0"),
        ({"qrels": [("9", "2", 1)]}, "none of the 1 judged queries is in queries.jsonl"),
        ({"qrels": [("1", "2", "high")]}, "test.tsv row 2: column 'score' is 'high'"),
        ({"corpus": {"1": "a", "2": None}}, "corpus.jsonl row 2: 'text' is"),
        ({"corpus": {None: "a"}}, "corpus.jsonl row 1: there is no '_id'"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(change, said, tmp_path):
    good = {"corpus": {"1": "a", "2": "b"}, "queries": {"1": "q"}, "qrels": [("1", "2", 1)]}
    write_beir(tmp_path, **(good | change))
    if None in change.get("corpus", {}):  # json.dumps makes a text of such a key
        (tmp_path / "corpus.jsonl").write_text('{"text": "a"}\n')
    fails(lambda: load_beir(tmp_path, "test"), said)


def test_an_id_that_is_there_twice_and_files_that_are_not(tmp_path):
    write_beir(tmp_path, {"1": "a"}, {"1": "q"}, [("1", "1", 1)])
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write('{"_id": 1, "text": "b"}\n')
    fails(lambda: load_beir(tmp_path, "test"), "_id '1' is there twice")
    (tmp_path / "queries.jsonl").unlink()
    fails(lambda: load_beir(tmp_path, "test"), "queries.jsonl is not there")


def test_a_passage_without_words_is_one(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    write_beir(tmp_path, {"1": "", "2": ("title", "")}, {"1": "q"}, [("1", "2", 1)])
    assert list(load_beir(tmp_path, "test").read_passages()) == [(0, ""), (1, "title")]
    assert not caplog.records


@pytest.mark.real_weights
@pytest.mark.slow
def test_a_real_corpus_scores_as_in_sentence_transformers(minilm, nli_dir, tmp_path):
    from sentence_transformers import SentenceTransformer

    pairs = list(read_pairs(nli_dir / "sick-entailment-pairs.csv"))[:400]
    ours = SimCSEModel.from_pretrained(minilm)
    ours.save_pretrained(tmp_path / "model")
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    data = pairs_to_retrieval(pairs, source="pairs")
    corpus = {f"{number:04}": text for number, text in data.read_passages()}
    queries = {f"q{i}": text for i, text in enumerate(data.queries)}
    relevant = {
        f"q{i}": {f"{number:04}" for number in numbers} for i, numbers in enumerate(data.relevant)
    }
    agrees(evaluate(ours, data), reference(theirs, queries, corpus, relevant))
