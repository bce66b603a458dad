"""Masked next-token prediction by the Trainer: alone, beside the contrastive loss, resumed."""

import pytest
import torch
from datasets import Dataset
from helpers.tiny import save_tiny, tiny_decoder_tokenizer
from helpers.training import PAIRS, TRIPLETS, UNSUPERVISED, build_args
from transformers import AutoModelForCausalLM

from simcse_trainer import InputError, SimCSEModel, SimCSETrainer
from simcse_trainer.model.lora import lora_config

ALONE = {"contrastive_weight": 0.0, "mlm_weight": 1.0}
# 3 of 4: few texts here, and short ones.
BOTH = {"mlm_weight": 0.5, "mlm_probability": 0.75}


@pytest.fixture
def base(tmp_path):
    tokenizer = tiny_decoder_tokenizer(mask_token="[MASK]", pad_token="[PAD]")
    return save_tiny(tmp_path / "base", "qwen3", tokenizer, tie_word_embeddings=True)


@pytest.fixture
def untied(base):
    """The base with an output layer of its own."""
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    model.save_pretrained(base)
    return base


def load(base, *, lora=True, **options):
    torch.manual_seed(0)
    options = {"bidirectional_attention": True, "pooling_mode": "mean"} | options
    adapter = {"lora": lora_config(r=3, dropout=0.1)} if lora else {}
    return SimCSEModel.from_pretrained(base, mlm_head=True, max_seq_length=20, **adapter, **options)


def train(base, folder, data=UNSUPERVISED, *, lora=True, resume=None, evaluate=False, **options):
    args = build_args(folder, **({"max_steps": 4} | options))
    pairs = {"stsb": Dataset.from_dict(PAIRS)} if evaluate else None
    trainer = SimCSETrainer(load(base, lora=lora), args, data, pairs)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lora", [True, False])
def test_it_learns_to_predict_and_the_folder_embeds(lora, base, tmp_path):
    options = {"max_steps": 60, "learning_rate": 3e-2, "mlm_probability": 0.5}
    trainer = train(base, tmp_path / "out", lora=lora, **ALONE, **options)
    found = losses(trainer)
    assert sum(found[-10:]) < 0.95 * sum(found[:10])
    trainer.save_model()
    assert trainer.run_info.objective == "masked tokens are predicted, and nothing is contrasted"
    again = SimCSEModel.from_pretrained(tmp_path / "out")
    assert again.mlm_head is None
    torch.testing.assert_close(
        again.encode(["a cat", "the dog runs"]), trainer.encode(["a cat", "the dog runs"])
    )


def test_alone_a_sentence_is_read_once(base, tmp_path):
    trainer = train(base, tmp_path / "out", **ALONE)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    assert len(batch["lengths"]) == 4
    with_both = train(base, tmp_path / "both", **BOTH)
    assert len(with_both.data_collator([with_both.train_dataset[0]])["lengths"]) == 2


@pytest.mark.parametrize("options", [ALONE, BOTH, ALONE | {"mini_batch_size": "3"}])
def test_a_resumed_run_ends_with_the_same_bits(options, base, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = train(base, tmp_path / "whole", TRIPLETS, **options, **saving)
    assert not list((tmp_path / "whole/checkpoint-2").rglob("*heads*"))
    last = str(tmp_path / "whole/checkpoint-2")
    resumed = train(base, tmp_path / "whole", TRIPLETS, **options, **saving, resume=last)
    assert losses(whole)[2:] == losses(resumed)[2:]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("lora", [True, False])
def test_an_output_layer_of_its_own_is_resumed_and_the_best_is_loaded(lora, untied, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "stsb_spearman"}
    options = {**ALONE, **saving, **best, "lora": lora, "evaluate": True}
    whole = train(untied, tmp_path / "whole", **options)
    assert not whole.model.mlm_head.is_tied
    assert whole.state.best_model_checkpoint
    last = str(tmp_path / "whole/checkpoint-2")
    resumed = train(untied, tmp_path / "whole", **options, resume=last)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_decoder_that_looks_back_only_is_refused_and_the_advice_works(base, tmp_path):
    causal = load(base, bidirectional_attention=None, pooling_mode="lasttoken")
    args = build_args(tmp_path / "out", mlm_weight=0.1, max_steps=1)
    with pytest.raises(InputError, match=r"qwen3 attends to earlier.*bidirectional_attention=Tr"):
        SimCSETrainer(causal, args, UNSUPERVISED)
    SimCSETrainer(load(base), args, UNSUPERVISED).train()
    alone = build_args(tmp_path / "alone", **ALONE, max_steps=1)
    with pytest.raises(InputError, match=r"bidirectional_attention=True\.$"):
        SimCSETrainer(causal, alone, UNSUPERVISED)  # without it nothing would be trained


def test_nothing_to_train_on_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"contrastive_weight.*0 with another weight above 0"):
        build_args(tmp_path, contrastive_weight=0.0)


def test_the_blank_stands_for_what_is_masked(base):
    """As in LLM2Vec; a mask token, if there is one, no decoder has learned."""
    from simcse_trainer.model.tokenizer import find_mask_token

    tokenizer = tiny_decoder_tokenizer(mask_token="[MASK]")
    backbone = load(base, lora=False).backbone
    assert find_mask_token(tokenizer, backbone) == tokenizer.mask_token_id
    tokenizer.add_tokens(["_"])
    assert find_mask_token(tokenizer, backbone) == tokenizer.convert_tokens_to_ids("_")
