"""The auxiliary masked-language-model objective (Gao et al. 2021, section 4.1 and table D.2).

A decoder predicts a masked token as it predicts any: from the position before (masked next-token
prediction, BehnamGhader et al. 2024, section 2.2). The head that predicts the tokens belongs to the
model; here are the masking and the loss.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from simcse_trainer.objective.logits import upcast

IGNORED = -100


class MaskedTokens(NamedTuple):
    """Corrupted tokens, and the original ones where they are to be predicted.

    Attributes:
        input_ids: As given, with the chosen tokens replaced.
        labels: The same shape: the original token, or -100 where nothing is predicted.
    """

    input_ids: Tensor
    labels: Tensor


def mask_tokens(
    input_ids: Tensor,
    *,
    special_ids: Tensor,
    mask_token_id: int,
    vocab_size: int,
    probability: float = 0.15,
) -> MaskedTokens:
    """Choose tokens for prediction and corrupt them (Devlin et al. 2019, section 3.1).

    Of the chosen tokens 80 percent become the mask token, 10 percent a random token, 10 percent
    stay. Randomness comes from the input device's global generator, which the Trainer saves in
    its checkpoints: a resumed run masks what the uninterrupted one would have masked.

    Args:
        input_ids: Integers of any shape.
        special_ids: [S], tokens that are never chosen (padding among them).
        mask_token_id: The id of the mask token.
        vocab_size: Random tokens are drawn from 0 to this, exclusive.
        probability: Share of the other tokens that is chosen.
    """
    chance = torch.rand(input_ids.shape, device=input_ids.device)
    chosen = (chance < probability) & ~torch.isin(input_ids, special_ids)
    fate = torch.rand(input_ids.shape, device=input_ids.device)
    random_ids = torch.randint_like(input_ids, vocab_size)
    corrupted = torch.where(chosen & (fate < 0.8), mask_token_id, input_ids)
    corrupted = torch.where(chosen & (fate >= 0.9), random_ids, corrupted)
    return MaskedTokens(corrupted, torch.where(chosen, input_ids, IGNORED))


def label_position_before(masked: MaskedTokens, input_ids: Tensor, starts: Tensor) -> MaskedTokens:
    """Move each label to the position before its token, where a decoder predicts it.

    A first token has no such position: it is put back, and not predicted.

    Args:
        masked: From `mask_tokens`, [..., L], sentences one after the other.
        input_ids: [..., L], what was masked.
        starts: [..., L], True at the first token of each sentence.
    """
    labels = masked.labels.masked_fill(starts, IGNORED).roll(-1, -1)
    labels[..., -1] = IGNORED  # no first token, or one of the row's first sentence
    return MaskedTokens(torch.where(starts, input_ids, masked.input_ids), labels)


def mlm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean cross-entropy over all predicted tokens of the batch; 0 if there are none.

    Args:
        logits: [M, vocabulary], of the predicted tokens only.
        labels: [M], their original tokens.
    """
    total = F.cross_entropy(upcast(logits), labels, reduction="sum")
    return total / max(len(labels), 1)
