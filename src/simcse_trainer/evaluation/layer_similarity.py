"""How much a layer's token embeddings depend on their context (Ethayarajh 2019, section 3).

T tokens of N sentences, one after the other; D the size of a layer. All functions normalise what
they are given, and compute in its precision.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.embedding_space import anisotropy

# Ethayarajh 2019 leaves out words that are in fewer contexts.
MIN_CONTEXTS = 5


def self_similarity(
    states: Tensor, words: Tensor, *, min_contexts: int = MIN_CONTEXTS, adjusted: bool = False
) -> float:
    """How alike one word's embeddings are in its different contexts, as a mean over words.

    SelfSim(w) = 1 / (n^2 - n) sum_j sum_{k != j} cos(f(s_j, i_j), f(s_k, i_k)) over the n contexts
    of w (definition 1). The sum is the squared length of the sum of the unit vectors less n, so
    that it is linear in time.

    Args:
        states: [T, D] of one layer.
        words: [T] integers, equal where the word is; once per sentence, as the definition has it.
        min_contexts: Words with fewer are left out; at least 2.
        adjusted: Subtract the layer's anisotropy, the mean cosine of all tokens: what is left is
            due to the word (section "Adjusting for Anisotropy").

    Raises:
        InputError: No word is in so many contexts.
    """
    unit = F.normalize(states, dim=-1)
    _, row, contexts = words.unique(return_inverse=True, return_counts=True)
    sums = unit.new_zeros(len(contexts), unit.shape[1]).index_add_(0, row, unit)
    frequent = contexts >= max(2, min_contexts)
    if not frequent.any():
        raise InputError(
            f"self_similarity: no word is in {min_contexts} sentences or more. Give more sentences."
        )
    n = contexts[frequent].to(unit.dtype)
    found = float(((sums[frequent].square().sum(-1) - n) / (n * (n - 1))).mean())
    return found - anisotropy(states) if adjusted else found


def intra_sentence_similarity(states: Tensor, lengths: Tensor, *, adjusted: bool = False) -> float:
    """How close the tokens of a sentence are to its mean, as a mean over sentences.

    IntraSim(s) = 1/n sum_i cos(s, f(s, i)) with s = 1/n sum_i f(s, i) (definition 2).

    Args:
        states: [T, D] of one layer.
        lengths: [N] tokens of each sentence, at least 1; they sum to T.
        adjusted: As for `self_similarity`.

    Raises:
        InputError: The lengths do not sum to T, or there is none.
    """
    if len(lengths) == 0 or int(lengths.sum()) != len(states):
        raise InputError(
            f"intra_sentence_similarity: {len(lengths)} lengths sum to {int(lengths.sum())}; "
            f"expected the {len(states)} rows of states."
        )
    means = torch.segment_reduce(states, "mean", lengths=lengths)
    each = means.repeat_interleave(lengths, dim=0, output_size=len(states))
    cosines = F.cosine_similarity(states, each, dim=-1)
    found = float(torch.segment_reduce(cosines, "mean", lengths=lengths).mean())
    return found - anisotropy(states) if adjusted else found
