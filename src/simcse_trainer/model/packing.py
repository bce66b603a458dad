"""Token lists to the tensors of one batch, packed or padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def build_batch(
    sentences: Sequence[Sequence[int]],
    *,
    padding_free: bool,
    pad_token_id: int,
    grouped: bool = False,
) -> dict[str, Any]:
    """Build the inputs of `SimCSEModel.forward` for N sentences.

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


def plan_chunks(
    lengths: Sequence[int], size: int, *, padding_free: bool, grouped: bool = False
) -> list[dict[str, Any]]:
    """Plan a batch in chunks of at most `size` sentences, each as short as its own sentences.

    Made on the CPU, from numbers that are there anyway: nothing has to be read from a device.

    Args:
        lengths: Tokens of each of the batch's N sentences.
        size: Sentences per chunk, at most.
        padding_free: As for `build_batch`.
        grouped: As for `build_batch`.

    Returns:
        For each chunk `sentences`, `tokens` (from, to) and `longest`; of a packed batch also
        `indices`: what `build_batch` gives beside the tokens.
    """
    make_indices = grouped_packing_indices if grouped else packing_indices
    chunks, token = [], 0
    for start in range(0, len(lengths), size):
        own = list(lengths[start : start + size])
        chunk: dict[str, Any] = {
            "sentences": (start, start + len(own)),
            "tokens": (token, token + sum(own)),
            "longest": max(own),
        }
        if padding_free:
            part = torch.tensor(own)
            chunk["indices"] = {"lengths": part, **make_indices(part)}
        chunks.append(chunk)
        token += sum(own)
    return chunks


def split_batch(batch: dict[str, Any], chunks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cut a batch into chunks.

    Args:
        batch: From `build_batch`; tensors shaped as `input_ids` may be beside it (masked tokens).
        chunks: From `plan_chunks`, on the batch's device.

    Returns:
        Batches of the same form, in order.
    """
    shape = batch["input_ids"].shape
    tokens = {n: x for n, x in batch.items() if getattr(x, "shape", None) == shape}
    if "attention_mask" in batch:
        return [
            {n: x[slice(*one["sentences"]), : one["longest"]] for n, x in tokens.items()}
            for one in chunks
        ]
    tokens.pop("position_ids", None)  # counted anew
    return [
        {n: x[:, slice(*one["tokens"])] for n, x in tokens.items()} | dict(one["indices"])
        for one in chunks
    ]


# More groups hold less padding and take more calls: one more is worth it where it saves this share
# of what one rectangle costs. Found by timing sentences of 6 to 32 tokens.
_MOST_GROUPS = 4
_WORTH_A_GROUP = 0.1
_SENTENCES_PER_GROUP = 16


def packing_indices(lengths: Tensor) -> dict[str, Tensor]:
    """Return where the tokens of a packed batch stand in the padded one, and back.

    Args:
        lengths: [N], tokens of each sentence; T their sum, L the largest.

    Returns:
        `position_ids` [1, T], counted from 0 in every sentence; `pad_index` [N, L], the packed
        token of each padded place (0 where there is none); `unpad_index` [T], the padded place of
        each token in the flattened [N * L]; `key_mask` [N, L], True where there is a token.
    """
    pad_index, key_mask = _rectangle(lengths, lengths.cumsum(0) - lengths)
    return {
        "position_ids": _count_positions(lengths),
        "pad_index": pad_index,
        "unpad_index": key_mask.flatten().nonzero()[:, 0],
        "key_mask": key_mask,
    }


def grouped_packing_indices(lengths: Tensor) -> dict[str, Any]:
    """Return the same for `grouped_attention`: a rectangle per group of sentences of like length.

    Args:
        lengths: [N], tokens of each sentence; T their sum.

    Returns:
        `position_ids` and `unpad_index` as above; `pad_index` and `key_mask` flat, group by group;
        and `group_shapes`, each group's number of sentences and largest length.
    """
    starts = lengths.cumsum(0) - lengths
    rectangles = [_rectangle(lengths[rows], starts[rows]) for rows in _group(lengths)]
    pad_index, key_mask = (
        torch.cat([x.flatten() for x in xs]) for xs in zip(*rectangles, strict=True)
    )
    places = key_mask.nonzero()[:, 0]
    unpad_index = torch.empty_like(places)
    unpad_index[pad_index[places]] = places
    return {
        "position_ids": _count_positions(lengths),
        "pad_index": pad_index,
        "unpad_index": unpad_index,
        "key_mask": key_mask,
        "group_shapes": tuple(tuple(mask.shape) for _, mask in rectangles),
    }


def _group(lengths: Tensor) -> tuple[Tensor, ...]:
    """Return the sentences of each group, from the shortest to the longest."""
    order = lengths.argsort(stable=True)

    def cost(count: int) -> float:
        groups = order.tensor_split(count)
        area = sum(len(rows) * int(lengths[rows[-1]]) ** 2 for rows in groups)
        return area + count * _WORTH_A_GROUP * len(order) * int(lengths[order[-1]]) ** 2

    most = max(1, min(_MOST_GROUPS, len(lengths) // _SENTENCES_PER_GROUP))
    return order.tensor_split(min(range(1, most + 1), key=cost))


def _rectangle(lengths: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Return two [N, L]: the packed token of each place (0 without one), and where there is one."""
    places = torch.arange(int(lengths.max()), device=lengths.device)
    key_mask = places < lengths[:, None]
    return torch.where(key_mask, places + starts[:, None], 0), key_mask


def _count_positions(lengths: Tensor) -> Tensor:
    starts = lengths.cumsum(0) - lengths
    total = int(lengths.sum())
    positions = torch.arange(total, device=lengths.device)
    return (positions - starts.repeat_interleave(lengths, output_size=total))[None]
