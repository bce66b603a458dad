"""How `simcse-trainer` ends: what a user can correct is one line, a bug shows where it is."""

import sys

import pytest
import typer

import simcse_trainer.cli
from simcse_trainer import InputError
from simcse_trainer.cli import main


@pytest.fixture
def ending(monkeypatch, capsys):
    def end(error: BaseException) -> tuple[object, str]:
        def fail(**_):
            raise error

        monkeypatch.setattr(simcse_trainer.cli, "app", fail)
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err

    return end


@pytest.mark.parametrize("error", [InputError("two\n  lines"), OSError("two\nlines")])
def test_what_a_user_can_put_right_is_one_line(ending, error):
    assert ending(error) == (2, "error: two lines\n")


def test_control_c_is_no_error(ending):
    assert ending(typer.Abort()) == (130, "")


def test_a_bug_shows_where_it_is(monkeypatch):
    def fail(**_):
        raise ZeroDivisionError

    monkeypatch.setattr(simcse_trainer.cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        main()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["evalute"], "evalute"),
        (["evaluate", "model", "--taks", "stsb"], "--taks"),
        (["evaluate", "model", "--batch_size", "0"], "--batch_size"),
        (["merge", "model"], "output"),
    ],
)
def test_a_command_line_that_is_not_understood(words, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["simcse-trainer", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line
