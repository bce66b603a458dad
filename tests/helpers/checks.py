"""Calls that fail, and the command line, as tests look at them."""

from __future__ import annotations

import contextlib
import sys

import pytest

from simcse_trainer import InputError


def fails(call, *words):
    """A call that a user can correct: one line, with these words in it."""
    from simcse_trainer import InputError

    with pytest.raises(InputError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message
    return error.value


@contextlib.contextmanager
def full_disk(size: int = 8192):
    """No file can grow beyond so many bytes: the system refuses the write."""
    resource = pytest.importorskip("resource", reason="no limit of file sizes on this system")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def mostly_slow(values, quick):
    """Parameters of a test, of which only `quick` run in `make test`."""
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else [value]),
            marks=() if value in quick else pytest.mark.slow,
        )
        for value in values
    ]


def attempt(call):
    """What a call gives, and what it raises: an assertion then says what it should have been."""
    try:
        return call(), None
    except Exception as error:
        return None, error


def run_command(*words) -> int:
    """The exit status of `simcse-trainer` with these words."""

    from simcse_trainer.cli import main

    before, sys.argv = sys.argv, ["simcse-trainer", *map(str, words)]
    try:
        main()
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before


def refusal(call) -> str:
    """The one line with which a call refuses; empty where it does not."""
    try:
        call()
    except InputError as error:
        return str(error)
    return ""
