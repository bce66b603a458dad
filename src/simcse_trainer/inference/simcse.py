"""`SimCSE`: embeddings, similarities and search, as the original project's tool offers them.

Names, order and defaults of the arguments are those of its class of the same name, so that code
written for it runs with `from simcse_trainer import SimCSE`. What is new comes by keyword.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from simcse_trainer.data.texts import read_texts
from simcse_trainer.errors import InputError
from simcse_trainer.inference.encoder import Encoder
from simcse_trainer.inference.faiss_vectors import FaissVectors
from simcse_trainer.inference.index_folder import (
    PROBE_TEXTS,
    Maker,
    SavedIndex,
    read_index,
    write_index,
)
from simcse_trainer.inference.vectors import Vectors, check_storage

Hits: TypeAlias = list[tuple[str, float]]

# Rows of an index of signs whose sentences are embedded again, for every hit.
_RESCORED_PER_HIT = 4


@dataclass(frozen=True)
class Index:
    """What is searched: N sentences and their vectors. Never changed, but replaced by another."""

    sentences: Sequence[str]
    vectors: Vectors | FaissVectors


class SimCSE(Encoder):
    """A trained model and an index.

    Any number of threads may encode and search at a time, also while one adds to the index: they
    get what each would get alone.

    Args:
        model_name_or_path: A trained folder, or a name on the Hub; released checkpoints of the
            original project are read as they were trained.
        device: By default the accelerator, else the CPU.
        num_cells: Of a fast faiss index.
        num_cells_in_search: Those of them that are looked into.
        pooler: `cls`, `cls_before_pooler`, `avg`, `avg_top2` or `avg_first_last`, as the original
            names them; by default as the folder says.
        truncate_dim: Keep only the first dimensions of embeddings.
        options: For `SimCSEModel.from_pretrained`: revision, token, max_seq_length, dtype, ...

    Attributes:
        index: None, or what `build_index` made.

    Raises:
        InputError: No model there, no such pooler or device.
    """

    def __init__(
        self,
        model_name_or_path: str | Path,
        device: str | torch.device | None = None,
        num_cells: int = 100,
        num_cells_in_search: int = 10,
        pooler: str | None = None,
        *,
        truncate_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model_name_or_path, device, pooler, truncate_dim, **options)
        self.num_cells = num_cells
        self.num_cells_in_search = num_cells_in_search
        self.index: Index | None = None

    def build_index(
        self,
        sentences_or_file_path: str | Path | Sequence[str],
        use_faiss: bool | None = None,
        faiss_fast: bool = False,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        *,
        storage: str = "float32",
        show_progress_bar: bool = False,
    ) -> None:
        """Embed sentences for `search`, in place of those that were there.

        Args:
            sentences_or_file_path: Texts, or a file of them: see `read_texts`. Blank lines are
                passed over.
            use_faiss: Search by faiss instead of a matrix product; only if True.
            faiss_fast: With faiss: look into the nearest cells only, which is approximate.
            device: See `encode`.
            batch_size: See `encode`.
            storage: `float32`, `int8` or `binary`: see `vectors` for sizes and errors.
            show_progress_bar: On stderr.

        Raises:
            InputError: No sentences, a file that cannot be read, faiss that is not installed, or
                faiss with another storage than float32.
        """
        check_storage(storage)
        if use_faiss and storage != "float32":
            raise InputError(f"faiss keeps float32; leave out use_faiss, or storage '{storage}'.")
        if faiss_fast and not use_faiss:
            raise InputError("faiss_fast is for faiss; pass use_faiss=True too, or leave it out.")
        sentences = _read_sentences(sentences_or_file_path)
        if not sentences:
            raise InputError("There are no sentences to build an index of; pass at least one.")
        texts = tqdm(sentences, desc="Indexing", disable=not show_progress_bar)
        blocks = self.encode_stream(texts, device=device, batch_size=batch_size)
        faiss = ("cells" if faiss_fast else "flat") if use_faiss else None
        packed = Vectors.join(Vectors.pack(found, storage) for _, found in blocks)
        self.index = self._to_index(SavedIndex(sentences, packed, faiss))

    def add_to_index(
        self,
        sentences_or_file_path: str | Path | Sequence[str],
        device: str | torch.device | None = None,
        batch_size: int = 64,
    ) -> None:
        """Embed more sentences for `search`; the arguments are those of `build_index`.

        Raises:
            InputError: There is no index, or a file that cannot be read.
        """
        self._get_index()
        sentences = _read_sentences(sentences_or_file_path)
        found = self._embed_unit(sentences, device, batch_size)
        index = self._get_index()
        self.index = Index([*index.sentences, *sentences], index.vectors.extended(found))

    def search(
        self,
        queries: str | Sequence[str],
        device: str | torch.device | None = None,
        threshold: float = 0.6,
        top_k: int = 5,
        *,
        rescore: int | None = None,
    ) -> Hits | list[Hits]:
        """The nearest sentences of the index.

        Args:
            queries: A text, or several.
            device: See `encode`.
            threshold: The smallest cosine of a hit.
            top_k: Hits of a query, at most.
            rescore: Embed the sentences of so many times `top_k` rows again, and rank them by
                their exact cosines; 0: by the scores of the storage. By default 4 where only signs
                are stored, else 0.

        Returns:
            (sentence, cosine) of each hit, nearest first; a list of that for several queries.

        Raises:
            InputError: There is no index.
        """
        if top_k < 1:
            raise InputError(f"top_k is {top_k}; expected 1 or more.")
        index = self._get_index()
        vectors = self._embed_unit([queries] if isinstance(queries, str) else queries, device)
        if rescore is None:
            signs = isinstance(index.vectors, Vectors) and index.vectors.storage == "binary"
            rescore = _RESCORED_PER_HIT if signs else 0
        scores, rows = index.vectors.search(vectors, top_k * max(1, rescore))
        if rescore:
            scores, rows = self._rescore(index, vectors, rows)
        hits = [
            [
                (index.sentences[row], score)
                for score, row in zip(*found, strict=True)
                if row >= 0 and score >= threshold
            ][:top_k]
            for found in zip(scores.tolist(), rows.tolist(), strict=True)
        ]
        return hits[0] if isinstance(queries, str) else hits

    def save_index(self, path: str | Path) -> None:
        """Write the index to a folder; an index that is there is replaced.

        Raises:
            InputError: There is no index, or the folder holds something else.
        """
        index = self._get_index()
        vectors, faiss = index.vectors, None
        if isinstance(vectors, FaissVectors):
            faiss = "cells" if vectors.fast else "flat"
            vectors = Vectors.pack(vectors.embeddings())
        write_index(Path(path), SavedIndex(index.sentences, vectors, faiss), self._describe())

    def load_index(self, path: str | Path) -> None:
        """Read an index that this model has made.

        Raises:
            InputError: No index, a torn or altered one, or one of another model or truncate_dim.
        """
        self.index = self._to_index(read_index(Path(path), self._describe()))

    def _get_index(self) -> Index:
        if self.index is None:
            raise InputError("There is no index yet; call build_index or load_index first.")
        return self.index

    def _to_index(self, saved: SavedIndex) -> Index:
        if saved.faiss is None:
            return Index(saved.sentences, saved.vectors)
        vectors = FaissVectors(
            saved.vectors.rows(0, len(saved.vectors)),
            fast=saved.faiss == "cells",
            num_cells=self.num_cells,
            num_cells_in_search=self.num_cells_in_search,
        )
        return Index(saved.sentences, vectors)

    def _describe(self) -> Maker:
        dtype = str(next(self.model.backbone.parameters()).dtype).removeprefix("torch.")
        return Maker(self.name, self.truncate_dim, dtype, self._embed_unit(PROBE_TEXTS))

    def _rescore(self, index: Index, queries: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The same rows [Q, k] by their exact cosines, falling."""
        different, places = rows.unique(return_inverse=True)
        found = self._embed_unit([index.sentences[row] for row in different.tolist()])
        pairs = zip(queries, places, strict=True)
        scores = torch.stack([found[place] @ query for query, place in pairs])
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return scores, rows.gather(1, order)

    def _embed_unit(
        self,
        texts: Iterable[str],
        device: str | torch.device | None = None,
        batch_size: int = 64,
    ) -> Tensor:
        blocks = self.encode_stream(texts, device=device, batch_size=batch_size)
        return self._join(blocks).float()


def _read_sentences(given: str | Path | Sequence[str]) -> list[str]:
    return list(read_texts(given) if isinstance(given, str | Path) else given)
