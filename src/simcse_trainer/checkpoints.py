"""Checkpoints that are complete or absent.

The Trainer writes a checkpoint in place, file by file, and resumes without a word where
`optimizer.pt` or `rng_state.pth` is missing. Here a checkpoint is written aside, gets a list of its
files and sizes, and is renamed into place when all of it is on the disk.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from simcse_trainer.model_files import MODEL_FILES

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint_files.json"
# Where checkpoints are written until they are complete; a dot, so that nothing takes it for one.
STAGING = f".{PREFIX_CHECKPOINT_DIR}-unfinished"


def publish(staged: Path, final: Path) -> None:
    """Make a finished checkpoint visible under its name, all at once.

    Args:
        staged: The written folder, on the same file system.
        final: Its name; a folder of that name is replaced.
    """
    files = sorted(path for path in staged.rglob("*") if path.is_file())
    sizes = {path.relative_to(staged).as_posix(): path.stat().st_size for path in files}
    manifest = staged / MANIFEST
    manifest.write_text(json.dumps({"files": sizes}, indent=2) + "\n", encoding="utf-8")
    # A rename is no use after a power failure if the contents were still on their way.
    for path in (*files, manifest, staged):
        _flush(path)
    if final.exists():
        replaced = staged.with_name(f"{final.name}-replaced")
        final.rename(replaced)
        staged.rename(final)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        staged.rename(final)
    _flush(final.parent)


def move_files(staged: Path, folder: Path) -> None:
    """Move all files of a folder into another, each replaced at once.

    What was there of an earlier model, and this one lacks, goes: a head or an adapter that were
    left would be loaded.
    """
    for path in [path for pattern in MODEL_FILES for path in folder.glob(pattern)]:
        if not (staged / path.relative_to(folder)).exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()
    for path in sorted(staged.rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(staged)
            target.parent.mkdir(parents=True, exist_ok=True)
            _flush(path)
            path.replace(target)
    shutil.rmtree(staged, ignore_errors=True)


def what_is_torn(checkpoint: Path) -> str | None:
    """What is missing from a checkpoint, in words; None if it is complete."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, int] = manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, size in files.items():
        path = checkpoint / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    return None


def find_checkpoint(folder: str | Path) -> Path | None:
    """The newest complete checkpoint of a run; torn ones are passed over with a warning."""
    for path in reversed(sort_checkpoints(str(folder))):
        torn = what_is_torn(Path(path))
        if torn is None:
            return Path(path)
        logger.warning("%s is passed over: %s.", path, torn)
    return None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
