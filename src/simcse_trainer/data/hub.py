"""Data that comes from the Hub: a data set as `datasets` loads it, or single files of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from huggingface_hub import hf_hub_download

from simcse_trainer.errors import InputError

_REMEDIES = {
    "split": "Pass another --dataset_split.",
    "config": "Pass another --dataset_config_name.",
    "offline": "Unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE, or pass files with --train_file.",
    "reach": "Check the connection, or pass files with --train_file.",
    "connection": "Check the connection, or pass local files with --train_file alone.",
}


def load_hub_dataset(name: str, config: str | None, **options: Any) -> Any:
    """`datasets.load_dataset`, with its failures in one line.

    Raises:
        InputError: It cannot be loaded.
    """
    from datasets import load_dataset

    if Path(name).is_file():
        raise InputError(f"--dataset_name {name} is a file. Pass it with --train_file {name}")
    try:
        return load_dataset(name, config, **options)
    except Exception as error:
        # Each layer below has its own exceptions: datasets, huggingface_hub, httpx.
        raise _explain(name, "the data set could not be loaded", error) from error


def download_files(name: str, filenames: Sequence[str]) -> list[str]:
    """Files of a data set's repository, as local paths; files that are here stay as they are.

    Args:
        name: Name on the Hub, or a folder.
        filenames: Paths inside it, or local files, as where a command line replaces the files of
            a recipe.

    Raises:
        InputError: One of them cannot be had.
    """
    if Path(name).is_dir():
        return [str(Path(name, filename)) for filename in filenames]
    paths = []
    for filename in filenames:
        if Path(filename).is_file():
            paths.append(filename)
            continue
        try:
            paths.append(hf_hub_download(name, filename, repo_type="dataset"))
        except Exception as error:
            raise _explain(name, f"{filename} could not be downloaded", error) from error
    return paths


def _explain(name: str, what: str, error: Exception) -> InputError:
    reason = shorten(str(error) or type(error).__name__, 300).rstrip(".")
    found = (remedy for word, remedy in _REMEDIES.items() if word in reason.lower())
    remedy = next(found, "Check --dataset_name; a private one needs `hf auth login`.")
    return InputError(f"{name}: {what}: {reason}. {remedy}")
