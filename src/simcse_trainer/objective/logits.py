"""The logits of a step: which embeddings meet, and what changes a logit besides their cosine.

Shapes: B rows of this process, N rows of all processes (N = B in one), C columns of documents (the
positives, then each column of hard negatives), D the embedding size, P further texts of a row; in a
tile T rows and W entries of one column. Row i of this process is row `offset + i` of all.

A direction is a matrix of rows against columns. The names are those of sentence-transformers:

    query_to_doc     anchors against all documents; its own positive is what an anchor has to find
    doc_to_query     positives against all anchors, their own among them
    query_to_query   anchors against the anchors of other rows
    doc_to_doc       positives against all documents of other rows
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from simcse_trainer.errors import check_bounds

DIRECTIONS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
PARTITIONS = ("joint", "per_direction")
HARDNESS_MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")
MARGIN_TYPES = ("absolute", "relative")


@dataclass(frozen=True)
class LogitRules:
    """What logits are made of, besides the embeddings.

    Attributes:
        temperature: What the cosines are divided by (tau in the paper).
        hard_negative_weight: A logit, added to each anchor's *own* hard negatives, so that their
            share of the partition sum is multiplied by its exponential. This is the released
            code's form of the paper's weight alpha (appendix B): its logarithm.
        hardness_strength: Times its cosine, without a gradient, is added to the logit of a negative
            of query_to_doc: the nearer, the more it counts (Lan et al. 2025, equation 5).
        hardness_mode: Of which negatives: `in_batch_negatives`, those of other rows;
            `hard_negatives`, a row's own; `all_negatives`.
        false_negative_margin: A candidate that the guide, another model or this one, finds nearer
            than the positive less this is no negative (Solatorio 2024); None to count it.
        false_negative_margin_type: Whether the margin is a cosine (`absolute`) or a share of the
            positive's (`relative`).
    """

    temperature: float = 0.05
    hard_negative_weight: float = 0.0
    hardness_strength: float = 0.0
    hardness_mode: str = "all_negatives"
    false_negative_margin: float | None = None
    false_negative_margin_type: str = "absolute"

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: One is out of its range.
        """
        check_bounds(self, rule_bounds(self))


def rule_bounds(options: Any) -> dict[str, tuple[bool, str]]:
    """Return which attributes of `LogitRules`, or options of their names, hold, and what would."""
    margin = options.false_negative_margin
    return {
        "temperature": (options.temperature > 0, "more than 0"),
        "hardness_strength": (options.hardness_strength >= 0, "0 or more"),
        "hardness_mode": (
            options.hardness_mode in HARDNESS_MODES,
            f"one of {', '.join(HARDNESS_MODES)}",
        ),
        "false_negative_margin": (margin is None or margin >= 0, "0 or more"),
        "false_negative_margin_type": (
            options.false_negative_margin_type in MARGIN_TYPES,
            f"one of {', '.join(MARGIN_TYPES)}",
        ),
    }


class Embeddings(NamedTuple):
    """Unit vectors of a step.

    Attributes:
        anchors: [B, D], of this process.
        positives: [B, D], of this process.
        all_anchors: [1, N, D], None where no direction needs them.
        documents: [C, N, D], positives and hard negatives of all processes.
    """

    anchors: Tensor
    positives: Tensor
    all_anchors: Tensor | None
    documents: Tensor

    @classmethod
    def of(
        cls, anchors: Tensor, columns: Tensor, offset: int, *, with_anchors: bool = False
    ) -> Embeddings:
        """Scale embeddings to length 1, in at least float32.

        Args:
            anchors: [B, D], of this process.
            columns: [C, N, D], the documents of all; or [1 + C, N, D], with all anchors first.
            offset: Row of this process's first anchor in all rows.
            with_anchors: The first column is that of the anchors.
        """
        columns = unit_vectors(columns)
        everyone, documents = (columns[:1], columns[1:]) if with_anchors else (None, columns)
        positives = documents[0, offset : offset + len(anchors)]
        return cls(unit_vectors(anchors), positives, everyone, documents)

    def everyone(self) -> Tensor:
        """Return all anchors, [1, N, D]."""
        if self.all_anchors is None:
            raise ValueError("expected the anchors of all processes, which were not gathered")
        return self.all_anchors

    def of_direction(self, direction: str) -> tuple[Tensor, Tensor]:
        """Return the rows [B, D] and the columns [C, N, D] that meet in a direction."""
        start, end = direction.split("_to_")
        columns = self.documents if end == "doc" else self.everyone()
        return (self.anchors if start == "query" else self.positives), columns


