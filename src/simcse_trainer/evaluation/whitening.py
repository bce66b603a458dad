"""Whitening of embeddings, after training and without labels (Su et al. 2021, BERT-whitening)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simcse_trainer.errors import InputError


@dataclass(frozen=True)
class Whitening:
    """The map x -> (x - mean) kernel.

    Attributes:
        mean: [D], the mu of the fitted sentences.
        kernel: [D, K], the W.
    """

    mean: Tensor
    kernel: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[n, D] -> [n, K], in the precision of the fit."""
        return (x.to(self.mean) - self.mean) @ self.kernel


def fit_whitening(x: Tensor) -> Whitening:
    """The map after which the embeddings x have mean zero and the identity as covariance.

    mu = mean x, Sigma = mean (x - mu)^T (x - mu) = U Lambda U^T, W = U Lambda^(-1/2) (Su et al.
    2021, algorithm 1). K is the rank of Sigma: a direction in which the sentences do not differ
    has nothing to scale. Computed in float64.

    Args:
        x: [n, D], n at least 2, not all rows equal.

    Raises:
        InputError: There are no two different rows.
    """
    x = x.double()
    if x.ndim != 2 or not bool((x != x[:1]).any()):
        raise InputError(
            f"Whitening is fitted on two or more different embeddings, found {list(x.shape)} "
            "without a difference. Give more sentences."
        )
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / len(x)
    variances, directions = torch.linalg.eigh(covariance)
    # The cut of numpy.linalg.matrix_rank, for embeddings that came in float32.
    kept = variances > variances[-1] * x.shape[1] * torch.finfo(torch.float32).eps
    return Whitening(mean, directions[:, kept] / variances[kept].sqrt())
