"""Whether a run may write into its output folder: one run at a time, and nobody else's files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from simcse_trainer.errors import InputError
from simcse_trainer.files import CHECKPOINT_PREFIX, LOCK, OLD_MANIFEST, get_step, is_training_state
from simcse_trainer.model.io.checkpoints import list_checkpoints
from simcse_trainer.model.io.folder import delete_recorded, find_foreign, move_aside, shorten
from simcse_trainer.model.io.manifest import read_manifest

_INSTEAD = "Pass another --output_dir, or --overwrite_output_dir true, which"


def check_output_dir(
    folder: Path,
    names: Sequence[str],
    *,
    run: str,
    resumed: bool,
    overwrite: bool,
    set_aside: bool,
) -> None:
    """Refuse a folder in which a run would overwrite other work.

    With `overwrite` the checkpoints of earlier runs go, as far as their manifests list them; the
    model there stays until the new one is complete.

    Args:
        folder: The run's; it may be missing.
        names: What the run will write into it beside checkpoints.
        run: Of which run its files are that may be replaced.
        resumed: It resumes from a checkpoint.
        overwrite: The user said that other runs may be replaced.
        set_aside: Files that no manifest lists will be renamed.

    Raises:
        InputError: Something is in the way.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; pass the name of a folder.")
    earlier = [path for path in list_checkpoints(folder) if _is_of_another_run(path, run, resumed)]
    foreign = _find_foreign_checkpoints(folder, names)
    if overwrite:
        for path in earlier:
            if (path / OLD_MANIFEST).is_file():
                move_aside(folder, [path.name])
            else:
                delete_recorded(path)
        move_aside(folder, foreign)
        return
    if earlier:
        raise InputError(
            f"{folder} holds {earlier[-1].name} of an earlier run. Pass "
            "--resume_from_checkpoint true to go on with it, or another --output_dir, or "
            "--overwrite_output_dir true to replace it."
        )
    manifest = read_manifest(folder)
    finished = manifest is not None and manifest.complete and manifest.holds_model
    if manifest is not None and finished and manifest.run != run:
        raise InputError(
            f"{folder} holds the finished model of another run. {_INSTEAD} replaces it."
        )
    foreign += [] if set_aside else find_foreign(folder, names)
    if foreign:
        raise InputError(
            f"{folder} holds {shorten(foreign)}, which no run has written and this one would "
            f"overwrite, or load with its model. {_INSTEAD} keeps them as NAME.before."
        )


def _is_of_another_run(checkpoint: Path, run: str, resumed: bool) -> bool:
    manifest = read_manifest(checkpoint)
    if manifest is not None:
        return manifest.run != run
    return not resumed and (checkpoint / OLD_MANIFEST).is_file()


def _find_foreign_checkpoints(folder: Path, names: Sequence[str]) -> list[str]:
    """Find checkpoints of another program, and files with the names of checkpoints."""
    found = []
    for path in sorted(folder.glob(f"{CHECKPOINT_PREFIX}-*")):
        if get_step(path) is None or (path / OLD_MANIFEST).is_file():
            continue
        if not path.is_dir():
            found.append(path.name)
        elif read_manifest(path) is None:
            inside = [one.name for one in path.iterdir()]
            if find_foreign(path, names) or any(is_training_state(name) for name in inside):
                found.append(path.name)
    return found


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
