"""Running `simcse-trainer` in this process, as the installed command would."""

import sys

import pytest

from simcse_trainer.cli import main


def run(monkeypatch, *words):
    """The exit status."""
    monkeypatch.setattr(sys, "argv", ["simcse-trainer", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code or 0


def error(monkeypatch, capsys, *words):
    """The one line of a command line that cannot be carried out."""
    assert run(monkeypatch, *words) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ")
    return said
