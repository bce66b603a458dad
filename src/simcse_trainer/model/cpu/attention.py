"""Attention of a packed batch on the CPU, in training: by groups of sentences of like length.

A rectangle of all sentences is as long as the longest: most of what the attention would compute
there is padding. Groups of like lengths hold little of it. Within a group the products are batched,
and of the matrix of weights only the softmax and the dropout mask are kept for the backward pass.

Query heads that share a key head (Ainslie et al. 2023) are rows of one product with it: nothing is
repeated for them.

Shapes: T tokens, H heads of size D, K of keys and values; a group has N sentences of at most L
tokens, N * L places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from simcse_trainer.model.cpu.layers import dropout_mask

Shapes = Sequence[tuple[int, int]]


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: Sequence[Tensor],
    *,
    pad_index: Tensor,
    unpad_index: Tensor,
    key_mask: Tensor,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute scaled dot-product attention (Vaswani et al. 2017, eq. 1), each sentence by itself.

    Args:
        query: [T, H, D], a row a token.
        key: [T, K, D], of the same tokens as the query; H / K heads of the query share each.
        value: [T, K, D], of the same tokens as the query.
        masks: Per group [N, 1 or L, L], True where a query may look: at one key or more.
        pad_index: [places], the token of each place, group by group; any where there is none.
        unpad_index: [T], the place of each token.
        key_mask: [places], True where there is a token.
        scaling: Factor of the products; by default 1 / sqrt(D).
        dropout: Share of the weights that is dropped.

    Returns:
        [T, H, D].
    """
    if torch.is_autocast_enabled("cpu"):
        # As `scaled_dot_product_attention` does: some models normalise queries in float32.
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    heads, key_heads = query.shape[1], key.shape[1]
    shapes = [(len(mask), mask.shape[-1]) for mask in masks]
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    biases = [_bias(mask, key_heads, heads // key_heads, query.dtype) for mask in masks]
    rows = [_make_head_rows(pad_index, unpad_index, count, shapes) for count in (heads, key_heads)]
    with torch.autocast("cpu", enabled=False):
        out: Tensor = _GroupedAttention.apply(
            query, key, value, biases, shapes, *rows, key_mask, scaling, dropout
        )
    return out.view(query.shape)


def _bias(mask: Tensor, key_heads: int, shared: int, dtype: torch.dtype) -> Tensor:
    """Turn a mask [N, 1 or L, L] into a bias [N * K, 1 or H / K * L, L]: -infinity for False."""
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
    if bias.shape[1] > 1:
        bias = bias.repeat(1, shared, 1)
    return bias.repeat_interleave(key_heads, 0)


def _make_head_rows(
    pad_index: Tensor, unpad_index: Tensor, heads: int, shapes: Shapes
) -> tuple[Tensor, Tensor]:
    """Make the indices for rows of one head of one token, where a group is [N, H, L] of them.

    Returns:
        [places * H], the row of the packed [T, H] that belongs in each; [T * H], the way back.
    """
    head = torch.arange(heads)
    pad_rows, row_of_place = [], []
    start = 0
    for part, (n, length) in zip(_split(pad_index, shapes), shapes, strict=True):
        pad_rows.append((part.view(n, 1, length) * heads + head[:, None]).flatten())
        rows = start + torch.arange(n * heads * length).view(n, heads, length)
        row_of_place.append(rows.transpose(1, 2).reshape(-1, heads))
        start += rows.numel()
    return torch.cat(pad_rows), torch.cat(row_of_place).index_select(0, unpad_index).flatten()


def _split(x: Tensor, shapes: Shapes, times: int = 1) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = x.split([n * length * times for n, length in shapes])
    return parts


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        biases: Sequence[Tensor],
        shapes: Shapes,
        query_rows: tuple[Tensor, Tensor],
        key_rows: tuple[Tensor, Tensor],
        key_mask: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        heads = key.shape[1]
        q, k, v = (
            x.reshape(-1, x.shape[2]).index_select(0, pad_rows)
            for x, (pad_rows, _) in zip(
                (query, key, value), (query_rows, key_rows, key_rows), strict=True
            )
        )
        out = torch.empty_like(q)
        qs, ks, vs, outs = (_by_group(x, shapes, heads) for x in (q, k, v, out))
        weights = [
            torch.baddbmm(bias, one, other.mT, alpha=scaling).softmax(-1)
            for bias, one, other in zip(biases, qs, ks, strict=True)
        ]
        drop = None
        if dropout:
            drop = dropout_mask((sum(w.numel() for w in weights),), dropout, q.dtype)
        for kept, values, part in zip(_drop(weights, drop), vs, outs, strict=True):
            torch.bmm(kept, values, out=part)
        ctx.save_for_backward(q, k, v, drop, *query_rows, key_rows[1], key_mask, *weights)
        ctx.options, ctx.tokens = (shapes, scaling, heads), len(query)
        # [T * H, D], for what a Function returns must be no view: it may be changed in place.
        return out.index_select(0, query_rows[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        shapes, scaling, heads = ctx.options
        q, k, v, drop, pad_rows, unpad_rows, unpad_key_rows, key_mask, *weights = ctx.saved_tensors
        outer = gradient.index_select(0, pad_rows)
        _clear_padding(outer, key_mask, shapes, len(gradient) // ctx.tokens)
        grads = [torch.empty_like(x) for x in (q, k, v)]
        qs, ks, vs, outers, dqs, dks, dvs = (
            _by_group(x, shapes, heads) for x in (q, k, v, outer, *grads)
        )
        for i, kept in enumerate(_drop(weights, drop)):
            torch.bmm(kept.mT, outers[i], out=dvs[i])
        inners = [torch.bmm(part, values.mT) for part, values in zip(outers, vs, strict=True)]
        for i, (w, inner) in enumerate(zip(weights, _drop(inners, drop), strict=True)):
            scores = torch._softmax_backward_data(inner, w, -1, w.dtype).mul_(scaling)
            torch.bmm(scores, ks[i], out=dqs[i])
            torch.bmm(scores.mT, qs[i], out=dks[i])
        rows = (unpad_rows, unpad_key_rows, unpad_key_rows)
        found = (
            x.index_select(0, back).unflatten(0, (ctx.tokens, -1))
            for x, back in zip(grads, rows, strict=True)
        )
        return (*found, *[None] * 7)


def _by_group(rows: Tensor, shapes: Shapes, heads: int) -> list[Tensor]:
    """View [places * H, D] as [N * heads, H / heads * L, D] of each group."""
    times = len(rows) // sum(n * length for n, length in shapes)
    parts = _split(rows, shapes, times)
    return [
        part.view(n * heads, times // heads * length, -1)
        for part, (n, length) in zip(parts, shapes, strict=True)
    ]


def _drop(matrices: Sequence[Tensor], mask: Tensor | None) -> Iterator[Tensor]:
    """Multiply each matrix with its part of the mask, one at a time."""
    if mask is None:
        yield from matrices
        return
    for x, part in zip(matrices, mask.split([x.numel() for x in matrices]), strict=True):
        yield x * part.view(x.shape)


def _clear_padding(rows: Tensor, key_mask: Tensor, shapes: Shapes, heads: int) -> None:
    """Zero what is no token's: what padded queries gave is dropped, so that nothing comes back."""
    masks = _split(key_mask, shapes)
    parts = _by_group(rows, shapes, heads)
    for part, mask, (n, length) in zip(parts, masks, shapes, strict=True):
        part.unflatten(0, (n, -1)).mul_(mask.view(n, 1, length, 1))
