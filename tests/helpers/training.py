"""Short training runs of a tiny model."""

from __future__ import annotations

import gc
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModel, AutoModelForMaskedLM

from helpers.tiny import WORDS, tiny_config, tiny_tokenizer
from simcse_trainer import SimCSEModel, SimCSETrainer, SimCSETrainingArguments
from simcse_trainer.model.heads import MLMHead, ProjectionHead

# Bits are those of one thread, in the processes too that tests start.
torch.set_num_threads(1)
# Each trainer collects garbage: in a process full of imported libraries that takes half a second.
gc.freeze()

ROWS = 40


def texts(offset: int) -> list[str]:
    count = len(WORDS)
    return [
        " ".join(WORDS[(i * k + offset) % count] for k in range(1, 3 + i % 6)) for i in range(ROWS)
    ]


UNSUPERVISED = Dataset.from_dict({"sent0": texts(0)})
TRIPLETS = Dataset.from_dict({"sent0": texts(0), "sent1": texts(1), "hard_neg": texts(5)})
PAIRS = {
    "sentence1": texts(0)[:12],
    "sentence2": texts(2)[:12],
    "score": [float(i % 6) for i in range(12)],
}


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def build_model(
    *, mlm: bool = False, head: bool = True, seed: int = 0, padding_free: bool = True, **config
) -> SimCSEModel:
    torch.manual_seed(seed)
    config = tiny_config("bert", initializer_range=0.1, **config)
    backbone = AutoModel.from_config(config, add_pooling_layer=False)
    mlm_head = MLMHead(AutoModelForMaskedLM.from_config(tiny_config("bert"))) if mlm else None
    return SimCSEModel(
        backbone,
        tiny_tokenizer(),
        head=ProjectionHead(32) if head else None,
        mlm_head=mlm_head,
        max_seq_length=20,
        padding_free=padding_free,
    )


def build_args(folder: Path, **options) -> SimCSETrainingArguments:
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    }
    return SimCSETrainingArguments(output_dir=str(folder), **(defaults | options))


def start(folder: Path, data=UNSUPERVISED, *, model=None, callbacks=None, **options):
    args = build_args(folder, **({"max_steps": 4} | options))
    evaluated = {"stsb": PAIRS} if options.get("eval_strategy") else None
    return SimCSETrainer(model or build_model(), args, data, evaluated, callbacks=callbacks)


BEST = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "stsb_spearman",
}
