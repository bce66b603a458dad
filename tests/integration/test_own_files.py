"""A run writes, replaces and deletes its own files and nothing else, and says which model it is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT
from helpers.checks import refusal
from helpers.runs import train
from helpers.tiny import WORDS
from helpers.training import BEST, PAIRS, TRIPLETS, build_args, build_model, start
from transformers import TrainerCallback

from simcse_trainer import InputError, SimCSEModel, SimCSETrainer, lora_config

TEXTS = [" ".join(WORDS[i : i + 4]) for i in range(5)]


@pytest.mark.field("1e")
def test_files_in_a_checkpoint_that_is_rotated_away_stay(tmp_path):
    class Note(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                (tmp_path / "checkpoint-2/notes.md").write_text("mine", encoding="utf-8")

    start(
        tmp_path, callbacks=[Note()], save_strategy="steps", save_steps=2, save_total_limit=1
    ).train()
    assert (tmp_path / "checkpoint-2/notes.md").is_file()
    assert not (tmp_path / "checkpoint-2/model.safetensors").exists()


@pytest.mark.field("1f")
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "model.safetensors.index.json", "modules.json"]
)
def test_a_foreign_file_that_changes_what_is_loaded_refuses_the_run(name, tmp_path):
    (tmp_path / name).write_text("{}", encoding="utf-8")
    trainer = start(tmp_path)
    said = refusal(lambda: (trainer.train(), trainer.save_model()))
    assert name in said
    assert (tmp_path / name).read_text(encoding="utf-8") == "{}"
    assert trainer.state.global_step == 0, "before training"


def test_saving_a_model_in_a_folder_of_somebody_elses_deletes_nothing(tmp_path):
    theirs = ["lora/x.csv", "01_raw/train.csv", "model_old.safetensors", "adapter/y.txt"]
    for name in theirs:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    for seed in (0, 1):
        build_model(seed=seed).save_pretrained(tmp_path)
    assert [n for n in theirs if (tmp_path / n).is_file()] == theirs


def make_old(folder: Path) -> None:
    """Turn the checkpoints and the model of a folder into those of version 0.1.0."""
    for path in (folder, *folder.glob("checkpoint-*")):
        manifest = path / "simcse_manifest.json"
        if manifest.is_file():
            listed = json.loads(manifest.read_text(encoding="utf-8"))["files"]
            manifest.unlink()
            if path != folder:
                sizes = {name: record["size"] for name, record in listed.items()}
                text = json.dumps({"files": sizes})
                (path / "checkpoint_files.json").write_text(text, encoding="utf-8")


def test_a_run_of_the_old_version_loads_and_resumes_and_loses_nothing(tmp_path):
    complete = start(tmp_path / "whole", max_steps=6)
    complete.train()
    trainer = start(tmp_path / "out", max_steps=6, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    make_old(out)
    for name in ("model.safetensors", "optimizer.pt"):
        (out / "checkpoint-6" / name).unlink()
    (out / "lora").mkdir()
    (out / "lora/notes.md").write_text("mine", encoding="utf-8")
    assert SimCSEModel.from_pretrained(out).encode(TEXTS).shape == (5, 32)
    before = {path for path in out.rglob("*") if path.is_file()}
    resumed = start(out, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    after = {path for path in out.rglob("*") if path.is_file()}
    kept = {Path(str(path).replace("checkpoint-6/", "checkpoint-6.before/")) for path in before}
    replaced = {path for path in before if path.parent == out}
    assert kept - after - replaced == set()
    for name, tensor in complete.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name


SLOW = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from helpers.training import start
from transformers import TrainerCallback

class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        Path(sys.argv[1] + ".step").write_text(str(state.global_step))
        time.sleep(0.3)

start(Path(sys.argv[1]), callbacks=[Slow()], max_steps=200, save_strategy="steps", save_steps=1,
      save_total_limit=2).train()
"""


