import math

import pytest
import torch
from helpers.checks import fails
from helpers.tiny import WORDS, tiny_backbone, tiny_tokenizer
from torch.nn import functional as F

from simcse_trainer import SimCSEModel
from simcse_trainer.analysis.space import (
    band_labels,
    different_sentences,
    encode_tokens,
    intra_sentence_similarity,
    measure_space,
)
from simcse_trainer.data.retrieval import RetrievalData
from simcse_trainer.evaluation.retrieval import evaluate_retrieval
from simcse_trainer.evaluation.space import alignment, anisotropy

GOLD = [0.0, 0.5, 1.5, 2.5, 4.0, 4.5, 5.0, 5.0]
LEFT = [" ".join(WORDS[i : i + 4]) for i in range(8)]
RIGHT = [" ".join(WORDS[i + 1 : i + 5]) for i in range(8)]
TASK = {"sentence1": LEFT, "sentence2": RIGHT, "score": GOLD}


@pytest.fixture
def model():
    return SimCSEModel(tiny_backbone(), tiny_tokenizer(), pooling_mode="mean")


def test_all_numbers_are_those_of_the_functions(model):
    space = measure_space(model, {"mine": TASK})
    assert space.pairs == [2, 1, 1, 1, 3]
    x, y = model.encode(LEFT).double(), model.encode(RIGHT).double()
    assert space.metrics["alignment"] == pytest.approx(alignment(x[5:], y[5:]), rel=1e-5)
    assert "mine_spearman" in space.metrics
    sentences = different_sentences({"mine": TASK})
    assert sentences == [*LEFT, RIGHT[-1]]  # the others are the left of the next pair
    unit = F.normalize(model.encode(sentences).double(), dim=-1)
    assert sum(s**2 for s in space.singular_values) == pytest.approx(len(sentences))
    assert space.singular_values[0] == pytest.approx(float(torch.linalg.norm(unit, 2)), rel=1e-5)
    assert 1 < space.effective_rank <= 9
    assert space.dimensions == 32
    # The density of a band with one pair peaks at its cosine.
    peak = space.grid[max(range(201), key=lambda i: space.densities[1][i])]
    assert peak == pytest.approx(float(F.cosine_similarity(x[2], y[2], dim=0)), abs=0.006)
    tokens = encode_tokens(model, sentences)
    assert space.layers["anisotropy"] == [anisotropy(states) for states in tokens.layers]
    assert space.layers["intra_sentence_similarity"][2] == pytest.approx(
        intra_sentence_similarity(tokens.layers[2], tokens.lengths, adjusted=True)
    )


def test_self_similarity_is_over_sentences_and_absent_without_enough_of_them(model):
    twice = ["dog dog dog dog dog dog", "cat"]
    few = {"sentence1": twice, "sentence2": ["a", "a"], "score": [1, 5]}
    assert "self_similarity" not in measure_space(model, {"few": few}).layers
    unknown = {"sentence1": ["x", "y z"], "sentence2": ["v", "w"], "score": [1, 5]}
    assert measure_space(model, {"unknown": unknown}).layers == {}
    many = {
        "sentence1": [f"dog {word}" for word in WORDS[:5]],
        "sentence2": ["a"] * 5,
        "score": [1, 2, 3, 4, 5],
    }
    assert len(measure_space(model, {"many": many}).layers["self_similarity"]) == 4


def test_a_band_without_pairs_has_no_density(model):
    space = measure_space(model, {"x": TASK | {"score": [0.0, 0.1, 0.2, 0.3, 4.1, 4.5, 5, 5]}})
    assert [len(row) for row in space.densities] == [201, 0, 0, 0, 201]


def test_bands_are_called_by_their_scores():
    assert band_labels({"x": TASK})[0::4] == ["0–1", "4–5"]
    assert band_labels({"x": {"score": [0.2, 0.9]}})[1] == "0.2–0.4"
    assert band_labels({"x": TASK, "y": {"score": [0.2, 0.9]}})[4] == "80–100 %"


def test_what_is_no_number_is_named(model):
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    fails(lambda: measure_space(model, {"x": TASK}), "is not finite")


def test_of_retrieval_the_space_is_that_of_queries_and_a_passage_of_each(model):
    passages = [*RIGHT, "cat dog"]
    relevant = [frozenset({i, -1}) for i in range(8)]
    data = RetrievalData(LEFT, relevant, 9, lambda: iter(enumerate(passages)))
    space = measure_space(model, {"faq": data})
    expected = evaluate_retrieval(model.encode, model.encode, {"faq": data})
    assert {name: space.metrics[name] for name in expected} == pytest.approx(expected)
    x, y = model.encode(LEFT).double(), model.encode(RIGHT).double()
    assert space.metrics["alignment"] == pytest.approx(alignment(x, y), rel=1e-5)
    assert different_sentences({"faq": data}) == [*LEFT, RIGHT[-1]]
    assert space.densities == space.pairs == []
    assert [len(found) for found in space.rankings["faq"]] == [9] * 8
    # Of both kinds the space is that of the scored pairs.
    both = measure_space(model, {"faq": data, "mine": TASK})
    assert both.metrics["faq_ndcg_at_10"] == space.metrics["faq_ndcg_at_10"]
    assert both.pairs == [2, 1, 1, 1, 3]
    lost = RetrievalData(LEFT[:2], [frozenset({-1})] * 2, 1, lambda: iter(enumerate(["a"])))
    fails(lambda: measure_space(model, {"lost": lost}), "corpus-id")


def test_the_map_is_the_same_every_time_and_neighbours_are_near(model):
    places = measure_space(model, {"mine": TASK}).places
    assert places == measure_space(model, {"mine": TASK}).places
    assert list(places) == [*LEFT, RIGHT[-1]]
    assert all(0 <= part <= 1 for place in places.values() for part in place)
    few = {side: TASK[side][:3] for side in TASK}
    assert measure_space(model, {"few": few}).places == {}
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            parameter.fill_(1.0 if name.endswith("LayerNorm.bias") else 0.0)
    collapsed = measure_space(model, {"mine": TASK}).places
    assert all(math.isfinite(part) for place in collapsed.values() for part in place)
