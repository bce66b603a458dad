"""Facts of a run to the text of its model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from simcse_trainer.errors import InputError
from simcse_trainer.hub.card_data import CardData, EvaluatedOn, finite, hub_metadata
from simcse_trainer.hub.escaping import (
    escape,
    escape_example,
    escape_url,
    fence,
    python_string,
    shell_command,
)

_SENTENCES = {
    "en": ("A man is eating food.", "Someone is having a meal."),
    "ko": ("한 남자가 음식을 먹고 있다.", "누군가 식사를 하고 있다."),
}


def render_card(facts: CardData, template: str | None = None) -> str:
    """The whole text of `README.md`, with the metadata that the Hub reads.

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
    """A template's text, the project's own by default.

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
    """What a template can use.

    Each fact under its own name, escaped for Markdown; and
    `title`; `base_model_url`; `sentences`, two to embed; `model_id` as a Python literal;
    `command` as a code block; `score_rows` and `space_rows`: (name, before, after) as texts.
    """
    language = next((code for code in facts.language if code in _SENTENCES), "en")
    return {
        "title": escape(facts.title),
        "model_id": python_string(facts.model_id),
        "sentences": ", ".join(python_string(text) for text in _SENTENCES[language]),
        "pooling_mode": facts.pooling_mode,
        "dimensions": facts.dimensions,
        "max_seq_length": facts.max_seq_length,
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
    """An option's value as a config file has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ", ".join(show(item) for item in value)
    return str(getattr(value, "value", value))


def duration(seconds: float) -> str:
    """Such as "1 h 5 min", "1 min 9 s" or "9 s"."""
    total = round(seconds)
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _score_rows(facts: CardData) -> list[tuple[str, str, str]]:
    scores = {k: v for k, v in facts.scores.items() if k != "avg_sts" or len(facts.scores) > 2}
    rows = _before_and_after(scores, facts.scores_before, 2)
    return [("mean" if name == "avg_sts" else name, old, new) for name, old, new in rows]


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
    evaluated_on={"stsb": EvaluatedOn("mteb/stsbenchmark-sts", split="test")},
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
