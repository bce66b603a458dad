"""GradCache beside what people use it with: checkpointing, LoRA, mixed precision, accumulation."""

from functools import partial

import pytest
import torch
from helpers import arrangements
from helpers.arrangements import build, compare, examples, get_gradients, one_graph, step
from peft import LoraConfig, get_peft_model


def test_gradient_checkpointing_draws_the_same_masks():
    rows = examples(1)
    trainer = build("unsupervised", True, "3", dropout=0.2)
    trainer.model.activation_checkpointing_enable()
    plain = build("unsupervised", True, None, dropout=0.2)
    compare(step(trainer, rows), one_graph(plain, rows, 3), "checkpointing")


def test_lora_beside_a_full_head():
    def with_adapter(trainer):
        torch.manual_seed(2)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        trainer.model.backbone = get_peft_model(trainer.model.backbone, config).double()
        return trainer

    rows = examples(2)
    found = step(with_adapter(build("pairs", True, "3")), rows)
    expected = step(with_adapter(build("pairs", True, None)), rows)
    compare(found, expected, "LoRA", least=38)
    assert all("lora_" in name or name.startswith("head.") for name in found[1])


@pytest.mark.parametrize("kind", ["unsupervised", "mlm"])
def test_bfloat16_autocast(kind):
    rows = examples(arrangements.KINDS[kind]["views"])
    results = []
    for chunk in (None, "3"):
        trainer = build(kind, True, chunk)
        trainer.model.float()
        # What the Trainer's own context is with --bf16 true.
        context = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
        trainer.compute_loss_context_manager = context
        loss, gradients = step(trainer, rows)
        results.append((loss, torch.cat([g.flatten() for g in gradients.values()])))
    (loss, plain), (cached_loss, cached) = results
    assert cached_loss == pytest.approx(float(loss), rel=0.02)
    assert torch.cosine_similarity(plain, cached, dim=0) > 0.999
    assert float(cached.norm() / plain.norm()) == pytest.approx(1, rel=0.02)


def test_accumulated_batches_are_averaged():
    rows = examples(2)
    gradients = []
    for chunk, batches in (("3", 1), ("3", 4), (None, 4)):
        trainer = build("pairs", True, chunk)
        trainer.current_gradient_accumulation_steps = batches
        for _ in range(batches):
            loss, _ = step(trainer, rows)
        gradients.append((loss * batches, get_gradients(trainer.model)))
    compare(gradients[1], gradients[0], "accumulation")
    compare(gradients[2], gradients[0], "plain accumulation")


def test_the_weight_of_a_loss_scaler_reaches_every_chunk():
    """fp16 multiplies the loss before backward: all gradients have to grow by it."""
    rows = examples(2)
    expected = step(build("pairs", True, "3"), rows)
    trainer = build("pairs", True, "3")
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss, **kwargs: backward(1024.0 * loss, **kwargs)
    loss, gradients = step(trainer, rows)
    compare((loss, {n: g / 1024 for n, g in gradients.items()}), expected, "scaled")
