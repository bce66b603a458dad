"""One run at a time in an output folder, by a lock that the kernel releases when a process dies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simcse_trainer.errors import InputError
from simcse_trainer.files import LOCK

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What file systems without locks answer.
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
# Where there are no locks: how often the holder touches its file, and how long a start watches it.
_BEAT_S, _WATCH_S = 2.0, 7.0

# The folders that this process holds; a nested hold of one of them is the same hold.
_held: dict[Path, int] = {}


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other processes' runs out of a folder.

    Process id, host and start time in the lock file are for the message only: in a restarted
    container a new run has the same ones.

    Args:
        folder: Made if it is not there.

    Raises:
        InputError: Another process holds it.
    """
    key = folder.absolute()
    if key in _held:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = key / LOCK
    with _beating(path) if fcntl is None else _locked(path):
        _held[key] = os.getpid()
        try:
            yield
        finally:
            del _held[key]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    while True:
        # Python closes it in programs that are started from here.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                with _beating(path):
                    yield
                return
            raise _refusal(path) from None
        # Whoever held it before may have removed the file between our opening and our lock.
        if _is_same_file(descriptor, path):
            break
        os.close(descriptor)
    _forked.append(descriptor)
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, _describe_process().encode())
        yield
    finally:
        _forked.remove(descriptor)
        path.unlink(missing_ok=True)
        os.close(descriptor)


# A worker that is forked shares the lock: it would hold it for a run that was killed.
_forked: list[int] = []


def _close_in_worker() -> None:
    while _forked:
        os.close(_forked.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_worker)


@contextlib.contextmanager
def _beating(path: Path) -> Iterator[None]:
    """Hold a file by touching it: for file systems without locks."""
    deadline = time.monotonic() + _WATCH_S
    seen = None
    while True:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            break
        except FileExistsError:
            now = _modified(path)
            if seen is not None and now != seen:
                raise _refusal(path) from None
            seen = now
            if time.monotonic() > deadline:  # nobody touched it: its process is gone
                path.unlink(missing_ok=True)
            else:
                time.sleep(_BEAT_S / 4)
    os.write(descriptor, _describe_process().encode())
    os.close(descriptor)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(path)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def _modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _describe_process() -> str:
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    said = {"process": os.getpid(), "host": socket.gethostname(), "since": started}
    return json.dumps(said) + "\n"


def _refusal(path: Path) -> InputError:
    said: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        said = dict(json.loads(path.read_text(encoding="utf-8")))
    process, host, since = (said.get(key) for key in ("process", "host", "since"))
    who = f"process {process} on {host}, since {since}" if process else "another run"
    return InputError(
        f"{path.parent} is in use by {who}. Wait until that run has ended, or pass another "
        "--output_dir."
    )
