"""How figures look, and how they become files. Needs no torch."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
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
