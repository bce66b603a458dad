"""The contrastive objective of one step, however many processes and rows it has.

The candidates of all processes are gathered with gradient:

    rows = ShardSizes.exchange(len(anchors), anchors.device)
    # [C, B, D] of this process -> [C, N, D] of all, in one collective
    candidates = gather_with_grad(candidates.transpose(0, 1), rows).transpose(0, 1)
    loss = info_nce(anchors, candidates, temperature=0.05, offset=rows.offset)
    (loss * rows.loss_scale).backward()

Shapes: B rows of this process (it may differ between processes), N rows of all processes.

**Scaling.** Each process's loss is the mean over its own B_r anchors. DistributedDataParallel
averages the gradients of the W processes, so that the loss of process r must be multiplied by
B_r * W / N (`ShardSizes.loss_scale`): 1/W * sum_r (B_r * W / N) * mean_r = 1/N * sum over all
anchors, exactly the loss of one process with the whole batch. With equal sizes the factor is 1. Its
gradient reaches the candidates of other processes through `gather_with_grad`, whose backward sums
over the processes what each of them found for a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from simcse_trainer.objective.loss import find_false_negatives, info_nce
from simcse_trainer.objective.tiled import tiled_info_nce

# Elements of the logit matrix above which it is computed in tiles: 16 MiB a copy in float32, of
# which the plain form holds several.
LARGEST_MATRIX = 2**22


@dataclass(frozen=True)
class ContrastiveObjective:
    """InfoNCE of local anchors against the candidates of all processes.

    Attributes:
        temperature: What the cosines are divided by (tau in the paper).
        hard_negative_weight: A logit for each anchor's own hard negatives.
        mask_duplicate_negatives: Leave out what `find_false_negatives` finds.
        gather_across_devices: Count the candidates of all processes, not only one's own.
    """

    temperature: float = 0.05
    hard_negative_weight: float = 0.0
    mask_duplicate_negatives: bool = True
    gather_across_devices: bool = True

    def __call__(self, views: Tensor, text_ids: Tensor) -> Tensor:
        """Compute the loss of this process.

        Its average over the processes, which is what DDP and FSDP take of the gradients, is the
        mean over all anchors of the whole batch, also where processes have unequal batches.

        Args:
            views: [V, B, D]: anchors, positives, then each column of hard negatives.
            text_ids: [V + P, B], equal texts, equal integers; P further texts of each row belong
                to its anchor, such as its positives that were not drawn, and are no negatives.

        Returns:
            A scalar.
        """
        size = views.shape[1]
        rows = ShardSizes((size,))
        if self.gather_across_devices:
            rows = ShardSizes.exchange(size, views.device)
        candidates = gather_with_grad(views[1:].transpose(0, 1), rows).transpose(0, 1)
        text_ids, others = text_ids[: len(views)], text_ids[len(views) :]
        ids = gather_with_grad(text_ids.T, rows).T if self.mask_duplicate_negatives else None
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "hard_negative_weight": self.hard_negative_weight,
            "offset": rows.offset,
        }
        if size * candidates.shape[0] * candidates.shape[1] > LARGEST_MATRIX:
            options |= {"text_ids": ids, "others": others}
            return tiled_info_nce(views[0], candidates, **options) * rows.loss_scale
        masked = None
        if ids is not None:
            masked = find_false_negatives(ids, others, offset=rows.offset, size=size)
        return info_nce(views[0], candidates, false_negatives=masked, **options) * rows.loss_scale


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
