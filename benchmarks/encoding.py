"""Encoding sentences, against sentence-transformers' `encode`: the same texts, in one run.

    python benchmarks/encoding.py --files sentences.txt pairs.csv

Four mixes of lengths are made of the texts: as they are, short ones (the first 4 words), long ones
(20 after each other), and half short, half long. Each side takes the texts in the same random
order, with its default batch size unless told otherwise. The embeddings must agree.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import add_common_options, compare, find_model, read_texts, write
from sentence_transformers import SentenceTransformer
from torch.nn import functional as F

from simcse_trainer import SimCSEModel

OURS, PEER = "simcse-trainer", "sentence-transformers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_common_options(parser, rounds=5)
    parser.add_argument("--files", nargs="+", required=True, help="training files to take texts of")
    parser.add_argument("--sentences", type=int, default=20_000)
    parser.add_argument("--mixes", nargs="+", default=list(MIXES), choices=list(MIXES))
    parser.add_argument("--max_seq_length", type=int, default=256)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.model_name_or_path = find_model(options.model_name_or_path, Path(folder))
        write(measure(options), options)


def _long(texts: list[str]) -> list[str]:
    return [" ".join(texts[i : i + 20]) for i in range(0, len(texts), 20)]


def _short(texts: list[str]) -> list[str]:
    return [" ".join(text.split()[:4]) for text in texts]


MIXES: dict[str, Callable[[list[str]], list[str]]] = {
    "as they are": list,
    "short": _short,
    "long": _long,
    "short and long": lambda texts: (
        _short(texts[: len(texts) // 2]) + _long(texts[len(texts) // 2 :])
    ),
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    ours = SimCSEModel.from_pretrained(
        options.model_name_or_path, max_seq_length=options.max_seq_length
    )
    theirs = SentenceTransformer(options.model_name_or_path)
    theirs.max_seq_length = options.max_seq_length
    texts = read_texts(options.files, options.sentences)
    results = {}
    for name in options.mixes:
        mixed = MIXES[name](texts)
        random.Random(0).shuffle(mixed)
        sides = {
            OURS: partial(take_time, partial(ours.encode, mixed)),
            PEER: partial(take_time, partial(theirs.encode, mixed, convert_to_tensor=True)),
        }
        print(f"\n{len(mixed)} texts, {name}")
        difference = largest_difference(ours, theirs, mixed[:500])  # and warms both up
        results[name] = compare(sides, options.rounds, ours=OURS, warm_up=False) | {
            "texts": len(mixed),
            "largest difference": difference,
        }
    return {"mixes": results}


def take_time(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def largest_difference(ours: SimCSEModel, theirs: SentenceTransformer, texts: list[str]) -> float:
    """Of the normalised embeddings."""
    found = F.normalize(ours.encode(texts), dim=-1)
    expected = F.normalize(torch.as_tensor(theirs.encode(texts)), dim=-1)
    return float((found - expected).abs().max())


if __name__ == "__main__":
    main()
