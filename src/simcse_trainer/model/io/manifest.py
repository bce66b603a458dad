"""The manifest of a folder: which files an earlier save has written, and which model they are.

Only what a manifest lists is ever replaced, deleted or published. Needs no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from simcse_trainer.errors import InputError
from simcse_trainer.files import DOCUMENTS, MANIFEST, is_inside, is_training_state

_COMMIT = re.compile(r"[0-9a-f]{40}")
_RUN_ID = re.compile(r"[A-Za-z0-9]{0,64}")


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written.

    Attributes:
        size: Size of the file in bytes.
        sha256: Of the contents: of documents, which people edit; on the Hub of every file.
        git_sha1: The name that git gives the contents; only in manifests that are on the Hub.
    """

    size: int
    sha256: str | None = None
    git_sha1: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the fields that are known."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Manifest:
    """What a folder holds.

    Attributes:
        files: Name, with forward slashes -> the file as it was written.
        run: Of which run the model is; empty where it is of none.
        step: The optimizer steps that the weights have seen; None where it is not known.
        complete: All files are there. False while a model is being replaced.
        training_state: On the Hub, the commit with the training state of these weights.
    """

    files: Mapping[str, FileRecord] = field(default_factory=dict)
    run: str = ""
    step: int | None = None
    complete: bool = True
    training_state: str | None = None

    @property
    def model_files(self) -> dict[str, FileRecord]:
        """The files that are the model and its documents, without the state of a training run."""
        return {name: one for name, one in self.files.items() if not is_training_state(name)}

    @property
    def holds_model(self) -> bool:
        """Whether there is more than documents that were written without a model."""
        return bool({*self.model_files} - {*DOCUMENTS})

    def as_text(self) -> str:
        """Return the manifest as JSON, the same for the same files."""
        content: dict[str, Any] = {
            "run": self.run,
            "step": self.step,
            "complete": self.complete,
            "files": {name: self.files[name].as_json() for name in sorted(self.files)},
        }
        if self.training_state is not None:
            content["training_state"] = self.training_state
        return json.dumps(content, indent=2) + "\n"


def parse_manifest(text: str, source: str) -> Manifest:
    """Read a manifest that may come from elsewhere.

    Args:
        text: The text of the manifest, JSON.
        source: Names it in errors.

    Raises:
        InputError: It is malformed, or names a file outside of its folder.
    """
    try:
        said = json.loads(text)
    except ValueError as error:
        raise _malformed(source, f"it is no JSON ({error})") from None
    if not isinstance(said, dict) or not isinstance(said.get("files"), dict):
        raise _malformed(source, "it has no table 'files'")
    step, run, complete = said.get("step"), said.get("run", ""), said.get("complete", True)
    if not (step is None or _is_count(step)):
        raise _malformed(source, f"'step' is {step!r}; expected a number from 0")
    # It becomes part of names of folders and tags.
    if not isinstance(run, str) or not _RUN_ID.fullmatch(run):
        raise _malformed(source, f"'run' is {run!r}; expected letters and digits")
    if not isinstance(complete, bool):
        raise _malformed(source, f"'complete' is {complete!r}; expected true or false")
    state = said.get("training_state")
    if state is not None and not (isinstance(state, str) and _COMMIT.fullmatch(state)):
        raise _malformed(source, f"'training_state' is {state!r}; expected a commit")
    files = {name: _parse_record(name, one, source) for name, one in said["files"].items()}
    return Manifest(files, run, step, complete, state)


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; None if there is none.

    Raises:
        InputError: The manifest is malformed.
        OSError: It cannot be read.
    """
    path = folder / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UnicodeDecodeError as error:
        raise _malformed(str(path), str(error)) from None
    return parse_manifest(text, str(path))


def check_complete(folder: Path) -> Manifest | None:
    """Return the manifest of a folder that a model is loaded from; None if there is none.

    Raises:
        InputError: The model was being replaced when a run ended.
    """
    manifest = read_manifest(folder)
    if manifest is not None and not manifest.complete:
        raise InputError(
            f"{folder} holds parts of two models: a run ended while it was saved. Load one of its "
            "checkpoints, or go on with the run: --resume_from_checkpoint true."
        )
    return manifest


def record_files(
    folder: Path, names: Iterable[str], *, run: str = "", step: int | None = None
) -> Manifest:
    """Return the manifest of files that have just been written in a folder.

    Args:
        folder: The folder that holds the files.
        names: Names of files in it, with forward slashes.
        run: Of which run the model is.
        step: The optimizer steps that the weights have seen.
    """
    return Manifest({name: record_file(folder / name, name) for name in names}, run, step)


def record_file(path: Path, name: str) -> FileRecord:
    """Return the record of a file that has just been written."""
    # By its hash a document that somebody has edited since is known; weights take long to hash.
    digest = sha256(path.read_bytes()).hexdigest() if name in DOCUMENTS else None
    return FileRecord(path.stat().st_size, digest)


def is_edited(path: Path, record: FileRecord) -> bool:
    """Return whether somebody has changed a document since it was recorded."""
    return record.sha256 is not None and sha256(path.read_bytes()).hexdigest() != record.sha256


def _parse_record(name: Any, said: Any, source: str) -> FileRecord:
    if not is_inside(name):
        raise _malformed(source, f"{name!r} is no name of a file inside of the folder")
    # Manifests of version 0.1.0 hold the size alone.
    said = {"size": said} if isinstance(said, int) else said
    if not isinstance(said, dict) or not _is_count(said.get("size")):
        raise _malformed(source, f"the size of {name!r} is not known")
    hashes = {key: said.get(key) for key in ("sha256", "git_sha1")}
    if not all(value is None or isinstance(value, str) for value in hashes.values()):
        raise _malformed(source, f"the checksums of {name!r} are no text")
    return FileRecord(said["size"], **hashes)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _malformed(source: str, reason: str) -> InputError:
    return InputError(
        f"{source} is malformed: {reason}. Restore the file, or save the model again elsewhere."
    )
