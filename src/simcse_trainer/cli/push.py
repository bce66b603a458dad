"""`simcse-trainer push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

EXAMPLE = "simcse-trainer push outputs/unsup_bert_base me/unsup-simcse-bert-base"


def push(
    folder: Annotated[Path, typer.Argument(help="The output_dir of a run, or any trained model.")],
    repository: Annotated[str, typer.Argument(help="Where to: user/name.", metavar="REPO")],
    private: Annotated[
        bool | None,
        typer.Option(
            "--private/--public", help="Of a new repository. Default: as the Hub decides."
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="Default: of HF_TOKEN or `hf auth login`.", show_default=False),
    ] = None,
    revision: Annotated[str, typer.Option(help="Branch for the model.")] = "main",
    training_state: Annotated[
        bool, typer.Option(help="Also push the newest checkpoint, for --resume_from_hub.")
    ] = True,
    include: Annotated[
        list[str] | None,
        typer.Option(
            help="Push these files too: a pattern below FOLDER, such as '*.md'; may be repeated.",
            metavar="PATTERN",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base_model",
            "--base-model",
            help="Name on the Hub of the model that an adapter is for, where it was a folder.",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what somebody else has changed there.")
    ] = False,
    timeout_s: Annotated[float, typer.Option(help="Failures are retried for so long.")] = 600.0,
) -> None:
    """Push a trained folder to the Hub. Run again, it does what is missing, or nothing."""
    from simcse_trainer.hub.client import HubSettings, push_folder

    pushed = push_folder(
        folder,
        HubSettings(repository, token=token, private=private, timeout_s=min(60.0, timeout_s)),
        branch=revision,
        training_state=training_state,
        include=include or (),
        base_model=base_model,
        overwrite=overwrite,
        patience_s=timeout_s,
        tell=typer.echo,
    )
    for note in pushed.notes:
        typer.echo(note, err=True)
    count = pushed.commits
    made = f"{count} commit{'s' * (count != 1)}" if count else "nothing to do"
    typer.echo(f"{folder} is on the Hub: {pushed.repository} ({made}).")
