"""Padding-free attention for any backbone that goes through transformers' AttentionInterface.

A packed batch is one row of T tokens: N sentences, one after the other. Linear layers then do no
work on padding; only the attention has to know where each sentence ends. It pads queries, keys and
values to [N, L] just around `scaled_dot_product_attention`, so that it runs on every device.

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

ATTENTION_NAME = "simcse_packed"


def packing_indices(lengths: Tensor) -> dict[str, Tensor]:
    """Where the tokens of a packed batch stand in the padded one, and back.

    Args:
        lengths: [N], tokens of each sentence; T their sum, L the largest.

    Returns:
        `position_ids` [1, T], counted from 0 in every sentence; `pad_index` [N, L], the packed
        token of each padded place (0 where there is none); `unpad_index` [T], the padded place of
        each token in the flattened [N * L]; `key_mask` [N, L], True where there is a token.
    """
    ends = lengths.cumsum(0)
    places = torch.arange(int(lengths.max()), device=lengths.device)
    key_mask = places < lengths[:, None]
    pad_index = torch.where(key_mask, places + (ends - lengths)[:, None], 0)
    return {
        "position_ids": places.expand_as(key_mask)[key_mask][None],
        "pad_index": pad_index,
        "unpad_index": key_mask.flatten().nonzero()[:, 0],
        "key_mask": key_mask,
    }


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
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for `AttentionInterface`.

    Args:
        module: The attention layer.
        query: [1, heads, T, head size]; key and value may have fewer heads.
        key: As query.
        value: As query.
        attention_mask: Not used for a packed batch.
        pad_index: From `packing_indices`; without it this is transformers' own `sdpa`.
        unpad_index: From `packing_indices`.
        key_mask: From `packing_indices`.
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
    if sliding_window is not None and usual and not causal:
        sliding_window += 1  # a decoder's window to both sides includes its edge
    query, key, value = (_pad(x, pad_index) for x in (query, key, value))
    out, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        _padded_mask(key_mask, causal, sliding_window),
        is_causal=causal,
        **kwargs,
    )
    tokens: Tensor = out.flatten(0, 1).index_select(0, unpad_index)
    return tokens[None], None


def _pad(x: Tensor, pad_index: Tensor) -> Tensor:
    """[1, heads, T, head size] -> [N, heads, L, head size]."""
    tokens = x[0].transpose(0, 1)
    padded: Tensor = tokens.index_select(0, pad_index.flatten()).unflatten(0, pad_index.shape)
    return padded.transpose(1, 2)


def _padded_mask(key_mask: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """True where a query may look, [N, 1, 1 or L, L]; None where causality alone decides."""
    length = key_mask.shape[1]
    if causal and (window is None or window >= length):
        # Padding is on the right: no token ever looks at it.
        return None
    mask = key_mask[:, None, None]
    if window is not None and window < length:
        places = torch.arange(length, device=key_mask.device)
        distance = places[:, None] - places
        near = (distance >= 0 if causal else distance > -window) & (distance < window)
        # A padded query may see nothing: it looks at itself instead, and is dropped afterwards.
        mask = (mask & near) | (distance == 0)
    return mask


AttentionInterface.register(ATTENTION_NAME, packed_attention)
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
