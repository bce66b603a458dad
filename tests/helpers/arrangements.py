"""Every way of computing one training step; importable, because processes are spawned.

The reference is the step of one process with the whole batch, plain and padded, in float64.
Dropout is off where it cannot be the same (a chunk, or a process, draws masks of its own shape);
`check_replay` has it on.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import tempfile
import traceback
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel, AutoModelForMaskedLM

from helpers.tiny import DECODERS, TINY, tiny_config, tiny_tokenizer
from simcse_trainer import SimCSEModel, SimCSETrainer, SimCSETrainingArguments
from simcse_trainer.model.heads import MLMHead, ProjectionHead, build_mlm_head
from simcse_trainer.model.io.checkpoints import validate_checkpoint
from simcse_trainer.model.lora import add_adapter, get_base_model, lora_config
from simcse_trainer.model.packing import plan_chunks, split_batch
from simcse_trainer.objective.mlm import MaskedTokens
from simcse_trainer.training.dataset import SimCSECollator

ROWS = 8
KINDS = {
    "unsupervised": {"views": 1},
    "pairs": {"views": 2},
    "hard negatives": {"views": 4, "hard_negative_weight": 0.7},
    "all terms": {
        "views": 4,
        "contrastive_directions": ["query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc"],
        "hardness_strength": 2.0,
        "false_negative_margin": 0.1,
        "alignment_weight": 0.3,
        "uniformity_weight": 0.2,
        "orthogonality_weights": [0.5, 0.7],
        "matryoshka_dims": [32, 16, 8],
    },
    "symmetric": {
        "views": 3,
        "contrastive_directions": ["query_to_doc", "doc_to_query"],
        "contrastive_partition": "per_direction",
        "hardness_strength": 5.0,
        "hardness_mode": "hard_negatives",
    },
    "the space alone": {
        "views": 2,
        "contrastive_weight": 0.0,
        "alignment_weight": 1.0,
        "uniformity_weight": 0.5,
    },
    "mlm": {"views": 2, "mlm_weight": 0.3},
    "adapted decoder": {"views": 3},
    "mntp": {"views": 2, "mlm_weight": 0.3},
    "mntp alone": {"views": 2, "mlm_weight": 0.3, "contrastive_weight": 0.0},
}
# Sentences per forward pass; None is the plain step.
CHUNKS = [None, "1", "3", "8", "1000"]
TOLERANCE = 1e-9

torch.set_num_threads(1)
# Each trainer collects garbage, which takes long in a process full of imported libraries.
gc.freeze()


def run(rank: int, world: int, splits: list[tuple[int, ...]]) -> None:
    """Check all arrangements of one number of processes."""
    for kind, padding_free in product(KINDS, (True, False)):
        check_kind(kind, padding_free, rank, splits)
        if world == 1:
            check_replay(kind, padding_free)


def in_two_processes(rank: int, ports: list[int], folder: str) -> None:
    """All of TWO_PROCESSES, one after the other: starting processes takes longer than the checks.

    Writes to FOLDER/found{rank}.json how each ended: "right", or what was wrong.
    """
    found = {}
    for port, (name, check) in zip(ports, TWO_PROCESSES.items(), strict=True):
        join(rank, 2, port)
        try:
            check(rank, folder)
        except Exception as error:
            traceback.print_exc()
            found[name] = f"{type(error).__name__}: {str(error)[:300]}"
        else:
            found[name] = "right"
        leave()
        Path(folder, f"found{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def join(rank: int, world: int, port: int) -> None:
    """What torchrun would say to this process."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update(address | {name: str(value) for name, value in ranks.items()})


def leave() -> None:
    """Be alone again."""
    if dist.is_initialized():
        dist.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)


def check_kind(kind: str, padding_free: bool, rank: int, splits: list[tuple[int, ...]]) -> None:
    rows = examples(KINDS[kind]["views"])
    expected = step(build(kind, False, None, gather=False), rows)
    for split, chunk in product(splits, CHUNKS):
        start = sum(split[:rank])
        trainer = build(kind, padding_free, chunk)
        loss, gradients = step(trainer, rows[start : start + split[rank]], average=len(split) > 1)
        compare((loss, gradients), expected, f"{kind} {padding_free=} {chunk=} {split=}")


def families(rank: int, folder: str) -> None:
    """Decoders of every family, adapted: the gradient of two processes is that of one."""
    rows, half = examples(2), ROWS // 2
    for family in DECODERS:
        expected = step(build(family, False, None, gather=False), rows)
        found = step(build(family, True, None), rows[rank * half :][:half], average=True)
        compare(found, expected, family, least=24)