class Texts(NamedTuple):
    """Which texts are equal, as integers that are.

    Attributes:
        ids: [1 + C, N] of all processes, anchors first.
        others: [P, B] of further texts that are no negatives of this process's rows, or None.
    """

    ids: Tensor
    others: Tensor | None = None


class Tile(NamedTuple):
    """Some rows against some entries of one column.

    Attributes:
        rows: The T rows that the tile holds.
        column: One of the C columns.
        entries: The W entries of that column.
        diagonal: Where a row meets its own entry: at (i, i + diagonal), if at all.
    """

    rows: slice
    column: int
    entries: slice
    diagonal: int

    def own(self, matrix: Tensor) -> Tensor:
        """View the entries of a [T, W] matrix where a row meets its own."""
        return matrix.diagonal(self.diagonal)


@dataclass(frozen=True)
class Block:
    """The logits of one direction.

    Attributes:
        direction: Which of `DIRECTIONS` it is.
        rows: [B, D], unit vectors.
        columns: [C, N, D], unit vectors; C is 1 where they are anchors.
        offset: Row of the first in all rows.
        rules: What logits are made of.
        texts: What texts are equal; None to count all.
        guide: The guide's rows and columns of this direction, and [B], the least cosine from which
            on a candidate is no negative.
    """

    direction: str
    rows: Tensor
    columns: Tensor
    offset: int
    rules: LogitRules
    texts: Texts | None = None
    guide: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def has_positives(self) -> bool:
        """A row's own entry of the first column is what it has to find."""
        return self.direction in ("query_to_doc", "doc_to_query")

    def tiles(self, size: int | None = None) -> Iterator[Tile]:
        """Cut the matrix into tiles of at most `size` rows and entries; None: whole columns."""
        rows, entries = len(self.rows), self.columns.shape[1]
        # A process without rows takes part, too.
        for i in range(0, max(1, rows), size or max(1, rows)):
            part = slice(i, min(i + (size or rows), rows))
            for column in range(len(self.columns)):
                for j in range(0, entries, size or entries):
                    end = min(j + (size or entries), entries)
                    yield Tile(part, column, slice(j, end), self.offset + i - j)

    def logits(self, tile: Tile) -> Tensor:
        """Compute a tile [T, W], minus infinity where there is no negative."""
        cosines = self.rows[tile.rows] @ self.columns[tile.column, tile.entries].T
        logits = cosines / self.rules.temperature
        bias = self._bias(cosines.detach(), tile)
        if bias is not None:
            logits = logits + bias
        left_out = self._left_out(cosines, tile)
        return logits if left_out is None else logits.masked_fill(left_out, -torch.inf)

    def _bias(self, cosines: Tensor, tile: Tile) -> Tensor | None:
        """Compute what is added to the logits, of query_to_doc alone; it has no gradient."""
        rules, hard = self.rules, tile.column > 0
        if self.direction != "query_to_doc":
            return None
        weight = rules.hard_negative_weight if hard else 0.0
        if not rules.hardness_strength:
            if not weight or not tile.own(cosines).numel():
                return None
            bias = torch.zeros_like(cosines)
            tile.own(bias).fill_(weight)
            return bias
        bias = rules.hardness_strength * cosines
        own = tile.own(bias).clone()
        if rules.hardness_mode == "hard_negatives":
            bias.zero_()
        counts = hard and rules.hardness_mode != "in_batch_negatives"
        tile.own(bias).copy_(own + weight if counts else torch.full_like(own, weight))
        return bias

    def _left_out(self, cosines: Tensor, tile: Tile) -> Tensor | None:
        """Find what is no negative, [T, W]; an own positive is never left out."""
        found = None
        if self.texts is not None:
            found = self._equal_texts(self.texts, tile)
        if self.guide is not None:
            rows, columns, threshold = self.guide
            near = rows[tile.rows] @ columns[tile.column, tile.entries].T
            near = near > threshold[tile.rows, None]
            found = near if found is None else found | near
        own_counts = self.has_positives and tile.column == 0
        if found is None:
            if self.has_positives or not tile.own(cosines).numel():
                return None
            found = torch.zeros_like(cosines, dtype=torch.bool)
        if own_counts:
            tile.own(found).fill_(False)
        elif not self.has_positives:
            tile.own(found).fill_(True)
        return found

    def _equal_texts(self, texts: Texts, tile: Tile) -> Tensor:
        ids = texts.ids
        anchors, positives = ids[:2, self.offset :][:, tile.rows]
        others = None if texts.others is None else texts.others[:, tile.rows]
        if self.direction.endswith("query"):
            # Whose anchor is one of a row's texts, or whose positive is that row's.
            return false_negative_mask(
                positives, anchors, ids[0, tile.entries], ids[1, tile.entries], others
            )
        return false_negative_mask(
            anchors,
            positives,
            ids[1 + tile.column, tile.entries],
            None if tile.column else ids[0, tile.entries],
            others,
        )


