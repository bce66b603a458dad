import numpy as np
import torch
from helpers.checks import fails

from simcse_trainer.evaluation.space import fit_whitening


def test_whitened_embeddings_have_mean_zero_and_unit_covariance():
    x = torch.randn(50, 4).double() @ torch.randn(4, 4).double() + 3
    white = fit_whitening(x)(x)
    torch.testing.assert_close(white.mean(0), torch.zeros(4).double(), atol=1e-10, rtol=0)
    torch.testing.assert_close(white.T @ white / 50, torch.eye(4).double(), atol=1e-10, rtol=0)


def test_new_embeddings_go_through_the_map_of_the_fitted_ones():
    x, new = torch.randn(30, 3).double(), torch.randn(5, 3).double()
    u, s, _ = np.linalg.svd(np.cov(x.numpy().T, bias=True))
    expected = (new.numpy() - x.numpy().mean(0)) @ (u @ np.diag(1 / np.sqrt(s)))
    found = fit_whitening(x)(new).numpy()
    # Eigenvectors have no sign and the order is another: cosines are the same.
    np.testing.assert_allclose(found @ found.T, expected @ expected.T, atol=1e-9)


def test_directions_without_variance_are_left_out():
    x = torch.randn(6, 2) @ torch.randn(2, 5)  # float32: of rank 2 up to round-off
    white = fit_whitening(x)(x)
    assert white.shape == (6, 2)
    torch.testing.assert_close(white.T @ white / 6, torch.eye(2).double(), atol=1e-5, rtol=0)


def test_nothing_to_fit_on():
    fails(lambda: fit_whitening(torch.ones(4, 3)), "different embeddings", "[4, 3]")
    fails(lambda: fit_whitening(torch.ones(1, 3)), "Give more sentences")
