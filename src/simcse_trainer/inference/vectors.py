"""Embeddings kept for search, in one of three sizes, and the search itself: exact, in blocks.

| storage | bytes a row | a score is |
|---|---|---|
| float32 | 4 D | the cosine |
| int8 | D + 4 | the cosine to about 0.002: each row has 255 steps up to its largest value |
| binary | D / 8 + 4 | an estimate of it, from the signs alone; see `Vectors.rows` |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from simcse_trainer.errors import InputError

STORAGES = ("float32", "int8", "binary")

# Of scores and of unpacked rows at a time: 64 MiB each.
_BLOCK_VALUES = 2**24
_BLOCK_QUERIES = 1024
_INT8_STEPS = 127


@dataclass(frozen=True)
class Vectors:
    """N unit vectors of dimension D; adding to them makes new ones, so that readers go on.

    Attributes:
        storage: One of `STORAGES`.
        codes: [N, D] float32 or int8, or [N, D / 8 rounded up] uint8: the signs, eight a byte.
        scales: [N], what a row of int8 or signs is multiplied by; of float32 [0].
        dimension: D.
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
        """One behind the other; all of one storage and dimension."""
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

    def extended(self, embeddings: Tensor) -> Vectors:
        """These and more unit vectors [M, D] behind them."""
        return Vectors.join([self, Vectors.pack(embeddings, self.storage)])

    def rows(self, start: int, stop: int) -> Tensor:
        """Vectors [stop - start, D] in float32, whose products with a unit vector are the scores.

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
        """The rows with the largest products.

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
