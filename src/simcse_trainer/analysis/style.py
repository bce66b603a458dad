"""How figures look, and how they become files. Needs no torch."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import product
from typing import Any

from simcse_trainer.errors import InputError

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
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "simcse-trainer",
}


@dataclass(frozen=True)
class Label:
    """A text beside the point (x, y) of an axis; one that is optional goes where it finds room."""

    x: float
    y: float
    text: str
    color: str = INK
    optional: bool = False


@dataclass(frozen=True)
class Drawing:
    """A figure as files; the same bytes for the same input."""

    png: bytes
    svg: str


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
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=size, dpi=dpi, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        draw(figure)
        png, svg = io.BytesIO(), io.StringIO()
        # matplotlib's version and the date, written by default, would differ between machines.
        canvas.print_png(png, metadata={"Software": None})
        unsaid = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(figure).print_svg(svg, metadata=unsaid)
    return Drawing(png.getvalue(), _for_a_page(svg.getvalue(), name))


def _for_a_page(svg: str, name: str) -> str:
    """Without a file's head and fixed colours; the ids in use are of this figure alone."""
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", svg[svg.index("<svg") :])
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var(--{variable})")
    return svg.strip()


def place_labels(
    axis: Any, labels: Sequence[Label], obstacles: Sequence[tuple[float, float]]
) -> None:
    """Put texts beside their points, clear of each other and of what is drawn.

    Args:
        axis: With everything drawn and its limits set.
        labels: The first have first choice.
        obstacles: Points of the data that no text may cover.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure = axis.figure.figure  # of subfigures too
    figure.draw_without_rendering()
    renderer, point = figure.canvas.get_renderer(), figure.dpi / 72
    drawn = [
        Bbox.from_bounds(x - 4 * point, y - 4 * point, 8 * point, 8 * point)
        for x, y in axis.transData.transform(list(obstacles))
    ]
    texts = [text.get_window_extent(renderer) for text in axis.texts]
    frame = axis.get_window_extent(renderer)
    labelled: list[tuple[float, float]] = []
    for label in labels:
        at = axis.transData.transform((label.x, label.y))
        if label.optional and any(math.dist(at, other) < 36 * point for other in labelled):
            continue
        tries = []
        for distance, (right, up) in product((9, 14, 20, 30, 42), _DIRECTIONS):
            text = _annotate(axis, label, distance, right, up)
            text.update_positions(renderer)
            # An annotation's own extent has its line in it.
            box = Text.get_window_extent(text, renderer).padded(1.5 * point)
            text.remove()
            inside = frame.containsx(box.x0) and frame.containsx(box.x1)
            inside = inside and frame.containsy(box.y0) and frame.containsy(box.y1)
            # Better across a line than illegible.
            unreadable = box.count_overlaps(texts) + (not inside)
            tries.append((unreadable, box.count_overlaps(drawn), distance, right, up, box))
        unreadable, across, distance, right, up, box = min(tries, key=lambda found: found[:3])
        if not (label.optional and (unreadable or across)):
            _annotate(axis, label, distance, right, up)
            texts.append(box)
            labelled.append(at)


_DIRECTIONS = ((1, 0), (0, 1), (1, 1), (-1, 1), (-1, 0), (0, -1), (1, -1), (-1, -1))


def _annotate(axis: Any, label: Label, distance: float, right: int, up: int) -> Any:
    diagonal = 0.71 if right and up else 1
    text = axis.annotate(
        label.text,
        (label.x, label.y),
        xytext=(right * distance * diagonal, up * distance * diagonal),
        textcoords="offset points",
        color=label.color,
        ha=("right", "center", "left")[right + 1],
        va=("top", "center", "bottom")[up + 1],
        # Far from its point, a line says whose it is.
        arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5}
        if distance >= 20
        else None,
    )
    text.set_in_layout(False)
    return text
