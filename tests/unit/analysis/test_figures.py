"""Figures of the space: legible whatever the data, the same bytes, in greyscale too."""

import io
import json
import re
import subprocess
import sys
from itertools import combinations

import pytest

pytest.importorskip("matplotlib", reason="pip install simcse-trainer[plots]")

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image, ImageColor

from simcse_trainer.analysis import figures
from simcse_trainer.analysis.figures import (
    cosine_figure,
    draw_plane,
    layers_figure,
    plane_figure,
    read_path,
    spectrum_figure,
)

PATH = [(10 * i, 0.1 + 0.01 * i, -2.6 + 0.8**i) for i in range(9)]
GRID = [i / 10 for i in range(-10, 11)]
DENSITY = [max(0.0, 1 - abs(c - 0.5)) for c in GRID]
LAYERS = {"anisotropy": [0.1, 0.2, 0.3], "self_similarity": [0.9, 0.6, 0.5]}

FIGURES = {
    "plane": lambda: plane_figure({"baseline": (0.1, -1.5), "model": (0.2, -2.5)}, PATH),
    "model-alone": lambda: plane_figure({"model": (0.2, -2.5)}),
    "path-alone": lambda: plane_figure({}, PATH),
    "cosines": lambda: cosine_figure(
        GRID, {"baseline": [DENSITY, []], "model": [DENSITY, DENSITY]}, ["0–1", "1–2"], [3, 1]
    ),
    "spectrum": lambda: spectrum_figure(
        {"baseline": [5, 0.1, 0.0], "model": [3, 2, 2]}, {"baseline": 1.1, "model": 2.9}
    ),
    "layers": lambda: layers_figure({"baseline": LAYERS, "model": LAYERS}),
    "other-depth": lambda: layers_figure({"baseline": {"anisotropy": [0.1]}, "model": LAYERS}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_stands_in_any_page(name):
    drawing = FIGURES[name]()
    assert drawing.png[:8] == b"\x89PNG\r\n\x1a\n"
    assert drawing.svg.startswith("<svg")
    assert drawing.svg.endswith("</svg>")
    # Colours are the page's, and there is nothing to fetch.
    assert not re.findall(r"#[0-9a-f]{6}\b", drawing.svg)
    assert set(re.findall(r"var\(--([a-z-]+)\)", drawing.svg)) <= set(figures._VARIABLES.values())
    assert not re.findall(r'(?:href|src)="[^#]', drawing.svg)
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', drawing.svg)
    ids = re.findall(r' id="([^"]+)"', drawing.svg)
    assert set(used) == set(ids)
    assert len(set(ids)) == len(ids)


@pytest.mark.slow
def test_the_same_bytes_in_another_process(tmp_path):
    code = (
        "import json, sys, hashlib\n"
        "from simcse_trainer.analysis.figures import plane_figure\n"
        "d = plane_figure({'model': (0.2, -2.5)}, [tuple(p) for p in json.load(sys.stdin)])\n"
        "print(hashlib.sha256(d.png + d.svg.encode()).hexdigest())\n"
        "print('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)\n"
    )
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            input=json.dumps(PATH),
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert found[0][1:] == ["False", "False"]


CROWDED = [
    (PATH, {"baseline": PATH[0][1:], "model": PATH[-1][1:]}),
    (PATH, {"baseline": (0.1, -1.6), "model": (0.1, -1.6)}),
    (PATH[:1], {"model": PATH[0][1:]}),
    ([(i, 0.1, -2.0) for i in range(50)], {"model": (0.1, -2.0)}),
    ([], {"baseline": (0.2, -3.0), "model": (0.2001, -3.0)}),
]


@pytest.mark.parametrize(("path", "points"), CROWDED)
def test_the_legend_names_all_and_nothing_covers_another(path, points):
    figure = Figure(figsize=(5.4, 4.3), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    draw_plane(axis, path, points)
    figure.draw_without_rendering()
    legend = axis.get_legend().get_texts()
    named = [text.get_text() for text in legend]
    assert named == [*([_steps(path)] if path else []), *points]
    texts = [Text.get_window_extent(text) for text in [*axis.texts, *legend]]
    for one, other in combinations(texts, 2):
        assert not one.overlaps(other), named
    frame = axis.get_window_extent()
    for box in texts:
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1, named
        assert frame.y0 <= box.y0 <= box.y1 <= frame.y1, named


def _steps(path) -> str:
    return f"steps {path[0][0]} to {path[-1][0]}" if len(path) > 1 else f"step {path[0][0]}"


def test_colours_are_far_apart_in_greyscale():
    def grey(color):
        return Image.new("RGB", (1, 1), ImageColor.getrgb(color)).convert("L").getpixel((0, 0))

    model, baseline, fill = map(grey, (figures.MODEL, figures.BASELINE, figures.MODEL_FILL))
    assert baseline - model > 35
    assert fill - baseline > 90


def test_figures_tell_data_apart():
    first = plane_figure({"model": (0.2, -2.5)}).png
    assert plane_figure({"model": (0.2, -2.4)}, PATH).png != first
    with Image.open(io.BytesIO(first)) as image:
        assert (image.width, image.height) == (864, 688)


def test_the_path_is_what_the_log_has():
    log = [
        {"step": 20, "eval_alignment": 0.2, "eval_uniformity": -2.0},
        {"step": 0, "eval_alignment": 0.1, "eval_uniformity": -1.0},
        {"step": 5, "loss": 1.0},
        {"step": 10, "eval_uniformity": -1.5},
        {"step": 30, "eval_alignment": float("nan"), "eval_uniformity": -2.0},
    ]
    assert read_path(log) == [(0, 0.1, -1.0), (20, 0.2, -2.0)]


def titled(text):
    return figures.render("titled", lambda figure: figure.subplots().set_title(text), (4, 3))


def test_hangul_is_drawn_without_a_warning(recwarn, caplog):
    pytest.importorskip("koreanize_matplotlib", reason="pip install koreanize-matplotlib")
    one, other = titled("고객 문의"), titled("배송 지연")
    assert one.png != other.png, "boxes are all alike"
    assert one.svg != other.svg
    assert not [str(w.message) for w in recwarn if "missing" in str(w.message)]
    assert not caplog.records


def test_without_a_font_one_line_says_what_to_install(monkeypatch, recwarn, caplog):
    monkeypatch.setattr(figures, "_font_families", lambda: ["DejaVu Sans"])
    titled("고객 문의")
    (record,) = caplog.records
    assert "pip install koreanize-matplotlib" in record.message
    assert not [str(w.message) for w in recwarn if "missing" in str(w.message)]
