"""The value and gradient of `info_nce` without the [B, C * N] matrix of logits.

The partition sums are collected tile by tile (online softmax: Milakov & Gimelshein 2018), and
backward computes each tile again from the partition sums instead of keeping it (the tiled InfoNCE
of Cheng et al. 2024, "Breaking the memory barrier"). Memory grows with (B + C * N) * D.

Shapes: as in `info_nce`, and in a tile T anchors and W candidates of one column, at most
`tile_size` each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from simcse_trainer.objective.loss import false_negative_mask, upcast


def tiled_info_nce(
    anchors: Tensor,
    candidates: Tensor,
    *,
    temperature: float,
    hard_negative_weight: float = 0.0,
    text_ids: Tensor | None = None,
    others: Tensor | None = None,
    offset: int = 0,
    tile_size: int = 1024,
) -> Tensor:
    """Compute the loss of `info_nce`, in tiles; it cannot be differentiated twice.

    Args:
        anchors: [B, D], embeddings of the anchors.
        candidates: [C, N, D]: the positives, then each column of hard negatives.
        temperature: What the cosines are divided by (tau in the paper).
        hard_negative_weight: A logit for each anchor's own hard negatives.
        text_ids: [1 + C, N] as in `find_false_negatives`, whose rule is applied tile by tile, or
            None to count all candidates.
        others: [P, B], with `text_ids`: see there.
        offset: Row of the first anchor in the whole batch.
        tile_size: Anchors and candidates in a tile. It changes memory and speed, not the loss.

    Returns:
        A scalar, at least float32.

    Raises:
        ValueError: An anchor has no row among the candidates, or `tile_size` is below 1.
    """
    if not 0 <= offset <= offset + len(anchors) <= candidates.shape[1]:
        raise ValueError(
            f"expected every anchor's own row among the candidates, found {len(anchors)} anchors "
            f"from row {offset} on and {candidates.shape[1]} rows of candidates"
        )
    if tile_size < 1:
        raise ValueError(f"expected a tile_size of at least 1, found {tile_size}")
    options = _Options(temperature, hard_negative_weight, offset, tile_size)
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, candidates = (_unit_vectors(x, tile_size) for x in (anchors, candidates))
        losses: Tensor = _TiledLoss.apply(anchors, candidates, text_ids, others, options)
    return losses.mean()


def _unit_vectors(x: Tensor, tile_size: int) -> Tensor:
    """Scale [..., rows, D] to length 1, in at least float32, as `contrastive_logits` has them."""
    # In parts: the backward of normalize has temporaries of several times the size of its input.
    return torch.cat([F.normalize(part, dim=-1) for part in upcast(x).split(tile_size, -2)], -2)


class _Options(NamedTuple):
    temperature: float
    hard_negative_weight: float
    offset: int
    tile_size: int


class _Tile(NamedTuple):
    """Some anchors against some candidates of one column.

    Attributes:
        rows: Rows of the T anchors in the tile.
        column: One of the C columns of candidates.
        others: W rows of that column.
        diagonal: Where the anchors' own candidates stand: at (i, i + diagonal), if at all.
    """

    rows: slice
    column: int
    others: slice
    diagonal: int

    def own(self, matrix: Tensor) -> Tensor:
        """View the entries of a [T, W] matrix where an anchor meets its own candidate."""
        return matrix.diagonal(self.diagonal)


class _TiledLoss(torch.autograd.Function):
    """[B] losses of unit vectors: log of the partition sum minus the positive's logit."""

    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        text_ids: Tensor | None,
        others: Tensor | None,
        options: _Options,
    ) -> Tensor:
        partition = anchors.new_full((len(anchors),), -torch.inf)
        positives = torch.empty_like(partition)
        for tile in _tiles(len(anchors), candidates, options):
            logits = _logits(anchors, candidates, (text_ids, others), options, tile)
            rows = partition[tile.rows]
            torch.logaddexp(rows, logits.logsumexp(1), out=rows)
            if tile.column == 0:
                own = tile.own(logits)
                positives[tile.rows][max(0, -tile.diagonal) :][: len(own)] = own
        ctx.save_for_backward(anchors, candidates, text_ids, others, partition)
        ctx.options = options
        return partition - positives

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        anchors, candidates, text_ids, others, partition = ctx.saved_tensors
        grads = torch.zeros_like(anchors), torch.zeros_like(candidates)
        scale = grad / ctx.options.temperature
        # Backward may be called under an autocast that forward knew nothing of.
        with torch.autocast(anchors.device.type, enabled=False):
            for tile in _tiles(len(anchors), candidates, ctx.options):
                rows, column, place, _ = tile
                softmax = _logits(anchors, candidates, (text_ids, others), ctx.options, tile)
                softmax.sub_(partition[rows, None]).exp_()
                if column == 0:
                    tile.own(softmax).sub_(1)
                softmax.mul_(scale[rows, None])
                grads[0][rows].addmm_(softmax, candidates[column, place])
                grads[1][column, place].addmm_(softmax.T, anchors[rows])
        return *grads, None, None, None


def _tiles(anchors: int, candidates: Tensor, options: _Options) -> Iterator[_Tile]:
    columns, size = candidates.shape[:2]
    step = options.tile_size
    for i in range(0, anchors, step):
        # Past the last anchor of this process the text ids go on.
        rows = slice(i, min(i + step, anchors))
        for column in range(columns):
            for j in range(0, size, step):
                yield _Tile(rows, column, slice(j, j + step), options.offset + i - j)


def _logits(
    anchors: Tensor,
    candidates: Tensor,
    ids: tuple[Tensor | None, Tensor | None],
    options: _Options,
    tile: _Tile,
) -> Tensor:
    """Compute a tile [T, W] of `contrastive_logits`, minus infinity at false negatives."""
    logits = anchors[tile.rows] @ candidates[tile.column, tile.others].T
    logits.div_(options.temperature)
    if tile.column > 0:
        tile.own(logits).add_(options.hard_negative_weight)
    text_ids, others = ids
    if text_ids is not None:
        of_anchors = text_ids[:, options.offset :][:, tile.rows]
        others = None if others is None else others[:, tile.rows]
        logits.masked_fill_(_false_negatives(of_anchors, others, text_ids, tile), -torch.inf)
    return logits


def _false_negatives(
    of_anchors: Tensor, others: Tensor | None, text_ids: Tensor, tile: _Tile
) -> Tensor:
    """Compute a tile [T, W] of `find_false_negatives`."""
    found = false_negative_mask(
        of_anchors[0],
        of_anchors[1],
        text_ids[1 + tile.column, tile.others],
        text_ids[0, tile.others] if tile.column == 0 else None,
        others,
    )
    if tile.column == 0:
        tile.own(found).fill_(False)
    return found
