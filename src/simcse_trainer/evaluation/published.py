"""What the SimCSE paper reports, to stand beside one's own scores.

STS: Gao et al. 2021, table 5, and for BERT-large the table of released models in the original
project's README, which has the average only. Transfer: Gao et al. 2021, table E.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.cells import cell_len, set_cell_size

from simcse_trainer.evaluation import published
from simcse_trainer.evaluation.mteb_tasks import PREFIX
from simcse_trainer.evaluation.sts import SPACE_METRICS
from simcse_trainer.evaluation.tasks import RETRIEVAL_METRICS, split_retrieval_metric

STS_TASKS = ("sts12", "sts13", "sts14", "sts15", "sts16", "stsb", "sickr")
TRANSFER_TASKS = ("mr", "cr", "subj", "mpqa", "sst2", "trec", "mrpc")

# (model_type, hidden size, layers, vocabulary) -> the paper's name of the backbone.
_BACKBONES = {
    ("bert", 768, 12, 30522): "BERT-base",
    ("bert", 1024, 24, 30522): "BERT-large",
    ("roberta", 768, 12, 50265): "RoBERTa-base",
    ("roberta", 1024, 24, 50265): "RoBERTa-large",
}


@dataclass(frozen=True)
class PublishedRow:
    """A row of a table of the paper.

    Attributes:
        model: Such as "unsup. SimCSE".
        average: Over all seven tasks, as printed.
        scores: Task -> Spearman x 100 or accuracy; empty where only the average is known.
    """

    model: str
    average: float
    scores: Mapping[str, float] = field(default_factory=dict)


def find_backbone(config: Any) -> str | None:
    """Return the paper's name of a backbone with this configuration, None for all others."""
    names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
    return _BACKBONES.get(tuple(getattr(config, name, None) for name in names))  # type: ignore[arg-type]


def _sts(model: str, *figures: float) -> PublishedRow:
    return PublishedRow(model, figures[-1], dict(zip(STS_TASKS, figures[:-1], strict=False)))


def _transfer(model: str, *figures: float) -> PublishedRow:
    return PublishedRow(model, figures[-1], dict(zip(TRANSFER_TASKS, figures[:-1], strict=False)))


STS: dict[str, Sequence[PublishedRow]] = {
    "BERT-base": (
        _sts("first-last avg.", 39.70, 59.38, 49.67, 66.03, 66.19, 53.87, 62.06, 56.70),
        _sts("whitening", 57.83, 66.90, 60.90, 75.08, 71.31, 68.24, 63.73, 66.28),
        _sts("unsup. SimCSE", 68.40, 82.41, 74.38, 80.91, 78.56, 76.85, 72.23, 76.25),
        _sts("sup. SimCSE", 75.30, 84.67, 80.19, 85.40, 80.82, 84.25, 80.39, 81.57),
    ),
    "BERT-large": (_sts("unsup. SimCSE", 78.41), _sts("sup. SimCSE", 82.21)),
    "RoBERTa-base": (
        _sts("first-last avg.", 40.88, 58.74, 49.07, 65.63, 61.48, 58.55, 61.63, 56.57),
        _sts("whitening", 46.99, 63.24, 57.23, 71.36, 68.99, 61.36, 62.91, 61.73),
        _sts("unsup. SimCSE", 70.16, 81.77, 73.24, 81.36, 80.65, 80.22, 68.56, 76.57),
        _sts("sup. SimCSE", 76.53, 85.21, 80.95, 86.03, 82.57, 85.83, 80.50, 82.52),
    ),
    "RoBERTa-large": (
        _sts("unsup. SimCSE", 72.86, 83.99, 75.62, 84.77, 81.80, 81.98, 71.26, 78.90),
        _sts("sup. SimCSE", 77.46, 87.27, 82.36, 86.66, 83.93, 86.70, 81.95, 83.76),
    ),
}

TRANSFER: dict[str, Sequence[PublishedRow]] = {
    "BERT-base": (
        _transfer("avg. embeddings", 78.66, 86.25, 94.37, 88.66, 84.40, 92.80, 69.54, 84.94),
        _transfer("[CLS] embedding", 78.68, 84.85, 94.21, 88.23, 84.13, 91.40, 71.13, 84.66),
        _transfer("unsup. SimCSE", 81.18, 86.46, 94.45, 88.88, 85.50, 89.80, 74.43, 85.81),
        _transfer("  with MLM", 82.92, 87.23, 95.71, 88.73, 86.81, 87.01, 78.07, 86.64),
        _transfer("sup. SimCSE", 82.69, 89.25, 94.81, 89.59, 87.31, 88.40, 73.51, 86.51),
        _transfer("  with MLM", 82.68, 88.88, 94.52, 89.82, 88.41, 87.60, 76.12, 86.86),
    ),
    "RoBERTa-base": (
        _transfer("unsup. SimCSE", 81.04, 87.74, 93.28, 86.94, 86.60, 84.60, 73.68, 84.84),
        _transfer("  with MLM", 83.37, 87.76, 95.05, 87.16, 89.02, 90.80, 75.13, 86.90),
        _transfer("sup. SimCSE", 84.92, 92.00, 94.11, 89.82, 91.27, 88.80, 75.65, 88.08),
        _transfer("  with MLM", 85.08, 91.76, 94.02, 89.72, 92.31, 91.20, 76.52, 88.66),
    ),
    "RoBERTa-large": (
        _transfer("unsup. SimCSE", 82.74, 87.87, 93.66, 88.22, 88.58, 92.00, 69.68, 86.11),
        _transfer("  with MLM", 84.66, 88.56, 95.43, 87.50, 89.46, 95.00, 72.41, 87.57),
        _transfer("sup. SimCSE", 88.12, 92.37, 95.11, 90.49, 92.75, 91.80, 76.64, 89.61),
        _transfer("  with MLM", 88.45, 92.53, 95.19, 90.58, 93.30, 93.80, 77.74, 90.23),
    ),
}


