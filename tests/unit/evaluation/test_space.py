import math

import numpy as np
import pytest
import torch
from helpers.checks import fails

from simcse_trainer.evaluation import space
from simcse_trainer.evaluation.space import (
    alignment,
    anisotropy,
    effective_rank,
    singular_values,
    uniformity,
)


def reference(x, y):
    """Pair by pair, as the equations are written."""
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x.numpy(), y.numpy()))
    pairs = [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
    return (
        np.mean([np.sum((a - b) ** 2) for a, b in zip(x, y, strict=True)]),
        np.log(np.mean([np.exp(-2 * np.sum((x[i] - x[j]) ** 2)) for i, j in pairs])),
        np.mean([x[i] @ x[j] for i, j in pairs]),
    )


@pytest.mark.parametrize("elements", [1, 50, 10**6], ids=["rows", "chunks", "whole"])
def test_the_equations(elements, monkeypatch):
    monkeypatch.setattr(space, "_CHUNK_ELEMENTS", elements)
    x, y = torch.randn(2, 37, 5, dtype=torch.float64) + 0.3
    given = x.clone()
    found = alignment(x, y), uniformity(x), anisotropy(x)
    assert found == pytest.approx(reference(x, y), rel=1e-12)
    assert torch.equal(x, given)
    single = alignment(x.float(), y.float()), uniformity(x.float()), anisotropy(x.float())
    assert single == pytest.approx(found, rel=1e-4, abs=1e-6)


def test_known_answers():
    axes = torch.tensor([[3.0, 0.0], [-2.0, 0.0]])
    assert alignment(axes, axes) == 0
    assert alignment(axes, -axes) == pytest.approx(4)
    assert uniformity(axes) == pytest.approx(-8)
    assert anisotropy(axes) == pytest.approx(-1)
    assert uniformity(torch.eye(5)) == pytest.approx(-4)
    assert anisotropy(torch.eye(5)) == pytest.approx(0)
    same = torch.ones(9, 4)
    assert uniformity(same) == pytest.approx(0, abs=1e-6)
    assert anisotropy(same) == pytest.approx(1)


def test_random_directions_are_as_uniform_as_theory_says():
    # E exp(-2 ||x - y||^2) over the circle is exp(-4) I0(4).
    x = torch.randn(4000, 2, dtype=torch.float64)
    assert uniformity(x) == pytest.approx(
        -4 + math.log(float(torch.special.i0(torch.tensor(4.0)))), abs=0.05
    )


def test_too_few_rows_are_named():
    fails(lambda: uniformity(torch.ones(1, 3)), "uniformity", "[1, 3]", "at least 2")
    fails(lambda: anisotropy(torch.ones(3)), "anisotropy", "[3]")
    fails(lambda: alignment(torch.ones(2, 3), torch.ones(1, 3)), "[2, 3]", "[1, 3]")
    fails(lambda: alignment(torch.ones(0, 3), torch.ones(0, 3)), "at least 1")


def test_the_spectrum_as_its_equations_are_written():
    x = torch.randn(37, 5, dtype=torch.float64) + 0.3
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True)
    eigenvalues = np.linalg.eigvalsh(unit.T @ unit)[::-1]
    sigma = singular_values(x)
    assert sigma.tolist() == pytest.approx(np.sqrt(eigenvalues), rel=1e-10)
    p = np.sqrt(eigenvalues) / np.sqrt(eigenvalues).sum()
    assert effective_rank(sigma) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-10)
    assert float(sigma.square().sum()) == pytest.approx(37)
    assert singular_values(x[:3]).shape == (3,)


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(singular_values(torch.ones(9, 4))) == pytest.approx(1, abs=1e-4)
    assert effective_rank(singular_values(torch.eye(6))) == pytest.approx(6)
    # Even on the sphere, each direction is reached alike.
    even = torch.randn(20000, 8, dtype=torch.float64)
    assert effective_rank(singular_values(even)) == pytest.approx(8, abs=0.01)


@pytest.mark.parametrize("angle", [0.1, 0.5, 1.2])
def test_a_cone_of_known_width(angle):
    """Directions at one angle from an axis, all around it."""
    around = torch.linspace(0, 2 * math.pi, 3001, dtype=torch.float64)[:-1]
    n, cos, sin = len(around), math.cos(angle), math.sin(angle)
    x = torch.stack([torch.full_like(around, cos), sin * around.cos(), sin * around.sin()], dim=1)
    # Without the n cosines of a row with itself.
    assert anisotropy(x) == pytest.approx((n * cos**2 - 1) / (n - 1), rel=1e-9)
    bessel = float(torch.special.i0(torch.tensor(4 * sin**2, dtype=torch.float64)))
    assert uniformity(x) == pytest.approx(-4 * sin**2 + math.log(bessel), abs=2e-3)
    sigma = math.sqrt(n) * torch.tensor([cos, sin / math.sqrt(2), sin / math.sqrt(2)])
    expected = sigma.sort(descending=True).values
    assert singular_values(x).tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    axis = torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64).expand(n, 3)
    assert alignment(x, axis) == pytest.approx(2 - 2 * cos, rel=1e-9)


def test_a_spectrum_of_nothing_is_refused():
    fails(lambda: singular_values(torch.ones(1, 3)), "singular_values", "[1, 3]")
    fails(lambda: effective_rank(torch.zeros(3)), "effective_rank", "[3]", "not 0")
    fails(lambda: effective_rank(torch.zeros(0)), "effective_rank", "[0]")
