"""Errors name what was called: options at the command line, parameters in Python."""

import pytest
from helpers.checks import fails
from helpers.command_line import error
from helpers.training import UNSUPERVISED, build_args, build_model

from simcse_trainer import InputError, SimCSETrainer
from simcse_trainer.errors import at_command_line, name_parameters


@pytest.mark.parametrize(
    ("option", "parameter"),
    [
        ("Pass --streaming false.", "Pass streaming=False."),
        ("Pass --mini_batch_size 4, or auto.", "Pass mini_batch_size=4, or auto."),
        ("Pass --learning_rate 3e-05.", "Pass learning_rate=3e-05."),
        ("Pass --lora_save merged.", "Pass lora_save='merged'."),
        ("Pass a smaller --max_seq_length.", "Pass a smaller max_seq_length."),
        ("Load it with --use_lora true first", "Load it with lora=lora_config() first"),
        ("Pass --eval_tasks, or --eval_strategy no.", "Pass eval_dataset, or eval_strategy='no'."),
        ("Run: pip install --no-deps a", "Run: pip install --no-deps a"),
        ("so: simcse-trainer push ... --overwrite", "so: simcse-trainer push ... --overwrite"),
        (
            "`accelerate launch --num_processes 2`, --bf16",
            "`accelerate launch --num_processes 2`, bf16",
        ),
        ("a -- b, -1 and a--bc", "a -- b, -1 and a--bc"),
    ],
)
def test_options_become_parameters(option, parameter):
    assert name_parameters(option) == parameter
    assert str(InputError(option)) == parameter
    assert str(InputError(parameter)) == parameter  # as it comes from another process
    with at_command_line:
        assert str(InputError(option)) == option
    assert str(InputError(option)) == parameter


def test_warnings_too_name_what_was_called(tmp_path, caplog):
    args = build_args(tmp_path, gradient_accumulation_steps=2)
    with caplog.at_level("WARNING"):
        SimCSETrainer(build_model(), args, UNSUPERVISED)
        assert "pass gradient_accumulation_steps=1 per_device_train_batch_size=16" in caplog.text
        assert "--" not in caplog.text
        caplog.clear()
        with at_command_line:
            SimCSETrainer(build_model(), args, UNSUPERVISED)
    assert "--gradient_accumulation_steps 1 --per_device_train_batch_size 16" in caplog.text


def test_the_same_mistake_in_python_and_at_the_command_line(monkeypatch, capsys, tmp_path):
    message = fails(
        lambda: SimCSETrainer(
            build_model(), build_args(tmp_path, eval_strategy="epoch"), UNSUPERVISED
        ),
        "Pass eval_dataset, or eval_strategy='no'.",
    )
    assert "--" not in str(message)
    monkeypatch.chdir(tmp_path)
    words = ("--train_file", "none.csv", "--neighbor_queries", "a", "--use_cpu")
    assert "pass --eval_tasks." in error(monkeypatch, capsys, "train", *words)
