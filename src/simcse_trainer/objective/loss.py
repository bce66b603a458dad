"""InfoNCE with in-batch and hard negatives, and terms that ask for a space directly.

Sources: Gao et al. 2021, equations 4 and 5; those of the other terms stand with them.

Shapes: B anchors of this process, N rows of the whole batch (N = B in one process), C columns of
documents (the positives, then each column of hard negatives), D the embedding size. Anchor i is
row `offset + i` of the whole batch; its positive is document [0, offset + i].

**Tiles.** Of a large batch the partition sums are collected tile by tile (online softmax: Milakov &
Gimelshein 2018), and backward computes each tile again from the sums instead of keeping it (the
tiled InfoNCE of Cheng et al. 2024, "Breaking the memory barrier"). Memory then grows with
(B + C * N) * D.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simcse_trainer.objective.logits import Block, Embeddings, LogitRules, Texts, Tile, make_blocks

Groups = Sequence[Sequence[Block]]

# exp(-2 |x - y|^2) is exp(cos / 0.25 - 4) of unit vectors: the potential of a row is a partition
# sum of the direction query_to_query.
UNIFORMITY_TEMPERATURE = 0.25


def sum_partitions(groups: Groups, tile_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Compute the logs of the partition sums, and the logits of what rows have to find.

    Args:
        groups: G groups of blocks with the same rows; each group has a partition sum of its own.
        tile_size: Compute them in tiles of so many rows and entries: less memory, the same values.

    Returns:
        [G, B], and [B] own logits in the first column of the first block.

    Raises:
        ValueError: `tile_size` is below 1, or there is no block.
    """
    if tile_size is not None:
        return _sum_partitions_in_tiles(groups, tile_size)
    sums, own = [], None
    for group in groups:
        parts = []
        for block in group:
            for tile in block.tiles():
                parts.append(block.logits(tile))
                own = tile.own(parts[0]) if own is None else own
        sums.append(torch.cat(parts, 1).logsumexp(1))
    if own is None:
        raise ValueError("expected at least one direction")
    return torch.stack(sums), own


def _sum_partitions_in_tiles(groups: Groups, tile_size: int) -> tuple[Tensor, Tensor]:
    """Compute `sum_partitions` in tiles; the sums cannot be differentiated twice."""
    if tile_size < 1:
        raise ValueError(f"expected a tile_size of at least 1, found {tile_size}")
    vectors = [x for group in groups for block in group for x in (block.rows, block.columns)]
    sums: tuple[Tensor, Tensor] = _Sums.apply(groups, tile_size, *vectors)
    return sums


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, groups: Groups, tile_size: int, *vectors: Tensor
    ) -> tuple[Tensor, Tensor]:
        groups = _with_vectors(groups, vectors)
        first = groups[0][0]
        own = first.rows.new_empty(len(first.rows))
        partitions = own.new_full((len(groups), len(own)), -torch.inf)
        for number, block, tile in _walk(groups, tile_size):
            logits = block.logits(tile)
            sums = partitions[number, tile.rows]
            torch.logaddexp(sums, logits.logsumexp(1), out=sums)
            if block is first and tile.column == 0:
                found = tile.own(logits)
                own[tile.rows][max(0, -tile.diagonal) :][: len(found)] = found
        ctx.save_for_backward(*vectors, partitions)
        # The vectors are kept by autograd alone.
        ctx.groups = _with_vectors(groups, [own] * len(vectors))
        ctx.tile_size = tile_size
        return partitions, own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sums: Tensor, of_own: Tensor) -> tuple[Tensor | None, ...]:
        *vectors, partitions = ctx.saved_tensors
        groups = _with_vectors(ctx.groups, vectors)
        grads = [torch.zeros_like(x) for x in vectors]
        blocks = [block for group in groups for block in group]
        places = {id(block): 2 * i for i, block in enumerate(blocks)}
        # Backward may be called under an autocast that forward knew nothing of.
        with torch.autocast(of_own.device.type, enabled=False):
            for number, block, tile in _walk(groups, ctx.tile_size):
                rows, column, entries, _ = tile
                softmax = block.logits(tile).sub_(partitions[number, rows, None]).exp_()
                softmax.mul_(of_sums[number, rows, None])
                if block is blocks[0] and column == 0:
                    own = tile.own(softmax)
                    own.add_(of_own[rows][max(0, -tile.diagonal) :][: len(own)])
                softmax.div_(block.rules.temperature)
                place = places[id(block)]
                grads[place][rows].addmm_(softmax, block.columns[column, entries])
                grads[place + 1][column, entries].addmm_(softmax.T, block.rows[rows])
        return None, None, *grads


def _walk(groups: Groups, tile_size: int) -> Iterator[tuple[int, Block, Tile]]:
    for number, group in enumerate(groups):
        for block in group:
            for tile in block.tiles(tile_size):
                yield number, block, tile


def _with_vectors(groups: Groups, vectors: Sequence[Tensor]) -> list[list[Block]]:
    """Put vectors, rows and columns by turns, into the blocks."""
    given = iter(vectors)
    return [
        [replace(block, rows=next(given), columns=next(given)) for block in group]
        for group in groups
    ]


def contrastive_losses(blocks: Sequence[Block], *, joint: bool, tile_size: int | None) -> Tensor:
    """Compute the loss of each row: the log of its partition sum less its positive's logit.

    Args:
        blocks: Of query_to_doc first, then of other directions.
        joint: All directions have one partition sum; else each has its own, and the logs are
            averaged (doc_to_query beside query_to_doc: the symmetric loss).
        tile_size: Compute it in tiles of so many rows and entries: less memory, the same loss.

    Returns:
        [B].
    """
    groups = [blocks] if joint else [[block] for block in blocks]
    sums, own = sum_partitions(groups, tile_size)
    return sums.mean(0) - own


