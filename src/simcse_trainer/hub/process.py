"""The other end of `worker`: start it, ask it, end it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simcse_trainer
from simcse_trainer.hub.failures import HubFailure, Retries

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HubSettings:
    """What the talking process has to know.

    Attributes:
        name: Repository, with or without its namespace.
        token: None for the one stored on this machine.
        private: Of a repository that has to be made.
        timeout_s: Seconds without an answer after which a request has failed.
    """

    name: str
    token: str | None = None
    private: bool | None = None
    timeout_s: float = 60.0

    def __repr__(self) -> str:
        """Without the token."""
        return (
            f"HubSettings(name={self.name!r}, private={self.private}, timeout_s={self.timeout_s})"
        )


class HubProcess:
    """Asks the worker process, one request at a time; starts it anew where it has died."""

    def __init__(self, settings: HubSettings):
        self.settings = settings
        self._process: subprocess.Popen[str] | None = None
        self._ended = False
        self._lock = threading.Lock()
        self._turn = threading.Lock()

    def call(self, request: dict[str, Any], progress: Progress | None = None) -> Any:
        """One try.

        Raises:
            HubFailure: It did not succeed.
        """
        try:
            with self._turn:
                return self._ask(self._start(), request, progress)
        except (OSError, ValueError) as error:  # a pipe that broke, or half a line
            self._kill()
            raise HubFailure(f"the process that talks to the Hub ended ({error})") from None

    def call_until(
        self,
        request: dict[str, Any],
        deadline: float,
        progress: Progress | None = None,
        **patience: int,
    ) -> Any:
        """Try until it succeeds, is refused, or the time is over; see `Retries`.

        Args:
            request: For the worker.
            deadline: On the clock of `time.monotonic`.
            progress: As for `call`.
            patience: For `Retries`.

        Raises:
            HubFailure: The last one.
        """
        timer = threading.Timer(max(deadline - time.monotonic(), 0.0), self.end)
        timer.daemon = True
        timer.start()
        retries = Retries(self.retry_unit_s, **patience)
        try:
            while True:
                try:
                    return self.call(request, progress)
                except HubFailure as failure:
                    wait = retries.after(failure)
                    if wait is None or self._ended or time.monotonic() + wait > deadline:
                        raise
                    logger.warning("The Hub: %s. Next try in %.0f s.", failure.text, wait)
                    time.sleep(wait)
        finally:
            timer.cancel()

    @property
    def retry_unit_s(self) -> float:
        """The first delay: a second, less where the user expects quick answers."""
        return min(1.0, self.settings.timeout_s / 10)

    def end(self) -> None:
        """At once, whatever it is doing; `call` raises from now on."""
        self._ended = True
        self._kill()

    def rest(self) -> None:
        """End the process between two requests; the next one starts it again."""
        with self._turn:
            self._kill()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def _start(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._ended:
                raise OSError("stopped")
            if self._process is not None and self._process.poll() is None:
                return self._process
            source = str(Path(simcse_trainer.__file__).parents[1])
            known = os.environ.get("PYTHONPATH")
            environment = os.environ | {
                "PYTHONPATH": os.pathsep.join([source, *([known] if known else [])]),
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            }
            self._process = process = subprocess.Popen(
                [sys.executable, "-m", "simcse_trainer.hub.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
                encoding="utf-8",
            )
        # Not in the command or the environment, where other users of the machine see it.
        settings = vars(self.settings) | {"log_level": self._log_level()}
        self._ask(process, {"action": "connect", "settings": settings}, None)
        return process

    def _ask(
        self, process: subprocess.Popen[str], request: dict[str, Any], progress: Progress | None
    ) -> Any:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            answer = json.loads(line)
            if "failure" in answer:
                raise HubFailure(**answer["failure"])
            if "result" in answer:
                return answer["result"]
            if progress is not None:
                progress(*answer["progress"])
        raise OSError("without an answer")

    @staticmethod
    def _log_level() -> int:
        # The client warns of each of its own retries; what matters of them is said by ours.
        level = logging.getLogger("simcse_trainer").getEffectiveLevel()
        return level if level <= logging.DEBUG else logging.ERROR
