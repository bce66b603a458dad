"""The contrastive objective of one step, however many processes and rows it has.

The documents of all processes are gathered with gradient:

    rows = ShardSizes.exchange(len(anchors), anchors.device)
    documents = gather_columns(documents, rows)
    loss = info_nce(anchors, documents, temperature=0.05, offset=rows.offset)
    (loss * rows.loss_scale).backward()

Shapes: B rows of this process (it may differ between processes), N rows of all processes.

**Scaling.** Each process's loss is the mean over its own B_r anchors. DistributedDataParallel
averages the gradients of the W processes, so that the loss of process r must be multiplied by
B_r * W / N (`ShardSizes.loss_scale`): 1/W * sum_r (B_r * W / N) * mean_r = 1/N * sum over all
anchors, exactly the loss of one process with the whole batch. With equal sizes the factor is 1. Its
gradient reaches the candidates of other processes through `gather_with_grad`, whose backward sums
over the processes what each of them found for a row. A term of all rows, which every process
computes alike, has no such factor: its gradient reaches the gathered rows once from each of the W
processes, and is divided by W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from simcse_trainer.errors import check_bounds
from simcse_trainer.objective.logits import DIRECTIONS, Embeddings, LogitRules, Texts, make_blocks
from simcse_trainer.objective.loss import (
    UNIFORMITY_TEMPERATURE,
    alignment_loss,
    contrastive_losses,
    orthogonality_losses,
    sum_partitions,
    uniformity_loss,
)

# Elements of the logit matrix above which it is computed in tiles: 16 MiB a copy in float32, of
# which the plain form holds several.
LARGEST_MATRIX = 2**22
TILE_SIZE = 1024


@dataclass(frozen=True)
class ContrastiveObjective:
    """What a step minimises: a sum of terms over local rows and the candidates of all processes.

    Attributes:
        rules: What the logits are made of.
        contrastive_directions: Some of `DIRECTIONS`, query_to_doc among them.
        contrastive_partition: `joint`: all directions have one partition sum; `per_direction`: each
            its own (see `contrastive_losses`).
        mask_duplicate_negatives: Leave out what `find_false_negatives` finds.
        gather_across_devices: Count the candidates of all processes, not only one's own.
        matryoshka_dims: Sizes to which embeddings are cut (Kusupati et al. 2022, equation 1); none:
            whole embeddings.
        matryoshka_weights: The weight of each; none: 1 each.
        contrastive_weight: Of the contrastive loss.
        alignment_weight: The weight of `alignment_loss`, 0 without it.
        uniformity_weight: Of `uniformity_loss` of the anchors.
        orthogonality_weights: Of the two `orthogonality_losses`, means over the columns of texts.
    """

    rules: LogitRules = field(default_factory=LogitRules)
    contrastive_directions: Sequence[str] = ("query_to_doc",)
    contrastive_partition: str = "joint"
    mask_duplicate_negatives: bool = True
    gather_across_devices: bool = True
    matryoshka_dims: Sequence[int] = ()
    matryoshka_weights: Sequence[float] = ()
    contrastive_weight: float = 1.0
    alignment_weight: float = 0.0
    uniformity_weight: float = 0.0
    orthogonality_weights: Sequence[float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            InputError: One is out of its range.
        """
        check_bounds(self, objective_bounds(self))

    def __call__(self, views: Tensor, text_ids: Tensor, guide: Tensor | None = None) -> Tensor:
        """Compute the loss of this process.

        Its average over the processes, which is what DDP and FSDP take of the gradients, is the
        mean over all anchors of the whole batch, also where processes have unequal batches.

        Args:
            views: [V, B, D]: anchors, positives, then each column of hard negatives.
            text_ids: [V + P, B], equal texts, equal integers; P further texts of each row belong
                to its anchor, such as its positives that were not drawn, and are no negatives.
            guide: [V, B, G], another model's embeddings of the same texts; by default the model
                is its own guide.

        Returns:
            A scalar.
        """
        with torch.autocast(views.device.type, enabled=False):
            step = self._gather(views, text_ids, guide)
            losses = [
                weight * term
                for size, weight in self._sizes(views.shape[-1])
                for term in self._terms(step, step.embeddings(size))
            ]
        return torch.stack(losses).sum()

    def _sizes(self, whole: int) -> Iterable[tuple[int, float]]:
        dims = self.matryoshka_dims or [whole]
        return zip(dims, self.matryoshka_weights or [1.0] * len(dims), strict=True)

    def _terms(self, step: _Step, embeddings: Embeddings) -> Iterator[Tensor]:
        """Compute each term, such that the processes' average is that of the whole batch."""
        rows = step.rows
        if self.contrastive_weight:
            blocks = make_blocks(
                embeddings,
                sorted(self.contrastive_directions, key=DIRECTIONS.index),
                self.rules,
                offset=rows.offset,
                texts=step.texts,
                guide=step.guide,
            )
            joint = self.contrastive_partition == "joint"
            losses = contrastive_losses(blocks, joint=joint, tile_size=step.tile_size)
            yield self.contrastive_weight * losses.mean() * rows.loss_scale
        if self.alignment_weight:
            loss = alignment_loss(embeddings.anchors, embeddings.positives)
            yield self.alignment_weight * loss * rows.loss_scale
        # From here on of all rows, and the same in every process.
        if self.uniformity_weight:
            rules = LogitRules(UNIFORMITY_TEMPERATURE)
            blocks = make_blocks(embeddings, ("query_to_query",), rules, offset=rows.offset)
            (sums,), _ = sum_partitions([blocks], step.tile_size)
            yield self.uniformity_weight * uniformity_loss(gather_with_grad(sums, rows))
        if any(self.orthogonality_weights):
            columns = [*embeddings.everyone(), *embeddings.documents]
            of_columns = zip(*map(orthogonality_losses, columns), strict=True)
            for weight, terms in zip(self.orthogonality_weights, of_columns, strict=True):
                yield weight * torch.stack(terms).mean()

    def _gather(self, views: Tensor, text_ids: Tensor, guide: Tensor | None) -> _Step:
        """Bring together what the terms need of all processes."""
        size = views.shape[1]
        rows = ShardSizes((size,))
        if self.gather_across_devices:
            rows = ShardSizes.exchange(size, views.device)
        needs_anchors = (
            any(direction.endswith("query") for direction in self.contrastive_directions)
            or self.uniformity_weight
            or any(self.orthogonality_weights)
        )
        first = 0 if needs_anchors else 1
        gathered = gather_columns(views[first:], rows)
        texts = guided = None
        if self.mask_duplicate_negatives:
            ids, others = text_ids[: len(views)], text_ids[len(views) :]
            texts = Texts(gather_columns(ids, rows), others)
        if self.rules.false_negative_margin is not None:
            own = views.detach() if guide is None else guide
            columns = gathered.detach() if guide is None else gather_columns(guide[first:], rows)
            guided = Embeddings.of(own[0], columns, rows.offset, with_anchors=not first)
        elements = size * (len(views) - 1) * rows.total * len(self.contrastive_directions)
        tile_size = TILE_SIZE if elements > LARGEST_MATRIX else None
        return _Step(rows, views[0], gathered, not first, texts, guided, tile_size)


