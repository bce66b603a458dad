"""What is known of a run to the text of its model card; texts of others escaped, paths cut."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path, PureWindowsPath
from typing import Any
from urllib.parse import quote

from huggingface_hub import ModelCard

from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.tasks import RETRIEVAL_METRICS, label_metric
from simcse_trainer.hub.card_data import CardData, EvaluatedOn, finite, hub_metadata

_SENTENCES = {
    "en": ("A man is eating food.", "Someone is having a meal."),
    "ko": ("한 남자가 음식을 먹고 있다.", "누군가 식사를 하고 있다."),
}


def render_card(facts: CardData, template: str | None = None) -> str:
    """Render the whole text of `README.md`, with the metadata that the Hub reads.

    Args:
        facts: What is known of the model and its run.
        template: Jinja text; by default the project's own. It gets `card_data` and what
            `template_values` returns, and never executes what is in them.

    Raises:
        InputError: The template cannot be rendered.
    """
    if template is None:
        template = read_template(None)
    data, values = hub_metadata(facts), template_values(facts)
    try:
        card = ModelCard.from_template(data, template_str=template, **values)
    except Exception as error:
        # Expressions in a template can raise anything.
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(
            f"The model card's template fails: {type(error).__name__}: {reason}."
        ) from error
    # Sections that were dropped leave their empty lines behind.
    card.text = "\n" + re.sub(r"\n{3,}", "\n\n", card.text).strip() + "\n"
    return str(card)


_TEMPLATE = "model_card_template.md"


def read_template(path: str | None) -> str:
    """Read a template's text, the project's own by default.

    Raises:
        InputError: The user's own cannot be read, does not render, or leaves out the metadata.
    """
    if path is None:
        own = files("simcse_trainer").joinpath(_TEMPLATE)
        if not own.is_file():  # a checkout keeps it where people look for it
            own = Path(__file__).parents[3] / _TEMPLATE
        return own.read_text(encoding="utf-8")
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"model_card_template {path} cannot be read: {reason}. Pass a text file, such as a "
            "changed copy of the project's model_card_template.md."
        ) from error
    if not re.match(r"\s*---\s*\n\s*{{\s*card_data\s*}}\s*\n---\s*\n", template):
        raise InputError(
            f"model_card_template {path} does not begin with the three lines ---, {{{{ card_data "
            "}} and ---, which become the metadata that the Hub reads. Add them."
        )
    for facts in _SAMPLES:
        try:
            render_card(facts, template)
        except InputError as error:
            raise InputError(f"model_card_template {path}: {error} Correct it.") from error
    return template


def template_values(facts: CardData) -> dict[str, Any]:
    """Return the values that a template can use.

    Each fact under its own name, escaped for Markdown; and
    `title`; `base_model_url`; `sentences`, two to embed; `model_id` as a Python literal;
    `command` as a code block; `score_rows`, `retrieval_rows` and `space_rows`: (name, before,
    after) as texts.
    """
    language = next((code for code in facts.language if code in _SENTENCES), "en")
    return {
        "title": escape(facts.title),
        "model_id": python_string(facts.model_id),
        "sentences": ", ".join(python_string(text) for text in _SENTENCES[language]),
        "pooling_mode": facts.pooling_mode,
        "dimensions": facts.dimensions,
        "max_seq_length": facts.max_seq_length,
        "weights_dtype": facts.weights_dtype,
        "normalized": facts.normalized,
        "projection_head": escape(facts.projection_head),
        "head_folder": facts.head_folder,
        "pooler_output": facts.pooler_output,
        "pads_left": facts.pads_left,
        "prompt": escape(facts.prompt),
        "loaders": list(facts.loaders),
        "base_model": escape(facts.base_model),
        "base_model_url": escape_url(facts.base_model),
        "base_model_relation": facts.base_model_relation,
        "origin": escape(facts.origin),
        "notice": [escape(line) for line in facts.notice.split("\n\n") if line],
        "objective": escape(facts.objective),
        "language": [escape(code) for code in facts.language],
        "license": escape(facts.license.removeprefix("other:")),
        "datasets": [(escape(name), escape_url(name)) for name in facts.datasets],
        "sources": escape(facts.sources),
        "rows": "" if facts.rows is None else f"{facts.rows:,}",
        "columns": [escape(name) for name in facts.columns],
        "examples": [[escape_example(text) for text in row] for row in facts.examples],
        "steps": f"{facts.steps:,}" if facts.steps else "",
        "best_step": f"{facts.best_step:,}" if facts.best_step else "",
        "figure": facts.figure,
        "score_rows": _score_rows(facts),
        "retrieval_rows": _retrieval_rows(facts),
        "verdict": escape(facts.verdict),
        "space_rows": _before_and_after(facts.space, facts.space_before, 3),
        "options": {name: escape(show(value)) for name, value in facts.options.items()},
        "command": fence(shell_command(facts.command), "bash") if facts.command else "",
        "seed": "" if facts.seed is None else facts.seed,
        "versions": {escape(name): escape(version) for name, version in facts.versions.items()},
        "commit": escape(facts.commit),
        "hardware": escape(facts.hardware),
        "training_time": "" if facts.training_time is None else duration(facts.training_time),
        "energy": "" if facts.energy is None else f"{facts.energy:.3g}",
        "emissions": "" if facts.emissions is None else f"{facts.emissions:.3g}",
    }


def show(value: Any) -> str:
    """Format an option's value as a config file has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(show(item) for item in value)
    return str(getattr(value, "value", value))


