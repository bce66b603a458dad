"""Augmentation in the trainer: what the two views are, every epoch anew, and what is refused."""

import logging

import pytest
import torch
from helpers.checks import fails
from helpers.tiny import tiny_tokenizer
from helpers.training import TRIPLETS, UNSUPERVISED, build_args, build_model

from simcse_trainer import SimCSETrainer
from simcse_trainer.data.tokenization import tokenize_dataset


def views(loader):
    """(anchor, positive), as token ids, of every row of an epoch."""
    found = []
    for batch in loader:
        texts = batch["input_ids"][0].split(batch["lengths"].tolist())
        half = len(texts) // 2
        found += [
            (tuple(anchor.tolist()), tuple(positive.tolist()))
            for anchor, positive in zip(texts[:half], texts[half:], strict=True)
        ]
    return found


def sentences(token_ids):
    return sorted(token_ids, key=lambda ids: (len(ids), ids))


@pytest.mark.parametrize("streamed", [False, True], ids=["stored", "streamed"])
@pytest.mark.parametrize("workers", [0, 1])
def test_positives_are_changed_and_anchors_are_the_data(streamed, workers, tmp_path):
    data = UNSUPERVISED.to_iterable_dataset() if streamed else UNSUPERVISED
    args = build_args(tmp_path, augmentation="word_deletion", dataloader_num_workers=workers)
    trainer = SimCSETrainer(build_model(), args, data)
    pairs = views(trainer.get_train_dataloader())
    expected = [tuple(ids) for ids in tiny_tokenizer()(list(UNSUPERVISED["sent0"]))["input_ids"]]
    assert sentences(anchor for anchor, _ in pairs) == sentences(expected)
    for anchor, positive in pairs:
        # Up to seven words: one of them is deleted, and the special tokens stay.
        assert len(positive) == len(anchor) - 1
        assert (positive[0], positive[-1]) == (2, 3)
    assert trainer.train().global_step == 6


def test_every_epoch_changes_anew(tmp_path):
    args = build_args(tmp_path, augmentation="word_deletion")
    trainer = SimCSETrainer(build_model(), args, UNSUPERVISED)
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        epochs.append(set(views(loader)))
    assert len(epochs[0] & epochs[1]) < 0.8 * len(epochs[0])


def test_none_switches_dropout_off(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer = SimCSETrainer(
            build_model(), build_args(tmp_path, augmentation="none"), UNSUPERVISED
        )
    assert "all dropout is off" in caplog.text
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    _, output = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    anchors, positives = output.embeddings.chunk(2)
    assert torch.equal(anchors, positives)
    assert trainer.model.training  # the head of unsupervised training is still in use
    trainer.train()
    # Another trainer of the same model has dropout again.
    trainer = SimCSETrainer(trainer.model, build_args(tmp_path), UNSUPERVISED)
    trainer.model.train()
    _, output = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    anchors, positives = output.embeddings.chunk(2)
    assert not torch.allclose(anchors, positives, atol=1e-3)


def test_chunks_draw_nothing_of_their_own(tmp_path):
    losses = []
    for chunk in (None, "4"):
        args = build_args(tmp_path, augmentation="word_shuffle", mini_batch_size=chunk)
        trainer = SimCSETrainer(
            build_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            args,
            UNSUPERVISED,
        )
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("kind", ["crop", "none"])
def test_data_with_positives_of_its_own_is_refused(kind, tmp_path):
    args = build_args(tmp_path, augmentation=kind)
    fails(lambda: SimCSETrainer(build_model(), args, TRIPLETS), kind, "has 3", "columns")


def test_tokenized_data_has_no_words(tmp_path):
    model = build_model()
    tokenized = tokenize_dataset(UNSUPERVISED, model.tokenizer, max_seq_length=20)
    args = build_args(tmp_path, augmentation="crop")
    fails(lambda: SimCSETrainer(model, args, tokenized), "crop", "tokenized", "text column")


def test_values_that_cannot_be(tmp_path):
    fails(lambda: build_args(tmp_path, augmentation="cut"), "augmentation is cut", "word_deletion")
    fails(lambda: build_args(tmp_path, augmentation_rate=1.0), "augmentation_rate is 1.0")


def test_settings_without_effect_are_named(tmp_path, caplog):
    args = build_args(
        tmp_path, augmentation="none", augmentation_rate=0.3, activation_checkpointing=True
    )
    SimCSETrainer(build_model(), args, UNSUPERVISED)
    assert "augmentation_rate has no effect with augmentation none" in caplog.text
    assert "activation_checkpointing has no effect" in caplog.text


def test_the_card_tells(tmp_path):
    args = build_args(tmp_path, augmentation="crop", augmentation_rate=0.2, max_steps=1)
    trainer = SimCSETrainer(build_model(), args, UNSUPERVISED)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "unsupervised: each sentence, cut short by 20% of its words, is its own positive" in card
    assert "`augmentation` | crop" in card.replace("`crop`", "crop")