def info_nce(
    anchors: Tensor,
    documents: Tensor,
    *,
    temperature: float,
    hard_negative_weight: float = 0.0,
    text_ids: Tensor | None = None,
    others: Tensor | None = None,
    offset: int = 0,
    tile_size: int | None = None,
) -> Tensor:
    """Compute the contrastive loss: the anchors' mean cross-entropy with their positives.

    One direction only, anchors against documents, as in the paper.

    Args:
        anchors: [B, D], embeddings of the anchors.
        documents: [C, N, D]: the positives, then each column of hard negatives.
        temperature: What the cosines are divided by (tau in the paper).
        hard_negative_weight: A logit for each anchor's own hard negatives.
        text_ids: [1 + C, N]: see `find_false_negatives`; None to count all documents.
        others: [P, B]: see there.
        offset: Row of the first anchor in the whole batch.
        tile_size: Compute it in tiles of so many rows and documents: less memory, the same loss.

    Returns:
        A scalar, at least float32.
    """
    rules = LogitRules(temperature, hard_negative_weight)
    with torch.autocast(anchors.device.type, enabled=False):
        embeddings = Embeddings.of(anchors, documents, offset)
        texts = None if text_ids is None else Texts(text_ids, others)
        blocks = make_blocks(embeddings, ("query_to_doc",), rules, offset=offset, texts=texts)
        return contrastive_losses(blocks, joint=True, tile_size=tile_size).mean()


def contrastive_logits(
    anchors: Tensor,
    documents: Tensor,
    *,
    temperature: float,
    hard_negative_weight: float = 0.0,
    offset: int = 0,
) -> Tensor:
    """Compute the cosine of every anchor with every document, divided by the temperature.

    Args:
        anchors: [B, D], embeddings of the anchors.
        documents: [C, N, D]: the positives, then each column of hard negatives.
        temperature: What the cosines are divided by (tau in the paper).
        hard_negative_weight: A logit for each anchor's own hard negatives.
        offset: Row of the first anchor in the whole batch.

    Returns:
        [B, C * N], the positives' columns first; at least float32, whatever the inputs.
    """
    rules = LogitRules(temperature, hard_negative_weight)
    with torch.autocast(anchors.device.type, enabled=False):
        embeddings = Embeddings.of(anchors, documents, offset)
        (block,) = make_blocks(embeddings, ("query_to_doc",), rules, offset=offset)
        return torch.cat([block.logits(tile) for tile in block.tiles()], 1)


def find_false_negatives(
    text_ids: Tensor, others: Tensor | None = None, *, offset: int = 0, size: int | None = None
) -> Tensor:
    """Find candidates that are no negatives, because the data says that they belong together.

    A candidate is no negative of anchor i if its text is that of anchor i or of its positive, or
    if it is the positive of another row with the same anchor text. The hard negatives of such
    another row stay negatives, and an anchor's own positive is never marked. Where a row has more
    texts that belong to its anchor, such as positives that were not drawn, those are none either.

    Args:
        text_ids: [1 + C, N], one integer per text of the whole batch, anchors first: equal texts,
            equal integers.
        others: [P, B], ids of further texts that are no negatives of this process's anchors.
        offset: Row of the first anchor of this process.
        size: Number B of anchors of this process; by default all from `offset` on.

    Returns:
        Boolean [B, C * N], True where the logit is to be left out.
    """
    columns, rows = text_ids[1:].shape
    # Vectors of no size: all their cosines are 0.
    anchors = torch.empty(rows, 0, device=text_ids.device)[offset:][:size]
    documents = torch.empty(columns, rows, 0, device=text_ids.device)
    block = Block(
        "query_to_doc", anchors, documents, offset, LogitRules(1.0), Texts(text_ids, others)
    )
    return torch.cat([block.logits(tile).isinf() for tile in block.tiles()], 1)


def alignment_loss(anchors: Tensor, positives: Tensor) -> Tensor:
    """Compute the mean squared distance of an anchor and its positive (Wang and Isola 2020).

    Args:
        anchors: [B, D], unit vectors of the anchors.
        positives: [B, D], unit vectors of their positives.
    """
    return (anchors - positives).square().sum(-1).mean()


def uniformity_loss(sums: Tensor) -> Tensor:
    """Compute the log of the mean Gaussian potential of all pairs (Wang and Isola 2020, t = 2).

    Args:
        sums: [N], the logs of the partition sums at `UNIFORMITY_TEMPERATURE` of the rows of all
            processes.
    """
    count = len(sums)
    if count < 2:
        return sums.sum() * 0.0
    return sums.logsumexp(0) - 1 / UNIFORMITY_TEMPERATURE - math.log(count * (count - 1))


def orthogonality_losses(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the two terms of the global orthogonal regularisation (Zhang et al. 2017, eq. 5).

    Of vectors that are spread evenly over the sphere the mean cosine of two is 0, and the mean of
    its square 1/D. Both means follow from the sum of the vectors and from their second moments, so
    that no matrix of all pairs is made.

    Args:
        vectors: [N, D], of one column of texts.

    Returns:
        The square of the mean cosine of two different rows, and what the mean of its square has
        more than 1/D.
    """
    count, size = vectors.shape
    pairs = max(count * (count - 1), 1)
    own = vectors.square().sum(-1)
    mean = (vectors.sum(0).square().sum() - own.sum()) / pairs
    square = ((vectors.T @ vectors).square().sum() - own.square().sum()) / pairs
    return mean.square(), torch.relu(square - 1.0 / size)
