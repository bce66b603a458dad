"""Masks of the asked share and scale, which follow torch's generator; products as torch's."""

import pytest
import torch
from torch import nn

from simcse_trainer.model.cpu_layers import Dropout, Linear, dropout_mask, use_cpu_kernels


@pytest.mark.parametrize("p", [0.1, 0.25, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mask_has_its_share_of_zeros_and_keeps_the_mean(p, dtype):
    torch.manual_seed(0)
    mask = dropout_mask((1001, 999), p, dtype)
    assert mask.shape == (1001, 999)
    assert mask.dtype == dtype
    # Four standard deviations of a mean of a million.
    tolerance = 4 * (p * (1 - p) / mask.numel()) ** 0.5
    assert float((mask == 0).double().mean()) == pytest.approx(p, abs=tolerance + 2**-17)
    assert mask.unique().tolist() == [0, pytest.approx(1 / (1 - p), rel=1e-4)]
    assert float(mask.double().mean()) == pytest.approx(1, abs=tolerance / (1 - p))


def test_neighbours_are_independent():
    """Four elements share a random number: each of its parts must be as good as the others."""
    torch.manual_seed(0)
    dropped = (dropout_mask((250_000, 4), 0.5, torch.float32) == 0).double()
    assert dropped.mean(0).tolist() == [pytest.approx(0.5, abs=0.004)] * 4
    off_diagonal = torch.corrcoef(dropped.T) - torch.eye(4)
    assert float(off_diagonal.abs().max()) < 0.01


def test_the_extremes():
    assert dropout_mask((5,), 1.0, torch.float32).tolist() == [0] * 5
    assert dropout_mask((5,), 0.0, torch.float32).tolist() == [1] * 5
    assert dropout_mask((0, 3), 0.1, torch.float32).shape == (0, 3)


def test_masks_follow_the_generator():
    state = torch.get_rng_state()
    first = dropout_mask((100,), 0.5, torch.float32)
    second = dropout_mask((100,), 0.5, torch.float32)
    torch.set_rng_state(state)
    assert torch.equal(dropout_mask((100,), 0.5, torch.float32), first)
    assert not torch.equal(first, second)


def test_every_dropout_layer_is_replaced_and_does_the_same():
    model = nn.Sequential(nn.Dropout(0.5), nn.ModuleDict({"a": nn.Dropout(0.1), "b": nn.GELU()}))
    model.eval()
    with use_cpu_kernels(model):
        check_dropouts(model)
    assert {type(m) for m in model.modules()} == {nn.Sequential, nn.Dropout, nn.ModuleDict, nn.GELU}


def check_dropouts(model):
    assert [type(m) for m in model.modules() if isinstance(m, nn.Dropout)] == [Dropout] * 2
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.1]
    x = torch.ones(10, 1000, requires_grad=True)
    assert torch.equal(model[0](x), x)
    model.train()
    dropped = model[0](x)
    assert dropped.unique().tolist() == [0, 2]
    dropped.sum().backward()
    assert torch.equal(x.grad, dropped)


@pytest.mark.parametrize("shape", [(1, 300, 24), (7, 24), (1, 1, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers_compute_what_they_did(shape, bias):
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    results = []
    for ours in (False, True):
        with use_cpu_kernels(layer, ours):
            assert type(layer) is (Linear if ours else nn.Linear)
            out = layer(x)
        out.square().sum().backward()
        results.append(
            [out.detach(), x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
        )
        x.grad = None
        layer.zero_grad()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_frozen_weights_get_no_gradient():
    layer = nn.Linear(8, 8).requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    with use_cpu_kernels(layer):
        layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None


def test_other_precisions_are_left_to_torch():
    layer = nn.Linear(8, 8)
    x = torch.randn(3, 8)
    with use_cpu_kernels(layer):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer.double()(x.double()).dtype == torch.float64
        assert layer.float()(torch.empty(0, 8)).shape == (0, 8)
        assert layer(x[0]).shape == (8,)
