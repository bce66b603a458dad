"""`SimCSE`: what the original tool offers, with its names, and what it gives is the model's."""

import inspect
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from helpers.checks import fails
from helpers.tiny import WORDS, save_tiny, tiny_backbone, tiny_tokenizer
from torch.nn.functional import normalize

from simcse_trainer import SimCSE, SimCSEModel
from simcse_trainer.inference import simcse as module
from simcse_trainer.model.heads import ProjectionHead

TEXTS = [" ".join(WORDS[(i * 5 + k * k) % 17] for k in range(1 + i % 7)) for i in range(40)]


@pytest.fixture
def folder(tmp_path):
    head = ProjectionHead(32, 32)
    model = SimCSEModel(
        tiny_backbone(), tiny_tokenizer(), head=head, mlp_only_train=False, max_seq_length=20
    )
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tool(folder):
    return SimCSE(folder)


def test_names_order_and_defaults_are_those_of_the_original():
    """max_length too is 128, unless the folder knows better: see test_lengths."""

    def old_arguments(function):
        parameters = inspect.signature(function).parameters.values()
        kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
        return [(p.name, p.default) for p in parameters if p.kind not in kinds][1:]

    needed = inspect.Parameter.empty
    assert old_arguments(SimCSE.__init__) == [
        ("model_name_or_path", needed),
        ("device", None),
        ("num_cells", 100),
        ("num_cells_in_search", 10),
        ("pooler", None),
    ]
    assert old_arguments(SimCSE.encode) == [
        ("sentence", needed),
        ("device", None),
        ("return_numpy", False),
        ("normalize_to_unit", True),
        ("keepdim", False),
        ("batch_size", 64),
        ("max_length", None),
    ]
    assert old_arguments(SimCSE.similarity) == [
        ("queries", needed),
        ("keys", needed),
        ("device", None),
    ]
    assert old_arguments(SimCSE.build_index) == [
        ("sentences_or_file_path", needed),
        ("use_faiss", None),
        ("faiss_fast", False),
        ("device", None),
        ("batch_size", 64),
    ]
    assert old_arguments(SimCSE.search) == [
        ("queries", needed),
        ("device", None),
        ("threshold", 0.6),
        ("top_k", 5),
    ]


def test_the_snippets_of_the_originals_readme(tool):
    model = tool
    embeddings = model.encode("A woman is reading.")
    assert embeddings.shape == (32,)
    sentences_a = ["A woman is reading.", "A man is playing a guitar."]
    sentences_b = ["He plays guitar.", "A woman is making a photo."]
    similarities = model.similarity(sentences_a, sentences_b)
    assert similarities.shape == (2, 2)
    sentences = ["A woman is reading.", "A man is playing a guitar."]
    model.build_index(sentences)
    results = model.search("He plays guitar.")
    assert {sentence for sentence, score in results} <= set(sentences)
    assert all(score >= 0.6 for sentence, score in results)


def test_embeddings_are_the_models(tool, folder, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_SENTENCES", 7)
    plain = SimCSEModel.from_pretrained(folder).encode(TEXTS)
    torch.testing.assert_close(tool.encode(TEXTS, normalize_to_unit=False), plain)
    unit = tool.encode(TEXTS, batch_size=3)
    torch.testing.assert_close(unit, normalize(plain, dim=1))
    found = tool.encode(TEXTS[0], return_numpy=True)
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, unit[0].numpy(), atol=1e-6)
    assert tool.encode(TEXTS[0], keepdim=True).shape == (1, 32)
    assert tool.encode([TEXTS[0]]).shape == (1, 32)
    assert tool.encode([]).shape == (0, 32)
    assert tool.encode(tuple(TEXTS[:2]), "cpu", True).shape == (2, 32)
    short = SimCSE(folder, truncate_dim=8).encode(TEXTS)
    torch.testing.assert_close(short, normalize(plain[:, :8], dim=1))


def test_empty_and_long_texts(tool):
    empty, blank, long, longer = tool.encode(["", "   ", "dog " * 18, "dog " * 500])
    assert torch.isfinite(empty).all()
    torch.testing.assert_close(empty, blank)
    torch.testing.assert_close(long, longer)  # 18 words and two special tokens are the 20
    torch.testing.assert_close(
        tool.encode("dog cat man", max_length=3), tool.encode("dog", max_length=3)
    )
    assert tool.model.max_seq_length == 20


