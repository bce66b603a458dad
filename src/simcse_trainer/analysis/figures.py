"""All figures: of the embedding space, a model against its baseline, and of a training run.

Everywhere the model is blue, solid and round, its baseline orange, dashed and square. The only
importer of matplotlib; needs no torch, for the process that speaks to the Hub.
"""

from __future__ import annotations

import functools
import io
import itertools
import logging
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simcse_trainer.errors import InputError

logger = logging.getLogger(__name__)

INK, MUTED, GRID, SURFACE = "#1c1c1c", "#666666", "#dedede", "#ffffff"
# Dark and light, blue and orange: told apart in greyscale, and by those who do not see one of them.
MODEL, MODEL_FILL, BASELINE = "#0a4f9e", "#cddbec", "#a86400"
# What a page that is dark may show instead; the names of CSS variables in its template.
_VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    SURFACE: "surface",
    MODEL: "model",
    MODEL_FILL: "model-fill",
    BASELINE: "baseline",
}
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.labelsize": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": SURFACE,
    "axes.facecolor": SURFACE,
    "lines.linewidth": 1.8,
    "legend.facecolor": SURFACE,
    "legend.edgecolor": SURFACE,
    "legend.framealpha": 0.8,
    "legend.fontsize": 10,
    "svg.fonttype": "path",
    "svg.hashsalt": "simcse-trainer",
}


@dataclass(frozen=True)
class Drawing:
    """A figure as files; the same bytes for the same input."""

    png: bytes
    svg: str


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
    """Read the way of a run through the plane, from the log of a `TrainerState`."""
    found = {
        int(entry["step"]): (float(entry["eval_alignment"]), float(entry["eval_uniformity"]))
        for entry in log_history
        if {"step", "eval_alignment", "eval_uniformity"} <= set(entry)
    }
    return [(step, *found[step]) for step in sorted(found) if all(map(math.isfinite, found[step]))]


def draw_plane(
    axis: Any, path: Sequence[PathPoint], points: Mapping[str, tuple[float, float]] | None = None
) -> None:
    """Draw alignment over uniformity (Gao et al. 2021, figures 2 and 3).

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
        axis.plot(x[-1], y[-1], color=INK, marker="o", markersize=7)
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
    """Return the figure that `draw_plane` draws."""

    def draw(figure: Any) -> None:
        draw_plane(figure.subplots(), path, points)

    return render("plane", draw, (5.4, 4.3))


def cosine_figure(
    grid: Sequence[float],
    densities: Mapping[str, Sequence[Sequence[float]]],
    bands: Sequence[str],
    pairs: Sequence[int],
) -> Drawing:
    """Draw densities of cosines, a row for each band of scores, the highest on top.

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
    """Draw singular values relative to the largest, with the effective rank."""

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
    """Draw anisotropy and both similarities by layer (Ethayarajh 2019)."""
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


def require_matplotlib() -> None:
    """Raise an `InputError` that says how to install it, if it is not there."""
    if find_spec("matplotlib") is None:
        raise InputError("The figures need matplotlib. Run: pip install simcse-trainer[plots]")


def render(
    name: str, draw: Callable[[Any], None], size: tuple[float, float], *, dpi: int = 160
) -> Drawing:
    """Draw on a new figure.

    Args:
        name: Of the figure, in a page with others.
        draw: Draws on the figure that it is given.
        size: Width and height, in inches.
        dpi: Dots per inch of the PNG.

    Returns:
        The PNG; and an SVG to stand in a page, whose colours are the page's CSS variables.

    Raises:
        InputError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    # Settings of the user's own would give another picture on another machine.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE | {"font.family": _font_families()})
        figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        png, svg = io.BytesIO(), io.StringIO()
        with _missing_letters_in_a_line():
            # matplotlib's version and the date, written by default, would differ between machines.
            canvas.print_png(png, metadata={"Software": None})
            unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            FigureCanvasSVG(figure).print_svg(svg, metadata=unsaid)
    return Drawing(png.getvalue(), _for_a_page(svg.getvalue(), name))


# As they are called on Linux, Windows and macOS.
_HANGUL_FONTS = (
    "Noto Sans CJK KR",
    "Noto Sans KR",
    "Malgun Gothic",
    "Apple SD Gothic Neo",
    "AppleGothic",
    "NanumGothic",
    "UnDotum",
)


@functools.cache
def _font_families() -> list[str]:
    """Return matplotlib's own font, and one with Hangul for what that lacks, if there is one."""
    from matplotlib.font_manager import fontManager

    package = find_spec("koreanize_matplotlib")
    for folder in (package and package.submodule_search_locations) or ():
        for font in Path(folder).glob("fonts/NanumGothic.ttf"):
            fontManager.addfont(font)
    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *[name for name in _HANGUL_FONTS if name in installed][:1]]


