"""Dropout masks at the speed of a CPU: its random numbers cost more than what they are applied to.

torch draws one Bernoulli variate an element. Here 64 random bits of the same generator serve four
elements, so that masks still follow `torch.manual_seed` and are drawn again for a restored state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_STEPS = 2**16  # of a random number of 16 bits


def dropout_mask(shape: Sequence[int], p: float, dtype: torch.dtype) -> Tensor:
    """A mask to multiply with, on the CPU (Srivastava et al. 2014, in the inverted form).

    Args:
        shape: Of the result.
        p: Share of zeros, kept to 1/65536.
        dtype: Of the result.

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


class Dropout(nn.Dropout):
    """`nn.Dropout`, of which only the source of the masks differs, and only on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of x in training mode."""
        if not self.training or self.p == 0 or x.device.type != "cpu":
            return super().forward(x)
        return x * dropout_mask(x.shape, self.p, x.dtype)


def speed_up_dropout(module: nn.Module) -> None:
    """Let every dropout layer within draw its masks by `dropout_mask`."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Dropout and not child.inplace:
                setattr(parent, name, Dropout(child.p).train(child.training))
