"""What `encode` cuts into batches comes back in order, and is what a forward pass gives."""

import pytest
import torch
from helpers.tiny import WORDS, tiny_backbone, tiny_tokenizer

from simcse_trainer import SimCSEModel
from simcse_trainer.model import encoding
from simcse_trainer.model.packing import build_batch


@pytest.mark.parametrize(
    ("lengths", "sentences", "tokens", "expected"),
    [
        ([], 2, 10, []),
        ([3, 3, 2, 2, 1], 2, 100, [[3, 3], [2, 2], [1]]),
        ([3, 3, 2, 2, 1], 9, 6, [[3, 3], [2, 2, 1]]),
        ([9, 9, 1], 9, 6, [[9], [9], [1]]),  # too long for any batch: alone
    ],
)
def test_batches_keep_both_limits(lengths, sentences, tokens, expected):
    found = encoding.cut_batches(lengths, sentences, tokens)
    assert [lengths[rows] for rows in found] == expected


@pytest.mark.parametrize("padding_free", [True, False])
def test_embeddings_are_those_of_one_forward_pass(padding_free, monkeypatch):
    model = SimCSEModel(
        tiny_backbone().double(),
        tiny_tokenizer(),
        pooling_mode="mean",
        max_seq_length=40,
        padding_free=padding_free,
    )
    texts = [" ".join(WORDS[: 1 + i * 7 % 13]) for i in range(30)]
    batch = build_batch(
        model.tokenize(texts), padding_free=padding_free, pad_token_id=model.pad_token_id
    )
    expected = model.eval()(**batch).embeddings
    monkeypatch.setattr(encoding, "_TOKENS_PER_CPU_THREAD", 32)
    for options in ({}, {"batch_size": 3}, {"batch_size": 1}):
        torch.testing.assert_close(model.encode(texts, **options), expected, atol=1e-12, rtol=0)
