"""Scores as tables for the terminal, with the paper's rows beside one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from simcse_trainer.evaluation import published
from simcse_trainer.evaluation.published import PublishedRow
from simcse_trainer.evaluation.sts import SPACE_METRICS

Results = Mapping[str, float]
_Row = tuple[str, list[float | None]]

# Heading, ending of the results, the paper's rows, its order of tasks, and where it has them.
_TABLES = (
    ("Spearman x 100", "_spearman", published.STS, published.STS_TASKS, "table 5"),
    ("Accuracy", "_accuracy", published.TRANSFER, published.TRANSFER_TASKS, "table E.1"),
)
_TITLES = {"stsb": "STS-B", "sickr": "SICK-R", "korsts": "KorSTS"}


def format_tables(rows: Mapping[str, Results], backbone: str | None) -> str:
    """The STS table, the transfer table and the space, each where there is something in it.

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
    space = [name for name in SPACE_METRICS if any(name in found for found in rows.values())]
    if space:
        cells = [(label, [found.get(name) for name in space]) for label, found in rows.items()]
        tables.append(_format(["Lower is better", *space], cells))
    return "\n\n".join(tables)


def _tasks(rows: Mapping[str, Results], ending: str, order: Sequence[str]) -> list[str]:
    """The tasks with such a result, the paper's in its order before all others."""
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
    """The scores and their mean, which there is only if they all are."""
    known = [score for score in scores if score is not None]
    mean = sum(known) / len(known) if len(known) == len(scores) else None
    return [*scores, mean]


def _format(titles: Sequence[str], rows: Sequence[_Row]) -> str:
    first = max(len(label) for label in [titles[0], *(label for label, cells in rows if cells)])
    widths = [max(6, len(title)) for title in titles[1:]]
    head = "".join(f"  {t:>{w}}" for t, w in zip(titles[1:], widths, strict=True))
    lines = [f"{titles[0]:<{first}}{head}"]
    for label, cells in rows:
        texts = ["-" if cell is None else f"{cell:.2f}" for cell in cells]
        line = "".join(f"  {t:>{w}}" for t, w in zip(texts, widths, strict=False))
        lines.append(f"{label:<{first}}{line}".rstrip())
    return "\n".join(lines)
