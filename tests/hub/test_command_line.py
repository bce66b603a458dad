"""`train_simcse.py` with the Hub: push, lose the machine, resume on another."""

import pytest
import torch
import yaml
from helpers.hub_runs import TOKEN
from helpers.loopback import LoopbackHub
from safetensors.torch import load_file

from simcse_trainer.cli.train import main


@pytest.fixture
def config(run, hub: LoopbackHub) -> str:
    options = {
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": 4,
        "push_to_hub": True,
        "hub_model_id": "me/tiny",
        "hub_always_push": True,
        "hub_timeout_s": 3,
    }
    with open("run.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(run | options, file)
    return "run.yaml"


def test_a_run_goes_on_from_the_hub_to_the_weights_it_would_have_had(
    config, hub: LoopbackHub, monkeypatch, capsys, caplog
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main([config]) == 0
    repo = hub.repos["me/tiny"]
    assert [commit.title.split(":")[0] for commit in repo.commits()] == [
        "step 8",  # the final model with its last scores
        "step 8",
        "step 4",
        "initial commit",
    ]
    assert b"## Evaluation" in repo.files()["README.md"]
    state = repo.commits("training-state")[1].sha
    elsewhere = [config, "--output_dir", "elsewhere", "--push_to_hub", "false"]
    elsewhere += ["--resume_from_hub", f"me/tiny@{state}"]
    for change in (
        ["--per_device_train_batch_size", "4"],
        ["--pooling_mode", "cls"],
        ["--train_file", "train.txt"],
    ):
        capsys.readouterr()
        assert main([*elsewhere, *change]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: checkpoint-4 is of another run ("), error
        assert "--allow_resume_mismatch" in error
        if "--resume_from_checkpoint" not in elsewhere:
            # What was fetched is a checkpoint like any other, and not fetched over.
            assert main(elsewhere) == 2
            assert "elsewhere holds checkpoint-4" in capsys.readouterr().err
            elsewhere += ["--resume_from_checkpoint", "true"]
    assert main(elsewhere) == 0
    there, here = load_file("elsewhere/model.safetensors"), load_file("out/model.safetensors")
    assert all(torch.equal(there[name], here[name]) for name in here)


@pytest.mark.slow
def test_other_options_are_a_warning(config, hub: LoopbackHub, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main([config, "--hub_strategy", "all_checkpoints"]) == 0
    state = hub.repos["me/tiny"].commits("training-state")[1].sha
    words = [config, "--output_dir", "elsewhere", "--push_to_hub", "false"]
    words += ["--resume_from_hub", f"me/tiny@{state}"]
    change = ["--temperature", "0.1", "--per_device_train_batch_size", "4"]
    assert main([*words, *change, "--allow_resume_mismatch", "true"]) == 0
    assert "Resuming with a change: temperature: 0.05 then, 0.1 now." in caplog.text
    assert "batch per_device_train_batch_size: 8 then, 4 now" in caplog.text


@pytest.mark.slow
def test_a_hub_that_does_not_take_it_is_said_at_the_end(
    config, hub: LoopbackHub, monkeypatch, caplog
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.inject("commit", "503", None)
    assert main([config, "--hub_final_timeout_s", "1"]) == 0
    assert "Finish with: simcse-trainer push out me/tiny" in caplog.text


def test_only_the_final_model_where_that_is_asked_for(config, hub: LoopbackHub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main([config, "--hub_strategy", "end", "--hub_revision", "trial"]) == 0
    repo = hub.repos["me/tiny"]
    assert [commit.title.split(":")[0] for commit in repo.commits("trial")][:1] == ["step 8"]
    assert [commit.title for commit in repo.commits()] == ["initial commit"]
    assert "training-state-trial" in repo.branches


def test_a_wrong_token_stops_before_the_data_is_read(config, hub: LoopbackHub, capsys):
    assert main([config, "--hub_token", "hf_wrong0123456789", "--train_file", "no-such.csv"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(
        "error: push_to_hub: me/tiny cannot be pushed to: the Hub does not know"
    )
    assert "hf_wrong" not in error
