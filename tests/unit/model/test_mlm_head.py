import pytest
import torch
from helpers.tiny import tiny_config
from transformers import AutoModelForMaskedLM

from simcse_trainer.errors import InputError
from simcse_trainer.model.heads import MLMHead

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


def test_a_decoder_has_none():
    with pytest.raises(InputError, match=r"llama has none.*--mlm_weight 0"):
        MLMHead.from_config(tiny_config("llama"))
