"""Checkpoints that are complete or absent.

The Trainer writes a checkpoint in place, file by file, and resumes without a word where
`optimizer.pt` or `rng_state.pth` is missing. Here a checkpoint is written aside, gets a manifest of
its files, and is renamed into place when all of it is on the disk.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from simcse_trainer.errors import InputError
from simcse_trainer.files import (
    CHECKPOINT_PREFIX,
    DOCUMENTS,
    MANIFEST,
    OLD_MANIFEST,
    STATE,
    get_step,
)
from simcse_trainer.model.io.folder import (
    delete_recorded,
    find_foreign,
    flush,
    list_files,
    move_aside,
    replace_files,
    write_manifest,
)
from simcse_trainer.model.io.manifest import Manifest, parse_manifest, read_manifest, record_files

logger = logging.getLogger(__name__)

# What going on needs beside the weights; one of each group, as the engines name them.
_NEEDED = {
    STATE: (STATE,),
    "the optimizer's state": ("optimizer*", "global_step*", "pytorch_model_fsdp*"),
    "the random state": ("rng_state*.pth",),
}


def finalize(
    staged: Path,
    final: Path,
    *,
    run: str = "",
    step: int | None = None,
    set_aside: bool = False,
) -> None:
    """Make a finished checkpoint visible under its name, all at once.

    Args:
        staged: The written folder, on the same file system.
        final: Its name. An earlier checkpoint of that name is replaced, one of version 0.1.0 is
            kept as `NAME.before`; other people's files in it stay.
        run: Of which run it is.
        step: The optimizer steps that the weights have seen.
        set_aside: Keep a folder of somebody else with such files as `NAME.before`, too.

    Raises:
        ForeignFilesError: Other people's files have the names of a checkpoint's.
    """
    if (final / OLD_MANIFEST).is_file() and not (final / MANIFEST).is_file():
        move_aside(final.parent, [final.name])
    if os.path.lexists(final):
        if set_aside and (not final.is_dir() or find_foreign(final, list_files(staged))):
            move_aside(final.parent, [final.name])
            return finalize(staged, final, run=run, step=step)
        replace_files(staged, final, run=run, step=step)
        return
    names = list_files(staged)
    # A rename is no use after a power failure if the contents were still on their way.
    for name in names:
        flush(staged / name)
    write_manifest(staged, record_files(staged, names, run=run, step=step))
    flush(staged)
    staged.rename(final)
    flush(final.parent)


def read_checkpoint(checkpoint: Path) -> Manifest:
    """Return the manifest of a checkpoint, also of one that version 0.1.0 has written.

    Raises:
        InputError: There is none, or it is malformed.
    """
    found = read_manifest(checkpoint)
    if found is not None:
        return found
    try:
        text = (checkpoint / OLD_MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{MANIFEST} is missing or unreadable") from None
    return parse_manifest(text, OLD_MANIFEST)


def validate_checkpoint(checkpoint: Path) -> str | None:
    """Return what a checkpoint lacks of the files it was saved with; None if it is complete."""
    try:
        manifest = read_checkpoint(checkpoint)
    except InputError as error:
        return str(error)
    if not manifest.complete:
        return "it was being replaced when a run ended"
    for name, record in manifest.files.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if name in DOCUMENTS:  # people edit them
            continue
        if found is None:
            return f"{name} is missing"
        if found != record.size:
            return f"{name} has {found} bytes instead of {record.size}"
    return None


def why_not_resumable(checkpoint: Path) -> str | None:
    """Return what going on from a checkpoint lacks; None if all is there."""
    incomplete = validate_checkpoint(checkpoint)
    if incomplete is not None:
        return incomplete
    first = [name.split("/", 1)[0] for name in read_checkpoint(checkpoint).files]
    for what, patterns in _NEEDED.items():
        if not any(fnmatchcase(name, pattern) for name in first for pattern in patterns):
            return f"it was saved without {what} (save_only_model)"
    return None


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Return the folders named `checkpoint-N` of a run, by step: a clock can be set back."""
    steps = {path: get_step(path) for path in Path(folder).glob(f"{CHECKPOINT_PREFIX}-*")}
    found = [path for path, step in steps.items() if step is not None and path.is_dir()]
    return sorted(found, key=lambda path: steps[path] or 0)


def find_checkpoint(folder: str | Path, *, resumable: bool = False) -> Path | None:
    """Return the newest complete checkpoint of a run; others are passed over with a warning.

    Args:
        folder: The run's folder, its `output_dir`.
        resumable: It also has to hold what going on needs.
    """
    for path in reversed(list_checkpoints(folder)):
        lacking = why_not_resumable(path) if resumable else validate_checkpoint(path)
        if lacking is None:
            return path
        logger.warning("%s is passed over: %s.", path, lacking)
    return None


def delete_old_checkpoints(folder: Path, *, run: str, keep: int, protected: Iterable[int]) -> None:
    """Delete the oldest checkpoints of a run, by what their manifests list.

    Args:
        folder: The run's folder, its `output_dir`.
        run: Only its checkpoints count, and are deleted.
        keep: How many stay, at least.
        protected: Steps of checkpoints that stay whatever `keep` is.
    """
    own = [path for path in list_checkpoints(folder) if _get_run(path) == run]
    stay = {*protected}
    spare = [path for path in own if get_step(path) not in stay]
    for path in spare[: max(0, len(own) - max(keep, len(own) - len(spare)))]:
        delete_recorded(path)


def _get_run(checkpoint: Path) -> str | None:
    try:
        manifest = read_manifest(checkpoint)
    except InputError:
        return None
    return manifest.run if manifest else None
