"""A layer and its adapter at once, and norms: the same values and gradients as theirs."""

import copy

import pytest
import torch
from helpers.tiny import DECODERS, tiny_backbone
from torch import nn
from torch.nn import functional as F
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from simcse_trainer.model.cpu.layers import (
    _draw_dropped,
    _find_offset,
    lora_linear,
    rms_norm,
    use_cpu_kernels,
)
from simcse_trainer.model.lora import add_adapter, lora_config

BOTH = (torch.float32, torch.bfloat16)


def given(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (4, 7, 12), "weight": (10, 12), "bias": (10,), "a": (3, 12), "b": (10, 3)}
    found = {n: torch.randn(s, generator=generator, dtype=dtype) for n, s in shapes.items()}
    for name in ("x", "a", "b"):
        found[name].requires_grad_()
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_an_adapted_layer_is_the_sum_of_two_products(bias):
    options = given()
    options["bias"] = options["bias"] if bias else None
    found = lora_linear(**options, scaling=0.7)
    expected = F.linear(options["x"], options["weight"], options["bias"])
    expected = expected + 0.7 * options["x"] @ options["a"].T @ options["b"].T
    torch.testing.assert_close(found, expected)
    trained = [options[name] for name in ("x", "a", "b")]
    upstream = torch.randn(found.shape, dtype=torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(found, trained, upstream),
        torch.autograd.grad(expected, trained, upstream),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_with_dropout_the_gradient_is_that_of_the_value():
    options = given()

    def compute(x, a, b):
        torch.manual_seed(3)  # the same elements are dropped each time
        return lora_linear(**options | {"x": x, "a": a, "b": b}, scaling=0.7, dropout=0.4)

    assert torch.autograd.gradcheck(compute, [options[n] for n in ("x", "a", "b")])


@pytest.mark.parametrize("p", [0.01, 0.05, 0.3, 0.8])
def test_each_element_is_dropped_with_the_same_chance_independently(p):
    torch.manual_seed(0)
    runs = torch.zeros(20_000, 50)
    for row in runs:
        row[_draw_dropped(50, p)] = 1
    spread = (p * (1 - p) / len(runs)) ** 0.5
    assert (runs.mean(0) - p).abs().max() < 4 * spread
    # A fixed number of throws would make the count of dropped elements too even.
    count = runs.sum(1)
    assert float(count.var()) == pytest.approx(50 * p * (1 - p), rel=0.05)
    assert float((torch.corrcoef(runs.T) - torch.eye(50)).abs().max()) < 0.04


def test_dropout_keeps_the_mean_and_follows_the_generator():
    x, weight = torch.ones(50, 400), torch.zeros(1, 400)
    a, b = torch.ones(1, 400), torch.ones(1, 1)
    state = torch.get_rng_state()
    first = lora_linear(x, weight, None, a, b, scaling=1 / 400, dropout=0.2)
    assert float(first.mean()) == pytest.approx(1, abs=0.02)
    assert float(first.std()) > 0.01
    torch.set_rng_state(state)
    assert torch.equal(first, lora_linear(x, weight, None, a, b, scaling=1 / 400, dropout=0.2))


@pytest.mark.parametrize("dtype", BOTH)
def test_the_gradient_has_the_dtype_of_the_adapter(dtype):
    options = given(dtype)
    for name in ("a", "b"):
        options[name] = options[name].detach().float().requires_grad_()
    found = lora_linear(**options, scaling=0.7, dropout=0.1)
    assert found.dtype == dtype
    found.sum().backward()
    assert options["a"].grad.dtype == options["b"].grad.dtype == torch.float32
    assert options["x"].grad.dtype == dtype


def adapted(family="qwen3", dtype=torch.float32, **options):
    torch.manual_seed(0)
    backbone = add_adapter(
        tiny_backbone(family).to(dtype), lora_config(r=3, alpha=3, **options)
    ).eval()
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide A's gradient
            nn.init.normal_(parameter, std=0.2)
    return backbone


def gradients(model, ids, ours):
    model.zero_grad()
    with use_cpu_kernels(model, ours):
        used = {type(m).__name__ for m in model.modules()}
        hidden = model(input_ids=ids).last_hidden_state
        (hidden.double() ** 2).sum().backward()
    found = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
    return used, hidden.detach().double(), found


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("family", DECODERS)
def test_an_adapted_decoder_computes_what_it_did(family, dtype):
    model = adapted(family, dtype, dropout=0.0)
    ids = torch.randint(5, 60, (3, 9))
    kinds = [type(module) for module in model.modules()]
    _, value, expected = gradients(model, ids, False)
    used, ours, found = gradients(model, ids, True)
    assert kinds == [type(module) for module in model.modules()]
    assert used & {"CPULinear", "CPUConv1D"} or family == "gpt2"
    _, truth, right = gradients(copy.deepcopy(model).float(), ids, False)
    assert found.keys() == expected.keys() == right.keys()
    # In bfloat16 theirs rounds as well: ours may be about as far from the truth as that.
    for one, other, exact in ((ours, value, truth), [flat(x) for x in (found, expected, right)]):
        error, usual = (float((x - exact).norm() / exact.norm()) for x in (one, other))
        assert error < 1.5 * usual + 1e-5


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def test_what_is_not_the_usual_adapter_is_left_to_peft():
    ids = torch.randint(5, 60, (3, 9))
    for model, change in (
        (adapted(use_dora=True, dropout=0.0), lambda m: None),
        (adapted(dropout=0.0), lambda m: m.base_model.disable_adapter_layers()),
        (adapted(dropout=0.0), lambda m: m.merge_adapter()),
        (adapted(dropout=0.0), lambda m: m.double()),
    ):
        change(model)
        with torch.no_grad():
            expected = model(input_ids=ids).last_hidden_state
            with use_cpu_kernels(model):
                found = model(input_ids=ids).last_hidden_state
        torch.testing.assert_close(found, expected)


def test_within_itself_nothing_changes():
    """The Trainer evaluates by `encode` while it trains."""
    model = adapted(dropout=0.0)
    kinds = [type(m) for m in model.modules()]
    with use_cpu_kernels(model):
        faster = [type(m) for m in model.modules()]
        with use_cpu_kernels(model):
            model(input_ids=torch.randint(5, 60, (1, 4)))
            assert [type(m) for m in model.modules()] == faster
        assert [type(m) for m in model.modules()] == faster
    assert [type(m) for m in model.modules()] == kinds != faster


def test_a_hook_of_a_layer_within_is_called():
    model = adapted(dropout=0.0)
    layer = next(m for n, m in model.named_modules() if n.endswith("q_proj"))
    called = []
    layer.lora_A["default"].register_forward_hook(lambda *given: called.append(given))
    with use_cpu_kernels(model), torch.no_grad():
        model(input_ids=torch.randint(5, 60, (1, 4)))
    assert len(called) == 1


@pytest.mark.parametrize(("kind", "offset"), [(LlamaRMSNorm, 0.0), (Gemma3RMSNorm, 1.0)])
@pytest.mark.parametrize("dtype", BOTH)
def test_norms_compute_what_they_did(kind, offset, dtype):
    torch.manual_seed(0)
    assert _find_offset(kind, 24, 1e-6) == offset
    layer = kind(24).to(dtype)
    nn.init.normal_(layer.weight)
    x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
    upstream = torch.randn(2, 5, 24)
    results = []
    for ours in (False, True):
        with use_cpu_kernels(layer, ours):
            assert (type(layer) is kind) is not ours
            out = layer(x)
        assert out.dtype == dtype
        results.append([out, *torch.autograd.grad(out, [x, layer.weight], upstream.to(dtype))])
    near = 1e-6 if dtype == torch.float32 else 2e-2
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=near, atol=near)


def test_the_gradient_of_a_norm_is_that_of_its_value():
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    options = {"eps": 1e-2, "atol": 1e-3, "rtol": 1e-2}  # computed in float32

    def compute(x, weight):
        return rms_norm(x, weight, eps=1e-5, offset=1.0)

    assert torch.autograd.gradcheck(compute, (x, weight), **options)


def test_a_norm_of_another_kind_is_left_as_it_is():
    class HalfRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) / 2

    class TwoRMSNorm(LlamaRMSNorm):
        def forward(self, x, gate=None):
            return super().forward(x)

    class MadeOtherwiseRMSNorm(LlamaRMSNorm):
        def __init__(self, config):
            super().__init__(config["size"])

    for layer in (HalfRMSNorm(8), TwoRMSNorm(8), MadeOtherwiseRMSNorm({"size": 8})):
        x = torch.randn(3, 8)
        expected = layer(x)
        assert _find_offset(type(layer), 8, 1e-6) is None
        with use_cpu_kernels(layer):
            assert torch.equal(layer(x), expected)
