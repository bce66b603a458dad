"""InfoNCE with in-batch negatives and hard negatives (Gao et al. 2021, equations 4 and 5).

Shapes: B anchors of this process, N rows of the whole batch (N = B in one process), C columns of
candidates (the positives, then each column of hard negatives), D the embedding size. Anchor i is
row `offset + i` of the whole batch; its positive is candidate [0, offset + i].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_logits(
    anchors: Tensor,
    candidates: Tensor,
    *,
    temperature: float,
    hard_negative_weight: float = 0.0,
    offset: int = 0,
) -> Tensor:
    """Compute the cosine of every anchor with every candidate, divided by the temperature.

    Args:
        anchors: [B, D], embeddings of the anchors.
        candidates: [C, N, D]: the positives, then each column of hard negatives.
        temperature: Divides the cosines (tau in the paper).
        hard_negative_weight: A logit, added to each anchor's *own* hard negatives, so that their
            share of the partition sum is multiplied by its exponential. This is the released
            code's form of the paper's weight alpha (appendix B): its logarithm.
        offset: Row of the first anchor in the whole batch.

    Returns:
        [B, C * N], the positives' columns first; at least float32, whatever the inputs.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        anchors, candidates = (F.normalize(upcast(x), dim=-1) for x in (anchors, candidates))
        logits = anchors @ candidates.flatten(0, 1).T / temperature
    if hard_negative_weight and len(candidates) > 1:
        own = _own_columns(len(anchors), candidates, offset)[:, 1:]
        weight = logits.new_full(own.shape, hard_negative_weight)
        logits = logits.scatter_add(1, own, weight)
    return logits


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
    anchors, positives = text_ids[0], text_ids[1]
    rows = torch.arange(len(anchors), device=text_ids.device)[offset:][:size]
    found = torch.cat(
        [
            false_negative_mask(
                anchors[rows], positives[rows], texts, None if c else anchors, others
            )
            for c, texts in enumerate(text_ids[1:])
        ],
        1,
    )
    found[rows - offset, rows] = False
    return found


def false_negative_mask(
    anchors: Tensor,
    positives: Tensor,
    candidates: Tensor,
    of_candidates: Tensor | None,
    others: Tensor | None = None,
) -> Tensor:
    """Apply the rule of `find_false_negatives` to text ids, as [T, W]; true of own positives too.

    Args:
        anchors: [T], text ids of the anchors.
        positives: [T], those of the anchors.
        candidates: [W], of one column.
        of_candidates: [W], the candidates' anchors if the column is that of the positives.
        others: [P, T], of further texts that are no negatives of the anchors.
    """
    own = anchors[:, None]
    found = (candidates == own) | (candidates == positives[:, None])
    for texts in () if others is None else others:
        found |= candidates == texts[:, None]
    return found if of_candidates is None else found | (of_candidates == own)


def info_nce(
    anchors: Tensor,
    candidates: Tensor,
    *,
    temperature: float,
    hard_negative_weight: float = 0.0,
    false_negatives: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Compute the contrastive loss: the anchors' mean cross-entropy with their positives.

    One direction only, anchors against candidates, as in the paper.

    Args:
        anchors: [B, D], embeddings of the anchors.
        candidates: [C, N, D], see `contrastive_logits`.
        temperature: What the cosines are divided by (tau in the paper).
        hard_negative_weight: A logit for each anchor's own hard negatives.
        false_negatives: Boolean [B, C * N] from `find_false_negatives`, or None to count all.
        offset: Row of the first anchor in the whole batch.

    Returns:
        A scalar.
    """
    logits = contrastive_logits(
        anchors,
        candidates,
        temperature=temperature,
        hard_negative_weight=hard_negative_weight,
        offset=offset,
    )
    if false_negatives is not None:
        logits = logits.masked_fill(false_negatives, -torch.inf)
    return F.cross_entropy(logits, _own_columns(len(anchors), candidates, offset)[:, 0])


def _own_columns(anchors: int, candidates: Tensor, offset: int) -> Tensor:
    """Return [B, C]: the columns of each anchor's own positive and own hard negatives."""
    columns, rows = candidates.shape[:2]
    own = torch.arange(offset, offset + anchors, device=candidates.device)
    return own[:, None] + rows * torch.arange(columns, device=candidates.device)


def upcast(x: Tensor) -> Tensor:
    """Convert to at least float32: half precision has 3 digits, fewer with every term of a sum.

    At temperature 0.05 three digits of a cosine are an error of 0.05 in a logit. float64 stays.
    """
    return x if x.dtype == torch.float64 else x.float()
