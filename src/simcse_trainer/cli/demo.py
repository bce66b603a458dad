"""`simcse-trainer demo`."""

from __future__ import annotations

from typing import Annotated

import typer

from simcse_trainer.cli.models import (
    AttnImplementation,
    BaseModel,
    BatchSize,
    Corpus,
    Device,
    Dtype,
    IndexFolder,
    MaxSeqLength,
    Model,
    Revision,
    TruncateDim,
    TrustRemoteCode,
)

EXAMPLE = "simcse-trainer demo outputs/quickstart --corpus sentences.txt"


def demo(
    model: Model,
    corpus: Corpus = None,
    index: IndexFolder = None,
    host: Annotated[
        str, typer.Option(help="0.0.0.0 opens it to every machine that reaches this one.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Default: the first free one from 7860."),
    ] = None,
    truncate_dim: TruncateDim = None,
    max_seq_length: MaxSeqLength = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = "false",
    base_model: BaseModel = None,
    dtype: Dtype = None,
    attn_implementation: AttnImplementation = None,
) -> None:
    """Open a page in the browser: search a corpus by meaning, and compare a few sentences."""
    from simcse_trainer.cli.models import load_with_index, loading_options
    from simcse_trainer.inference.demo import require_gradio, serve

    require_gradio()
    simcse = load_with_index(
        model,
        corpus,
        index,
        device=device,
        batch_size=batch_size,
        truncate_dim=truncate_dim,
        max_seq_length=max_seq_length,
        **loading_options(revision, trust_remote_code, base_model, dtype, attn_implementation),
    )
    page = serve(simcse, host=host, port=port)
    typer.echo(f"The page is at {page.local_url} until you press Ctrl-C.")
    page.block_thread()
