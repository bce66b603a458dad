"""The figure of a training run, for its model card. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simcse_trainer.analysis.figures import draw_plane, read_path
from simcse_trainer.analysis.style import INK, MUTED, render, require_matplotlib
from simcse_trainer.errors import InputError

_LogHistory = Sequence[Mapping[str, Any]]
_Points = tuple[list[int], list[float]]


def can_draw_training_curve(log_history: _LogHistory) -> bool:
    """Whether matplotlib is installed and there are at least two points of loss or score."""
    return find_spec("matplotlib") is not None and bool(_panels(log_history))


def describe_training_curve(log_history: _LogHistory) -> str:
    """What `draw_training_curve` shows, in words; empty where it cannot be drawn."""
    if not can_draw_training_curve(log_history):
        return ""
    shown = " and ".join(words for words, _, _, _ in _panels(log_history)).capitalize()
    path = ", and the path in the plane of alignment and uniformity"
    return f"{shown} over the steps{path if len(read_path(log_history)) > 1 else ''}"


def draw_training_curve(log_history: _LogHistory, path: str | Path) -> None:
    """Loss and evaluation score over the steps; beside them alignment over uniformity.

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

    size = (9.6, 4.2) if len(way) > 1 else (7.0, 2.2 * len(panels) + 0.6)
    Path(path).write_bytes(render("training", draw, size, dpi=110).png)


def _panels(log_history: _LogHistory) -> list[tuple[str, str, _Points, dict[str, Any]]]:
    """In words, the axis label, the points and their style, told apart in greyscale too."""
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
    """The mean over the tasks, or a single task under its own name."""
    keys = {key for entry in log_history for key in entry if key.endswith("_spearman")}
    tasks = {key.removeprefix("eval_").removesuffix("_spearman") for key in keys}
    name = next(iter(tasks)) if len(tasks) == 1 else "mean STS"
    return f"{name}\n(Spearman x 100)", _points(log_history, "eval_avg_sts")


def _points(log_history: _LogHistory, key: str) -> _Points:
    found = {
        int(entry["step"]): float(entry[key])
        for entry in log_history
        if key in entry and "step" in entry and math.isfinite(float(entry[key]))
    }
    return list(found), list(found.values())
