"""A command in a pseudo-terminal: what it shows, when, and keys that are pressed."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

COMMAND = [sys.executable, "-c", "from simcse_trainer.cli import main; main()"]
# Set by commands that ran in this process without a terminal.
HIDDEN = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
BAR = re.compile(r"\d+%\|| \[\d\d:\d\d|it/s|s/it")


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in HIDDEN}


class Terminal:
    """`simcse-trainer` with these words, in a folder, in a terminal of its own.

    Attributes:
        shown: All that was shown.
        silences: (seconds, what the line said at which it stayed silent) of each wait.
        status: The exit status, once it has ended.
    """

    def __init__(self, words: Sequence[str], folder: Path):
        self.shown = ""
        self.silences: list[tuple[float, str]] = []
        self.status: int | None = None
        self._last = time.monotonic()
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            # As of a window; a new terminal has no columns, in which no bar would be drawn.
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
            os.chdir(folder)
            os.execvpe(COMMAND[0], [*COMMAND, *words], environment() | {"COLUMNS": "100"})

    def read_until(self, pattern: str, timeout_s: float = 100) -> None:
        """Read until something is shown; '' until the end."""
        end = time.monotonic() + timeout_s
        while not (pattern and re.search(pattern, self.shown)):
            assert time.monotonic() < end, self.shown[-2000:]
            if not select.select([self._terminal], [], [], 1.0)[0]:
                continue
            try:
                block = os.read(self._terminal, 65536)
            except OSError:  # Linux: the other side is closed
                block = b""
            if not block:
                assert not pattern, self.shown[-2000:]
                break
            now = time.monotonic()
            self.silences.append((now - self._last, self._line()))
            self._last = now
            self.shown += block.decode("utf-8", "replace")
        if not pattern:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
            os.close(self._terminal)

    def press(self, key: bytes) -> None:
        os.write(self._terminal, key)

    def unlabelled(self, seconds: float) -> list[tuple[float, str]]:
        """Return the silences over so many seconds in which no bar and no step was shown."""
        return [
            (silence, line)
            for silence, line in self.silences[1:]
            if silence > seconds and not line.endswith("...") and not BAR.search(line)
        ]

    def _line(self) -> str:
        lines = [line.strip() for line in re.split(r"[\r\n]+", self.shown) if line.strip()]
        return lines[-1] if lines else ""
