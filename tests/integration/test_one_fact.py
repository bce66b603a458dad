"""A fact is kept once: the second load has the options of the first, the card says what was."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.checks import refusal
from helpers.command_line import run as command
from helpers.runs import train
from helpers.tiny import save_tiny, tiny_backbone, tiny_tokenizer
from helpers.training import BEST, PAIRS, TRIPLETS, UNSUPERVISED, build_args, build_model

from simcse_trainer import SimCSEModel, SimCSETrainer
from simcse_trainer.hub.model_card import shell_command
from simcse_trainer.model.lora import lora_config

CODE = """
from transformers import BertModel


class OwnModel(BertModel):
    own = True
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch) -> Path:
    """A model that comes with code of its own."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "own"
    tiny_backbone("bert").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "modeling_own.py").write_text(CODE, encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"auto_map": {"AutoModel": "modeling_own.OwnModel"}, "model_type": "own-bert"}
    config["auto_map"]["AutoConfig"] = "modeling_own.OwnConfig"
    text = CODE + "\n\nfrom transformers import BertConfig\n\n\nclass OwnConfig(BertConfig):\n"
    text += '    model_type = "own-bert"\n\n\nOwnModel.config_class = OwnConfig\n'
    (folder / "modeling_own.py").write_text(text, encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.mark.field("19a")
def test_a_run_with_code_of_its_own_ends_with_its_best_model(own_code, tmp_path):
    model = SimCSEModel.from_pretrained(str(own_code), trust_remote_code=True, max_seq_length=20)
    args = build_args(tmp_path / "out", **BEST, max_steps=4)
    trainer = SimCSETrainer(model, args, TRIPLETS, {"stsb": Dataset.from_dict(PAIRS)})
    try:
        trainer.train()
        trainer.save_model()
    except ValueError as error:
        pytest.fail(str(error))
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.field("19b")
@pytest.mark.parametrize("name", ["encode", "search", "evaluate"])
def test_a_command_runs_code_of_a_model_where_it_is_said_and_never_asks(
    name, own_code, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("a dog\na cat\n", encoding="utf-8")
    rows = [f"{a},{b},{i}" for i, (a, b) in enumerate([("a dog", "a cat"), ("a man", "the mat")])]
    Path("pairs.csv").write_text("sentence1,sentence2,score\n" + "\n".join(rows), encoding="utf-8")
    words = {
        "encode": ["in.txt", "--output", "v.npy"],
        "search": ["a dog", "--corpus", "in.txt"],
        "evaluate": ["--tasks", "pairs.csv"],
    }[name]
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    assert command(monkeypatch, name, str(own_code), *words, "--trust_remote_code", "true") == 0
    capsys.readouterr()
    assert command(monkeypatch, name, str(own_code), *words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--trust_remote_code" in said


@pytest.mark.field("21a")
@pytest.mark.slow
def test_the_card_and_the_run_file_say_the_batch_that_was_found(tmp_path):
    args = build_args(
        tmp_path,
        per_device_train_batch_size=32,
        auto_find_batch_size=True,
        save_strategy="steps",
        save_steps=2,
        max_steps=2,
    )
    trainer = SimCSETrainer(build_model(), args, UNSUPERVISED)
    original = trainer.training_step

    def short_of_memory(model, inputs, *more):
        if inputs["text_ids"].shape[1] > 8:
            raise RuntimeError("CUDA out of memory.")
        return original(model, inputs, *more)

    trainer.training_step = short_of_memory
    trainer.train()
    found = trainer._train_batch_size
    assert found < 32, "the case this test is about"
    said = json.loads((tmp_path / "checkpoint-2/training_run.json").read_text(encoding="utf-8"))
    assert said["batch"]["per_device_train_batch_size"] == found
    trainer.create_model_card(tmp_path / "card")
    card = (tmp_path / "card/README.md").read_text(encoding="utf-8")
    assert re.search(rf"per_device_train_batch_size\W+{found}\b", card)


@pytest.mark.field("21b")
def test_half_precision_that_a_cpu_does_not_have_is_refused(tmp_path):
    args = build_args(tmp_path, fp16=True)
    said = refusal(lambda: SimCSETrainer(build_model(), args, TRIPLETS))
    assert "fp16" in said
    assert "bf16=True" in said


@pytest.mark.field("21c")
@pytest.mark.parametrize("word", ["--append_eos_token", "--append-eos-token"])
def test_an_option_whose_name_holds_token_is_no_secret(word):
    words = ["train_simcse.py", word, "true", "--hub_token", "hf_A", "--seed", "1"]
    assert shell_command(words) == f"train_simcse.py {word} true --seed 1"


@pytest.mark.field("22a")
@pytest.mark.parametrize("name", ["checkpoints", "checkpoint-final", "out"])
def test_a_folder_called_checkpoints_gets_the_card_of_what_is_in_it(name, tmp_path):
    base = save_tiny(tmp_path / "base", "bert")
    model = SimCSEModel.from_pretrained(base, lora=lora_config(r=2), max_seq_length=20)
    args = build_args(tmp_path / name, lora_save="merged", max_steps=1)
    trainer = SimCSETrainer(model, args, TRIPLETS)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / name / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / name / "model.safetensors").is_file()
    # AutoModel computes the head as its pooling layer: of a merged model, not of an adapter.
    assert "pooler_output" in card


@pytest.mark.field("22b")
def test_resuming_where_nothing_was_saved_begins_in_python_as_at_the_command_line(tmp_path, caplog):
    trainer = SimCSETrainer(build_model(), build_args(tmp_path / "out", max_steps=2), TRIPLETS)
    with caplog.at_level(logging.WARNING):
        assert refusal(lambda: trainer.train(resume_from_checkpoint=True)) == ""
    assert trainer.state.global_step == 2
    assert "training starts anew" in caplog.text


@pytest.mark.field("22c")
def test_a_stopped_run_is_evaluated_as_it_is_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    SimCSETrainer(build_model(), build_args(tmp_path / "out", **options), TRIPLETS).train()
    Path("pairs.csv").write_text(
        "sentence1,sentence2,score\na dog,a cat,1\na man,the mat,2\n", encoding="utf-8"
    )
    assert command(monkeypatch, "evaluate", "out", "--tasks", "pairs.csv") == 0


@pytest.mark.field("23a")
@pytest.mark.parametrize("kind", [TypeError, RuntimeError, ValueError])
def test_an_error_of_our_own_keeps_its_traceback(kind, run, monkeypatch):
    from simcse_trainer.training import dataset

    def broken(*args, **kwargs):
        raise kind("a bug of ours")

    monkeypatch.setattr(dataset, "warn_about_settings", broken)
    found = None
    try:
        train(run)
    except Exception as error:
        found = error
    assert type(found) is kind


@pytest.mark.field("5d")
def test_code_that_came_with_a_checkpoint_is_not_offered_at_the_terminal(
    own_code, tmp_path, monkeypatch
):
    """Resuming reads a checkpoint by the class in memory, whatever code lies in it."""
    args = build_args(tmp_path / "out", save_strategy="steps", save_steps=2, max_steps=4)
    SimCSETrainer(build_model(), args, TRIPLETS).train()
    checkpoint = tmp_path / "out/checkpoint-2"
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    config |= {"auto_map": {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}}
    config["model_type"] = "evil"
    text = json.dumps(config)
    size = len((checkpoint / "config.json").read_bytes())
    (checkpoint / "config.json").write_text(text, encoding="utf-8")
    for name in ("simcse_manifest.json", "checkpoint_files.json"):
        if (checkpoint / name).is_file():
            listed = (checkpoint / name).read_text(encoding="utf-8")
            changed = re.sub(rf"\b{size}\b", str(len(text)), listed)
            (checkpoint / name).write_text(changed, encoding="utf-8")
    (checkpoint / "evil.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n", encoding="utf-8"
    )
    asked = []
    monkeypatch.setattr("builtins.input", lambda *words: asked.append(words) or "y")
    torch.manual_seed(0)
    resumed = SimCSETrainer(build_model(), build_args(tmp_path / "out", max_steps=4), TRIPLETS)
    try:
        resumed.train(resume_from_checkpoint=str(checkpoint))
    except Exception as error:
        assert "trust_remote_code" in str(error)  # noqa: PT017
    assert not asked
    assert not list(tmp_path.rglob("ran"))
