"""The same search by faiss, where it is installed and asked for; the only importer of faiss."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from simcse_trainer.errors import InputError


class FaissVectors:
    """N unit vectors in a faiss index of inner products, on the CPU.

    Args:
        embeddings: [N, D].
        fast: Look only into the nearest `num_cells_in_search` of `num_cells` cells: approximate.
        num_cells: At most N.
        num_cells_in_search: At most `num_cells`.

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

    def extended(self, embeddings: Tensor) -> FaissVectors:
        """These and more unit vectors [M, D] behind them, in the cells that there are."""
        other = self._copy()
        other._index.add(embeddings.numpy())
        return other

    def search(self, queries: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """As `Vectors.search`; a row number of -1 where the cells held fewer than k rows."""
        scores, rows = self._index.search(queries.numpy(), min(top_k, len(self)))
        return torch.from_numpy(scores), torch.from_numpy(rows)

    def embeddings(self) -> Tensor:
        """All vectors [N, D]."""
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
