"""What a folder with an adapter says beside peft's files: which weights the adapter is for.

The adapter stands in the folder's root, where sentence-transformers and `AutoModel` find it. They
would put that of a decoder that attends to both sides on one that does not, and give other
embeddings without a word. Such an adapter stands in `lora/` instead, and `modules.json` names a
module that sentence-transformers refuses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from simcse_trainer.errors import InputError
from simcse_trainer.files import (
    ADAPTER_BASE,
    ADAPTER_CONFIG,
    CONFIG,
    HIDDEN_ADAPTER,
    WEIGHTS,
    WEIGHTS_INDEX,
)
from simcse_trainer.model.decoders import is_bidirectional
from simcse_trainer.model.io.lookup import find_file
from simcse_trainer.model.io.resolve import (
    find_derived,
    find_installed,
    find_packaged,
    resolve_model,
)
from simcse_trainer.model.io.tensors import read_json
from simcse_trainer.model.lora import get_base_model, save_adapter
from simcse_trainer.model.quantization import quantization_bits

_OLDER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class BaseWeights:
    """What an adapter is trained on.

    Attributes:
        name: A folder, or a name on the Hub.
        revision: Its revision on the Hub.
        sha256: From `fingerprint`; None where it is not known.
        bits: 4 or 8 where they are quantised.
        bidirectional: A decoder that attends to both sides.
        commit: On the Hub, where it was loaded from there: the same commit has the same weights.
        package: The package whose weights these are, where they are not those on the Hub.
    """

    name: str
    revision: str | None = None
    sha256: str | None = None
    bits: int | None = None
    bidirectional: bool = False
    commit: str | None = None
    package: str | None = None

    def as_json(self) -> str:
        """Return it as the text of its file."""
        optional = ("commit", "package")
        said = {name: one for name, one in asdict(self).items() if name not in optional or one}
        return json.dumps(said, indent=2) + "\n"


@dataclass(frozen=True)
class AdapterFolder:
    """Where an adapter is, and what it is for."""

    base: BaseWeights
    subfolder: str | None = None


def describe_base(
    path: str, backbone: Any, hub: Mapping[str, Any], *, sha256: str | None = None
) -> BaseWeights:
    """Return what an adapter will be for.

    Args:
        path: What the backbone has just been loaded from.
        backbone: The backbone, with or without an adapter.
        hub: What the Hub is asked with: `revision` and `token`.
        sha256: Of its weights, where it is known already.
    """
    packaged = find_packaged(path)
    here = str(Path(path).resolve()) if Path(path).is_dir() else path
    name = packaged.hub_name if packaged is not None else here
    derived = packaged is not None and packaged.gguf
    return BaseWeights(
        name,
        hub.get("revision"),
        sha256 or fingerprint(path, **hub),
        quantization_bits(backbone),
        is_bidirectional(backbone.config),
        _find_commit(path, hub),
        find_derived(name) if derived else None,
    )


def find_base(base: BaseWeights) -> str:
    """Find the base's weights: in the package that has them, else by their name.

    Raises:
        InputError: They are those of a package that is not installed.
    """
    package = base.package or find_installed(base.name)
    return base.name if package is None else resolve_model(package)


def check_base(base: BaseWeights, path: str, folder: str, hub: Mapping[str, Any]) -> None:
    """Raise InputError where the weights at `path` are not those that the adapter is for."""
    if base.commit is not None and base.commit == _find_commit(path, hub):
        return
    found = fingerprint(path, **hub) if base.sha256 else None
    if found != base.sha256:
        derived = find_derived(base.name)
        other = f", or, if it was trained on that, --base_model {derived}" if derived else ""
        raise InputError(
            f"The adapter in '{folder}' was trained on weights of '{base.name}' with the sha256 "
            f"{base.sha256}; those of '{path}' have {found}. Use the base model as it was then: "
            f"its revision on the Hub, or your copy of it{other}."
        )


def read_adapter(name_or_path: str, hub: Mapping[str, Any]) -> AdapterFolder | None:
    """Read what a folder says of its adapter; None where it holds a whole model or none at all.

    Raises:
        InputError: The adapter does not say which model it is for.
    """
    if find_file(name_or_path, CONFIG, **hub) is not None and not _is_adapter_with_config(
        name_or_path, hub
    ):
        return None
    for subfolder in (None, HIDDEN_ADAPTER):
        prefix = f"{subfolder}/" if subfolder else ""
        config = find_file(name_or_path, prefix + ADAPTER_CONFIG, **hub)
        if config is None:
            continue
        said = read_json(config)
        ours = find_file(name_or_path, ADAPTER_BASE, **hub)
        if ours is not None:
            return AdapterFolder(_read_base(ours), subfolder)
        name = said.get("base_model_name_or_path")
        if not name:
            raise InputError(
                f"The adapter in '{name_or_path}' does not say which model it is for: expected "
                f"base_model_name_or_path in its {ADAPTER_CONFIG}. Add it."
            )
        return AdapterFolder(BaseWeights(name, said.get("revision")), subfolder)
    return None


def _is_adapter_with_config(name_or_path: str, hub: Mapping[str, Any]) -> bool:
    """Return whether a folder with a `config.json` holds an adapter and no other weights."""

    def has(filename: str) -> bool:
        return find_file(name_or_path, filename, **{**hub, "assume_absent": True}) is not None

    if not has(ADAPTER_CONFIG):
        return False
    whole = next(filter(has, (WEIGHTS, WEIGHTS_INDEX, *_OLDER_WEIGHTS)), None)
    if whole is not None:
        raise InputError(
            f"'{name_or_path}' holds a whole model ({whole}) and an adapter ({ADAPTER_CONFIG}): "
            "which of them it is, it does not say. Put the adapter into a folder of its own."
        )
    return True


def _read_base(path: Path) -> BaseWeights:
    said = read_json(path)
    unknown = sorted(said.keys() - {field.name for field in fields(BaseWeights)})
    if unknown or not isinstance(said.get("name"), str):
        found = f"also {', '.join(unknown)}" if unknown else f"the name {said.get('name')!r}"
        raise InputError(
            f"{path}: expected what an adapter is for, as this version writes it; found {found}. "
            "Use the version that wrote it, or save the adapter again."
        )
    return BaseWeights(**said)


def write_adapter(
    backbone: Any, folder: Path, state: Mapping[str, Tensor], base: BaseWeights | None
) -> None:
    """Write an adapter and what it is for.

    Args:
        backbone: The backbone with its adapter, a `PeftModel`.
        folder: A folder that exists already.
        state: The backbone's state dict.
        base: From `describe_base`; without it the configuration's name is all that is known.
    """
    config = get_base_model(backbone).config
    base = base or BaseWeights(
        config._name_or_path,
        bits=quantization_bits(backbone),
        bidirectional=is_bidirectional(config),
    )
    target = folder / HIDDEN_ADAPTER if base.bidirectional else folder
    save_adapter(backbone, target, state, base=base.name, revision=base.revision)
    (folder / ADAPTER_BASE).write_text(base.as_json(), encoding="utf-8")


def _find_commit(path: str, hub: Mapping[str, Any]) -> str | None:
    """Find the commit of a model in the Hub's cache; None of a folder of one's own."""
    config = None if Path(path).is_dir() else find_file(path, CONFIG, **hub)
    parts = config.parts if config is not None else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def fingerprint(name_or_path: str, **hub: Any) -> str | None:
    """Compute SHA-256 of a model's weights: names, types, shapes and values, in whatever files.

    Args:
        name_or_path: A folder, or a name on the Hub.
        hub: What the Hub is asked with: `revision` and `token`.

    Returns:
        Hexadecimal; None where the folder holds no safetensors.
    """
    # In the order of transformers, which asks for an index where there is no whole file.
    files = [find_file(name_or_path, WEIGHTS, **hub)]
    if files == [None] and (index := find_file(name_or_path, WEIGHTS_INDEX, **hub)) is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [find_file(name_or_path, name, **hub) for name in names]
    found = [path for path in files if path is not None]
    if not found or len(found) < len(files):
        return None
    return _digest(tuple((path, path.stat().st_size, path.stat().st_mtime_ns) for path in found))


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Compute one digest of all tensors' digests, in the order of names; once in a process."""
    digests = {}
    for path, _, _ in files:
        with safe_open(path, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                kind = f"{name} {tensor.dtype} {list(tensor.shape)} "
                content = tensor.reshape(-1).view(torch.uint8).numpy()
                digests[name] = hashlib.sha256(content)
                digests[name].update(kind.encode())
    return hashlib.sha256(b"".join(digests[n].digest() for n in sorted(digests))).hexdigest()
