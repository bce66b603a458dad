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
    step_of,
)
from simcse_trainer.manifest import Manifest, parse_manifest, read_manifest, record_files
from simcse_trainer.output_folder import (
    delete_recorded,
    find_foreign,
    flush,
    list_files,
    move_aside,
    replace_files,
    write_manifest,
)

logger = logging.getLogger(__name__)

# What going on needs beside the weights; one of each group, as the engines name them.
_NEEDED = {
    STATE: (STATE,),
    "the optimizer's state": ("optimizer*", "global_step*", "pytorch_model_fsdp*"),
    "the random state": ("rng_state*.pth",),
}


def publish(
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
            return publish(staged, final, run=run, step=step)
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


def what_is_torn(checkpoint: Path) -> str | None:
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
    torn = what_is_torn(checkpoint)
    if torn is not None:
        return torn
    first = [name.split("/", 1)[0] for name in read_checkpoint(checkpoint).files]
    for what, patterns in _NEEDED.items():
        if not any(fnmatchcase(name, pattern) for name in first for pattern in patterns):
            return f"it was saved without {what} (save_only_model)"
    return None


def list_checkpoints(folder: str | Path) -> list[Path]:
    """Return the folders named `checkpoint-N` of a run, by step: a clock can be set back."""
    steps = {path: step_of(path) for path in Path(folder).glob(f"{CHECKPOINT_PREFIX}-*")}
    found = [path for path, step in steps.items() if step is not None and path.is_dir()]
    return sorted(found, key=lambda path: steps[path] or 0)


def find_checkpoint(folder: str | Path, *, resumable: bool = False) -> Path | None:
    """Return the newest complete checkpoint of a run; others are passed over with a warning.

    Args:
        folder: Of the run.
        resumable: It also has to hold what going on needs.
    """
    for path in reversed(list_checkpoints(folder)):
        lacking = why_not_resumable(path) if resumable else what_is_torn(path)
        if lacking is None:
            return path
        logger.warning("%s is passed over: %s.", path, lacking)
    return None


def choose_checkpoint(asked: str | bool | None, folder: Path) -> Path | None:
    """Return the checkpoint that a run goes on from; None where it begins.

    Args:
        asked: A checkpoint; or True, or "true", for the newest one in the run's folder. A machine
            that is taken away and started again always says so: without any the run begins.
        folder: Of the run.

    Raises:
        InputError: It cannot be gone on from, or there are some and none of them can.
    """
    if not asked or str(asked).lower() == "false":
        return None
    if str(asked).lower() != "true":
        checkpoint = Path(str(asked))
        if not checkpoint.is_dir():
            raise InputError(f"resume_from_checkpoint: there is no folder {asked}.")
        lacking = why_not_resumable(checkpoint)
        if lacking is not None:
            raise InputError(
                f"{asked} cannot be resumed from: {lacking}. Pass --resume_from_checkpoint true "
                "for the newest one that can, or begin anew with its weights: "
                f"--model_name_or_path {asked}"
            )
        return checkpoint
    found = find_checkpoint(folder, resumable=True) if folder.is_dir() else None
    if found is not None:
        return found
    if folder.is_dir() and (there := list_checkpoints(folder)):
        raise InputError(
            f"There is no complete checkpoint in {folder} to resume from: {there[-1].name} cannot "
            f"be ({why_not_resumable(there[-1])}). Pass another --output_dir to begin anew."
        )
    logger.warning("There is no checkpoint in %s: training starts anew.", folder)
    return None


def delete_old_checkpoints(folder: Path, *, run: str, keep: int, protected: Iterable[int]) -> None:
    """Delete the oldest checkpoints of a run, by what their manifests list.

    Args:
        folder: Of the run.
        run: Only its checkpoints count, and are deleted.
        keep: How many stay, at least.
        protected: Steps of checkpoints that stay whatever `keep` is.
    """
    own = [path for path in list_checkpoints(folder) if _run_of(path) == run]
    stay = {*protected}
    spare = [path for path in own if step_of(path) not in stay]
    for path in spare[: max(0, len(own) - max(keep, len(own) - len(spare)))]:
        delete_recorded(path)


def _run_of(checkpoint: Path) -> str | None:
    try:
        manifest = read_manifest(checkpoint)
    except InputError:
        return None
    return manifest.run if manifest else None
