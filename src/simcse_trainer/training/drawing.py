"""One positive and some negatives of each row's lists, drawn anew every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random

TokenIds = Sequence[int]


@dataclass
class ListDraws:
    """Draws of a row's lists. What is drawn follows from seed, epoch and row, and from no state.

    So a resumed run, any number of workers and any number of processes draw the same.

    Attributes:
        seed: The seed of the run.
        negatives: How many negatives are drawn.
        epoch: The pass over the data, from 0; set at its beginning.
    """

    seed: int
    negatives: int
    epoch: int = 0

    def __call__(
        self, texts: Sequence[TokenIds], positives: int
    ) -> tuple[list[TokenIds | None], list[TokenIds]]:
        """Draw from one row.

        Args:
            texts: Token ids of the anchor, of its positives, and of its negatives.
            positives: How many positives there are.

        Returns:
            The anchor, one positive and the negatives, None where the row has too few; and its
            other positives, which are no negatives of the anchor.
        """
        digest = blake2b(repr((self.seed, self.epoch, texts)).encode(), digest_size=8).digest()
        random = Random(int.from_bytes(digest, "little"))
        chosen = 1 + random.randrange(positives)
        negatives = list(texts[1 + positives :])
        count = min(self.negatives, len(negatives))
        drawn: list[TokenIds | None] = [*random.sample(negatives, count)]
        drawn += [None] * (self.negatives - count)
        others = [ids for place, ids in enumerate(texts[1 : 1 + positives], 1) if place != chosen]
        return [texts[0], texts[chosen], *drawn], others
