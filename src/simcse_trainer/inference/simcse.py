"""`SimCSE`: embeddings, similarities and search, as the original project's tool offers them.

Names, order and defaults of the arguments are those of its class of the same name, so that code
written for it runs with `from simcse_trainer import SimCSE`. What is new comes by keyword.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from simcse_trainer.data.texts import read_texts
from simcse_trainer.errors import InputError
from simcse_trainer.inference.index import (
    PROBE_TEXTS,
    FaissVectors,
    Maker,
    SavedIndex,
    Vectors,
    check_storage,
    read_index,
    write_index,
)
from simcse_trainer.model.encoding import check_device
from simcse_trainer.model.io.layout import read_layout
from simcse_trainer.model.io.loading import choose_max_length
from simcse_trainer.model.io.resolve import resolve_model
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.model.progress import bar
from simcse_trainer.model.tokenizer import check_sequence, check_texts

# The original's poolers: a pooling mode, and what follows it.
_POOLERS = {
    "cls": ("cls", "pooler"),
    "cls_before_pooler": ("cls", "none"),
    "avg": ("mean", "none"),
    "avg_top2": ("avg_top2", "none"),
    "avg_first_last": ("avg_first_last", "none"),
}
# What the original cuts texts to; a trained folder says its own length.
_ORIGINAL_LENGTH = 128
# Sentences that are tokenized, sorted by length and embedded at a time.
_BLOCK_SENTENCES = 4096

# Sentences, or embeddings of them.
Texts: TypeAlias = str | Sequence[str] | np.ndarray | Tensor
Hits: TypeAlias = list[tuple[str, float]]

# Rows of an index of signs whose sentences are embedded again, for every hit.
_RESCORED_PER_HIT = 4


@dataclass(frozen=True)
class Index:
    """What is searched: N sentences and their vectors. Never changed, but replaced by another."""

    sentences: Sequence[str]
    vectors: Vectors | FaissVectors

    def __repr__(self) -> str:
        return f"Index({len(self.sentences)} sentences, {self.vectors!r})"


class SimCSE:
    """A trained model and an index.

    Any number of threads may encode and search at a time, also while one adds to the index: they
    get what each would get alone.

    Args:
        model_name_or_path: A trained folder, or a name on the Hub; released checkpoints of the
            original project are read as they were trained. Or a `SimCSEModel`, as it is.
        device: By default the accelerator, else the CPU; of a `SimCSEModel` where it is.
        num_cells: Of a fast faiss index.
        num_cells_in_search: Those of them that are looked into.
        pooler: `cls`, `cls_before_pooler`, `avg`, `avg_top2` or `avg_first_last`, as the original
            names them; by default as the folder says.
        truncate_dim: Keep only the first dimensions of embeddings.
        max_seq_length: In tokens; by default as the folder says, else 128 at most.
        revision: Branch, tag or commit of a model on the Hub.
        token: The token that the Hub is asked with.
        options: More of `SimCSEModel.from_pretrained`: dtype, base_model, trust_remote_code, ...

    Attributes:
        name: What it was loaded by.
        model: The `SimCSEModel`, in evaluation mode.
        device: The device on which it computes.
        truncate_dim: Dimensions of embeddings that are kept.
        index: None, or what `build_index` made.

    Raises:
        InputError: No model there, no such pooler or device.
    """

    def __init__(
        self,
        model_name_or_path: str | Path | SimCSEModel,
        device: str | torch.device | None = None,
        num_cells: int = 100,
        num_cells_in_search: int = 10,
        pooler: str | None = None,
        *,
        truncate_dim: int | None = None,
        max_seq_length: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> None:
        given = {"max_seq_length": max_seq_length, "revision": revision, "token": token}
        if pooler is not None:
            options |= _read_pooler(pooler)
        options |= {name: value for name, value in given.items() if value is not None}
        if isinstance(model_name_or_path, SimCSEModel):
            self.model = _as_it_is(model_name_or_path, options).eval()
            self.name = str(getattr(self.model.config, "_name_or_path", "") or "SimCSEModel")
            device = self.model.device if device is None else device
        else:
            self.name = str(model_name_or_path)
            self.model = _load(self.name, options).eval()
        full = self.model.embedding_dimension
        if truncate_dim is not None and not 1 <= truncate_dim <= full:
            raise InputError(f"truncate_dim is {truncate_dim}; expected 1 to {full}.")
        self.truncate_dim = truncate_dim
        default = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.device = default if device is None else check_device(device)
        # A tokenizer keeps how it cuts texts, a model where it is: one block at a time.
        self._lock = threading.Lock()
        self.num_cells = num_cells
        self.num_cells_in_search = num_cells_in_search
        self.index: Index | None = None

    def __repr__(self) -> str:
        found = f"SimCSE({self.name!r}, device='{self.device}', D={self.embedding_dimension}"
        return found + (f", index of {len(self.index.sentences)})" if self.index else ")")

    @property
    def embedding_dimension(self) -> int:
        """D."""
        return self.truncate_dim or self.model.embedding_dimension

    def encode(
        self,
        sentence: str | Sequence[str],
        device: str | torch.device | None = None,
        return_numpy: bool = False,
        normalize_to_unit: bool = True,
        keepdim: bool = False,
        batch_size: int = 64,
        max_length: int | None = None,
        *,
        show_progress_bar: bool = False,
    ) -> Tensor | np.ndarray:
        """Embed sentences, in the order given.

        An empty text is embedded as its special tokens alone. A text over `max_length` tokens is
        cut to its beginning.

        Args:
            sentence: One text, or n: a list, tuple, array, Series or column of a data set.
            device: Where the model is moved, for this call and from now on; by default where it is.
            return_numpy: An array instead of a tensor.
            normalize_to_unit: Whether embeddings get the length 1.
            keepdim: [1, D] for one text too.
            batch_size: Sentences per forward pass, at most.
            max_length: In tokens, special ones included; by default as the folder says, and of
                plain backbones and the original's checkpoints 128.
            show_progress_bar: Whether to show a progress bar on stderr.

        Returns:
            [n, D], or [D] for one text, on the CPU; float32 (float64 of a float64 model).

        Raises:
            InputError: Something that is no text, or a length that the model cannot take.
        """
        texts = [sentence] if isinstance(sentence, str) else sentence
        check_sequence(texts)
        total = len(texts) if isinstance(texts, Sized) else None
        with bar(label="Encoding", total=total, show=show_progress_bar) as progress:
            blocks = self.encode_stream(
                texts,
                device=device,
                normalize_to_unit=normalize_to_unit,
                batch_size=batch_size,
                max_length=max_length,
                progress=progress,
            )
            found = self._join(blocks)
        found = found[0] if isinstance(sentence, str) and not keepdim else found
        return found.numpy() if return_numpy else found

    def encode_stream(
        self,
        sentences: Iterable[str],
        *,
        device: str | torch.device | None = None,
        normalize_to_unit: bool = True,
        batch_size: int = 64,
        max_length: int | None = None,
        shard: tuple[int, int] = (0, 1),
        progress: Any = False,
    ) -> Iterator[tuple[list[str], Tensor]]:
        """Embed sentences as they come, in bounded memory; other arguments are those of `encode`.

        Args:
            sentences: n texts, of which a block is read at a time.
            device: Where to compute, as for `encode`.
            normalize_to_unit: Whether embeddings get the length 1.
            batch_size: Sentences per forward pass, as for `encode`.
            max_length: In tokens, as for `encode`.
            shard: Which of how many processes this is, where they share the work: it embeds every
                so many-th block, the first by its own number. Numbers start at 0.
            progress: A bar, which is advanced by the sentences that are done.

        Yields:
            b texts and their embeddings [b, D], in order; b is 4096 but for the last block.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected 1 or more.")
        numbered = enumerate(sentences)
        rank, processes = shard
        while block := list(islice(numbered, _BLOCK_SENTENCES)):
            if block[0][0] // _BLOCK_SENTENCES % processes != rank:
                continue
            texts = [text for _, text in block]
            check_texts(texts, start=block[0][0])
            found = self._embed(texts, device, batch_size, max_length, progress)
            found = found[:, : self.truncate_dim]
            yield texts, normalize(found, dim=1) if normalize_to_unit else found

    def similarity(
        self, queries: Texts, keys: Texts, device: str | torch.device | None = None
    ) -> float | np.ndarray:
        """Compute the cosines of sentences, or of embeddings that are already there.

        Args:
            queries: N texts or embeddings [N, D]; or one text, or one embedding [D].
            keys: M texts or embeddings [M, D]; or one text, or one embedding [D].
            device: Where to compute, as for `encode`.

        Returns:
            An array [N, M]; [M] for one query; a float for one pair.

        Raises:
            InputError: Embeddings of different dimensions.
        """
        from sklearn.metrics.pairwise import cosine_similarity

        ours, theirs = (self._to_numpy(given, device) for given in (queries, keys))
        if ours.shape[-1] != theirs.shape[-1]:
            raise InputError(
                f"The queries have {ours.shape[-1]} dimensions and the keys {theirs.shape[-1]}; "
                "embed both by the same model."
            )
        found: np.ndarray = cosine_similarity(np.atleast_2d(ours), np.atleast_2d(theirs))
        if ours.ndim == 1:
            return float(found[0, 0]) if theirs.ndim == 1 else found[0]
        return found

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
            device: Where to compute, as for `encode`.
            batch_size: Sentences per forward pass, as for `encode`.
            storage: `float32`, `int8` or `binary`: see `vectors` for sizes and errors.
            show_progress_bar: Whether to show a progress bar on stderr.

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
        with bar(label="Indexing", total=len(sentences), show=show_progress_bar) as progress:
            blocks = self.encode_stream(
                sentences, device=device, batch_size=batch_size, progress=progress
            )
            packed = Vectors.join(Vectors.pack(found, storage) for _, found in blocks)
        faiss = ("cells" if faiss_fast else "flat") if use_faiss else None
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
        """Find the nearest sentences of the index.

        Args:
            queries: A text, or several.
            device: Where to compute, as for `encode`.
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
        several = [queries] if isinstance(queries, str) else queries
        check_sequence(several)
        vectors = self._embed_unit(several, device)
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
        """Sort the same rows [Q, k] by their exact cosines, falling."""
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

    def _join(self, blocks: Iterable[tuple[list[str], Tensor]]) -> Tensor:
        empty = torch.empty(0, self.embedding_dimension)
        return torch.cat([empty, *(embeddings for _, embeddings in blocks)])

    def _to_numpy(self, given: Texts, device: str | torch.device | None) -> np.ndarray:
        if isinstance(given, Tensor):
            return given.detach().cpu().numpy()
        if isinstance(given, np.ndarray) and given.dtype.kind not in "OU":
            return given
        return np.asarray(self.encode(given if isinstance(given, str) else list(given), device))

    def _embed(
        self,
        texts: list[str],
        device: str | torch.device | None,
        batch_size: int,
        max_length: int | None,
        progress: Any,
    ) -> Tensor:
        with self._lock:
            self.device = self.device if device is None else check_device(device)
            if self.model.device != torch.device(self.device):
                self.model.to(self.device)
            usual, tokenizer = self.model.max_seq_length, self.model.tokenizer
            try:
                if max_length is not None and tokenizer is not None:
                    self.model.max_seq_length = choose_max_length(
                        max_length, None, self.model.backbone, tokenizer
                    )
                return self.model.encode(texts, batch_size=batch_size, show_progress_bar=progress)
            finally:
                self.model.max_seq_length = usual


def _read_sentences(given: str | Path | Sequence[str]) -> list[str]:
    if not isinstance(given, str | Path):
        check_sequence(given)
    return list(read_texts(given) if isinstance(given, str | Path) else given)


def _load(name: str, options: dict[str, Any]) -> SimCSEModel:
    """Load a model, of a plain backbone with the original's length."""
    model = SimCSEModel.from_pretrained(name, **options)
    if "max_seq_length" not in options:
        hub = {key: options.get(key) for key in ("revision", "token")}
        said = {"pooling_mode", "projection_head"} <= {*options}
        layout = read_layout(resolve_model(name), assume_absent=said, **hub)
        if layout is None:
            model.max_seq_length = min(model.max_seq_length, _ORIGINAL_LENGTH)
    return model


def _as_it_is(model: SimCSEModel, options: dict[str, Any]) -> SimCSEModel:
    if options:
        raise InputError(
            f"{', '.join(options)} cannot be set for a SimCSEModel that is loaded. Pass its folder "
            "or name in place of it, or load it so with SimCSEModel.from_pretrained."
        )
    return model


def _read_pooler(pooler: str) -> dict[str, str]:
    if pooler not in _POOLERS:
        raise InputError(f"pooler is '{pooler}'; expected one of {', '.join(_POOLERS)}.")
    pooling_mode, head = _POOLERS[pooler]
    return {"pooling_mode": pooling_mode, "projection_head": head}
