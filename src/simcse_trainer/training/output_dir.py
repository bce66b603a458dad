"""Whether a run may write into its output folder, decided before training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simcse_trainer.errors import InputError
from simcse_trainer.files import CHECKPOINT_PREFIX, OLD_MANIFEST, get_step, is_training_state
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
    """Checkpoints that another program has written, and files with the names of checkpoints."""
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
