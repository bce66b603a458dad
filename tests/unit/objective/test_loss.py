import math

import pytest
import torch
from torch.nn import functional as F

from simcse_trainer.objective.loss import contrastive_logits, find_false_negatives, info_nce


def reference(anchors, candidates, temperature, weight, masked):
    """Equation 5 of the paper, one scalar at a time."""
    total = 0.0
    size = len(anchors)
    for i in range(size):
        terms = []
        for c, column in enumerate(candidates):
            for j in range(size):
                if masked is not None and masked[i, c * size + j]:
                    continue
                logit = F.cosine_similarity(anchors[i], column[j], dim=0) / temperature
                terms.append(logit + (weight if c > 0 and i == j else 0.0))
        positive = F.cosine_similarity(anchors[i], candidates[0, i], dim=0) / temperature
        total += torch.logsumexp(torch.stack(terms), 0) - positive
    return total / size


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_loss_and_gradient_equal_the_equation(columns, weight):
    anchors = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    candidates = torch.randn(columns, 5, 4, dtype=torch.float64, requires_grad=True)
    loss = info_nce(anchors, candidates, temperature=0.1, hard_negative_weight=weight)
    expected = reference(anchors, candidates, 0.1, weight, None)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for x in (anchors, candidates):
        found = torch.autograd.grad(loss, x, retain_graph=True)[0]
        wanted = torch.autograd.grad(expected, x, retain_graph=True)[0]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_masked_candidates_are_left_out():
    anchors = torch.randn(4, 3, dtype=torch.float64)
    candidates = torch.randn(2, 4, 3, dtype=torch.float64)
    ids = torch.tensor([[1, 2, 1, 4], [5, 6, 7, 8], [9, 6, 1, 0]])
    masked = find_false_negatives(ids)
    assert masked.any()
    loss = info_nce(anchors, candidates, temperature=0.05, text_ids=ids)
    torch.testing.assert_close(loss, reference(anchors, candidates, 0.05, 0.0, masked))


def test_a_slice_of_the_anchors_has_the_rows_of_the_whole():
    anchors, candidates = torch.randn(6, 4), torch.randn(2, 6, 4)
    options = {"temperature": 0.05, "hard_negative_weight": 1.0}
    complete = contrastive_logits(anchors, candidates, **options)
    part = contrastive_logits(anchors[2:5], candidates, offset=2, **options)
    torch.testing.assert_close(part, complete[2:5])
    ids = torch.randint(0, 4, (3, 6))
    torch.testing.assert_close(
        find_false_negatives(ids, offset=2, size=3), find_false_negatives(ids)[2:5]
    )
    parts = [info_nce(anchors[i : i + 3], candidates, offset=i, **options) for i in (0, 3)]
    torch.testing.assert_close(sum(parts) / 2, info_nce(anchors, candidates, **options))


def test_equal_sentences_are_no_negatives_of_each_other():
    # Unsupervised: rows 0 and 2 are the same sentence.
    ids = torch.tensor([[1, 2, 1], [1, 2, 1]])
    expected = torch.tensor([[0, 0, 1], [0, 0, 0], [1, 0, 0]]).bool()
    assert torch.equal(find_false_negatives(ids), expected)


def test_false_negatives_of_triplets():
    #                    row 0: a text of its own everywhere; rows 1 and 2 share their anchor;
    #                    row 3's positive is row 0's positive; row 3's hard negative is its anchor
    ids = torch.tensor([[10, 11, 11, 13], [20, 21, 22, 20], [30, 31, 32, 13]])
    expected = torch.tensor(
        [
            [0, 0, 0, 1, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0, 0, 0, 1],
        ]
    ).bool()
    assert torch.equal(find_false_negatives(ids), expected)


def test_duplicates_change_the_loss_only_when_counted():
    anchors = F.normalize(torch.randn(3, 8), dim=-1)
    anchors[2] = anchors[0]
    ids = torch.tensor([[1, 2, 1], [1, 2, 1]])
    counted = info_nce(anchors, anchors[None], temperature=0.05)
    masked = info_nce(anchors, anchors[None], temperature=0.05, text_ids=ids)
    # Two equal sentences halve each other's probability: log 2 in two of three rows.
    assert counted - masked == pytest.approx(2 / 3 * math.log(2), abs=0.01)


def test_half_precision_is_raised_even_under_autocast():
    anchors, candidates = torch.randn(8, 16), torch.randn(1, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = contrastive_logits(anchors, candidates, temperature=0.05)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, contrastive_logits(anchors, candidates, temperature=0.05))
    half = contrastive_logits(anchors.bfloat16(), candidates.bfloat16(), temperature=0.05)
    assert half.dtype == torch.float32


def test_one_sentence_alone_has_no_loss():
    assert info_nce(torch.randn(1, 4), torch.randn(1, 1, 4), temperature=0.05) == 0
