"""`simcse-trainer train` is `train_simcse.py`; and what all commands have in common."""

import os
import re
import subprocess
import sys

import pytest
import typer
from helpers.command_line import error, run

from simcse_trainer import __version__, cli
from simcse_trainer.cli import models
from simcse_trainer.cli import train as script
from simcse_trainer.cli.config import build_parser


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


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_that_of_the_script(monkeypatch, capsys, word):
    assert run(monkeypatch, "train", word) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: train_simcse.py [CONFIG.yaml]")
    assert [said.count(f"\n{heading}\n") for heading in cli.help._GROUPS] == [1] * 10
    options = re.findall(r"^  --(\w+) ", said, re.MULTILINE)
    known = {action.dest for action in build_parser()._actions} - {"help"}
    assert sorted(options) == sorted(known)


def test_help_with_a_word_shows_the_options_that_have_it(monkeypatch, capsys):
    assert run(monkeypatch, "train", "--help", "Temperature") == 0
    said = capsys.readouterr().out
    assert re.findall(r"^  --(\w+) ", said, re.MULTILINE) == ["temperature"]
    assert "The objective\n\n  --temperature TEMPERATURE\n      Divides the cosine" in said
    assert "(default: 0.05)" in said
    assert "The model" not in said
    # Dashes, as they are typed; and what only the text has.
    for word in ("--pooling-mode", "tau"):
        assert run(monkeypatch, "train", "--help", word) == 0
        assert re.findall(r"^  --(\w+) ", capsys.readouterr().out, re.MULTILINE)


def test_help_with_a_word_that_nothing_has_says_what_is_nearest(monkeypatch, capsys):
    said = error(monkeypatch, capsys, "train", "--help", "temprature")
    assert said.startswith("error: No option has 'temprature' in its name or text. The nearest are")
    assert "are --temperature, " in said
    assert "--batch_size" in error(monkeypatch, capsys, "encode", "--help", "bach_size")
    assert error(monkeypatch, capsys, "encode", "-h", "qqqq").endswith("for all of them.")


@pytest.mark.parametrize("words", [["--help", "batch"], ["-h", "BATCH"], ["model", "-h", "batch"]])
def test_help_with_a_word_of_another_command(monkeypatch, capsys, words):
    assert run(monkeypatch, "encode", *words) == 0
    said = capsys.readouterr().out
    assert "--batch_size" in said
    assert "--dtype" not in said


@pytest.mark.parametrize("words", [["evaluate", "-h"], ["--help", "evaluate"], ["-h", "evaluate"]])
def test_help_in_groups(monkeypatch, capsys, words):
    assert run(monkeypatch, *words) == 0
    said = capsys.readouterr().out
    places = [said.index(panel) for panel in (models.TASKS, models.COMPUTING, models.LOADING)]
    assert said.index("--split") > places[0]
    assert said.index("--dtype") > places[2]


@pytest.mark.parametrize("word", ["--version", "-V"])
def test_the_version(monkeypatch, capsys, word):
    assert run(monkeypatch, word) == 0
    assert capsys.readouterr().out == f"simcse-trainer {__version__}\n"


def options_of(name: str) -> dict[str, set[str]]:
    """Name of each option of a command -> its spellings."""
    params = typer.main.get_command(cli.app).commands[name].params
    return {p.name: {*p.opts} for p in params if p.opts[0].startswith("-")}


EMBEDDING = {"batch_size", "device", "revision", "max_seq_length"}
SCORING = {"tasks", "data_dir", "split"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encode", EMBEDDING),
        ("search", EMBEDDING),
        ("demo", EMBEDDING),
        ("evaluate", EMBEDDING | SCORING),
        ("report", EMBEDDING | SCORING),
        ("merge", {"revision"}),
        ("push", {"revision"}),
    ],
)
def test_an_option_is_called_the_same_in_every_command(name, expected):
    found = options_of(name)
    assert expected <= {*found}
    for option in expected:
        assert f"--{option}" in found[option]


@pytest.mark.parametrize(("alias", "option"), cli.ALIASES.items())
def test_the_names_of_training_are_taken_by_the_other_commands(monkeypatch, capsys, alias, option):
    name = {"output": "encode", "model": "check"}.get(option, "evaluate")
    assert alias not in options_of(name)
    command = typer.main.get_command(cli.app).commands[name]
    values = {"batch_size": "7", "max_seq_length": "7"}
    for spelling in (alias, alias.replace("_", "-"), option):
        words = ["model", f"--{spelling}", values.get(option, "x"), *(["y"] * (option == "tasks"))]
        context = command.make_context(name, words, token_normalize_func=cli._one_name)
        wanted = {"tasks": ["x", "y"], "pooling_mode": ["x"]}.get(option, values.get(option, "x"))
        found = context.params[option]
        assert (found if isinstance(found, list) else str(found)) == wanted
    assert run(monkeypatch, name, "--help") == 0
    assert f"--{alias} " not in capsys.readouterr().out


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
