"""The discrete augmentations that dropout is compared with: crop, word deletion, word shuffle.

Gao et al. 2021, section 3, table 1. They change words, which are what spaces separate in any
language, and whatever the tokenizer: a text without spaces stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from random import Random
from typing import TYPE_CHECKING

from simcse_trainer.model.tokenizer import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Words = list[str]


def crop(words: Words, count: int, random: Random) -> Words:
    """Return a stretch of the words, `count` shorter, anywhere in the text."""
    start = random.randint(0, count)
    return words[start : start + len(words) - count]


def delete_words(words: Words, count: int, random: Random) -> Words:
    """Return all but `count` of the words, in their order."""
    deleted = set(random.sample(range(len(words)), count))
    return [word for place, word in enumerate(words) if place not in deleted]


def shuffle_words(words: Words, count: int, random: Random) -> Words:
    """Return the words with `count` of them, at least 2, each in the place of another of them."""
    places = random.sample(range(len(words)), max(count, 2))
    shuffled = list(words)
    # One turn of a random ring: every chosen word moves, which a random order does not ensure.
    for place, source in zip(places, places[1:] + places[:1], strict=True):
        shuffled[place] = words[source]
    return shuffled


DISCRETE: dict[str, Callable[[Words, int, Random], Words]] = {
    "crop": crop,
    "word_deletion": delete_words,
    "word_shuffle": shuffle_words,
}
AUGMENTATIONS = ("dropout", *DISCRETE, "none")
DEFAULT_RATE = 0.1


def augment(texts: Sequence[str], kind: str, rate: float, *, seed: int) -> list[str]:
    """Change each text of a batch.

    What is random follows from the seed and the batch's texts in their order, and from no state:
    a resumed run and any number of workers get the same, and an epoch that shuffles the rows
    other changes.

    Args:
        texts: The sentences of one batch.
        kind: A key of `DISCRETE`.
        rate: Share of the words that is cut off, deleted or moved, to the nearest word, but at
            least one; one word at least is left.
        seed: The seed of the run.
    """
    digest = blake2b("\0".join([str(seed), *texts]).encode(), digest_size=8).digest()
    random = Random(int.from_bytes(digest, "little"))
    changed = []
    for text in texts:
        words = text.split()
        count = min(max(round(rate * len(words)), 1), len(words) - 1)
        changed.append(" ".join(DISCRETE[kind](words, count, random)) if count > 0 else text)
    return changed


@dataclass(frozen=True)
class DiscreteAugmentation:
    """Texts of a batch to the token ids of their changed copies, which become the positives.

    Attributes:
        kind: A key of `DISCRETE`.
        rate: How much is changed, see `augment`.
        seed: The seed of the run.
        tokenizer: That of the data.
        max_seq_length: Longer texts are cut, in tokens, special ones included.
    """

    kind: str
    rate: float
    seed: int
    tokenizer: PreTrainedTokenizerBase
    max_seq_length: int

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        """Return one list of token ids per text, never empty."""
        changed = augment(texts, self.kind, self.rate, seed=self.seed)
        return tokenize(self.tokenizer, changed, self.max_seq_length)
