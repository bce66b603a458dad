"""`simcse-trainer export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simcse_trainer.cli.models import MaxSeqLength, Model, Revision, TrustRemoteCode

EXAMPLE = "simcse-trainer export outputs/sup_bert_base outputs/sup_bert_base_onnx --format onnx"


def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="A new folder for what is written.")],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="onnx: a graph, for ONNX Runtime and all that is built on it.",
            metavar="onnx",
            callback=lambda value: _read_format(value),
        ),
    ] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="Also a graph whose weights have 8 bits.")
    ] = False,
    max_seq_length: MaxSeqLength = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = "false",
) -> None:
    """Write a model as another format, and compare its embeddings with those of the model."""
    from simcse_trainer.cli.models import find_place, loading_options, warn_of_servers
    from simcse_trainer.inference.onnx_export import check_export, export_onnx
    from simcse_trainer.model.modeling import SimCSEModel

    check_export(output)
    loaded = SimCSEModel.from_pretrained(
        find_place(model),
        dtype="float32",
        padding_free=False,
        max_seq_length=max_seq_length,
        **loading_options(revision, trust_remote_code),
    )
    found = export_onnx(loaded, output, int8=int8)
    typer.echo(f"{', '.join(found.files)} and what reads them are in {output}.")
    typer.echo(f"Smallest cosine with the model's own embeddings: {found.cosine:.6f}.")
    if found.int8_cosine is not None:
        typer.echo(f"Smallest cosine in 8 bits: {found.int8_cosine:.4f}.")
    warn_of_servers(output)


def _read_format(value: str) -> str:
    if value != "onnx":
        raise typer.BadParameter(f"expected onnx, got {value!r}.")
    return value
