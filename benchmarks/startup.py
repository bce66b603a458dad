"""From the start of Python to the first training step, against sentence-transformers' trainer.

    python benchmarks/startup.py

Each side is the script that its documentation shows, in a process of its own, on the same 256
pairs; the clock stops where the trainer begins its first step. Also: how long --help takes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from measuring import add_common_options, compare, find_model, write

OURS, PEER = "simcse-trainer", "sentence-transformers"
SCRIPT = Path(__file__).parents[1] / "train_simcse.py"

_STOP = """
from transformers import TrainerCallback

class Stop(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        import os
        os._exit(0)

pairs = {
    "sent0": [f"question {i}" for i in range(256)],
    "sent1": [f"answer {i}" for i in range(256)],
}
"""
_SCRIPTS = {
    OURS: """
from datasets import Dataset
from simcse_trainer import SimCSEModel, SimCSETrainer, SimCSETrainingArguments
{stop}
trainer = SimCSETrainer(
    model=SimCSEModel.from_pretrained({model!r}),
    args=SimCSETrainingArguments(output_dir={folder!r}, report_to="none"),
    train_dataset=Dataset.from_dict(pairs),
    callbacks=[Stop()],
)
trainer.train()
raise SystemExit(1)
""",
    PEER: """
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
)
from sentence_transformers.sentence_transformer import losses
{stop}
model = SentenceTransformer({model!r})
trainer = SentenceTransformerTrainer(
    model=model,
    args=SentenceTransformerTrainingArguments(output_dir={folder!r}, report_to="none"),
    train_dataset=Dataset.from_dict(pairs),
    loss=losses.MultipleNegativesRankingLoss(model),
    callbacks=[Stop()],
)
trainer.train()
raise SystemExit(1)
""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser, rounds=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = find_model(options.model_name_or_path, Path(folder))
        sides = {
            name: partial(
                run, ["-c", script.format(stop=_STOP, model=model, folder=f"{folder}/out")]
            )
            for name, script in _SCRIPTS.items()
        }
        found: dict[str, Any] = compare(sides, options.rounds, ours=OURS, warm_up=False)
        found["--help, seconds"] = [run([str(SCRIPT), "--help"]) for _ in range(options.rounds)]
        print(f"--help: median {statistics.median(found['--help, seconds']):.2f} s")
        write(found, options)


def run(words: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
