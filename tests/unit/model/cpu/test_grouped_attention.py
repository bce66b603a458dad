"""Attention by groups of like length: the same as by one rectangle, in value and gradient."""

import pytest
import torch
from helpers.tiny import tiny_backbone
from torch.nn import functional as F

from simcse_trainer import SimCSEModel
from simcse_trainer.model.cpu.attention import grouped_attention
from simcse_trainer.model.packing import (
    build_batch,
    grouped_packing_indices,
    plan_chunks,
    split_batch,
)

LENGTHS = torch.randint(1, 30, (70,), generator=torch.Generator().manual_seed(0))
LENGTHS[7] = 1
SENTENCES = [[2, *range(5, 3 + n), 3][:n] for n in LENGTHS.tolist()]


def test_each_place_holds_its_token_and_each_token_finds_its_place():
    found = grouped_packing_indices(LENGTHS)
    shapes = found["group_shapes"]
    assert len(shapes) == 3
    assert sum(n for n, _ in shapes) == len(LENGTHS)
    tokens = torch.arange(int(LENGTHS.sum()))
    assert found["pad_index"][found["unpad_index"]].tolist() == tokens.tolist()
    assert int(found["key_mask"].sum()) == len(tokens)
    assert len(found["pad_index"]) == sum(n * length for n, length in shapes)
    expected = [k for n in LENGTHS.tolist() for k in range(n)]
    assert found["position_ids"].tolist() == [expected]


def test_groups_hold_less_padding_than_one_rectangle():
    found = grouped_packing_indices(LENGTHS)
    assert len(found["pad_index"]) < 0.7 * len(LENGTHS) * int(LENGTHS.max())


def test_where_groups_save_nothing_there_is_one():
    assert grouped_packing_indices(torch.tensor([3, 1]))["group_shapes"] == ((2, 3),)
    assert grouped_packing_indices(torch.tensor([9] * 70))["group_shapes"] == ((70, 9),)


def build_inputs(heads=2, size=3, key_heads=None, causal=False):
    indices = grouped_packing_indices(LENGTHS[:40])
    generator = torch.Generator().manual_seed(1)
    total = int(LENGTHS[:40].sum())
    qkv = [
        torch.randn((total, n, size), generator=generator, dtype=torch.float64, requires_grad=True)
        for n in (heads, key_heads or heads, key_heads or heads)
    ]
    parts = indices["key_mask"].split([n * length for n, length in indices["group_shapes"]])
    masks = [
        p.view(shape)[:, None] for p, shape in zip(parts, indices["group_shapes"], strict=True)
    ]
    if causal:
        masks = [mask & torch.ones(mask.shape[-1:] * 2).tril().bool() for mask in masks]
    picked = {name: indices[name] for name in ("pad_index", "unpad_index", "key_mask")}
    return qkv, masks, picked


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 1), (6, 2)])
def test_it_is_each_sentence_by_itself(heads, key_heads, causal):
    qkv, masks, indices = build_inputs(heads, key_heads=key_heads, causal=causal)
    found = grouped_attention(*qkv, masks, **indices)
    parts = [x.split(LENGTHS[:40].tolist()) for x in qkv]
    alone = [
        F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in one), is_causal=causal, enable_gqa=True
        )[0].transpose(0, 1)
        for one in zip(*parts, strict=True)
    ]
    torch.testing.assert_close(found, torch.cat(alone))


@pytest.mark.parametrize("key_heads", [2, 1])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_gradient_is_that_of_the_value(dropout, key_heads):
    qkv, masks, indices = build_inputs(size=2, key_heads=key_heads, causal=key_heads == 1)

    def attend(*qkv):
        torch.manual_seed(0)  # the same weights are dropped each time
        return grouped_attention(*qkv, masks, dropout=dropout, **indices)

    torch.manual_seed(0)
    assert torch.autograd.gradcheck(attend, qkv, fast_mode=True)


def test_dropout_drops_its_share_of_the_weights_and_keeps_their_mean():
    qkv, masks, indices = build_inputs()
    query, key, value = (x.detach() for x in qkv)
    torch.manual_seed(0)
    ones = torch.ones_like(value)
    runs = torch.stack(
        [grouped_attention(query, key, ones, masks, dropout=0.25, **indices) for _ in range(200)]
    )
    # The weights of a query sum to 1, and of values that are 1 the output is their sum.
    assert float(runs.mean()) == pytest.approx(1, abs=0.01)
    # The only weight of a sentence of one token is 1: dropped, its output is 0.
    alone = runs[:, int(LENGTHS[:7].sum())]
    assert float((alone == 0).double().mean()) == pytest.approx(0.25, abs=0.1)


@pytest.mark.parametrize(
    ("family", "changes", "pooling_mode"),
    [
        ("bert", {}, "mean"),
        ("roberta", {}, "cls"),
        ("modernbert", {}, "mean"),  # local attention
        ("llama", {"num_key_value_heads": 2, "pad_token_id": 0}, "lasttoken"),  # shared keys
        ("mistral", {"sliding_window": 4, "num_key_value_heads": 2}, "lasttoken"),
    ],
)
def test_a_model_computes_the_same_by_groups(family, changes, pooling_mode):
    model = SimCSEModel(tiny_backbone(family, **changes).double(), pooling_mode=pooling_mode)
    model.dropout = False
    model.train()
    results = []
    for grouped in (True, False):
        batch = build_batch(SENTENCES, padding_free=True, pad_token_id=0, grouped=grouped)
        embeddings = model(**batch).embeddings
        model.zero_grad()
        embeddings.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((embeddings.detach(), grads))
    (found, found_grads), (expected, expected_grads) = results
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found_grads.keys() == expected_grads.keys()
    for name, grad in expected_grads.items():
        limit = 1e-9 * float(grad.abs().max()) + 1e-8
        assert (found_grads[name] - grad).abs().max() <= limit, name


@pytest.mark.parametrize("family", ["bert", "qwen3"])  # which normalises its queries in float32
def test_bfloat16_stays_close(family):
    torch.manual_seed(0)
    changes = {"pad_token_id": 0} if family == "qwen3" else {}
    model = SimCSEModel(tiny_backbone(family, **changes), pooling_mode="mean").eval()
    batch = build_batch(SENTENCES, padding_free=True, pad_token_id=0, grouped=True)
    expected = model(**batch).embeddings
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(**batch).embeddings
    assert float(F.cosine_similarity(found.float(), expected).detach().min()) > 0.999


def test_chunks_of_a_grouped_batch_are_grouped():
    batch = build_batch(SENTENCES, padding_free=True, pad_token_id=0, grouped=True)
    planned = plan_chunks([*map(len, SENTENCES)], 40, padding_free=True, grouped=True)
    chunks = split_batch(batch, planned)
    assert [len(chunk["lengths"]) for chunk in chunks] == [40, 30]
    for chunk, rows in zip(chunks, (SENTENCES[:40], SENTENCES[40:]), strict=True):
        expected = build_batch(rows, padding_free=True, pad_token_id=0, grouped=True)
        assert chunk.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(chunk[name], value)
