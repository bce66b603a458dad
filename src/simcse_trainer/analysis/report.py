"""A page and figures that show how a model's embeddings are spread, against a baseline's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment

from simcse_trainer.analysis.figures import (
    Drawing,
    PathPoint,
    cosine_figure,
    layers_figure,
    plane_figure,
    spectrum_figure,
)
from simcse_trainer.analysis.space import EmbeddingSpaceStats
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
    sentences: int,
    bands: Sequence[str],
    path: Sequence[PathPoint] = (),
) -> Path:
    """Write `report.html`, which needs nothing else, and each figure as a PNG.

    Args:
        folder: Made if it is not there.
        model: The one that the report is of.
        baseline: What it is compared with, measured on the same data.
        data: What it was measured on, in words.
        sentences: How many different ones.
        bands: Names of the bands, from `band_labels`.
        path: Of the training run, from `read_path`.

    Returns:
        The page.

    Raises:
        InputError: matplotlib is not installed.
    """
    measured = {"baseline": baseline, "model": model} if baseline else {"model": model}
    spaces = {name: one.space for name, one in measured.items()}
    figures = draw_figures(spaces, bands, path)
    template = files("simcse_trainer").joinpath("report_template.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template)
    text = page.render(
        model=model.name,
        pooling_mode=model.pooling_mode,
        baseline=baseline.name if baseline else "",
        baseline_pooling_mode=baseline.pooling_mode if baseline else "",
        data=data,
        pairs=sum(model.space.pairs),
        sentences=sentences,
        rows=_table(spaces),
        figures=figures,
        version=__version__,
    )
    folder.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        (folder / f"{figure.file}.png").write_bytes(figure.drawing.png)
    (folder / PAGE).write_text(text, encoding="utf-8")
    return folder / PAGE


def draw_figures(
    spaces: Mapping[str, EmbeddingSpaceStats], bands: Sequence[str], path: Sequence[PathPoint] = ()
) -> list[ReportFigure]:
    """Draw every figure that there is data for.

    Args:
        spaces: "model" and "baseline" -> what was measured.
        bands: Names of the bands, from `band_labels`.
        path: Of the training run.
    """
    model = spaces["model"]
    points = {
        name: (space.metrics["alignment"], space.metrics["uniformity"])
        for name, space in spaces.items()
        if {"alignment", "uniformity"} <= set(space.metrics)
    }
    figures = [
        ReportFigure(
            "cosine_by_score",
            "Cosines by gold score",
            "The less the rows overlap, the better a cosine tells how alike two texts are; each "
            "model's heights are relative to its highest peak.",
            cosine_figure(
                model.grid,
                {name: space.densities for name, space in spaces.items()},
                bands,
                model.pairs,
            ),
        ),
        ReportFigure(
            "singular_values",
            "Singular values of the embeddings",
            "A flat curve uses all directions of the space alike, a steep one crowds into a few; "
            f"the effective rank says how many, here of {model.dimensions:,}.",
            spectrum_figure(
                {name: space.singular_values for name, space in spaces.items()},
                {name: space.effective_rank for name, space in spaces.items()},
            ),
        ),
    ]
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
    rows |= {
        "alignment": ("alignment", "of pairs of one meaning; lower is better", 3),
        "uniformity": ("uniformity", "of all sentences; lower is better", 3),
        "anisotropy": ("anisotropy", "mean cosine of all sentences; lower is better", 3),
    }
    table = [
        {"name": shown, "meaning": meaning}
        | {name: _number(space.metrics.get(key), digits) for name, space in spaces.items()}
        for key, (shown, meaning, digits) in rows.items()
        if key in metrics
    ]
    dimensions = dict.fromkeys(f"{space.dimensions:,}" for space in spaces.values())
    meaning = f"directions in use, of {' and '.join(dimensions)}; higher is better"
    ranks = {name: f"{space.effective_rank:.1f}" for name, space in spaces.items()}
    return [*table, {"name": "effective rank", "meaning": meaning} | ranks]


_CORRELATION = "Spearman × 100; higher is better"


def _number(value: float | None, digits: int) -> str:
    return (
        "–"
        if value is None or not math.isfinite(value)
        else f"{value:.{digits}f}".replace("-", "−")
    )
