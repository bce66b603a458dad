"""An index as a folder: complete or absent, and only for the model that made it.

    index.json           what it is, the SHA-256 of the two files beside it, and a probe
    vectors.safetensors  `codes` and `scales` of `Vectors`
    sentences.jsonl      a JSON string a line

The probe is what the model makes of a few fixed texts. A model of other weights, pooling, head or
tokenizer makes something else of them; a renamed folder or another device does not.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, float32, tensor

from simcse_trainer.errors import InputError
from simcse_trainer.inference.vectors import Vectors
from simcse_trainer.tensor_files import follow_umask, hash_file

PROBE_TEXTS = ("A woman is reading.", "12 kg of rice", "서울은 오늘 비가 온다.")

_HEADER, _VECTORS, _SENTENCES = "index.json", "vectors.safetensors", "sentences.jsonl"
_FORMAT = "simcse-trainer index 1"
# How far probes may lie apart: devices and batch shapes differ by round-off, models by more.
_TOLERANCE, _TOLERANCE_OF_16_BITS = 1e-4, 5e-2


@dataclass(frozen=True)
class SavedIndex:
    """What a folder holds.

    Attributes:
        sentences: N texts.
        vectors: N of them.
        faiss: `flat` or `cells`, where the search was by faiss; then `vectors` are float32.
    """

    sentences: Sequence[str]
    vectors: Vectors
    faiss: str | None = None


@dataclass(frozen=True)
class Maker:
    """The model of an index.

    Attributes:
        name: As it was asked for; for errors only.
        truncate_dim: As given to `SimCSE`.
        dtype: Of its weights.
        probe: [3, D]: unit embeddings of `PROBE_TEXTS`.
    """

    name: str
    truncate_dim: int | None
    dtype: str
    probe: Tensor


def write_index(folder: Path, index: SavedIndex, maker: Maker) -> None:
    """Write an index; one that is there is replaced when the new one is complete.

    Raises:
        InputError: The folder holds something else.
    """
    new = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not new and not (folder / _HEADER).is_file():
        raise InputError(f"{folder} is there already and is no index; pass a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as aside:
        staged = Path(aside) / "index"
        staged.mkdir()
        vectors = index.vectors
        save_file({"codes": vectors.codes, "scales": vectors.scales}, staged / _VECTORS)
        with open(staged / _SENTENCES, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(text, ensure_ascii=False) + "\n" for text in index.sentences)
        header = {
            "format": _FORMAT,
            "model": maker.name,
            "dtype": maker.dtype,
            "truncate_dim": maker.truncate_dim,
            "probe": maker.probe.tolist(),
            "storage": vectors.storage,
            "dimension": vectors.dimension,
            "count": len(vectors),
            "faiss": index.faiss,
            "sha256": {name: hash_file(staged / name) for name in (_VECTORS, _SENTENCES)},
        }
        (staged / _HEADER).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
        follow_umask(staged)
        replaced = Path(aside) / "replaced"
        if folder.exists():
            folder.rename(replaced)
        staged.rename(folder)
        for path in replaced.iterdir() if replaced.is_dir() else ():
            if path.name not in (_HEADER, _VECTORS, _SENTENCES):  # somebody else's
                path.rename(folder / path.name)


def read_index(folder: Path, maker: Maker) -> SavedIndex:
    """Read what `write_index` has written.

    Raises:
        InputError: No index, a torn or altered one, or one of another model.
    """
    header = _read_header(folder)
    for name, expected in header["sha256"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{folder} is torn: {name} is missing. Build the index again.")
        if hash_file(path) != expected:
            raise InputError(f"{folder}: {name} is not as it was written. Build the index again.")
    _check_maker(folder, header, maker)
    try:
        tensors = load_file(folder / _VECTORS)
        with open(folder / _SENTENCES, encoding="utf-8") as file:
            sentences = [json.loads(line) for line in file]
        vectors = Vectors(
            header["storage"], tensors["codes"], tensors["scales"], header["dimension"]
        )
        vectors.check()
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _not_ours(folder, error) from error
    if not len(sentences) == len(vectors) == header["count"]:
        raise _not_ours(folder, f"{len(sentences)} sentences and {len(vectors)} vectors")
    return SavedIndex(sentences, vectors, header["faiss"])


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / _HEADER
    if not path.is_file():
        raise InputError(f"{folder} holds no index: expected {_HEADER}, as save_index writes it.")
    try:
        header: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if header["format"] != _FORMAT:
            raise _not_ours(folder, f"its format is '{header['format']}'")
        needed = ("storage", "dimension", "count", "faiss", "probe", "truncate_dim", "dtype")
        missing = [name for name in needed if name not in header]
        if header.get("faiss") not in (None, "flat", "cells"):
            raise _not_ours(folder, f"faiss is {header['faiss']!r}")
        if missing or set(header["sha256"]) != {_VECTORS, _SENTENCES}:
            raise _not_ours(folder, f"it lacks {', '.join(missing) or 'a SHA-256'}")
    except (ValueError, KeyError, TypeError) as error:
        raise error if isinstance(error, InputError) else _not_ours(folder, error) from error
    return header


def _check_maker(folder: Path, header: dict[str, Any], maker: Maker) -> None:
    if header["truncate_dim"] != maker.truncate_dim:
        raise InputError(
            f"{folder} was made with truncate_dim {header['truncate_dim']}, the model is loaded "
            f"with {maker.truncate_dim}. Pass truncate_dim {header['truncate_dim']}."
        )
    probe = _to_probe(folder, header)
    exact = {header["dtype"], maker.dtype} <= {"float32", "float64"}
    alike = _TOLERANCE if exact else _TOLERANCE_OF_16_BITS
    if probe.shape != maker.probe.shape or (probe - maker.probe).norm(dim=1).max() > alike:
        raise InputError(
            f"{folder} was made by another model ('{header.get('model')}') than '{maker.name}', or "
            "by this one read in another way. Load the model it was made by, or build it again."
        )


def _to_probe(folder: Path, header: dict[str, Any]) -> Tensor:
    try:
        return tensor(header["probe"], dtype=float32)
    except (ValueError, TypeError) as error:
        raise _not_ours(folder, error) from error


def _not_ours(folder: Path, reason: object) -> InputError:
    reason = " ".join(str(reason).split())
    return InputError(f"{folder}/{_HEADER} is no index of this version ({reason}). Build it again.")
