"""How the cosines of pairs are distributed, by how alike people find them (Gao et al. 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def score_bands(scores: Tensor, highest: float, count: int = 5) -> Tensor:
    """The band of the scale that each gold score lies in.

    Band b holds highest * b / count < score <= highest * (b + 1) / count, the lowest also 0; of
    five bands the last is that of the pairs that `alignment` is taken of.

    Args:
        scores: [n], from 0 to `highest`.
        highest: Where the scale ends.
        count: Bands of one width.

    Returns:
        [n], integers from 0.
    """
    edges = highest * torch.arange(1, count, dtype=scores.dtype, device=scores.device) / count
    return torch.bucketize(scores, edges)


def cosine_density(cosines: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
    """Density of cosines, a kernel estimate of one width everywhere.

    p(t) = 1/n sum_i N(t; c_i, h^2). A width that followed the data would show a narrow cone as
    wide as an even space.

    Args:
        cosines: [n], n at least 1; NaN where it is 0.
        grid: [G] places t.
        bandwidth: h.

    Returns:
        [G].
    """
    distances = (grid[:, None] - cosines[None]) / bandwidth
    kernel = distances.square().mul(-0.5).exp() / (bandwidth * math.sqrt(2 * math.pi))
    return kernel.mean(1)
