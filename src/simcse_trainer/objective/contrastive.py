"""The contrastive objective of one step, however many processes and rows it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from simcse_trainer.objective.gather import Rows, gather_with_grad
from simcse_trainer.objective.info_nce import find_false_negatives, info_nce
from simcse_trainer.objective.tiled import tiled_info_nce

# Elements of the logit matrix above which it is computed in tiles: 16 MiB a copy in float32, of
# which the plain form holds several.
LARGEST_MATRIX = 2**22


@dataclass(frozen=True)
class ContrastiveObjective:
    """InfoNCE of local anchors against the candidates of all processes.

    Attributes:
        temperature: Divides the cosines.
        hard_negative_weight: A logit for each anchor's own hard negatives.
        mask_duplicate_negatives: Leave out what `find_false_negatives` finds.
        gather_across_devices: Count the candidates of all processes, not only one's own.
    """

    temperature: float = 0.05
    hard_negative_weight: float = 0.0
    mask_duplicate_negatives: bool = True
    gather_across_devices: bool = True

    def __call__(self, views: Tensor, text_ids: Tensor) -> Tensor:
        """The loss of this process.

        Its average over the processes, which is what DDP and FSDP take of the gradients, is the
        mean over all anchors of the whole batch, also where processes have unequal batches.

        Args:
            views: [V, B, D]: anchors, positives, then each column of hard negatives.
            text_ids: [V, B], equal texts, equal integers.

        Returns:
            A scalar.
        """
        size = views.shape[1]
        rows = Rows((size,))
        if self.gather_across_devices:
            rows = Rows.exchange(size, views.device)
        candidates = gather_with_grad(views[1:].transpose(0, 1), rows).transpose(0, 1)
        ids = gather_with_grad(text_ids.T, rows).T if self.mask_duplicate_negatives else None
        options: dict[str, Any] = {
            "temperature": self.temperature,
            "hard_negative_weight": self.hard_negative_weight,
            "offset": rows.offset,
        }
        if size * candidates.shape[0] * candidates.shape[1] > LARGEST_MATRIX:
            return tiled_info_nce(views[0], candidates, text_ids=ids, **options) * rows.share
        masked = None
        if ids is not None:
            masked = find_false_negatives(ids, offset=rows.offset, size=size)
        return info_nce(views[0], candidates, false_negatives=masked, **options) * rows.share
