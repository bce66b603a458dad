"""Examples to one batch, all index arithmetic included, so that workers can do it."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from simcse_trainer.model.batching import build_batch


@dataclass(frozen=True)
class SimCSECollator:
    """Makes batches of B examples with V views each, view-major: all anchors, all positives, ...

    An example of one sentence becomes two views of it: dropout tells them apart.

    Attributes:
        pad_token_id: Fills padded batches.
        padding_free: Pack the batch instead of padding it.
    """

    pad_token_id: int
    padding_free: bool = True

    def __call__(
        self, examples: Sequence[Mapping[str, Sequence[Sequence[int]]]]
    ) -> dict[str, Tensor]:
        """Build the inputs of `SimCSEModel.forward`, and `text_ids`.

        Args:
            examples: Each with `input_ids`: V lists of token ids, or one for unsupervised SimCSE.

        Returns:
            What `build_batch` makes of the V * B sentences, and `text_ids` [V, B]: equal
            texts, equal integers, in every process.
        """
        views = list(zip(*(example["input_ids"] for example in examples), strict=True))
        identities = [[_identify(ids) for ids in view] for view in views]
        if len(views) == 1:
            views, identities = views * 2, identities * 2
        batch = build_batch(
            [ids for view in views for ids in view],
            padding_free=self.padding_free,
            pad_token_id=self.pad_token_id,
        )
        return {**batch, "text_ids": torch.tensor(identities)}


def _identify(ids: Sequence[int]) -> int:
    digest = blake2b(array("l", ids).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
