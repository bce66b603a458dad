"""Examples to one batch, all index arithmetic included, so that workers can do it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch

from simcse_trainer.data.schema import ANCHOR
from simcse_trainer.data.tokenization import INPUT_IDS
from simcse_trainer.model.batching import build_batch


@dataclass(frozen=True)
class SimCSECollator:
    """Makes batches of B examples with V views each, view-major: all anchors, all positives, ...

    An example of one sentence becomes two views of it: dropout tells them apart, or the second is
    a changed copy.

    Attributes:
        pad_token_id: Fills padded batches.
        padding_free: Pack the batch instead of padding it.
        grouped: Pack it for a CPU that trains; see `build_batch`.
        augmentation: From the texts of a batch to token ids of changed copies, such as a
            `DiscreteAugmentation`.
    """

    pad_token_id: int
    padding_free: bool = True
    grouped: bool = False
    augmentation: Callable[[Sequence[str]], list[list[int]]] | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Build the inputs of `SimCSEModel.forward`, and `text_ids`.

        Args:
            examples: Each with `input_ids`: V lists of token ids, or one for unsupervised SimCSE;
                for augmentation also the text `sent0`.

        Returns:
            What `build_batch` makes of the V * B sentences, and `text_ids` [V, B]: equal
            texts, equal integers, in every process.
        """
        views = list(zip(*(example[INPUT_IDS] for example in examples), strict=True))
        if len(views) == 1 and self.augmentation:
            views.append(tuple(self.augmentation([example[ANCHOR] for example in examples])))
        elif len(views) == 1:
            views *= 2
        identities = [[_identify(ids) for ids in view] for view in views]
        batch = build_batch(
            [ids for view in views for ids in view],
            padding_free=self.padding_free,
            pad_token_id=self.pad_token_id,
            grouped=self.grouped,
        )
        return {**batch, "text_ids": torch.tensor(identities)}


def _identify(ids: Sequence[int]) -> int:
    digest = blake2b(array("l", ids).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
