"""The child process that speaks to the Hub; it imports no torch.

    python -m simcse_trainer.hub.push [options] FOLDER              push a staged folder
    python -m simcse_trainer.hub.push [options] check               may one push there?
    python -m simcse_trainer.hub.push [options] check_card          is the card's metadata right?
    python -m simcse_trainer.hub.push [options] download REVISION FOLDER

The first line of standard input is the token, empty for the one that is stored on this machine:
other users of the machine see arguments and environments. `check_card` reads the card behind it.

Standard output: lines `progress DONE TOTAL`, and last one line of JSON: `repository`, `commits`,
`notes`, and where it failed `reason` with what else a `HubFailure` has. Exit status: 0 done,
2 refused for good, 75 (EX_TEMPFAIL) try again.

A process of its own can be ended whatever it hangs in (the client's threads cannot), keeps its
connection settings to itself, and leaves training its Python interpreter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import huggingface_hub

from simcse_trainer.analysis.figures import can_draw_training_curve, draw_training_curve
from simcse_trainer.errors import InputError
from simcse_trainer.files import STATE, TRAINING_CURVE
from simcse_trainer.hub.errors import DONE, REFUSED, TRY_AGAIN, explain
from simcse_trainer.hub.repository import HubRepository, Report
from simcse_trainer.hub.stage import MODEL, read_staged, rename_in_card

logger = logging.getLogger("simcse_trainer.hub.push")


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out one command, and say how it ended.

    Returns:
        The exit status.
    """
    args = _parse(argv)
    # The run that started it decides what a signal to the whole group means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answers, sys.stdout = sys.stdout, sys.stderr
    token = sys.stdin.readline().strip() or None
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=args.log_level)
    huggingface_hub.logging.set_verbosity(args.log_level)
    set_timeout(args.timeout_s)
    repository = HubRepository(args.repository, token, args.private)

    def report(done: int, total: int) -> None:
        _write(answers, f"progress {done} {total}")

    content = sys.stdin.read() if args.command == ["check_card"] else ""
    status, answer = carry_out(repository, args.command, content, report)
    _write(answers, json.dumps(answer))
    return status


def carry_out(
    repository: HubRepository, command: Sequence[str], content: str, report: Report
) -> tuple[int, dict[str, Any]]:
    """Carry out one command.

    Args:
        repository: The repository that is pushed to.
        command: As on the command line.
        content: The card, for `check_card`.
        report: Told what is done and how much there is.

    Returns:
        The exit status, and the last line of the output.
    """
    answer: dict[str, Any] = {"commits": 0}
    try:
        answer |= _carry_out(repository, command, content, report)
        status = DONE
    except Exception as error:
        logger.debug("The command failed.", exc_info=True)
        failure = explain(error)
        answer |= failure.as_dict() | {"reason": failure.text}
        status = REFUSED if failure.refused else TRY_AGAIN
    told = {"repository": repository.known_name, "notes": repository.notes}
    return status, answer | told


def push_staged(folder: Path, repository: HubRepository, report: Report) -> int:
    """Bring what `stage` has put into a folder to its branches; what is there already, stays.

    Args:
        folder: As `write_staged` leaves it.
        repository: The repository that is pushed to.
        report: Told bytes done and bytes in all.

    Returns:
        The number of commits that were needed.
    """
    staged = read_staged(folder)
    if _draw_training_curve(folder):
        model = staged.pushes[-1]
        model.files.append(TRAINING_CURVE)
    if staged.names_in_card:
        rename_in_card(folder, staged, repository.full_name)
    return repository.push(folder, staged.pushes, report)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m simcse_trainer.hub.push")
    parser.add_argument("--repository", required=True, help="name or namespace/name")
    parser.add_argument("--private", action=argparse.BooleanOptionalAction, default=None)
    parser.add_argument("--timeout_s", type=float, default=60.0, help="without an answer")
    parser.add_argument("--log_level", type=int, default=logging.WARNING)
    parser.add_argument("command", nargs="+", help="FOLDER, check, check_card, or download ...")
    return parser.parse_args(argv)


def _carry_out(
    repository: HubRepository, command: Sequence[str], content: str, report: Report
) -> dict[str, Any]:
    match command:
        case ["check"]:
            repository.check()
        case ["check_card"]:
            repository.check_card(content)
        case ["download", revision, folder]:
            return {"commit": repository.download(revision, Path(folder), report)}
        case [folder]:
            return {"commits": push_staged(Path(folder), repository, report)}
        case _:
            raise InputError(f"expected one of the commands above, got {' '.join(command)}")
    return {}


def _write(answers: IO[str], line: str) -> None:
    # Who stopped listening does not end what is under way: the run was killed, its upload is not.
    with contextlib.suppress(BrokenPipeError):
        print(line, file=answers, flush=True)


def set_timeout(timeout_s: float) -> None:
    """Let the client give up on an answer; its own has no time-out at all for most requests."""

    def client() -> Any:
        session = default(follow_redirects=True, timeout=timeout_s)
        session.event_hooks = hooks
        return session

    default = type(huggingface_hub.get_session())
    hooks = huggingface_hub.get_session().event_hooks
    huggingface_hub.set_client_factory(client)


def _draw_training_curve(folder: Path) -> bool:
    """Draw the figure that the card shows, here where it costs training nothing."""
    log, figure = folder / STATE, folder / MODEL / TRAINING_CURVE
    if not log.is_file():
        return False
    try:
        history = json.loads(log.read_text(encoding="utf-8"))["log_history"]
        if can_draw_training_curve(history):
            draw_training_curve(history, figure)
    except Exception as error:  # a model without its figure is better on the Hub than not there
        logger.error("The training curve could not be drawn: %s", explain(error).text)
    return figure.is_file()


if __name__ == "__main__":
    sys.exit(main())
