"""`simcse-trainer merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simcse_trainer.cli.models import TrustRemoteCode
from simcse_trainer.model.progress import announce

EXAMPLE = "simcse-trainer merge outputs/sup_qwen3_0.6b_lora outputs/sup_qwen3_0.6b"


def merge(
    adapter: Annotated[str, typer.Argument(help="A folder with an adapter, or a name on the Hub.")],
    output: Annotated[Path, typer.Argument(help="A new folder for the merged model.")],
    base_model: Annotated[
        str | None,
        typer.Option(help="The adapter's base model, where it is not where it was."),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of the adapter on the Hub.")] = None,
    trust_remote_code: TrustRemoteCode = "false",
) -> None:
    """Add an adapter to the weights it was trained on: a model that everything loads."""
    from simcse_trainer.cli.models import loading_options, warn_of_servers
    from simcse_trainer.errors import InputError
    from simcse_trainer.hub.run_info import write_merged_card
    from simcse_trainer.model.lora import has_adapter
    from simcse_trainer.model.modeling import SimCSEModel

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output} is there already; pass the name of a new folder.")
    announce(f"Loading {adapter}")
    options = loading_options(revision, trust_remote_code)
    model = SimCSEModel.from_pretrained(adapter, base_model=base_model, dequantize=True, **options)
    if not has_adapter(model.backbone):
        raise InputError(f"'{adapter}' holds no adapter: it can be used as it is.")
    announce("Merging, and comparing with the adapter on its base")
    model.save_pretrained(output, lora_save="merged")
    write_merged_card(model, output)
    typer.echo(f"The merged model is in {output}.")
    warn_of_servers(output)
