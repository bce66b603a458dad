"""Kills, terminations, full disks, half checkpoints: nothing is lost or resumed wrongly."""

import json
import logging
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.training import TRIPLETS, build_args, build_model
from transformers import TrainerCallback

from simcse_trainer import InputError, SimCSETrainer
from simcse_trainer.files import MANIFEST, TMP_PREFIX
from simcse_trainer.model.io.checkpoints import find_checkpoint, validate_checkpoint


@pytest.mark.parametrize(
    "kills",
    [
        {"SIGKILL": 2, "SIGTERM": 1},
        pytest.param({"SIGKILL": 25, "SIGTERM": 10}, marks=pytest.mark.slow),
    ],
    ids=["some", "many"],
)
def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bits(kills, tmp_path):
    script = ROOT / "tests/helpers/kills.py"
    words = [str(word) for kill in kills.items() for word in kill]
    run = subprocess.run(
        [sys.executable, script, tmp_path, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    tallies = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    print(kills, tallies)
    assert [tally["killed"] for tally in tallies] == list(kills.values())
    assert all(tally["finished"] == tally["identical"] >= 1 for tally in tallies)


@pytest.fixture
def saved(tmp_path):
    """A run with three checkpoints."""
    args = build_args(tmp_path, save_strategy="steps", save_steps=2)
    SimCSETrainer(build_model(), args, TRIPLETS).train()
    return tmp_path


class TestTornCheckpoints:
    @pytest.mark.parametrize(
        "name", ["optimizer.pt", "rng_state.pth", "model.safetensors", MANIFEST]
    )
    def test_a_missing_file_is_noticed_and_the_one_before_taken(self, saved, name, caplog):
        (saved / "checkpoint-6" / name).unlink()
        with caplog.at_level(logging.WARNING):
            assert find_checkpoint(saved) == saved / "checkpoint-4"
        assert f"checkpoint-6 is passed over: {name} is missing" in caplog.text

    def test_a_short_file_is_noticed(self, saved):
        path = saved / "checkpoint-6/optimizer.pt"
        path.write_bytes(path.read_bytes()[:-1])
        assert "optimizer.pt has" in validate_checkpoint(saved / "checkpoint-6")

    def test_it_is_not_resumed_from_by_name(self, saved):
        (saved / "checkpoint-6/rng_state.pth").unlink()
        trainer = SimCSETrainer(build_model(), build_args(saved), TRIPLETS)
        with pytest.raises(InputError, match=r"checkpoint-6 cannot be resumed from: rng_state"):
            trainer.train(resume_from_checkpoint=str(saved / "checkpoint-6"))

    def test_where_none_is_complete_resuming_says_so(self, saved):
        for path in saved.glob("checkpoint-*/optimizer.pt"):
            path.unlink()
        trainer = SimCSETrainer(build_model(), build_args(saved), TRIPLETS)
        with pytest.raises(InputError, match=r"no complete checkpoint.*optimizer\.pt is missing"):
            trainer.train(resume_from_checkpoint=True)


def test_checkpoints_are_whole_and_nothing_is_left_aside(saved):
    assert sorted(p.name for p in saved.iterdir()) == [f"checkpoint-{i}" for i in (2, 4, 6)]
    assert all(validate_checkpoint(path) is None for path in saved.iterdir())


def test_rotation_and_the_best_model_know_the_final_names(tmp_path):
    from datasets import Dataset
    from helpers.training import PAIRS

    args = build_args(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
    )
    trainer = SimCSETrainer(build_model(), args, TRIPLETS, Dataset.from_dict(PAIRS))
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert validate_checkpoint(best) is None
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    assert len(list(tmp_path.glob("checkpoint-*"))) == 1


class FullDisk(TrainerCallback):
    """From a step on no file can grow beyond a few kilobytes: the system refuses the write."""

    def __init__(self, step: int):
        self.step = step
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, self.before[1]))

    def lift(self):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.fixture
def full_disk():
    disk = FullDisk(3)
    yield disk
    disk.lift()


def test_a_full_disk_does_not_end_training(full_disk, tmp_path, caplog):
    args = build_args(tmp_path, save_strategy="steps", save_steps=2)
    trainer = SimCSETrainer(build_model(), args, TRIPLETS, callbacks=[full_disk])
    with caplog.at_level(logging.WARNING):
        assert trainer.train().global_step == 6
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert caplog.text.count("could not be saved") == 2
    assert "Training continues" in caplog.text
    with pytest.raises(InputError, match=r"could not be saved.*checkpoint-2 is complete"):
        trainer.save_model()
    full_disk.lift()
    trainer.save_model()
    assert (tmp_path / "model.safetensors").is_file()
    assert not list(tmp_path.glob(f"{TMP_PREFIX}*"))


def test_the_full_disk_changes_no_weight(full_disk, tmp_path):
    weights = []
    for callbacks in ([], [full_disk]):
        args = build_args(tmp_path / str(len(callbacks)), save_strategy="steps", save_steps=2)
        trainer = SimCSETrainer(build_model(), args, TRIPLETS, callbacks=callbacks)
        trainer.train()
        weights.append(trainer.model.state_dict())
    full_disk.lift()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_failed_final_save_leaves_the_model_that_was_there(full_disk, saved):
    trainer = SimCSETrainer(build_model(), build_args(saved), TRIPLETS)
    trainer.save_model()
    before = (saved / "model.safetensors").read_bytes()
    full_disk.on_step_end(None, type("State", (), {"global_step": 3}), None)
    with pytest.raises(InputError, match="could not be saved"):
        trainer.save_model()
    full_disk.lift()
    assert (saved / "model.safetensors").read_bytes() == before
