"""A model through all tasks: a row per way to read it, ready to print and to write as JSON."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from simcse_trainer.data.pairs import load_texts
from simcse_trainer.evaluation.models import load_readings
from simcse_trainer.evaluation.published import find_backbone
from simcse_trainer.evaluation.sts import SPACE_METRICS, Encoder
from simcse_trainer.evaluation.suite import Suite, encode_once, evaluate_suite, evaluate_whitened

_PACKAGES = ("simcse-trainer", "torch", "transformers", "scikit-learn", "sentence-transformers")


@dataclass(frozen=True)
class ResultRow:
    """One way to read a model, and what came of it.

    Attributes:
        pooling: See `Reading`.
        whitening: None, "whitened", or "whitened on" the file that it was fitted on.
        max_seq_length: In tokens.
        seconds: That encoding took; the same for all rows of one reading.
        results: From `evaluate_suite`.
        backbone: The paper's name of it, or None.
    """

    pooling: str
    whitening: str | None
    max_seq_length: int | None
    seconds: float
    results: dict[str, float]
    backbone: str | None

    @property
    def label(self) -> str:
        """What the row is called in a table."""
        return self.pooling if self.whitening is None else f"{self.pooling}, {self.whitening}"

    def as_json(self) -> dict[str, Any]:
        """Scores and space apart; NaN, which JSON does not have, as null."""
        values = {k: v if math.isfinite(v) else None for k, v in self.results.items()}
        return {
            "pooling": self.pooling,
            "whitening": self.whitening,
            "max_seq_length": self.max_seq_length,
            "encoding_seconds": round(self.seconds, 3),
            "scores": {k: v for k, v in values.items() if k not in SPACE_METRICS},
            "space": {k: v for k, v in values.items() if k in SPACE_METRICS},
        }


def evaluate_model(
    name_or_path: str,
    suite: Suite,
    *,
    pooling_modes: Sequence[str] = (),
    whitening: bool = False,
    whitening_file: Path | None = None,
    **options: Any,
) -> Iterator[ResultRow]:
    """Evaluate each reading of a model, and each again after the whitenings asked for.

    Args:
        name_or_path: See `load_readings`, as for `pooling_modes` and `options`.
        suite: The tasks.
        pooling_modes: A reading each.
        whitening: Also a row after whitening on the texts of each task.
        whitening_file: Also a row after whitening on the texts of this file.
        options: For `load_readings`.

    Raises:
        InputError: See `load_readings`, `load_texts` and `evaluate_transfer`.
    """
    fit_on = [] if whitening_file is None else load_texts(whitening_file)
    texts = [text for task in suite.texts().values() for text in task] + fit_on
    ways: dict[str | None, Callable[[Encoder, Suite], dict[str, float]]] = {None: evaluate_suite}
    if whitening:
        ways["whitened"] = evaluate_whitened
    if whitening_file is not None:
        ways[f"whitened on {whitening_file.name}"] = partial(evaluate_whitened, fit_on=fit_on)
    for reading in load_readings(name_or_path, pooling_modes=pooling_modes, **options):
        start = time.perf_counter()
        encode = encode_once(reading.encode, texts)
        seconds = time.perf_counter() - start
        length, backbone = reading.max_seq_length, find_backbone(reading.config)
        for whitened, way in ways.items():
            results = way(encode, suite)
            yield ResultRow(reading.pooling, whitened, length, seconds, results, backbone)


def write_results(
    path: Path, model: str, split: str, suite: Suite, rows: Sequence[ResultRow]
) -> None:
    """Write everything that was found as JSON, with what it depends on.

    Args:
        path: The file; its folder is made if it is not there.
        model: As it was asked for.
        split: Of the STS tasks.
        suite: The tasks.
        rows: From `evaluate_model`.
    """
    content = {
        "model": model,
        "backbone": rows[0].backbone,
        "split": split,
        "examples": suite.counts(),
        "sentences": count_sentences(suite),
        "rows": [row.as_json() for row in rows],
        "versions": _versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def count_sentences(suite: Suite) -> dict[str, int]:
    """How many there are, and how many different ones, which is how many were encoded."""
    texts = [text for task in suite.texts().values() for text in task]
    return {"all": len(texts), "different": len(set(texts))}


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
