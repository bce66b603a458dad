import pytest
import torch

from simcse_trainer.model.pooling import POOLING_MODES, pool, select_layers

LENGTHS = torch.tensor([3, 1, 4])


def one_by_one(hidden, mode):
    rows = []
    for part in hidden.split(LENGTHS.tolist()):
        weights = torch.arange(1, len(part) + 1, dtype=part.dtype)[:, None]
        rows.append(
            {
                "cls": part[0],
                "lasttoken": part[-1],
                "mean": part.mean(0),
                "max": part.max(0).values,
                "weightedmean": (part * weights).sum(0) / weights.sum(),
            }[mode]
        )
    return torch.stack(rows)


@pytest.mark.parametrize("mode", ["cls", "lasttoken", "mean", "max", "weightedmean"])
def test_each_sentence_alone(mode):
    hidden = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(pool(hidden, LENGTHS, mode), one_by_one(hidden, mode))
    assert torch.autograd.gradcheck(lambda x: pool(x, LENGTHS, mode), hidden)


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_half_precision_comes_back_as_given_and_sums_in_float32(mode):
    hidden = torch.randn(300, 4).bfloat16()
    lengths = torch.tensor([299, 1])
    found = pool(hidden, lengths, mode)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, pool(hidden.float(), lengths, mode).bfloat16())


def test_layers_of_each_mode():
    layers = [torch.full((2, 2), float(i)) for i in range(5)]
    assert select_layers(layers, "mean")[0, 0] == 4
    assert select_layers(layers, "avg_top2")[0, 0] == 3.5
    assert select_layers(layers, "avg_first_last")[0, 0] == 2.5
