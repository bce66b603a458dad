"""Numbers of the original SimCSE code, reached through the public model, collator and Trainer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForMaskedLM

from simcse_trainer import SimCSEModel, SimCSETrainer, SimCSETrainingArguments
from simcse_trainer.model.heads import MLMHead, ProjectionHead
from simcse_trainer.objective import contrastive_logits
from simcse_trainer.objective.mlm import MaskedTokens
from simcse_trainer.training.dataset import SimCSECollator

POOLING = {"cls": "cls", "cls_before_pooler": "cls", "avg": "mean"}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}


def golden_cases() -> list[str]:
    # Collected before fixtures exist; without the data there is one case, and it skips.
    default = Path(__file__).parents[3] / "shared" / "golden"
    path = Path(os.environ.get("SIMCSE_GOLDEN_DIR", default), "cases.json")
    if not path.is_file():
        return ["absent"]
    return [case["name"] for case in json.loads(path.read_text())["cases"]]


@pytest.fixture(params=golden_cases())
def case(request, golden_dir):
    cases = json.loads((golden_dir / "cases.json").read_text())["cases"]
    return next(case for case in cases if case["name"] == request.param)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def close(found, expected, dtype) -> None:
    """The largest difference, relative to the largest value."""
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


def build_model(case, golden_dir, dtype, padding_free) -> SimCSEModel:
    folder = golden_dir / case["model_dir"]
    heads = load_file(folder / "heads.safetensors")
    # Stored in float32, computed in float64.
    backbone = AutoModel.from_pretrained(folder, add_pooling_layer=False).to(dtype)
    pooler, head, mlm_head = case["settings"]["pooler_type"], None, None
    if pooler == "cls":
        head = ProjectionHead(backbone.config.hidden_size).to(dtype)
        head.dense.weight.data = heads["mlp.dense.weight"].to(dtype)
        head.dense.bias.data = heads["mlp.dense.bias"].to(dtype)
    if case["settings"]["do_mlm"]:
        mlm_head = MLMHead(AutoModelForMaskedLM.from_config(backbone.config)).to(dtype)
        parameters = mlm_parameters(mlm_head)
        for name, tensor in heads.items():
            if name.startswith("lm_head."):
                parameters[name].data = tensor.to(dtype)
    return SimCSEModel(
        backbone,
        pooling_mode=POOLING.get(pooler, pooler),
        head=head,
        mlp_only_train=False,
        mlm_head=mlm_head,
        padding_free=padding_free,
    )


def mlm_parameters(mlm_head):
    """The head's parameters by the names of the original code."""
    names = {}
    for name, parameter in mlm_head.masked_lm.named_parameters(remove_duplicate=False):
        short = name.replace("cls.predictions.", "lm_head.")
        names[short.replace("decoder.bias", "bias")] = parameter
    return names


def views(case, golden_dir):
    """Token ids of each sentence, view-major, and the mask they were cut by."""
    inputs = load_file(golden_dir / case["inputs"])
    mask = inputs["attention_mask"].transpose(0, 1).bool()
    return inputs, mask


def collate(case, golden_dir, padding_free):
    inputs, mask = views(case, golden_dir)
    ids = inputs["input_ids"].transpose(0, 1)
    count = 1 if case["mode"] == "unsup" else case["num_sent"]
    examples = [
        {"input_ids": [ids[v, b][mask[v, b]].tolist() for v in range(count)]}
        for b in range(case["batch_size"])
    ]
    collator = SimCSECollator(case_pad_id(case), padding_free)
    return collator(examples)


def case_pad_id(case) -> int:
    return 1 if case["model_type"] == "roberta" else 0


def given_masking(case, golden_dir, batch):
    """The golden masked tokens in the form of this batch."""
    inputs, mask = views(case, golden_dir)

    def arrange(name, filler):
        flat = inputs[name].transpose(0, 1)[mask]
        if "attention_mask" not in batch:
            return flat[None]
        out = torch.full_like(batch["input_ids"], filler)
        out[batch["attention_mask"].bool()] = flat
        return out

    return MaskedTokens(arrange("mlm_input_ids", case_pad_id(case)), arrange("mlm_labels", -100))


@pytest.mark.parametrize("padding_free", [True, False], ids=["packed", "padded"])
def test_loss_logits_and_gradients(case, golden_dir, dtype, padding_free, tmp_path, monkeypatch):
    expected = load_file(golden_dir / case["expected_tensors"])
    settings = case["settings"]
    model = build_model(case, golden_dir, dtype, padding_free)
    assert model.padding_free is padding_free
    args = SimCSETrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        report_to="none",
        temperature=settings["temp"],
        hard_negative_weight=settings["hard_negative_weight"],
        mlm_weight=settings["mlm_weight"] if settings["do_mlm"] else 0.0,
    )
    trainer = SimCSETrainer(model, args)
    batch = collate(case, golden_dir, padding_free)
    if settings["do_mlm"]:
        monkeypatch.setattr(trainer.mlm, "_mask", lambda _: given_masking(case, golden_dir, batch))
    model.train()

    loss, output = trainer.compute_loss(model, batch, return_outputs=True)
    loss.backward()

    close(loss.detach(), case["expected"]["loss"], dtype)
    if settings["do_mlm"]:
        close(output.mlm_loss.detach(), case["expected"]["loss_mlm"], dtype)
    embeddings = output.embeddings.unflatten(0, batch["text_ids"].shape)
    logits = contrastive_logits(
        embeddings[0],
        embeddings[1:],
        temperature=settings["temp"],
        hard_negative_weight=settings["hard_negative_weight"],
    )
    close(logits.detach(), expected["logits"], dtype)
    parameters = dict(model.backbone.named_parameters())
    parameters |= {f"mlp.{n}": p for n, p in model.head.named_parameters()} if model.head else {}
    parameters |= mlm_parameters(model.mlm_head) if model.mlm_head else {}
    for name in case["grad_params"]:
        close(parameters[name].grad, expected[f"grad.{name}"], dtype)


@pytest.mark.parametrize("padding_free", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("mlp_only_train", [True, False])
def test_embeddings(case, golden_dir, dtype, padding_free, mlp_only_train):
    expected = load_file(golden_dir / case["expected_tensors"])
    model = build_model(case, golden_dir, dtype, padding_free)
    model.mlp_only_train = mlp_only_train
    model.eval()
    batch = collate(case, golden_dir, padding_free)
    shape = batch.pop("text_ids").shape
    with torch.no_grad():
        embeddings = model(**batch).embeddings.unflatten(0, shape)
    name = f"sent_emb.mlp_only_train_{str(mlp_only_train).lower()}"
    close(embeddings.transpose(0, 1), expected[name], dtype)
