"""Facts of training data, and what is said of them."""

import dataclasses

import pytest
from helpers.tiny import WORDS, tiny_tokenizer

from simcse_trainer.data.profile import (
    find_problems,
    format_profile,
    profile_data,
    summarize,
    take_columns,
)

TEXTS = [f"{WORDS[i % 16]} {WORDS[(i * 3) % 17]} {WORDS[(i * 5 + 1) % 17]}" for i in range(60)]
OTHERS = [f"{text} mat" for text in TEXTS]


def said(columns, **options):
    return " ".join(problem.text for problem in find_problems(profile_data(columns, **options)))


def pointless(columns, **options):
    return [p.text for p in find_problems(profile_data(columns, **options)) if p.pointless]


def test_lengths_are_those_of_the_tokenizer():
    tokenizer = tiny_tokenizer()
    texts = [" ".join(["dog"] * n) for n in range(1, 21)]
    profile = profile_data({"sent0": texts}, tokenizer=tokenizer, max_seq_length=12)
    found = profile.lengths["sent0"]
    # Two special tokens each: 3 to 22.
    assert (found.median, found.high, found.longest) == (13, 22, 22)
    assert found.cut == 0.5
    assert profile.unknown == 0
    assert "50.0 % of the texts in 'sent0' are cut at 12 tokens" in said(
        {"sent0": texts}, tokenizer=tokenizer, max_seq_length=12
    )
    assert profile.examples[0] == ["[CLS] dog [SEP]"]


def test_the_longest_text_is_found_where_others_are_sampled():
    texts = ["dog"] * 1001
    texts[501] = "dog " * 30
    profile = profile_data({"sent0": texts}, tokenizer=tiny_tokenizer(), tokenized=10)
    assert profile.lengths["sent0"].longest == 32
    assert profile.lengths["sent0"].high == 3


def test_texts_that_were_cells_without_a_value():
    columns = {"sent0": TEXTS, "sent1": [*OTHERS[:-2], "nan", " NaN"]}
    assert "2 of 60 rows have a text that says that a cell has no value, such as 'nan'" in said(
        columns
    )
    assert "no value" not in said({"sent0": TEXTS, "sent1": [*OTHERS[:-1], "nan bread"]})


def test_the_share_of_unknown_tokens():
    texts = [*TEXTS[:20], *["dog xyz cat"] * 20]
    profile = profile_data({"sent0": texts}, tokenizer=tiny_tokenizer())
    assert profile.unknown == pytest.approx(20 / 120)
    assert "does not know these texts: 16.7 % of the tokens are unknown" in said(
        {"sent0": texts}, tokenizer=tiny_tokenizer()
    )
    strange = [f"{text}x zz{text}" for text in ("abc", "def", "ghi")]
    strange = [f"{text} q{i}" for i, text in enumerate(strange * 5)]
    assert (
        "100.0 % of the tokens are unknown"
        in pointless({"sent0": strange}, tokenizer=tiny_tokenizer())[0]
    )


def test_korean_that_is_split_into_letters_is_said_with_backbones_to_try():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = pre_tokenizers.ByteLevel.alphabet()
    bytes_only = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only)
    texts = [f"문의 {chr(0xAC00 + i)}라마바 입니다" for i in range(40)]
    profile = profile_data({"sent0": texts}, tokenizer=tokenizer)
    assert (profile.script, profile.hangul, profile.pieces) == ("HANGUL", 1.0, 3.0)
    text = said({"sent0": texts}, tokenizer=tokenizer)
    assert "does not know Korean: Hangul split into letters (3.0 tokens per letter)" in text
    assert "klue/roberta-base" in text
    # The same tokenizer knows English.
    assert "does not know" not in said({"sent0": TEXTS}, tokenizer=tokenizer)


def test_one_answer_shared_by_all_masks_every_negative():
    columns = {"sent0": TEXTS, "sent1": ["the answer"] * 60}
    profile = profile_data(columns)
    assert (profile.masked, profile.answer, profile.answers) == (1.0, "the answer", 60)
    (text,) = pointless(columns)
    assert "60 of 60 rows have the positive 'the answer'" in text
    assert "the loss is 0" in text
    # The sampled share is that of the rule in the loss.
    half = {"sent0": OTHERS, "sent1": ["the answer"] * 30 + [f"{i}" for i in range(30)]}
    assert profile_data(half).masked == pytest.approx(0.25 * 29 / 29.5, abs=0.02)
    assert not pointless(half)
    assert "30 of 60 rows have the positive" in said(half)


def test_the_share_of_masked_negatives_agrees_with_the_loss():
    torch = pytest.importorskip("torch")
    from simcse_trainer.objective.loss import find_false_negatives

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(12, (3, 40), generator=generator)
    columns = {
        name: [f"text {n}" for n in row.tolist()]
        for name, row in zip(("sent0", "sent1", "hard_neg"), ids, strict=True)
    }
    masked = find_false_negatives(ids).reshape(40, 2, 40)
    others = ~torch.eye(40, dtype=torch.bool)
    exact = float(masked.transpose(1, 2)[others].float().mean())
    assert profile_data(columns).masked == pytest.approx(exact, abs=0.01)


def test_pairs_of_one_text_say_nothing():
    (text,) = pointless({"sent0": TEXTS, "sent1": [text.upper() for text in TEXTS]})
    assert "--columns sent0" in text
    some = {"sent0": TEXTS, "sent1": TEXTS[:30] + OTHERS[30:]}
    assert "In 30 of 60 rows 'sent1' is the text of 'sent0'" in said(some)
    assert not pointless(some)


def test_a_handful_of_texts_and_repeated_rows():
    assert "3 different texts" in pointless({"sent0": TEXTS[:3] * 20})[0]
    assert "30 of 60 rows are repeated" in said({"sent0": OTHERS[:30] * 2})


def test_evaluation_pairs_are_found_in_either_order_and_spelling():
    columns = {"sent0": TEXTS, "sent1": OTHERS}
    pairs = [(OTHERS[0].upper(), f" {TEXTS[0]}"), (TEXTS[1], "something else")]
    profile = profile_data(columns, evaluation=pairs)
    assert (profile.leaked, profile.evaluated) == (1, 2)
    assert "1 of 2 evaluation pairs are in the training data" in said(columns, evaluation=pairs)
    assert profile_data({"sent0": [*TEXTS, "x"]}, evaluation=[("x", TEXTS[0])]).leaked == 1


def test_good_data_has_no_problems_and_its_facts_fill_a_few_lines():
    columns = {"sent0": [f"{text} {i}" for i, text in enumerate(TEXTS)]}
    columns["sent1"] = [f"another {text}" for text in columns["sent0"]]
    profile = profile_data(columns)
    assert find_problems(profile) == []
    assert len(summarize(profile)) == 1
    assert "supervised, on pairs" in summarize(profile)[0]
    text = format_profile(dataclasses.replace(profile, complete=False), "x.csv")
    assert text.startswith("x.csv: the first 60 rows of sent0, sent1\nTrains supervised, on pairs.")


def test_columns_are_taken_from_the_beginning_of_data_and_streams():
    from datasets import Dataset

    data = Dataset.from_dict({"sent0": TEXTS})
    for rows in (data, data.to_iterable_dataset()):
        assert take_columns(rows, 7) == ({"sent0": TEXTS[:7]}, False)
        assert take_columns(rows, 60) == ({"sent0": TEXTS}, True)
        assert take_columns(rows, None) == ({"sent0": TEXTS}, True)
