"""Pushes in the background: nothing here makes training wait, and nothing is dropped in silence."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from simcse_trainer.hub.client import HubClient
from simcse_trainer.hub.errors import HubFailure, Retries
from simcse_trainer.hub.stage import push_words

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """A staged folder on its way.

    Attributes:
        name: Such as `step 500`.
        folder: Deleted when it is done with.
    """

    name: str
    folder: Path


class Uploader:
    """Takes uploads, makes one at a time, and tries again what fails.

    Args:
        client: What speaks to the Hub.
        keep_all: A new upload does not replace those that still wait.

    Attributes:
        settings: The settings of the client.
        repository: `namespace/name`, once the Hub has answered.
        failure: Why the newest upload is not on the Hub (yet); None where it is.
    """

    def __init__(self, client: HubClient, *, keep_all: bool = False):
        self.settings = client.settings
        self.repository = client.settings.name
        self.failure: HubFailure | None = None
        self._client = client
        self._keep_all = keep_all
        self._waiting: deque[Upload] = deque()
        self._current: Upload | None = None
        self._progress = (0, 0)
        self._changed = threading.Condition()
        self._ended = False
        self._not_before = 0.0
        self._told: set[str] = set()
        self._thread: threading.Thread | None = None

    def check(self, command: str, *, content: str = "", patience_s: float) -> None:
        """Ask whether a push will be possible.

        Args:
            command: `check` or `check_card`, see `hub.push`.
            content: The text of the card.
            patience_s: The Hub may take longer; then nothing is known, and training starts.

        Raises:
            HubFailure: A definite no: token, permission, name or metadata.
        """
        outcome: Future[None] = Future()
        earlier: list[HubFailure] = []
        threading.Thread(
            target=self._check, args=(command, content, outcome, earlier), daemon=True
        ).start()
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
        return self.failure

    def end(self) -> None:
        """Give up what is not done, at once."""
        with self._changed:
            self._ended = True
            dropped = [*self._waiting, *([self._current] if self._current else [])]
            self._waiting.clear()
            self._changed.notify_all()
        self._client.end()
        for upload in dropped:
            _discard(upload)

    def _check(
        self, command: str, content: str, outcome: Future[None], earlier: list[HubFailure]
    ) -> None:
        def wait(failure: HubFailure, seconds: float | None) -> bool:
            """Let one failure pass: it may have been a hiccup."""
            earlier.append(failure)
            time.sleep(seconds or 0.0)
            return len(earlier) == 1

        try:
            retries = Retries(self.settings.retry_unit_s)
            answer = retries.run(lambda: self._client.run(command, content=content), wait)
            self.repository = answer["repository"]
            outcome.set_result(None)
        except Exception as error:
            outcome.set_exception(error)

    def _tell_late(self, outcome: Future[None]) -> None:
        failure = outcome.exception()
        if _is_definite(failure):
            logger.warning(
                "%s cannot be pushed to: %s. Training continues, and is not pushed until that is "
                "corrected.",
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
        """Bring one upload to the Hub, or give it up: refused, out of date or at the end."""
        retries = Retries(self.settings.retry_unit_s)
        try:
            done = retries.run(
                lambda: self._client.run(str(upload.folder), progress=self._report),
                lambda failure, seconds: self._wait(upload, failure, seconds),
            )
        except HubFailure:
            return
        self.repository, self.failure = done["repository"], None
        self._tell(done["notes"])
        logger.info("%s is on the Hub: %s.", upload.name, self.repository)

    def _wait(self, upload: Upload, failure: HubFailure, seconds: float | None) -> bool:
        """Say what failed, let the time pass, and return whether to try this upload again."""
        if self._ended:
            return False  # it failed because it was
        self.failure = failure
        self._not_before = time.monotonic() + (failure.retry_after or 0.0)
        then = "The next save is tried anew" if seconds is None else f"Next try in {seconds:.0f} s"
        then += "; training continues"
        if failure.options:
            words = push_words(upload.folder.parent.parent, self.repository, failure.options)
            then += f". Finish with: simcse-trainer push {words}"
        logger.warning("%s could not be pushed (%s). %s.", upload.name, failure.text, then)
        with self._changed:
            if seconds is not None and not self._replaced():
                self._changed.wait_for(lambda: self._ended or self._replaced(), seconds)
            return seconds is not None and not self._replaced() and not self._ended

    def _tell(self, notes: list[str]) -> None:
        """Say what other people have changed, each once."""
        for note in notes:
            if note not in self._told:
                self._told.add(note)
                logger.warning("%s", note)

    def _pause_s(self) -> float:
        """Return the rest of the time that the Hub asked to wait, also for a newer upload."""
        return max(self._not_before - time.monotonic(), 0.0)

    def _replaced(self) -> bool:
        return bool(self._waiting) and not self._keep_all

    def _report(self, done: int, total: int) -> None:
        with self._changed:
            self._progress = (done, total)
            self._changed.notify_all()


def _is_definite(failure: BaseException | None) -> bool:
    """Return whether an answer is about the token, the permission, the name or the metadata."""
    return isinstance(failure, HubFailure) and failure.refused and failure.status in (400, 401, 403)


def _discard(upload: Upload) -> None:
    shutil.rmtree(upload.folder, ignore_errors=True)
