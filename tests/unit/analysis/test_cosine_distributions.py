import numpy as np
import pytest
import torch
from torch.nn import functional as F

from simcse_trainer.analysis.space import cosine_density, score_bands


@pytest.mark.parametrize("highest", [1.0, 5.0, 10.0])
def test_a_band_holds_its_upper_edge(highest):
    fifths = torch.tensor([0, 0.5, 1, 1.01, 2, 3, 4, 4.01, 5], dtype=torch.float64)
    assert score_bands(fifths * highest / 5, highest).tolist() == [0, 0, 0, 1, 1, 2, 3, 4, 4]
    # The pairs that alignment is taken of are those of the last band.
    scores = torch.rand(1000, dtype=torch.float64) * highest
    assert torch.equal(score_bands(scores, highest) == 4, scores > 0.8 * highest)


def test_the_density_as_its_equation_is_written():
    cosines, grid = torch.rand(20, dtype=torch.float64), torch.linspace(-1, 2, 301).double()
    found = cosine_density(cosines, grid, 0.1)
    expected = [
        np.mean(np.exp(-((t - cosines.numpy()) ** 2) / 0.02) / np.sqrt(2 * np.pi * 0.01))
        for t in grid.numpy()
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-10)
    assert float(torch.trapezoid(found, grid)) == pytest.approx(1, abs=1e-6)


def test_known_densities():
    grid = torch.linspace(-1, 1, 201, dtype=torch.float64)
    # Equal embeddings: one kernel, at cosine 1.
    peak = cosine_density(torch.ones(5, dtype=torch.float64), grid, 0.02)
    assert int(peak.argmax()) == 200
    assert float(peak.max()) == pytest.approx(1 / (0.02 * np.sqrt(2 * np.pi)))
    # In three dimensions the cosine of random directions is uniform (Archimedes).
    x, y = F.normalize(torch.randn(2, 50000, 3, dtype=torch.float64), dim=-1)
    even = cosine_density((x * y).sum(-1), grid, 0.02)
    assert even[20:-20].tolist() == pytest.approx([0.5] * 161, abs=0.06)
    assert cosine_density(torch.empty(0), grid.float(), 0.02).isnan().all()
