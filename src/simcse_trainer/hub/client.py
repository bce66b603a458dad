"""The parent's side of `hub.push`: start the child process, follow it, end it; push a folder."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import simcse_trainer
from simcse_trainer.errors import InputError
from simcse_trainer.hub.errors import TRY_AGAIN, HubFailure, Retries
from simcse_trainer.hub.stage import check_pushable, push_words, remove_uploads, stage_folder

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HubSettings:
    """What the child has to know.

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
        """Show the client without its token."""
        return (
            f"HubSettings(name={self.name!r}, private={self.private}, timeout_s={self.timeout_s})"
        )

    @property
    def retry_unit_s(self) -> float:
        """The first delay: a second, less where the user expects quick answers."""
        return min(1.0, self.timeout_s / 10)


class HubClient:
    """Runs commands of `hub.push`, each in a child process of its own."""

    def __init__(self, settings: HubSettings):
        self.settings = settings
        self._processes: set[subprocess.Popen[str]] = set()
        self._ended = False
        self._lock = threading.Lock()

    def run(
        self, *command: str, content: str = "", progress: Progress | None = None
    ) -> dict[str, Any]:
        """Make one try.

        Args:
            command: The words of a command of `hub.push`.
            content: The card, for `check_card`.
            progress: Told what is done and how much there is.

        Returns:
            The child's answer.

        Raises:
            HubFailure: It did not succeed.
        """
        process = self._start(command)
        try:
            answer = self._follow(process, content, progress)
        except (OSError, ValueError) as error:  # a pipe that broke, or half a line
            answer = {}
            logger.debug("The child process: %s", error)
        finally:
            self._kill(process)
        return read_answer(process.returncode, answer)

    def run_until(
        self,
        deadline: float,
        *command: str,
        progress: Progress | None = None,
        **patience: int,
    ) -> dict[str, Any]:
        """Try until it succeeds, is refused, or the time is over; see `Retries`.

        Args:
            deadline: On the clock of `time.monotonic`.
            command: As `run` takes it.
            progress: Told what is done and how much there is.
            patience: What `Retries` takes: how many refusals are an answer.

        Raises:
            HubFailure: The last failure, if none was passed over.
        """
        timer = threading.Timer(max(deadline - time.monotonic(), 0.0), self.end)
        timer.daemon = True
        timer.start()

        def wait(failure: HubFailure, seconds: float | None) -> bool:
            if seconds is None or self._ended or time.monotonic() + seconds > deadline:
                return False
            logger.warning("The Hub: %s. Next try in %.0f s.", failure.text, seconds)
            time.sleep(seconds)
            return True

        try:
            retries = Retries(self.settings.retry_unit_s, **patience)
            return retries.run(lambda: self.run(*command, progress=progress), wait)
        finally:
            timer.cancel()

    def end(self) -> None:
        """End at once, whatever is under way; `run` raises from now on."""
        with self._lock:
            self._ended = True
            processes = [*self._processes]
        for process in processes:
            process.kill()

    def _kill(self, process: subprocess.Popen[str]) -> None:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        with self._lock:
            self._processes.discard(process)

    def _start(self, command: Sequence[str]) -> subprocess.Popen[str]:
        settings = self.settings
        options = [f"--repository={settings.name}", f"--timeout_s={settings.timeout_s}"]
        options.append(f"--log_level={_log_level()}")
        if settings.private is not None:
            options.append("--private" if settings.private else "--no-private")
        source = str(Path(simcse_trainer.__file__).parents[1])
        known = os.environ.get("PYTHONPATH")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([source, *([known] if known else [])]),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        with self._lock:
            if self._ended:
                raise HubFailure("the process that speaks to the Hub was stopped")
            process = subprocess.Popen(
                [sys.executable, "-m", "simcse_trainer.hub.push", *options, "--", *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
                encoding="utf-8",
                # Ctrl-C is for the run: the terminal signals all that are in its session, also
                # a child that has not come to ignoring it.
                start_new_session=True,
            )
            self._processes.add(process)
        return process

    def _follow(
        self, process: subprocess.Popen[str], content: str, progress: Progress | None
    ) -> dict[str, Any]:
        assert process.stdin is not None
        assert process.stdout is not None
        # Not in the command or the environment, where other users of the machine see it.
        process.stdin.write(f"{self.settings.token or ''}\n{content}")
        process.stdin.close()
        last = ""
        for line in process.stdout:
            word, *numbers = line.split()[:3] or [""]
            if word != "progress":
                last = line
            elif progress is not None:
                progress(*map(int, numbers))
        process.wait()
        answer: dict[str, Any] = json.loads(last)
        return answer


def _log_level() -> int:
    # The client warns of each of its own retries; what matters of them is said by ours.
    level = logging.getLogger("simcse_trainer").getEffectiveLevel()
    return level if level <= logging.DEBUG else logging.ERROR


def read_answer(status: int, answer: dict[str, Any]) -> dict[str, Any]:
    """Return what a child has said if it was done.

    Args:
        status: The exit status of the child.
        answer: Its last line; empty if there was none.

    Raises:
        HubFailure: The command was not carried out.
    """
    if not answer:
        raise HubFailure(f"the process that speaks to the Hub ended (status {status})")
    if "reason" in answer:
        more = {name: answer[name] for name in ("status", "retry_after", "options")}
        raise HubFailure(answer["reason"], refused=status != TRY_AGAIN, **more)
    return answer


@dataclass(frozen=True)
class Pushed:
    """How a push ended.

    Attributes:
        repository: Its full name, `namespace/name`.
        commits: How many it took.
        notes: What the user should know: other people's changes.
    """

    repository: str
    commits: int
    notes: list[str]


def push_folder(
    folder: Path,
    settings: HubSettings,
    *,
    branch: str = "main",
    training_state: bool = True,
    include: Sequence[str] = (),
    base_model: str | None = None,
    overwrite: bool = False,
    patience_s: float = 600.0,
    show_progress: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Bring a repository to what a folder holds; a second time there is nothing to do.

    Args:
        folder: The `output_dir` of a run, or any trained model.
        settings: Which repository, as whom.
        branch: The branch that the model is pushed to.
        training_state: Also push the newest checkpoint, where there is one.
        include: Patterns of files to push beside those of the model.
        base_model: The name on the Hub of an adapter's base, where that is a folder here.
        overwrite: Replace what somebody else has changed there.
        patience_s: Failures are retried for so long.
        show_progress: Whether to show a bar.
        tell: Gets the names of the files before anything is sent, where no run recorded them.

    Raises:
        InputError: There is no model, nobody could load it, or the Hub did not take it.
    """
    if note := check_pushable(folder, include, base_model):
        tell(note)
    client, deadline = HubClient(settings), time.monotonic() + patience_s
    staged = None
    try:
        staged = stage_folder(
            folder,
            branch=branch,
            training_state=training_state,
            rename=True,
            include=include,
            base_model=base_model,
            overwrite=overwrite,
        )
        with tqdm(
            desc=f"Pushing to {settings.name}", unit="B", unit_scale=True, disable=not show_progress
        ) as bar:

            def progress(done: int, total: int) -> None:
                bar.n, bar.total = done, total
                bar.refresh()

            # Somebody waits for the answer: a refusal is one at once.
            done = client.run_until(deadline, str(staged), progress=progress, refusals=1)
    except HubFailure as failure:
        advice = "the same command continues where this one stopped."
        if failure.options:
            words = push_words(folder, settings.name, failure.options)
            advice = f"to push it: simcse-trainer push {words}."
        elif failure.is_final:
            advice = "Correct that first."
        raise InputError(
            f"{folder} could not be pushed to {settings.name}: {failure.text}. It is unchanged; "
            f"{advice}"
        ) from None
    finally:
        client.end()
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)
            remove_uploads(folder)
    return Pushed(done["repository"], done["commits"], done["notes"])
