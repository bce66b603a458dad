"""Writing into a folder that may hold other people's files.

What an earlier save is recorded to have written, in the folder's manifest, is replaced and deleted;
nothing else is. A model is replaced so that a reader finds the old one, the new one, or an error,
whenever the process dies:

    1. All new files are written beside, into a folder of ours, and flushed.
    2. The manifest lists old and new files, and says that they are not complete.
    3. The files without which no loader finds a model (`config.json`, `adapter_config.json`) go,
       then what the new model lacks.
    4. The new files are renamed into place, then the manifest, and last what went first.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from simcse_trainer.errors import InputError
from simcse_trainer.files import (
    ADAPTER_CONFIG,
    CONFIG,
    DOCUMENTS,
    MANIFEST,
    TMP_MARKER,
    TMP_PREFIX,
    is_read_by_loaders,
)
from simcse_trainer.model.io.manifest import (
    Manifest,
    is_edited,
    read_manifest,
    record_file,
    record_files,
)

logger = logging.getLogger(__name__)

# Without them no loader takes a folder for a model.
_ENTRIES = (CONFIG, ADAPTER_CONFIG)


class ForeignFilesError(InputError):
    """Files that no save of ours has written are where a save has to write."""


def make_tmp(folder: Path, name: str) -> Path:
    """Make the folder for files that are being written; the processes of one run share it.

    Args:
        folder: Where the files will go: a rename stays on one file system.
        name: Of the run, as no other folder is called.
    """
    return make_own(folder / f"{TMP_PREFIX}{name}")


def remove_tmp(folder: Path) -> None:
    """Delete what a killed run left half-written; no other run may be at work here."""
    for tmp in folder.glob(f"{TMP_PREFIX}*"):
        remove_own(tmp)


def make_own(folder: Path) -> Path:
    """Make a folder that is ours to delete, with all that is in it."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if made:
        (folder / TMP_MARKER).touch()
    return folder


def remove_own(folder: Path) -> None:
    """Delete a folder from `make_own`; one of that name without our mark stays."""
    if (folder / TMP_MARKER).is_file():
        shutil.rmtree(folder, ignore_errors=True)


def find_foreign(folder: Path, names: Iterable[str]) -> list[str]:
    """Return the files in a folder that are in the way of a model of ours.

    Args:
        folder: The folder to look into; it may be missing.
        names: The files that are to be written, with forward slashes.

    Returns:
        What has such a name, or would change how the model is loaded, and stands in no manifest.
    """
    if not folder.is_dir():
        return []
    manifest = read_manifest(folder) or Manifest()
    found = {}
    for name in names:
        blocking = _find_blocking(folder, name)
        if blocking is not None and blocking not in manifest.files:
            found[blocking] = True
    for path in sorted(folder.iterdir()):
        if is_read_by_loaders(path.name) and path.name not in manifest.files:
            found[path.name] = True
    return list(found)


def move_aside(folder: Path, names: Iterable[str]) -> None:
    """Rename files to `NAME.before`, or where that is taken `NAME.before2` and so on."""
    for name in names:
        path = folder / name
        target, count = path.with_name(f"{path.name}.before"), 1
        while os.path.lexists(target):
            count += 1
            target = path.with_name(f"{path.name}.before{count}")
        path.rename(target)
        logger.warning("%s is kept as %s.", path, target.name)


def replace_files(
    staged: Path, folder: Path, *, run: str = "", step: int | None = None
) -> Manifest:
    """Make a folder hold the model that has been written beside it.

    Args:
        staged: Holds the new model and nothing else; gone afterwards.
        folder: On the same file system. An earlier model in it is deleted; documents stay.
        run: Of which run the model is.
        step: The optimizer steps that the weights have seen.

    Returns:
        The folder's manifest.

    Raises:
        ForeignFilesError: Other people's files have such names; nothing has been changed.
    """
    names = list_files(staged)
    foreign = find_foreign(folder, names)
    if foreign:
        raise ForeignFilesError(f"{folder} holds {shorten(foreign)}, which no save has written.")
    old = read_manifest(folder) or Manifest()
    new = record_files(staged, names, run=run, step=step)
    kept = {n: one for n, one in old.files.items() if n in DOCUMENTS and n not in new.files}
    new = replace(new, files={**kept, **new.files})
    for name in names:
        flush(staged / name)
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, replace(new, files={**old.files, **new.files}, complete=False))
    gone = [name for name in old.files if _is_entry(name)]
    gone += [name for name in old.files if name not in new.files]
    for name in gone:
        _delete(folder, name)
    for name in names:
        if not _is_entry(name):
            _rename(staged / name, folder / name)
    write_manifest(folder, new)
    for name in names:
        if _is_entry(name):
            _rename(staged / name, folder / name)
    flush(folder)
    shutil.rmtree(staged, ignore_errors=True)
    return new


