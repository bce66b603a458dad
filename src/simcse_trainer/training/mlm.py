"""The inputs of the auxiliary masked-language-model loss, and each part's share of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from simcse_trainer.model.tokenizer import count_word_embeddings
from simcse_trainer.objective.mlm import IGNORED, mask_tokens

# Of a batch of `SimCSECollator`: what the objective and the step in chunks take.
_NOT_FEATURES = ("text_ids", "chunks", "sentence_lengths")


class MLMInputs:
    """Masks the tokens of batches, with `mlm_weight`.

    Args:
        trainer: The `SimCSETrainer` that it belongs to.
    """

    def __init__(self, trainer: Any):
        self._trainer = trainer

    def split_inputs(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Return what the model takes, masked tokens included, and the `text_ids`.

        Args:
            inputs: A batch, from `SimCSECollator`.
        """
        features = {name: tensor for name, tensor in inputs.items() if name not in _NOT_FEATURES}
        if self._trainer.args.mlm_weight:
            features |= self._mask(features["input_ids"])
        return features, inputs["text_ids"]

    def count_masked(self, chunks: Sequence[Mapping[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Count the share that each chunk's auxiliary loss, a mean over its masked tokens, has.

        Args:
            chunks: Of the features of one batch.

        Returns:
            Per chunk a numerator and a denominator: the sum over chunks of loss * numerator /
            denominator, averaged over processes, is the mean over all masked tokens of the whole
            batch. Integers, so that the quotient has the precision of the loss.
        """
        args = self._trainer.args
        counts = torch.stack([(chunk["mlm_labels"] != IGNORED).sum() for chunk in chunks])
        total = counts.sum()
        if args.gather_across_devices and args.world_size > 1:
            total = self._trainer.accelerator.reduce(total, reduction="sum")
            counts = counts * args.world_size
        return [(count, total.clamp(min=1)) for count in counts]

    @cached_property
    def _vocab_size(self) -> int | None:
        return count_word_embeddings(self._trainer._model.backbone)

    def _mask(self, input_ids: Tensor) -> dict[str, Tensor]:
        tokenizer: Any = self._trainer.processing_class
        masked = mask_tokens(
            input_ids,
            special_ids=torch.tensor(tokenizer.all_special_ids, device=input_ids.device),
            mask_token_id=tokenizer.mask_token_id,
            vocab_size=min(len(tokenizer), self._vocab_size or len(tokenizer)),
            probability=self._trainer.args.mlm_probability,
        )
        return {"mlm_input_ids": masked.input_ids, "mlm_labels": masked.labels}
