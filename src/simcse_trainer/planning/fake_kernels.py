"""What fake tensors of the CPU cannot do by themselves: a GPU's kernels, and choosing by value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D


class FakeKernels(TorchFunctionMode):
    """While it is entered, fake tensors take the memory that they would take on a device.

    Args:
        gpu: Dropout keeps a byte an element, attention keeps no matrix, and layer normalisation
            under autocast is float32. Else all is as on the CPU, whose kernels are the fake ones'.
        tokens: How many True there are in a two-dimensional mask, by its shape: real tokens.
        masked: The share of True in a one-dimensional one: tokens that the auxiliary loss masks.
    """

    def __init__(self, *, gpu: bool, tokens: dict[torch.Size, int], masked: float):
        super().__init__()
        self.gpu, self.tokens, self.masked = gpu, tokens, masked

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Carry a function out, or its stand-in."""
        kwargs = kwargs or {}
        if func is Tensor.__getitem__ and getattr(args[1], "dtype", None) == torch.bool:
            return self._select(args[0], args[1])
        stand_in = _ON_A_GPU.get(func) if self.gpu else None
        return (stand_in or func)(*args, **kwargs)

    def _select(self, x: Tensor, mask: Tensor) -> Tensor:
        """Compute `x[mask]`, whose size depends on what is in the mask."""
        count = self.tokens.get(mask.shape)
        if count is None:
            count = max(1, round(self.masked * mask.numel()))
        rows = x.flatten(0, mask.ndim - 1)
        return rows.index_select(0, torch.zeros(count, dtype=torch.long))


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return x
    dropped: Tensor = torch.native_dropout(x, p, True)[0]
    return dropped


def _layer_norm(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        x = x.float()
        args = tuple(a.float() if isinstance(a, Tensor) else a for a in args)
        kwargs = {n: a.float() if isinstance(a, Tensor) else a for n, a in kwargs.items()}
    return F.layer_norm(x, *args, **kwargs)


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    out: Tensor = _FusedAttention.apply(query, key, value)
    return out


class _FusedAttention(torch.autograd.Function):
    """Memory of the flash and the memory-efficient kernel: the output, and one sum per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1]).float())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


_ON_A_GPU: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
}


# NF4 with double quantisation (Dettmers et al. 2023, section 3): blocks of 64 weights have a
# constant in 8 bits, and 256 of those one in float32; a table of each kind, and an offset.
_BLOCK, _BLOCKS = 64, 256
_TABLES = (16 + 256 + 1) * 4


def quantize_fake(backbone: nn.Module, bits: int, dtype: torch.dtype) -> None:
    """Replace all linear layers, as transformers does; the rest stays as it is.

    Args:
        backbone: Of fake tensors; changed.
        bits: In how many bits: 4 or 8.
        dtype: What 4-bit weights are computed in.
    """
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if type(child) in (nn.Linear, Conv1D):
                setattr(module, name, FakeQuantizedLinear(child, bits, dtype))


class FakeQuantizedLinear(nn.Linear):
    """Stands for `Linear4bit` (NF4, double quantisation) or `Linear8bitLt`.

    Args:
        layer: The layer whose weights are quantised.
        bits: In how many bits: 4 or 8.
        dtype: What 4-bit weights are computed in.
    """

    def __init__(self, layer: Any, bits: int, dtype: torch.dtype):
        rows, columns = layer.weight.shape
        if isinstance(layer, Conv1D):
            rows, columns = columns, rows
        super().__init__(columns, rows, bias=False, device="meta")
        self.bits, self.compute_dtype = bits, dtype
        size = rows * columns
        stored = math.ceil(size / 2) if bits == 4 else size
        self.weight = nn.Parameter(torch.empty(stored, dtype=torch.uint8), requires_grad=False)
        constants = 4 * rows
        if bits == 4:
            blocks = math.ceil(size / _BLOCK)
            constants = blocks + 4 * math.ceil(blocks / _BLOCKS) + _TABLES
        self.register_buffer("constants", torch.empty(constants, dtype=torch.uint8))
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out], in the type of x."""
        inner = x.to(self.compute_dtype) if self.bits == 4 else x
        bias = None if self.bias is None else self.bias.to(inner.dtype)
        shape = (self.out_features, self.in_features)
        out: Tensor = _FewBitLinear.apply(inner, bias, shape, self.bits == 8)
        return out.to(x.dtype)


class _FewBitLinear(torch.autograd.Function):
    """Weights are dequantised for one product at a time; 8 bits keep the input as well."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, shape: tuple[int, int], keep: bool
    ) -> Tensor:
        ctx.shape = shape
        ctx.save_for_backward(x if keep else None)
        return F.linear(x, x.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ grad.new_empty(ctx.shape), None, None, None
