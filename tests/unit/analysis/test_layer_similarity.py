import math

import numpy as np
import pytest
import torch
from helpers.checks import fails

from simcse_trainer.analysis.space import intra_sentence_similarity, self_similarity
from simcse_trainer.evaluation.space import anisotropy

LENGTHS = torch.tensor([1, 7, 3, 12, 6, 11])


def cos(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def reference_self_similarity(x, words, least):
    found = []
    for word in set(words):
        rows = [x[i] for i in range(len(x)) if words[i] == word]
        n = len(rows)
        if n >= least:
            pairs = [cos(rows[j], rows[k]) for j in range(n) for k in range(n) if j != k]
            found.append(sum(pairs) / (n * n - n))
    return np.mean(found)


def reference_intra(x, lengths):
    found, start = [], 0
    for n in lengths:
        tokens = x[start : start + n]
        found.append(np.mean([cos(tokens.mean(0), token) for token in tokens]))
        start += n
    return np.mean(found)


def test_the_definitions():
    states = torch.randn(40, 6, dtype=torch.float64) + 0.4
    words = torch.randint(0, 8, (40,))
    for least in (2, 5):
        expected = reference_self_similarity(states.numpy(), words.tolist(), least)
        assert self_similarity(states, words, min_contexts=least) == pytest.approx(
            expected, rel=1e-10
        )
    intra = reference_intra(states.numpy(), LENGTHS.tolist())
    assert intra_sentence_similarity(states, LENGTHS) == pytest.approx(intra, rel=1e-10)
    assert self_similarity(states, words, adjusted=True) == pytest.approx(
        self_similarity(states, words) - anisotropy(states)
    )
    assert intra_sentence_similarity(states, LENGTHS, adjusted=True) == pytest.approx(
        intra - anisotropy(states)
    )


def test_known_answers():
    words = torch.arange(40) % 4
    # One vector for everything: as alike as can be, and nothing of it due to words or sentences.
    same = torch.ones(40, 3, dtype=torch.float64)
    for adjusted, expected in ((False, 1), (True, 0)):
        assert self_similarity(same, words, adjusted=adjusted) == pytest.approx(expected)
        assert intra_sentence_similarity(same, LENGTHS, adjusted=adjusted) == pytest.approx(
            expected
        )
    # A static embedding: one direction per word, of any length.
    static = torch.eye(4, dtype=torch.float64)[words] * (1 + torch.arange(40)[:, None])
    assert self_similarity(static, words) == pytest.approx(1)
    # A sentence of n orthogonal tokens: each is at 1/sqrt(n) from their mean.
    assert intra_sentence_similarity(
        torch.eye(9, dtype=torch.float64), torch.tensor([9])
    ) == pytest.approx(1 / 3)


def test_uniform_on_the_sphere():
    states, words = torch.randn(20000, 5, dtype=torch.float64), torch.arange(20000) % 50
    assert self_similarity(states, words) == pytest.approx(0, abs=0.01)
    assert anisotropy(states) == pytest.approx(0, abs=0.01)


def test_a_cone_of_known_width():
    """Each word's contexts all around its own axis, at one angle."""
    angle, n = 0.4, 500
    around = torch.arange(n, dtype=torch.float64) * 2 * math.pi / n
    ring = [torch.full_like(around, math.cos(angle)), math.sin(angle) * around.cos()]
    cone = torch.stack([*ring, math.sin(angle) * around.sin()], dim=1)
    states, words = torch.cat([cone, -cone]), torch.tensor([0] * n + [1] * n)
    expected = (n * math.cos(angle) ** 2 - 1) / (n - 1)
    assert self_similarity(states, words) == pytest.approx(expected)
    assert intra_sentence_similarity(states, torch.tensor([n, n])) == pytest.approx(math.cos(angle))


def test_what_cannot_be_measured_is_named():
    states = torch.ones(3, 2)
    fails(lambda: self_similarity(states, torch.arange(3)), "no word is in 5 sentences")
    fails(lambda: intra_sentence_similarity(states, torch.tensor([1, 1])), "sum to 2", "3 rows")
    fails(lambda: intra_sentence_similarity(states[:0], torch.tensor([], dtype=int)), "0 lengths")
