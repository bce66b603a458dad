"""Whether the weights under an adapter are those it was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from simcse_trainer.model.layout import find_file

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"


def fingerprint(name_or_path: str, **hub: Any) -> str | None:
    """SHA-256 of a model's weights: names, types, shapes and values, in whatever files.

    Args:
        name_or_path: A folder, or a name on the Hub.
        hub: `revision` and `token`.

    Returns:
        Hexadecimal; None where the folder holds no safetensors.
    """
    # In the order of transformers, which asks for an index where there is no whole file.
    files = [find_file(name_or_path, _WHOLE, **hub)]
    if files == [None] and (index := find_file(name_or_path, _INDEX, **hub)) is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [find_file(name_or_path, name, **hub) for name in names]
    found = [path for path in files if path is not None]
    return _digest(found) if found and len(found) == len(files) else None


def _digest(files: Sequence[Path]) -> str:
    """One digest per tensor, put together in the order of their names."""
    digests = {}
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                kind = f"{name} {tensor.dtype} {list(tensor.shape)} "
                content = tensor.reshape(-1).view(torch.uint8).numpy()
                digests[name] = hashlib.sha256(content)
                digests[name].update(kind.encode())
    return hashlib.sha256(b"".join(digests[n].digest() for n in sorted(digests))).hexdigest()