def objective_bounds(options: Any) -> dict[str, tuple[bool, str]]:
    """Return which attributes of `ContrastiveObjective`, or options of their names, hold."""
    directions, dims = {*options.contrastive_directions}, options.matryoshka_dims
    weights, partition = options.matryoshka_weights, options.contrastive_partition
    of_space = options.orthogonality_weights
    return {
        "contrastive_directions": (
            "query_to_doc" in directions
            and len(directions) == len(options.contrastive_directions)
            and directions <= {*DIRECTIONS},
            f"query_to_doc, and others of {', '.join(DIRECTIONS)}, each once",
        ),
        "contrastive_partition": (
            partition == "joint"
            or (partition == "per_direction" and directions <= {*DIRECTIONS[:2]}),
            f"joint, or per_direction with {' and '.join(DIRECTIONS[:2])} alone: in others there "
            "is nothing to find",
        ),
        "matryoshka_dims": (
            all(dim > 0 for dim in dims) and len({*dims}) == len(dims),
            "different numbers from 1",
        ),
        "matryoshka_weights": (
            not weights or (len(weights) == len(dims) and min(weights) > 0),
            "as many numbers above 0 as there are matryoshka_dims",
        ),
        "alignment_weight": (options.alignment_weight >= 0, "0 or more"),
        "uniformity_weight": (options.uniformity_weight >= 0, "0 or more"),
        "orthogonality_weights": (
            len(of_space) == 2 and min(of_space) >= 0,
            "two numbers, each 0 or more",
        ),
    }


