"""How embeddings are spread on the unit sphere.

Functions of embeddings normalise what they are given; all compute in the precision given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from simcse_trainer.errors import InputError

# Similarities that are in memory at once.
_CHUNK_ELEMENTS = 2**22


def alignment(x: Tensor, y: Tensor) -> float:
    """Compute how close the embeddings of texts of one meaning are; lower is better, 0 is best.

    l_align = E ||f(x) - f(y)||^2 over positive pairs (Wang and Isola 2020, section 4.1.1,
    alpha = 2; Gao et al. 2021, equation 2).

    Args:
        x: [n, D], n at least 1.
        y: [n, D], row by row the positives of x.

    Raises:
        InputError: The shapes differ, or there is no pair.
    """
    if x.shape != y.shape or len(x) == 0:
        raise InputError(
            f"alignment: x is {list(x.shape)} and y is {list(y.shape)}; expected two [n, D] of one "
            "shape with n at least 1, a row per pair."
        )
    differences = F.normalize(x, dim=-1) - F.normalize(y, dim=-1)
    return float(differences.square().sum(-1).mean())


def uniformity(x: Tensor) -> float:
    """Compute how evenly embeddings cover the sphere; lower is better.

    l_uniform = log E exp(-2 ||f(x) - f(y)||^2) over distinct pairs (Wang and Isola 2020, section
    4.1.2, t = 2; Gao et al. 2021, equation 3). Quadratic in time; its memory is bounded.

    Args:
        x: [n, D], n at least 2.

    Raises:
        InputError: Fewer than two rows.
    """
    count = _check_rows(x, "uniformity")
    x = F.normalize(x, dim=-1)
    total = torch.zeros((), dtype=torch.float64)
    start = 0
    while start < count:
        rows = max(1, _CHUNK_ELEMENTS // (count - start))
        # On the sphere ||x - y||^2 = 2 - 2 cos.
        kernel = (x[start : start + rows] @ x[start:].T).sub_(1).mul_(4).exp_()
        # Each pair once, and no row with itself.
        total += kernel.triu_(diagonal=1).sum(dtype=torch.float64).cpu()
        start += rows
    return float((total / (count * (count - 1) / 2)).log())


def anisotropy(x: Tensor) -> float:
    """Compute the mean cosine of distinct embeddings: 0 for all directions alike, 1 for one.

    Ethayarajh 2019, section 3.3, over all pairs instead of a sample: the sum of all cosines is the
    squared length of the sum of all unit vectors, so it is exact and linear in time.

    Args:
        x: [n, D], n at least 2.

    Raises:
        InputError: Fewer than two rows.
    """
    count = _check_rows(x, "anisotropy")
    unit = F.normalize(x, dim=-1)
    with_itself = unit.square().sum(dtype=torch.float64)
    everything = unit.sum(0, dtype=torch.float64).square().sum()
    return float((everything - with_itself) / (count * (count - 1)))


def singular_values(x: Tensor) -> Tensor:
    """Compute how far embeddings reach along each direction of their space, the furthest first.

    The singular values of the matrix whose rows are the embeddings on the unit sphere, not centred:
    their squares sum to n, and the first one grows with the direction that all rows share (Gao et
    al. 2021, section 5).

    Args:
        x: [n, D], n at least 2.

    Returns:
        [min(n, D)], falling.

    Raises:
        InputError: Fewer than two rows.
    """
    _check_rows(x, "singular_values")
    found: Tensor = torch.linalg.svdvals(F.normalize(x, dim=-1))
    return found


def effective_rank(sigma: Tensor) -> float:
    """Compute how many directions are in use: 1 for a single one, Q where all are used alike.

    erank = exp(-sum_k p_k log p_k) with p_k = sigma_k / sum_j sigma_j (Roy and Vetterli 2007,
    definition 1).

    Args:
        sigma: [Q] singular values, not all of them 0.

    Raises:
        InputError: All are 0, or there is none.
    """
    if not (total := sigma.sum()) > 0:
        raise InputError(
            f"effective_rank: sigma is {list(sigma.shape)} and sums to {float(total)}; expected "
            "singular values of a matrix that is not 0."
        )
    return float(torch.special.entr(sigma / total).sum().exp())


def _check_rows(x: Tensor, what: str) -> int:
    if x.ndim != 2 or len(x) < 2:
        raise InputError(f"{what}: x is {list(x.shape)}; expected [n, D] with n at least 2.")
    return len(x)


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
        """Map [n, D] to [n, K], in the precision of the fit."""
        return (x.to(self.mean) - self.mean) @ self.kernel


def fit_whitening(x: Tensor) -> Whitening:
    """Fit the map after which the embeddings x have mean zero and the identity as covariance.

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
