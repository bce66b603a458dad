"""Layers that compute what torch's do, faster on a CPU; elsewhere they are torch's.

Dropout masks cost more to draw than all that they are applied to: torch draws a Bernoulli variate
an element, while here 64 random bits of the same generator serve four. Masks still follow
`torch.manual_seed`, and are drawn again for a restored state.

Linear layers in float32 go through oneDNN, as those in bfloat16 do anyway, rather than through MKL.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_STEPS = 2**16  # of a random number of 16 bits


@contextmanager
def use_cpu_kernels(module: nn.Module, enabled: bool = True) -> Iterator[None]:
    """Let the linear layers and dropouts within compute by those of this file for a while.

    Afterwards they are torch's again: what quantizes, traces or compiles a model looks at classes.

    Args:
        module: No name and no weight of it changes.
        enabled: False: change nothing. Nor is anything changed where a part of it is compiled.
    """
    layers = list(filter(_has_kernel, module.modules())) if enabled else []
    if any(map(_is_compiled, module.modules())):
        layers = []
    for layer in layers:
        layer.__class__ = _FASTER[type(layer)]
    try:
        yield
    finally:
        for layer in layers:
            if type(layer) in _TORCHS:  # an engine may have made something else of it
                layer.__class__ = _TORCHS[type(layer)]


def dropout_mask(shape: Sequence[int], p: float, dtype: torch.dtype) -> Tensor:
    """Draw a mask to multiply with, on the CPU (Srivastava et al. 2014, in the inverted form).

    Args:
        shape: The shape of the result.
        p: Share of zeros, kept to 1/65536.
        dtype: The type of the result.

    Returns:
        0, or what keeps the mean at 1: 1 / (1 - p).
    """
    dropped = round(p * _STEPS)
    if dropped >= _STEPS:
        return torch.zeros(*shape, dtype=dtype)
    size = math.prod(shape)
    bits = torch.empty(-(-size // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[:size] >= dropped - _STEPS // 2
    return kept.to(dtype).mul_(_STEPS / (_STEPS - dropped)).view(*shape)


class CPUDropout(nn.Dropout):
    """`nn.Dropout` with masks by `dropout_mask`."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x in training mode."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        return x * dropout_mask(x.shape, self.p, x.dtype)


class CPULinear(nn.Linear):
    """`nn.Linear` through oneDNN."""

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        if not _suits_onednn(x, self.weight):
            return super().forward(x)
        # Flat, for what a Function returns must be no view: some models change it in place.
        out: Tensor = _Linear.apply(x.flatten(0, -2), self.weight, self.bias)
        return out.view(*x.shape[:-1], -1)


_FASTER: dict[type[nn.Module], type[nn.Module]] = {nn.Dropout: CPUDropout, nn.Linear: CPULinear}
_TORCHS = {ours: theirs for theirs, ours in _FASTER.items()}


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _has_kernel(layer: nn.Module) -> bool:
    return type(layer) in _FASTER and not getattr(layer, "inplace", False)


def _suits_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        {type(x), type(weight)} <= {Tensor, nn.Parameter}  # nor fake, nor spread over processes
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and x.numel() > 0
        and x.dim() > 1
        and torch.backends.mkldnn.is_available()
        # What torch's own compiler calls, for want of a public name.
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        return _multiply(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _multiply(gradient, weight.T) if of_x else None,
            gradient.T @ x if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )
