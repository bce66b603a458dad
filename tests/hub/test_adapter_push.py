"""Adapters to the Hub and back: small commits while training, then what everyone loads."""

import pytest
import torch
from helpers.hub_runs import TEXTS, TOKEN, build, load
from helpers.loopback import LoopbackHub
from helpers.tiny import save_tiny
from helpers.training import TRIPLETS
from transformers import TrainerCallback

from simcse_trainer import SimCSEModel, SimCSETrainer
from simcse_trainer.model.io.terms import Terms, set_terms
from simcse_trainer.model.lora import lora_config
from simcse_trainer.training.resume import download_training_state

pytestmark = pytest.mark.usefixtures("client_here")


class StopAfter(TrainerCallback):
    """As a machine that is taken away."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def adapted(source: str) -> SimCSEModel:
    torch.manual_seed(0)
    lora = lora_config(r=2, dropout=0.2)
    return SimCSEModel.from_pretrained(
        source, lora=lora, bidirectional_attention=True, max_seq_length=20
    )


def build_trainer(folder, source, **options) -> SimCSETrainer:
    return build(folder, train_dataset=TRIPLETS, model=adapted(source), **options)


@pytest.mark.slow
def test_adapters_while_training_and_the_merged_model_at_the_end(hub: LoopbackHub, tmp_path):
    base = save_tiny(tmp_path / "base", "qwen3")
    trainer = build_trainer(tmp_path / "out", base)
    trainer.train()
    trainer.save_model()
    trainer.hub.finish()
    at_step, at_end = (set(hub.repos["me/tiny"].files(name)) for name in ("step-4", "main"))
    assert {"lora/adapter_model.safetensors", "simcse_adapter.json"} < at_step
    assert "config.json" not in at_step
    assert {"config.json", "model.safetensors"} < at_end
    assert not {name for name in at_end if "adapter" in name or "lora" in name}
    for revision, folder in (("step-4", "checkpoint-4"), (None, ".")):
        local = SimCSEModel.from_pretrained(tmp_path / "out" / folder).encode(TEXTS)
        # The base is a folder here, of which the Hub does not hear.
        options = f", base_model={base!r}" if revision else ""
        home = str(tmp_path / f"{revision}")
        found = load("SimCSEModel", "me/tiny", revision, options=options, HF_HOME=home)[0]
        torch.testing.assert_close(found, local, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_another_machine_goes_on_from_the_pushed_adapter(hub: LoopbackHub, tmp_path):
    source = save_tiny(tmp_path / "base", "qwen3")
    complete = build_trainer(tmp_path / "whole", source, push_to_hub=False)
    complete.train()
    stopped = build_trainer(tmp_path / "stopped", source, callbacks=[StopAfter(4)])
    stopped.train()
    checkpoint = download_training_state(
        "me/tiny", tmp_path / "resumed", token=TOKEN, timeout_s=3.0, patience_s=30.0
    )
    resumed = build_trainer(tmp_path / "resumed", source, push_to_hub=False)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 6
    for name, tensor in complete.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.slow
def test_what_a_licence_asks_for_is_published_with_adapters_and_models(hub: LoopbackHub, tmp_path):
    model = adapted(save_tiny(tmp_path / "base", "qwen3"))
    model.terms = Terms(
        "gemma", "google/x", "made", "The notice.", documents={"TERMS.html": b"all"}
    )
    set_terms(model.config, model.terms)
    trainer = build(tmp_path / "out", train_dataset=TRIPLETS, model=model, max_steps=4)
    trainer.train()
    trainer.save_model()
    trainer.hub.finish()
    for branch in ("step-4", "main"):
        assert {"NOTICE", "TERMS.html"} < set(hub.repos["me/tiny"].files(branch))
    found = SimCSEModel.from_pretrained(tmp_path / "out")
    assert found.terms == model.terms
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "license: gemma" in card
    assert "The notice." in card