def add_documents(folder: Path, names: Sequence[str]) -> None:
    """Record files of ours that have just been written beside a model."""
    manifest = read_manifest(folder) or Manifest()
    found = [name for name in names if (folder / name).is_file()]
    files = {name: record_file(folder / name, name) for name in found}
    if files:
        write_manifest(folder, replace(manifest, files={**manifest.files, **files}))


def make_way(folder: Path, name: str, *, set_aside: bool = False) -> None:
    """Prepare for writing a document: an edited one is kept beside, a foreign one is refused.

    Args:
        folder: Where it will be.
        name: The name of the document.
        set_aside: Keep a foreign one beside, too.

    Raises:
        ForeignFilesError: No save of ours has written the file that is there.
    """
    path, manifest = folder / name, read_manifest(folder) or Manifest()
    if not os.path.lexists(path):
        return
    record = manifest.files.get(name)
    if record is None and not set_aside:
        raise ForeignFilesError(
            f"{path} was not written by a run. Rename it, or pass --overwrite_output_dir true to "
            f"keep it as {name}.before."
        )
    if record is None or (path.is_file() and is_edited(path, record)):
        move_aside(folder, [name])


def delete_recorded(folder: Path) -> None:
    """Delete what a folder's manifest lists, and the folder where nothing else is in it."""
    manifest = read_manifest(folder)
    if manifest is None:
        return
    for name, record in manifest.files.items():
        if (folder / name).is_file() and is_edited(folder / name, record):
            continue
        _delete(folder, name)
    # Last, so that a deletion that is killed can be finished.
    (folder / MANIFEST).unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write a manifest at once: there is the old one or the new one."""
    path = folder / f"{MANIFEST}.new"
    path.write_text(manifest.as_text(), encoding="utf-8")
    flush(path)
    path.replace(folder / MANIFEST)


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir():
        if os.name == "nt":
            return
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except PermissionError:  # some file systems open no folder, as Windows does not
            return
    else:
        descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def list_files(folder: Path) -> list[str]:
    """Return the names of all files in a folder and below, with forward slashes; no manifest's."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    names = (path.relative_to(folder).as_posix() for path in paths)
    return [name for name in names if name != MANIFEST]


def shorten(names: Sequence[str]) -> str:
    """Return the first names of a list that may be long."""
    shown = ", ".join(names[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _is_entry(name: str) -> bool:
    return name.rsplit("/", 1)[-1] in _ENTRIES and not name[:1].isdigit()


def _find_blocking(folder: Path, name: str) -> str | None:
    """Find what is in the way of a file: one of that name, or a file where its folder has to be."""
    path = folder
    parts = name.split("/")
    for i, part in enumerate(parts):
        path = path / part
        if not os.path.lexists(path):
            return None
        last = i == len(parts) - 1
        if last or not path.is_dir() or path.is_symlink():
            return "/".join(parts[: i + 1])
    return None


def _delete(folder: Path, name: str) -> None:
    path = folder / name
    # Through a link the file would be another folder's.
    if not path.parent.resolve().is_relative_to(folder.resolve()) or path.is_dir():
        return
    path.unlink(missing_ok=True)
    for parent in path.relative_to(folder).parents:
        inner = folder / parent
        if inner == folder or not inner.is_dir() or any(inner.iterdir()):
            break
        inner.rmdir()


def _rename(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
