"""Linear layers in 4 or 8 bits as bitsandbytes keeps and computes them, on fake tensors.

So that planning needs neither the library nor the device that it supports.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

# NF4 with double quantisation (Dettmers et al. 2023, section 3): blocks of 64 weights have a
# constant in 8 bits, and 256 of those one in float32; a table of each kind, and an offset.
_BLOCK, _BLOCKS = 64, 256
_TABLES = (16 + 256 + 1) * 4


def quantize_fake(backbone: nn.Module, bits: int, dtype: torch.dtype) -> None:
    """Replace all linear layers, as transformers does; the rest stays as it is.

    Args:
        backbone: Of fake tensors; changed.
        bits: 4 or 8.
        dtype: What 4-bit weights are computed in.
    """
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if type(child) in (nn.Linear, Conv1D):
                setattr(module, name, FakeQuantizedLinear(child, bits, dtype))


class FakeQuantizedLinear(nn.Linear):
    """Stands for `Linear4bit` (NF4, double quantisation) or `Linear8bitLt`.

    Args:
        layer: What is quantised.
        bits: 4 or 8.
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
        """[..., in] -> [..., out], in the type of x."""
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
