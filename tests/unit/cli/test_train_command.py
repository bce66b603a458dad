"""`simcse-trainer train` is `train_simcse.py`; and what all commands have in common."""

import os
import subprocess
import sys

import pytest
from helpers.command_line import error, run

from simcse_trainer import cli
from simcse_trainer.cli import train as script


@pytest.fixture
def words_of_training(monkeypatch):
    seen = []
    monkeypatch.setattr(script, "main", lambda argv: seen.append(argv) or 0)
    return seen


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--help"],
        ["-h"],
        ["run.yaml", "--max_steps", "-1", "--learning-rate=1e-5"],
        ["run.yaml", "--eval_tasks", "stsb", "sickr", "--bf16", "--lr_scheduler_type", "constant"],
        ["--train_file", "a b.txt", "--prompt", '"{text}" is', "--output_dir", "out"],
    ],
)
def test_every_word_reaches_training_as_it_was(monkeypatch, words_of_training, words):
    assert run(monkeypatch, "train", *words) == 0
    assert words_of_training == [words]


@pytest.mark.parametrize("status", [0, 2, 143])
def test_the_exit_status_is_that_of_training(monkeypatch, status):
    monkeypatch.setattr(script, "main", lambda argv: status)
    assert run(monkeypatch, "train", "run.yaml") == status


def test_mistakes_are_those_of_the_script(monkeypatch, capsys):
    said = error(monkeypatch, capsys, "train", "--temprature", "1")
    assert said == "error: unknown option 'temprature'. Did you mean 'temperature'?"


def test_help_is_that_of_the_script(monkeypatch, capsys):
    assert run(monkeypatch, "train", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: train_simcse.py [CONFIG.yaml]")


def test_every_command_has_help_with_an_example_and_waits_for_no_torch():
    names = [command.__name__.rsplit(".", 1)[-1] for command in cli._commands]
    code = (
        "import sys; from typer.testing import CliRunner; from simcse_trainer.cli import app\n"
        "for name in sys.argv[1:]:\n"
        "    out = CliRunner().invoke(app, [name, '--help']).output\n"
        "    assert f'Example: simcse-trainer {name}' in ' '.join(out.split()), out\n"
        "assert 'torch' not in sys.modules and 'gradio' not in sys.modules"
    )
    names.remove("train")  # its options are those of transformers
    subprocess.run([sys.executable, "-c", code, *names], check=True)


@pytest.mark.parametrize(
    ("typed", "expected"), [("en", "encode"), ("encode --out", "--output"), ("dem", "demo")]
)
def test_a_shell_completes(typed, expected):
    code = "import sys; sys.argv = ['simcse-trainer']; from simcse_trainer.cli import main; main()"
    words = f"simcse-trainer {typed}"
    asked = {
        "_SIMCSE_TRAINER_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True
    )
    assert found.stdout.split() == [expected]
