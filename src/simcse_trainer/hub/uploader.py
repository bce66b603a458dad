"""Pushes in the background: nothing here makes training wait, and nothing is dropped in silence."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from simcse_trainer.hub.failures import HubFailure, Retries
from simcse_trainer.hub.process import HubProcess
from simcse_trainer.hub.repository import FolderPush

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """Folders that go up together.

    Attributes:
        name: Such as `step 500`.
        folder: Holds all of it; deleted when it is done with.
        pushes: In order.
        figure: `trainer_state.json` and where to draw its curve.
    """

    name: str
    folder: Path
    pushes: tuple[FolderPush, ...]
    figure: tuple[str, str] | None = None

    def request(self) -> dict[str, Any]:
        """For the worker."""
        pushes = [asdict(push) for push in self.pushes]
        return {"action": "push", "pushes": pushes, "figure": self.figure}


class Uploader:
    """Takes uploads, makes one at a time, and tries again what fails.

    Args:
        process: What talks to the Hub.
        keep_all: A new upload does not replace those that still wait.

    Attributes:
        settings: Of the process.
        repository: `namespace/name`, once the Hub has answered.
        failure: Why the newest upload is not on the Hub (yet); None where it is.
    """

    def __init__(self, process: HubProcess, *, keep_all: bool = False):
        self.settings = process.settings
        self.repository = process.settings.name
        self.failure: HubFailure | None = None
        self._process = process
        self._keep_all = keep_all
        self._waiting: deque[Upload] = deque()
        self._current: Upload | None = None
        self._progress = (0, 0)
        self._changed = threading.Condition()
        self._ended = False
        self._not_before = 0.0
        self._told: set[str] = set()
        self._thread: threading.Thread | None = None

    def check(self, request: dict[str, str], *, patience_s: float) -> None:
        """Ask whether a push will be possible.

        Args:
            request: For the worker.
            patience_s: The Hub may take longer; then nothing is known, and training starts.

        Raises:
            HubFailure: A definite no: token, permission, name or metadata.
        """
        outcome: Future[None] = Future()
        earlier: list[HubFailure] = []
        threading.Thread(target=self._check, args=(request, outcome, earlier), daemon=True).start()
        try:
            return outcome.result(patience_s)
        except HubFailure as error:
            failure = error
        except NoAnswer:
            failure = earlier[0] if earlier else HubFailure("no answer yet")
            outcome.add_done_callback(self._tell_late)
        if _is_definite(failure):
            raise failure
        logger.warning(
            "The Hub could not be asked whether %s can be pushed to (%s). Training starts, and "
            "every save is tried anew.",
            self.repository,
            failure.text,
        )

    def submit(self, upload: Upload) -> None:
        """Queue an upload; one that waits is out of date now."""
        with self._changed:
            while self._waiting and not self._keep_all:
                old = self._waiting.popleft()
                logger.info("%s is not pushed: %s is newer.", old.name, upload.name)
                _discard(old)
            self._waiting.append(upload)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    @property
    def is_idle(self) -> bool:
        """Nothing waits and nothing is under way."""
        with self._changed:
            return not self._waiting and self._current is None

    def finish(self, timeout_s: float, *, show_progress: bool = True) -> HubFailure | None:
        """Wait until all is pushed, with a progress bar, for at most so many seconds.

        Returns:
            None where the newest upload is on the Hub, else why it is not.
        """
        deadline = time.monotonic() + timeout_s
        with tqdm(
            desc=f"Pushing to {self.repository}",
            unit="B",
            unit_scale=True,
            disable=not show_progress or self.is_idle,
            leave=False,
        ) as bar:
            while not self.is_idle and time.monotonic() < deadline:
                with self._changed:
                    bar.n, bar.total = self._progress[0], self._progress[1] or None
                    self._changed.wait(min(0.5, max(deadline - time.monotonic(), 0.0)))
                bar.refresh()
        if not self.is_idle:
            self.failure = self.failure or HubFailure(f"not finished in {timeout_s:g} s")
            self.end()
        else:
            self._process.rest()
        return self.failure

    def end(self) -> None:
        """Give up what is not done, at once."""
        with self._changed:
            self._ended = True
            dropped = [*self._waiting, *([self._current] if self._current else [])]
            self._waiting.clear()
            self._changed.notify_all()
        self._process.end()
        for upload in dropped:
            _discard(upload)

    def _check(
        self, request: dict[str, str], outcome: Future[None], earlier: list[HubFailure]
    ) -> None:
        try:
            try:
                answer = self._process.call(request)
            except HubFailure as failure:
                earlier.append(failure)
                time.sleep(Retries(self._process.retry_unit_s).after(failure) or 0.0)
                answer = self._process.call(request)
            self.repository = answer["repository"]
            outcome.set_result(None)
        except Exception as error:
            outcome.set_exception(error)

    def _tell_late(self, outcome: Future[None]) -> None:
        failure = outcome.exception()
        if _is_definite(failure):
            logger.warning(
                "%s cannot be pushed to: %s. Training goes on, and is not pushed until that is "
                "mended.",
                self.repository,
                failure,
            )

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._ended and (not self._waiting or self._pause_s() > 0):
                    self._changed.wait(self._pause_s() or None)
                if self._ended:
                    return
                upload = self._current = self._waiting.popleft()
                self._progress = (0, 0)
            try:
                self._push(upload)
            except Exception as error:  # a bug of ours must not end the thread in silence
                logger.exception("%s could not be pushed.", upload.name)
                self.failure = HubFailure(str(error))
            _discard(upload)
            with self._changed:
                self._current = None
                self._changed.notify_all()

    def _push(self, upload: Upload) -> None:
        request = upload.request()
        retries = Retries(self._process.retry_unit_s)
        while not self._ended:
            try:
                done = self._process.call(request, self._report)
            except HubFailure as failure:
                if self._ended:
                    return  # it failed because it was
                self.failure = failure
                self._not_before = time.monotonic() + (failure.retry_after or 0.0)
            else:
                self.repository, self.failure = done["repository"], None
                self._tell(done["notes"])
                logger.info("%s is on the Hub: %s.", upload.name, self.repository)
                return
            wait = retries.after(self.failure)
            then = "The next save is tried anew" if wait is None else f"Next try in {wait:.0f} s"
            then += "; training goes on"
            if self.failure.options:
                folder = upload.folder.parent.parent
                words = push_words(folder, self.repository, self.failure)
                then += f". Finish with: simcse-trainer push {words}"
            logger.warning("%s could not be pushed (%s). %s.", upload.name, self.failure.text, then)
            with self._changed:
                if wait is not None and not self._replaced():
                    self._changed.wait_for(lambda: self._ended or self._replaced(), wait)
                if wait is None or self._replaced():
                    return

    def _tell(self, notes: list[str]) -> None:
        """Say what other people have changed, each once."""
        for note in notes:
            if note not in self._told:
                self._told.add(note)
                logger.warning("%s", note)

    def _pause_s(self) -> float:
        """What is left of the time that the Hub asked to wait, also for a newer upload."""
        return max(self._not_before - time.monotonic(), 0.0)

    def _replaced(self) -> bool:
        return bool(self._waiting) and not self._keep_all

    def _report(self, done: int, total: int) -> None:
        with self._changed:
            self._progress = (done, total)
            self._changed.notify_all()


def push_words(folder: Path | str, repository: str, failure: HubFailure) -> str:
    """Return what to give `simcse-trainer push` so that it brings to the Hub what is not there."""
    command = f"{folder} {repository}"
    if not failure.options:
        return command
    other = "" if "--revision" in failure.options else ", or with --revision NAME to another branch"
    return f"{command} {failure.options}{other}"


def _is_definite(failure: BaseException | None) -> bool:
    """An answer about the token, the permission, the name or the metadata."""
    return isinstance(failure, HubFailure) and failure.refused and failure.status in (400, 401, 403)


def _discard(upload: Upload) -> None:
    shutil.rmtree(upload.folder, ignore_errors=True)
