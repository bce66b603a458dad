"""A batch in chunks is the batches of its sentences."""

import pytest
import torch

from simcse_trainer.model.packing import build_batch, plan_chunks, split_batch

SENTENCES = [[2, 7, 8, 3], [2, 3], [2, 5, 6, 7, 8, 9, 3], [2, 9, 3], [2, 4, 3]]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(
    "form",
    [{"padding_free": False}, {"padding_free": True}, {"padding_free": True, "grouped": True}],
    ids=["padded", "packed", "grouped"],
)
def test_chunks_are_as_if_built_alone(form, size):
    planned = plan_chunks([*map(len, SENTENCES)], size, **form)
    chunks = split_batch(build_batch(SENTENCES, pad_token_id=0, **form), planned)
    parts = [SENTENCES[start : start + size] for start in range(0, len(SENTENCES), size)]
    expected = [build_batch(part, pad_token_id=0, **form) for part in parts]
    assert len(chunks) == len(expected)
    for chunk, alone in zip(chunks, expected, strict=True):
        assert set(chunk) == set(alone)
        for name, value in alone.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(chunk[name], value), name
            else:
                assert chunk[name] == value, name


@pytest.mark.parametrize("padding_free", [False, True])
def test_what_stands_beside_the_tokens_is_cut_alike(padding_free):
    batch = build_batch(SENTENCES, padding_free=padding_free, pad_token_id=0)
    planned = plan_chunks([*map(len, SENTENCES)], 2, padding_free=padding_free)
    chunks = split_batch(batch | {"labels": batch["input_ids"] + 100}, planned)
    assert len(chunks) == 3
    for chunk in chunks:
        assert torch.equal(chunk["labels"], chunk["input_ids"] + 100)
