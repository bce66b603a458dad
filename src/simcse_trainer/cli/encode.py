"""`simcse-trainer encode`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simcse_trainer.cli.models import (
    AttnImplementation,
    BaseModel,
    BatchSize,
    Device,
    Dtype,
    MaxSeqLength,
    Model,
    Revision,
    TruncateDim,
    TrustRemoteCode,
)

EXAMPLE = "simcse-trainer encode outputs/unsup_bert_base sentences.txt --output embeddings.npy"


def encode(
    model: Model,
    output: Annotated[
        Path,
        typer.Option(
            help="x.npy: an array, float32, a row a text; x.jsonl or x.parquet: text and embedding."
        ),
    ],
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A text a line, or the column of csv, tsv, json, jsonl or parquet; - is standard "
            "input.",
            show_default=False,
        ),
    ] = "-",
    normalize: Annotated[
        bool, typer.Option("--normalize/--no_normalize", help="Embeddings of length 1.")
    ] = True,
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
    """Embed texts, a row for each, blank lines too. The file is there when all of it is."""
    from tqdm.auto import tqdm

    from simcse_trainer.cli.models import load_simcse, loading_options
    from simcse_trainer.data.texts import read_texts
    from simcse_trainer.inference.export import open_embeddings

    with open_embeddings(output) as write:
        simcse = load_simcse(
            model,
            device,
            truncate_dim=truncate_dim,
            max_seq_length=max_seq_length,
            **loading_options(revision, trust_remote_code, base_model, dtype, attn_implementation),
        )
        texts = tqdm(read_texts(source, blank_lines=True), desc="Encoding", disable=None)
        blocks = simcse.encode_stream(texts, normalize_to_unit=normalize, batch_size=batch_size)
        count = write(blocks, simcse.embedding_dimension)
    typer.echo(f"{count} embeddings of {simcse.embedding_dimension} dimensions are in {output}.")
