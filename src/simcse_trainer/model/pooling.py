"""Token embeddings to sentence embeddings.

Shapes: T tokens of N sentences, one after the other without padding; D the embedding size.
Padded batches are read through their mask first, so that there is one way to pool.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from simcse_trainer.objective.logits import upcast


def pool(hidden: Tensor, lengths: Tensor, mode: str) -> Tensor:
    """Pool the tokens of each sentence into one embedding.

    Args:
        hidden: [T, D], a hidden state a token.
        lengths: [N], tokens of each sentence, all at least 1; they sum to T.
        mode: A key of `POOLING_MODES`.

    Returns:
        [N, D].
    """
    return POOLING_MODES[mode](hidden, lengths)


def select_layers(hidden_states: Sequence[Tensor], mode: str) -> Tensor:
    """Select the token embeddings that a mode pools: the last layer, or the mean of two.

    Args:
        hidden_states: The embedding output and the output of each layer, of any one shape.
        mode: A key of `POOLING_MODES`.
    """
    layers = LAYER_PAIRS.get(mode)
    if layers is None:
        return hidden_states[-1]
    first, second = (hidden_states[layer] for layer in layers)
    return (first + second) / 2


def _cls(hidden: Tensor, lengths: Tensor) -> Tensor:
    return hidden[lengths.cumsum(0) - lengths]


def _lasttoken(hidden: Tensor, lengths: Tensor) -> Tensor:
    return hidden[lengths.cumsum(0) - 1]


def _mean(hidden: Tensor, lengths: Tensor) -> Tensor:
    return _reduce(hidden, lengths, "mean")


def _max(hidden: Tensor, lengths: Tensor) -> Tensor:
    return _reduce(hidden, lengths, "max")


def _weightedmean(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Weigh token k of a sentence by k, counted from 1 (Muennighoff 2022, SGPT, equation 2)."""
    starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths, output_size=len(hidden))
    weights = torch.arange(1, len(hidden) + 1, device=hidden.device) - starts
    total = (lengths * (lengths + 1) / 2)[:, None]
    return (_reduce(upcast(hidden) * weights[:, None], lengths, "sum") / total).to(hidden.dtype)


def _reduce(hidden: Tensor, lengths: Tensor, how: str) -> Tensor:
    return torch.segment_reduce(upcast(hidden), how, lengths=lengths).to(hidden.dtype)


# The names of sentence-transformers, and two of the original SimCSE code.
POOLING_MODES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _cls,
    "mean": _mean,
    "max": _max,
    "lasttoken": _lasttoken,
    "weightedmean": _weightedmean,
    "avg_top2": _mean,
    "avg_first_last": _mean,
}

# Positions in (embedding output, layer 1, ..., layer n): "first" is the first layer's output.
LAYER_PAIRS = {"avg_top2": (-2, -1), "avg_first_last": (1, -1)}