def duration(seconds: float) -> str:
    """Format a duration, such as "1 h 5 min", "1 min 9 s" or "9 s"."""
    total = round(seconds)
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _score_rows(facts: CardData) -> list[tuple[str, str, str]]:
    scores = {k: v for k, v in facts.scores.items() if k != "avg_sts" or len(facts.scores) > 2}
    rows = _before_and_after(scores, facts.scores_before, 2)
    return [("mean" if name == "avg_sts" else name, old, new) for name, old, new in rows]


def _retrieval_rows(facts: CardData) -> list[tuple[str, str, str]]:
    # One task has its own figures and the means, which are the same.
    several = len(facts.retrieval) > 2 * len(RETRIEVAL_METRICS)
    shown = {k: v for k, v in facts.retrieval.items() if several or k not in RETRIEVAL_METRICS}
    rows = _before_and_after(shown, facts.retrieval_before, 2)
    return [
        (escape(label_metric(name)), old, new)
        for name, (_, old, new) in zip(finite(shown), rows, strict=True)
    ]


def _before_and_after(
    after: Mapping[str, float], before: Mapping[str, float], digits: int
) -> list[tuple[str, str, str]]:
    after, before = finite(after), finite(before)
    return [
        (escape(name), f"{before[name]:.{digits}f}" if name in before else "", f"{x:.{digits}f}")
        for name, x in after.items()
    ]


# A user's template is tried with nothing known and with everything.
_BARE = CardData(model_id="me/model", pooling_mode="mean", dimensions=8, max_seq_length=16)
_FULL = replace(
    _BARE,
    projection_head="linear and tanh",
    head_folder="2_Dense",
    prompt="query: {text}",
    base_model="me/base",
    objective="supervised",
    language=["en"],
    license="mit",
    datasets=["me/data"],
    sources="me/data",
    rows=2,
    columns=["sent0"],
    examples=[["a text"]],
    steps=3,
    best_step=2,
    figure="Training loss over the steps",
    scores={"stsb": 80.0},
    scores_before={"stsb": 70.0},
    retrieval={"faq_recall_at_10": 90.0},
    retrieval_before={"faq_recall_at_10": 80.0},
    evaluated_on={"stsb": EvaluatedOn("mteb/stsbenchmark-sts", split="test")},
    verdict="Better: the score rose by 10.00 points.",
    space={"alignment": 0.2},
    space_before={"alignment": 0.3},
    options={"temperature": 0.05},
    command=["python", "train_simcse.py"],
    seed=1,
    versions={"torch": "2"},
    commit="0" * 40,
    hardware="CPU",
    training_time=60.0,
    energy=0.1,
    emissions=1.0,
)
_SAMPLES = (_BARE, _FULL)


# Longer texts of the data are cut.
MAX_CHARACTERS = 200

_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
# An underscore inside a word emphasises nothing.
_MARKDOWN = re.compile(r"([\\`*\[\]|~$#!]|(?<!\w)_|_(?!\w))")
# Controls, surrogates, line and paragraph separators, and invisible marks that turn the direction
# of writing; not the two joiners that words and emoji are made with.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"

# From the root, a home or a drive on; not what stands in an address.
_PATH = re.compile(r"(?<![\w.:/\\~-])(file://)?(~?/|~?\\\\|[A-Za-z]:[\\/])[^\s\"',;]*")

# Of a launcher or a tracker; our own options are known by their names.
_SECRET = re.compile(r"--[\w-]*(token|secret|password|api[_-]?key)", re.IGNORECASE)
_NO_SECRETS = ("--append_eos_token",)


def escape(text: object) -> str:
    """Make one line that Markdown, tables of it, HTML and mathematics on the Hub show as it is."""
    return _MARKDOWN.sub(r"\\\1", _one_line(str(text))).translate(_HTML)


def escape_example(text: str) -> str:
    """Cut a text of the data, and escape it."""
    line = _one_line(text)
    if len(line) > MAX_CHARACTERS:
        line = line[: MAX_CHARACTERS - 4].rstrip() + " ..."
    return escape(line)


def escape_url(name: str) -> str:
    """Escape a name on the Hub for an address."""
    return quote(name, safe="/")


def python_string(text: str) -> str:
    """Write a text as a Python literal, on one line."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def cut_paths(value: Any) -> Any:
    """Put the last name of each absolute path in JSON's values in place of the path."""
    if isinstance(value, str):
        if value[:1] == "/" or PureWindowsPath(value).is_absolute():  # spaces are part of it
            return _last_name(value)
        return _PATH.sub(lambda found: _last_name(found[0]), value)
    if isinstance(value, dict):
        return {cut_paths(name): cut_paths(one) for name, one in value.items()}
    return [cut_paths(one) for one in value] if isinstance(value, list) else value


def fence(code: str, language: str) -> str:
    """Make a code block that its own content cannot end."""
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", code))])
    return f"{ticks}{language}\n{code}\n{ticks}"


def shell_command(words: Sequence[str]) -> str:
    """Write a command as one types it, without options that hold secrets."""
    kept: list[str] = []
    secret = False
    for word in words:
        if word.startswith("--"):
            name, equals, _ = word.partition("=")
            known = name.replace("-", "_").replace("__", "--", 1) in _NO_SECRETS
            secret = _SECRET.fullmatch(name) is not None and not known
            if secret:
                # In `--hub_token=VALUE` nothing follows; in `--hub_token VALUE` the value does.
                secret = not equals
                continue
        elif secret:
            continue
        kept.append(word)
    return shlex.join(kept)


def _last_name(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _one_line(text: str) -> str:
    shown = "".join(
        " " if unicodedata.category(c) in _HIDDEN and c not in _JOINERS else c for c in text
    )
    return " ".join(shown.split())