def test_lengths_are_the_folders_or_the_originals(folder, tmp_path):
    assert SimCSE(folder).model.max_seq_length == 20
    plain = save_tiny(tmp_path / "plain", max_position_embeddings=300)
    assert SimCSEModel.from_pretrained(plain).max_seq_length == 40  # the tokenizer's
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 10**30
    plain = save_tiny(tmp_path / "plain", tokenizer=tokenizer, max_position_embeddings=300)
    assert SimCSEModel.from_pretrained(plain).max_seq_length == 300
    assert SimCSE(plain).model.max_seq_length == 128
    assert SimCSE(plain, max_seq_length=200).model.max_seq_length == 200


def test_what_is_no_text_is_named(tool, folder):
    fails(lambda: tool.encode(["a", None]), "Sentence 1 is NoneType (None), expected a text")
    fails(lambda: tool.encode(["a"] * 5000 + [3.5]), "Sentence 5000 is float (3.5)")
    fails(lambda: tool.model.encode(pd.Series(["a", float("nan")])), "Sentence 1 is float (nan)")
    fails(lambda: tool.encode(np.array([["a", "b"]])), "Sentence 0 is ndarray")
    fails(lambda: tool.encode([b"a"]), "Sentence 0 is bytes (b'a')")
    fails(lambda: tool.encode(["a", "b\ud800"]), "Sentence 1 holds U+D800 at position 1")
    fails(lambda: tool.encode("a", max_length=41), "takes 2 to 40")
    fails(lambda: tool.encode("a", batch_size=0), "batch_size is 0")
    fails(lambda: tool.encode("a", device="cuda:77"), "device is 'cuda:77', which is not there")
    fails(lambda: SimCSE(folder, device="nonsense"), "device is 'nonsense'")
    fails(lambda: SimCSE(folder, truncate_dim=33), "truncate_dim is 33; expected 1 to 32")
    fails(lambda: SimCSE(folder, pooler="sum"), "pooler is 'sum'; expected one of cls, cls_before")


@pytest.mark.parametrize("encode", [lambda t, x: t.encode(x), lambda t, x: t.model.encode(x)])
def test_whatever_holds_texts_in_an_order_is_taken(tool, encode):
    texts = TEXTS[:5]
    expected = encode(tool, texts)
    series = pd.Series(texts, index=[9, 4, 4, 0, 2])
    for given in (
        tuple(texts),
        np.array(texts),
        np.array(texts, dtype=object),
        series,
        series.astype("string"),
        series.to_numpy(),
        Dataset.from_dict({"text": texts})["text"],
        (text for text in texts),
    ):
        assert torch.equal(encode(tool, given), expected)
    assert encode(tool, np.array(texts)[0]).shape == (32,)
    assert tool.similarity(series, np.array(texts)).shape == (5, 5)
    tool.build_index(series)
    (hits, _) = tool.search(np.array(texts[:2]), top_k=1)
    assert hits[0][0] == texts[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (None, "sentences is a NoneType (None), expected a text or several in an order"),
        (7, "sentences is a int (7)"),
        (b"text", "sentences is a bytes"),
        ({"a": "b"}, "sentences is a dict"),
        ({"a", "b"}, "sentences is a set"),
        (np.array("a"), "sentences is a ndarray"),
        (pd.DataFrame({"text": ["a"]}), "sentences is a DataFrame, a table. Pass one column"),
        (Dataset.from_dict({"text": ["a"]}), "sentences is a Dataset, a table. Pass one column"),
    ],
)
def test_what_holds_no_texts_in_an_order_is_refused(tool, given, said):
    for call in (tool.encode, tool.model.encode, tool.build_index, lambda x: tool.search(x)):
        tool.build_index(["a"])
        fails(lambda call=call: call(given), said)


def test_a_model_is_taken_as_it_is(folder):
    model = SimCSEModel.from_pretrained(folder, max_seq_length=7)
    tool = SimCSE(model)
    assert tool.model is model
    assert tool.model.max_seq_length == 7
    assert not model.training
    assert tool.device == model.device
    assert torch.equal(tool.encode(TEXTS), normalize(model.encode(TEXTS), dim=1))
    fails(lambda: SimCSE(model, max_seq_length=9), "max_seq_length cannot be set for a SimCSEModel")
    fails(lambda: SimCSE(model, pooler="avg"), "pooling_mode, projection_head cannot be set")
    assert SimCSE(model, truncate_dim=3).encode("a").shape == (3,)