def train(rank: int, world: int, folder: str) -> None:
    """Fifty steps of the Trainer; the first process keeps the weights."""
    model = build("hard negatives", True, None).model
    args = SimCSETrainingArguments(
        output_dir=folder,
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=8 // world,
        max_steps=50,
        learning_rate=1e-3,
        temperature=0.2,
        hard_negative_weight=0.7,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
    )
    data = Dataset.from_list([row for seed in range(6) for row in examples(4, seed=seed)])
    trainer = SimCSETrainer(model, args, data)
    trainer.train()
    if rank == 0:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        torch.save((model.state_dict(), losses), f"{folder}/world{world}.pt")


def keep_the_best(rank: int, folder: str) -> None:
    """Evaluate, save, rotate and load the best model, all processes alike."""
    words = ["a", "man", "is", "eating", "the", "food", "dog", "cat", "runs", "sleeps", "on", "mat"]
    pairs = {
        "sentence1": words[:6],
        "sentence2": words[6:],
        "score": [0.0, 3.0, 1.0, 5.0, 2.0, 4.0],
    }
    args = SimCSETrainingArguments(
        output_dir=f"{folder}/best",
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=4,
        max_steps=6,
        learning_rate=1e-2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        disable_tqdm=True,
    )
    model = build("pairs", True, None).model
    trainer = SimCSETrainer(model, args, Dataset.from_list(examples(2)), Dataset.from_dict(pairs))
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == Path(args.output_dir)
    assert validate_checkpoint(best) is None
    assert trainer.evaluate()["eval_avg_sts"] == trainer.state.best_metric


def check_replay(kind: str, padding_free: bool) -> None:
    """Dropout on: the chunks' embeddings in one graph, drawn in the same order, are the truth."""
    rows = examples(KINDS[kind]["views"])
    for chunk in CHUNKS[1:]:
        found = step(build(kind, padding_free, chunk, dropout=0.2), rows)
        trainer = build(kind, padding_free, None, dropout=0.2)
        compare(
            found, one_graph(trainer, rows, int(chunk)), f"replay {kind} {padding_free=} {chunk=}"
        )


def sharded(rank: int, folder: str) -> None:
    """FSDP2's `fully_shard`: the Trainer's own FSDP does not run on CPUs."""
    world = 2
    for kind, chunk in product(KINDS, (None, "3")):
        rows = examples(KINDS[kind]["views"])
        expected = step(build(kind, False, None, gather=False), rows)
        trainer = build(kind, True, chunk)
        mesh = init_device_mesh("cpu", (world,))
        base = get_base_model(trainer.model.backbone)
        for layer in base.layers if hasattr(base, "layers") else base.encoder.layer:
            fully_shard(layer, mesh=mesh)
        fully_shard(trainer.model, mesh=mesh)
        half = ROWS // world
        torch.manual_seed(1)
        batch = trainer.data_collator(rows[rank * half : (rank + 1) * half])
        loss = trainer.training_step(trainer.model, batch)
        dist.all_reduce(loss)
        found = {
            name: parameter.grad.full_tensor()
            for name, parameter in trainer.model.named_parameters()
            if parameter.grad is not None
        }
        compare((loss / world, found), expected, f"fully_shard {kind} {chunk=}")


def one_graph(trainer: SimCSETrainer, rows: list, size: int) -> tuple:
    """The chunks of GradCache without its trick: one graph holds them all."""
    model = trainer.model.train()
    inputs = trainer.data_collator(rows)
    features, text_ids = trainer.mlm.split_inputs(inputs)
    torch.manual_seed(1)
    packed = "lengths" in inputs
    lengths = inputs["lengths"] if packed else inputs["attention_mask"].sum(1)
    form = {"padding_free": packed, "grouped": "group_shapes" in inputs}
    chunks = split_batch(features, plan_chunks(lengths.tolist(), size, **form))
    states, embeddings = [], []
    for chunk in chunks:
        states.append(torch.get_rng_state())
        plain = {name: x for name, x in chunk.items() if not name.startswith("mlm_")}
        if trainer.args.uses_embeddings:
            embeddings.append(model(**plain).embeddings)
    loss = 0.0
    if trainer.args.uses_embeddings:
        loss = trainer.objective(torch.cat(embeddings).unflatten(0, text_ids.shape), text_ids)
    if trainer.args.mlm_weight:
        shares = trainer.mlm.count_masked(chunks)
        for chunk, state, (count, total) in zip(chunks, states, shares, strict=True):
            if trainer.args.uses_embeddings:
                torch.set_rng_state(state)
            output = model(**trainer.mlm.drop_unused(chunk))
            loss = loss + trainer.args.mlm_weight * output.mlm_loss * count / total
    loss.backward()
    return loss.detach(), get_gradients(model)


def step(trainer: SimCSETrainer, rows: list, *, average: bool = False) -> tuple:
    """Loss and gradients of one training step through the Trainer."""
    model = trainer.model
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if average else model
    batch = trainer.data_collator(rows)
    torch.manual_seed(1)
    loss = trainer.training_step(wrapped, batch)
    if average:
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return loss, get_gradients(model)


