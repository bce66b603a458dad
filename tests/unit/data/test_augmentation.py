"""Changed copies of sentences: what is left, what is random, and what a tokenizer makes of them."""

from collections import Counter
from random import Random

import pytest
import torch
from helpers.tiny import WORDS, tiny_tokenizer

from simcse_trainer.data.augmentation import (
    DISCRETE,
    DiscreteAugmentation,
    augment,
    crop,
    delete_words,
    shuffle_words,
)
from simcse_trainer.objective.loss import find_false_negatives
from simcse_trainer.training.dataset import SimCSECollator

TEN = [f"w{i}" for i in range(10)]
KOREAN = "그는 어제 서울에서 새로운 책을 한 권 샀다"


def draws(change, count, times=200):
    return [change(TEN, count, Random(i)) for i in range(times)]


def test_crop_keeps_a_stretch_anywhere():
    found = draws(crop, 3)
    assert {tuple(words) for words in found} == {tuple(TEN[i : i + 7]) for i in range(4)}


def test_deletion_keeps_the_order_and_spares_no_word_for_good():
    found = draws(delete_words, 2)
    assert {len(words) for words in found} == {8}
    assert all(words == sorted(words) for words in found)
    kept = Counter(word for words in found for word in words)
    # each is kept in 80 of 100, 160 here with a standard deviation of 5.7
    assert kept.keys() == set(TEN)
    assert all(130 < times < 190 for times in kept.values())


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_shuffle_moves_as_many_words_as_asked_for_and_loses_none(count):
    for words in draws(shuffle_words, count):
        assert sorted(words) == TEN
        assert sum(a != b for a, b in zip(words, TEN, strict=True)) == max(count, 2)


@pytest.mark.parametrize(
    ("rate", "left"), [(0.01, 9), (0.1, 9), (0.24, 8), (0.26, 7), (0.5, 5), (0.99, 1)]
)
@pytest.mark.parametrize("kind", ["crop", "word_deletion"])
def test_the_rate_is_a_share_of_the_words(kind, rate, left):
    [text] = augment([" ".join(TEN)], kind, rate, seed=0)
    assert len(text.split()) == left


@pytest.mark.parametrize("kind", DISCRETE)
@pytest.mark.parametrize("rate", [0.01, 0.5, 0.99])
def test_no_text_becomes_empty(kind, rate):
    texts = ["one", "two words", "  spaces\taround \n", "。", "漢字仮名", KOREAN]
    changed = augment(texts, kind, rate, seed=0)
    assert all(text.strip() for text in changed)
    assert (changed[0], changed[3], changed[4]) == ("one", "。", "漢字仮名")
    assert changed[1] != "two words"
    assert set(changed[5].split()) <= set(KOREAN.split())


def test_random_follows_from_the_seed_and_the_batch_alone():
    batch = [" ".join(WORDS[i:]) for i in range(8)]
    once = augment(batch, "word_deletion", 0.2, seed=1)
    assert augment(batch, "word_deletion", 0.2, seed=1) == once
    assert augment(batch, "word_deletion", 0.2, seed=2) != once
    # the next epoch has the rows in other batches, or in another order
    turned = augment(batch[1:] + batch[:1], "word_deletion", 0.2, seed=1)
    assert turned[-1:] + turned[:-1] != once


def test_positives_are_tokenized_as_any_text():
    tokenizer = tiny_tokenizer()
    make = DiscreteAugmentation("crop", 0.3, 0, tokenizer, max_seq_length=6)
    text = " ".join(WORDS[:12])
    [ids] = make([text])
    [changed] = augment([text], "crop", 0.3, seed=0)
    assert ids == tokenizer(changed, truncation=True, max_length=6)["input_ids"]
    assert (ids[0], ids[-1], len(ids)) == (2, 3, 6)


def test_anchors_stay_and_equal_sentences_are_no_negatives():
    tokenizer = tiny_tokenizer()
    texts = ["a dog runs", "a cat sleeps", "a dog runs", "a dog runs on"]
    changed = ["dog runs", "a cat", "a runs", "a dog runs"]
    rows = [{"input_ids": [tokenizer(text)["input_ids"]], "sent0": text} for text in texts]
    collator = SimCSECollator(0, augmentation=lambda _: tokenizer(changed)["input_ids"])
    batch, plain = collator(rows), SimCSECollator(0)(rows)
    assert torch.equal(batch["text_ids"][0], plain["text_ids"][0])
    assert batch["lengths"].tolist() == [5, 5, 5, 6, 4, 4, 4, 5]
    assert find_false_negatives(batch["text_ids"]).tolist() == [
        # the copy of an equal sentence, and a copy that has become one
        [False, False, True, True],
        [False, False, False, False],
        [True, False, False, True],
        [False, False, False, False],
    ]
