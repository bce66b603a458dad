import subprocess
import sys

import pytest
import torch

from simcse_trainer.training.dataset import SimCSECollator

PAIRS = [{"input_ids": [[2, 7, 3], [2, 8, 9, 3]]}, {"input_ids": [[2, 3], [2, 7, 3]]}]


def test_packed_is_view_major():
    batch = SimCSECollator(pad_token_id=0)(PAIRS)
    assert batch["input_ids"].tolist() == [[2, 7, 3, 2, 3, 2, 8, 9, 3, 2, 7, 3]]
    assert batch["lengths"].tolist() == [3, 2, 4, 3]


def test_padded_is_view_major():
    batch = SimCSECollator(pad_token_id=9, padding_free=False)(PAIRS)
    assert batch["input_ids"].tolist() == [[2, 7, 3, 9], [2, 3, 9, 9], [2, 8, 9, 3], [2, 7, 3, 9]]
    assert batch["attention_mask"].sum(1).tolist() == [3, 2, 4, 3]


def test_one_sentence_becomes_two_views():
    batch = SimCSECollator(pad_token_id=0)([{"input_ids": [[2, 3]]}, {"input_ids": [[2, 5, 3]]}])
    assert batch["lengths"].tolist() == [2, 3, 2, 3]
    assert torch.equal(batch["text_ids"][0], batch["text_ids"][1])


@pytest.mark.slow
def test_equal_texts_have_equal_ids_in_every_process():
    ids = SimCSECollator(pad_token_id=0)(PAIRS)["text_ids"]
    assert ids.shape == (2, 2)
    assert ids[0, 0] == ids[1, 1]
    assert len(set(ids.flatten().tolist())) == 3
    code = (
        "from simcse_trainer.training.dataset import SimCSECollator as C;"
        f"print(C(0)({PAIRS!r})['text_ids'].tolist())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(ids.tolist())


def test_rows_with_different_numbers_of_texts_are_refused():
    with pytest.raises(ValueError, match="zip"):
        SimCSECollator(pad_token_id=0)([{"input_ids": [[2], [3]]}, {"input_ids": [[2]]}])


def test_chunks_are_planned_with_the_batch():
    batch = SimCSECollator(pad_token_id=0, chunk_size=3, keep_lengths=True)(PAIRS)
    lengths = [
        len(ids) for view in zip(*(r["input_ids"] for r in PAIRS), strict=True) for ids in view
    ]
    assert batch["sentence_lengths"] == tuple(lengths)
    ends = [chunk["sentences"] for chunk in batch["chunks"]]
    assert ends == [(i, min(i + 3, len(lengths))) for i in range(0, len(lengths), 3)]
    assert [len(chunk["indices"]["lengths"]) for chunk in batch["chunks"]] == [
        b - a for a, b in ends
    ]
    plain = SimCSECollator(pad_token_id=0, chunk_size=len(lengths))(PAIRS)
    assert not {"chunks", "sentence_lengths"} & plain.keys()