def get_gradients(model: SimCSEModel) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def compare(found: tuple, expected: tuple, what: str, *, least: int = 41) -> None:
    assert abs(found[0] - expected[0]) <= TOLERANCE * abs(expected[0]), what
    names = {name for name, gradient in expected[1].items() if gradient.abs().max() > 0}
    assert len(names) >= least, what
    for name in names:
        difference = (found[1][name] - expected[1][name]).abs().max()
        # The gradient of a key's bias is zero in theory: round-off of round-off.
        limit = TOLERANCE * max(float(expected[1][name].abs().max()), 1e-3)
        assert difference <= limit, f"{what}: {name} differs by {difference:.1e}"


def examples(views: int, *, seed: int = 4) -> list[dict]:
    """ShardSizes of unequal lengths; the first sentence comes twice, as its own false negative."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(ROWS):
        lengths = torch.randint(1, 9, (views,), generator=generator).tolist()
        words = [torch.randint(5, 21, (n,), generator=generator).tolist() for n in lengths]
        rows.append({"input_ids": [[2, *ids, 3] for ids in words]})
    rows[-1]["input_ids"][0] = rows[0]["input_ids"][0]
    return rows


def build(
    kind: str, padding_free: bool, chunk: str | None, *, gather: bool = True, dropout: float = 0.0
) -> SimCSETrainer:
    options = {name: value for name, value in KINDS.get(kind, {}).items() if name != "views"}
    model = copy.deepcopy(build_model(kind, padding_free, dropout))
    args = SimCSETrainingArguments(
        output_dir=tempfile.gettempdir(),
        use_cpu=True,
        report_to="none",
        temperature=0.2,
        mini_batch_size=chunk,
        gather_across_devices=gather,
        **options,
    )
    trainer = SimCSETrainer(model, args, data_collator=SimCSECollator(0, padding_free))
    trainer.current_gradient_accumulation_steps = 1
    trainer.mlm._mask = mask_by_value
    return trainer


@functools.cache
def build_model(kind: str, padding_free: bool, dropout: float) -> SimCSEModel:
    """The model before its first step: copied, because wrapping one in LoRA takes longer than a
    step."""
    torch.manual_seed(0)
    make = build_encoder
    if kind in DECODERS:
        make = functools.partial(build_decoder, family=kind)
    elif kind.startswith(("adapted", "mntp")):
        make = build_decoder
    return make(dropout, padding_free, mlm=kind.startswith("m"))


def build_encoder(dropout: float, padding_free: bool, *, mlm: bool) -> SimCSEModel:
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = tiny_config("bert", initializer_range=0.2, **rates)
    return SimCSEModel(
        AutoModel.from_config(config, add_pooling_layer=False).double(),
        tiny_tokenizer(),
        head=ProjectionHead(TINY["hidden_size"], std=0.2).double(),
        mlp_only_train=True,
        mlm_head=MLMHead(AutoModelForMaskedLM.from_config(config)).double() if mlm else None,
        padding_free=padding_free,
    )


def build_decoder(
    dropout: float, padding_free: bool, *, mlm: bool, family: str = "qwen3"
) -> SimCSEModel:
    """Attends to both sides, frozen under LoRA, with a head that trains beside it."""
    config = tiny_config(family, initializer_range=0.2)
    config.is_causal = False
    for rate in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):  # of GPT-2, which has dropout
        if hasattr(config, rate):
            setattr(config, rate, 0.0)
    backbone = add_adapter(AutoModel.from_config(config), lora_config(r=3, dropout=dropout))
    for name, parameter in backbone.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide A's gradient
            torch.nn.init.normal_(parameter, std=0.2)
    return SimCSEModel(
        backbone.double(),
        tiny_tokenizer(),
        pooling_mode="mean",
        head=ProjectionHead(TINY["hidden_size"], std=0.2).double(),
        mlp_only_train=False,
        mlm_head=build_mlm_head(config).double() if mlm else None,
        padding_free=padding_free,
    )


def mask_by_value(input_ids: torch.Tensor) -> MaskedTokens:
    """A masking that no arrangement changes: every third word of the vocabulary."""
    chosen = (input_ids >= 5) & (input_ids % 3 == 0)
    return MaskedTokens(torch.where(chosen, 4, input_ids), torch.where(chosen, input_ids, -100))


TWO_PROCESSES = {
    "even and uneven batches": lambda rank, folder: run(rank, 2, [(4, 4), (5, 3)]),
    "a sharded model": sharded,
    "decoders of every family": families,
    "the best model is kept": keep_the_best,
    "the doubled batch": lambda rank, folder: train(rank, 2, folder),
}