@dataclass(frozen=True)
class _Step:
    """What the terms of a step are computed of.

    Attributes:
        rows: How the rows are spread over the processes.
        anchors: [B, D], of this process.
        gathered: [1 + C or C, N, D], of all processes: all anchors, if they are needed, and the
            documents.
        with_anchors: Whether all anchors are there.
        texts: Which texts are equal; None to count all.
        guide: Unit vectors by the guide, or None.
        tile_size: None where whole matrices are small enough.
    """

    rows: ShardSizes
    anchors: Tensor
    gathered: Tensor
    with_anchors: bool
    texts: Texts | None
    guide: Embeddings | None
    tile_size: int | None

    def embeddings(self, size: int) -> Embeddings:
        """Return unit vectors of the first dimensions."""
        return Embeddings.of(
            self.anchors[:, :size],
            self.gathered[..., :size],
            self.rows.offset,
            with_anchors=self.with_anchors,
        )


def gather_columns(columns: Tensor, rows: ShardSizes) -> Tensor:
    """Gather [C, B, ...] of each process to [C, N, ...] of all, in one collective."""
    return gather_with_grad(columns.transpose(0, 1), rows).transpose(0, 1)


# torch 2.13 renames the collective, and warns of the old name.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class ShardSizes:
    """How the rows of the whole batch are spread over the processes, in rank order.

    Attributes:
        sizes: Number of rows of each process.
        rank: The number of this process.
    """

    sizes: tuple[int, ...]
    rank: int = 0

    @classmethod
    def exchange(cls, size: int, device: torch.device | str) -> ShardSizes:
        """Tell all processes this one's number of rows: one collective of one integer each.

        Args:
            size: Number B of rows of this process.
            device: Where the process group communicates (with nccl: this process's GPU).

        Returns:
            The sizes of all processes; only this one's without torch.distributed.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls((size,))
        own = torch.tensor([size], device=device)
        sizes = own.new_empty(dist.get_world_size())
        _all_gather(sizes, own)
        return cls(tuple(sizes.tolist()), dist.get_rank())

    @property
    def size(self) -> int:
        """B: number of rows of this process."""
        return self.sizes[self.rank]

    @property
    def offset(self) -> int:
        """Place of this process's first row in the whole batch."""
        return sum(self.sizes[: self.rank])

    @property
    def total(self) -> int:
        """N: number of rows of all processes."""
        return sum(self.sizes)

    @property
    def loss_scale(self) -> float:
        """B_r * world / N: the factor of this process's mean loss, see the module's text."""
        return self.size * len(self.sizes) / self.total


def gather_with_grad(x: Tensor, rows: ShardSizes | None = None) -> Tensor:
    """Gather the rows of all processes in rank order.

    All processes must call it, and where one of them asks for a gradient all must: backward is a
    collective too. A process without rows takes part like any other; the mean loss of its no
    anchors is nan, the gradient zero.

    Args:
        x: [B, ...] of this process, of any type; the other dimensions are equal everywhere.
        rows: The sizes, from `ShardSizes.exchange`; exchanged here if None. Pass them to gather
            several tensors of the same B.

    Returns:
        [N, ...]; `x` itself where there is one process. Its gradient is summed over the processes,
        and each gets its own rows of the sum.

    Raises:
        ValueError: `rows` was exchanged for another number of rows.
    """
    rows = rows or ShardSizes.exchange(len(x), x.device)
    if len(x) != rows.size:
        raise ValueError(f"expected the {rows.size} rows of {rows}, found {len(x)}")
    return x if len(rows.sizes) == 1 else _Gather.apply(x, rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: ShardSizes) -> Tensor:
        ctx.rows = rows
        world, largest = len(rows.sizes), max(rows.sizes)
        if rows.size < largest:
            # gloo gathers equal sizes only.
            x = torch.cat([x, x.new_zeros(largest - rows.size, *x.shape[1:])])
        gathered = x.new_empty(world * largest, *x.shape[1:])
        _all_gather(gathered, x.contiguous())
        if rows.total == len(gathered):
            return gathered
        parts = zip(gathered.split(largest), rows.sizes, strict=True)
        return torch.cat([part[:size] for part, size in parts])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A copy: autograd may hand the same gradient to others, and all_reduce writes into it.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad[ctx.rows.offset :][: ctx.rows.size], None
