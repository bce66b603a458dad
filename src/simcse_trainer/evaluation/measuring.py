"""A model's embedding space, measured on scored pairs: all numbers of its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from simcse_trainer.evaluation.cosine_distributions import cosine_density, score_bands
from simcse_trainer.evaluation.embedding_space import (
    anisotropy,
    effective_rank,
    singular_values,
)
from simcse_trainer.evaluation.layer_similarity import (
    MIN_CONTEXTS,
    intra_sentence_similarity,
    self_similarity,
)
from simcse_trainer.evaluation.sts import evaluate_sts, scale_of
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.model.token_states import TokenStates, encode_tokens

BANDS = 5
_GRID = torch.linspace(-1, 1, 201, dtype=torch.float64)
_BANDWIDTH = 0.03


@dataclass(frozen=True)
class Space:
    """What was measured.

    Attributes:
        metrics: Of `evaluate_sts`: correlations, alignment, uniformity, anisotropy.
        singular_values: Of all different sentences, the largest first.
        effective_rank: Of them.
        dimensions: D.
        densities: Per band of scores, from the lowest: of the cosines of its pairs at `grid`; empty
            where the band has no pair.
        pairs: Per band, how many.
        grid: Cosines.
        layers: Measure -> value after the embeddings and after each layer: `anisotropy` of all
            tokens, and adjusted for it `intra_sentence_similarity` and, where a word is in several
            sentences, `self_similarity`. Empty where the tokenizer knows no word.
    """

    metrics: Mapping[str, float]
    singular_values: Sequence[float]
    effective_rank: float
    dimensions: int
    densities: Sequence[Sequence[float]]
    pairs: Sequence[int]
    grid: Sequence[float]
    layers: Mapping[str, Sequence[float]]


def measure_space(
    model: SimCSEModel,
    tasks: Mapping[str, Any],
    *,
    batch_size: int = 128,
    show_progress_bar: bool = False,
) -> Space:
    """Measure all of it; each different sentence is encoded once, and once more for the layers.

    Args:
        model: Any SimCSE model.
        tasks: Name -> data set (or mapping of lists) of sentence1, sentence2, score.
        batch_size: Sentences per forward pass.
        show_progress_bar: On stderr.

    Raises:
        InputError: As `SimCSEModel.encode`.
    """
    texts = different_sentences(tasks)
    options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    embeddings = F.normalize(model.encode(texts, **options).double(), dim=-1)
    row = {text: number for number, text in enumerate(texts)}

    def encode(given: Sequence[str]) -> Tensor:
        return embeddings[torch.tensor([row[text] for text in given])]

    cosines, bands = [], []
    for task in tasks.values():
        cosines.append((encode(task["sentence1"]) * encode(task["sentence2"])).sum(-1))
        gold = torch.tensor(list(task["score"]), dtype=torch.float64)
        bands.append(score_bands(gold, scale_of(task["score"]), BANDS))
    by_band = [torch.cat(cosines)[torch.cat(bands) == band] for band in range(BANDS)]
    sigma = singular_values(embeddings)
    return Space(
        metrics=evaluate_sts(encode, tasks),
        singular_values=sigma.tolist(),
        effective_rank=effective_rank(sigma),
        dimensions=embeddings.shape[1],
        densities=[
            cosine_density(each, _GRID, _BANDWIDTH).tolist() if len(each) else []
            for each in by_band
        ],
        pairs=[len(each) for each in by_band],
        grid=_GRID.tolist(),
        layers=_measure_layers(encode_tokens(model, texts, batch_size=batch_size)),
    )


def different_sentences(tasks: Mapping[str, Any]) -> list[str]:
    """Of all tasks, each once."""
    sides = [task[side] for task in tasks.values() for side in ("sentence1", "sentence2")]
    return list(dict.fromkeys(text for side in sides for text in side))


def band_labels(tasks: Mapping[str, Any]) -> list[str]:
    """Each band's scores, such as "4–5", from the lowest; of scales that differ, shares in %."""
    scales = {scale_of(task["score"]) for task in tasks.values()}
    top, unit = (scales.pop(), "") if len(scales) == 1 else (100.0, " %")
    return [
        f"{low:g}–{high:g}{unit}"
        for low, high in pairwise(top * b / BANDS for b in range(BANDS + 1))
    ]


def _measure_layers(tokens: TokenStates) -> dict[str, list[float]]:
    if len(tokens.token_ids) < 2:
        return {}
    sentences = torch.arange(len(tokens.lengths)).repeat_interleave(tokens.lengths)
    # A word's contexts are sentences: where one has it twice, the first time counts.
    both = torch.stack([sentences, tokens.token_ids]).numpy()
    first = torch.from_numpy(np.unique(both, axis=1, return_index=True)[1])
    words = tokens.token_ids[first]
    measures: dict[str, Callable[[Tensor], float]] = {
        "anisotropy": anisotropy,
        "intra_sentence_similarity": lambda states: intra_sentence_similarity(
            states, tokens.lengths, adjusted=True
        ),
    }
    # Of few sentences there may be no word that is in several.
    if int(words.unique(return_counts=True)[1].max()) >= MIN_CONTEXTS:
        measures["self_similarity"] = lambda states: self_similarity(
            states[first], words, adjusted=True
        )
    return {name: [measure(s) for s in tokens.layers] for name, measure in measures.items()}
