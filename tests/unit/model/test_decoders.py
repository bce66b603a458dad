"""Decoder language models as sentence encoders: attention, pooling, padding."""

import pytest
import torch
from helpers.checks import fails
from helpers.tiny import DECODERS, save_tiny, tiny_backbone, tiny_decoder_tokenizer
from transformers import AutoConfig, AutoModel

from simcse_trainer import SimCSEModel
from simcse_trainer.model.decoders import is_decoder, looks_ahead
from simcse_trainer.model.packing import build_batch


def hidden_states(model: SimCSEModel, ids: list[int]) -> torch.Tensor:
    ids = torch.tensor([ids])
    mask = torch.ones_like(ids)
    return model.backbone.eval()(input_ids=ids, attention_mask=mask).last_hidden_state[0].detach()


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("bidirectional", [False, True])
class TestFamilies:
    def test_a_later_token_changes_an_earlier_state_or_not(self, family, bidirectional, tmp_path):
        source = save_tiny(tmp_path / "base", family)
        model = SimCSEModel.from_pretrained(source, bidirectional_attention=bidirectional)
        ids = list(range(5, 20))
        one, two = hidden_states(model, ids), hidden_states(model, [*ids[:-1], 30])
        # Of local attention, several layers together see far.
        changed = (one[:-1] - two[:-1]).abs().amax(-1) > 1e-6
        assert bool(changed[-1]) is bidirectional
        assert bool(changed.any()) is bidirectional
        assert looks_ahead(model.backbone) is bidirectional

    def test_packed_equals_padded(self, family, bidirectional, tmp_path, sentences):
        source = save_tiny(tmp_path / "base", family)
        options = {"bidirectional_attention": bidirectional}
        packed = SimCSEModel.from_pretrained(source, **options)
        padded = SimCSEModel.from_pretrained(source, padding_free=False, **options)
        assert packed.padding_free
        assert (
            packed.pooling_mode == padded.pooling_mode == ("mean" if bidirectional else "lasttoken")
        )
        torch.testing.assert_close(
            packed.encode(sentences), padded.encode(sentences), rtol=1e-5, atol=1e-5
        )

    def test_saved_and_loaded_by_everyone(self, family, bidirectional, tmp_path, sentences):
        sentence_transformers = pytest.importorskip("sentence_transformers")
        source = save_tiny(tmp_path / "base", family)
        model = SimCSEModel.from_pretrained(source, bidirectional_attention=bidirectional)
        model.save_pretrained(tmp_path / "saved")
        expected = model.encode(sentences)
        loaded = SimCSEModel.from_pretrained(tmp_path / "saved")
        torch.testing.assert_close(loaded.encode(sentences), expected, rtol=1e-5, atol=1e-5)
        theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
        found = theirs.encode(sentences, convert_to_tensor=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        plain = AutoModel.from_pretrained(tmp_path / "saved")
        assert looks_ahead(plain) is bidirectional


def test_encoders_are_no_decoders():
    assert not any(is_decoder(tiny_backbone(f).config) for f in ("bert", "roberta", "modernbert"))


def save_mamba(folder) -> None:
    """A recurrent family, whose states have only the past."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "state_size": 4}
    AutoModel.from_config(AutoConfig.for_model("mamba", **sizes)).save_pretrained(folder)
    tiny_decoder_tokenizer().save_pretrained(folder)


def test_a_family_that_cannot_look_ahead_is_refused(tmp_path):
    save_mamba(tmp_path)
    fails(
        lambda: SimCSEModel.from_pretrained(tmp_path, bidirectional_attention=True),
        "bidirectional_attention",
        "mamba",
        "lasttoken",
    )


def test_an_encoder_cannot_be_made_causal(tmp_path):
    source = save_tiny(tmp_path, "bert")
    fails(
        lambda: SimCSEModel.from_pretrained(source, bidirectional_attention=False),
        "bidirectional_attention",
        "bert is an encoder",
    )


def test_the_first_token_of_a_causal_decoder_is_no_embedding(tmp_path):
    source = save_tiny(tmp_path, "llama")
    fails(
        lambda: SimCSEModel.from_pretrained(source, pooling_mode="cls"), "cls", "llama", "lasttoken"
    )
    both = {"pooling_mode": "cls", "bidirectional_attention": True}
    assert SimCSEModel.from_pretrained(source, **both).pooling_mode == "cls"


def test_padding_side_of_the_batch_is_no_matter(tmp_path, sentences):
    """Rows padded on the left, as a collator of transformers makes them, give the same."""
    model = SimCSEModel.from_pretrained(save_tiny(tmp_path, "qwen3"), padding_free=False).eval()
    rows = model.tokenizer(sentences)["input_ids"]
    right = build_batch(rows, padding_free=False, pad_token_id=0)
    width = right["input_ids"].shape[1]
    left = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": right["attention_mask"].flip(1),
    }
    torch.testing.assert_close(
        model(**left).embeddings, model(**right).embeddings, rtol=1e-4, atol=1e-5
    )


def test_padding_on_the_left_that_moves_positions_is_refused(tmp_path):
    source = save_tiny(tmp_path / "base", "gpt2")
    model = SimCSEModel.from_pretrained(source)
    assert model.tokenizer.padding_side == "right"
    model.save_pretrained(tmp_path / "saved")
    model.tokenizer.padding_side = "left"
    model.tokenizer.save_pretrained(tmp_path / "saved")
    fails(
        lambda: SimCSEModel.from_pretrained(tmp_path / "saved"),
        "pads on the left",
        "lasttoken",
        '"padding_side": "right"',
    )


def test_attention_dropout_makes_two_views(tmp_path):
    source = save_tiny(tmp_path, "llama")
    model = SimCSEModel.from_pretrained(source, attention_dropout=0.3).train()
    batch = build_batch([[5, 6, 7, 8, 9]] * 2, padding_free=True, pad_token_id=0)
    one, two = model(**batch).embeddings
    assert not torch.equal(one, two)


def test_a_family_without_attention_dropout_is_refused(tmp_path):
    save_mamba(tmp_path)
    fails(
        lambda: SimCSEModel.from_pretrained(tmp_path, attention_dropout=0.1),
        "attention_dropout",
        "mamba",
        "Use lora",
    )
