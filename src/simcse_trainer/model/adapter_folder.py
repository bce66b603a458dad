"""What a folder with an adapter says beside peft's files: which weights the adapter is for.

The adapter stands in the folder's root, where sentence-transformers and `AutoModel` find it. They
would put that of a decoder that attends to both sides on one that does not, and give other
embeddings without a word. Such an adapter stands in `lora/` instead, and `modules.json` names a
module that sentence-transformers refuses.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from simcse_trainer.errors import InputError
from simcse_trainer.model.adapters import ADAPTER_CONFIG, base_of, save_adapter
from simcse_trainer.model.base_weights import fingerprint
from simcse_trainer.model.decoders import is_bidirectional
from simcse_trainer.model.layout import find_file
from simcse_trainer.model.packaged import PACKAGED_MODELS, resolve_packaged
from simcse_trainer.model.quantization import bits_of

ADAPTER_FILE = "simcse_adapter.json"
HIDDEN = "lora"


@dataclass(frozen=True)
class BaseWeights:
    """What an adapter is trained on.

    Attributes:
        name: A folder, or a name on the Hub.
        revision: On the Hub.
        sha256: From `fingerprint`; None where it is not known.
        bits: 4 or 8 where they are quantised.
        bidirectional: A decoder that attends to both sides.
    """

    name: str
    revision: str | None = None
    sha256: str | None = None
    bits: int | None = None
    bidirectional: bool = False


@dataclass(frozen=True)
class AdapterFolder:
    """Where an adapter is, and what it is for."""

    base: BaseWeights
    subfolder: str | None = None


def describe_base(path: str, backbone: Any, hub: Mapping[str, Any]) -> BaseWeights:
    """Of a backbone that has just been loaded from `path`."""
    packaged = {resolve_packaged(name): one.hub_name for name, one in _installed().items()}
    name = packaged.get(path) or (str(Path(path).resolve()) if Path(path).is_dir() else path)
    return BaseWeights(
        name,
        hub.get("revision"),
        fingerprint(path, **hub),
        bits_of(backbone),
        is_bidirectional(backbone.config),
    )


def find_base(base: BaseWeights) -> str:
    """What to load the base from: a model that is installed as a package, else its name."""
    return next(
        (resolve_packaged(key) for key, one in _installed().items() if one.hub_name == base.name),
        base.name,
    )


def check_base(base: BaseWeights, path: str, folder: str, hub: Mapping[str, Any]) -> None:
    """Raise InputError where the weights at `path` are not those that the adapter is for."""
    found = fingerprint(path, **hub) if base.sha256 else None
    if found != base.sha256:
        raise InputError(
            f"The adapter in '{folder}' was trained on weights of '{base.name}' with the sha256 "
            f"{base.sha256}; those of '{path}' have {found}. Use the base model as it was then: "
            "its revision on the Hub, or your copy of it."
        )


def read_adapter(name_or_path: str, hub: Mapping[str, Any]) -> AdapterFolder | None:
    """What a folder says of its adapter; None where it holds a whole model or none at all.

    Raises:
        InputError: The adapter does not say which model it is for.
    """
    if find_file(name_or_path, "config.json", **hub) is not None:
        return None
    for subfolder in (None, HIDDEN):
        prefix = f"{subfolder}/" if subfolder else ""
        config = find_file(name_or_path, prefix + ADAPTER_CONFIG, **hub)
        if config is None:
            continue
        said = json.loads(config.read_text(encoding="utf-8"))
        ours = find_file(name_or_path, ADAPTER_FILE, **hub)
        if ours is not None:
            return AdapterFolder(BaseWeights(**json.loads(ours.read_text("utf-8"))), subfolder)
        name = said.get("base_model_name_or_path")
        if not name:
            raise InputError(
                f"The adapter in '{name_or_path}' does not say which model it is for: expected "
                f"base_model_name_or_path in its {ADAPTER_CONFIG}. Add it."
            )
        return AdapterFolder(BaseWeights(name, said.get("revision")), subfolder)
    return None


def write_adapter(
    backbone: Any, folder: Path, state: Mapping[str, Tensor], base: BaseWeights | None
) -> None:
    """Write an adapter and what it is for.

    Args:
        backbone: Adapted.
        folder: An existing one.
        state: The backbone's state dict.
        base: From `describe_base`; without it the configuration's name is all that is known.
    """
    config = base_of(backbone).config
    base = base or BaseWeights(
        config._name_or_path, bits=bits_of(backbone), bidirectional=is_bidirectional(config)
    )
    target = folder / HIDDEN if base.bidirectional else folder
    save_adapter(backbone, target, state, base=base.name, revision=base.revision)
    text = json.dumps(asdict(base), indent=2) + "\n"
    (folder / ADAPTER_FILE).write_text(text, encoding="utf-8")


def _installed() -> dict[str, Any]:
    from importlib.util import find_spec

    return {key: one for key, one in PACKAGED_MODELS.items() if find_spec(one.module)}
