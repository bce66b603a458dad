"""Padding-free attention for any backbone that uses transformers' AttentionInterface.

A packed batch is one row of T tokens: N sentences, one after the other. Linear layers then do no
work on padding; only the attention has to know where each sentence ends. It pads queries, keys and
values to [N, L] just around `scaled_dot_product_attention`, so that it runs on every device; or,
where a CPU trains, to a rectangle for each group of sentences of like length.

Nothing global changes: a backbone that is called in the usual way, with a two-dimensional mask or
none, computes what it computes with `sdpa`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from simcse_trainer.model.cpu.attention import Shapes, grouped_attention

ATTENTION_NAME = "simcse_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pad_index: Tensor | None = None,
    unpad_index: Tensor | None = None,
    key_mask: Tensor | None = None,
    group_shapes: Shapes | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend, as a function of the `AttentionInterface`.

    Args:
        module: The attention layer that calls it.
        query: [1, heads, T, head size]; key and value may have fewer heads.
        key: [T, H, D], of the same tokens as the query.
        value: [T, H, D], of the same tokens as the query.
        attention_mask: Not used for a packed batch.
        pad_index: From `packing_indices` or `grouped_packing_indices`; without it this is
            transformers' own `sdpa`.
        unpad_index: From the same function as `pad_index`.
        key_mask: From the same function as `pad_index`.
        group_shapes: Sentences and largest length of each group, from `grouped_packing_indices`.
        sliding_window: Local attention, as the layer passes it.
        is_causal: As the layer passes it, else the layer's own attribute.
        kwargs: Passed on: dropout, scaling and what else `sdpa` knows.

    Returns:
        [1, T, heads, head size], and None for the attention weights, which are not computed.
    """
    if pad_index is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=is_causal, **kwargs
        )
    assert unpad_index is not None
    assert key_mask is not None
    usual = getattr(module, "is_causal", True)
    causal = usual if is_causal is None else is_causal
    if sliding_window is not None and not causal and (usual or _is_made_bidirectional(module)):
        sliding_window += 1  # a decoder's window to both sides includes its edge
    if group_shapes is not None:
        parts = key_mask.split([n * length for n, length in group_shapes])
        tokens = grouped_attention(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            [
                _visible_keys(part.view(shape), causal, sliding_window)
                for part, shape in zip(parts, group_shapes, strict=True)
            ],
            pad_index=pad_index,
            unpad_index=unpad_index,
            key_mask=key_mask,
            scaling=kwargs.get("scaling"),
            dropout=kwargs.get("dropout", 0.0),
        )
        return tokens[None], None
    query, key, value = (_pad(x, pad_index) for x in (query, key, value))
    even = pad_index.numel() == len(unpad_index)  # all of one length
    out, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        None if even and sliding_window is None else _padded_mask(key_mask, causal, sliding_window),
        is_causal=causal,
        **kwargs,
    )
    tokens = out.flatten(0, 1)
    return (tokens if even else tokens.index_select(0, unpad_index))[None], None


def _is_made_bidirectional(module: nn.Module) -> bool:
    return getattr(getattr(module, "config", None), "is_causal", True) is False


def _pad(x: Tensor, pad_index: Tensor) -> Tensor:
    """Pad [1, heads, T, head size] to [N, heads, L, head size]."""
    tokens = x[0].transpose(0, 1)
    if pad_index.numel() > len(tokens):
        tokens = tokens.index_select(0, pad_index.flatten())
    padded: Tensor = tokens.unflatten(0, pad_index.shape)
    return padded.transpose(1, 2)


def _padded_mask(key_mask: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """Return `_visible_keys` for all heads, [N, 1, 1 or L, L]; None if only causality decides."""
    if causal and (window is None or window >= key_mask.shape[1]):
        # Padding is on the right: no token ever looks at it.
        return None
    return _visible_keys(key_mask, causal, window)[:, None]


def _visible_keys(key_mask: Tensor, causal: bool, window: int | None) -> Tensor:
    """Return a mask [N, 1 or L, L], True where a query may look."""
    length = key_mask.shape[1]
    mask = key_mask[:, None]
    reach = length if window is None else min(window, length)
    if causal or reach < length:
        places = torch.arange(length, device=key_mask.device)
        distance = places[:, None] - places
        mask = mask & ((distance >= 0 if causal else distance > -reach) & (distance < reach))
        # A padded query may see nothing: it looks at itself instead, and is dropped afterwards.
        mask = mask | (distance == 0)
    return mask


AttentionInterface.register(ATTENTION_NAME, packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
