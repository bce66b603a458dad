"""A stream that several processes read: the same rows for all, a share of each batch for each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import IterableDataset
from torch.utils import data


class WholeStream(data.IterableDataset):
    """Hides the files of a stream, by which accelerate would split it among the processes.

    Files are of different lengths: the processes would come to the end of a pass at different
    steps, and wait for each other for ever. Each reads all rows instead, and takes its own of each
    batch.

    Args:
        dataset: The stream.
    """

    def __init__(self, dataset: IterableDataset):
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        """All rows of a pass."""
        return iter(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass: each has an order of its own."""
        self.dataset.set_epoch(epoch)

    def take(self, count: int) -> IterableDataset:
        """Return the first rows."""
        return self.dataset.take(count)
