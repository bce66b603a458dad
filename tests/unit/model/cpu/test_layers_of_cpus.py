"""Masks of the asked share and scale, which follow torch's generator; products as torch's."""

import dataclasses

import pytest
import torch
from datasets import Dataset
from helpers.tiny import save_tiny, tiny_backbone, tiny_tokenizer
from torch import nn
from transformers import TrainerCallback

from simcse_trainer import SimCSEModel, SimCSETrainer, SimCSETrainingArguments
from simcse_trainer.model.cpu import layers
from simcse_trainer.model.cpu.layers import CPUDropout, CPULinear, dropout_mask

# By name, so that the tests of what broke in use run where it did.
use_cpu_kernels = getattr(layers, "use_cpu_kernels", None)


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
    assert [type(m) for m in model.modules() if isinstance(m, nn.Dropout)] == [CPUDropout] * 2
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
            assert type(layer) is (CPULinear if ours else nn.Linear)
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


def sentences(count=6, start=0):
    words = ["a", "man", "is", "eating", "the", "food", "dog", "cat", "runs", "sleeps"]
    return [" ".join(words[: 1 + (i + start) % 9]) for i in range(count)]


@pytest.mark.parametrize("family", ["longformer", "roc_bert", "big_bird", "nystromformer", "bert"])
@pytest.mark.field("26a")
def test_a_family_that_changes_what_a_layer_returns_trains(family, tmp_path):
    """Some divide queries in place: what a layer returns must not be a view."""
    changes = {"longformer": {"attention_window": 4, "pad_token_id": 0}}.get(family, {})
    model = SimCSEModel(tiny_backbone(family, **changes), tiny_tokenizer(), pooling_mode="mean")
    args = SimCSETrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True,
        per_device_train_batch_size=6, save_strategy="no",
    )  # fmt: skip
    trainer = SimCSETrainer(model, args, Dataset.from_dict({"sent0": sentences()}))
    try:
        trainer.train()
    except RuntimeError as error:
        raise AssertionError(f"{family}: {error}") from error
    assert trainer.state.log_history


@pytest.mark.field("26b")
@pytest.mark.parametrize("options", [{}, {"mini_batch_size": "3"}])
@pytest.mark.slow
def test_torch_compile_trains_and_saves(options, tmp_path):
    backbone = tiny_backbone(num_hidden_layers=1)
    model = SimCSEModel(backbone, tiny_tokenizer(), pooling_mode="mean")
    args = SimCSETrainingArguments(
        output_dir=str(tmp_path), max_steps=2, report_to=[], use_cpu=True, torch_compile=True,
        per_device_train_batch_size=6, save_strategy="no", torch_compile_backend="aot_eager",
        **options,
    )  # fmt: skip
    seen = set()

    class Look(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seen.update(type(m) for m in model.modules())

    data = Dataset.from_dict({"sent0": sentences(12)})
    trainer = SimCSETrainer(model, args, data, callbacks=[Look()])
    try:
        trainer.train()
    except Exception as error:
        raise AssertionError(f"torch_compile: {error!r}"[:500]) from error
    # The compiler sees torch's own layers, which it knows.
    assert seen
    assert not seen & {CPULinear, CPUDropout}
    assert not trainer.data_collator.grouped
    trainer.save_model()
    saved = SimCSEModel.from_pretrained(tmp_path).encode(sentences())
    torch.testing.assert_close(saved, model.encode(sentences()))


@pytest.mark.field("26c")
def test_dynamic_quantization_finds_every_linear_layer(tmp_path):
    model = SimCSEModel.from_pretrained(save_tiny(tmp_path), pooling_mode="mean")
    count = sum(isinstance(m, nn.Linear) for m in model.backbone.modules())
    expected = model.encode(sentences())
    quantized = torch.ao.quantization.quantize_dynamic(model.backbone, {nn.Linear}, torch.qint8)
    kind = torch.ao.nn.quantized.dynamic.Linear
    assert sum(isinstance(m, kind) for m in quantized.modules()) == count > 0
    model.backbone = quantized
    found = model.encode(sentences())
    assert float(torch.cosine_similarity(found, expected).min()) > 0.99
    assert not torch.equal(found, expected)


@pytest.mark.field("26d")
def test_a_loaded_model_can_be_traced(tmp_path):
    model = SimCSEModel.from_pretrained(save_tiny(tmp_path), pooling_mode="mean").eval()
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    mask = (ids != 0).long()
    backbone = model.backbone
    backbone.config.return_dict = False

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone

        def forward(self, ids, mask):
            return self.backbone(input_ids=ids, attention_mask=mask)[0]

    try:
        traced = torch.jit.trace(Hidden().eval(), (ids, mask))
    except Exception as error:
        raise AssertionError(f"jit.trace: {error!r}"[:300]) from error
    torch.testing.assert_close(traced(ids, mask), Hidden().eval()(ids, mask))
    names = {node.scopeName() for node in traced.inlined_graph.nodes()}
    assert names


@pytest.mark.field("26e")
@pytest.mark.parametrize("use", [True, False])
def test_the_kernels_are_at_work_only_while_the_trainer_or_encode_compute(use, tmp_path):
    kinds = set()
    model = SimCSEModel(tiny_backbone(), tiny_tokenizer(), pooling_mode="mean")
    layer = next(m for m in model.backbone.modules() if isinstance(m, nn.Linear))
    layer.register_forward_hook(lambda module, *_: kinds.add(type(module)))
    names = {f.name for f in dataclasses.fields(SimCSETrainingArguments)}
    assert "use_cpu_kernels" in names
    args = SimCSETrainingArguments(
        output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, use_cpu_kernels=use,
        per_device_train_batch_size=6, save_strategy="no",
    )  # fmt: skip
    trainer = SimCSETrainer(model, args, Dataset.from_dict({"sent0": sentences()}))
    assert trainer.data_collator.grouped is use
    kinds.clear()  # whether there is dropout was tried without
    trainer.train()
    trainer.encode(sentences())
    assert kinds == {CPULinear if use else nn.Linear}
    assert not [m for m in model.modules() if type(m) in (CPULinear, CPUDropout)]


@pytest.mark.field("26c")
def test_a_quantized_model_with_a_head_embeds(tmp_path):
    name = save_tiny(tmp_path)
    model = SimCSEModel.from_pretrained(name, pooling_mode="cls", mlp_only_train=False).eval()
    expected = model.encode(sentences())
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    kind = torch.ao.nn.quantized.dynamic.Linear
    assert isinstance(quantized.head.dense, kind)
    found = quantized.encode(sentences())
    assert float(torch.cosine_similarity(found, expected).min()) > 0.98


@pytest.mark.parametrize("how", ["torch.compile", "in place"])
def test_a_compiled_backbone_is_left_as_it_is(tmp_path, how):
    model = SimCSEModel.from_pretrained(save_tiny(tmp_path), pooling_mode="mean")
    expected, kinds = model.encode(sentences()), set()
    layer = next(m for m in model.backbone.modules() if isinstance(m, nn.Linear))
    layer.register_forward_hook(lambda module, *_: kinds.add(type(module)))
    if how == "in place":
        model.backbone.compile(backend="eager")
    else:
        model.backbone = torch.compile(model.backbone, backend="eager")
    torch.testing.assert_close(model.encode(sentences()), expected)
    assert kinds == {nn.Linear}
