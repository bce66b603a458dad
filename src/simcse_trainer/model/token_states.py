"""Texts to the token embeddings of every layer, to look at what a model does inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simcse_trainer.model.batching import build_batch
from simcse_trainer.model.encoding import tokenize

if TYPE_CHECKING:
    from simcse_trainer.model.modeling import SimCSEModel


@dataclass(frozen=True)
class TokenStates:
    """The T tokens of N sentences, one sentence after the other.

    Attributes:
        layers: [T, D] of the embedding output and of each layer; float32, on the CPU.
        token_ids: [T].
        lengths: [N], at least 1; they sum to T.
    """

    layers: list[Tensor]
    token_ids: Tensor
    lengths: Tensor


@torch.no_grad()
def encode_tokens(
    model: SimCSEModel, sentences: Sequence[str], *, max_values: int = 2**28, batch_size: int = 128
) -> TokenStates:
    """The states of every layer, without special tokens: those are no words.

    The model is in evaluation mode meanwhile. Sentences of which no token is left are left out.

    Args:
        model: Any SimCSE model.
        sentences: Texts; those over `model.max_seq_length` tokens are cut.
        max_values: Numbers to keep; of more sentences every n-th is taken, the same every time.
        batch_size: Sentences per forward pass.
    """
    token_ids = tokenize(model, sentences)
    per_token = (model.config.num_hidden_layers + 1) * model.config.hidden_size
    share = min(1.0, max_values / (per_token * max(1, sum(map(len, token_ids)))))
    kept = max(1, int(share * len(token_ids)))
    token_ids = [token_ids[i * len(token_ids) // kept] for i in range(min(kept, len(token_ids)))]
    token_ids.sort(key=len)
    special = torch.tensor(sorted(set(getattr(model.tokenizer, "all_special_ids", []))))
    was_training = model.training
    model.eval()
    ids, lengths, layers = [], [], []
    try:
        for start in range(0, len(token_ids), batch_size):
            rows = token_ids[start : start + batch_size]
            batch = build_batch(
                rows, padding_free=model.padding_free, pad_token_id=model.pad_token_id
            )
            flat = torch.tensor([token for row in rows for token in row])
            words = ~torch.isin(flat, special)
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            layers.append([s.cpu()[words].float() for s in model.hidden_states(**on_device)])
            ids.append(flat[words])
            lengths += [int(part.sum()) for part in words.split([len(row) for row in rows])]
    finally:
        model.train(was_training)
    counts = torch.tensor([length for length in lengths if length])
    return TokenStates(
        [torch.cat(layer) for layer in zip(*layers, strict=True)], torch.cat(ids), counts
    )