def make_blocks(
    embeddings: Embeddings,
    directions: Sequence[str],
    rules: LogitRules,
    *,
    offset: int = 0,
    texts: Texts | None = None,
    guide: Embeddings | None = None,
) -> list[Block]:
    """Make the logits of some directions.

    Args:
        embeddings: The unit vectors of the model in training.
        directions: Those of `DIRECTIONS` that are compared.
        rules: What logits are made of.
        offset: Row of this process's first anchor in all rows.
        texts: What texts are equal; None to count all candidates.
        guide: The same texts' unit vectors by the guide, of any size, without a gradient.

    Raises:
        ValueError: An anchor has no row among the documents.
    """
    count, entries = len(embeddings.anchors), embeddings.documents.shape[1]
    if not 0 <= offset <= offset + count <= entries:
        raise ValueError(
            f"expected every anchor's own row among the documents, found {count} anchors from row "
            f"{offset} on and {entries} rows of documents"
        )
    blocks = []
    threshold = None if guide is None else _find_threshold(guide, rules)
    for direction in directions:
        rows, columns = embeddings.of_direction(direction)
        guided = None
        if guide is not None and threshold is not None:
            guided = (*guide.of_direction(direction), threshold)
        blocks.append(Block(direction, rows, columns, offset, rules, texts, guided))
    return blocks


def _find_threshold(guide: Embeddings, rules: LogitRules) -> Tensor:
    positive = (guide.anchors * guide.positives).sum(-1)
    scale = positive.abs() if rules.false_negative_margin_type == "relative" else 1.0
    return positive - (rules.false_negative_margin or 0.0) * scale


def false_negative_mask(
    anchors: Tensor,
    positives: Tensor,
    candidates: Tensor,
    of_candidates: Tensor | None,
    others: Tensor | None = None,
) -> Tensor:
    """Find candidates that belong to an anchor by their texts, as [T, W]; own positives too.

    Those are candidates with the text of the anchor, of its positive or of another text of its
    row, and those whose own anchor has the anchor's text.

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


def unit_vectors(x: Tensor, *, part: int = 1024) -> Tensor:
    """Scale [..., rows, D] to length 1, in at least float32, so many rows at a time.

    In parts, because the backward of normalize has temporaries of several times its input's size.
    """
    x = upcast(x)
    if x.shape[-2] <= part:
        return F.normalize(x, dim=-1)
    return torch.cat([F.normalize(rows, dim=-1) for rows in x.split(part, -2)], -2)


def upcast(x: Tensor) -> Tensor:
    """Convert to at least float32: half precision has 3 digits, fewer with every term of a sum.

    At temperature 0.05 three digits of a cosine are an error of 0.05 in a logit. float64 stays.
    """
    return x if x.dtype == torch.float64 else x.float()