@contextmanager
def _missing_letters_in_a_line() -> Iterator[None]:
    """Say in one line what to install, where matplotlib warns of each letter."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    missing = [one for one in caught if "missing from font" in str(one.message)]
    if missing:
        logger.warning(
            "No font here has all the letters of a figure's labels, which it shows as boxes. For "
            "Korean: pip install koreanize-matplotlib, or a font such as Noto Sans CJK KR."
        )
    for one in caught:
        if one not in missing:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _for_a_page(svg: str, name: str) -> str:
    """Drop a file's head and fixed colours; the ids in use are of this figure alone."""
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg[svg.index("<svg") :])
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg.strip()


_LogHistory = Sequence[Mapping[str, Any]]
_Points = tuple[list[int], list[float]]


def can_draw_training_curve(log_history: _LogHistory) -> bool:
    """Return whether matplotlib is installed and there are at least two points of loss or score."""
    return find_spec("matplotlib") is not None and bool(_panels(log_history))


def describe_training_curve(log_history: _LogHistory) -> str:
    """Describe the figure of `draw_training_curve`; empty where it cannot be drawn."""
    if not can_draw_training_curve(log_history):
        return ""
    shown = " and ".join(words for words, _, _, _ in _panels(log_history)).capitalize()
    path = ", and the path in the plane of alignment and uniformity"
    return f"{shown} over the steps{path if len(read_path(log_history)) > 1 else ''}"


def draw_training_curve(log_history: _LogHistory, path: str | Path) -> None:
    """Draw loss and score over the steps, and alignment over uniformity beside them.

    Args:
        log_history: Of a `TrainerState` or its `trainer_state.json`: entries with `step` and
            `loss`, or with `step` and what an evaluation gives.
        path: Where to write the PNG, which one input gives byte by byte.

    Raises:
        InputError: matplotlib is not installed, or there are fewer than two points.
    """
    require_matplotlib()
    panels, way = _panels(log_history), read_path(log_history)
    if not panels:
        raise InputError(
            "The log has fewer than two points of loss or evaluation score; train for longer, or "
            "log more often with --logging_steps."
        )

    def draw(figure: Any) -> None:
        left = figure
        if len(way) > 1:
            left, right = figure.subfigures(1, 2, width_ratios=(1.15, 1))
            draw_plane(right.subplots(), way)
        axes = left.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (_, label, (steps, values), style) in zip(axes, panels, strict=True):
            axis.plot(steps, values, linewidth=1.5, **style)
            axis.set_ylabel(label)
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.get_major_locator().set_params(integer=True)

    size = (9.6, 4.2) if len(way) > 1 else (7.0, 2.2 * len(panels) + 0.6)
    Path(path).write_bytes(render("training", draw, size, dpi=110).png)


def _panels(log_history: _LogHistory) -> list[tuple[str, str, _Points, dict[str, Any]]]:
    """Return title, axis label, points and style, told apart in greyscale too."""
    name, score = _score(log_history)
    panels: list[tuple[str, str, _Points, dict[str, Any]]] = [
        ("training loss", "training loss", _points(log_history, "loss"), {"color": INK}),
        (
            "evaluation score",
            name,
            score,
            {"color": MUTED, "linestyle": "--", "marker": "o", "markersize": 4},
        ),
    ]
    return [panel for panel in panels if len(panel[2][0]) > 1]


def _score(log_history: _LogHistory) -> tuple[str, _Points]:
    """Return the mean over the tasks, or a single task under its own name."""
    name = _name_task(log_history, "_spearman")
    if name or not _name_task(log_history, "_ndcg_at_10"):
        return f"{name or 'mean STS'}\n(Spearman x 100)", _points(log_history, "eval_avg_sts")
    name = _name_task(log_history, "_ndcg_at_10")
    return f"{name}\n(nDCG@10 x 100)", _points(log_history, "eval_ndcg_at_10")


def _name_task(log_history: _LogHistory, ending: str) -> str:
    """Return the task with such a score, "mean STS" or "mean" of several, "" of none."""
    keys = {key for entry in log_history for key in entry if key.endswith(ending)}
    tasks = sorted(
        {key.removeprefix("eval_").removesuffix(ending) for key in keys - {"eval" + ending}}
    )
    mean = "mean STS" if ending == "_spearman" else "mean"
    return shorten_label(tasks[0]) if len(tasks) == 1 else mean if tasks else ""


# What stands beside a panel of the training curve, in letters of Latin width.
_LABEL_WIDTH = 18


def shorten_label(text: str) -> str:
    """Cut a name that is longer than its panel is high; a letter of Hangul is as wide as two."""
    widths = [2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text]
    if sum(widths) <= _LABEL_WIDTH:
        return text
    fits = sum(end < _LABEL_WIDTH for end in itertools.accumulate(widths))
    return text[:fits] + "…"


def _points(log_history: _LogHistory, key: str) -> _Points:
    found = {
        int(entry["step"]): float(entry[key])
        for entry in log_history
        if key in entry and "step" in entry and math.isfinite(float(entry[key]))
    }
    return list(found), list(found.values())
