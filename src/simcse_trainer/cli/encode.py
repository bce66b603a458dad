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
from simcse_trainer.model.progress import bar, is_watched

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
        watched = processes.is_first and is_watched()
        total = None
        if watched and source != STANDARD_INPUT:
            total = _count_texts(source) // processes.count
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
            with bar(label="Encoding", total=total) as progress:
                blocks = simcse.encode_stream(
                    read_texts(source, blank_lines=True),
                    normalize_to_unit=normalize,
                    batch_size=batch_size,
                    shard=(processes.rank, processes.count),
                    progress=progress if watched else False,
                )
                count = write(processes.gather(blocks), simcse.embedding_dimension)
    if processes.is_first:
        typer.echo(
            f"{count} embeddings of {simcse.embedding_dimension} dimensions are in {output}."
        )


def _count_texts(source: str) -> int:
    """Count the texts of a file: it is read twice, which is quick beside encoding."""
    from simcse_trainer.data.texts import read_texts

    texts = bar(read_texts(source, blank_lines=True), f"Reading {source}", unit="text")
    return sum(1 for _ in texts)
