"""Texts to embeddings, for inference and evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor

from simcse_trainer.errors import InputError
from simcse_trainer.model.cpu.layers import use_cpu_kernels
from simcse_trainer.model.finite import not_finite
from simcse_trainer.model.packing import build_batch
from simcse_trainer.model.progress import bar
from simcse_trainer.model.tokenizer import check_sequence, check_texts

# A thread computes fastest on what its caches hold; on other devices only the sentences count.
_TOKENS_PER_CPU_THREAD = 512


@torch.no_grad()
def encode(
    model: Any,
    sentences: Sequence[str] | str,
    *,
    batch_size: int,
    show_progress_bar: Any = False,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """Embed sentences; arguments and result are those of `SimCSEModel.encode`.

    Args:
        model: The model, a `SimCSEModel`.
        sentences: As there, and so are all others.
        batch_size: See `SimCSEModel.encode`, which passes it on.
        show_progress_bar: Whether to show a progress bar on stderr; a text is its label, and a bar
            that is there is advanced.
        shard: See `SimCSEModel.encode`, which passes it on.
    """
    if isinstance(sentences, str):
        return encode(model, [sentences], batch_size=batch_size)[0]
    check_sequence(sentences)
    sentences = list(sentences)  # a pandas Series, an array, what a generator gives
    check_texts(sentences)
    token_ids = model.tokenize(sentences)
    order = sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i]))
    was_training = model.training
    model.eval()
    model.full_precision = True
    result = torch.zeros(len(order), model.embedding_dimension, dtype=_result_type(model))
    rank, world = shard
    try:
        lengths = [len(token_ids[i]) for i in order]
        most = _TOKENS_PER_CPU_THREAD * torch.get_num_threads()
        batches = cut_batches(
            lengths, batch_size, most if model.device.type == "cpu" else sum(lengths)
        )
        turns = range(rank, math.ceil(len(batches) / world) * world, world)
        shown = _open_bar(show_progress_bar, math.ceil(len(order) / world))
        with use_cpu_kernels(model, model.use_cpu_kernels), shown as sentences_done:
            for turn in turns:
                rows = batches[turn % len(batches)]
                batch = build_batch(
                    [token_ids[i] for i in order[rows]],
                    padding_free=model.padding_free,
                    pad_token_id=model.pad_token_id,
                )
                out = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
                if turn < len(batches):
                    result[order[rows]] = out.embeddings.cpu().to(result.dtype)
                    sentences_done.update(rows.stop - rows.start)
        bad = (~result.isfinite().all(1)).nonzero()
        if len(bad):
            text = shorten(sentences[int(bad[0, 0])], 60)
            raise not_finite(f"The embedding of {text!r}", model.backbone.dtype)
    finally:
        model.full_precision = False
        model.train(was_training)
    return result


def _open_bar(shown: Any, total: int) -> AbstractContextManager[Any]:
    if isinstance(shown, bool | str):
        label = shown if isinstance(shown, str) else "Encoding"
        opened: AbstractContextManager[Any] = bar(label=label, total=total, show=bool(shown))
        return opened
    return nullcontext(shown)


def _result_type(model: Any) -> torch.dtype:
    is_double = next(model.parameters()).dtype == torch.float64
    return torch.float64 if is_double else torch.float32


def cut_batches(lengths: Sequence[int], sentences: int, tokens: int) -> list[slice]:
    """Cut batches of at most so many sentences and tokens; a longer sentence is one of its own."""
    batches, start, total = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and (i - start == sentences or total + length > tokens):
            batches.append(slice(start, i))
            start, total = i, 0
        total += length
    return [*batches, slice(start, len(lengths))] if lengths else []


def check_device(device: str | torch.device) -> torch.device:
    """Return the device of a name.

    Raises:
        InputError: It is not there.
    """
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device is '{device}', which is not there ({str(error).splitlines()[0]}). "
            "Use one such as cpu, cuda or cuda:1."
        ) from error
    return found
