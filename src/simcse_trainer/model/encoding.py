"""Texts to embeddings, for inference and evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import shorten
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from simcse_trainer.errors import InputError
from simcse_trainer.model.batching import build_batch
from simcse_trainer.model.cpu_layers import use_cpu_kernels
from simcse_trainer.model.finite import not_finite
from simcse_trainer.model.tokenizer import check_texts, count_word_embeddings
from simcse_trainer.model.tokenizer import tokenize as _tokenize

if TYPE_CHECKING:
    from simcse_trainer.model.modeling import SimCSEModel

# A thread computes fastest on what its caches hold; on other devices only the sentences count.
_TOKENS_PER_CPU_THREAD = 512


@torch.no_grad()
def encode(
    model: SimCSEModel,
    sentences: Sequence[str] | str,
    *,
    batch_size: int = 128,
    show_progress_bar: bool = False,
    share: tuple[int, int] = (0, 1),
) -> Tensor:
    """Embed sentences, in the order given; the model is in evaluation mode meanwhile.

    Computed in the precision of the weights, also by a model in mixed-precision training: the
    embeddings are those that the saved folder will give.

    Args:
        model: Any SimCSE model.
        sentences: n texts, or one; those over `model.max_seq_length` tokens are cut.
        batch_size: At most so many sentences per forward pass, of like lengths; on a CPU also no
            more tokens than it computes fast.
        show_progress_bar: On stderr.
        share: Which of how many processes this is, where they share the work: the rows of the
            others are zero, and their sum is the result. Each process runs the model equally often,
            as engines want it that spread the weights.

    Returns:
        [n, D], or [D] for one text; float32 (float64 for a float64 model), on the CPU; of length 1
        only where `model.normalize_embeddings` says so.

    Raises:
        InputError: The model has no tokenizer, something that is no text, or an embedding that is
            not finite.
    """
    if isinstance(sentences, str):
        return encode(model, [sentences])[0]
    sentences = list(sentences)  # a pandas Series, an array, what a generator gives
    check_texts(sentences)
    token_ids = tokenize(model, sentences)
    order = sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
    was_training = model.training
    model.eval()
    model.full_precision = True
    result = torch.zeros(len(order), model.embedding_dimension, dtype=_result_type(model))
    rank, world = share
    try:
        lengths = [len(token_ids[i]) for i in order]
        most = _TOKENS_PER_CPU_THREAD * torch.get_num_threads()
        batches = _cut(lengths, batch_size, most if model.device.type == "cpu" else sum(lengths))
        turns = range(rank, math.ceil(len(batches) / world) * world, world)
        bar = tqdm(turns, desc="Encoding", disable=not show_progress_bar)
        with use_cpu_kernels(model, model.use_cpu_kernels):
            for turn in bar:
                rows = batches[turn % len(batches)]
                batch = build_batch(
                    [token_ids[i] for i in order[rows]],
                    padding_free=model.padding_free,
                    pad_token_id=model.pad_token_id,
                )
                out = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
                if turn < len(batches):
                    result[order[rows]] = out.embeddings.cpu().to(result.dtype)
        bad = (~result.isfinite().all(1)).nonzero()
        if len(bad):
            text = shorten(sentences[int(bad[0, 0])], 60)
            raise not_finite(f"The embedding of {text!r}", model.backbone.dtype)
    finally:
        model.full_precision = False
        model.train(was_training)
    return result


def _result_type(model: SimCSEModel) -> torch.dtype:
    is_double = next(model.parameters()).dtype == torch.float64
    return torch.float64 if is_double else torch.float32


def _cut(lengths: Sequence[int], sentences: int, tokens: int) -> list[slice]:
    """Batches of at most so many sentences and tokens; a longer sentence is one of its own."""
    batches, start, total = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and (i - start == sentences or total + length > tokens):
            batches.append(slice(start, i))
            start, total = i, 0
        total += length
    return [*batches, slice(start, len(lengths))] if lengths else []


def tokenize(model: SimCSEModel, sentences: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, cut to the model's length; see `tokenizer.tokenize`."""
    if model.tokenizer is None:
        raise InputError("This model has no tokenizer; pass one: SimCSEModel(backbone, tokenizer).")
    return _tokenize(
        model.tokenizer,
        sentences,
        model.max_seq_length,
        vocab_size=count_word_embeddings(model.backbone),
    )
