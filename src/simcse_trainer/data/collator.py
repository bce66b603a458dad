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
from simcse_trainer.errors import InputError
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
        max_seq_length: A text of more tokens is refused; None: not looked at.
        vocab_size: So is a token id of this or above, which has no embedding.
        augmentation: From the texts of a batch to token ids of changed copies, such as a
            `DiscreteAugmentation`.
    """

    pad_token_id: int
    padding_free: bool = True
    grouped: bool = False
    max_seq_length: int | None = None
    vocab_size: int | None = None
    augmentation: Callable[[Sequence[str]], list[list[int]]] | None = None

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Build the inputs of `SimCSEModel.forward`, and `text_ids`.

        Args:
            examples: Each with `input_ids`: V lists of token ids, or one for unsupervised SimCSE;
                for augmentation also the text `sent0`.

        Raises:
            InputError: Token ids that no check has seen, as those of a stream, do not fit.

        Returns:
            What `build_batch` makes of the V * B sentences, and `text_ids` [V, B]: equal
            texts, equal integers, in every process.
        """
        views = list(zip(*(example[INPUT_IDS] for example in examples), strict=True))
        if len(views) == 1 and self.augmentation:
            views.append(tuple(self.augmentation([example[ANCHOR] for example in examples])))
        elif len(views) == 1:
            views *= 2
        self._check(views)
        identities = [[_identify(ids) for ids in view] for view in views]
        batch = build_batch(
            [ids for view in views for ids in view],
            padding_free=self.padding_free,
            pad_token_id=self.pad_token_id,
            grouped=self.grouped,
        )
        return {**batch, "text_ids": torch.tensor(identities)}

    def _check(self, views: Sequence[Sequence[Sequence[int]]]) -> None:
        lengths = [len(ids) for view in views for ids in view]
        most = self.max_seq_length or max(lengths)
        if min(lengths) < 1 or max(lengths) > most:
            raise InputError(
                f"train_dataset: a row of '{INPUT_IDS}' has {min(lengths)} to {max(lengths)} "
                f"tokens in a text; expected 1 to {most}."
            )
        highest = max(max(ids) for view in views for ids in view)
        if self.vocab_size is not None and highest >= self.vocab_size:
            raise InputError(
                f"train_dataset: a row of '{INPUT_IDS}' has the token id {highest}; expected 0 to "
                f"{self.vocab_size - 1}: the model has no other word embeddings."
            )


def _identify(ids: Sequence[int]) -> int:
    digest = blake2b(array("l", ids).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
