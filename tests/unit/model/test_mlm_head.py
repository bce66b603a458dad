import copy

import pytest
import torch
from helpers.tiny import DECODERS, tiny_config, tiny_tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, T5Config

from simcse_trainer import SimCSEModel
from simcse_trainer.errors import InputError
from simcse_trainer.model import heads
from simcse_trainer.model.decoders import set_attention
from simcse_trainer.model.heads import MLMHead, NextTokenHead, build_mlm_head
from simcse_trainer.model.packing import build_batch
from simcse_trainer.objective.mlm import MaskedTokens, label_position_before

FAMILIES = ["bert", "roberta", "distilbert", "electra", "mpnet", "deberta-v2", "modernbert"]


@pytest.mark.parametrize("family", FAMILIES)
def test_head_equals_the_familys_own_model(family):
    complete = AutoModelForMaskedLM.from_config(tiny_config(family)).eval()
    ids = torch.randint(5, 60, (2, 7))
    with torch.no_grad():
        expected = complete(input_ids=ids).logits
        hidden = complete.base_model(input_ids=ids).last_hidden_state
        found = MLMHead(complete)(hidden.flatten(0, 1))
    torch.testing.assert_close(found, expected.flatten(0, 1))


def test_head_holds_no_backbone():
    head = MLMHead(AutoModelForMaskedLM.from_config(tiny_config("bert")))
    assert not [name for name, _ in head.named_parameters() if "encoder" in name]


def test_a_family_without_one_is_refused():
    with pytest.raises(InputError, match=r"t5 has none.*mlm_weight=0"):
        build_mlm_head(T5Config())


# --- Masked next-token prediction -----------------------------------------------------------------


def decoder(family: str, *, tied: bool):
    """A causal language model that attends to both sides, in float64."""
    bounds = {"final_logit_softcapping": 3.0} if family == "gemma3_text" else {}
    config = tiny_config(family, tie_word_embeddings=tied, initializer_range=0.2, **bounds)
    set_attention(config, bidirectional=True, dropout=0.0 if family != "gpt2" else None)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_the_output_layer_is_the_decoders_own(family, tied):
    complete = decoder(family, tied=tied)
    ids = torch.randint(5, 60, (2, 7))
    with torch.no_grad():
        expected = complete(input_ids=ids).logits.flatten(0, 1)
        hidden = complete.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)
        words = complete.get_input_embeddings()
        head = NextTokenHead(complete)
        torch.testing.assert_close(head(hidden, words), expected)
    if head.is_tied:
        assert not list(head.parameters())


def sentences():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 9, (6,), generator=generator).tolist()
    return [torch.randint(5, 60, (n,), generator=generator).tolist() for n in lengths]


def slow_reference(complete, texts) -> torch.Tensor:
    """Each sentence by itself: every third word is masked and predicted from the word before it.

    One pass a sentence, for norms sum gradients in float32 also in a model in float64.
    """
    losses = []
    for ids in texts:
        corrupted = [4 if i and word % 3 == 0 else word for i, word in enumerate(ids)]
        logits = complete(input_ids=torch.tensor([corrupted])).logits[0]
        for i in range(1, len(ids)):
            if ids[i] % 3 == 0:
                losses.append(F.cross_entropy(logits[i - 1], torch.tensor(ids[i])))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_loss_and_gradient_are_those_of_a_slow_reference(family, tied, packed, monkeypatch):
    texts = sentences()
    complete = decoder(family, tied=tied)
    expected = slow_reference(complete, texts)
    expected.backward()
    gradients = {n: p.grad for n, p in complete.base_model.named_parameters()}
    own = copy.deepcopy(complete)
    own.zero_grad(set_to_none=True)
    model = SimCSEModel(
        own.base_model,
        tiny_tokenizer(),
        pooling_mode="mean",
        mlm_head=NextTokenHead(copy.deepcopy(own)),
        padding_free=packed,
    ).eval()
    monkeypatch.setattr(heads, "_MOST_LOGITS", 64 * 3)  # three tokens at once
    batch = build_batch(texts, padding_free=packed, pad_token_id=0)
    ids = batch.pop("input_ids")
    starts = torch.zeros_like(ids, dtype=torch.bool)
    if packed:
        assert model.padding_free
        starts[0, batch["lengths"].cumsum(0) - batch["lengths"]] = True
    else:
        starts[:, 0] = True
    chosen = (ids >= 5) & (ids % 3 == 0)
    masked = MaskedTokens(torch.where(chosen, 4, ids), torch.where(chosen, ids, -100))
    masked = label_position_before(masked, ids, starts)
    found = model(mlm_input_ids=masked.input_ids, mlm_labels=masked.labels, **batch)
    assert found.embeddings is None
    found.mlm_loss.backward()
    torch.testing.assert_close(found.mlm_loss, expected, rtol=1e-9, atol=1e-9)
    for name, parameter in model.backbone.named_parameters():
        near = 1e-6 if "norm" in name else 1e-9  # Gemma's norms sum this one in float32
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=near, atol=near, msg=name)


def test_a_checkpoint_gives_its_output_layer_or_is_refused(tmp_path):
    complete = decoder("qwen3", tied=False)
    complete.save_pretrained(tmp_path / "complete")
    complete.base_model.save_pretrained(tmp_path / "bare")
    config = complete.config
    head = NextTokenHead.from_pretrained(str(tmp_path / "complete"), config)
    (weight,) = head.parameters()
    torch.testing.assert_close(weight.double(), complete.get_output_embeddings().weight)
    with pytest.raises(InputError, match=r"bare' has none\. Set mlm_weight=0"):
        NextTokenHead.from_pretrained(str(tmp_path / "bare"), config)
