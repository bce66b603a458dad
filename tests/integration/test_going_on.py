"""A run that was stopped and resumed is the one that was not; what cannot be is refused."""

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from datasets import Dataset
from helpers import ROOT
from helpers.checks import refusal
from helpers.tiny import WORDS, save_tiny
from helpers.training import BEST, PAIRS, TRIPLETS, UNSUPERVISED, build_args, build_model
from safetensors import safe_open
from transformers import TrainerCallback

from simcse_trainer import SimCSEModel, SimCSETrainer, SimCSETrainingArguments
from simcse_trainer.data.loading import load_training_data
from simcse_trainer.model.lora import lora_config


class Terminate(TrainerCallback):
    """SIGTERM in a step, as from a scheduler that wants its machine back."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def evaluated(folder: Path, callbacks=None, **options) -> SimCSETrainer:
    args = build_args(folder, **(BEST | {"max_steps": 6, "greater_is_better": False} | options))
    data = {"stsb": Dataset.from_dict(PAIRS)}
    return SimCSETrainer(build_model(), args, UNSUPERVISED, data, callbacks=callbacks)


def scores(trainer: SimCSETrainer) -> dict[int, float]:
    log = trainer.state.log_history
    return {one["step"]: one["eval_avg_sts"] for one in log if "eval_avg_sts" in one}


@pytest.mark.field("14a")
@pytest.mark.parametrize("by", ["steps", "epoch"])
def test_the_evaluation_of_the_step_at_which_a_run_was_stopped_is_not_lost(by, tmp_path):
    options = {"save_strategy": by, "eval_strategy": by}
    step = 4
    if by == "epoch":
        options |= {"max_steps": 10}
        step = 5  # 40 rows are 5 batches
    complete = evaluated(tmp_path / "whole", **options)
    complete.train()
    stopped = evaluated(tmp_path / "out", [Terminate(step)], **options)
    stopped.train()
    assert stopped.state.global_step == step
    assert stopped.interrupted
    resumed = evaluated(tmp_path / "out", **options)
    resumed.train(resume_from_checkpoint=True)
    assert scores(resumed) == pytest.approx(scores(complete))
    assert resumed.state.best_global_step == complete.state.best_global_step
    for name, tensor in complete.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.field("18b")
def test_what_a_terminated_run_leaves_can_be_resumed_though_only_models_are_saved(tmp_path):
    def start(callbacks=None):
        args = build_args(tmp_path, save_strategy="steps", save_steps=50, save_only_model=True)
        return SimCSETrainer(build_model(), args, UNSUPERVISED, callbacks=callbacks)

    stopped = start([Terminate(3)])
    stopped.train()
    assert stopped.interrupted
    assert (tmp_path / "checkpoint-3/optimizer.pt").is_file()
    resumed = start()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


@pytest.fixture
def streamed(tmp_path):
    """Makes a trainer on a stream; what it was trained on is noted."""

    def make(seen: list, *, offset: int = 0, buffer: int = 20, **options) -> SimCSETrainer:
        path = tmp_path / f"corpus{offset}.txt"
        lines = [f"{WORDS[i % 17]} {WORDS[(5 * i + offset) % 17]} {i % 7}" for i in range(40)]
        path.write_text("\n".join(lines), encoding="utf-8")
        data = load_training_data([str(path)], streaming=True).shuffle(seed=1, buffer_size=buffer)
        defaults = {"max_steps": 12, "save_strategy": "steps", "save_steps": 7}
        args = build_args(tmp_path / "out", **(defaults | options))
        trainer = SimCSETrainer(build_model(), args, data)
        original = trainer.training_step

        def step(model, inputs, *more):
            seen.append(inputs["input_ids"].flatten().tolist())
            return original(model, inputs, *more)

        trainer.training_step = step
        return trainer

    return make


@pytest.mark.field("13b")
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_stream_goes_on_in_its_second_pass_with_the_same_batches(accumulated, streamed):
    complete, again = [], []
    options = {"gradient_accumulation_steps": accumulated}
    first = streamed(complete, **options)
    first.train()
    resumed = streamed(again, **options)
    resumed.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-7"))
    assert again == complete[-len(again) :]
    assert len(again) < len(complete)
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


@pytest.mark.field("13c")
@pytest.mark.parametrize("change", [{"offset": 3}, {"buffer": 5}], ids=["data", "buffer"])
def test_a_stream_of_other_data_or_in_another_order_is_not_gone_on_with(change, streamed):
    first = streamed([])
    first.train()
    other = streamed([], **change)
    checkpoint = str(Path(first.args.output_dir) / "checkpoint-7")
    said = refusal(lambda: other.train(resume_from_checkpoint=checkpoint))
    assert "is of another run" in said
    assert "allow_resume_mismatch" in said


@pytest.mark.field("11a")
def test_a_process_that_does_not_save_writes_nothing(tmp_path, monkeypatch):
    """FSDP2 calls it with an empty state in all processes but the first."""
    base = save_tiny(tmp_path / "base", "bert")
    model = SimCSEModel.from_pretrained(base, lora=lora_config(r=2))
    trainer = SimCSETrainer(model, build_args(tmp_path / "out"), TRIPLETS)
    monkeypatch.setattr(SimCSETrainingArguments, "should_save", property(lambda self: False))
    try:
        trainer._save(str(tmp_path / "out"), state_dict={})
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}")
    assert not list((tmp_path / "out").rglob("*.safetensors"))


@pytest.mark.field("11b")
@pytest.mark.parametrize("adapted", [True, False])
def test_a_model_without_a_tensor_is_never_saved(adapted, tmp_path):
    base = save_tiny(tmp_path / "base", "bert")
    options = {"lora": lora_config(r=2)} if adapted else {}
    model = SimCSEModel.from_pretrained(base, **options)
    trainer = SimCSETrainer(model, build_args(tmp_path / "out"), TRIPLETS)
    failed = False
    try:
        trainer._save(str(tmp_path / "saved"), state_dict={})
    except RuntimeError:
        failed = True
    counts = []
    for path in (tmp_path / "saved").rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            counts.append(len(file.keys()))
    assert failed
    assert 0 not in counts


@pytest.mark.field("15a")
def test_too_few_rows_for_all_processes_are_named_with_the_processes(tmp_path, monkeypatch):
    args = build_args(tmp_path, per_device_train_batch_size=24, dataloader_drop_last=True)
    monkeypatch.setattr(SimCSETrainingArguments, "world_size", property(lambda self: 2))
    from simcse_trainer.training.validation import check_size

    said = refusal(lambda: check_size(UNSUPERVISED.add_column("input_ids", [[[2]]] * 40), args))
    assert "40 rows" in said
    assert "2 processes" in said


@pytest.mark.field("15b")
def test_persistent_workers_are_refused_for_they_make_a_resumed_run_another(tmp_path):
    options = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}
    said = refusal(lambda: SimCSETrainer(build_model(), build_args(tmp_path, **options), TRIPLETS))
    assert "dataloader_persistent_workers" in said


@pytest.mark.field("15c")
@pytest.mark.parametrize("name", ["deepspeed_zero2", "fsdp2", "multi_gpu"])
def test_a_launcher_leaves_the_precision_to_the_recipe(name):
    text = (ROOT / f"configs/accelerate/{name}.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text)["mixed_precision"] == "no"


@pytest.mark.field("15d")
def test_processes_share_the_work_of_an_evaluation_and_find_the_same(tmp_path):
    model = build_model().eval()
    texts = PAIRS["sentence1"] + PAIRS["sentence2"]
    complete = model.encode(texts, batch_size=3)
    calls, shares = [], []
    model.register_forward_hook(lambda *_: calls.append(1))
    try:
        for rank in range(3):
            calls.append(0)
            shares.append(model.encode(texts, batch_size=3, shard=(rank, 3)))
    except TypeError:
        pytest.fail("every process evaluates everything")
    torch.testing.assert_close(sum(shares), complete)
    counts = "".join(map(str, calls)).split("0")[1:]
    assert counts == ["111"] * 3, "each process runs the model as often, and a third of the times"


@pytest.mark.parametrize(
    ("state", "options", "named"),
    [
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, {}, "load_best_model_at_end"),
        (
            {"fsdp_plugin": SimpleNamespace(activation_checkpointing=True)},
            {"load_best_model_at_end": False},
            "activation_checkpointing=True",
        ),
    ],
)
def test_what_an_engine_cannot_do_right_is_refused(state, options, named, tmp_path):
    from simcse_trainer.training.validation import check_engine

    args = build_args(tmp_path, **(BEST | options))
    assert named in refusal(lambda: check_engine(SimpleNamespace(**state), args, build_model()))
    state = {"deepspeed_plugin": SimpleNamespace(zero_stage=2)}
    assert refusal(lambda: check_engine(SimpleNamespace(**state), args, build_model())) == ""
