"""What is shown of work that takes a while: bars and lines on stderr, none where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm


def is_watched() -> bool:
    """Return whether stderr is a terminal, or a notebook shows what is written there."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def bar(
    items: Iterable[Any] | None = None,
    label: str = "",
    *,
    total: int | None = None,
    unit: str = "sentence",
    show: bool | None = None,
) -> Any:
    """Return a labelled bar, which `items` are read through or whose `update` is called.

    Args:
        items: What is worked through.
        label: What is done, such as "Encoding".
        total: How many there are, where `items` do not say it themselves.
        unit: What is counted.
        show: Whether there is a bar; by default where somebody watches.
    """
    hidden = not (is_watched() if show is None else show)
    return tqdm(items, desc=label, total=total, unit=f" {unit}", disable=hidden)


def announce(step: str) -> None:
    """Say which step begins, such as "Loading the model", where somebody watches."""
    if is_watched():
        print(f"{step} ...", file=sys.stderr, flush=True)
