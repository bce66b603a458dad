import pytest
import torch
from torch.nn import functional as F

from simcse_trainer.objective import label_position_before, mask_tokens, mlm_loss
from simcse_trainer.objective.mlm import MaskedTokens

OPTIONS = {"special_ids": torch.tensor([0, 1, 2]), "mask_token_id": 3, "vocab_size": 1000}


def test_shares_of_the_masking():
    ids = torch.randint(4, 1000, (400, 500))
    masked = mask_tokens(ids, probability=0.15, **OPTIONS)
    chosen = masked.labels != -100
    assert chosen.float().mean() == pytest.approx(0.15, abs=0.005)
    assert torch.equal(masked.labels[chosen], ids[chosen])
    assert torch.equal(masked.input_ids[~chosen], ids[~chosen])
    became_mask = (masked.input_ids[chosen] == 3).float().mean()
    stayed = (masked.input_ids[chosen] == ids[chosen]).float().mean()
    assert became_mask == pytest.approx(0.8, abs=0.01)
    assert stayed == pytest.approx(0.1, abs=0.01)


def test_special_tokens_are_never_chosen():
    ids = torch.randint(0, 6, (50, 50))
    masked = mask_tokens(ids, probability=0.9, **OPTIONS)
    special = ids < 3
    assert (masked.labels[special] == -100).all()
    assert torch.equal(masked.input_ids[special], ids[special])


def test_masking_repeats_with_the_global_generator():
    ids = torch.randint(4, 1000, (10, 20))
    torch.manual_seed(7)
    first = mask_tokens(ids, **OPTIONS)
    torch.manual_seed(7)
    assert torch.equal(first.input_ids, mask_tokens(ids, **OPTIONS).input_ids)


def test_a_label_moves_to_the_position_before_and_a_first_token_is_put_back():
    ids = torch.tensor([[11, 12, 13, 14, 15, 16]])
    starts = torch.tensor([[True, False, False, True, False, False]])
    masked = MaskedTokens(
        torch.tensor([[3, 12, 3, 3, 15, 3]]), torch.tensor([[11, -100, 13, 14, -100, 16]])
    )
    found = label_position_before(masked, ids, starts)
    assert found.input_ids.tolist() == [[11, 12, 3, 14, 15, 3]]
    assert found.labels.tolist() == [[-100, 13, -100, -100, 16, -100]]


def test_loss_is_the_mean_over_predicted_tokens():
    logits, labels = torch.randn(5, 9), torch.randint(0, 9, (5,))
    torch.testing.assert_close(mlm_loss(logits, labels), F.cross_entropy(logits, labels))


def test_nothing_masked_is_no_loss_rather_than_nan():
    logits = torch.randn(0, 9, requires_grad=True)
    loss = mlm_loss(logits, torch.empty(0, dtype=torch.long))
    assert loss == 0
    loss.backward()
