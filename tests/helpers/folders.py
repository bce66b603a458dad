"""Kinds of model folders."""

from __future__ import annotations

from helpers.tiny import save_tiny
from simcse_trainer import SimCSEModel
from simcse_trainer.model.lora import lora_config

TEXTS = ["a man is eating food", "the dog sleeps", "a", "the big red cat runs on the small mat"]
PROMPT = "the big {text} sleeps"

# Kinds of folders: how the model is made.
KINDS = {
    "bert, cls and head": ("bert", {"pooling_mode": "cls", "mlp_only_train": False}),
    "bert, mean": ("bert", {"pooling_mode": "mean"}),
    "bert, prompt": ("bert", {"pooling_mode": "mean", "prompt": PROMPT}),
    "bert, length 1": ("bert", {"pooling_mode": "mean", "normalize_embeddings": True}),
    "roberta, two layers": ("roberta", {"pooling_mode": "avg_first_last"}),
    "modernbert, mean": ("modernbert", {"pooling_mode": "mean"}),
    "qwen3, last": ("qwen3", {}),
    "qwen3, prompt": ("qwen3", {"prompt": PROMPT}),
    "qwen3, both sides": ("qwen3", {"bidirectional_attention": True}),
    "llama, both sides": ("llama", {"bidirectional_attention": True}),
    "mistral, both sides": ("mistral", {"bidirectional_attention": True}),
    "gemma, last": ("gemma3_text", {}),
    "gemma, both sides": ("gemma3_text", {"bidirectional_attention": True}),
    "gemma, prompt": ("gemma3_text", {"bidirectional_attention": True, "prompt": PROMPT}),
    "llama, adapter": ("llama", {"lora": lora_config(r=2)}),
}


def make(folder, kind, **options):
    family, how = KINDS[kind]
    base = save_tiny(folder / "base", family)
    model = SimCSEModel.from_pretrained(base, **{"max_seq_length": 24, **how, **options})
    model.save_pretrained(folder / "saved")
    return model, folder / "saved"
