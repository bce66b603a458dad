"""A page and figures that show how a model's embeddings are spread, against a baseline's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment
from scipy.stats import rankdata

from simcse_trainer.analysis.figures import (
    Drawing,
    PathPoint,
    cosine_figure,
    layers_figure,
    plane_figure,
    spectrum_figure,
)
from simcse_trainer.analysis.space import EmbeddingSpaceStats, band_labels, different_sentences
from simcse_trainer.data.retrieval import RetrievalData
from simcse_trainer.evaluation.suite import bootstrap_tasks, split_tasks
from simcse_trainer.evaluation.tasks import (
    RETRIEVAL_METRICS,
    label_metric,
    split_retrieval_metric,
)
from simcse_trainer.evaluation.verdict import judge
from simcse_trainer.version import __version__

PAGE = "report.html"


@dataclass(frozen=True)
class Measured:
    """A model and its space.

    Attributes:
        name: As it is shown.
        pooling_mode: How its tokens become a sentence embedding.
        space: What `measure_space` has found.
    """

    name: str
    pooling_mode: str
    space: EmbeddingSpaceStats


@dataclass(frozen=True)
class ReportFigure:
    """A figure of the page, and of a file of its own.

    Attributes:
        file: Its name, without an ending.
        title: The text above the figure.
        caption: Below it: how to read it.
        drawing: The figure as PNG and SVG.
    """

    file: str
    title: str
    caption: str
    drawing: Drawing


def write_report(
    folder: Path,
    model: Measured,
    baseline: Measured | None,
    *,
    data: str,
    tasks: Mapping[str, Any],
    path: Sequence[PathPoint] = (),
) -> Path:
    """Write `report.html`, which needs nothing else, and each figure as a PNG.

    Args:
        folder: Made if it is not there.
        model: The one that the report is of.
        baseline: What it is compared with, measured on the same data.
        data: Names of the tasks, as they are shown.
        tasks: Name -> scored pairs, or queries and passages.
        path: Of the training run, from `read_path`.

    Returns:
        The page.

    Raises:
        InputError: matplotlib is not installed.
    """
    measured = {"baseline": baseline, "model": model} if baseline else {"model": model}
    spaces = {name: one.space for name, one in measured.items()}
    scored, searched = split_tasks(tasks)
    figures = draw_figures(spaces, band_labels(scored), path)
    template = files("simcse_trainer").joinpath("report_template.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True)
    environment.filters["short"] = shorten
    text = environment.from_string(template).render(
        model=model.name,
        pooling_mode=model.pooling_mode,
        baseline=baseline.name if baseline else "",
        baseline_pooling_mode=baseline.pooling_mode if baseline else "",
        names=list(spaces),
        data=data,
        counts=_count(tasks),
        alike=_name_alike(scored),
        rows=_table(spaces),
        figures=figures,
        points=_list_points(spaces),
        verdict=_find_verdict(spaces, tasks),
        differences=find_differences(scored, spaces),
        queries=find_query_differences(searched, spaces),
        neighbors=_list_neighbors(spaces),
        version=__version__,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        (folder / f"{figure.file}.png").write_bytes(figure.drawing.png)
    (folder / PAGE).write_text(text, encoding="utf-8")
    return folder / PAGE


# Longer texts are cut.
MAX_CHARACTERS = 160


def shorten(text: str) -> str:
    """Cut a long text, and make one line of it."""
    line = " ".join(text.split())
    return line if len(line) <= MAX_CHARACTERS else line[: MAX_CHARACTERS - 2].rstrip() + " …"


def _count(tasks: Mapping[str, Any]) -> str:
    scored, searched = split_tasks(tasks)
    parts = []
    if scored:
        pairs = sum(len(task["score"]) for task in scored.values())
        sentences = len(different_sentences(tasks))
        parts.append(f"{pairs:,} scored pairs of {sentences:,} different sentences")
    for name, task in searched.items():
        of = f" of {name}" if len(searched) > 1 else ""
        parts.append(f"{len(task.queries):,} queries among {task.passages:,} passages{of}")
    return " and ".join(parts)


def _name_alike(scored: Mapping[str, Any]) -> str:
    if scored:
        return "the pairs rated above four fifths of the scale"
    return "queries and a relevant passage of each"


def draw_figures(
    spaces: Mapping[str, EmbeddingSpaceStats], bands: Sequence[str], path: Sequence[PathPoint] = ()
) -> list[ReportFigure]:
    """Draw every figure that there is data for.

    Args:
        spaces: "model" and "baseline" -> what was measured.
        bands: Names of the bands, from `band_labels`; none without scored pairs.
        path: Of the training run.
    """
    model = spaces["model"]
    points = {
        name: (space.metrics["alignment"], space.metrics["uniformity"])
        for name, space in spaces.items()
        if {"alignment", "uniformity"} <= set(space.metrics)
    }
    figures = []
    if bands:
        figures.append(
            ReportFigure(
                "cosine_by_score",
                "Cosines by gold score",
                "The less the rows overlap, the better a cosine tells how alike two texts are; "
                "each model's heights are relative to its highest peak.",
                cosine_figure(
                    model.grid,
                    {name: space.densities for name, space in spaces.items()},
                    bands,
                    model.pairs,
                ),
            )
        )
    figures.append(
        ReportFigure(
            "singular_values",
            "Singular values of the embeddings",
            "A flat curve uses all directions of the space alike, a steep one crowds into a few; "
            f"the effective rank says how many, here of {model.dimensions:,}.",
            spectrum_figure(
                {name: space.singular_values for name, space in spaces.items()},
                {name: space.effective_rank for name, space in spaces.items()},
            ),
        )
    )
    if all(space.layers for space in spaces.values()):
        figures.append(
            ReportFigure(
                "layer_similarity",
                "Token embeddings by layer",
                "Anisotropy is the mean cosine of all tokens; what a word's embeddings have in "
                "common beyond that (self-similarity) falls as they depend more on their context, "
                "and what those of a sentence have in common grows as they come to stand for all "
                "of it.",
                layers_figure({name: space.layers for name, space in spaces.items()}),
            )
        )
    if not (points or path):
        return figures
    plane = ReportFigure(
        "alignment_uniformity",
        "Alignment and uniformity",
        "Lower is better on both axes: alignment says how far apart texts of one meaning are, "
        "uniformity how unevenly all texts are spread."
        + (" The line is the training run, on its own evaluation data." if path else ""),
        plane_figure(points, path),
    )
    return [plane, *figures]


def _table(spaces: Mapping[str, EmbeddingSpaceStats]) -> list[dict[str, str]]:
    metrics = spaces["model"].metrics
    tasks = [name for name in metrics if name.endswith("_spearman")]
    rows = {name: (name.removesuffix("_spearman"), _CORRELATION, 2) for name in tasks}
    if len(tasks) > 1:
        rows["avg_sts"] = ("mean", _CORRELATION, 2)
    searched = [name for name in metrics if split_retrieval_metric(name)]
    # One task has its own figures and the means, which are the same.
    several = len(searched) > 2 * len(RETRIEVAL_METRICS)
    rows |= {
        name: (label_metric(name), "× 100; higher is better", 2)
        for name in searched
        if several or name not in RETRIEVAL_METRICS
    }
    rows |= {
        "alignment": ("alignment", "of pairs of one meaning; lower is better", 3),
        "uniformity": ("uniformity", "of all sentences; lower is better", 3),
        "anisotropy": ("anisotropy", "mean cosine of all sentences; lower is better", 3),
    }
    table = [
        {"name": shown, "meaning": meaning}
        | {name: _number(space.metrics.get(key), digits) for name, space in spaces.items()}
        | {"change": _change({n: x.metrics.get(key) for n, x in spaces.items()}, digits)}
        for key, (shown, meaning, digits) in rows.items()
        if key in metrics
    ]
    dimensions = dict.fromkeys(f"{space.dimensions:,}" for space in spaces.values())
    meaning = f"directions in use, of {' and '.join(dimensions)}; higher is better"
    ranks = {name: f"{space.effective_rank:.1f}" for name, space in spaces.items()}
    change = {"change": _change({name: x.effective_rank for name, x in spaces.items()}, 1)}
    return [*table, {"name": "effective rank", "meaning": meaning} | ranks | change]


def _change(values: Mapping[str, float | None], digits: int) -> str:
    """Show by how much the model differs from the baseline, with its sign."""
    old, new = values.get("baseline"), values["model"]
    if old is None or new is None or not math.isfinite(new - old):
        return _number(None, digits)
    return f"{new - old:+.{digits}f}".replace("-", "−")


def _find_verdict(spaces: Mapping[str, EmbeddingSpaceStats], tasks: Mapping[str, Any]) -> str:
    if "baseline" not in spaces:
        return ""
    before, after = spaces["baseline"], spaces["model"]
    interval = bootstrap_tasks(before, after, tasks)
    return str(judge(before.metrics, after.metrics, interval=interval) or "")


@dataclass(frozen=True)
class PairDifference:
    """A pair that a model ranks otherwise than people do.

    Attributes:
        first: The first text of the pair.
        second: The second text of the pair.
        score: How alike people find the two texts.
        cosines: "model" and "baseline" -> cosine.
        closer: The model takes the two for closer than people do.
    """

    first: str
    second: str
    score: float
    cosines: Mapping[str, str]
    closer: bool


def find_differences(
    tasks: Mapping[str, Any], spaces: Mapping[str, EmbeddingSpaceStats], *, most: int = 10
) -> list[PairDifference]:
    """Find the pairs in which model and people differ most, by their ranks within their task.

    Args:
        tasks: Name -> scored pairs.
        spaces: "model" and "baseline" -> what was measured on these pairs.
        most: The most pairs to return, the furthest apart first.
    """
    found: list[tuple[float, PairDifference]] = []
    for name, task in tasks.items():
        cosines = {who: space.cosines.get(name) for who, space in spaces.items()}
        own = cosines["model"]
        if own is None:
            continue
        gold = list(task["score"])
        apart = (rankdata(own) - rankdata(gold)) / len(gold)
        for i in sorted(range(len(gold)), key=lambda i: -abs(apart[i]))[:most]:
            texts = task["sentence1"][i], task["sentence2"][i]
            shown = {who: _number(each[i], 2) for who, each in cosines.items() if each}
            pair = PairDifference(*texts, gold[i], shown, bool(apart[i] > 0))
            found.append((abs(float(apart[i])), pair))
    return [pair for _, pair in sorted(found, key=lambda item: -item[0])[:most]]


@dataclass(frozen=True)
class QueryDifference:
    """A query that a model finds the passages of better or worse than the baseline does.

    Attributes:
        query: The text that was searched with.
        relevant: A relevant passage; empty where none is in the collection.
        gains: "model", "baseline" and "change" -> nDCG@10, times 100.
        instead: "model" and "baseline" -> the passage found first, where it is not relevant.
    """

    query: str
    relevant: str
    gains: Mapping[str, str]
    instead: Mapping[str, str]


def find_query_differences(
    tasks: Mapping[str, RetrievalData],
    spaces: Mapping[str, EmbeddingSpaceStats],
    *,
    most: int = 10,
) -> list[QueryDifference]:
    """Find the queries in which model and baseline differ most; of a model alone its worst.

    Args:
        tasks: Name -> queries and passages.
        spaces: "model" and "baseline" -> what was measured on them.
        most: The most queries to return; of each task the largest difference or worst first.
    """
    found: list[tuple[float, str, int]] = []
    for name in tasks:
        new = spaces["model"].gains[name]
        old = spaces["baseline"].gains[name] if "baseline" in spaces else [1.0] * len(new)
        found += [(-abs(b - a), name, i) for i, (a, b) in enumerate(zip(old, new, strict=True))]
    chosen = [(name, i) for apart, name, i in sorted(found)[:most] if apart < 0]
    differences = []
    for name, task in tasks.items():
        rows = [i for other, i in chosen if other == name]
        if not rows:
            continue
        relevant = {i: task.first_relevant(i) for i in rows}
        first = {
            i: {who: space.rankings[name][i][0] for who, space in spaces.items()} for i in rows
        }
        texts = task.read_texts(
            {*relevant.values(), *(n for x in first.values() for n in x.values())}
        )
        differences += [
            QueryDifference(
                task.queries[i],
                texts.get(relevant[i], ""),
                _show_gains({who: space.gains[name][i] for who, space in spaces.items()}),
                {w: texts[n] for w, n in first[i].items() if n not in task.relevant[i]},
            )
            for i in rows
        ]
    return differences


def _show_gains(gains: Mapping[str, float]) -> dict[str, str]:
    scaled = {who: 100 * gain for who, gain in gains.items()}
    return {who: _number(gain, 1) for who, gain in scaled.items()} | {"change": _change(scaled, 1)}


def _list_points(spaces: Mapping[str, EmbeddingSpaceStats]) -> list[dict[str, Any]]:
    """List the sentences of the map, with their places in its frames."""
    return [
        {"text": text} | {name: _place(*space.places[text]) for name, space in spaces.items()}
        for text in spaces["model"].places
        if all(text in space.places for space in spaces.values())
    ]


def _place(x: float, y: float) -> tuple[str, str]:
    """Keep off the edges, and at the top off the frame's name."""
    return f"{0.03 + 0.94 * x:.3f}", f"{0.12 + 0.85 * y:.3f}"


def _list_neighbors(spaces: Mapping[str, EmbeddingSpaceStats]) -> list[dict[str, Any]]:
    return [
        {"query": query}
        | {
            name: [(_number(cosine, 2), text) for cosine, text in space.neighbors.get(query, ())]
            for name, space in spaces.items()
        }
        for query in spaces["model"].neighbors
    ]


_CORRELATION = "Spearman × 100; higher is better"


def _number(value: float | None, digits: int) -> str:
    return (
        "–"
        if value is None or not math.isfinite(value)
        else f"{value:.{digits}f}".replace("-", "−")
    )
