"""Token lists to the tensors of one batch, packed or padded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from simcse_trainer.model.attention import grouped_packing_indices, packing_indices


def build_batch(
    sentences: Sequence[Sequence[int]],
    *,
    padding_free: bool,
    pad_token_id: int,
    grouped: bool = False,
) -> dict[str, Any]:
    """The inputs of `SimCSEModel.forward` for N sentences.

    Args:
        sentences: N lists of token ids, none of them empty.
        padding_free: Pack the sentences into one row instead of padding them.
        pad_token_id: Fills the right side of padded rows.
        grouped: Pack for `grouped_attention`, which trains faster on a CPU.

    Returns:
        Packed: `input_ids` [1, T], `lengths` [N] and the indices of `packing_indices`, or of
        `grouped_packing_indices`.
        Padded: `input_ids` and `attention_mask` [N, L].
    """
    if padding_free:
        lengths = torch.tensor([len(ids) for ids in sentences])
        flat = torch.tensor([token for ids in sentences for token in ids])
        indices = grouped_packing_indices(lengths) if grouped else packing_indices(lengths)
        return {"input_ids": flat[None], "lengths": lengths, **indices}
    rows = [torch.tensor(ids) for ids in sentences]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


def split_batch(batch: dict[str, Any], size: int) -> list[dict[str, Any]]:
    """The same batch in chunks of at most `size` sentences, each as short as its own sentences.

    Args:
        batch: From `build_batch`; tensors shaped as `input_ids` may be beside it (masked tokens).
        size: Sentences per chunk.

    Returns:
        Batches of the same form, in order.
    """
    if "attention_mask" in batch:
        return [_trim(batch, start, size) for start in range(0, len(batch["attention_mask"]), size)]
    lengths = batch["lengths"].split(size)
    tokens = [int(part.sum()) for part in lengths]
    flat = {
        name: x[0].split(tokens)
        for name, x in batch.items()
        if getattr(x, "shape", None) == batch["input_ids"].shape
        and name != "position_ids"  # counted anew below
    }
    indices_of = grouped_packing_indices if "group_shapes" in batch else packing_indices
    return [
        {name: parts[i][None] for name, parts in flat.items()}
        | {"lengths": part, **indices_of(part)}
        for i, part in enumerate(lengths)
    ]


def _trim(batch: dict[str, Any], start: int, size: int) -> dict[str, Any]:
    rows = {name: x[start : start + size] for name, x in batch.items()}
    longest = int(rows["attention_mask"].sum(1).max())
    return {name: x[:, :longest] for name, x in rows.items()}
