"""The process that talks to the Hub: requests as JSON lines in, answers as JSON lines out.

A process of its own can be ended whatever it hangs in (the client's threads cannot), keeps its
connection settings to itself, and leaves training its Python interpreter. It imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub

from simcse_trainer.evaluation.plots import can_draw_training_curve, draw_training_curve
from simcse_trainer.hub.failures import explain
from simcse_trainer.hub.repository import FolderPush, HubRepository

logger = logging.getLogger("simcse_trainer.hub.worker")


def main() -> None:
    """Answer until the other side is gone; then finish what is under way, and end."""
    # The run that started it decides what a signal to the whole group means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    answers, sys.stdout = sys.stdout, sys.stderr
    repository: HubRepository | None = None

    def send(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["action"] == "connect":
                repository = _connect(**request["settings"])
                result: Any = None
            else:
                assert repository is not None
                result = _carry_out(repository, request, partial(_report, send))
            answer = {"result": result}
        except Exception as error:
            logger.debug("The request failed.", exc_info=True)
            answer = {"failure": explain(error).as_dict()}
        try:
            send(answer)
        except BrokenPipeError:
            os._exit(0)  # nobody is there to hear it, or the complaint about that


def _report(send: Callable[[dict[str, Any]], None], done: int, total: int) -> None:
    # Who stopped listening does not end what is under way: the run was killed, its upload is not.
    with contextlib.suppress(BrokenPipeError):
        send({"progress": (done, total)})


def _connect(*, timeout_s: float, log_level: int, **settings: Any) -> HubRepository:
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=log_level)
    huggingface_hub.logging.set_verbosity(log_level)
    default = type(huggingface_hub.get_session())

    def client() -> Any:
        # The client's own has no time-out at all for most requests.
        session = default(follow_redirects=True, timeout=timeout_s)
        session.event_hooks = hooks
        return session

    hooks = huggingface_hub.get_session().event_hooks
    huggingface_hub.set_client_factory(client)
    return HubRepository(**settings)


def _carry_out(repository: HubRepository, request: dict[str, Any], report: Any) -> Any:
    if request["action"] == "check":
        repository.check()
        return {"repository": repository.full_name}
    if request["action"] in ("name", "check_card"):
        if request["action"] == "check_card":
            repository.check_card(request["content"])
        return {"repository": repository.full_name}
    if request["action"] == "push":
        _draw(request.get("figure"))
        commits = repository.push([FolderPush(**push) for push in request["pushes"]], report)
        told = {"repository": repository.full_name, "notes": repository.notes}
        return {**told, "commits": commits}
    commit = repository.download(request["revision"], Path(request["folder"]), report)
    return {"repository": repository.full_name, "commit": commit}


def _draw(figure: list[str] | None) -> None:
    """The training curve of a `trainer_state.json`, here where it costs training nothing."""
    if figure is None:
        return
    try:
        log = json.loads(Path(figure[0]).read_text(encoding="utf-8"))["log_history"]
        if can_draw_training_curve(log):
            draw_training_curve(log, figure[1])
    except Exception as error:  # a model without its figure is better on the Hub than not there
        logger.error("The training curve could not be drawn: %s", explain(error).text)


if __name__ == "__main__":
    main()
