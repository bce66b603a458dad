"""Lists of positives and negatives in training: drawn anew every epoch, exact in resuming."""

import logging

import pytest
import torch
from datasets import Dataset
from helpers.checks import fails
from helpers.tiny import tiny_tokenizer
from helpers.training import NO_DROPOUT, TRIPLETS, build_args, build_model, texts

from simcse_trainer import SimCSETrainer
from simcse_trainer.data.loading import prepare_dataset
from simcse_trainer.data.tokenization import tokenize_dataset

LISTS = Dataset.from_list(
    [
        {"query": a, "pos": [b, c][: 1 + i % 2], "neg": [d, e, f][: i % 4]}
        for i, (a, b, c, d, e, f) in enumerate(
            zip(*(texts(offset)[:12] for offset in (0, 1, 2, 5, 6, 7)), strict=True)
        )
    ]
)


def build(folder, data=LISTS, model=None, **options):
    args = build_args(folder, per_device_train_batch_size=4, **options)
    return SimCSETrainer(model or build_model(**NO_DROPOUT), args, data)


def read_epochs(trainer, count=6):
    """The texts of every batch, by epoch, as the trainer's own loop draws them."""
    loader, epochs = trainer.get_train_dataloader(), []
    for epoch in range(count):
        trainer.data_collator.draws.epoch = epoch
        loader.set_epoch(epoch)
        rows = []
        for batch in loader:
            found = [tuple(x.tolist()) for x in batch["input_ids"][0].split(
                batch["lengths"].tolist())]  # fmt: skip
            size = batch["text_ids"].shape[1]
            rows += list(zip(*(found[i : i + size] for i in range(0, len(found), size)),
                             strict=True))  # fmt: skip
        epochs.append({row[0]: row[1:] for row in rows})
    return epochs


@pytest.mark.parametrize("kind", ["stored", "streamed", "tokenized"])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_each_epoch_draws_of_the_row_and_of_no_other(kind, workers, tmp_path):
    data = {
        "stored": LISTS,
        "streamed": LISTS.to_iterable_dataset(),
        "tokenized": tokenize_dataset(prepare_dataset(LISTS), tiny_tokenizer(), max_seq_length=20),
    }[kind]
    trainer = build(tmp_path, data, num_hard_negatives=2, dataloader_num_workers=workers)
    assert trainer.views == 4
    ids = {
        name: [[tuple(i) for i in tiny_tokenizer()(list(cell))["input_ids"]] if cell else []
               for cell in LISTS[name]]
        for name in ("pos", "neg")
    }  # fmt: skip
    anchors = [tuple(row) for row in tiny_tokenizer()(list(LISTS["query"]))["input_ids"]]
    epochs = read_epochs(trainer)
    for epoch in epochs:
        assert set(epoch) == set(anchors)
        for place, anchor in enumerate(anchors):
            positive, *negatives = epoch[anchor]
            assert positive in ids["pos"][place]
            real = [text for text in negatives if len(text) > 1]
            assert len(real) == min(2, len(ids["neg"][place]))
            assert set(real) <= set(ids["neg"][place])
            assert len(set(real)) == len(real)
    for place, anchor in enumerate(anchors):
        seen = {epoch[anchor][0] for epoch in epochs}
        assert len(seen) == 1 if len(LISTS[place]["pos"]) == 1 else len(seen) <= 2
    assert any(len({epoch[anchor] for epoch in epochs}) > 1 for anchor in anchors)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.mark.parametrize("streamed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bits(streamed, tmp_path):
    data = LISTS.to_iterable_dataset() if streamed else LISTS
    options = {"max_steps": 8, "save_steps": 4, "save_strategy": "steps", "num_hard_negatives": 2}
    whole = build(tmp_path / "a", data, model=build_model(), **options)
    whole.train()
    again = build(tmp_path / "a", data, model=build_model(), **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert again.state.global_step == 8
    assert torch.equal(weights(whole), weights(again))


def test_the_trainer_tells_the_collator_each_epoch(tmp_path):
    trainer = build(tmp_path, max_steps=7)  # of three steps each
    seen = []
    draws = trainer.data_collator.draws

    class Watched(type(draws)):
        def __call__(self, *args):
            seen.append(self.epoch)
            return super().__call__(*args)

    object.__setattr__(trainer.data_collator, "draws", Watched(draws.seed, draws.negatives))
    trainer.train()
    assert seen[:12] == [0] * 12
    assert seen[12:24] == [1] * 12
    assert seen[24:28] == [2] * 4


@pytest.mark.slow
def test_chunks_and_padding_change_nothing(tmp_path):
    losses = []
    for options, padding_free in (({}, True), ({"mini_batch_size": "3"}, True), ({}, False)):
        model = build_model(padding_free=padding_free, **NO_DROPOUT)
        trainer = build(tmp_path, model=model, max_steps=3, num_hard_negatives=2, **options)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)


@pytest.mark.parametrize(("count", "views"), [(0, 2), (1, 3), (3, 5)])
def test_how_many_are_drawn(count, views, tmp_path):
    assert build(tmp_path, num_hard_negatives=count).views == views
    without = LISTS.remove_columns("neg")
    assert build(tmp_path, without, num_hard_negatives=count).views == 2


def test_one_positive_and_one_negative_are_a_triplet(tmp_path):
    listed = [{"query": r["sent0"], "pos": [r["sent1"]], "neg": [r["hard_neg"]]} for r in TRIPLETS]
    losses = []
    for data in (TRIPLETS, Dataset.from_list(listed)):
        trainer = build(tmp_path, data, max_steps=3)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[0] == losses[1]


def test_what_lists_do_not_go_with_and_settings_without_effect(tmp_path, caplog):
    fails(lambda: build(tmp_path, mask_duplicate_negatives=False), "mask_duplicate", "Leave it out")
    fails(lambda: build(tmp_path, augmentation="crop"), "crop", "columns")
    fails(lambda: build_args(tmp_path, num_hard_negatives=-1), "num_hard_negatives is -1")
    caplog.set_level(logging.WARNING)
    build(tmp_path, TRIPLETS, num_hard_negatives=3)
    assert "num_hard_negatives has no effect" in caplog.text


@pytest.mark.slow
def test_another_number_of_negatives_is_said_in_resuming(tmp_path, caplog):
    options = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    build(tmp_path, **options).train()
    checkpoint = str(tmp_path / "checkpoint-1")
    build(tmp_path, num_hard_negatives=2, **options).train(resume_from_checkpoint=checkpoint)
    assert "num_hard_negatives: 1 then, 2 now" in caplog.text


def test_the_card_shows_the_lists(tmp_path):
    trainer = build(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert f"{LISTS[1]['pos'][0]} / {LISTS[1]['pos'][1]}" in card
