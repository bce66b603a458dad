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
    """Embed texts, a row for each, blank lines too. The file is there when all of it is.

    Several processes share the work: torchrun --nproc_per_node 2 -m simcse_trainer encode ...
    """
    from contextlib import AbstractContextManager, nullcontext

    from tqdm.auto import tqdm

    from simcse_trainer.cli.models import load_simcse, loading_options
    from simcse_trainer.cli.processes import join_processes
    from simcse_trainer.data.texts import STANDARD_INPUT, read_texts
    from simcse_trainer.errors import InputError
    from simcse_trainer.inference.export import Writer, open_embeddings

    with join_processes() as processes:
        if processes.count > 1 and source == STANDARD_INPUT:
            raise InputError(
                f"{processes.count} processes cannot share standard input; pass the name of a file."
            )
        opened: AbstractContextManager[Writer] = (
            open_embeddings(output)
            if processes.is_first
            else nullcontext(lambda blocks, _: len([*blocks]))
        )
        with opened as write:
            simcse = load_simcse(
                model,
                device or processes.device,
                truncate_dim=truncate_dim,
                max_seq_length=max_seq_length,
                **loading_options(
                    revision, trust_remote_code, base_model, dtype, attn_implementation
                ),
            )
            texts = tqdm(
                read_texts(source, blank_lines=True),
                desc="Encoding",
                disable=None if processes.is_first else True,
            )
            blocks = simcse.encode_stream(
                texts,
                normalize_to_unit=normalize,
                batch_size=batch_size,
                shard=(processes.rank, processes.count),
            )
            count = write(processes.gather(blocks), simcse.embedding_dimension)
    if processes.is_first:
        typer.echo(
            f"{count} embeddings of {simcse.embedding_dimension} dimensions are in {output}."
        )
