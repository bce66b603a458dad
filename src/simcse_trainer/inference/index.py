"""Embeddings kept for search, in one of three sizes, and the search itself: exact, in blocks.

| storage | bytes a row | a score is |
|---|---|---|
| float32 | 4 D | the cosine |
| int8 | D + 4 | the cosine to about 0.002: each row has 255 steps up to its largest value |
| binary | D / 8 + 4 | an estimate of it, from the signs alone; see `Vectors.rows` |
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, float32, tensor

from simcse_trainer.errors import InputError
from simcse_trainer.model.io.tensors import follow_umask, hash_file, writing_tensors

STORAGES = ("float32", "int8", "binary")

# Of scores and of unpacked rows at a time: 64 MiB each.
_BLOCK_VALUES = 2**24
_BLOCK_QUERIES = 1024
_INT8_STEPS = 127


@dataclass(frozen=True)
class Vectors:
    """N unit vectors of dimension D; adding to them makes new ones, so that readers go on.

    Attributes:
        storage: How rows are kept, one of `STORAGES`.
        codes: [N, D] float32 or int8, or [N, D / 8 rounded up] uint8: the signs, eight a byte.
        scales: [N], what a row of int8 or signs is multiplied by; of float32 [0].
        dimension: D, the size of an embedding.
    """

    storage: str
    codes: Tensor
    scales: Tensor
    dimension: int

    @classmethod
    def pack(cls, embeddings: Tensor, storage: str = "float32") -> Vectors:
        """Keep unit vectors [N, D].

        Raises:
            InputError: Such a storage does not exist.
        """
        check_storage(storage)
        embeddings = embeddings.float()
        dimension = embeddings.shape[1]
        if storage == "float32":
            return cls(storage, embeddings.contiguous(), torch.empty(0), dimension)
        if storage == "int8":
            scales = embeddings.abs().amax(1).clamp_min(1e-30) / _INT8_STEPS
            codes = (embeddings / scales[:, None]).round().to(torch.int8)
            return cls(storage, codes, scales, dimension)
        codes = torch.from_numpy(np.packbits(embeddings.numpy() > 0, axis=1))
        return cls(storage, codes, 1 / embeddings.abs().sum(1).clamp_min(1e-30), dimension)

    @classmethod
    def join(cls, parts: Iterable[Vectors]) -> Vectors:
        """Join vectors of one storage and dimension, one behind the other."""
        first, *others = parts
        codes = torch.cat([first.codes, *(part.codes for part in others)])
        scales = torch.cat([first.scales, *(part.scales for part in others)])
        return cls(first.storage, codes, scales, first.dimension)

    def check(self) -> None:
        """Raise ValueError where the parts do not go together."""
        empty = Vectors.pack(torch.empty(0, self.dimension), self.storage)
        rows = 0 if self.storage == "float32" else len(self)
        kinds = [(part.codes.dtype, part.codes.shape[1:]) for part in (self, empty)]
        if kinds[0] != kinds[1] or self.scales.dtype != torch.float32 or len(self.scales) != rows:
            raise ValueError(f"{self.storage} of {self.dimension} dimensions is not what it holds")

    def __len__(self) -> int:
        return len(self.codes)

    def __repr__(self) -> str:
        return f"Vectors({len(self)} of {self.dimension} dimensions, {self.storage})"

    def extended(self, embeddings: Tensor) -> Vectors:
        """Return these and more unit vectors [M, D] behind them."""
        return Vectors.join([self, Vectors.pack(embeddings, self.storage)])

    def rows(self, start: int, stop: int) -> Tensor:
        """Return float32 vectors [stop - start, D]: their products with a unit vector are scores.

        Of the signs s of a vector v this is s / |v|_1, whose product with v itself is 1: the
        estimator of Gao and Long 2024 ("RaBitQ", section 3.2) without their random rotation.
        """
        codes = self.codes[start:stop]
        if self.storage == "float32":
            return codes
        if self.storage == "binary":
            bits = np.unpackbits(codes.numpy(), axis=1, count=self.dimension)
            codes = torch.from_numpy(bits).float().mul_(2).sub_(1)
        return codes.float() * self.scales[start:stop, None]

    def search(self, queries: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Return the rows with the largest products.

        All rows are compared, block by block: memory follows the block, the index and what is
        returned, not the number of queries times N.

        Args:
            queries: [Q, D] unit vectors.
            top_k: At most so many rows for each.

        Returns:
            Scores [Q, k], falling, and the numbers of the rows [Q, k]; k = min(top_k, N). Of equal
            scores the first row comes first.
        """
        found = [self._search_block(block, top_k) for block in queries.split(_BLOCK_QUERIES)]
        scores, rows = zip(*found, strict=True)
        return torch.cat(scores), torch.cat(rows)

    def _search_block(self, queries: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        best = queries.new_empty(len(queries), 0)
        rows = torch.empty(len(queries), 0, dtype=torch.long)
        size = max(1, _BLOCK_VALUES // max(self.dimension, len(queries)))
        for start in range(0, len(self), size):
            scores = queries @ self.rows(start, min(start + size, len(self))).T
            scores, columns = scores.topk(min(top_k, scores.shape[1]))
            best, rows = torch.cat([best, scores], 1), torch.cat([rows, columns + start], 1)
            best, order = best.topk(min(top_k, best.shape[1]))
            rows = rows.gather(1, order)
        rows, order = rows.sort(1)
        best, order = best.gather(1, order).clamp(-1, 1).sort(dim=1, descending=True, stable=True)
        return best, rows.gather(1, order)


def check_storage(storage: str) -> None:
    """Raise InputError where such a storage does not exist."""
    if storage not in STORAGES:
        raise InputError(f"storage is '{storage}'; expected one of {', '.join(STORAGES)}.")


class FaissVectors:
    """N unit vectors in a faiss index of inner products, on the CPU.

    Args:
        embeddings: [N, D], an embedding a row.
        fast: Look only into the nearest `num_cells_in_search` of `num_cells` cells: approximate.
        num_cells: Cells of the index, at most N.
        num_cells_in_search: Cells that are looked into, at most `num_cells`.

    Raises:
        InputError: faiss is not installed.
    """

    def __init__(
        self, embeddings: Tensor, *, fast: bool, num_cells: int, num_cells_in_search: int
    ) -> None:
        if find_spec("faiss") is None:
            raise InputError("use_faiss needs faiss. Run: pip install faiss-cpu")
        import faiss

        self.fast = fast
        self.dimension = embeddings.shape[1]
        self._index: Any = faiss.IndexFlatIP(self.dimension)
        if fast:
            cells = min(num_cells, len(embeddings))
            self._index = faiss.IndexIVFFlat(
                self._index, self.dimension, cells, faiss.METRIC_INNER_PRODUCT
            )
            self._index.nprobe = min(num_cells_in_search, cells)
            self._index.train(embeddings.numpy())
        self._index.add(embeddings.numpy())

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def __repr__(self) -> str:
        found = "cells" if self.fast else "flat"
        return f"FaissVectors({len(self)} of {self.dimension} dimensions, {found})"

    def extended(self, embeddings: Tensor) -> FaissVectors:
        """Return these and more unit vectors [M, D] behind them, in the cells that there are."""
        other = self._copy()
        other._index.add(embeddings.numpy())
        return other

    def search(self, queries: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Search as `Vectors.search`; a row number of -1 where the cells held fewer than k rows."""
        scores, rows = self._index.search(queries.numpy(), min(top_k, len(self)))
        return torch.from_numpy(scores), torch.from_numpy(rows)

    def embeddings(self) -> Tensor:
        """Return all vectors [N, D]."""
        index = self._copy()._index
        if self.fast:
            index.make_direct_map()
        return torch.from_numpy(index.reconstruct_n(0, len(self)))

    def _copy(self) -> FaissVectors:
        import faiss

        other = object.__new__(FaissVectors)
        other.fast, other.dimension = self.fast, self.dimension
        other._index = faiss.clone_index(self._index)
        return other


PROBE_TEXTS = ("A woman is reading.", "12 kg of rice", "서울은 오늘 비가 온다.")

_HEADER, _VECTORS, _SENTENCES = "index.json", "vectors.safetensors", "sentences.jsonl"
_FORMAT = "simcse-trainer index 1"
# How far probes may differ: devices and batch shapes differ by round-off, models by more.
_TOLERANCE, _TOLERANCE_OF_16_BITS = 1e-4, 5e-2


@dataclass(frozen=True)
class SavedIndex:
    """What a folder holds.

    Attributes:
        sentences: The N texts that are searched.
        vectors: The N vectors of the texts.
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
        dtype: Type of its weights.
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
        with writing_tensors(folder):
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
            raise InputError(f"{folder} is incomplete: {name} is missing. Build the index again.")
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