def test_what_it_is_is_shown(tool, folder):
    assert repr(tool) == f"SimCSE({str(folder)!r}, device='cpu', D=32)"
    tool.build_index(TEXTS[:3], storage="int8")
    assert repr(tool).endswith("D=32, index of 3)")
    assert repr(tool.index) == "Index(3 sentences, Vectors(3 of 32 dimensions, int8))"
    assert "pooling_mode='cls', mlp_only_train=False, max_seq_length=20" in repr(tool.model)


def test_the_options_are_in_the_signature():
    names = {"truncate_dim", "max_seq_length", "revision", "token"}
    assert names <= {*inspect.signature(SimCSE).parameters}


def test_similarities(tool):
    vectors = tool.encode(TEXTS[:5], return_numpy=True)
    expected = vectors @ vectors[:3].T
    for queries in (TEXTS[:5], vectors, 3 * vectors, tool.encode(TEXTS[:5])):
        for keys in (TEXTS[:3], vectors[:3], np.array(TEXTS[:3])):
            np.testing.assert_allclose(tool.similarity(queries, keys), expected, atol=1e-5)
    np.testing.assert_allclose(tool.similarity(TEXTS[1], TEXTS[:3]), expected[1], atol=1e-5)
    assert tool.similarity(TEXTS[:5], TEXTS[1]).shape == (5, 1)
    one = tool.similarity(TEXTS[0], TEXTS[1])
    assert type(one) is float
    assert one == pytest.approx(expected[0, 1], abs=1e-5)
    fails(lambda: tool.similarity("a", vectors[:, :5]), "The queries have 32 dimensions and the")


def bert_with_pooler(folder):
    from transformers import AutoModel

    tiny_backbone().save_pretrained(folder)  # large weights, no pooler
    model = AutoModel.from_pretrained(folder)
    torch.nn.init.normal_(model.pooler.dense.weight, std=0.3)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "pooler", "of"),
    [
        ("sup-simcse-bert-base-uncased", None, "pooler"),
        ("unsup-simcse-bert-base-uncased", None, "cls"),
        ("sup-simcse-bert-base-uncased", "cls_before_pooler", "cls"),
        ("my-checkpoint", "cls", "pooler"),
        ("my-checkpoint", "cls_before_pooler", "cls"),
        ("my-checkpoint", "avg", "mean"),
        ("my-checkpoint", "avg_top2", "top2"),
        ("my-checkpoint", "avg_first_last", "ends"),
    ],
)
def test_released_checkpoints_and_poolers(tmp_path, name, pooler, of):
    model = bert_with_pooler(tmp_path / name)
    found = SimCSE(tmp_path / name, pooler=pooler).encode("a man", normalize_to_unit=False)
    inputs = tiny_tokenizer()("a man", return_tensors="pt")
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    layers = [states[0] for states in out.hidden_states]
    expected = {
        "pooler": out.pooler_output[0],
        "cls": layers[-1][0],
        "mean": layers[-1].mean(0),
        "top2": (layers[-1] + layers[-2]).mean(0) / 2,
        "ends": (layers[-1] + layers[1]).mean(0) / 2,
    }
    torch.testing.assert_close(found, expected[of], atol=1e-5, rtol=1e-5)


def test_threads_get_what_they_would_get_alone(tool):
    """Lengths differ, so that a tokenizer or a model shared without a lock would show."""
    tool.build_index(TEXTS)
    lengths = [3, 5, 8, 20]
    expected = {n: tool.encode(TEXTS, max_length=n) for n in lengths}
    hits = tool.search(TEXTS, threshold=-1)
    failures = []

    def work(length):
        try:
            for _ in range(6):
                torch.testing.assert_close(
                    tool.encode(TEXTS, max_length=length), expected[length], atol=0, rtol=0
                )
                assert tool.search(TEXTS, threshold=-1) == hits
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in lengths * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert tool.model.max_seq_length == 20
    assert not tool.model.training


@pytest.mark.real_weights
def test_real_sentences_find_their_like(minilm):
    model = SimCSE(minilm)
    sentences = ["A woman is reading.", "A man is playing a guitar.", "The stock market fell."]
    model.build_index(sentences)
    ((sentence, score),) = model.search("He plays guitar.", threshold=0.5)
    assert sentence == sentences[1]
    assert score == pytest.approx(model.similarity("He plays guitar.", sentence), abs=1e-5)
