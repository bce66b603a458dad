"""`simcse-trainer plan`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simcse_trainer.errors import InputError, at_command_line

if TYPE_CHECKING:
    from simcse_trainer.planning.plan import RunPlan

EXAMPLE = "simcse-trainer plan configs/sup_mistral_7b_qlora.yaml --memory 24GiB"
# Options of training stand behind the config as they do for train_simcse.py.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}

_UNITS = {"": 2**30, "g": 10**9, "gi": 2**30, "m": 10**6, "mi": 2**20}


def plan(
    context: typer.Context,
    config: Annotated[
        str, typer.Argument(help="A recipe, and behind it any --option value of training.")
    ],
    memory: Annotated[
        str | None, typer.Option(help="Of the device, such as 24GiB: what fits, what to change.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="Mean length of a text. Default: all are as long as max_seq_length."),
    ] = None,
    views: Annotated[
        int | None, typer.Option(help="Texts per row, where the data is not here.", min=2)
    ] = None,
    backbone_config: Annotated[
        str | None,
        typer.Option("--backbone_config", help="config.json of a backbone that is out of reach."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the plan as JSON.")] = None,
) -> None:
    """Compute how much memory a training run needs, without weights or data."""
    import transformers

    from simcse_trainer.planning.plan import format_plan

    transformers.utils.logging.set_verbosity_error()
    found = plan_words(
        [config, *context.args],
        memory=None if memory is None else _bytes(memory),
        tokens=tokens,
        views=views,
        backbone_config=backbone_config,
    )
    typer.echo(format_plan(found))
    if output is not None:
        output.write_text(json.dumps(dataclasses.asdict(found), indent=2) + "\n", encoding="utf-8")


@at_command_line
def plan_words(
    words: Sequence[str],
    *,
    memory: int | None = None,
    tokens: int | None = None,
    views: int | None = None,
    backbone_config: str | None = None,
) -> RunPlan:
    """Plan what `train_simcse.py` would do with the same words.

    Args:
        words: `[CONFIG.yaml] [--option value ...]`.
        memory: Bytes of the device.
        tokens: As `plan_run` takes it.
        views: As `plan_run` takes it.
        backbone_config: A config.json, where the model is out of reach.

    Raises:
        InputError: Options, model or data cannot be used.
    """
    from simcse_trainer.cli.config import parse_for_another_machine
    from simcse_trainer.planning.fake_model import read_source
    from simcse_trainer.planning.plan import plan_run

    (model_args, data_args, args), on_cpu = parse_for_another_machine(words)
    source = read_source(model_args, backbone_config)
    options = {"memory": memory, "tokens": tokens, "views": views}
    return plan_run(model_args, data_args, args, source, gpu=not on_cpu, **options)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([gm]i?)?b?\s*", text.lower())
    if match is None:
        raise InputError(f"memory is '{text}'; expected a size such as 24GiB or 16000MB.")
    return int(float(match[1]) * _UNITS[match[2] or ""])