def start_elsewhere(folder: Path) -> subprocess.Popen:
    """A run in another process, which has made a few steps."""
    paths = [str(ROOT / "tests")]
    process = subprocess.Popen([sys.executable, "-c", SLOW.format(paths=paths), str(folder)])
    deadline = time.monotonic() + 90
    while not list(folder.glob("checkpoint-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


@pytest.mark.field("7a")
@pytest.mark.slow
def test_a_second_run_in_the_folder_of_a_running_one_is_refused(tmp_path):
    first = start_elsewhere(tmp_path / "out")
    try:
        said = refusal(lambda: start(tmp_path / "out").train(resume_from_checkpoint=True))
        first_pid = first.pid
    finally:
        first.kill()
        first.wait()
    assert "in use" in said
    assert str(first_pid) in said


@pytest.mark.slow
def test_a_killed_run_is_resumed_at_once_though_its_lock_names_this_process(tmp_path):
    """In a restarted container the new run has the host and the process id of the old one."""
    out = tmp_path / "out"
    first = start_elsewhere(out)
    first.send_signal(signal.SIGKILL)
    first.wait()
    lock = out / ".simcse-lock"
    said = json.loads(lock.read_text(encoding="utf-8"))
    lock.write_text(json.dumps(said | {"process": os.getpid()}), encoding="utf-8")
    step = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
    resumed = start(out, max_steps=step + 1)
    begun = time.monotonic()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == step + 1
    assert time.monotonic() - begun < 20
    assert not lock.exists()


@pytest.mark.field("8a")
def test_rotation_goes_by_step_though_the_clock_was_set_back(tmp_path):
    class SetBack(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            then = time.time() + 10_000 - 100 * state.global_step
            for path in tmp_path.glob(f"checkpoint-{state.global_step}"):
                os.utime(path, (then, then))

    start(
        tmp_path,
        callbacks=[SetBack()],
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
    ).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}


@pytest.mark.field("8b")
def test_the_newest_checkpoint_is_that_of_the_last_step_though_the_clock_was_set_back(tmp_path):
    start(tmp_path, save_strategy="steps", save_steps=2).train()
    os.utime(tmp_path / "checkpoint-4", (1, 1))
    resumed = start(tmp_path, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=2)
    resumed.train(resume_from_checkpoint=True)
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


@pytest.mark.field("9a")
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_of_somebody_else_that_the_run_would_replace_refuses_it(name, tmp_path):
    (tmp_path / name).write_bytes(b"mine")
    trainer = start(tmp_path)
    said = refusal(lambda: (trainer.train(), trainer.save_model()))
    assert (tmp_path / name).read_bytes() == b"mine"
    assert name in said
    assert "overwrite_output_dir=True" in said
    assert trainer.state.global_step == 0, "before training"


@pytest.mark.field("9b")
def test_the_finished_model_of_another_run_is_not_replaced(tmp_path):
    first = start(tmp_path)
    first.train()
    first.save_model()
    before = (tmp_path / "model.safetensors").read_bytes()
    second = start(tmp_path, TRIPLETS)
    said = refusal(lambda: (second.train(), second.save_model()))
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert "finished model of another run" in said
    assert second.state.global_step == 0, "before training"


@pytest.mark.field("9c")
@pytest.mark.parametrize("name", ["README.md", "config.json", "training_args.json"])
def test_the_command_line_refuses_a_folder_with_other_work_in_one_line(name, run, capsys):
    Path("out").mkdir()
    Path("out", name).write_text("mine", encoding="utf-8")
    status = train(run)
    assert Path("out", name).read_text(encoding="utf-8") == "mine"
    assert status == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert name in last


@pytest.mark.field("9d")
def test_the_option_named_in_the_refusal_replaces_ours_and_keeps_theirs(run, capsys):
    assert train(run) == 0
    first = Path("out/model.safetensors").read_bytes()
    assert train(run | {"seed": 7}) == 2, "the first run's model is finished work"
    assert Path("out/model.safetensors").read_bytes() == first
    Path("out/README.md").write_text("by hand", encoding="utf-8")
    Path("out/notes.md").write_text("mine", encoding="utf-8")
    assert train(run | {"seed": 7}, "--overwrite_output_dir", "true") == 0
    assert Path("out/model.safetensors").read_bytes() != first
    assert Path("out/README.md.before").read_text(encoding="utf-8") == "by hand"
    assert Path("out/notes.md").read_text(encoding="utf-8") == "mine"
    for name in ("config.json", "1_Pooling/config.json"):
        assert Path("out", name).is_file()


def test_overwriting_moves_aside_what_no_run_has_written(run):
    Path("out/checkpoint-2").mkdir(parents=True)
    Path("out/checkpoint-2/optimizer.pt").write_text("theirs", encoding="utf-8")
    Path("out/config.json").write_text("theirs", encoding="utf-8")
    options = run | {"save_strategy": "steps", "save_steps": 2}
    assert train(options, "--overwrite_output_dir", "true") == 0
    kept = Path("out/checkpoint-2.before/optimizer.pt"), Path("out/config.json.before")
    assert [path.read_text(encoding="utf-8") for path in kept] == ["theirs", "theirs"]


@pytest.fixture
def base(tmp_path):
    """A model of one's own, the base of adapters."""
    build_model().save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("lora_save", [None, "both"])
def test_an_adapter_never_takes_the_place_of_its_base(lora_save, base, tmp_path):
    before = contents(base)
    model = SimCSEModel.from_pretrained(base, lora=lora_config(r=2))
    (tmp_path / "link").symlink_to(base)
    for folder in (base, f"{base}/../mine", tmp_path / "link"):
        with pytest.raises(InputError, match="holds the base model of this adapter"):
            model.save_pretrained(folder, lora_save=lora_save)
    assert contents(base) == before
    expected = model.encode(TEXTS)
    model.save_pretrained(base, lora_save="merged")  # as the message says
    torch.testing.assert_close(SimCSEModel.from_pretrained(base).encode(TEXTS), expected)


@pytest.mark.parametrize("lora_save", ["adapter", "merged"])
def test_a_run_leaves_the_base_of_its_adapter_alone(lora_save, base):
    before = contents(base)
    model = SimCSEModel.from_pretrained(base, lora=lora_config(r=2))
    args = build_args(base, overwrite_output_dir=True, lora_save=lora_save)
    with pytest.raises(InputError, match=r"holds the base model of the adapter.*output_dir"):
        SimCSETrainer(model, args, TRIPLETS).train()
    assert contents(base) == before


@pytest.mark.parametrize("lora", [False, True])
def test_the_checkpoint_that_a_run_begins_with_is_not_deleted(lora, tmp_path):
    start(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1).train()
    checkpoint = tmp_path / "run/checkpoint-1"
    before = contents(tmp_path / "run")
    adapter = {"lora": lora_config(r=2)} if lora else {}
    model = SimCSEModel.from_pretrained(checkpoint, **adapter)
    options = {"overwrite_output_dir": True, "allow_resume_mismatch": True}  # other data
    args = build_args(tmp_path / "run", **options)
    with pytest.raises(InputError, match=r"would delete .*checkpoint-1, which the run begins"):
        SimCSETrainer(model, args, TRIPLETS).train()
    assert contents(tmp_path / "run") == before
    if not lora:  # a run that is resumed deletes none of its own
        SimCSETrainer(model, args, TRIPLETS).train(resume_from_checkpoint=str(checkpoint))
        assert checkpoint.is_dir()


def test_no_recipe_overwrites():
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert "overwrite_output_dir" not in yaml.safe_load(path.read_text(encoding="utf-8")), path
    assert "quickstart.yaml --overwrite_output_dir true" in (ROOT / "Makefile").read_text("utf-8")


class Died(BaseException):
    """As a process that is killed between two operations of the file system."""


def die_after(count: int, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let the process die at the next operation in a folder after `count` of them."""
    left = [count]

    def dying(original):
        def call(*args, **kwargs):
            if str(args[0]).startswith(str(folder)):
                left[0] -= 1
                if left[0] < 0:
                    raise Died
            return original(*args, **kwargs)

        return call

    for owner, name in ((Path, "replace"), (Path, "rename"), (Path, "unlink"), (os, "replace")):
        patch.setattr(owner, name, dying(getattr(owner, name)))


def read(folder: Path) -> torch.Tensor | None:
    try:
        return SimCSEModel.from_pretrained(folder).encode(TEXTS)
    except (InputError, OSError):
        return None


@pytest.mark.field("10a")
def test_a_reader_finds_the_old_model_or_the_new_one_or_an_error(tmp_path, monkeypatch):
    folder = tmp_path / "out"
    trainer = start(folder, max_steps=1)
    trainer.train()
    trainer.save_model()
    shutil.copytree(folder, tmp_path / "pristine")
    expected = {"old": read(folder)}
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    trainer.model.pooling_mode = "mean"
    expected["new"] = trainer.model.eval().encode(TEXTS)
    seen = set()
    for count in range(200):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "pristine", folder)
        ended = False
        with monkeypatch.context() as patch, contextlib.suppress(Died):
            die_after(count, folder, patch)
            trainer.save_model()
            ended = True
        found = read(folder)
        if found is not None:
            like = [n for n, one in expected.items() if torch.allclose(found, one, atol=1e-6)]
            assert like, f"a mixture after {count} operations"
            seen |= {*like}
        if ended:
            break
    assert ended
    assert seen == {"old", "new"}


def score_in_card(folder: Path) -> float:
    card = (folder / "README.md").read_text(encoding="utf-8")
    row = re.search(r"\| *(?:stsb|STS-B|STS Benchmark|STSB)[^|]*\|(.*)\|", card, re.IGNORECASE)
    assert row, card
    return float(row[1].split("|")[-1].strip().strip("*"))


def get_score(folder: Path) -> float:
    """Of the weights that the folder holds, measured anew."""
    model = SimCSEModel.from_pretrained(folder)
    args = build_args(folder.parent / "measured")
    trainer = SimCSETrainer(model, args, eval_dataset={"stsb": PAIRS})
    return trainer.evaluate()["eval_stsb_spearman"]


class Worse(TrainerCallback):
    """The score is best at step 2, whatever the tiny model does: later weights are spoilt."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step >= 2:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))


def finish(trainer: SimCSETrainer, folder: Path) -> None:
    trainer.save_model()
    trainer.create_model_card()
    assert score_in_card(folder) == pytest.approx(get_score(folder), abs=0.006)


class StopAtFour(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


@pytest.mark.field("16a")
def test_the_card_of_a_run_that_was_moved_is_of_the_model_in_the_folder(tmp_path):
    start(tmp_path / "here", max_steps=6, callbacks=[Worse(), StopAtFour()], **BEST).train()
    (tmp_path / "here").rename(tmp_path / "there")
    resumed = start(tmp_path / "there", max_steps=6, callbacks=[Worse()], **BEST)
    resumed.train(resume_from_checkpoint=str(tmp_path / "there/checkpoint-4"))
    assert resumed.state.best_global_step == 2, "the case this test is about"
    finish(resumed, tmp_path / "there")


@pytest.mark.field("16b")
def test_the_card_after_a_disk_that_was_full_is_of_the_model_in_the_folder(tmp_path, monkeypatch):
    from transformers import Trainer

    original = Trainer._save_optimizer_and_scheduler

    def full(self, output_dir):
        if self.state.global_step == 2:
            raise OSError(28, "No space left on device")
        return original(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    trainer = start(tmp_path / "out", max_steps=6, callbacks=[Worse()], **BEST)
    trainer.train()
    finish(trainer, tmp_path / "out")


@pytest.mark.field("18a")
def test_a_checkpoint_without_the_optimizer_is_not_resumed_from(tmp_path):
    start(tmp_path, save_strategy="steps", save_steps=2, save_only_model=True).train()
    resumed = start(tmp_path, max_steps=6)
    said = refusal(lambda: resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4")))
    assert "save_only_model" in said
    assert resumed.state.global_step == 0


def test_a_file_that_came_while_it_trained_is_named_and_the_model_is_beside_it(tmp_path):
    trainer = start(tmp_path)
    trainer.train()
    (tmp_path / "config.json").write_text("mine", encoding="utf-8")
    said = refusal(trainer.save_model)
    assert "config.json" in said
    assert "Free some space" not in said
    assert (tmp_path / "config.json").read_text(encoding="utf-8") == "mine"
    assert SimCSEModel.from_pretrained(tmp_path / "model-4").encode(TEXTS).shape == (5, 32)
