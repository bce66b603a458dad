"""Figures; the only importer of matplotlib, which is an extra. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from simcse_trainer.errors import InputError

TRAINING_CURVE = "training_curve.png"

_LogHistory = Sequence[Mapping[str, Any]]
_Points = tuple[list[int], list[float]]


def can_draw_training_curve(log_history: _LogHistory) -> bool:
    """Whether matplotlib is installed and there are at least two points of loss or score."""
    drawable = any(len(steps) > 1 for steps, _ in (_loss(log_history), _score(log_history)[1]))
    return drawable and find_spec("matplotlib") is not None


def draw_training_curve(log_history: _LogHistory, path: str | Path) -> None:
    """Loss and evaluation score over the steps, as a PNG that one input gives byte by byte.

    Args:
        log_history: Of a `TrainerState` or its `trainer_state.json`: entries with `step` and
            `loss`, or with `step` and `eval_avg_sts`.
        path: Where to write it.

    Raises:
        InputError: matplotlib is not installed, or there are fewer than two points.
    """
    if find_spec("matplotlib") is None:
        raise InputError("The figure needs matplotlib. Run: pip install simcse-trainer[plots]")
    if not can_draw_training_curve(log_history):
        raise InputError(
            "The log has fewer than two points of loss or evaluation score; train for longer, or "
            "log more often with --logging_steps."
        )
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    name, score = _score(log_history)
    # Told apart by line and marker, so that they are in greyscale too.
    panels: list[tuple[str, _Points, dict[str, Any]]] = [
        ("training loss", _loss(log_history), {"color": "0.0", "linestyle": "-"}),
        (name, score, {"color": "0.35", "linestyle": "--", "marker": "o", "markersize": 4}),
    ]
    panels = [panel for panel in panels if len(panel[1][0]) > 1]
    # Settings of the user's own would give another picture on another machine.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = Figure(figsize=(7, 2.2 * len(panels) + 0.6), dpi=110, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (label, (steps, values), style) in zip(axes, panels, strict=True):
            axis.plot(steps, values, linewidth=1.5, **style)
            axis.set_ylabel(label)
            axis.grid(color="0.85", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
        axes[-1].set_xlabel("step")
        # matplotlib's version, which it writes by default, would differ between machines.
        canvas.print_png(str(path), metadata={"Software": None})


def _loss(log_history: _LogHistory) -> _Points:
    return _points(log_history, "loss")


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