Results = Mapping[str, float]
_Row = tuple[str, list[float | None]]

# Heading, ending of the results, the paper's rows, its order of tasks, and where it has them.
_TABLES = (
    ("Spearman x 100", "_spearman", published.STS, published.STS_TASKS, "table 5"),
    ("Accuracy", "_accuracy", published.TRANSFER, published.TRANSFER_TASKS, "table E.1"),
)
_TITLES = {"stsb": "STS-B", "sickr": "SICK-R", "korsts": "KorSTS"}


def format_tables(rows: Mapping[str, Results], backbone: str | None) -> str:
    """Format the tables of STS, transfer, retrieval, the space and MTEB, each where there is data.

    Args:
        rows: Label -> what `evaluate_suite` found, of the same tasks.
        backbone: The paper's name of the backbone, whose published rows then follow.
    """
    tables = []
    for heading, ending, paper, order, source in _TABLES:
        tasks = _tasks(rows, ending, order)
        if tasks:
            cells: list[_Row] = [
                (label, _with_mean([found[task + ending] for task in tasks]))
                for label, found in rows.items()
            ]
            beside = [_published(row, tasks, order) for row in paper.get(backbone or "", ())]
            if beside:
                cells += [(f"{backbone} (Gao et al. 2021, {source})", []), *beside]
            titles = [_TITLES.get(task, task.upper()) for task in tasks]
            tables.append(_format([heading, *titles, "Avg."], cells))
    if any(metric in found for found in rows.values() for metric in RETRIEVAL_METRICS):
        tables.append(_format_retrieval(rows))
    space = [name for name in SPACE_METRICS if any(name in found for found in rows.values())]
    if space:
        cells = [(label, [found.get(name) for name in space]) for label, found in rows.items()]
        tables.append(_format(["Lower is better", *space], cells))
    if asked := [name for name in next(iter(rows.values())) if name.startswith(PREFIX)]:
        cells = [
            (name.removeprefix(PREFIX), [found[name] for found in rows.values()]) for name in asked
        ]
        tables.append(_format(["MTEB, main score x 100", *rows], cells))
    return "\n\n".join(tables)


def _format_retrieval(rows: Mapping[str, Results]) -> str:
    """Format a row for each task and way to read the model, and the mean of several tasks."""
    split = [split_retrieval_metric(name) for found in rows.values() for name in found]
    tasks = list(dict.fromkeys(found[0] for found in split if found))
    shown = [task for task in tasks if task or len(tasks) > 2]
    cells: list[_Row] = [
        (
            f"{label}, {task or 'mean'}",
            [found.get(f"{task}_{metric}".lstrip("_")) for metric in RETRIEVAL_METRICS],
        )
        for label, found in rows.items()
        for task in shown
    ]
    return _format(["Retrieval x 100", *RETRIEVAL_METRICS.values()], cells)


def _tasks(rows: Mapping[str, Results], ending: str, order: Sequence[str]) -> list[str]:
    """Return the tasks with such a result, the paper's in its order before all others."""
    first = next(iter(rows.values()))
    found = [key.removesuffix(ending) for key in first if key.endswith(ending)]
    return sorted(found, key=lambda task: order.index(task) if task in order else len(order))


def _published(row: PublishedRow, tasks: Sequence[str], order: Sequence[str]) -> _Row:
    scores = [row.scores.get(task) for task in tasks]
    cells = _with_mean(scores)
    if set(tasks) == set(order):
        cells[-1] = row.average
    return f"  {row.model}", cells


def _with_mean(scores: Sequence[float | None]) -> list[float | None]:
    """Return the scores and their mean, which there is only if they all are."""
    known = [score for score in scores if score is not None]
    mean = sum(known) / len(known) if len(known) == len(scores) else None
    return [*scores, mean]


def _format(titles: Sequence[str], rows: Sequence[_Row]) -> str:
    # In cells of a terminal, of which a letter of Hangul fills two.
    first = max(
        cell_len(label) for label in [titles[0], *(label for label, cells in rows if cells)]
    )
    widths = [max(6, cell_len(title)) for title in titles[1:]]
    head = "".join(
        f"  {' ' * (w - cell_len(t))}{t}" for t, w in zip(titles[1:], widths, strict=True)
    )
    lines = [f"{set_cell_size(titles[0], first)}{head}"]
    for label, cells in rows:
        texts = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
        line = "".join(f"  {t:>{w}}" for t, w in zip(texts, widths, strict=False))
        label = set_cell_size(label, first) if cells else label
        lines.append(f"{label}{line}".rstrip())
    return "\n".join(lines)
