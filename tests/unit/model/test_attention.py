"""Packed equals padded, family by family, or the model says that it is padded."""

import pytest
import torch
from helpers.tiny import tiny_backbone

from simcse_trainer import SimCSEModel
from simcse_trainer.model.packing import build_batch, packing_indices

PACKED = ["bert", "roberta", "xlm-roberta", "distilbert", "electra", "modernbert"]
PADDED = ["mpnet", "deberta-v2"]
SENTENCES = [[2, 7, 8, 9, 3], [2, 3], [2, *range(10, 40), 3], [2, 5, 3]]


def embed(model, padding_free):
    batch = build_batch(SENTENCES, padding_free=padding_free, pad_token_id=0)
    return model(**batch).embeddings


def test_indices():
    found = packing_indices(torch.tensor([2, 3]))
    assert found["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert found["pad_index"].tolist() == [[0, 1, 0], [2, 3, 4]]
    assert found["key_mask"].tolist() == [[True, True, False], [True] * 3]
    assert found["unpad_index"].tolist() == [0, 1, 3, 4, 5]


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("pooling_mode", ["cls", "mean", "avg_first_last"])
def test_packed_equals_padded_in_value_and_gradient(family, pooling_mode):
    backbone = tiny_backbone(family).double()
    model = SimCSEModel(backbone, pooling_mode=pooling_mode).eval()
    assert model.padding_free
    results = []
    for padding_free in (True, False):
        embeddings = embed(model, padding_free)
        model.zero_grad()
        embeddings.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((embeddings.detach(), grads))
    (packed, packed_grads), (padded, padded_grads) = results
    torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-9)
    assert packed_grads.keys() == padded_grads.keys()
    for name, grad in padded_grads.items():
        limit = 1e-9 * float(grad.abs().max()) + 1e-8
        assert (packed_grads[name] - grad).abs().max() <= limit, name


@pytest.mark.parametrize("family", PADDED)
def test_a_family_that_ignores_the_interface_is_padded(family):
    model = SimCSEModel(tiny_backbone(family)).eval()
    assert not model.padding_free
    alone = torch.cat(
        [
            model(**build_batch([ids], padding_free=False, pad_token_id=0)).embeddings
            for ids in SENTENCES
        ]
    )
    torch.testing.assert_close(embed(model, False), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_a_packed_sentence_does_not_see_its_neighbours(family):
    model = SimCSEModel(tiny_backbone(family)).eval()
    together = embed(model, True)
    alone = [
        model(**build_batch([ids], padding_free=True, pad_token_id=0)).embeddings
        for ids in SENTENCES
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_causal_decoders_are_packed_too(family):
    changes = {"num_key_value_heads": 2, "pad_token_id": 0}
    changes |= {"sliding_window": 4} if family == "mistral" else {}
    model = SimCSEModel(tiny_backbone(family, **changes), pooling_mode="lasttoken").eval()
    assert model.padding_free
    torch.testing.assert_close(embed(model, True), embed(model, False), rtol=1e-4, atol=1e-4)


def test_a_direct_call_of_the_backbone_is_not_changed():
    backbone = tiny_backbone("bert").eval()
    batch = build_batch(SENTENCES, padding_free=False, pad_token_id=0)
    before = backbone(**batch).last_hidden_state
    SimCSEModel(backbone)
    torch.testing.assert_close(backbone(**batch).last_hidden_state, before)


def test_gradient_checkpointing_keeps_the_packing():
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = SimCSEModel(tiny_backbone("bert", **no_dropout)).train()
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.zero_grad()
        embed(model, True).square().sum().backward()
        grads.append(model.backbone.embeddings.word_embeddings.weight.grad.clone())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
