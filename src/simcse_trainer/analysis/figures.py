"""Figures of the embedding space, a model against its baseline. Needs no torch.

Everywhere the model is blue, solid and round, its baseline orange, dashed and square.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from simcse_trainer.analysis.style import (
    BASELINE,
    INK,
    MODEL,
    MODEL_FILL,
    MUTED,
    SURFACE,
    Drawing,
    render,
)

# (step, alignment, uniformity)
PathPoint = tuple[int, float, float]

_COLORS = {"baseline": BASELINE, "model": MODEL}
# The dashes on top, as they let through what is below.
_LINES: dict[str, dict[str, Any]] = {
    "baseline": {"color": BASELINE, "linestyle": (0, (4, 2)), "zorder": 2.2},
    "model": {"color": MODEL, "zorder": 2.1},
}
_MARKERS: dict[str, dict[str, Any]] = {
    "baseline": {"marker": "s", "markerfacecolor": SURFACE},
    "model": {"marker": "o"},
}


def read_path(log_history: Sequence[Mapping[str, Any]]) -> list[PathPoint]:
    """The way of a run through the plane, from the log of a `TrainerState`."""
    found = {
        int(entry["step"]): (float(entry["eval_alignment"]), float(entry["eval_uniformity"]))
        for entry in log_history
        if {"step", "eval_alignment", "eval_uniformity"} <= set(entry)
    }
    return [(step, *found[step]) for step in sorted(found) if all(map(math.isfinite, found[step]))]


def draw_plane(
    axis: Any, path: Sequence[PathPoint], points: Mapping[str, tuple[float, float]] | None = None
) -> None:
    """Alignment over uniformity (Gao et al. 2021, figures 2 and 3).

    Args:
        axis: The axis of a figure to draw on.
        path: Of a training run.
        points: "model" and "baseline" -> alignment and uniformity.
    """
    axis.set_xlabel("uniformity")
    axis.set_ylabel("alignment")
    if path:
        steps = (
            f"steps {path[0][0]:,} to {path[-1][0]:,}" if len(path) > 1 else f"step {path[0][0]:,}"
        )
        x, y = [u for _, _, u in path], [a for _, a, _ in path]
        axis.plot(x, y, color=INK, linewidth=1.2, marker=".", markersize=6, label=steps)
        axis.plot(x[-1], y[-1], color=INK, marker=">", markersize=7)
    for name, (alignment, uniformity) in (points or {}).items():
        options = {"color": _COLORS[name], "markersize": 9, "markeredgewidth": 2, **_MARKERS[name]}
        axis.plot(uniformity, alignment, linestyle="none", label=name, **options)
    axis.margins(0.2)
    arrow = {"arrowstyle": "->", "color": MUTED, "linewidth": 1.2}
    axis.annotate(
        "better",
        (0.015, 0.02),
        xytext=(0.1, 0.06),
        xycoords="axes fraction",
        color=MUTED,
        va="center",
        arrowprops=arrow,
    ).set_in_layout(False)
    if path or points:
        axis.legend()


def plane_figure(
    points: Mapping[str, tuple[float, float]], path: Sequence[PathPoint] = ()
) -> Drawing:
    """Of `draw_plane`."""

    def draw(figure: Any) -> None:
        draw_plane(figure.subplots(), path, points)

    return render("plane", draw, (5.4, 4.3))


def cosine_figure(
    grid: Sequence[float],
    densities: Mapping[str, Sequence[Sequence[float]]],
    bands: Sequence[str],
    pairs: Sequence[int],
) -> Drawing:
    """Densities of cosines, a row for each band of scores, the highest on top.

    Args:
        grid: [G], the cosines at which densities are given.
        densities: "model" and "baseline" -> [bands, G]; [] where a band has no pair.
        bands: What each is called.
        pairs: How many it has.
    """

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        lowest = 1.0
        for name, rows in densities.items():
            # Each model's highest peak is as high as a row: a narrow cone would flatten the other.
            highest = max(max(row, default=0) for row in rows)
            for band, row in enumerate(rows):
                if not row:
                    continue
                curve = [
                    (cosine, band + 0.88 * value / highest)
                    for cosine, value in zip(grid, row, strict=True)
                    if value > highest / 200
                ]
                x, y = zip(*curve, strict=True)
                if name == "model":
                    axis.fill_between(x, band, y, color=MODEL_FILL, linewidth=0, zorder=1.5)
                axis.plot(x, y, **_LINES[name])
                lowest = min(lowest, *x)
        axis.set_xlim(lowest, 1.0)
        axis.hlines(range(len(bands)), lowest, 1.0, color=MUTED, linewidth=0.7, zorder=1.4)
        axis.set_ylim(-0.05, len(bands) + 0.1)
        axis.set_yticks(
            range(len(bands)),
            [f"{band}\n({n:,} pairs)" for band, n in zip(bands, pairs, strict=True)],
            va="bottom",
        )
        axis.tick_params("y", length=0)
        axis.spines["left"].set_visible(False)
        axis.set_xlabel("cosine of the two embeddings")
        axis.set_ylabel("gold score of the pair")
        handles = [axis.plot([], [], **_LINES[name])[0] for name in densities]
        axis.legend(handles, list(densities))

    return render("cosines", draw, (5.4, 4.9))


def spectrum_figure(
    spectra: Mapping[str, Sequence[float]], effective_ranks: Mapping[str, float]
) -> Drawing:
    """Singular values relative to the largest, and where the effective rank is on them."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for name, sigma in spectra.items():
            relative = [value / sigma[0] for value in sigma]
            indices = range(1, len(sigma) + 1)
            axis.semilogy(indices, relative, **_LINES[name])
            name_and_rank = f"{name}: effective rank {effective_ranks[name]:.0f}"
            rank = effective_ranks[name]
            place = min(len(sigma), max(1, round(rank)))
            axis.plot(
                rank,
                relative[place - 1],
                color=_COLORS[name],
                markersize=8,
                markeredgewidth=2,
                label=name_and_rank,
                **_MARKERS[name],
            )
        smallest = min(min(sigma) / sigma[0] for sigma in spectra.values())
        axis.set_ylim(max(smallest / 1.5, 1e-3), 1.5)
        axis.set_xlim(left=0)
        axis.set_xlabel("singular value, from the largest")
        axis.set_ylabel("size, as a share of the largest")
        axis.legend()

    return render("spectrum", draw, (5.4, 4.3))


_MEASURES = {
    "anisotropy": "anisotropy\nof all tokens",
    "self_similarity": "self-similarity\nof a word",
    "intra_sentence_similarity": "similarity\nin a sentence",
}


def layers_figure(layers: Mapping[str, Mapping[str, Sequence[float]]]) -> Drawing:
    """Anisotropy, self-similarity and intra-sentence similarity by layer (Ethayarajh 2019)."""
    measures = {
        measure: text
        for measure, text in _MEASURES.items()
        if all(measure in found for found in layers.values())
    }

    def draw(figure: Any) -> None:
        axes = figure.subplots(len(measures), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (measure, text) in zip(axes, measures.items(), strict=True):
            for name, found in layers.items():
                options = {"markersize": 5, "label": name, **_LINES[name], **_MARKERS[name]}
                axis.plot(found[measure], **options)
            axis.set_ylabel(text)
            axis.margins(y=0.25)
        axes[-1].set_xlabel("layer (0: the embeddings before the first)")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)
        axes[0].legend()

    return render("layers", draw, (5.4, 1.75 * len(measures) + 0.5))
