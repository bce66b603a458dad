"""A model's embedding space, measured on evaluation data: all numbers of its report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional as F

from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.space import anisotropy, effective_rank, singular_values
from simcse_trainer.evaluation.sts import describe_space, get_scale
from simcse_trainer.evaluation.suite import encode_once, score_tasks, split_tasks
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.model.packing import build_batch
from simcse_trainer.model.progress import bar

BANDS = 5
_GRID = torch.linspace(-1, 1, 201, dtype=torch.float64)
_BANDWIDTH = 0.03


@dataclass(frozen=True)
class EmbeddingSpaceStats:
    """What was measured.

    Attributes:
        metrics: Of `evaluate_tasks`: correlations, retrieval, alignment, uniformity, anisotropy.
        singular_values: Of all different sentences, the largest first.
        effective_rank: The effective rank of the singular values.
        dimensions: D, the size of an embedding.
        densities: Per band of scores, from the lowest: of the cosines of its pairs at `grid`; empty
            where the band has no pair. No band without scored pairs.
        pairs: Per band, how many.
        grid: The cosines at which densities are given.
        layers: Measure -> value after the embeddings and after each layer: `anisotropy` of all
            tokens, and adjusted for it `intra_sentence_similarity` and, where a word is in several
            sentences, `self_similarity`. Empty where the tokenizer knows no word.
        cosines: Task -> cosine of each pair.
        neighbors: Some sentences -> the nearest others with their cosines, nearest first.
        gains: Task of retrieval -> nDCG@10 of each query, from 0 to 1.
        rankings: Task of retrieval -> for each query the numbers of the nearest passages.
        places: Some sentences -> their places on a map of two axes from 0 to 1.
    """

    metrics: Mapping[str, float]
    singular_values: Sequence[float]
    effective_rank: float
    dimensions: int
    densities: Sequence[Sequence[float]]
    pairs: Sequence[int]
    grid: Sequence[float]
    layers: Mapping[str, Sequence[float]]
    cosines: Mapping[str, Sequence[float]] = field(default_factory=dict)
    neighbors: Mapping[str, Sequence[tuple[float, str]]] = field(default_factory=dict)
    gains: Mapping[str, Sequence[float]] = field(default_factory=dict)
    rankings: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    places: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def measure_space(
    model: SimCSEModel,
    tasks: Mapping[str, Any],
    *,
    batch_size: int = 128,
    show_progress_bar: bool = False,
) -> EmbeddingSpaceStats:
    """Measure all of it; each different sentence is encoded once, and once more for the layers.

    The space is that of the scored pairs; where there are none, that of the queries and a relevant
    passage of each, which are then the pairs of one meaning.

    Args:
        model: The model whose space is measured.
        tasks: Name -> data set (or mapping of lists) of sentence1, sentence2, score; or queries
            and passages.
        batch_size: Sentences per forward pass.
        show_progress_bar: Whether to show a progress bar on stderr.

    Raises:
        InputError: For the reasons of `SimCSEModel.encode`.
    """
    pairs = list_pairs(tasks)
    texts = list(dict.fromkeys(text for side in pairs for text in side))
    encode = encode_once(
        partial(model.encode, batch_size=batch_size, show_progress_bar=show_progress_bar), texts
    )
    embeddings = F.normalize(encode(texts).double(), dim=-1)
    found = score_tasks(encode, tasks)
    scored, _ = split_tasks(tasks)
    if not scored:
        left, right = (F.normalize(encode(side).double(), dim=-1) for side in pairs)
        found.metrics.update(describe_space(embeddings, [(left, right)]))
    by_band = _split_by_band(scored, found.cosines)
    sigma = singular_values(embeddings)
    return EmbeddingSpaceStats(
        metrics=found.metrics,
        cosines=found.cosines,
        gains=found.gains,
        rankings=found.rankings,
        neighbors=_find_neighbors(embeddings, texts),
        places=_find_places(embeddings, texts),
        singular_values=sigma.tolist(),
        effective_rank=effective_rank(sigma),
        dimensions=embeddings.shape[1],
        densities=[
            cosine_density(each, _GRID, _BANDWIDTH).tolist() if len(each) else []
            for each in by_band
        ],
        pairs=[len(each) for each in by_band],
        grid=_GRID.tolist(),
        layers=_measure_layers(
            encode_tokens(model, texts, batch_size=batch_size, show_progress_bar=show_progress_bar),
            show_progress_bar,
        ),
    )


def _split_by_band(
    tasks: Mapping[str, Any], cosines: Mapping[str, Sequence[float]]
) -> list[Tensor]:
    if not tasks:
        return []
    found, bands = [], []
    for name, task in tasks.items():
        found.append(torch.tensor(cosines[name], dtype=torch.float64))
        gold = torch.tensor(list(task["score"]), dtype=torch.float64)
        bands.append(score_bands(gold, get_scale(task["score"]), BANDS))
    return [torch.cat(found)[torch.cat(bands) == band] for band in range(BANDS)]


# Sentences at even distances whose neighbours are found, and how many.
_QUERIES, _NEIGHBORS = 5, 3


def _find_neighbors(embeddings: Tensor, texts: Sequence[str]) -> dict[str, list[tuple[float, str]]]:
    count = min(_QUERIES, len(texts))
    found = {}
    for query in (i * len(texts) // count for i in range(count)):
        cosines = embeddings @ embeddings[query]
        cosines[query] = -2.0
        best = cosines.topk(min(_NEIGHBORS, len(texts) - 1))
        pairs = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        found[texts[query]] = [(cosine, texts[i]) for cosine, i in pairs]
    return found


# Sentences of the map, at even distances: more cover each other.
_MAPPED = 200


def _find_places(embeddings: Tensor, texts: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Place neighbours beside each other (t-SNE), beginning with the two principal components."""
    count = min(_MAPPED, len(texts))
    rows = [i * len(texts) // count for i in range(count)]
    # The gradient is of a few sentences: of fewer than these there is no map.
    if count < 8:
        return {}
    chosen = embeddings[rows]
    centred = chosen - chosen.mean(0)
    start = centred @ torch.linalg.svd(centred, full_matrices=False).Vh[:2].T
    start *= 1e-4 / start.std().clamp(min=1e-12)
    tsne = TSNE(
        perplexity=min(30.0, (count - 1) / 3),
        metric="cosine",
        init=start.float().numpy(),
        random_state=0,
    )
    found = tsne.fit_transform(chosen.numpy())
    low, high = found.min(0), found.max(0)
    places = (found - low) / np.maximum(high - low, 1e-12)
    return {texts[row]: (float(x), float(y)) for row, (x, y) in zip(rows, places, strict=True)}


def different_sentences(tasks: Mapping[str, Any]) -> list[str]:
    """Return the sentences of the space, each once."""
    return list(dict.fromkeys(text for side in list_pairs(tasks) for text in side))


# Of more queries every n-th stands for all in the space.
_MOST_QUERIES = 4096


def list_pairs(tasks: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """List both sides of the scored pairs, or else queries and a relevant passage of each.

    Raises:
        InputError: No relevant passage is in the collection.
    """
    scored, searched = split_tasks(tasks)
    first = [text for task in scored.values() for text in task["sentence1"]]
    second = [text for task in scored.values() for text in task["sentence2"]]
    for task in () if scored else searched.values():
        count = min(_MOST_QUERIES, len(task.queries))
        rows = [i * len(task.queries) // count for i in range(count)]
        wanted = [task.first_relevant(row) for row in rows]
        texts = task.read_texts(set(wanted))
        there = [(task.queries[r], texts[n]) for r, n in zip(rows, wanted, strict=True) if n >= 0]
        first += [query for query, _ in there]
        second += [passage for _, passage in there]
    if not first:
        raise InputError(
            f"{', '.join(searched)}: none of the relevant passages is in the collection. Check "
            "that corpus-id in qrels and _id in corpus.jsonl are the same ids."
        )
    return first, second


def band_labels(tasks: Mapping[str, Any]) -> list[str]:
    """Name each band by its scores, such as "4–5", from the lowest; of scales that differ, in %.

    Args:
        tasks: Name -> scored pairs; of none there is no band.
    """
    scales = {get_scale(task["score"]) for task in tasks.values()}
    if not scales:
        return []
    top, unit = (scales.pop(), "") if len(scales) == 1 else (100.0, " %")
    return [
        f"{low:g}–{high:g}{unit}"
        for low, high in pairwise(top * b / BANDS for b in range(BANDS + 1))
    ]


def _measure_layers(tokens: TokenStates, show_progress_bar: bool) -> dict[str, list[float]]:
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
    total = len(measures) * len(tokens.layers)
    found: dict[str, list[float]] = {name: [] for name in measures}
    with bar(label="Measuring layers", total=total, unit="layer", show=show_progress_bar) as done:
        for name, measure in measures.items():
            for states in tokens.layers:
                found[name].append(measure(states))
                done.update()
    return found


# Ethayarajh 2019 leaves out words that are in fewer contexts.
MIN_CONTEXTS = 5


def self_similarity(
    states: Tensor, words: Tensor, *, min_contexts: int = MIN_CONTEXTS, adjusted: bool = False
) -> float:
    """Return how alike one word's embeddings are in its different contexts, as a mean over words.

    SelfSim(w) = 1 / (n^2 - n) sum_j sum_{k != j} cos(f(s_j, i_j), f(s_k, i_k)) over the n contexts
    of w (definition 1). The sum is the squared length of the sum of the unit vectors less n, so
    that it is linear in time.

    Args:
        states: [T, D] of one layer.
        words: [T] integers, equal where the word is; once per sentence, as the definition has it.
        min_contexts: Words with fewer are left out; at least 2.
        adjusted: Subtract the layer's anisotropy, the mean cosine of all tokens: what is left is
            due to the word (section "Adjusting for Anisotropy").

    Raises:
        InputError: No word is in so many contexts.
    """
    unit = F.normalize(states, dim=-1)
    _, row, contexts = words.unique(return_inverse=True, return_counts=True)
    sums = unit.new_zeros(len(contexts), unit.shape[1]).index_add_(0, row, unit)
    frequent = contexts >= max(2, min_contexts)
    if not frequent.any():
        raise InputError(
            f"self_similarity: no word is in {min_contexts} sentences or more. Give more sentences."
        )
    n = contexts[frequent].to(unit.dtype)
    found = float(((sums[frequent].square().sum(-1) - n) / (n * (n - 1))).mean())
    return found - anisotropy(states) if adjusted else found


def intra_sentence_similarity(states: Tensor, lengths: Tensor, *, adjusted: bool = False) -> float:
    """Return how close the tokens of a sentence are to its mean, as a mean over sentences.

    IntraSim(s) = 1/n sum_i cos(s, f(s, i)) with s = 1/n sum_i f(s, i) (definition 2).

    Args:
        states: [T, D] of one layer.
        lengths: [N] tokens of each sentence, at least 1; they sum to T.
        adjusted: As `self_similarity` takes it.

    Raises:
        InputError: The lengths do not sum to T, or there is none.
    """
    if len(lengths) == 0 or int(lengths.sum()) != len(states):
        raise InputError(
            f"intra_sentence_similarity: {len(lengths)} lengths sum to {int(lengths.sum())}; "
            f"expected the {len(states)} rows of states."
        )
    means = torch.segment_reduce(states, "mean", lengths=lengths)
    each = means.repeat_interleave(lengths, dim=0, output_size=len(states))
    cosines = F.cosine_similarity(states, each, dim=-1)
    found = float(torch.segment_reduce(cosines, "mean", lengths=lengths).mean())
    return found - anisotropy(states) if adjusted else found


def score_bands(scores: Tensor, highest: float, count: int = 5) -> Tensor:
    """Return the band of the scale that each gold score is in.

    Band b holds highest * b / count < score <= highest * (b + 1) / count, the lowest also 0; of
    five bands the last is that of the pairs that `alignment` is taken of.

    Args:
        scores: [n], from 0 to `highest`.
        highest: Where the scale ends.
        count: Bands of one width.

    Returns:
        [n], integers from 0.
    """
    edges = highest * torch.arange(1, count, dtype=scores.dtype, device=scores.device) / count
    return torch.bucketize(scores, edges)


def cosine_density(cosines: Tensor, grid: Tensor, bandwidth: float) -> Tensor:
    """Estimate the density of cosines, with a kernel of one width everywhere.

    p(t) = 1/n sum_i N(t; c_i, h^2). A width that followed the data would show a narrow cone as
    wide as an even space.

    Args:
        cosines: [n], n at least 1; NaN where it is 0.
        grid: [G], the places t of the density.
        bandwidth: h, the width of the kernel.

    Returns:
        [G].
    """
    distances = (grid[:, None] - cosines[None]) / bandwidth
    kernel = distances.square().mul(-0.5).exp() / (bandwidth * math.sqrt(2 * math.pi))
    return kernel.mean(1)


@dataclass(frozen=True)
class TokenStates:
    """The T tokens of N sentences, one sentence after the other.

    Attributes:
        layers: [T, D] of the embedding output and of each layer; float32, on the CPU.
        token_ids: [T], the id of each token.
        lengths: [N], at least 1; they sum to T.
    """

    layers: list[Tensor]
    token_ids: Tensor
    lengths: Tensor


@torch.no_grad()
def encode_tokens(
    model: SimCSEModel,
    sentences: Sequence[str],
    *,
    max_values: int = 2**28,
    batch_size: int = 128,
    show_progress_bar: bool = False,
) -> TokenStates:
    """Return the states of every layer, without special tokens: those are no words.

    The model is in evaluation mode meanwhile. Sentences of which no token is left are left out.

    Args:
        model: The model whose space is measured.
        sentences: Texts; those over `model.max_seq_length` tokens are cut.
        max_values: Numbers to keep; of more sentences every n-th is taken, the same every time.
        batch_size: Sentences per forward pass.
        show_progress_bar: Whether to show a progress bar on stderr.
    """
    token_ids = model.tokenize(sentences)
    per_token = (model.config.num_hidden_layers + 1) * model.config.hidden_size
    fraction = min(1.0, max_values / (per_token * max(1, sum(map(len, token_ids)))))
    kept = max(1, int(fraction * len(token_ids)))
    token_ids = [token_ids[i * len(token_ids) // kept] for i in range(min(kept, len(token_ids)))]
    token_ids.sort(key=len)
    special = torch.tensor(sorted(set(getattr(model.tokenizer, "all_special_ids", []))))
    was_training = model.training
    model.eval()
    ids, lengths, layers = [], [], []
    try:
        starts = range(0, len(token_ids), batch_size)
        for start in bar(starts, "Reading hidden states", unit="batch", show=show_progress_bar):
            rows = token_ids[start : start + batch_size]
            batch = build_batch(
                rows, padding_free=model.padding_free, pad_token_id=model.pad_token_id
            )
            flat = torch.tensor([token for row in rows for token in row])
            words = ~torch.isin(flat, special)
            on_device = {name: tensor.to(model.device) for name, tensor in batch.items()}
            layers.append([s.cpu()[words].float() for s in model.hidden_states(**on_device)])
            ids.append(flat[words])
            lengths += [int(part.sum()) for part in words.split([len(row) for row in rows])]
    finally:
        model.train(was_training)
    counts = torch.tensor([length for length in lengths if length])
    return TokenStates(
        [torch.cat(layer) for layer in zip(*layers, strict=True)], torch.cat(ids), counts
    )
