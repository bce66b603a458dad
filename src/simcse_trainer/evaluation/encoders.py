"""Any folder or Hub model as an encoder of texts, with what is to be said of it.

A trained folder says how it is read. A plain backbone is read by any pooling mode, as a baseline,
and what only sentence-transformers can compute is computed by it.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from simcse_trainer.data.pairs import load_texts
from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.mteb_tasks import describe_tasks, evaluate_mteb
from simcse_trainer.evaluation.published import find_backbone
from simcse_trainer.evaluation.retrieval import evaluate_retrieval
from simcse_trainer.evaluation.sts import SPACE_METRICS, Encoder
from simcse_trainer.evaluation.suite import Suite, encode_once, evaluate_suite, evaluate_whitened
from simcse_trainer.model.encoding import check_device
from simcse_trainer.model.finite import is_finite, not_finite
from simcse_trainer.model.io.layout import UnsupportedModulesError
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.model.pooling import POOLING_MODES
from simcse_trainer.model.progress import is_watched


@dataclass(frozen=True)
class PoolingVariant:
    """A way to read a model.

    Attributes:
        pooling: A pooling mode, and whether a head follows; or who computes it instead.
        encode: Texts to embeddings [n, D].
        max_seq_length: In tokens, special ones included.
        config: The backbone's, where there is one.
    """

    pooling: str
    encode: Encoder
    max_seq_length: int | None
    config: Any


def load_readings(
    name_or_path: str,
    *,
    pooling_modes: Sequence[str] = (),
    batch_size: int = 128,
    device: str | None = None,
    **options: Any,
) -> Iterator[PoolingVariant]:
    """Load a model once, and read it in one way or several.

    Args:
        name_or_path: A folder, or a name on the Hub.
        pooling_modes: Read the backbone by each of these, without a head. By default as the
            folder says; a plain backbone then by `cls`.
        batch_size: Sentences per forward pass.
        device: Where to compute; by default a GPU, else the CPU.
        options: For `SimCSEModel.from_pretrained`: max_seq_length, revision, ...

    Raises:
        InputError: An unknown mode, no model there, or one that needs sentence-transformers.
    """
    for mode in pooling_modes:
        if mode not in POOLING_MODES:
            raise InputError(
                f"pooling_mode is '{mode}'; expected one of {', '.join(POOLING_MODES)}."
            )
    plain: dict[str, Any] = (
        {"pooling_mode": pooling_modes[0], "projection_head": "none"} if pooling_modes else {}
    )
    try:
        model = SimCSEModel.from_pretrained(name_or_path, **options, **plain)
    except UnsupportedModulesError as error:
        if pooling_modes:
            raise InputError(
                f"{_cause(error)} Leave out --pooling_mode to read it as its folder says."
            ) from error
        place = _device(device)
        yield _through_sentence_transformers(name_or_path, error, batch_size, place, **options)
        return
    model.to(_device(device))
    for mode in dict.fromkeys(pooling_modes or [model.pooling_mode]):
        model.pooling_mode = mode
        headed = model.head is not None and model.mlp_only_train is False
        yield PoolingVariant(
            mode + (" + head" if headed else ""),
            partial(model.encode, batch_size=batch_size, show_progress_bar=is_watched()),
            model.max_seq_length,
            model.config,
        )


def _through_sentence_transformers(
    name_or_path: str,
    error: UnsupportedModulesError,
    batch_size: int,
    device: torch.device,
    max_seq_length: int | None = None,
    **options: Any,
) -> PoolingVariant:
    if find_spec("sentence_transformers") is None:
        raise InputError(
            f"{_cause(error)} sentence-transformers can read it. "
            "Run: pip install sentence-transformers"
        ) from error
    from sentence_transformers import SentenceTransformer

    names = ("dtype", "attn_implementation", "base_model")
    given = {name: options.pop(name) for name in names if name in options}
    if "base_model" in given:
        raise InputError(f"{_cause(error)} Leave out --base_model.") from error
    options |= {"model_kwargs": given} if given else {}
    try:
        model = SentenceTransformer(name_or_path, device=str(device), **options)
    except (OSError, ValueError, ImportError) as failure:
        reason = str(failure).strip().splitlines()[0]
        raise InputError(f"{_cause(error)} Nor does sentence-transformers: {reason}") from failure
    if max_seq_length is not None:
        model.max_seq_length = max_seq_length

    def encode(texts: Sequence[str]) -> Tensor:
        found: Tensor = model.encode(
            list(texts),
            batch_size=batch_size,
            convert_to_tensor=True,
            show_progress_bar=is_watched(),
        )
        if not is_finite(found):
            raise not_finite("An embedding", found.dtype)
        return found.cpu().float()

    config = getattr(model[0], "config", None)
    return PoolingVariant("sentence-transformers", encode, model.max_seq_length, config)


def _cause(error: UnsupportedModulesError) -> str:
    return str(error).removesuffix(" Use another checkpoint.")


def _device(name: str | None) -> torch.device:
    return check_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


_PACKAGES = (
    "simcse-trainer",
    "torch",
    "transformers",
    "scikit-learn",
    "sentence-transformers",
    "mteb",
)


@dataclass(frozen=True)
class ResultRow:
    """One way to read a model, and what came of it.

    Attributes:
        pooling: How it was pooled, see `PoolingVariant`.
        whitening: None, "whitened", or "whitened on" the file that it was fitted on.
        max_seq_length: The length at which texts are cut, in tokens.
        seconds: That encoding took; the same for all rows of one reading.
        results: The scores, from `evaluate_suite`.
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
        """Return scores and space apart; NaN, which JSON does not have, as null."""
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
        suite: The tasks to evaluate on.
        pooling_modes: Pooling modes to evaluate, a row each.
        whitening: Also a row after whitening on the texts of each task.
        whitening_file: Also a row after whitening on the texts of this file.
        options: What `load_readings` passes on to loading.

    Raises:
        InputError: See `load_readings`, `load_texts` and `evaluate_transfer`.
    """
    others = [*suite.retrieval, *suite.mteb]
    if others and (whitening or whitening_file is not None):
        raise InputError(
            "Whitening is fitted on the texts of STS and transfer tasks; leave out --whitening and "
            f"--whitening_file, or the tasks of retrieval and of --mteb: {', '.join(others)}."
        )
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
            if suite.retrieval:
                results |= evaluate_retrieval(reading.encode, reading.encode, suite.retrieval)
            if suite.mteb:
                results |= evaluate_mteb(reading.encode, suite.mteb)
            yield ResultRow(reading.pooling, whitened, length, seconds, results, backbone)


def write_results(
    path: Path, model: str, split: str, suite: Suite, rows: Sequence[ResultRow]
) -> None:
    """Write everything that was found as JSON, with what it depends on.

    Args:
        path: The file; its folder is made if it is not there.
        model: As it was asked for.
        split: Of the STS tasks.
        suite: The tasks to evaluate on.
        rows: The rows, from `evaluate_model`.
    """
    content = {
        "model": model,
        "backbone": rows[0].backbone,
        "split": split,
        "examples": suite.counts(),
        "mteb": describe_tasks(suite.mteb),
        "sentences": count_sentences(suite),
        "rows": [row.as_json() for row in rows],
        "versions": _versions(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def count_sentences(suite: Suite) -> dict[str, int]:
    """Count the sentences, and the different ones, which are those that were encoded."""
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
