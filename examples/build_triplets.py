"""Build the training triplets of the customer-support examples from their intents.

Reads a folder's ``intents.jsonl``, checks it against ``eval.csv`` and writes beside them
``train.csv``: two utterances of one train intent and one of an intent easily confused with it; and
``sentences.txt``: what there is to search, the different sentences of ``eval.csv``. Deterministic.
"""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOLDERS = ("customer_support", "customer_support_ko")
ROUNDS = 2  # how often each utterance serves as sent0
CANDIDATES = 4  # near-miss utterances drawn, of which the one most like sent0 is its hard_neg
MIN_INTENTS = {"train": 50, "eval": 12}
MIN_UTTERANCES = 8  # of every intent, and all have as many


def check(intents: dict[str, dict], eval_sentences: set[str]) -> None:
    """Raise ``ValueError`` where the intents or the graded pairs break the data set's rules."""
    splits = Counter(entry["split"] for entry in intents.values())
    problems = [f"too few {split} intents" for split, n in MIN_INTENTS.items() if splits[split] < n]
    sizes = {len(entry["utterances"]) for entry in intents.values()}
    if len(sizes) > 1 or min(sizes) < MIN_UTTERANCES:
        problems.append(f"intents have {sorted(sizes)} utterances, not one number from 8")
    texts = Counter(t.casefold() for entry in intents.values() for t in entry["utterances"])
    problems += [f"{text!r} occurs {n} times" for text, n in texts.items() if n > 1]
    for name, entry in intents.items():
        for near in entry["near_misses"]:
            if near == name or intents.get(near, {}).get("split") != entry["split"]:
                problems.append(f"{name}: {near!r} is not another intent of the same split")
        for text in entry["utterances"] if entry["split"] == "train" else ():
            if text.casefold() in eval_sentences:
                problems.append(f"{name}: {text!r} is in eval.csv too")
    if problems:
        raise ValueError("\n".join(problems))


def split(text: str) -> set[str]:
    """Return the words of a sentence; of Korean, whose words carry particles, syllable pairs."""
    if any("가" <= letter <= "힣" for letter in text):
        letters = text.replace(" ", "")
        return {letters[i : i + 2] for i in range(len(letters) - 1)}
    return set(text.casefold().split())


def overlap(a: str, b: str) -> float:
    """Return the share of words which two sentences have in common (Jaccard)."""
    words_a, words_b = split(a), split(b)
    return len(words_a & words_b) / len(words_a | words_b)


def build(folder: Path) -> None:
    """Check the data of a folder and rewrite its ``train.csv`` and ``sentences.txt``."""
    lines = (folder / "intents.jsonl").read_text(encoding="utf-8").splitlines()
    intents = {entry["intent"]: entry for entry in map(json.loads, lines)}
    with (folder / "eval.csv").open(encoding="utf-8", newline="") as file:
        eval_texts = [text for row in list(csv.reader(file))[1:] for text in row[:2]]
    check(intents, {text.casefold() for text in eval_texts})
    sentences = "\n".join(dict.fromkeys(eval_texts))
    (folder / "sentences.txt").write_text(sentences + "\n", encoding="utf-8")
    rng = random.Random(7)
    rows: list[tuple[str, str, str]] = []
    for entry in (entry for entry in intents.values() if entry["split"] == "train"):
        near_texts = [text for near in entry["near_misses"] for text in intents[near]["utterances"]]
        texts = rng.sample(entry["utterances"], k=len(entry["utterances"]))
        for shift in range(1, ROUNDS + 1):  # another shift each round, so no pair occurs twice
            for text, other in zip(texts, texts[shift:] + texts[:shift], strict=True):
                drawn = rng.sample(near_texts, k=CANDIDATES)
                rows.append((text, other, max(drawn, key=partial(overlap, text))))
    rng.shuffle(rows)
    with (folder / "train.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("sent0", "sent1", "hard_neg"), *rows])


if __name__ == "__main__":
    for folder_name in FOLDERS:
        build(HERE / folder_name)
