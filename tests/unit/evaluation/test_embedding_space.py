import math

import numpy as np
import pytest
import torch
from conftest import fails

from simcse_trainer.evaluation import embedding_space
from simcse_trainer.evaluation.embedding_space import alignment, anisotropy, uniformity


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
    monkeypatch.setattr(embedding_space, "_CHUNK_ELEMENTS", elements)
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
